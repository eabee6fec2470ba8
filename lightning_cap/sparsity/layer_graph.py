"""Reads off the autograd graph of a forward pass which layers come before which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_cap.errors import TargetError
from lightning_cap.utilities.compiled import plain_name

_LAYERS = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
    nn.modules.conv._ConvNd,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_MULTIPLIES = re.compile(
    r"_?(sparse|scaled|b)?(add)?b?(mm|mv)backward|.*(linear|conv|embedding|differentiablegraph)", re.IGNORECASE
)
_HIDES_LAYERS = "CheckpointFunctionBackward"


@dataclass
class Flow:
    """Which layers come before which in one forward pass, by name; layers that the loss depends on alone.

    Attributes:
        before: Layer -> those that its input depends on, of the layers whose place is known.
        reached: Layers, or parameters, that the loss has a gradient for.
    """

    before: dict[str, set[str]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)


def layer_names(model: nn.Module) -> dict[nn.Module, str]:
    """The name of each module that counts as one layer; the first of several."""
    return {module: plain_name(path) for path, module in model.named_modules() if _is_layer(module)}


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, _LAYERS):
        return True
    if isinstance(module, (*_NORMS, torch.jit.ScriptModule)) or any(True for _ in module.children()):
        return False  # scripted modules take no hooks; their weights are found by themselves
    return any(_is_matrix(p) for p in module._parameters.values() if p is not None)


def _is_matrix(parameter: Tensor) -> bool:
    """Whether two of its dimensions are larger than 1, as those of a matrix, and not of a bias or a scale."""
    return not nn.parameter.is_lazy(parameter) and sum(size > 1 for size in parameter.shape) > 1


def trace(model: nn.Module, loss: Callable[[], Any]) -> Flow:
    """The flow of one forward pass. See `find_ends`.

    Raises:
        TargetError: Nothing that ``loss`` returns has a gradient.
    """
    for path, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise TargetError(f"{plain_name(path)!r} is not initialised yet. Run one forward pass before pruning.")
    calls = _Calls(layer_names(model))
    with torch.inference_mode(False), torch.enable_grad():
        with calls.watching():
            outputs = loss()
        roots = _nodes(outputs)
        if not roots:
            raise TargetError(
                "loss: nothing that the forward pass returned has a gradient, so first and last layers are not known. Return the "
                "loss, not detached, or name the weights with include=[...]."
            )
        return _Graph(model, calls).flow(roots)


@dataclass
class _Calls:
    """The layers' calls in a forward pass: which nodes of the graph are theirs, and which give their inputs."""

    names: dict[nn.Module, str]
    owner: dict[Node, str] = field(default_factory=dict)
    entries: dict[str, list[Node]] = field(default_factory=dict)
    exits: dict[str, list[Node]] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of every call inside."""
        with ExitStack() as stack:
            for module in self.names:
                for handle in (
                    module.register_forward_pre_hook(_require_grad, with_kwargs=True),
                    module.register_forward_hook(self._take, with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            yield

    def _take(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        name = self.names[module]
        output = pytree.tree_map(_with_graph, output)  # of a frozen embedding
        inputs, outputs = _nodes((args, kwargs)), _nodes(output)
        for node in _between(outputs, set(inputs)) or outputs:
            self.owner.setdefault(node, name)
        self.entries.setdefault(name, []).extend(inputs)
        self.exits.setdefault(name, []).extend(outputs)
        return output


def _require_grad(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """Give every input a place in the graph, so that frozen layers have one."""
    if not torch.is_grad_enabled():
        return args, kwargs
    return pytree.tree_map(lambda t: t.detach().requires_grad_() if _is_constant(t) else t, (tuple(args), dict(kwargs)))


def _with_graph(value: Any) -> Any:
    return value.detach().requires_grad_().clone() if _is_constant(value) else value


def _is_constant(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad and (value.is_floating_point() or value.is_complex())


def _nodes(value: Any) -> list[Node]:
    """Of all tensors in ``value`` that have a gradient."""
    leaves = pytree.tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
    tensors = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    return [get_gradient_edge(t).node for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _between(outputs: Sequence[Node], inputs: set[Node]) -> list[Node]:
    """Nodes on a way from ``outputs`` back to ``inputs``, the latter not among them."""
    reaches: dict[Node, bool] = dict.fromkeys(inputs, True)
    for node in _children_first(outputs, inputs):
        if node not in inputs:
            reaches[node] = any(reaches[child] for child in _children(node))
    return [node for node, found in reaches.items() if found and node not in inputs]


def _children_first(roots: Iterable[Node], stop: set[Node] | None = None) -> Iterator[Node]:
    """Every node below ``roots``, each after those that it depends on; none below ``stop``."""
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if stop is None or node not in stop:
                stack += [(child, False) for child in _children(node)]


class _Graph:
    """Reads a flow off the graph below the loss.

    Args:
        model: The module.
        calls: Its layers' calls.
    """

    def __init__(self, model: nn.Module, calls: _Calls) -> None:
        self._calls = calls
        self._layer_of: dict[int, str] = {}  # id of a parameter -> its layer
        self._matrices: set[int] = set()
        for path, module in model.named_modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    name = calls.names.get(module, plain_name(f"{path}.{attribute}"))
                    self._layer_of.setdefault(id(parameter), name)
                    self._matrices |= {id(parameter)} if _is_matrix(parameter) else set()
        # A weight that is used by itself is a layer's only if the layer was not called; or of an embedding, as a tied head is.
        self._by_call = {name for m, name in calls.names.items() if name in calls.entries and not _is_embedding(m)}

    def flow(self, roots: Sequence[Node]) -> Flow:
        """What the graph below ``roots`` tells."""
        flow = Flow()
        roots = list(roots)
        while True:
            before = self._walk(roots, flow)
            hidden = flow.reached & self._calls.exits.keys() - before.keys()
            more = [node for name in hidden for node in self._calls.exits[name] if node not in roots]
            if not more:
                flow.before = before
                return flow
            roots += more  # the loss is a derivative, so that it depends on the weights but not on the outputs

    def _walk(self, roots: Sequence[Node], flow: Flow) -> dict[str, set[str]]:
        calls, bits = self._calls, {name: 1 << i for i, name in enumerate(self._all_names())}
        above: dict[Node, int] = {}  # the layers that a node depends on, as bits
        pure: dict[Node, int | None] = {}  # the id of the one matrix that a node is made of, 0 for none, None for more
        met: dict[str, int] = {}
        for node in _children_first(roots):
            below = _children(node)
            found = 0
            for child in below:
                found |= above[child]
            leaf = getattr(node, "variable", None)
            kinds = {pure[child] for child in below} - {0}
            pure[node] = 0 if not kinds and leaf is None else kinds.pop() if len(kinds) == 1 else None
            if leaf is not None:
                own = id(leaf) in self._layer_of
                pure[node] = id(leaf) if id(leaf) in self._matrices else 0 if own else None
                flow.reached |= {self._layer_of[id(leaf)]} if own else set()
            elif node.name() == _HIDES_LAYERS:
                raise TargetError(
                    "use_reentrant=True: checkpointed layers are not in the graph, so first and last layers are not known. Use "
                    "torch.utils.checkpoint with use_reentrant=False, or name the weights with include=[...]."
                )
            name = calls.owner.get(node)
            if name is not None:
                flow.reached.add(name)
                entering = 0
                for entry in calls.entries[name]:
                    entering |= above.get(entry, 0)
                met[name] = met.get(name, 0) | entering
                pure[node] = None
                found |= bits[name]
            elif weight := self._multiplied(node, below, pure):
                name = self._layer_of[weight]
                met[name] = met.get(name, 0) | found
                pure[node] = None
                found |= bits[name]
            above[node] = found
        names = list(bits)
        return {name: {names[i] for i in _set_bits(b)} for name, b in met.items()}

    def _all_names(self) -> list[str]:
        return list(dict.fromkeys([*self._calls.names.values(), *self._layer_of.values()]))

    def _multiplied(self, node: Node, below: Sequence[Node], pure: Mapping[Node, int | None]) -> int | None:
        """The id of a matrix that a node outside all calls multiplies data by."""
        if not isinstance(node, BackwardCFunction) and not _MULTIPLIES.match(node.name()):
            return None
        weights = [w for w in (pure[child] for child in below) if w and self._layer_of[w] not in self._by_call]
        return weights[0] if weights else None


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _set_bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
