"""`CAPPruningCallback`: gradual pruning inside a Lightning run. Hooks, checkpoint state and logging; no maths."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_cap.callbacks import checks
from lightning_cap.callbacks.checkpoint_io import make_checkpoints_atomic
from lightning_cap.callbacks.companions import (
    adopt_pruned_units,
    cycle_starts,
    end_cycles,
    goes_on,
    refuse_wrong_companions,
)
from lightning_cap.callbacks.cost import with_cost
from lightning_cap.callbacks.cycle import Cycle, monitored, save_missing
from lightning_cap.callbacks.event_log import event_record, log_event
from lightning_cap.callbacks.leftovers import remove_empty_logs
from lightning_cap.callbacks.loggers import Pictures
from lightning_cap.callbacks.lr_restart import refuse_beyond_max_steps, restart_schedulers
from lightning_cap.callbacks.optimizer_state import sync_optimizer_state
from lightning_cap.callbacks.resume import begin_epoch_anew, restore_random_state
from lightning_cap.callbacks.run import Run
from lightning_cap.callbacks.run_files import checkpoint_dir
from lightning_cap.callbacks.saving_run import SavingRun
from lightning_cap.callbacks.settings import warn_of_differences
from lightning_cap.callbacks.state import RunState, choose_files, first_masks
from lightning_cap.callbacks.steps import PruningSteps, goal_of, plan_steps, pruners_of, validate_steps
from lightning_cap.callbacks.summary import print_table
from lightning_cap.callbacks.targets import choose_targets, find_parts, known_parts, run_of_same_model
from lightning_cap.callbacks.weight_averaging import mask_averages, take_averages, update_averages
from lightning_cap.errors import CAPError
from lightning_cap.healing import HealArgument
from lightning_cap.pruners import CAP, Pruner
from lightning_cap.pruners.base import with_heal
from lightning_cap.schedules import SparsitySchedule, SparsitySteps
from lightning_cap.sparsity.cost import Cost, StepPath
from lightning_cap.sparsity.ends import PENDING, Ends
from lightning_cap.sparsity.units import Units
from lightning_cap.trainer import compat
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.trainer.event import EventReport, PruningEvent
from lightning_cap.trainer.mending import note_missing_batch_norm
from lightning_cap.trainer.progress_bar import end_bar, event_progress
from lightning_cap.trainer.saving import goal_name, saving
from lightning_cap.utilities import rng
from lightning_cap.utilities.arguments import shown
from lightning_cap.utilities.stopping import StopRequested


class CAPPruningCallback(SavingRun):
    """Prune while training: an event at each scheduled epoch's start, masks in force in between, one checkpoint per goal.

    Where a pruner of units such as `CAPUnits` makes the model smaller, a second callback after it, with a pruner of weights, may
    prune what is left: a cycle then ends at the next event of either.

    Args:
        schedule: Epoch -> sparsity, e.g. ``{0: 0.4, 20: 0.5}``, which is ``SparsitySteps({0: 0.4, 20: 0.5})``; or share to save of
            what else ``cost`` counts.
        pruner: The method. Default: `CAP` with its defaults.
        include: Globs or names of the weights to prune; they replace the default: all Linear, Conv and attention weights but first
            layers and heads, as a forward pass tells them, depthwise convolutions, and what is frozen. See `Targets.from_model`.
            Of units, globs over their groups; see `Units.from_model`.
        exclude: Globs or names to leave dense.
        num_recomputations: Splits every event into so many of rising sparsity, each with fresh gradients.
        recomputation_path: How they rise: ``"exponential"``, the density falls by the same factor each time, or ``"linear"``.
        existing_zeros: Take the zeros that the targets have when training starts as pruned already.
        save: ``"last"``: at the end of each cycle; ``"best"``: at its best epoch by ``monitor``; ``"both"`` or ``"none"``.
        save_sparsities: The scheduled sparsities to save checkpoints of. Default: all; not for schedules that find them.
        dirpath: Folder of ``sparsity=0.50.ckpt`` and ``.safetensors``; ``sparsity=0.50-v1.ckpt`` and so on where other runs have
            written to it. Of units ``parameters=0.50.ckpt``, ``flops=0.50.ckpt`` or ``latency=0.50.ckpt``, by what goals count.
            Default: ``checkpoints`` beside the logs.
        monitor: Metric, logged in validation, for the table and for ``save="best"``. Default: the validation accuracy, else the
            validation loss.
        mode: Whether more (``"max"``) or less of ``monitor`` is better.
        evaluate: Validate right before and after each event that begins a cycle (all, unless ``pruner.regrows``); log both.
        seed: Key of the calibration samples and their augmentation, with the event and the sample's index.
        cost: What goals count: `Parameters`, or of units `Flops` or `Latency`. Default: what the pruner's own ``cost`` says.
        heal: ``"layerwise"``, ``"distill"`` or a `Heal`: moves the weights that are kept after each recomputation, without
            labels. Default: what the pruner's own ``heal`` says.
        recalibrate: Estimate the statistics of batch norm anew at the end of each event, from up to 1,024 calibration samples.

    Raises:
        ConfigError: An argument is out of range.
        UnsupportedError: Zeros save nothing of ``cost``, or units were to grow back. What depends on the Trainer and the model is
            refused when ``fit`` begins.
    """

    def __init__(
        self,
        schedule: SparsitySchedule | dict[Any, float],
        pruner: Pruner | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        num_recomputations: int = 1,
        recomputation_path: StepPath = "exponential",
        existing_zeros: bool = True,
        save: Literal["last", "best", "both", "none"] = "last",
        save_sparsities: list[float] | None = None,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        evaluate: bool = True,
        seed: int = 0,
        cost: Cost | None = None,
        heal: HealArgument = None,
        recalibrate: bool = False,
    ) -> None:
        super().__init__()
        self.schedule = SparsitySteps(schedule) if isinstance(schedule, Mapping) else schedule
        self.pruner = CAP() if pruner is None else pruner
        self.include, self.exclude = include, exclude
        self.num_recomputations, self.recomputation_path = num_recomputations, recomputation_path
        self.existing_zeros = existing_zeros
        self.save, self.save_sparsities, self.dirpath = save, save_sparsities, dirpath
        self.monitor, self.mode = monitor, mode
        self.evaluate = evaluate
        self.seed, self.recalibrate = seed, recalibrate
        checks.check_settings(self)
        self.pruner = with_heal(with_cost(self.pruner, cost), heal)
        checks.refuse_adapting(self.schedule, self.pruner, save_sparsities)
        self._stepped = False
        self._warned: set[str] = set()
        self._pictures = Pictures()
        self._made = time.time() - 1  # what is older is another run's; file systems round

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.schedule)}, {type(self.pruner).__name__})"

    # ------------------------------------------------------------------ start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Record that the run was stopped; leave no folder of logs behind of what was refused before the first step."""
        self._log.stop()
        if self._run is not None:
            compat.leave_epoch(trainer)  # of checkpoints that others save now
        if isinstance(exception, CAPError) and not self._stepped:
            remove_empty_logs(trainer, self._made)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        make_checkpoints_atomic(trainer)
        if stage != "fit":
            return
        self._stepped, self._first_rng = False, None
        self._restored, self._packed = None, None  # of a fit that did not come to its end
        self._previous, self._run = self._run or self._previous, None
        checks.refuse_trainer(trainer, self.save, self.dirpath)
        refuse_wrong_companions(trainer)
        checks.refuse_manual(pl_module, pruners_of(self.pruner, self.schedule, self._events(trainer)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the targets if they are known, restore or begin the masks, and put them in force.

        Strategies that load checkpoints later (FSDP2) have this done in `on_train_start`.
        """
        self._first_rng = rng.capture() if self._restored is None else None
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._start(trainer, pl_module)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        compat.check_run(trainer, pl_module, resumed=self._restored is not None)
        previous = run_of_same_model(self._previous, pl_module) if self._restored is None else None
        if previous is not None:
            self._packed = previous.masks.state_dict()
        self._previous, self._validated = None, -1
        if self._restored is None:
            done = [epoch for epoch in self._state.done if epoch < trainer.current_epoch]
            self._state = replace(self._state, done=done) if trainer.current_epoch else RunState()
        self._begin(trainer, pl_module, known_parts(self.pruner, self._restored, previous))

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, parts: Ends | Units) -> None:
        """Make the run; while it is pending what is pruned, with everything that may be a target, and nothing masked."""
        targets = choose_targets(module, self.pruner, self.include, self.exclude, parts)
        if targets.ends is not PENDING:
            rank_zero_info(f"Pruning {targets.summary}")
            checks.refuse_targets(targets, self.pruner, self.schedule, self.recalibrate)
        masks = first_masks(targets, self._packed, self.existing_zeros)
        masks.apply_to_weights()
        events = self._events(trainer)
        folder = checkpoint_dir(trainer, self.dirpath)
        files = choose_files(self._state, folder, events.values(), goal_name(self.pruner))
        self._run = Run(targets, masks, events, files, self.pruner, self.schedule)
        checks.refuse_foreign_records(trainer, self._log_files(trainer))
        if self._restored is not None:
            save_missing(module, targets, self._state.history)
        mask_averages(trainer, masks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the targets, if a forward pass is to tell them; try one gradient, mask the optimizer state, begin the first LR
        cycle; restore the random state mid-epoch.
        """
        if self._run is None:
            self._start(trainer, pl_module)
        if self._restored is not None:
            self._first_rng = None  # also where the checkpoint came after the start of the fit
        self._order.begin(trainer, [] if self._restored is None else self._restored.rng)
        if self._active.targets.ends is PENDING:
            parts = find_parts(trainer, pl_module, self.pruner, self.include, self.exclude, self.seed)
            self._begin(trainer, pl_module, parts)
        run = self._active
        self._price_units(trainer, pl_module)
        adopt_pruned_units(trainer)
        for optimizer in trainer.optimizers:
            run.masks.apply_to_optimizer(optimizer)
        restart_schedulers(trainer, cycle_starts(trainer), self._warned, only_new=self._restored is not None)
        run.begins = trainer.current_epoch + (self._restored is not None and compat.restarted_mid_epoch(trainer))
        due = run.missed(self._state.done)
        if self._state.cycle is not None and goes_on(trainer, self._state.cycle):
            self._state.cycle.saved = False  # where it ended before, it goes on now
        saved = {} if self._restored is None else self._restored.settings
        warn_of_differences(saved, self._settings(run), run.events, self._state.done, due)
        refuse_beyond_max_steps(trainer, list(due))
        goals = list(due.values())
        validate_steps(self.pruner, self.schedule, run.targets, run.masks, goals, *self._recomputations)
        pruners = pruners_of(self.pruner, self.schedule, run.events) if due else []
        run.plans = [self._event(trainer, pl_module, one).dry_run(self._state.collection_index) for one in pruners]
        note_missing_batch_norm(pl_module, self.recalibrate)
        self._begin_log(trainer, pl_module)
        if self._restored is not None and compat.restarted_mid_epoch(trainer):
            restore_random_state(self._restored.rng)

    # ----------------------------------------------------------------- events

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the event that is scheduled for this epoch, if it has not been run yet."""
        resumed = self._restored is not None and restore_random_state(self._restored.rng)
        self._order.begin_epoch(trainer)
        if self.is_due(trainer.current_epoch):
            self._prune(trainer, pl_module, trainer.current_epoch)
        reached = self.pruner.reached(self._active.targets, self.masks)
        pl_module.log(goal_name(self.pruner), reached, on_step=False, on_epoch=True)
        if resumed:
            begin_epoch_anew(trainer)

    def _prune(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> dict[str, float]:
        return self._prune_unless_told(trainer, epoch, lambda: self._prune_now(trainer, module, epoch))

    def _prune_now(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> dict[str, float]:
        run = self._active
        goal = goal_of(trainer, self.schedule, run, epoch)
        begins = (
            epoch in run.starts or self._state.cycle is None or self._state.cycle.goal != goal
        )  # else the cycle goes on
        before = evaluate(trainer, module) if self.evaluate and begins else {}
        known = {**(trainer.callback_metrics if self._validated == epoch - 1 else {}), **before}
        if begins:  # due now only in a run that was stopped at the validation of the cycle's last epoch
            end_cycles(trainer, module, epoch - 1, known)
        if not self._state.history:
            self._state.history.append(self._line(0.0, epoch, known))
            self._log.keep(self._state.history, self._state.metric)
        if goal is None:
            return self._train_on(trainer, epoch, before)
        steps = plan_steps(self.pruner, self.schedule, run.targets, run.masks, goal, epoch, *self._recomputations)
        if steps is None:
            self._state.done.append(epoch)
            return before
        report = self._run_event(trainer, module, steps, epoch, begins)
        self._state.done.append(epoch)
        best = None if begins or self._state.cycle is None else self._state.cycle.best
        self._state.cycle = Cycle(goal, best, begun=trainer.current_epoch - (epoch == trainer.max_epochs))
        if begins:
            restart_schedulers(trainer, cycle_starts(trainer), self._warned)
        after: dict[str, float] = {}
        with suppress(StopRequested):  # then the event is done, without these metrics
            after = evaluate(trainer, module) if self.evaluate and begins else {}
        saved = saving(self.pruner, run.targets, run.masks)
        record = event_record(epoch, goal, report, run.masks, saved, before, after)
        log_event(trainer, record, monitored(known, self.monitor)[0], self._log_files(trainer))
        self._pictures.log(trainer, record, report.saliency)
        return after

    def _train_on(self, trainer: pl.Trainer, epoch: int, metrics: dict[str, float]) -> dict[str, float]:
        """Of an event without anything to prune: the cycle of the sparsity goes on, with a learning rate that begins anew."""
        self._state.done.append(epoch)
        if self._state.cycle is not None:
            self._state.cycle.saved = False
        restart_schedulers(trainer, cycle_starts(trainer), self._warned)
        return metrics

    def _run_event(
        self, trainer: pl.Trainer, module: pl.LightningModule, steps: PruningSteps, epoch: int, begins: bool
    ) -> EventReport:
        """Go to the goal of an event; bring weights, optimizers and averages in line with the masks."""
        run = self._active
        with event_progress(trainer, f"Pruning to {steps.goal:.4g}") as progress:
            steps.pruner.begin_event(run.done(epoch))
            event = self._event(trainer, module, steps.pruner, progress)
            self._state.collection_index = event.run(steps.sparsities, self._state.collection_index)
        run.masks.apply_to_weights()
        adopt_pruned_units(trainer)
        for optimizer in trainer.optimizers:
            sync_optimizer_state(optimizer, run.targets, run.masks, event.grown, reset_momentum=epoch in run.phases)
        update_averages(trainer, module, restart=begins, renew=self.recalibrate)
        return event.report

    def _event(self, trainer: pl.Trainer, module: Any, pruner: Pruner, progress: Any = None) -> PruningEvent:
        run = self._active
        args = trainer, module, pruner, run.targets, run.masks, self.seed, progress, run.trials
        return PruningEvent(*args, self.recalibrate)

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
        self._stepped, self._first_rng = True, None
        self._active.masks.apply_to_weights()
        mask_averages(trainer, self._active.masks)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the cycle before the next event."""
        following = trainer.current_epoch + 1
        if following in cycle_starts(trainer) or following == trainer.max_epochs:
            self.end_cycle(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The event at the end of training, if there is one; save the last cycle if training stopped early."""
        last, run = trainer.current_epoch - 1, self._active
        self.end_cycle(trainer, pl_module, last)
        if trainer.max_epochs in run.events and trainer.max_epochs not in self._state.done:
            take_averages(
                trainer, pl_module
            )  # before or after Lightning does: what is pruned is what the run ends with
            self.end_cycle(trainer, pl_module, last, self._prune(trainer, pl_module, trainer.max_epochs))
        run.warn_of_missed(self._state.done)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table: dense accuracy, and accuracy, real sparsity and checkpoint of each goal."""
        if self._run is None:  # as `_start` is for on_train_start, which does not come where nothing is left to train
            self._start(trainer, pl_module)
        missed = self._active.missed(self._state.done)
        if trainer.max_epochs in missed and self._restored is not None:
            self._price_units(trainer, pl_module)
            self._begin_log(trainer, pl_module)
            self.on_train_end(trainer, pl_module)  # of a run that was stopped in this event: nothing is left to train
        elif self._active.begins is None:  # no on_train_start, no on_train_end
            self._active.warn_of_missed(self._state.done)
            self._begin_log_if_stopped(trainer, pl_module)
        self._restored = None
        self._log.finish()
        if trainer.is_global_zero and self._state.history:
            end_bar(trainer, pl_module)
            print_table(self._state.history, self._state.metric)

    # ---------------------------------------------------------------- helpers

    def _events(self, trainer: pl.Trainer) -> dict[int, float]:
        return checks.resolve_events(trainer, self.schedule, self.pruner, self.num_recomputations, self.save_sparsities)
