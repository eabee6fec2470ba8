"""`CAPPruningCallback`: gradual pruning inside a Lightning run. Hooks, checkpoint state and logging; no maths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_cap import distributed, rng
from lightning_cap.cycle import Row, checkpoint_dir, is_better, make_row, measured_sparsity, monitored, save_cycle
from lightning_cap.ema import mask_averages, restart_averages
from lightning_cap.errors import ConfigError, ScheduleError, UnsupportedError
from lightning_cap.event import PruningEvent
from lightning_cap.event_log import log_event
from lightning_cap.lr_cycles import restart_schedulers
from lightning_cap.masks import MaskSet
from lightning_cap.progress import end_bar, event_progress
from lightning_cap.pruners import CAP, Pruner
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.stepping import evaluate
from lightning_cap.summary import print_table
from lightning_cap.targets import Targets

_FAR = 10**9  # an epoch after the end of any schedule


class CAPPruningCallback(pl.Callback):
    """Prune while training: an event at each scheduled epoch's start, masks in force in between, one checkpoint a target.

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
        evaluate: Validate right before and after each event, and log both.
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
        if num_recomputations < 1:
            raise ConfigError(f"num_recomputations={num_recomputations}: give a whole number of at least 1.")
        if save in ("best", "both") and monitor is None:
            raise ConfigError(f"save={save!r} needs monitor=..., the name of a logged metric such as 'val/acc'.")
        for name, value, choices in (("save", save, ("last", "best", "both", "none")), ("mode", mode, ("min", "max"))):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: choose one of {choices}.")
        if seed < 0:
            raise ConfigError(f"seed={seed}: give a whole number of at least 0.")
        self.schedule = schedule
        self.pruner = pruner or CAP()
        self.include, self.exclude = include, exclude
        self.num_recomputations = num_recomputations
        self.existing_zeros = existing_zeros
        self.save, self.save_sparsities, self.dirpath = save, save_sparsities, dirpath
        self.monitor, self.mode = monitor, mode
        self.evaluate = evaluate
        self.seed = seed
        self.history: list[Row] = []
        self._done: list[int] = []
        self._position = 0
        self._cycle: Row = {}
        self._restored: dict[str, Any] = {}
        self._packed: dict[str, Any] | None = None
        self._run: _Run | None = None
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one run, so that copies and pickles do not carry the model."""
        attached = ("log", "log_dict")  # by Lightning, the model's own
        kept = {name: value for name, value in self.__dict__.items() if name not in attached}
        return {**kept, "_run": None, "_packed": self._packed_masks()}

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), schedule cursor, cycle, sampler position and every rank's random state.

        Call it on every rank, as Lightning does.
        """
        return {
            "masks": self._packed_masks(),
            "done": list(self._done),
            "position": self._position,
            "cycle": dict(self._cycle),
            "history": [dict(row) for row in self.history],
            "rng": distributed.gather_objects(rng.capture()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state; it is put in force when ``fit`` goes on."""
        self._restored = dict(state_dict)
        self._run = None
        self._packed = state_dict["masks"]
        self._done, self._position = list(state_dict["done"]), state_dict["position"]
        self._cycle, self.history = dict(state_dict["cycle"]), [dict(row) for row in state_dict["history"]]

    def _packed_masks(self) -> dict[str, Any] | None:
        return self._packed if self._run is None else self._run.masks.state_dict()

    # ------------------------------------------------------------------ start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise UnsupportedError(
                f"strategy={type(trainer.strategy).__name__}: it shards parameters, and a pruning event needs whole weights. "
                "Use Trainer(strategy='ddp') or a single device."
            )
        if (
            not pl_module.automatic_optimization
            and not hasattr(pl_module, "calibration_step")
            and self.pruner.num_gradients
        ):
            raise UnsupportedError(
                "automatic_optimization=False: training_step cannot be called for its loss alone. Define "
                "calibration_step(batch, batch_idx) on the LightningModule; let it return the mean loss of the batch."
            )
        self._events(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the targets, restore or begin the masks, and put them in force."""
        targets = Targets.from_model(pl_module, self.include, self.exclude)
        self.pruner.check(targets)
        same_model = self._run is not None and all(
            targets.get(name) is weight for name, weight in self._run.targets.items()
        )
        packed = self._packed_masks() if self._restored or same_model or self._run is None else None
        masks = MaskSet(targets)
        if packed is not None:
            masks.load_state_dict(packed)
        elif self.existing_zeros:
            masks.mask_zeros()
        if not self._restored:
            self._done = [epoch for epoch in self._done if epoch < trainer.current_epoch]
            if trainer.current_epoch == 0:
                self.history, self._cycle, self._position = [], {}, 0
        masks.apply_to_weights()
        self._run = _Run(targets, masks, self._events(trainer), checkpoint_dir(trainer, self.dirpath))
        mask_averages(trainer, masks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Try one gradient, mask the optimizer state, begin the first LR cycle; restore the random state mid-epoch."""
        run = self._active
        for optimizer in trainer.optimizers:
            run.masks.apply_to_optimizer(optimizer)
        if not self._restored:
            restart_schedulers(trainer, list(self._active.events), self._warned)
        if any(epoch not in self._done for epoch in run.events):
            self._event(trainer, pl_module).rehearse(self._position)
        if self._restored and getattr(trainer.fit_loop, "restarted_mid_epoch", False):
            self._restore_random_state()

    # ----------------------------------------------------------------- events

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the event that is scheduled for this epoch, if it has not been run yet."""
        resumed = self._restore_random_state()
        epoch = trainer.current_epoch
        if epoch in self._active.events and epoch not in self._done:
            self._prune(trainer, pl_module, epoch)
        pl_module.log("sparsity", self._active.masks.global_sparsity, on_step=False, on_epoch=True)
        if resumed:
            _reiterate(trainer)

    def _prune(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> dict[str, float]:
        run, target = self._active, self._active.events[epoch]
        before = evaluate(trainer, module) if self.evaluate else {}
        known = {**trainer.callback_metrics, **before}
        self._end_cycle(trainer, module, known)  # a run that was stopped at its last epoch's validation has not yet
        if not self.history:
            value = monitored(known, self.monitor)[1]
            self.history.append(make_row(0.0, epoch, value, measured_sparsity(run.targets)))
        start = run.masks.global_sparsity
        steps = [start + (target - start) * (i + 1) / self.num_recomputations for i in range(self.num_recomputations)]
        with event_progress(trainer, f"Pruning to {target:.4g}") as progress:
            event = self._event(trainer, module, progress)
            self._position = event.run([*steps[:-1], target], self._position)
        run.masks.apply_to_weights()
        for optimizer in trainer.optimizers:
            run.masks.apply_to_optimizer(optimizer)
        restart_averages(trainer, module)
        self._done.append(epoch)
        self._cycle = {"target": target, "best": None, "saved": False}
        restart_schedulers(trainer, list(self._active.events), self._warned)
        after = evaluate(trainer, module) if self.evaluate else {}
        report = event.report
        folder = None if _dry(trainer) or self.save == "none" else run.folder
        shown = monitored(known, self.monitor)[0]
        log_event(trainer, run.masks, report, {"epoch": epoch, "target": target}, before, after, shown, folder)
        return after

    def _event(self, trainer: pl.Trainer, module: pl.LightningModule, progress: Any = None) -> PruningEvent:
        run = self._active
        return PruningEvent(trainer, module, self.pruner, run.targets, run.masks, self.seed, progress)

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
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._cycle or self.save not in ("best", "both"):
            return
        value = monitored(trainer.callback_metrics, self.monitor)[1]
        if is_better(value, self._cycle["best"], self.mode):
            self._cycle["best"] = value
            self._save_cycle(trainer, pl_module, trainer.callback_metrics, best=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the cycle before the next event."""
        following = trainer.current_epoch + 1
        if following in self._active.events or following == trainer.max_epochs:
            self._end_cycle(trainer, pl_module, trainer.callback_metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The event at the end of training, if there is one; save the last cycle if training stopped early."""
        epoch = trainer.current_epoch
        if epoch == trainer.max_epochs and epoch in self._active.events and epoch not in self._done:
            self._end_cycle(trainer, pl_module, trainer.callback_metrics)
            self._end_cycle(trainer, pl_module, self._prune(trainer, pl_module, epoch))
        self._end_cycle(trainer, pl_module, trainer.callback_metrics)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table: dense accuracy, and accuracy, real sparsity and checkpoint of each target."""
        self._restored = {}
        if trainer.is_global_zero and self.history:
            end_bar(trainer, pl_module)
            print_table(self.history, monitored(trainer.callback_metrics, self.monitor)[0])

    def _end_cycle(self, trainer: pl.Trainer, module: pl.LightningModule, metrics: Any) -> None:
        if self._cycle and not self._cycle["saved"]:
            self._cycle["saved"] = True
            self._save_cycle(trainer, module, metrics)

    def _save_cycle(self, trainer: pl.Trainer, module: pl.LightningModule, metrics: Any, best: bool = False) -> None:
        target = self._cycle["target"]
        if self.save_sparsities is not None and target not in self.save_sparsities:
            return
        run = self._active
        writes = not _dry(trainer) and self.save in (("best", "both") if best else ("last", "both"))
        value = monitored(metrics, self.monitor)[1]
        sparsity = measured_sparsity(run.targets)
        row = make_row(target, trainer.current_epoch, value, sparsity, best=best, folder=run.folder if writes else None)
        self.history = [r for r in self.history if (r["target"], r["best"]) != (target, best)] + [row]
        if writes:
            save_cycle(trainer, module, run.targets, row)

    # ---------------------------------------------------------------- helpers

    @property
    def masks(self) -> MaskSet:
        """The masks in force (during and after ``fit``)."""
        return self._active.masks

    @property
    def _active(self) -> _Run:
        if self._run is None:
            raise ConfigError(
                "CAPPruningCallback: it has not been part of a running fit yet. Pass it to Trainer(callbacks=[...])."
            )
        return self._run

    def _events(self, trainer: pl.Trainer) -> dict[int, float]:
        max_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
        if _dry(trainer):
            return {0: next(iter(self.schedule.events(_FAR).values()))}  # the wiring is tried, once
        events = self.schedule.events(max_epochs)
        for sparsity in events.values():
            self.pruner.check_sparsity(sparsity)
        if self.num_recomputations > 1 and self.pruner.pattern.sparsity is not None:
            raise ConfigError(
                f"num_recomputations={self.num_recomputations}: {self.pruner.pattern} has only one sparsity, so its events "
                "cannot be split. Leave num_recomputations at 1."
            )
        missing = [s for s in self.save_sparsities or () if s not in events.values()]
        if missing:
            raise ScheduleError(
                f"save_sparsities={missing}: not in the schedule, which has {sorted(set(events.values()))}."
            )
        return events

    def _restore_random_state(self) -> bool:
        states = self._restored.pop("rng", None)
        if not states:
            return False
        if len(states) != distributed.world_size():
            rank_zero_warn(
                f"The checkpoint holds the random state of {len(states)} processes, this run has {distributed.world_size()}: "
                "data order and augmentation will differ from the run that was stopped."
            )
            return False
        rng.restore(states[distributed.rank()])
        return True


class _Run:
    """What belongs to one ``fit``: live tensors and the resolved schedule."""

    def __init__(self, targets: Targets, masks: MaskSet, events: dict[int, float], folder: Path) -> None:
        self.targets, self.masks, self.events, self.folder = targets, masks, events, folder


def _dry(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _reiterate(trainer: pl.Trainer) -> None:
    """Begin the epoch's data anew, now that the random state is the stopped run's.

    On resuming, Lightning makes the training iterator before any callback state is in force, and keeps it; a run that was
    never stopped makes it here. Loaders with a state of their own have restored it and are left alone.
    """
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    loader = getattr(trainer.fit_loop, "_combined_loader", None)
    if (
        fetcher is not None
        and loader is not None
        and not any(hasattr(dl, "load_state_dict") for dl in loader.flattened)
    ):
        iter(fetcher)
