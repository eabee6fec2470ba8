"""Prune a plain torch model without a Trainer, or sweep many sparsities from one gradient pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.cycle import measured_sparsity, save_weights, sparsity_stem
from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.event import PruningEvent
from lightning_cap.gradients import GradientCollector
from lightning_cap.hooks import Progress
from lightning_cap.layer_inputs import InputCollector
from lightning_cap.masks import MaskSet
from lightning_cap.progress import event_progress
from lightning_cap.pruners import CAP, Pruner, PruneResult
from lightning_cap.sources import GradientSource
from lightning_cap.stepping import undisturbed
from lightning_cap.targets import Targets


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    sparsity: float,
    pruner: Pruner | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    num_recomputations: int = 1,
    progress: bool = True,
) -> PruneResult:
    """Prune ``model`` in place to ``sparsity``; zeros that it has already stay.

    Args:
        model: Any module; put into eval mode while gradients are taken.
        batches: Calibration batches, moved to the model's device; re-iterable if ``num_recomputations`` > 1. Tensors in them
            have the samples in dim 0.
        loss_fn: ``loss_fn(model, batch)`` -> scalar, the mean loss of the batch. Call the ``model`` that is passed in.
        sparsity: Zeros over all weights of the targets, in [0, 1).
        pruner: Default: `CAP` with its defaults.
        include: Globs or names of the weights to prune. Default: see `Targets.from_model`.
        exclude: Globs or names to leave dense.
        num_recomputations: Prune in so many steps of rising sparsity, with fresh gradients for each.
        progress: Show a progress bar.

    Returns:
        The result that was applied: weights, masks, predicted loss increase, sparsity.

    Raises:
        CAPError: Whatever is wrong, with the model unchanged.
    """
    pruner = pruner or CAP()
    if num_recomputations < 1:
        raise ConfigError(f"num_recomputations={num_recomputations}: give a whole number of at least 1.")
    _refuse_regrowth(pruner)
    pruner.check_sparsity(sparsity)
    targets = Targets.from_model(model, include, exclude)
    pruner.check(targets)
    if num_recomputations > 1 and isinstance(batches, Iterator):
        raise ConfigError(
            f"num_recomputations={num_recomputations}: batches is an iterator, which can be read only once. Give a DataLoader "
            "or a list."
        )
    masks = MaskSet(targets)
    masks.mask_zeros()
    start, before = masks.global_sparsity, targets.copies()
    device = targets.device
    predicted = 0.0
    try:
        with _bar(progress) as show, undisturbed(model):
            for step in range(1, num_recomputations + 1):
                goal = (
                    sparsity if step == num_recomputations else start + (sparsity - start) * step / num_recomputations
                )
                given = model, targets, loss_fn, _OnDevice(batches, device)
                source: GradientSource = ()
                if pruner.num_inputs:
                    source = InputCollector(*given, pruner.num_inputs, progress=show)
                elif pruner.num_gradients:
                    counts = pruner.num_gradients, pruner.samples_per_gradient
                    source = GradientCollector(*given, *counts, progress=show)
                with pruner.path(targets, source, masks, progress=show) as path:
                    result = path.at(goal)
                result.apply(targets)
                masks.update(result.masks)
                predicted += result.predicted_loss
    except BaseException:
        targets.restore(before)
        raise
    return PruneResult(result.weights, result.masks, predicted, result.sparsity, result.stats)


def sweep(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    sparsities: Sequence[float],
    pruner: Pruner | None = None,
    datamodule: pl.LightningDataModule | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    ckpt_path: str | None = None,
    folder: Path | None = None,
    seed: int = 0,
    num_recomputations: int = 1,
) -> list[dict[str, Any]]:
    """Prune a trained model at each of many sparsities from one gradient pass, and validate each.

    Args:
        trainer: Validates, and gives device and precision.
        model: Its weights are as before afterwards.
        sparsities: Zeros over all weights of the targets; order does not matter.
        pruner: Default: `CAP` with its defaults.
        datamodule: Validation data and ``calibration_dataloader()`` (else ``train_dataloader()``).
        include: Globs or names of the weights to prune.
        exclude: Globs or names to leave dense.
        ckpt_path: A Lightning checkpoint to load first.
        folder: Where to write ``sparsity=0.50.safetensors`` files, None for nowhere.
        seed: Key of the calibration samples and their augmentation.
        num_recomputations: Must be 1: one gradient pass serves all sparsities.

    Returns:
        A row for the dense model and one for each sparsity, rising: ``sparsity`` (measured), ``target``,
        ``predicted_loss``, the logged validation metrics under ``metrics``, and ``weights``, the file.

    Raises:
        ConfigError: ``num_recomputations`` is not 1, or no sparsity was given.
    """
    pruner = pruner or CAP()
    if num_recomputations != 1:
        raise ConfigError(
            f"num_recomputations={num_recomputations}: the one-shot sweep reads every sparsity from one gradient pass, so there is "
            "nothing to recompute. Use prune(..., num_recomputations=...) or CAPPruningCallback for that."
        )
    if not sparsities:
        raise ConfigError("sparsities=[]: give at least one, such as [0.5, 0.75, 0.9].")
    _refuse_regrowth(pruner)
    for sparsity in sparsities:
        pruner.check_sparsity(sparsity)
    solver = _SolveInValidation(pruner, sorted(sparsities), include, exclude, seed)
    trainer.callbacks.append(solver)  # type: ignore[attr-defined]
    try:
        dense = trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        targets, results = solver.solved
        before = targets.copies()
        rows = [_row(0.0, targets, 0.0, dense)]
        try:
            for sparsity, result in results:
                result.apply(targets)
                metrics = trainer.validate(model, datamodule=datamodule, verbose=False)
                rows.append(_row(sparsity, targets, result.predicted_loss, metrics))
                if folder is not None and trainer.is_global_zero:
                    rows[-1]["weights"] = str(folder / f"{sparsity_stem(sparsity)}.safetensors")
                    save_weights(model, targets, rows[-1])
        finally:
            targets.restore(before)
    finally:
        trainer.callbacks.remove(solver)  # type: ignore[attr-defined]
    return rows


def _refuse_regrowth(pruner: Pruner) -> None:
    if pruner.regrows:
        raise UnsupportedError(
            f"pruner={type(pruner).__name__}: weights that it brings back are zero until training goes on, and one-shot pruning "
            "does not train. Run it by CAPPruningCallback, or use Magnitude."
        )


def _row(target: float, targets: Targets, predicted_loss: float, metrics: Sequence[Any]) -> dict[str, Any]:
    merged = {name: float(value) for entry in metrics for name, value in entry.items()}
    return {
        "target": target,
        "sparsity": measured_sparsity(targets),
        "predicted_loss": predicted_loss,
        "metrics": merged,
        "weights": "",
    }


class _SolveInValidation(pl.Callback):
    """Collects and solves when the first validation starts, with the model on its device."""

    def __init__(
        self,
        pruner: Pruner,
        sparsities: Sequence[float],
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        seed: int,
    ) -> None:
        self._pruner, self._sparsities = pruner, sparsities
        self._include, self._exclude, self._seed = include, exclude, seed
        self._solved: tuple[Targets, list[tuple[float, PruneResult]]] | None = None

    @property
    def solved(self) -> tuple[Targets, list[tuple[float, PruneResult]]]:
        """The targets, and ``[(sparsity, result)]`` with its tensors in main memory."""
        if self._solved is None:
            raise ConfigError("limit_val_batches=0: the sweep validates every sparsity. Give it validation data.")
        return self._solved

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once."""
        if self._solved is not None:
            return
        targets = Targets.from_model(pl_module, self._include, self._exclude)
        self._pruner.check(targets)
        with torch.inference_mode(False):
            masks = MaskSet(targets)
            masks.mask_zeros()
            with event_progress(trainer, "One-shot") as progress:
                event = PruningEvent(trainer, pl_module, self._pruner, targets, masks, self._seed, progress)
                with event.path(0, masks) as path:
                    self._solved = targets, [(sparsity, _on_cpu(path.at(sparsity))) for sparsity in self._sparsities]


def _on_cpu(result: PruneResult) -> PruneResult:
    weights, masks = ({name: tensor.cpu() for name, tensor in part.items()} for part in (result.weights, result.masks))
    return dataclasses.replace(result, weights=weights, masks=masks)


class _OnDevice:
    """Batches with their tensors moved to a device; re-iterable as its source is."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = batches, device

    @property
    def repeatable(self) -> bool:
        """Whether the batches can be read again."""
        return not isinstance(self._batches, Iterator)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield pytree.tree_map(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch)


@contextlib.contextmanager
def _bar(enabled: bool) -> Iterator[Progress | None]:
    if not enabled:
        yield None
        return
    columns = (TextColumn("CAP: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, transient=True) as bar:
        task = bar.add_task("collect", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total)
