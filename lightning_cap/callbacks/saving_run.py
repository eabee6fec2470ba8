"""The part of `CAPPruningCallback` that keeps what each cycle ends with: its files and its line of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cap.callbacks.checkpoint_io import save_checkpoint
from lightning_cap.callbacks.checkpointed import CheckpointedRun
from lightning_cap.callbacks.checks import refuse_unlogged
from lightning_cap.callbacks.cost import price_units
from lightning_cap.callbacks.cycle import monitored, save_cycle, with_files
from lightning_cap.callbacks.run import writes_files
from lightning_cap.callbacks.run_files import RunFiles
from lightning_cap.callbacks.run_log import RunLog, run_record
from lightning_cap.sparsity.targets import measured_sparsity
from lightning_cap.trainer import compat
from lightning_cap.trainer.ending import run_unless_told
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.trainer.model_flops import count_flops
from lightning_cap.trainer.run_records import CycleRecord, RunRecord
from lightning_cap.trainer.saving import goal_name, saving
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import shown
from lightning_cap.utilities.records import known_records


class SavingRun(CheckpointedRun):
    """Saves cycles. A subclass says when they end."""

    save: Literal["last", "best", "both", "none"]
    save_sparsities: list[float] | None
    monitor: str | None
    mode: Literal["min", "max"]
    evaluate: bool
    include: list[str] | None
    exclude: list[str] | None
    existing_zeros: bool

    def __init__(self) -> None:
        super().__init__()
        self._validated = -1  # the last epoch that was
        self._log = RunLog()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the cycle's best so far."""
        if trainer.state.fn != "fit":
            return
        refuse_unlogged(trainer, self.monitor)
        if trainer.sanity_checking:
            return
        self._validated = trainer.current_epoch
        self._save_best(trainer, pl_module)

    def end_cycle(
        self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Save the cycle that ends with ``epoch``, once; its accuracy is that of this epoch's weights or none."""
        cycle = self._state.cycle
        if cycle is None or cycle.saved or cycle.begun > epoch:
            return
        if metrics is None:
            fresh = self._validated == epoch
            metrics = trainer.callback_metrics if fresh else evaluate(trainer, module) if self.evaluate else {}
        cycle.saved = True
        self._save_cycle(trainer, module, cycle.goal, epoch, metrics)

    def _prune_unless_told(
        self, trainer: pl.Trainer, epoch: int, prune: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Run an event. If the process is told to end in it, abandon it, or if it is done leave it so, and save a checkpoint.

        Raises:
            SIGTERMException: The run ends; not if nothing is left to train.
        """
        files = self._log_files(trainer)

        def save(after: dict[str, float] | None) -> None:
            if files is not None and (after is None or epoch != trainer.max_epochs):
                with compat.before_epoch(trainer):
                    save_checkpoint(trainer, str(files.stopped))

        after, ends = run_unless_told(trainer, prune, save)  # signals are held until the checkpoint is there
        if after is not None and (not ends or epoch == trainer.max_epochs):
            return after
        advice = "Go on from your last checkpoint."
        if files is not None:
            advice = f"Go on with ckpt_path={shown(str(files.stopped))}."
        outcome = "abandoned, and nothing of it is left" if after is None else "done"
        rank_zero_info(f"SIGTERM: the run ends, with the pruning event of epoch {epoch} {outcome}. {advice}")
        raise SIGTERMException

    def _save_best(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the cycle's best so far, if this epoch is. To be called when it has been validated."""
        cycle = self._state.cycle
        if cycle is None or cycle.saved or self.save not in ("best", "both"):
            return
        values = distributed.gather_objects(monitored(trainer.callback_metrics, self.monitor)[1])
        if cycle.improves(values[0], self.mode):  # one decision for all
            self._save_cycle(trainer, module, cycle.goal, trainer.current_epoch, trainer.callback_metrics, best=True)

    def _save_cycle(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        goal: float,
        epoch: int,
        metrics: Mapping[str, Any],
        best: bool = False,
    ) -> None:
        if self.save_sparsities is not None and goal not in self.save_sparsities:
            return
        writes = writes_files(trainer) and self.save in (("best", "both") if best else ("last", "both"))
        record = self._line(goal, epoch + 1, metrics, best)
        record = with_files(record, self._active.files) if writes else record
        self._state.history = [r for r in self._state.history if (r.goal, r.best) != (goal, best)] + [record]
        if writes:
            save_cycle(trainer, module, self._active.targets, record)
        self._log.keep(self._state.history, self._state.metric)

    def _line(self, goal: float, epochs: int, metrics: Mapping[str, Any], best: bool = False) -> CycleRecord:
        """The model as it is now, in the table."""
        targets = self._active.targets
        saved = saving(self.pruner, targets, self.masks)
        return CycleRecord(goal, epochs, self._value(metrics), measured_sparsity(targets), best, saving=saved)

    def _begin_log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write down that the run begins, and on what."""
        run, files = self._active, self._log_files(trainer)
        if files is None:
            self._log.close()
            return
        own = ("include", "exclude", "existing_zeros", "evaluate", "save", "save_sparsities", "monitor")
        settings = {**self._settings(run), **{name: shown(getattr(self, name)) for name in own}}
        metric = self.monitor or self._state.metric
        mode = self.mode if self.monitor else None
        flops = None if run.targets.is_sharded else count_flops(trainer, module, self.seed)
        record = run_record(trainer, module, run, flops, goal_name(self.pruner), metric, mode, settings)
        self._log.begin(files, record, self._state.history)

    def _begin_log_if_stopped(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write down that a run goes on which was stopped between its last step and saying that it had come to its end."""
        files, goal = self._log_files(trainer), goal_name(self.pruner)
        known = [] if files is None else known_records(files.runs, RunRecord)
        last = [record.state for record in known if record.counted == goal][-1:]
        if distributed.gather_objects(last not in ([], ["finished"]))[0]:
            self._begin_log(trainer, module)

    def _value(self, metrics: Mapping[str, Any]) -> float | None:
        """Of the monitored metric, whose name is kept for the table."""
        name, value = monitored(metrics, self.monitor)
        self._state.metric = name or self._state.metric
        return value

    def _price_units(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        files = self._log_files(trainer)
        price_units(trainer, module, self.pruner, self._active, self.seed, None if files is None else files.folder)

    def _log_files(self, trainer: pl.Trainer) -> RunFiles | None:
        return self._active.files if writes_files(trainer) and self.save != "none" else None
