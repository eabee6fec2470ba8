"""Units of the model inside a LightningModule, found with what its training step feeds it, without a trace in the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.sparsity.cost import Cost
from lightning_cap.sparsity.units import Layer, Slice, UnitGroup, Units, Width
from lightning_cap.trainer.calibration import calibrating, precision_context
from lightning_cap.trainer.ends import follow_a_batch
from lightning_cap.utilities import distributed
from lightning_cap.utilities.compiled import plain_module, plain_name


def find_module_units(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    seed: int,
) -> Units:
    """Units of the model that has all weights of a module that train; the same on all ranks.

    Every rank must call it. Rank 0 traces for all.

    Args:
        trainer: In ``fit``, with its training data, or in ``validate``.
        module: Its LightningModule. Names of units and of their parameters are those in it.
        include: As for `Units.from_model`; names may begin with that of the model in the module.
        exclude: Likewise.
        seed: First part of the key that samples are drawn by.

    Raises:
        ConfigError: A glob matches nothing, or no unit is left.
        UnsupportedError: The model cannot be traced, or gets no inputs of its own in a training step.
    """
    found = None
    with distributed.raise_on_all_ranks("Finding the units"):
        inner = feed(trainer, module, seed)
        if distributed.rank() == 0:
            with calibrating(trainer, module), precision_context(trainer)(), torch.inference_mode(False):
                globs = [
                    None if g is None else [one.removeprefix(inner.prefix) for one in g] for g in (include, exclude)
                ]
                units = Units.from_model(inner.model, inner.inputs, *globs)
            found = renamed(units, lambda name: inner.prefix + name).state_dict()
    return Units.from_state(distributed.gather_objects(found)[0])


def prepare_cost(
    trainer: pl.Trainer, module: pl.LightningModule, cost: Cost, units: Units, seed: int, folder: Path | None = None
) -> None:
    """Let a cost measure what it needs of the model inside a module, if it does. Every rank must call it.

    Args:
        trainer: As for `find_module_units`.
        module: Its LightningModule.
        cost: Of the pruner.
        units: By their names in the module.
        seed: As for `find_module_units`.
        folder: Of the run, for what it keeps.
    """
    if type(cost).prepare is Cost.prepare:
        return
    with distributed.raise_on_all_ranks("Measuring the cost"):
        inner = feed(trainer, module, seed)
        own = renamed(units, lambda name: name.removeprefix(inner.prefix))
    with calibrating(trainer, module), precision_context(trainer)(), torch.inference_mode(False):
        cost.prepare(inner.model, own, inner.inputs, folder)


def units_of_model(
    model: nn.Module,
    loss: Callable[[], Any] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    cost: Cost,
) -> Units:
    """Units of a plain model, the same on all ranks; ``cost`` measures what it needs. Every rank must call it.

    Args:
        model: In eval mode.
        loss: Runs the model once, on this rank's first batch; None: there is none. Rank 0 must have one.
        include: As for `Units.from_model`.
        exclude: Likewise.
        cost: Of the pruner.

    Raises:
        ConfigError: There is no batch, a glob matches nothing, or no unit is left.
        UnsupportedError: The model cannot be traced, or the loss does not call it.
    """
    found, inputs = None, None
    with distributed.raise_on_all_ranks("Finding the units"):
        inputs = None if loss is None else _inputs_of(model, loss)
        if distributed.rank() == 0:
            if inputs is None:
                raise ConfigError("batches: there is none to find the units with. Give calibration batches.")
            found = Units.from_model(model, inputs, include, exclude).state_dict()
    units = Units.from_state(distributed.gather_objects(found)[0])
    if inputs is not None:
        cost.prepare(model, units, inputs)
    return units


def _inputs_of(model: nn.Module, loss: Callable[[], Any]) -> tuple[Any, ...] | dict[str, Any]:
    """What a loss gives to the model."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            loss()
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedError(
            "loss_fn: it does not call the model that it is given, so the inputs that its units are found with are not known. Call "
            "model(...) in it."
        )
    return _as_inputs(model, *seen[0])


@dataclass(frozen=True)
class Fed:
    """The model inside a LightningModule, and what it gets.

    Attributes:
        prefix: Of its names in the module: empty, or ending with a dot.
        model: The model.
        inputs: Positional arguments as a tuple, or all by name, of one forward pass; none on a rank that has no batch.
    """

    prefix: str
    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]


def feed(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> Fed:
    """Look at what the calibration loss of a few samples gives to the model inside a module.

    Raises:
        ConfigError: There is no batch on rank 0.
        UnsupportedError: It does not call the model as a whole.
    """
    name, model = inner_model(module)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        detached = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        seen.append(detached)

    def follow(loss: Callable[[], Any]) -> bool:
        seen.clear()
        loss()
        return True

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        done = follow_a_batch(trainer, module, seed, follow)
    finally:
        handle.remove()
    shown = f"{type(module).__name__}.{name}" if name else type(module).__name__
    if done is None and distributed.rank() == 0:
        raise ConfigError(
            f"model={shown}: there is no calibration batch to find its units with. Give the training data samples."
        )
    if done and not seen:
        raise UnsupportedError(
            f"model={shown}: the training step calls parts of it, but never it as a whole, so the inputs that its units are found "
            "with are not known. Keep all weights that train in one submodule, and call that."
        )
    return Fed(plain_name(f"{name}.") if name else "", model, _as_inputs(model, *seen[0]) if seen else ())


def inner_model(module: nn.Module) -> tuple[str, nn.Module]:
    """A timm model that has all weights that train, else the only child that has; else the module itself. With its name."""
    wanted = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    children = [(name, child) for name, child in module.named_modules() if hasattr(child, "pretrained_cfg")]
    for name, child in (*children, *module.named_children()):
        if wanted <= {id(parameter) for parameter in child.parameters()}:
            return name, plain_module(child)
    return "", module


def renamed(units: Units, rename: Callable[[str], str]) -> Units:
    """The same units with another name for each group, parameter, buffer and layer."""

    def slices(parts: tuple[Slice, ...]) -> tuple[Slice, ...]:
        return tuple(replace(part, name=rename(part.name)) for part in parts)

    groups = [
        UnitGroup(
            rename(group.name),
            group.kind,
            group.size,
            *(slices(parts) for parts in (group.producers, group.norms, group.consumers, group.buffers)),
        )
        for group in units.values()
    ]
    layers = [
        Layer(
            rename(layer.name),
            layer.flops,
            tuple(Width(width.full, {rename(n): per for n, per in width.per_unit.items()}) for width in layer.widths),
        )
        for layer in units.layers
    ]
    skipped = {rename(name): why for name, why in units.skipped.items()}
    return Units(groups, layers, units.flops, skipped)


def _as_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | dict[str, Any]:
    """Positional arguments, or where some were named, all by name."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(names) < len(args):
        raise UnsupportedError(
            f"model={type(model).__name__}: it is called with {len(args)} arguments by place and others by name, and has no name "
            "for all of the first. Call it with all arguments by place or all by name."
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}
