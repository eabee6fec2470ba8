"""What a model takes and gives, be it one tensor or many: rows, names, and outputs as a list of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.errors import ConfigError, ExportError
from lightning_cap.utilities.arguments import require_instance, shown

#: A tensor ``(n, ...)``, the positional arguments of the model in a tuple, or its named ones in a dict, as `Units.from_model` takes
#: them. Tensors with as many rows as the first one are the batch. What else there is, such as a flag or None, is a constant.
Inputs = Any

_IMAGES = "torch.randn(8, 3, 224, 224)"
_CONSTANTS = (bool, int, float, str, type(None))


def checked_inputs(name: str, value: object) -> Inputs:
    """Refuse what is no batch; a list becomes a tuple, and a mapping a dict.

    Args:
        name: Of the argument.
        value: Of the argument.

    Raises:
        ConfigError: It is something else, or has values that are not finite.
    """
    require_instance(name, value, (Tensor, tuple, list, Mapping), f"{_IMAGES}, or the arguments in a tuple or dict")
    if isinstance(value, Tensor):
        if value.ndim < 2 or not len(value) or not _has_real_values(value):
            raise ConfigError(
                f"{name}: a tensor of shape {tuple(value.shape)} and type {value.dtype}, or with values that are not finite. Give "
                "real inputs (n, ...), such as float images (8, 3, 224, 224)."
            )
        return value
    inputs: Inputs = dict(value) if isinstance(value, Mapping) else tuple(value)  # type: ignore[arg-type]
    for key in inputs if isinstance(inputs, dict) else ():
        if not isinstance(key, str):
            raise ConfigError(
                f"{name}: {shown(key)} is no name of an argument. Give {{'input_ids': ..., ...}}, or a tuple."
            )
    leaves = _named_leaves(inputs)
    if not any(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) for _, leaf in leaves) or not num_rows(inputs):
        raise ConfigError(f"{name}: there is no tensor (n, ...) in {shown(value)}. Give a batch, such as {_IMAGES}.")
    for key, leaf in leaves:
        if isinstance(leaf, Tensor) and not _has_real_values(leaf):
            raise ConfigError(f"{name}: {key!r} has values that are not finite, or none. Give real inputs.")
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise ConfigError(f"{name}: {key!r} is a {type(leaf).__name__}. Give tensors, in tuples, lists and dicts.")
    return inputs


def num_rows(inputs: Inputs) -> int:
    """Rows of the batch: dim 0 of the first tensor that has one."""
    return next(len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim)


def head(inputs: Inputs, number: int) -> Inputs:
    """The first rows."""
    return _map_rows(inputs, lambda tensor: tensor[:number])


def repeated(inputs: Inputs, number: int) -> Inputs:
    """So many rows, one after the other and from the first one again."""
    index = torch.arange(number) % num_rows(inputs)
    return _map_rows(inputs, lambda tensor: tensor[index.to(tensor.device)])


def concatenated(batches: Sequence[Inputs]) -> Inputs:
    """The rows of all batches; they have the same structure."""
    first = batches[0]
    sizes = [num_rows(batch) for batch in batches]
    leaves = [pytree.tree_leaves(batch) for batch in batches]
    joined = [torch.cat(parts) if is_batched(parts[0], sizes[0]) else parts[0] for parts in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, pytree.tree_structure(first))


def moved(inputs: Inputs, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
    """On a device, floats in a type."""

    def move(leaf: Any) -> Any:
        return (
            leaf.detach().to(device, dtype if leaf.is_floating_point() else None) if isinstance(leaf, Tensor) else leaf
        )

    return pytree.tree_map(move, inputs)


def device_of(inputs: Inputs) -> torch.device:
    """Where the first tensor is."""
    return next(leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))


def batched_tensors(inputs: Inputs) -> list[Tensor]:
    """Those whose rows are the batch."""
    rows = num_rows(inputs)
    return [leaf for leaf in pytree.tree_leaves(inputs) if is_batched(leaf, rows)]


def is_batched(leaf: object, rows: int) -> bool:
    """Whether it is a tensor with so many rows."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named ones of a model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}


