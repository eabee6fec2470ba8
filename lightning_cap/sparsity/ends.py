"""Which layers are first and last in a model, read off the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_cap.errors import TargetError
from lightning_cap.sparsity.layer_graph import Flow, layer_names, trace
from lightning_cap.sparsity.layers import prunable_layers, registered_ends
from lightning_cap.utilities.arguments import require_instance, require_names, shown


@dataclass(frozen=True)
class Ends:
    """Weights that are left dense by default for their place in the model. Names are those of `Targets`.

    Args:
        first: Of the layers that no other layer with weights, such as an embedding, comes before.
        last: Of the layers that no other comes after on the way to the outputs: the heads.
        unreached: Of the layers that the loss has no gradient for: not run, run under ``no_grad``, or detached.
        by_order: Why first and last were taken by the order of registration; empty if the forward pass told them.

    Raises:
        TargetError: An argument is no list of names, or ``by_order`` no string.
    """

    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    by_order: str = ""

    def __post_init__(self) -> None:
        for name in ("first", "last", "unreached"):
            value = getattr(self, name)
            require_instance(name, value, (tuple, list), '("head.weight",)', error=TargetError)
            require_names(name, value, "head.weight", error=TargetError)
            object.__setattr__(self, name, tuple(value))
        require_instance("by_order", self.by_order, str, '""', error=TargetError)

    def to_state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Ends:
        """What `to_state` gave."""
        return cls(state["first"], state["last"], state["unreached"], state["by_order"])

    @classmethod
    def registered(cls, model: nn.Module, why: str) -> Ends:
        """First and last layer by order of registration, or as the ``pretrained_cfg`` of a timm model names them."""
        first, last = registered_ends(model)
        return cls(tuple(first), tuple(last), by_order=why)


#: Stands for ends that are to be found: everything that may turn out to be a target is one until then.
PENDING = Ends(by_order="not known yet")


def find_ends(model: nn.Module, loss: Callable[[], Any]) -> Ends:
    """Run the forward pass once, and read off its autograd graph which layers are first and last.

    A layer is last if it is met on the way back from the loss and its output reaches no other layer: in a residual stream
    the last of all, with two heads both. It is first if no other layer is met on the way back from its input. Layers are Linear,
    convolution, attention, recurrent and embedding layers, and any module without submodules that has a matrix; not norms.
    Frozen and excluded layers count: with the head excluded, the layer before it is no head. But a module of several layers that
    is frozen as a whole, as that of a perceptual loss, is no part of the model: what feeds it is a head.

    Args:
        model: Any module; only generators and buffers that its forward pass changes are changed. No ``.grad`` is written.
        loss: Does the forward pass, such as ``lambda: loss_fn(model, batch)``; returns the loss, or outputs in any structure.

    Raises:
        TargetError: Nothing that ``loss`` returns has a gradient.
    """
    require_instance("model", model, nn.Module, "a torch model", error=TargetError)
    if not callable(loss):
        raise TargetError(f"loss={shown(loss)}: give a function without arguments, such as lambda: model(x).sum().")
    return ends_of(model, [trace(model, loss)])


def ends_of(model: nn.Module, flows: Iterable[Flow]) -> Ends:
    """Decide by all forward passes together, such as one of each process: so all decide the same."""
    before: dict[str, set[str]] = {}
    reached: set[str] = set()
    for flow in flows:
        reached |= flow.reached
        for name, others in flow.before.items():
            before.setdefault(name, set()).update(others - {name})
    names = layer_names(model)
    outside = _frozen_together(model, names)
    followed = {other for others in before.values() for other in others}
    followed_inside = {other for name, others in before.items() if name not in outside for other in others}
    first, last, unreached = [], [], []
    projects = {m.out_proj: name for m, name in names.items() if isinstance(m, nn.MultiheadAttention)}
    for weight, layer in prunable_layers(model).items():
        unit = projects.get(layer, names[layer])  # type: ignore[call-overload]
        takes_input, gives_output = layer not in projects, not isinstance(layer, nn.MultiheadAttention)
        if unit not in reached:
            unreached.append(weight)
        elif unit in before:
            first += [weight] if takes_input and not before[unit] else []
            others = followed if unit in outside else followed_inside
            last += [weight] if gives_output and unit not in others else []
    return Ends(tuple(first), tuple(last), tuple(unreached))


def _frozen_together(model: nn.Module, names: Mapping[nn.Module, str]) -> set[str]:
    """Layers of modules inside ``model`` that have several layers and are frozen as a whole."""
    found: set[str] = set()
    for module in model.modules():
        layers = [names[m] for m in module.modules() if m in names]
        if module is not model and len(layers) > 1 and not any(p.requires_grad for p in module.parameters()):
            found.update(layers)
    return found
