"""The part of `CAPPruningCallback` that checkpoints hold."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_cap.callbacks.cycle import Cycle
from lightning_cap.callbacks.resume import DataOrder, random_state
from lightning_cap.callbacks.run import Run
from lightning_cap.callbacks.settings import describe_settings
from lightning_cap.callbacks.state import Restored, RunState, decode_state, encode_state, load_masks, load_pruner
from lightning_cap.errors import ConfigError
from lightning_cap.pruners import Pruner
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.sparsity.cost import StepPath
from lightning_cap.sparsity.ends import PENDING
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.trainer.run_records import CycleRecord


class CheckpointedRun(pl.Callback):
    """A run and what it must remember. A subclass has the settings, and tells the run what to do."""

    schedule: SparsitySchedule
    pruner: Pruner
    num_recomputations: int
    recomputation_path: StepPath
    recalibrate: bool
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._state = RunState()
        self._restored: Restored | None = None
        self._packed: dict[str, Any] | None = None
        self._run: Run | None = None
        self._previous: Run | None = None
        self._order = DataOrder()
        self._first_rng: dict[str, Any] | None = None  # before the data of the first epoch was begun, while it is that

    @property
    def state_key(self) -> str:
        """The class, and whether units are pruned: a callback of units and one of weights are told apart in checkpoints."""
        return f"{super().state_key}[units]" if self.pruner.takes_units else super().state_key

    @property
    def history(self) -> list[CycleRecord]:
        """Lines of the table: the model before the first event, and each cycle's end or best epoch."""
        return self._state.history

    @property
    def masks(self) -> MaskSet:
        """The masks in force (during and after ``fit``)."""
        return self._active.masks

    @property
    def _recomputations(self) -> tuple[int, StepPath]:
        return self.num_recomputations, self.recomputation_path

    @property
    def starts(self) -> list[int]:
        """Epochs of the events that begin a cycle (during and after ``fit``)."""
        return self._active.starts

    @property
    def cycle(self) -> Cycle | None:
        """The one that the run is in, or was in last; None before the first event."""
        return self._state.cycle

    def is_due(self, epoch: int) -> bool:
        """Whether an event is to be run at an epoch of the running ``fit``."""
        return epoch in self._active.events and epoch not in self._state.done

    @property
    def run(self) -> Run:
        """What belongs to the running ``fit``: targets, masks, events.

        Raises:
            ConfigError: There has been none yet.
        """
        return self._active

    @property
    def _active(self) -> Run:
        if self._run is None:
            raise ConfigError(
                f"{type(self).__name__}: it has not been part of a running fit yet. Pass it to Trainer(callbacks=[...])."
            )
        return self._run

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one run, so that copies and pickles do not carry the model."""
        attached = ("log", "log_dict")  # by Lightning, the model's own
        kept = {name: value for name, value in self.__dict__.items() if name not in attached}
        return {**kept, "_run": None, "_previous": None, "_packed": self._packed_masks(), "_order": DataOrder()}

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), units, the pruner's state, schedule cursor, cycle, collection index, every rank's random state.

        Call it on every rank, as Lightning does.
        """
        rngs = random_state(self._order, self._first_rng)
        settings = {} if self._run is None else self._settings(self._run)
        known = self._known_ends(), self._known_units()
        held = Restored(self._packed_masks(), self.pruner.state_dict(), settings, rngs, *known)
        return encode_state(self._state, held)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state; it is put in force when ``fit`` goes on.

        Raises:
            DataError: It is damaged, or of another version.
        """
        self._state, self._restored = decode_state(state_dict)
        self._packed = self._restored.masks
        load_pruner(self.pruner, self._restored)
        if self._run is not None and self._packed is not None:  # in the middle of a fit: a tuner puts the start back
            load_masks(self._run.masks, self._packed)
            self._run.masks.apply_to_weights()

    def _settings(self, run: Run) -> dict[str, str]:
        others: dict[str, Any] = {"num_recomputations": self.num_recomputations, "seed": self.seed}
        if self.recomputation_path != "exponential":
            others["recomputation_path"] = self.recomputation_path
        if self.recalibrate:
            others["recalibrate"] = True
        rule = self.schedule if self.schedule.adapts else None
        return describe_settings(run.events, self.pruner, rule, **others)

    def _packed_masks(self) -> dict[str, Any] | None:
        if self._run is None:
            return self._packed
        return None if self._run.targets.ends is PENDING else self._run.masks.state_dict()

    def _known_ends(self) -> dict[str, Any] | None:
        if self._run is None:
            return None if self._restored is None else self._restored.ends
        ends = self._run.targets.ends
        return None if ends is None or ends is PENDING else ends.to_state()

    def _known_units(self) -> dict[str, Any] | None:
        if self._run is None:
            return None if self._restored is None else self._restored.units
        units = self._run.targets.units
        return None if units is None else units.state_dict()
