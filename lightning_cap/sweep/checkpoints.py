"""The checkpoints that a pruning run has left in its folder, and where those that are trained on go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_cap.callbacks.state import decode_state
from lightning_cap.errors import DataError
from lightning_cap.export.safetensors import goal_stem
from lightning_cap.trainer.checkpoints import check_checkpoint
from lightning_cap.trainer.run_records import FINETUNED, FinetunedRecord
from lightning_cap.utilities.arguments import require_path, shown
from lightning_cap.utilities.records import append_record, known_records

_CHECKPOINTS = "checkpoints"  # in the folder of a run
_NAMED = re.compile(r"(?P<counted>[A-Za-z]\w*)=(?P<goal>[\d.e-]+?)(?P<best>-best)?(?P<suffix>-v\d+)?\.ckpt")
_EXAMPLE = "Give the folder of a pruning run, such as runs/digits_gradual/version_0."


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A checkpoint of the end or the best epoch of a cycle.

    Attributes:
        path: Of the file.
        counted: What its goal counts: ``"sparsity"``, or of units ``"parameters"``, ``"flops"`` or ``"latency"``.
        goal: Of its cycle.
        best: Whether it is of the best epoch.
        suffix: Of its run: empty, or ``-v1`` and so on where several have written to the folder.
        metric: That the run has monitored; None if it is not known.
    """

    path: Path
    counted: str
    goal: float
    best: bool
    suffix: str
    metric: str | None

    @property
    def states(self) -> list[Mapping[str, Any]]:
        """States of the pruning callbacks: of one, or of one for units and one for weights."""
        return _pruning_states(_read(self.path))

    @property
    def weights(self) -> Mapping[str, Any]:
        """The state dict of the LightningModule."""
        held: Mapping[str, Any] = _read(self.path)["state_dict"]
        return held


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep of a run writes to.

    Attributes:
        checkpoints: Folder of the run's checkpoints; the records go there.
        finetuned: Folder of the fine-tuned ones, a folder in it for each.
    """

    checkpoints: Path
    finetuned: Path

    def of(self, checkpoint: PrunedCheckpoint) -> Path:
        """The folder of one."""
        return self.finetuned / checkpoint.path.stem

    def files(self, checkpoint: PrunedCheckpoint) -> tuple[Path, Path, Path]:
        """That from which a sweep that was stopped goes on; the checkpoint and the plain weights that it ends with."""
        folder, stem = self.of(checkpoint), f"{checkpoint.path.stem}-finetuned"
        return folder / "last.ckpt", folder / f"{stem}.ckpt", folder / f"{stem}.safetensors"

    def resumable(self, checkpoint: PrunedCheckpoint) -> Path | None:
        """The checkpoint from which a sweep that was stopped goes on; None if there is none yet."""
        last, final, _ = self.files(checkpoint)
        return next((path for path in (last, final) if path.exists()), None)

    def record(self, checkpoint: PrunedCheckpoint) -> FinetunedRecord | None:
        """What a checkpoint ended with; None if it was not fine-tuned to the end, or the file is gone.

        Raises:
            DataError: The records cannot be read.
        """
        known = known_records(self._records(checkpoint), FinetunedRecord)
        found = [record for record in known if Path(record.source).name == checkpoint.path.name]
        return found[-1] if found and self.files(checkpoint)[1].exists() else None

    def append(self, checkpoint: PrunedCheckpoint, record: FinetunedRecord) -> None:
        """Write what a checkpoint ended with."""
        name = checkpoint.path.name
        append_record(self._records(checkpoint), record, lambda old: Path(old.source).name == name)

    def _records(self, checkpoint: PrunedCheckpoint) -> Path:
        return self.checkpoints / f"{Path(FINETUNED).stem}{checkpoint.suffix}{Path(FINETUNED).suffix}"


def find_checkpoints(folder: Path | str) -> tuple[SweepFolder, list[PrunedCheckpoint]]:
    """The checkpoints of the pruning run in a folder, one for each goal, from the least pruned on.

    Of those of one goal, that of the best epoch is taken. Where several runs have written to the folder, the last one's are.

    Args:
        folder: Of a run, or that of its checkpoints.

    Raises:
        ConfigError: It is no path.
        DataError: There is no such folder, it has no checkpoints of a pruning run, or one of them is damaged.
    """
    require_path("RUN_DIR", folder, "runs/digits_gradual/version_0")
    folder = Path(folder).expanduser()
    named = f"RUN_DIR={shown(str(folder))}"
    if not folder.is_dir():
        raise DataError(f"{named}: {'this is a file' if folder.exists() else 'there is no such folder'}. {_EXAMPLE}")
    places = [place for place in (folder, folder / _CHECKPOINTS) if place.is_dir()]
    files = [path for place in places for path in sorted(place.glob("*.ckpt"))]
    found = [one for path in files if (one := _pruned(path)) is not None]
    if not found:
        held = (
            "is empty"
            if not any(folder.iterdir())
            else "has no checkpoints of a pruning run, such as sparsity=0.50.ckpt"
        )
        others = f"; {files[0].name} is none" if files else ""
        raise DataError(f"{named}: it {held}{others}. {_EXAMPLE}")
    place = found[0].path.parent
    chosen = _one_of_each_goal([one for one in found if one.path.parent == place])
    base = place.parent if place.name == _CHECKPOINTS else place
    return SweepFolder(place, base / "finetuned"), chosen


def _one_of_each_goal(found: list[PrunedCheckpoint]) -> list[PrunedCheckpoint]:
    last = {one.counted: max((o.suffix for o in found if o.counted == one.counted), key=_age) for one in found}
    of_goal: dict[tuple[str, float], PrunedCheckpoint] = {}
    for one in sorted((o for o in found if o.suffix == last[o.counted]), key=lambda o: o.best):
        of_goal[one.counted, one.goal] = one
    return [of_goal[key] for key in sorted(of_goal)]


def _age(suffix: str) -> int:
    return int(suffix.removeprefix("-v") or 0)


def _pruned(path: Path) -> PrunedCheckpoint | None:
    """What a file is by its name and the table in it; None of other checkpoints, such as those of `ModelCheckpoint`."""
    match = _NAMED.fullmatch(path.name)
    if match is None:
        return None
    check_checkpoint(path, "checkpoint")
    for held in _pruning_states(_read(path)):
        state, _ = decode_state(held)
        lines = [line for line in state.history if Path(line.checkpoint).name == path.name]
        if lines:
            return PrunedCheckpoint(
                path, match["counted"], lines[-1].goal, lines[-1].best, match["suffix"] or "", state.metric
            )
    return None


def _read(path: Path) -> Mapping[str, Any]:
    held: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return held


def _pruning_states(held: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    states = held.get("callbacks")
    every = states.values() if isinstance(states, Mapping) else ()
    return [one for one in every if isinstance(one, Mapping) and "collection_index" in one and "masks" in one]


def describe(checkpoint: PrunedCheckpoint) -> str:
    """``sparsity 0.60``; with the file in brackets where the run may have another one of that goal."""
    stem = goal_stem(checkpoint.goal, checkpoint.counted)
    file = f" ({checkpoint.path.name})" if checkpoint.path.stem != stem else ""
    return f"{stem.replace('=', ' ')}{file}"
