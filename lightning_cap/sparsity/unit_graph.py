"""Which channels of a model's layers go together, as the dependency graph of torch-pruning tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.errors import UnsupportedError
from lightning_cap.sparsity.unit_alignment import align
from lightning_cap.utilities.arguments import shown

Indices = NDArray[np.int64]

_ATTENTION = ("ScaledDotProduct", "Bmm", "Softmax")  # in the names of operations
_INSTALL = 'pip install "lightning-cap[structured]"'


@dataclass(eq=False)
class Side:
    """One end of a layer, or a parameter outside all layers, whose channels are among those that go together.

    Attributes:
        owner: The layer or the parameter.
        way: Which end: "in", "out", or "both" where these are the same channels (norms, depthwise convolutions).
        labels: Channel -> what it goes with, ``(channels,)``; -1 where nothing is known.
        dim: Of a parameter: the one that the channels divide.
        scales: Of a parameter: whether it multiplies the channels.
        reshaped: Whether it is reached by more channels than it has, so that its labels are not to be trusted.
    """

    owner: nn.Module | nn.Parameter
    way: str
    labels: Indices
    dim: int = 0
    scales: bool = False
    reshaped: bool = False


@dataclass
class ChannelGraph:
    """Channels that go together have one label.

    Attributes:
        sides: Ends of layers, in no order.
        blocked: Label -> why those channels cannot be pruned.
        attended: Labels of channels that pass a product of activations or a softmax, as those of attention do.
    """

    sides: list[Side]
    blocked: dict[int, str]
    attended: set[int] = field(default_factory=set)


def load_dependency_graph() -> Any:
    """The class `torch_pruning.DependencyGraph`.

    Raises:
        UnsupportedError: The package is not installed.
    """
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise UnsupportedError(
            f"Units.from_model: the package torch-pruning, which finds what goes together, cannot be imported ({error}). Install "
            f"it: {_INSTALL}."
        ) from error
    return DependencyGraph


def channel_graph(
    model: nn.Module,
    forward: Callable[[], Any],
    apart: Sequence[nn.Parameter],
    width_of: Callable[[Any, str], int | None],
) -> ChannelGraph:
    """Trace a model, all of whose parameters require a gradient.

    Args:
        model: A copy that may be changed.
        forward: Runs it on examples and returns its output.
        apart: Parameters outside all layers that are not indexed by channels, such as a table of one column per head.
        width_of: (layer or parameter, way) -> number of its channels, None for what is no layer.

    Raises:
        UnsupportedError: torch-pruning cannot trace it.
    """
    outputs: list[Tensor] = []

    def run(*_: Any) -> list[Tensor]:
        found = [t for t in pytree.tree_leaves(forward()) if isinstance(t, Tensor) and t.requires_grad]
        outputs.extend(found)
        return found

    graph = load_dependency_graph()()
    try:
        graph.build_dependency(model, example_inputs=[], forward_fn=run, verbose=False)
        walk = _Walk(graph)
        for node in graph.module2node.values():
            filled = align(node, width_of)
            if filled is not None:
                walk.filled[node] = filled
        return walk.read(outputs, apart, width_of)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"model={type(model).__name__}: torch-pruning could not trace how its layers depend on each other "
            f"({type(error).__name__}: {shown(str(error))}). Name the Linear and Conv weights to prune one by one instead, with a "
            "pruner of weights."
        ) from error


State = tuple[Any, Any]  # a node and the function that would prune one of its ends


@dataclass
class _Walk:
    """Goes along all dependencies, from every layer's outputs on, and notes which channel leads to which."""

    graph: Any
    seen: dict[State, Indices] = field(default_factory=dict)
    links: list[tuple[State, Indices, State, Indices]] = field(default_factory=list)
    filled: dict[Any, tuple[int, int]] = field(
        default_factory=dict
    )  # padding node -> range of channels that are not filled

    def read(
        self, outputs: Sequence[Tensor], apart: Sequence[nn.Parameter], width_of: Callable[[Any, str], int | None]
    ) -> ChannelGraph:
        """Every layer's labels, and what is blocked by the model's outputs or by padding."""
        nodes = list(self.graph.module2node.values())
        skip = {id(parameter) for parameter in apart}
        for node in nodes:
            width = width_of(node.module, "out")
            if width is not None and id(node.module) not in skip and not _is_parameter(node.module):
                self._from((node, self._pruner(node).prune_out_channels), np.arange(width), skip)
        labels = self._labels()
        sides: list[Side] = []
        for (node, function), channels in self.seen.items():
            way = self._way(node, function)
            dim = _channel_dim(node, int(channels.max()) + 1) if _is_parameter(node.module) else 0
            width = node.module.shape[dim] if _is_parameter(node.module) else width_of(node.module, way)
            if width is None:
                continue
            reshaped = bool(channels.max() >= width)
            if reshaped and _is_shared(node.module):  # such as a scale and shift of all heads
                continue
            own = np.full(width, -1)
            inside = channels[channels < width]
            own[inside] = labels[node, function][inside]
            scales = any("Mul" in str(out.module) for out in node.outputs)
            sides.append(Side(node.module, way, own, dim, scales, reshaped))
        return ChannelGraph(sides, self._blocked(outputs, labels), self._attended(labels))

    def _pruner(self, node: Any) -> Any:
        return self.graph.get_pruner_of_module(node.module)

    def _way(self, node: Any, function: Any) -> str:
        pruner = self._pruner(node)
        into, out = function == pruner.prune_in_channels, function == pruner.prune_out_channels
        if into and out and not isinstance(node.module, nn.Embedding):
            return "both"
        return "out" if out else "in"

    def _from(self, state: State, channels: Indices, skip: set[int]) -> None:
        waiting = [(state, channels)]
        while waiting:
            state, channels = waiting.pop()
            known = self.seen.get(state)
            if known is not None:
                channels = np.setdiff1d(channels, known)
                if not len(channels):
                    continue
            self.seen[state] = channels if known is None else np.union1d(known, channels)
            node, function = state
            for dependency in node.dependencies:
                if dependency.is_triggered_by(function) and id(dependency.target.module) not in skip:
                    roots, mapped = _mapped(dependency, channels)
                    if len(mapped):
                        to = (dependency.target, dependency.handler)
                        self.links.append((state, roots, to, mapped))
                        waiting.append((to, np.unique(mapped)))

    def _labels(self) -> dict[State, Indices]:
        """Channels that are linked, on any number of steps, have one label."""
        starts, total = {}, 0
        for state, channels in self.seen.items():
            starts[state] = total
            total += int(channels.max()) + 1
        labels = np.arange(total)
        ends = [(starts[a] + i, starts[b] + j) for a, i, b, j in self.links]
        while True:
            before = labels.copy()
            for a, b in (*ends, *reversed(ends)):
                least = np.minimum(labels[a], labels[b])
                np.minimum.at(labels, a, least)
                np.minimum.at(labels, b, least)
            if np.array_equal(before, labels):
                return {
                    state: labels[start : start + int(self.seen[state].max()) + 1] for state, start in starts.items()
                }

    def _attended(self, labels: Mapping[State, Indices]) -> set[int]:
        found: set[int] = set()
        for (node, function), channels in self.seen.items():
            name = getattr(node.grad_fn, "name", str)()
            if any(operation in name for operation in _ATTENTION):
                found.update(map(int, labels[node, function][channels]))
        return found

    def _blocked(self, outputs: Sequence[Tensor], labels: Mapping[State, Indices]) -> dict[int, str]:
        blocked: dict[int, str] = {}
        last = {tensor.grad_fn for tensor in outputs}
        for (node, function), channels in self.seen.items():
            if node.grad_fn in last and self._way(node, function) != "in":
                blocked |= {int(label): "an output of the model" for label in labels[node, function][channels]}
            if node in self.filled:
                before, behind = self.filled[node]
                inside = (channels >= before) & (channels < behind)
                blocked |= {int(label): "padded with zeros" for label in labels[node, function][channels[~inside]]}
        return blocked


def _mapped(dependency: Any, channels: Indices) -> tuple[Indices, Indices]:
    """``channels`` of the source, and those of the target that each leads to."""
    mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
    if not mappings:
        return channels, channels
    from torch_pruning._helpers import _HybridIndex

    pairs = [_HybridIndex(idx=int(c), root_idx=int(c)) for c in channels]
    for mapping in mappings:
        pairs = mapping(pairs)
    pairs = [pair for pair in pairs if pair.root_idx is not None and pair.idx >= 0]
    return np.array([p.root_idx for p in pairs], dtype=np.int64), np.array([p.idx for p in pairs], dtype=np.int64)


def _channel_dim(node: Any, width: int) -> int:
    """The dim of a parameter that has so many entries; the one that torch-pruning supposes if that is not the only one."""
    fitting = [dim for dim, size in enumerate(node.module.shape) if size == width]
    return fitting[0] if len(fitting) == 1 else int(node.pruning_dim)


def _is_parameter(module: Any) -> bool:
    return isinstance(module, nn.Parameter)


def _is_shared(module: Any) -> bool:
    """Whether one of its entries may serve several channels."""
    return _is_parameter(module) or isinstance(module, (nn.LayerNorm, nn.PReLU))