def call(model: Any, inputs: Inputs) -> Any:
    """What a model gives for them."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def output_tensors(outputs: Any) -> list[Any]:
    """What is in outputs, one after the other, without None."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if leaf is not None]


def one_or_list(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """A single tensor as such."""
    return tensors[0] if len(tensors) == 1 else list(tensors)


def checked_outputs(outputs: Any, rows: int) -> list[Tensor]:
    """The tensors that a model gives, of which each must have a row for each input.

    Raises:
        ExportError: One has not, or is no tensor, or not finite.
    """
    only = "Only tensors with a row for each input are exported."
    leaves = [(name, leaf) for name, leaf in _named_leaves(outputs, "output") if leaf is not None]
    for name, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ExportError(
                f"model: its output {name!r} is a {type(leaf).__name__}. {only} Let the model leave it out, as transformers do by "
                "'use_cache': False among the arguments."
            )
        if leaf.ndim < 1:
            raise ExportError(
                f"model: its output {name!r} is a single number. {only} If it is a loss, leave what it is computed of, such as "
                "labels, out of example_input."
            )
        if len(leaf) != rows:
            raise ExportError(f"model: its output {name!r} has shape {tuple(leaf.shape)} for {rows} inputs. {only}")
        if not leaf.isfinite().all():
            raise ExportError(
                "model: its outputs are not finite on these inputs. Give a model that works, and its inputs."
            )
    if not leaves:
        raise ExportError(f"model: it gives {shown(type(outputs))} without a tensor. {only}")
    return [leaf for _, leaf in leaves]


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """A name for each tensor: ``"input"`` for one tensor, else those of the arguments of the forward method."""
    if isinstance(inputs, Tensor):
        return ["input"]
    named = inputs if isinstance(inputs, Mapping) else inspect.signature(model.forward).bind(*inputs).arguments
    return _distinct([name for name, leaf in _named_leaves(dict(named)) if isinstance(leaf, Tensor)], ())


def output_names(outputs: Any, taken: Iterable[str]) -> list[str]:
    """A name for each tensor: ``"output"`` for one, else the keys of dicts and fields, or ``"output_0"`` and so on.

    Args:
        outputs: Of the model.
        taken: Names that something else has.
    """
    return _distinct([name for name, leaf in _named_leaves(outputs, "output") if leaf is not None], taken)


def by_name(inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors by the names of the inputs of a file: those of a dict by its own, others in their order."""
    leaves = [(name, leaf) for name, leaf in _named_leaves(inputs) if isinstance(leaf, Tensor)]
    own = _distinct([name for name, _ in leaves], ()) if isinstance(inputs, Mapping) else names
    return {name: leaf for name, (_, leaf) in zip(own, leaves, strict=True) if name in names}


def _map_rows(inputs: Inputs, change: Any) -> Inputs:
    rows = num_rows(inputs)
    return pytree.tree_map(lambda leaf: change(leaf) if is_batched(leaf, rows) else leaf, inputs)


def _has_real_values(tensor: Tensor) -> bool:
    """Whether it has values, and all are finite."""
    return tensor.layout == torch.strided and not tensor.is_meta and bool(tensor.isfinite().all())


def _named_leaves(tree: Any, root: str = "") -> list[tuple[str, Any]]:
    """Leaves with the keys and positions that lead to them; a name that would begin with a position begins with ``root``."""
    try:
        found = [(list(map(_key, path)), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # a class that torch knows without its keys
        found = [([str(number)], leaf) for number, leaf in enumerate(pytree.tree_leaves(tree))]
    return [
        ("_".join(path if path and not path[0].isdecimal() else [root, *path]).strip("_"), leaf) for path, leaf in found
    ]


def _key(entry: Any) -> str:
    return str(next(getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind)))


def _distinct(names: Sequence[str], taken: Iterable[str]) -> list[str]:
    """With ``_out`` behind those that are taken."""
    used, distinct = set(taken), []
    for name in names:
        while name in used:
            name += "_out"
        used.add(name)
        distinct.append(name)
    return distinct
