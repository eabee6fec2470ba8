"""The files of a run: their folder, and names that no other run has used."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl

from lightning_cap.export.safetensors import goal_stem
from lightning_cap.trainer.records import EVENTS
from lightning_cap.trainer.run_records import CYCLES, RUN
from lightning_cap.utilities import distributed


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes to.

    Attributes:
        folder: For all its files.
        suffix: Of their names: empty, or ``-v1`` and so on where other runs have written to the folder.
        goal_name: What the goals of the run count, as in ``flops=0.50.ckpt``.
    """

    folder: Path
    suffix: str = ""
    goal_name: str = "sparsity"

    @property
    def events(self) -> Path:
        """The records of the pruning events."""
        return self._named(EVENTS)

    @property
    def runs(self) -> Path:
        """The records of the starts of the run."""
        return self._named(RUN)

    @property
    def cycles(self) -> Path:
        """The records of what its cycles ended with."""
        return self._named(CYCLES)

    @property
    def stopped(self) -> Path:
        """The checkpoint of a run that was told to end in a pruning event."""
        return self._named("stopped.ckpt")

    def _named(self, name: str) -> Path:
        return self.folder / f"{Path(name).stem}{self.suffix}{Path(name).suffix}"

    def of_cycle(self, goal: float, best: bool) -> tuple[Path, Path]:
        """The checkpoint and the plain weights of a cycle's end, or of its best epoch."""
        stem = f"{goal_stem(goal, self.goal_name)}{'-best' if best else ''}{self.suffix}"
        return self.folder / f"{stem}.ckpt", self.folder / f"{stem}.safetensors"

    def used(self, goals: Iterable[float]) -> bool:
        """Whether one of its files is there."""
        names = [path for goal in goals for best in (False, True) for path in self.of_cycle(goal, best)]
        return any(path.exists() for path in (self.events, self.runs, self.cycles, *names))

    def reserve(self) -> None:
        """Make the file of the events, so that no other run takes these names. Call it on rank 0 alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.events.touch()


def checkpoint_dir(trainer: pl.Trainer, dirpath: str | None) -> Path:
    """``dirpath``, or ``checkpoints`` in the logger's folder, or in ``default_root_dir``. Call it on every rank."""
    if dirpath is not None:
        return Path(dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def unused_files(folder: Path, goals: Iterable[float], goal_name: str) -> RunFiles:
    """Files that are not there yet: with the first free suffix, as Lightning's own checkpoints. Call it on every rank."""
    wanted = list(goals)
    free = (RunFiles(folder, f"-v{i}" if i else "", goal_name) for i in itertools.count())
    suffix = next(files.suffix for files in free if not files.used(wanted))
    return RunFiles(folder, distributed.gather_objects(suffix)[0], goal_name)
