"""What pruning reads inside a Trainer: calibration batches, and the loss on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_cap.calibration.batches import CalibrationBatches, batch_size
from lightning_cap.calibration.statistics import Statistic
from lightning_cap.errors import ConfigError, DataError
from lightning_cap.quantization.layers import plain_linears
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer import compat
from lightning_cap.trainer.isolation import in_stage, preserve_attributes, preserve_state, suppress_logging
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import shown
from lightning_cap.utilities.stopping import poll


def calibration_source(trainer: pl.Trainer, module: pl.LightningModule) -> Iterable[Any]:
    """``calibration_dataloader()`` of the datamodule or the module, else the loader over the training data set.

    Raises:
        ConfigError: Neither exists, the training data is not a single DataLoader, or ``calibration_dataloader`` returned several.
    """
    datamodule = getattr(trainer, "datamodule", None)
    for owner in (datamodule, module):
        hook = getattr(owner, "calibration_dataloader", None)
        if callable(hook):
            return _one_source(hook())
    loaders = trainer.train_dataloader
    if loaders is None:  # outside of fit
        for owner in (datamodule, module):
            if owner is not None and is_overridden("train_dataloader", owner):
                owner.setup("fit")
                loaders = owner.train_dataloader()
                break
    flat = CombinedLoader(loaders).flattened if loaders is not None else []
    if len(flat) != 1 or not isinstance(flat[0], DataLoader):
        kinds = ", ".join(type(loader).__name__ for loader in flat) or "none"
        raise ConfigError(
            f"train_dataloader: calibration needs a single DataLoader to draw samples from, got {kinds}. Define "
            "calibration_dataloader() on the LightningDataModule or LightningModule."
        )
    return flat[0]


def _one_source(given: Any) -> Iterable[Any]:
    """What ``calibration_dataloader`` returned, if batches can be drawn from it."""
    parts = CombinedLoader(given).flattened if isinstance(given, (list, tuple, dict)) else [given]
    several = [part for part in parts if isinstance(part, DataLoader)]
    if (several and given is not several[0]) or not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise ConfigError(
            f"calibration_dataloader: it returned {shown(given)}. Return one DataLoader, or a list or another re-iterable of "
            "batches; several data sets become one by torch.utils.data.ConcatDataset."
        )
    source: Iterable[Any] = given
    return source


def sample_order(trainer: pl.Trainer, source: Iterable[Any]) -> Iterable[Any] | None:
    """What the order of the samples is drawn from, if not from the loader's own sampler.

    With ``overfit_batches``, samples are drawn from those that are trained on: the first of the data set.
    """
    if not isinstance(source, DataLoader):
        return None
    in_order = isinstance(source.dataset, IterableDataset) or isinstance(
        source.sampler, (SequentialSampler, DistributedSampler)
    )
    overfits = getattr(trainer, "overfit_batches", 0) and in_order and _is_trained_on(trainer, source)
    if overfits and source.batch_size is not None:
        trained_on = int(trainer.num_training_batches) * source.batch_size * distributed.world_size()
        sized = isinstance(source.dataset, Sized)
        return range(min(trained_on, len(source.dataset)) if sized else trained_on)  # type: ignore[arg-type]
    return compat.inner_sampler(source)


def _is_trained_on(trainer: pl.Trainer, source: Iterable[Any]) -> bool:
    loaders = trainer.train_dataloader
    return loaders is not None and any(source is loader for loader in CombinedLoader(loaders).flattened)


def calibration_batches(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    statistic: Statistic,
    targets: Targets,
    key: tuple[int, int],
    source: Iterable[Any] | None = None,
) -> Iterator[Any]:
    """Batches for a statistic after the batch-transfer hooks, each to be computed on under generators seeded by its number.

    Args:
        trainer: In ``fit`` or ``validate``.
        module: Its LightningModule.
        statistic: Says how many samples, in batches of which size.
        targets: The weights.
        key: Seed, and index of the collection.
        source: Where to draw from. Default: `calibration_source`.
    """
    source = calibration_source(trainer, module) if source is None else source
    batches = statistic.batches(source, targets, key, sample_order(trainer, source))
    return ready_batches(trainer, module, batches, (*key, rng.Domain.COMPUTE))


def drawn_batches(
    trainer: pl.Trainer, module: pl.LightningModule, num_samples: int, key: tuple[int, int], use: rng.Domain
) -> Iterator[Any]:
    """Batches of so many samples, drawn for another use than a pruner's statistic, as those of `calibration_batches`.

    Args:
        trainer: In ``fit`` or ``validate``.
        module: Its LightningModule.
        num_samples: Over all processes.
        key: Seed, and index of the collection.
        use: A further part of the key.
    """
    source = calibration_source(trainer, module)
    batches = CalibrationBatches(source, num_samples, 1, *key, sampler=sample_order(trainer, source), use=use)
    return ready_batches(trainer, module, batches, (*key, use, rng.Domain.COMPUTE))


def mean_loss(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Any],
    num_samples: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Mean loss over the first samples of all processes, in whole batches. Every process must call it.

    Args:
        model: In eval mode.
        batches: This process's.
        loss: Of a batch.
        num_samples: After so many over all processes, no further batch is read.
        device: For what processes tell each other.
        context: Entered around every loss.

    Raises:
        DataError: There is no batch.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad(), distributed.raise_on_all_ranks("The loss on calibration samples"):
        for batch in batches:
            with context():
                value = float(loss(model, batch))
            size = batch_size(batch, default=1)
            sums += torch.tensor([value * size, size], dtype=torch.float64)
            if float(sums[1]) * distributed.world_size() >= num_samples:
                break
    total = distributed.sum_over_ranks(sums.float().to(device))
    if not float(total[1]):
        raise DataError("calibration data: there is no batch to measure a loss on.")
    return float(total[0] / total[1])


def precision_context(trainer: pl.Trainer) -> Callable[[], AbstractContextManager[Any]]:
    """The context that a training step is computed in, such as autocast."""
    plugin = getattr(trainer, "precision_plugin", None)
    return nullcontext if plugin is None else plugin.train_step_context


def loss_scale(trainer: pl.Trainer) -> float:
    """What float16 training multiplies losses by now; 1 elsewhere."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


