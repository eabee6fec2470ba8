"""`CAPPruningCallback`: gradual pruning inside a Lightning run. Hooks, checkpoint state and logging; no maths."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_cap.callbacks import checks
from lightning_cap.callbacks.checkpoint_io import make_checkpoints_atomic
from lightning_cap.callbacks.cycle import Cycle, CycleRecord, checkpoint_dir, monitored, save_cycle
from lightning_cap.callbacks.event_log import event_record, log_event
from lightning_cap.callbacks.lr_restart import refuse_beyond_max_steps, restart_schedulers
from lightning_cap.callbacks.optimizer_state import sync_optimizer_state
from lightning_cap.callbacks.resume import begin_epoch_anew, restore_random_state
from lightning_cap.callbacks.run import Run, is_dry
from lightning_cap.callbacks.steps import PruningSteps, plan_steps, pruners_of, validate_steps
from lightning_cap.callbacks.summary import print_table
from lightning_cap.callbacks.weight_averaging import mask_averages, restart_averages
from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAP, Pruner
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets, measured_sparsity
from lightning_cap.trainer import compat
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.trainer.event import EventReport, PruningEvent
from lightning_cap.trainer.progress_bar import end_bar, event_progress
from lightning_cap.utilities import distributed, rng


class CAPPruningCallback(pl.Callback):
    """Prune while training: an event at each scheduled epoch's start, masks in force in between, one checkpoint per goal.

    Args:
        schedule: Epoch -> sparsity, e.g. ``SparsitySteps({0: 0.4, 20: 0.5})``.
        pruner: The method. Default: `CAP` with its defaults.
        include: Globs or names of the weights to prune. Default: see `Targets.from_model`.
        exclude: Globs or names to leave dense.
        num_recomputations: Splits every event into so many of rising sparsity, each with fresh gradients.
        existing_zeros: Take the zeros that the targets have when training starts as pruned already.
        save: ``"last"``: at the end of each cycle; ``"best"``: at its best epoch by ``monitor``; ``"both"`` or ``"none"``.
        save_sparsities: The scheduled sparsities to save checkpoints of. Default: all.
        dirpath: Folder of ``sparsity=0.50.ckpt`` and ``.safetensors``. Default: ``checkpoints`` beside the logs.
        monitor: Logged metric for the table and for ``save="best"``. Default: the logged validation accuracy.
        mode: Whether more (``"max"``) or less of ``monitor`` is better.
        evaluate: Validate right before and after each event that begins a cycle (all, unless ``pruner.regrows``); log both.
        seed: Key of the calibration samples and their augmentation, with the event and the sample's index.

    Raises:
        ConfigError: An argument is out of range. What depends on the Trainer and the model is refused when ``fit`` begins.
    """

    def __init__(
        self,
        schedule: SparsitySchedule,
        pruner: Pruner | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        num_recomputations: int = 1,
        existing_zeros: bool = True,
        save: Literal["last", "best", "both", "none"] = "last",
        save_sparsities: list[float] | None = None,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        evaluate: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.check_settings(num_recomputations, save, monitor, mode, seed)
        self.schedule = schedule
        self.pruner = pruner or CAP()
        self.include, self.exclude = include, exclude
        self.num_recomputations = num_recomputations
        self.existing_zeros = existing_zeros
        self.save, self.save_sparsities, self.dirpath = save, save_sparsities, dirpath
        self.monitor, self.mode = monitor, mode
        self.evaluate = evaluate
        self.seed = seed
        self.history: list[CycleRecord] = []
        self._done: list[int] = []
        self._collection_index = 0
        self._cycle: Cycle | None = None
        self._restored: dict[str, Any] = {}
        self._packed: dict[str, Any] | None = None
        self._run: Run | None = None
        self._previous: Run | None = None
        self._validated = -1
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one run, so that copies and pickles do not carry the model."""
        attached = ("log", "log_dict")  # by Lightning, the model's own
        kept = {name: value for name, value in self.__dict__.items() if name not in attached}
        return {**kept, "_run": None, "_previous": None, "_packed": self._packed_masks()}

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), the pruner's state, schedule cursor, cycle, collection index and every rank's random state.

        Call it on every rank, as Lightning does.
        """
        return {
            "masks": self._packed_masks(),
            "pruner": self.pruner.state_dict(),
            "done": list(self._done),
            "collection_index": self._collection_index,
            "cycle": None if self._cycle is None else asdict(self._cycle),
            "history": [record.to_json() for record in self.history],
            "rng": distributed.gather_objects(rng.capture()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state; it is put in force when ``fit`` goes on."""
        self._restored = dict(state_dict)
        self._packed = state_dict["masks"]
        if self._run is not None and self._packed is not None:  # in the middle of a fit: a tuner puts the start back
            self._run.masks.load_state_dict(self._packed)
            self._run.masks.apply_to_weights()
        self.pruner.load_state_dict(state_dict.get("pruner", {}))
        self._done, self._collection_index = list(state_dict["done"]), state_dict["collection_index"]
        self._cycle = None if state_dict["cycle"] is None else Cycle(**state_dict["cycle"])
        self.history = [CycleRecord.from_json(line) for line in state_dict["history"]]

    def _packed_masks(self) -> dict[str, Any] | None:
        return self._packed if self._run is None else self._run.masks.state_dict()

    # ------------------------------------------------------------------ start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        if stage != "fit":
            return
        self._restored, self._packed = {}, None  # of a fit that did not come to its end
        self._previous, self._run = self._run or self._previous, None
        checks.refuse_sharding(trainer)
        checks.refuse_manual(pl_module, pruners_of(self.pruner, self.schedule, self._events(trainer)))
        make_checkpoints_atomic(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the targets, restore or begin the masks, and put them in force."""
        compat.check_run(trainer, pl_module, resumed=bool(self._restored))
        targets = Targets.from_model(pl_module, self.include, self.exclude)
        self.pruner.check(targets)
        same_model = self._previous is not None and all(
            targets.get(name) is weight for name, weight in self._previous.targets.items()
        )
        packed = self._packed if self._restored else None
        if same_model and not self._restored and self._previous is not None:
            packed = self._previous.masks.state_dict()
        masks = MaskSet(targets)
        if packed is not None:
            masks.load_state_dict(packed)
        elif self.existing_zeros:
            masks.mask_zeros()
        self._previous, self._validated = None, -1
        if not self._restored:
            self._done = [epoch for epoch in self._done if epoch < trainer.current_epoch]
            if trainer.current_epoch == 0:
                self.history, self._cycle, self._collection_index = [], None, 0
        masks.apply_to_weights()
        folder = checkpoint_dir(trainer, self.dirpath)
        self._run = Run(targets, masks, self._events(trainer), folder, self.pruner, self.schedule)
        checks.refuse_foreign_records(trainer, self._log_folder(trainer))
        mask_averages(trainer, masks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Try one gradient, mask the optimizer state, begin the first LR cycle; restore the random state mid-epoch."""
        run = self._active
        for optimizer in trainer.optimizers:
            run.masks.apply_to_optimizer(optimizer)
        restart_schedulers(trainer, run.starts, self._warned, only_new=bool(self._restored))
        due = {epoch: goal for epoch, goal in run.events.items() if epoch not in self._done}
        refuse_beyond_max_steps(trainer, list(due))
        goals = [goal for epoch, goal in due.items() if epoch >= trainer.current_epoch]
        validate_steps(self.pruner, self.schedule, run.targets, run.masks, goals, self.num_recomputations)
        if due:
            for pruner in pruners_of(self.pruner, self.schedule, run.events):
                self._event(trainer, pl_module, pruner).dry_run(self._collection_index)
        if self._restored and compat.restarted_mid_epoch(trainer):
            restore_random_state(self._restored)

    # ----------------------------------------------------------------- events

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the event that is scheduled for this epoch, if it has not been run yet."""
        resumed = restore_random_state(self._restored)
        epoch = trainer.current_epoch
        if epoch in self._active.events and epoch not in self._done:
            self._prune(trainer, pl_module, epoch)
        pl_module.log("sparsity", self._active.masks.global_sparsity, on_step=False, on_epoch=True)
        if resumed:
            begin_epoch_anew(trainer)

    def _prune(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> dict[str, float]:
        run, goal = self._active, self._active.events[epoch]
        begins = epoch in run.starts or self._cycle is None or self._cycle.goal != goal  # else the cycle goes on
        before = evaluate(trainer, module) if self.evaluate and begins else {}
        known = {**(trainer.callback_metrics if self._validated == epoch - 1 else {}), **before}
        if begins:  # due now only in a run that was stopped at the validation of the cycle's last epoch
            self._end_cycle(trainer, module, epoch - 1, known)
        if not self.history:
            value = monitored(known, self.monitor)[1]
            self.history.append(CycleRecord(0.0, epoch, value, measured_sparsity(run.targets)))
        steps = plan_steps(self.pruner, self.schedule, run.masks, goal, epoch, self.num_recomputations)
        if steps is None:
            self._done.append(epoch)
            return before
        report = self._run_event(trainer, module, steps, epoch, begins)
        self._done.append(epoch)
        self._cycle = Cycle(goal, None if begins or self._cycle is None else self._cycle.best)
        if begins:
            restart_schedulers(trainer, run.starts, self._warned)
        after = evaluate(trainer, module) if self.evaluate and begins else {}
        record = event_record(epoch, goal, report, run.masks, before, after)
        log_event(trainer, record, monitored(known, self.monitor)[0], self._log_folder(trainer))
        return after

    def _run_event(
        self, trainer: pl.Trainer, module: pl.LightningModule, steps: PruningSteps, epoch: int, begins: bool
    ) -> EventReport:
        """Go to the goal of an event; bring weights, optimizers and averages in line with the masks."""
        run = self._active
        with event_progress(trainer, f"Pruning to {run.events[epoch]:.4g}") as progress:
            steps.pruner.begin_event(run.done(epoch))
            event = self._event(trainer, module, steps.pruner, progress)
            self._collection_index = event.run(steps.sparsities, self._collection_index)
        run.masks.apply_to_weights()
        for optimizer in trainer.optimizers:
            sync_optimizer_state(optimizer, run.targets, run.masks, event.grown, reset_momentum=epoch in run.phases)
        if begins:
            restart_averages(trainer, module)
        return event.report

    def _event(self, trainer: pl.Trainer, module: Any, pruner: Pruner, progress: Any = None) -> PruningEvent:
        run = self._active
        return PruningEvent(trainer, module, pruner, run.targets, run.masks, self.seed, progress)

    # ---------------------------------------------------------- between events

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients of pruned weights are zero."""
        self._active.masks.apply_to_gradients()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pruned weights are zero, in averaged copies too."""
        self._active.masks.apply_to_weights()
        mask_averages(trainer, self._active.masks)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the cycle's best so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = trainer.current_epoch
        if self._cycle is None or self.save not in ("best", "both"):
            return
        if self.monitor not in trainer.callback_metrics:
            raise ConfigError(
                f"monitor={self.monitor!r} was not logged in validation; logged are {sorted(trainer.callback_metrics)}. Name one "
                "of those, or use save='last'."
            )
        values = distributed.gather_objects(monitored(trainer.callback_metrics, self.monitor)[1])
        value = values[0]  # one decision for all
        if self._cycle.improves(value, self.mode):
            metrics = trainer.callback_metrics
            self._save_cycle(trainer, pl_module, self._cycle.goal, trainer.current_epoch, metrics, best=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the cycle before the next event."""
        following = trainer.current_epoch + 1
        if following in self._active.starts or following == trainer.max_epochs:
            self._end_cycle(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The event at the end of training, if there is one; save the last cycle if training stopped early."""
        last, run = trainer.current_epoch - 1, self._active
        self._end_cycle(trainer, pl_module, last)
        if trainer.max_epochs in run.events and trainer.max_epochs not in self._done:
            self._end_cycle(trainer, pl_module, last, self._prune(trainer, pl_module, trainer.max_epochs))
        missed = {epoch: s for epoch, s in run.events.items() if epoch not in self._done}
        if missed:
            rank_zero_warn(
                f"Training ended before the pruning events of epochs {missed}; the model was not pruned that far."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table: dense accuracy, and accuracy, real sparsity and checkpoint of each goal."""
        if trainer.max_epochs in self._active.events and trainer.max_epochs not in self._done:
            self.on_train_end(trainer, pl_module)  # of a run that was stopped in this event: nothing is left to train
        self._restored = {}
        if trainer.is_global_zero and self.history:
            end_bar(trainer, pl_module)
            print_table(self.history, monitored(trainer.callback_metrics, self.monitor)[0])

    def _end_cycle(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, metrics: Any = None) -> None:
        """Save the cycle that ends with ``epoch``, once; its accuracy is that of this epoch's weights or none."""
        if self._cycle is None or self._cycle.saved:
            return
        if metrics is None:
            fresh = self._validated == epoch
            metrics = trainer.callback_metrics if fresh else evaluate(trainer, module) if self.evaluate else {}
        self._cycle.saved = True
        self._save_cycle(trainer, module, self._cycle.goal, epoch, metrics)

    def _save_cycle(
        self, trainer: pl.Trainer, module: pl.LightningModule, goal: float, epoch: int, metrics: Any, best: bool = False
    ) -> None:
        if self.save_sparsities is not None and goal not in self.save_sparsities:
            return
        run = self._active
        writes = not is_dry(trainer) and self.save in (("best", "both") if best else ("last", "both"))
        value = monitored(metrics, self.monitor)[1]
        record = CycleRecord(goal, epoch, value, measured_sparsity(run.targets), best)
        record = record.with_files(run.folder) if writes else record
        self.history = [r for r in self.history if (r.goal, r.best) != (goal, best)] + [record]
        if writes:
            save_cycle(trainer, module, run.targets, record)

    # ---------------------------------------------------------------- helpers

    @property
    def masks(self) -> MaskSet:
        """The masks in force (during and after ``fit``)."""
        return self._active.masks

    @property
    def _active(self) -> Run:
        if self._run is None:
            raise ConfigError(
                "CAPPruningCallback: it has not been part of a running fit yet. Pass it to Trainer(callbacks=[...])."
            )
        return self._run

    def _log_folder(self, trainer: pl.Trainer) -> Path | None:
        return None if is_dry(trainer) or self.save == "none" else self._active.folder

    def _events(self, trainer: pl.Trainer) -> dict[int, float]:
        return checks.resolve_events(trainer, self.schedule, self.pruner, self.num_recomputations, self.save_sparsities)
