"""What a run refuses before it begins."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_cap.callbacks.run import is_dry
from lightning_cap.callbacks.run_files import RunFiles, checkpoint_dir
from lightning_cap.errors import ConfigError, PatternError, ScheduleError, UnsupportedError
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.pruners import Pruner
from lightning_cap.pruners.base import refuse_shards, refuse_splitting
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.sparsity.cost import Parameters, require_path_of_steps
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer import compat
from lightning_cap.trainer.records import EventRecord
from lightning_cap.trainer.run_records import CycleRecord, RunRecord
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import (
    require_choice,
    require_counts,
    require_flag,
    require_instance,
    require_names,
    require_path,
    require_real,
    require_text,
    require_whole,
    shown,
)
from lightning_cap.utilities.files import require_writable
from lightning_cap.utilities.records import known_records

if TYPE_CHECKING:
    from lightning_cap.callbacks.pruning import CAPPruningCallback

_FAR = 10**5  # an epoch after the end of any schedule


def check_settings(callback: CAPPruningCallback) -> None:
    """Refuse arguments of `CAPPruningCallback` that cannot work in any run.

    Raises:
        ConfigError: One is out of range.
        UnsupportedError: Units were to grow back.
    """
    c = callback
    require_instance("schedule", c.schedule, SparsitySchedule, "{0: 0.4, 20: 0.5} or SparsitySteps({0: 0.4})")
    require_instance("pruner", c.pruner, Pruner, "CAP()")
    require_names("include", c.include)
    require_names("exclude", c.exclude, "*.mlp.fc1.weight")
    require_counts(num_recomputations=c.num_recomputations)
    require_path_of_steps("recomputation_path", c.recomputation_path)
    require_flag("recalibrate", c.recalibrate)
    require_flag("existing_zeros", c.existing_zeros)
    require_choice("save", c.save, ("last", "best", "both", "none"))
    if c.save_sparsities is not None:
        require_instance("save_sparsities", c.save_sparsities, (list, tuple), "[0.5, 0.75]")
        for sparsity in c.save_sparsities:
            require_real("save_sparsities", sparsity, "[0, 1)", 0.5)
    require_path("dirpath", c.dirpath, "runs/pruned", optional=True)
    require_text("monitor", c.monitor, "val/acc", optional=True)
    require_choice("mode", c.mode, ("min", "max"))
    require_flag("evaluate", c.evaluate)
    require_whole("seed", c.seed, at_least=0, at_most=2**63 - 1, example=0)
    if c.save in ("best", "both") and c.monitor is None:
        raise ConfigError(f"save={c.save!r} needs monitor=..., the name of a logged metric such as 'val/acc'.")
    if c.pruner.takes_units and c.schedule.regrows:
        raise UnsupportedError(
            f"schedule={shown(c.schedule)}: units that {type(c.pruner).__name__} has pruned cannot grow back, since a unit whose "
            "weights are all zero has no gradient. Let the schedule rise, or prune weights."
        )


def refuse_adapting(schedule: SparsitySchedule, pruner: Pruner, save_sparsities: Sequence[float] | None) -> None:
    """Refuse what a schedule that finds its sparsities in the weights does not go with.

    Raises:
        ConfigError: The sparsities to save are named.
        PatternError: The pattern fixes the sparsity.
        UnsupportedError: Goals do not count single weights, or weights grow back.
    """
    if not schedule.adapts:
        return
    named = f"schedule={type(schedule).__name__}: it finds sparsities in the weights that are left"
    if pruner.takes_units or not isinstance(pruner.cost, Parameters):
        counted = "units" if pruner.takes_units else f"what {shown(pruner.cost)} counts"
        raise UnsupportedError(f"{named}, and not of {counted}. Give a pruner of weights, such as CAP().")
    if pruner.regrows or schedule.regrows:
        raise UnsupportedError(
            f"{named}, and weights of {type(pruner).__name__} grow back. Give CAP() or another pruner."
        )
    if pruner.pattern.sparsity is not None:
        raise PatternError(
            f"{named}, and pattern={shown(pruner.pattern)} has only one. Give SparsitySteps, or Unstructured()."
        )
    if save_sparsities is not None:
        raise ConfigError(
            f"save_sparsities={shown(save_sparsities)}: {named}, so that none is known before. Leave it out."
        )


def refuse_trainer(trainer: pl.Trainer, save: str, dirpath: str | None) -> None:
    """Refuse a Trainer with which a run could not come to its end. To be called on every rank, before anything runs.

    Args:
        trainer: Of the run.
        save: See `CAPPruningCallback`.
        dirpath: See `CAPPruningCallback`.

    Raises:
        ConfigError: Nothing would be validated, or the files could not be written.
        UnsupportedError: Its strategy shards parameters in another way than FSDP2 does, or another callback prunes.
    """
    refuse_other_sharding(trainer)
    refuse_averaging_of_shards(trainer)
    refuse_other_pruning(trainer)
    refuse_best_of_none(trainer, save)
    if not is_dry(trainer) and save != "none":
        refuse_unwritable(trainer, dirpath)


def refuse_targets(targets: Targets, pruner: Pruner, schedule: SparsitySchedule, recalibrate: bool) -> None:
    """Refuse weights that the pruner cannot take, or that cannot do what is asked for.

    Raises:
        ConfigError: Of `Pruner.check`.
        UnsupportedError: They are sharded, and something needs whole weights.
    """
    refuse_shards(pruner, targets, recalibrate)
    refuse_growing_shards(schedule, targets)
    if schedule.adapts and targets.is_sharded:
        raise UnsupportedError(
            f"schedule={type(schedule).__name__}: it reads whole weights, and those of FSDP2 are sharded. Use another schedule, or "
            "strategy='ddp'."
        )
    if targets.units is None:
        pruner.check(targets)


def refuse_other_pruning(trainer: pl.Trainer) -> None:
    """Refuse other callbacks that set weights to zero in their own way.

    Raises:
        UnsupportedError: Lightning's `ModelPruning` is among the callbacks.
    """
    names = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, ModelPruning)]  # type: ignore[attr-defined]
    if names:
        raise UnsupportedError(
            f"callbacks: {names[0]} prunes the same weights as CAPPruningCallback, and neither knows of the other's zeros. "
            "Remove one; CAPPruningCallback(pruner=Magnitude()) prunes by magnitude."
        )


def refuse_unwritable(trainer: pl.Trainer, dirpath: str | None) -> None:
    """Refuse a folder for checkpoints that cannot be written to. Call it on every rank.

    Raises:
        ConfigError: It cannot.
    """
    folder = checkpoint_dir(trainer, dirpath)
    with distributed.raise_on_all_ranks("Looking at the folder for checkpoints"):
        if "://" in str(dirpath if dirpath is not None else trainer.default_root_dir):
            raise ConfigError(f"dirpath={dirpath!r}: give a local folder; {str(folder)!r} is an address.")
        if trainer.is_global_zero:
            require_writable("dirpath", dirpath, folder)


def refuse_best_of_none(trainer: pl.Trainer, save: str) -> None:
    """Refuse to save the best epoch where nothing is validated.

    Raises:
        ConfigError: Nothing is.
    """
    if save in ("best", "both") and not (trainer.enable_validation or is_dry(trainer)):
        raise ConfigError(
            f"save={save!r}: nothing is validated (limit_val_batches={trainer.limit_val_batches}, or no validation_step), so "
            "no epoch is the best. Validate, or use save='last'."
        )


def refuse_unlogged(trainer: pl.Trainer, monitor: str | None) -> None:
    """Refuse a metric that validation, which has just ended, did not log.

    Raises:
        ConfigError: It did not; those that it did are listed.
    """
    if monitor is None:
        return
    logged = {name for names in distributed.gather_objects(list(trainer.callback_metrics)) for name in names}
    if logged and monitor not in logged:  # where nothing is logged yet, it may come
        near = difflib.get_close_matches(monitor, list(logged), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"monitor={monitor!r} was not logged in validation. {hint}Logged are {sorted(logged)}; name one of those."
        )


def refuse_sharding(trainer: pl.Trainer) -> None:
    """Refuse a strategy that shards parameters, where whole weights are needed.

    Raises:
        UnsupportedError: It does.
    """
    refuse_sharding_by(type(trainer.strategy))


def refuse_sharding_by(strategy: type) -> None:
    """The same by the class of a strategy.

    Raises:
        UnsupportedError: It shards parameters.
    """
    _refuse_other_shards(strategy)
    if issubclass(strategy, ModelParallelStrategy):
        raise UnsupportedError(
            f"strategy={strategy.__name__}: it shards parameters, which CAPPruningCallback and prune take (FSDP2), but plans, "
            "one-shot runs and FixedMasks need whole ones. Use Trainer(strategy='ddp') or a single device."
        )


def _refuse_other_shards(strategy: type) -> None:
    if issubclass(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise UnsupportedError(
            f"strategy={strategy.__name__}: it shards parameters in pieces that masks do not fit. Use "
            "ModelParallelStrategy(tensor_parallel_size=1) with fully_shard in configure_model (FSDP2), Trainer(strategy='ddp') or "
            "a single device."
        )


def refuse_other_sharding(trainer: pl.Trainer) -> None:
    """Refuse what shards parameters in another way than FSDP2 does over all processes. To be called when these have met.

    Raises:
        UnsupportedError: The strategy does, or its processes are parallel in tensors too.
    """
    strategy = trainer.strategy
    _refuse_other_shards(type(strategy))
    if isinstance(strategy, ModelParallelStrategy):
        size = strategy.device_mesh["tensor_parallel"].size()
        if size > 1:
            raise UnsupportedError(
                f"tensor_parallel_size={size}: tensor parallel weights, and meshes of two dimensions, cannot be pruned. Use "
                f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1) with fully_shard, or "
                "Trainer(strategy='ddp')."
            )


def refuse_averaging_of_shards(trainer: pl.Trainer) -> None:
    """Refuse Lightning's averages of weights of a sharded model, which it copies before it shards it.

    Raises:
        UnsupportedError: One is among the callbacks.
    """
    names = [type(callback).__name__ for callback in compat.averaging_callbacks(trainer)]
    if names and isinstance(trainer.strategy, ModelParallelStrategy):
        raise UnsupportedError(
            f"callbacks: {names[0]} does not average sharded weights (FSDP2): Lightning copies the whole model for it. Remove it, "
            "or use Trainer(strategy='ddp')."
        )


def refuse_growing_shards(schedule: SparsitySchedule, targets: Targets) -> None:
    """Refuse a schedule that lifts masks, of sharded targets.

    Raises:
        UnsupportedError: It does.
    """
    if schedule.regrows and targets.is_sharded:
        raise UnsupportedError(
            f"schedule={shown(schedule)}: sharded weights (FSDP2) cannot grow back. Let the schedule rise, or use strategy='ddp'."
        )


def refuse_manual(module: pl.LightningModule, pruners: Sequence[Pruner]) -> None:
    """Refuse manual optimization where a pruner needs the loss, or the forward pass that gives it, and there is no other way.

    Raises:
        UnsupportedError: The module has no ``calibration_step``.
    """
    wanted = any(pruner.statistic is not None or pruner.takes_units for pruner in pruners)
    if wanted and not module.automatic_optimization and not hasattr(module, "calibration_step"):
        raise UnsupportedError(
            "automatic_optimization=False: training_step cannot be called for its loss alone. Define "
            "calibration_step(batch, batch_idx) on the LightningModule; let it return the mean loss of the batch."
        )


def refuse_foreign_records(trainer: pl.Trainer, files: RunFiles | None) -> None:
    """Refuse files of records that hold something else, which would end the run at its first event.

    Args:
        trainer: Rank 0 reads the files; every rank must call this.
        files: Those of the run, None for none.

    Raises:
        DataError: They do.
    """
    with distributed.raise_on_all_ranks("Reading the records of earlier runs"):
        if trainer.is_global_zero and files is not None:
            known_records(files.events, EventRecord)
            known_records(files.runs, RunRecord)
            known_records(files.cycles, CycleRecord)
            known_records(files.folder / EXPORTS, ExportRecord)


def resolve_events(
    trainer: pl.Trainer,
    schedule: SparsitySchedule,
    pruner: Pruner,
    num_recomputations: int,
    save_sparsities: Sequence[float] | None,
) -> dict[int, float]:
    """Epoch -> sparsity of the events of a run, checked against the Trainer and the pruner.

    Raises:
        ConfigError: An event cannot be had; the message says which and why.
    """
    max_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    if is_dry(trainer):
        return {0: next(iter(schedule.events(_FAR).values()))}  # the wiring is tried, once
    events = schedule.events(max_epochs)
    for sparsity in events.values():
        if sparsity > 0 or not schedule.regrows:  # to 0 all masks are lifted, by no pruner
            pruner.check_sparsity(sparsity)
    if num_recomputations > 1 and pruner.regrows:
        raise ConfigError(
            f"num_recomputations={num_recomputations}: {type(pruner).__name__} exchanges weights in one go at each event. Leave "
            "num_recomputations at 1, and give the schedule more events."
        )
    refuse_splitting(pruner, num_recomputations)
    missing = [s for s in save_sparsities or () if s not in events.values()]
    if missing:
        raise ScheduleError(
            f"save_sparsities={missing}: not in the schedule, which has {sorted(set(events.values()))}."
        )
    return events
