"""Says to torch-pruning's graph which channel becomes which where an operation moves, merges or divides them.

It takes most operations for element-wise, and tells the parts of a divided tensor apart by the order in which it meets
those who use them. The shapes that autograd keeps say it exactly. A graph that is still wrong is found out by `UnitCheck`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

WidthOf = Callable[[Any, str], "int | None"]
Mapped = list[Any]

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def align(node: Any, width_of: WidthOf) -> tuple[int, int] | None:
    """Correct the index mappings of one node of a `torch_pruning.DependencyGraph`.

    Args:
        node: Of the graph.
        width_of: (layer, way) -> number of its channels, None for what is no layer.

    Returns:
        Where padding adds channels of zeros: the range of those that are not added.
    """
    name = node.grad_fn.name() if node.grad_fn is not None and hasattr(node.grad_fn, "name") else ""
    if not name.startswith(("ConstantPadNd", "Unbind", "Split", "View", "UnsafeView", "ReshapeAlias")):
        return None
    source = _nearest_layer(node, width_of)
    width = None if source is None else width_of(source, "out")
    if width is None:
        return None
    if name.startswith("ConstantPadNd"):
        return _align_padding(node, width, isinstance(source, _CHANNELS_FIRST))
    if name.startswith(("Unbind", "Split")):
        _align_parts(node, width)
    elif width_of(node.module, "out") is None:
        _align_reshape(node, width, isinstance(source, _CHANNELS_FIRST))
    return None


def _align_padding(node: Any, width: int, channels_first: bool) -> tuple[int, int] | None:
    padding = (*node.grad_fn._saved_pad, *[0] * 6)
    before, behind = padding[4:6] if channels_first else padding[:2]  # (N, C, H, W) or (..., C), from the last dim on
    if before == behind == 0:
        return None
    for entering in dict.fromkeys(node.inputs):
        for dependency in _between(entering, node):
            dependency.index_mapping[0] = _Shift(before, 0, width)
        for dependency in _between(node, entering):
            dependency.index_mapping[0] = _Shift(-before, before, before + width)
    return before, before + width


def _align_parts(node: Any, width: int) -> None:
    """Each part of `unbind`, `chunk` or `split` is a range of channels, if they divide those."""
    offsets = _offsets(node.grad_fn, width)
    if offsets is None:
        return
    for user in dict.fromkeys(node.outputs):
        numbers = [number for function, number in user.grad_fn.next_functions if function is node.grad_fn]
        to, back = _between(node, user), _between(user, node)
        if len(to) == len(back) == len(numbers):
            for number, there, again in zip(numbers, to, back, strict=True):
                low, high = offsets[number : number + 2]
                there.index_mapping[0], again.index_mapping[0] = _Shift(-low, low, high), _Shift(low, 0, high - low)


def _offsets(function: Any, width: int) -> list[int] | None:
    """Where the parts start, and the end of the last."""
    parts = [list(metadata.shape) for metadata in function._input_metadata]
    if function.name().startswith("Unbind"):
        if width % len(parts):
            return None
        return [i * (width // len(parts)) for i in range(len(parts) + 1)]
    shape = list(function._saved_self_sym_sizes)
    dim = function._saved_dim if function._saved_dim < len(shape) else function._saved_dim - 2**64 + len(shape)
    if shape[dim] != width:
        return None
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part[dim])
    return ends


def _align_reshape(node: Any, width: int, channels_first: bool) -> None:
    """A reshape may merge channels with positions before them, as patches do, or behind them, as flattening does."""
    if not hasattr(node.grad_fn, "_saved_self_sym_sizes"):
        return
    before, after = list(node.grad_fn._saved_self_sym_sizes), list(node.grad_fn._input_metadata[0].shape)
    merges = not channels_first and before[-1] == width and after[-1] > width and after[-1] % width == 0
    flattens = len(before) > 2 == len(after) and before[1] == width and after[1] > width
    if not merges and not flattens:
        return
    times = (after[-1] if merges else after[1]) // width
    for entering in dict.fromkeys(node.inputs):
        for dependency in _between(entering, node):
            dependency.index_mapping[0] = _Repeat(width if merges else 1, 1 if merges else times, times)
        for dependency in _between(node, entering):
            dependency.index_mapping[0] = _Fold(width if merges else 0, times)


def _between(source: Any, target: Any) -> list[Any]:
    return [dependency for dependency in source.dependencies if dependency.target is target]


@dataclass
class _Shift:
    """Channels from ``low`` to ``high`` move by so many; others lead nowhere."""

    by: int
    low: int
    high: int

    def __call__(self, pairs: Sequence[Any]) -> Mapped:
        return [pair._replace(idx=pair.idx + self.by) for pair in pairs if self.low <= pair.idx < self.high]


@dataclass
class _Repeat:
    """Channel ``c`` becomes ``each * c + apart * j`` for ``j < times``."""

    apart: int
    each: int
    times: int

    def __call__(self, pairs: Sequence[Any]) -> Mapped:
        return [p._replace(idx=self.each * p.idx + self.apart * j) for p in pairs for j in range(self.times)]


@dataclass
class _Fold:
    """The other way of `_Repeat`: the rest modulo ``width``, or, where that is 0, the quotient by ``times``."""

    width: int
    times: int

    def __call__(self, pairs: Sequence[Any]) -> Mapped:
        return [p._replace(idx=p.idx % self.width if self.width else p.idx // self.times) for p in pairs]


def _nearest_layer(node: Any, width_of: WidthOf) -> Any:
    """The layer whose output reaches ``node`` first; None if there is none."""
    waiting, seen = list(node.inputs), set(node.inputs)
    for entering in waiting:
        if width_of(entering.module, "out") is not None:
            return entering.module
        new = [before for before in entering.inputs if before not in seen]
        seen.update(new)
        waiting += new
    return None
