"""Prune a plain torch model without a Trainer."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.calibration.sources import GradientSource, Trial, repeatable
from lightning_cap.errors import ConfigError
from lightning_cap.healing import HealArgument
from lightning_cap.healing.parts import ModelParts
from lightning_cap.pruners import CAP, Pruner, PruneResult
from lightning_cap.pruners.base import heal_of, prepare, refuse_regrowth, refuse_shards, refuse_splitting, with_heal
from lightning_cap.sparsity.cost import StepPath, require_path_of_steps, steps_to
from lightning_cap.sparsity.ends import PENDING
from lightning_cap.sparsity.layer_graph import Flow, trace
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.ends import agree_on_ends
from lightning_cap.trainer.isolation import preserve_state
from lightning_cap.trainer.mending import Mender, Reader, note_missing_batch_norm
from lightning_cap.trainer.units import units_of_model
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import (
    require_callable,
    require_flag,
    require_instance,
    require_iterable,
    shown,
)
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.rng import Domain


@distributed.fail_together("Pruning")
def prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    sparsity: float,
    pruner: Pruner | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    num_recomputations: int = 1,
    recomputation_path: StepPath = "exponential",
    progress: bool = True,
    heal: HealArgument = None,
    recalibrate: bool = False,
) -> PruneResult:
    """Prune ``model`` in place to ``sparsity``; zeros that it has already stay.

    Args:
        model: Any module; put into eval mode while gradients are taken. Also one that `fully_shard` (FSDP2) has shared out over all
            processes, each of which calls this with batches of its own; its result is sharded as the model is.
        batches: Calibration batches, moved to the model's device; re-iterable if they are read more than once, by
            ``num_recomputations``, ``heal`` or ``recalibrate``. Tensors in them have the samples in dim 0.
        loss_fn: ``loss_fn(model, batch)`` -> scalar, the mean loss of the batch. Call the ``model`` that is passed in.
        sparsity: Zeros over all weights of the targets, in [0, 1); with a pruner of units such as `CAPUnits` the share of its cost
            that is to be saved.
        pruner: Default: `CAP` with its defaults.
        include: Globs or names of the weights to prune; for pruners of units those of groups (see `Units.from_model`). Default: all
            Linear, Conv and attention weights but the first layers, the heads (see `find_ends`; the first batch tells them) and
            depthwise convolutions; all units.
        exclude: Globs or names to leave dense.
        num_recomputations: Prune in so many steps of rising sparsity, with fresh gradients for each.
        recomputation_path: How it rises: ``"exponential"``, the density falls by the same factor in each step, or ``"linear"``.
        progress: Show a progress bar.
        heal: ``"layerwise"``, ``"distill"`` or a `Heal`: moves the weights that are kept, and biases, after each step, without
            labels. Default: what the pruner's own ``heal`` says.
        recalibrate: Estimate the statistics of batch norm anew in the end, from up to 1,024 samples of ``batches``.

    Returns:
        The result that was applied: weights, masks, sparsity, and the predicted loss increase of pruners that predict it.

    Raises:
        CAPError: Whatever is wrong, with the model unchanged.
    """
    require_instance("model", model, nn.Module, "a torch model")
    require_iterable("batches", batches, "[(inputs, labels)] or a DataLoader")
    require_callable(
        "loss_fn", loss_fn, "lambda model, batch: cross_entropy(model(batch[0]), batch[1])", num_arguments=2
    )
    require_instance("pruner", pruner, Pruner, "CAP()", optional=True)
    require_flag("progress", progress)
    require_flag("recalibrate", recalibrate)
    pruner = with_heal(CAP() if pruner is None else pruner, heal)
    refuse_regrowth(pruner)
    refuse_splitting(pruner, num_recomputations)
    require_path_of_steps("recomputation_path", recomputation_path)
    pruner.check_sparsity(sparsity)
    on_device = _OnDevice(batches, _device(model))
    targets = _targets(model, on_device, loss_fn, include, exclude, pruner)
    rank_zero_info(f"Pruning {targets.summary}")
    refuse_shards(pruner, targets, recalibrate)
    pruner.check(targets)
    _refuse_iterator(batches, num_recomputations, pruner, recalibrate)
    note_missing_batch_norm(model, recalibrate)
    masks = MaskSet(targets)
    masks.mask_zeros()
    parts = ModelParts(model, targets, heals=[heal_of(pruner)], statistics=recalibrate)
    before = parts.copies()
    goals = steps_to(sparsity, pruner.reached(targets, masks), num_recomputations, recomputation_path)
    pruner.check_goals(targets, masks, goals)
    trial: Trial | None = None
    saliency = 0.0
    try:
        with _bar(progress) as show:
            mender = Mender(model, targets, heal_of(pruner), on_device.reader(model), loss_fn, progress=show)
            with preserve_state(model):
                for goal in goals:
                    source: GradientSource = ()
                    if pruner.statistic is not None:
                        source = pruner.statistic.collector(
                            model, targets, loss_fn, on_device, progress=show, trial=trial
                        )
                    prepare(pruner, targets, masks, source)
                    trial = getattr(source, "trial", None)
                    with pruner.path(targets, source, masks, progress=show) as path:
                        result = mender.choose(path.candidates(goal), 0)
                    result.apply(targets)
                    if mender.heal(result.masks, before, 0):
                        result = replace(result, weights=targets.copies(), stats={**result.stats, **mender.stats})
                    masks.update(result.masks)
                    saliency += result.saliency
            if recalibrate:
                mender.recalibrate(0)
    except BaseException:
        parts.restore(before)
        raise
    return replace(result, saliency=saliency, predicted_loss=saliency if pruner.predicts_loss else None)


def _refuse_iterator(batches: Iterable[Any], num_recomputations: int, pruner: Pruner, recalibrate: bool) -> None:
    """Refuse batches that can be read only once where they are read several times."""
    settings = {
        f"num_recomputations={num_recomputations}": num_recomputations > 1,
        f"heal={shown(pruner.heal)}": pruner.heal is not None,
        "recalibrate=True": recalibrate,
    }
    wanted = [setting for setting, reads in settings.items() if reads]
    if wanted and not repeatable(batches):
        raise ConfigError(
            f"{wanted[0]}: batches is an iterator, which can be read only once. Give a DataLoader or a list."
        )


def _targets(
    model: nn.Module,
    batches: _OnDevice,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    pruner: Pruner,
) -> Targets:
    """Those that are named, or that the forward pass on the first batch tells; of pruners of units, what their units are of."""
    if pruner.takes_units:
        with preserve_state(model):
            batch = batches.first()
            follow_batch = None if batch is None else lambda: loss_fn(model, batch)
            return units_of_model(model, follow_batch, include, exclude, pruner.cost).targets(model)
    candidates = Targets.from_model(model, include, exclude, None if include is not None else PENDING)
    if include is not None:
        return candidates

    def follow() -> Flow | None:
        batch = batches.first()
        return None if batch is None else trace(model, lambda: loss_fn(model, batch))

    with preserve_state(model):
        ends = agree_on_ends(model, follow)
    return Targets.from_model(model, None, exclude, ends)


def _device(model: nn.Module) -> torch.device:
    """That of the model's parameters, where its batches go."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