@contextmanager
def calibrating(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Around the reading of calibration batches and losses on them: no trace in the run, the training's augmentation.

    Fake quantization is off.
    """
    with (
        plain_linears(module),
        preserve_state(module),
        suppress_logging(module),
        in_stage(trainer, RunningStage.TRAINING),
    ):
        yield


def calibration_loss(module: pl.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    """``loss(model, batch)``: the module's ``calibration_step(batch, batch_idx)``, else its ``training_step``.

    To be called inside `suppress_logging`.
    """

    def loss(_: nn.Module, batch: Any) -> Any:
        step = getattr(module, "calibration_step", None) or module.training_step
        with preserve_attributes(module):  # a module that collects its outputs would hold every graph
            out = step(*step_arguments(step, batch, 0))
        return out["loss"] if isinstance(out, Mapping) and "loss" in out else out

    return loss


def ready_batches(
    trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], key: tuple[int, ...]
) -> Iterator[Any]:
    """Batches after the batch-transfer hooks, each computed on under generators seeded by its number. It calls `poll`."""
    for number, batch in enumerate(batches):
        poll()
        rng.seed_by(*key, number * distributed.world_size() + distributed.rank())
        yield to_device(trainer, module, batch)


def to_device(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, loader: int = 0) -> Any:
    """What Lightning does to a batch before its step: precision, transfer hooks, device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = compat.before_batch_transfer(module, batch, loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)


def step_arguments(step: Callable[..., Any], *values: Any) -> list[Any]:
    """Those of (batch, batch_idx, dataloader_idx) that a step takes."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(step).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return list(values[:2])
    wanted = [p for p in parameters if p.kind in kinds]
    wanted = [p for p in wanted if p.default is p.empty or p.name in ("batch_idx", "dataloader_idx")]
    return [value for value, _ in zip((*values, 0), wanted, strict=False)]