class _OnDevice:
    """Batches with their tensors moved to a device; re-iterable as its source is."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._begun: Iterator[Any] | None = None

    def first(self) -> Any:
        """The first batch, None if there is none. It is not lost: the next iteration begins with it."""
        batches = iter(self._batches)
        first = list(itertools.islice(batches, 1))
        self._begun = itertools.chain(first, batches)
        return self._moved(first[0]) if first else None

    def reader(self, model: nn.Module) -> Reader | None:
        """Reads all of them, however few samples are asked for, with the model in eval mode; None: they cannot be read again."""

        @contextlib.contextmanager
        def read(samples: int, use: Domain, index: int) -> Iterator[Iterable[Any]]:
            with preserve_state(model):
                yield self

        return read if self.repeatable else None

    @property
    def repeatable(self) -> bool:
        """Whether the batches can be read again."""
        return repeatable(self._batches)

    def __iter__(self) -> Iterator[Any]:
        batches, self._begun = self._batches if self._begun is None else self._begun, None
        for batch in batches:
            yield self._moved(batch)

    def _moved(self, batch: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch)


@contextlib.contextmanager
def _bar(enabled: bool) -> Iterator[Progress | None]:
    if not enabled:
        yield None
        return
    columns = (TextColumn("CAP: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, transient=True) as bar:
        task = bar.add_task("collect", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total)
