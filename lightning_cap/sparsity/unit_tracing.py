"""Finds the units of a model: traces a copy of it, groups what goes together, and tests that the groups are right."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.errors import ConfigError, TargetError, UnsupportedError
from lightning_cap.sparsity.unit_check import UnitCheck
from lightning_cap.sparsity.unit_costs import own_flops, unit_layers
from lightning_cap.sparsity.unit_graph import channel_graph, load_dependency_graph
from lightning_cap.sparsity.unit_group import Layer, UnitGroup
from lightning_cap.sparsity.unit_groups import Candidates, GroupBuilder
from lightning_cap.sparsity.unit_heads import attentions
from lightning_cap.sparsity.unit_layers import makes_channels, width_of
from lightning_cap.utilities.arguments import require_instance, require_names, shown
from lightning_cap.utilities.compiled import plain_module, plain_name
from lightning_cap.utilities.rng import preserved

_EXAMPLES = 2  # that are traced, of those given
_EXAMPLE = "torch.randn(1, 3, 224, 224)"


@dataclass(frozen=True)
class Traced:
    """What is known of a model's units.

    Attributes:
        groups: That can be pruned and were chosen, in the order of the forward pass.
        layers: Whose cost depends on them.
        flops: Of the model on one example.
        skipped: ``{layer: why its width is not pruned}``.
    """

    groups: list[UnitGroup]
    layers: list[Layer]
    flops: int
    skipped: dict[str, str]


def trace_units(
    model: nn.Module, example_input: Any, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> Traced:
    """See `Units.from_model`."""
    require_instance("model", model, nn.Module, "timm.create_model('resnet18')", error=TargetError)
    require_names("include", include, "blocks.*.mlp", error=TargetError)
    require_names("exclude", exclude, "blocks.*.attn", error=TargetError)
    _refuse_untraceable(model)
    load_dependency_graph()
    args, kwargs = _example(example_input)
    with preserved(), torch.inference_mode(False), torch.enable_grad(), _no_autocast(model):
        replica = _Replica(model, args, kwargs)
        calls = replica.rehearse()
        heads = attentions(replica.model)
        tables = [replica.parameter(name) for attention in heads for name in attention.tables]
        graph = channel_graph(replica.model, replica.run, tables, width_of)
        found = GroupBuilder(replica.model, graph, heads, calls.order, replica.fixed(model, calls)).build()
        chosen = _choose(found, include, exclude)
        wrong = {group.name for group in replica.check().wrong([found.groups[name] for name in chosen])}
    groups = [found.groups[name] for name in chosen if name not in wrong]
    skipped = _skipped(found, {group.name for group in groups}, wrong) | replica.untraced(found)
    return Traced(groups, unit_layers(replica.model, calls.flops, groups, found.cores), calls.total, skipped)


def check_of(model: nn.Module, example_input: Any) -> UnitCheck:
    """Tests groups of units of a model that can be traced, on a copy."""
    args, kwargs = _example(example_input)
    return _Replica(model, args, kwargs).check()


def _skipped(found: Candidates, used: Collection[str], wrong: Collection[str]) -> dict[str, str]:
    """``{layer: why its width is not pruned}``."""
    skipped = dict(found.skipped)
    in_use = {layer for name in used for layer in found.makers[name]}
    for name in found.groups.keys() - used:
        reason = "not chosen"
        if name in wrong:
            reason = "its units cannot go one by one"
        elif name in found.normalized:
            reason = f"normalized over its channels; include {name!r} to prune it"
        skipped |= {layer: reason for layer in found.makers[name] if layer not in in_use}
    return skipped


def _refuse_untraceable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError(
            "model: it is scripted by TorchScript, so it cannot be traced. Give the module that was scripted."
        )
    for path, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise TargetError(f"{plain_name(path)!r} is not initialised yet. Run one forward pass before pruning.")
        if parameter.is_meta:
            raise TargetError(
                f"{plain_name(path)!r} has no values (device meta). Load the model before its units are found."
            )


def _example(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of the forward pass, with few examples."""
    require_instance(
        "example_input",
        example_input,
        (Tensor, tuple, list, Mapping),
        f"{_EXAMPLE}, or the arguments in a tuple or dict",
    )
    tensors = [t for t in pytree.tree_leaves(example_input) if isinstance(t, Tensor)]
    if not tensors or not tensors[0].dim() or not len(tensors[0]):
        raise ConfigError(
            f"example_input={shown(example_input)}: there is no tensor with a batch in it. Give a batch as the model takes "
            f"it, such as {_EXAMPLE}."
        )
    batch = len(tensors[0])
    few = pytree.tree_map(
        lambda t: t.detach()[:_EXAMPLES] if isinstance(t, Tensor) and t.dim() and len(t) == batch else t, example_input
    )
    if isinstance(few, Mapping):
        return (), dict(few)
    return (few,) if isinstance(few, Tensor) else tuple(few), {}


@contextmanager
def _no_autocast(model: nn.Module) -> Iterator[None]:
    device = next((p.device.type for p in model.parameters()), "cpu")
    with torch.autocast(device, enabled=False):
        yield


@dataclass
class Calls:
    """What one forward pass calls.

    Attributes:
        order: Names of modules as they are first called.
        count: Module -> its calls.
        flops: Module -> FLOPs of its own on one example, those of modules inside left out.
        total: FLOPs of the model on one example.
    """

    order: list[str] = field(default_factory=list)
    count: Counter[str] = field(default_factory=Counter)
    flops: dict[str, int] = field(default_factory=dict)
    total: int = 0


class _Replica:
    """A copy of the model in evaluation mode, all of whose parameters require a gradient, and the example."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self.model: nn.Module = copy.deepcopy(plain_module(model)).eval()
        except Exception as error:
            raise UnsupportedError(
                f"model={type(model).__name__}: its units are found on a copy, but it cannot be copied ({type(error).__name__}: "
                f"{shown(str(error))}). Make copy.deepcopy(model) work."
            ) from error
        for module in list(self.model.modules()):
            module._modules.update({name: plain_module(child) for name, child in module._modules.items()})
        for parameter in self.model.parameters():
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._args, self._kwargs = pytree.tree_map(
            lambda t: t.to(device) if isinstance(t, Tensor) else t, (args, kwargs)
        )
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        self._examples = len(leaves[0])

    def run(self) -> Any:
        """Forward."""
        return self.model(*self._args, **self._kwargs)

    def parameter(self, name: str) -> nn.Parameter:
        """By name."""
        return self.model.get_parameter(name)

    def rehearse(self) -> Calls:
        """A forward pass that counts.

        Raises:
            UnsupportedError: It fails, or its output does not depend on the parameters; the layer is named.
        """
        calls, inside, last = Calls(), [], [""]

        def enter(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                inside.append(path)
                calls.count[path] += 1
                if calls.count[path] == 1:
                    calls.order.append(path)

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            path = inside.pop()
            if any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(output)):
                last[0] = path

        hooks = [m.register_forward_pre_hook(enter(path)) for path, m in self.model.named_modules()]
        hooks += [m.register_forward_hook(leave) for m in self.model.modules()]
        try:
            output = self.run()
            while hooks:
                hooks.pop().remove()
            calls.flops, calls.total = self._count()
        except Exception as error:
            where = repr(inside[-1]) if inside and inside[-1] else "its own forward"
            raise UnsupportedError(
                f"model={type(self.model).__name__}: the forward pass on example_input failed in {where} ({type(error).__name__}: "
                f"{shown(str(error))}). Give a batch as the model takes it."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if not any(t.requires_grad for t in _outputs(output)):
            raise UnsupportedError(
                f"model={type(self.model).__name__}: what it returns has no gradient, so its layers cannot be traced; the last "
                f"with a gradient is {repr(last[0]) if last[0] else 'none'}. Return tensors that are not detached."
            )
        if not all(t.numel() and bool(t.isfinite().all()) for t in _outputs(output)):
            raise ConfigError(
                f"example_input={shown(self._args or self._kwargs)}: what the model returns for it is empty or not finite, so "
                "units cannot be tested. Give real examples, and a model with finite weights."
            )
        return calls

    def _count(self) -> tuple[dict[str, int], int]:
        """FLOPs on the first example alone: what does not depend on the batch counts once, as when one image is classified."""
        args, kwargs = pytree.tree_map(
            lambda t: t[:1] if isinstance(t, Tensor) and t.dim() and len(t) == self._examples else t,
            (self._args, self._kwargs),
        )
        with torch.no_grad():
            _, own, total = own_flops(self.model, lambda: self.model(*args, **kwargs))
        return own, total

    def fixed(self, model: nn.Module, calls: Calls) -> dict[int, str]:
        """``{id of a parameter or module of the copy: why it cannot be cut}``."""
        frozen = {plain_name(path) for path, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        names: dict[int, list[str]] = {}
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(path)
        reasons = {key: "tied" for key, paths in names.items() if len(paths) > 1}
        reasons |= {key: "frozen" for key, paths in names.items() if frozen.intersection(paths)}
        used = {id(m): "used twice" for path, m in self.model.named_modules() if calls.count[path] > 1}
        return reasons | used

    def untraced(self, found: Candidates) -> dict[str, str]:
        """``{layer: why}`` of those that the graph has no outputs of."""
        known = {*found.skipped, *(layer for layers in found.makers.values() for layer in layers)}
        reasons: dict[str, str] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                reasons[path] = "nn.MultiheadAttention takes the size of its heads from its input"
            elif path not in known and makes_channels(module) and path.rpartition(".")[0] not in reasons:
                reasons[path] = "its output is not traced"
        return reasons

    def check(self) -> UnitCheck:
        """Tests groups; the copy is in float64 from then on, where its device can."""
        before = copy.deepcopy(self.model) if self._device_type() == "mps" else None
        if before is None:
            self.model.double()
            self._args, self._kwargs = pytree.tree_map(_doubled, (self._args, self._kwargs))
        return UnitCheck(self.model, lambda: _outputs(self.run()))

    def _device_type(self) -> str:
        return next((p.device.type for p in self.model.parameters()), "cpu")


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _outputs(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _choose(found: Candidates, include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    """Names of groups: all that are not normalized over their channels, or those named."""
    named = {name for glob in include or () for name in _match("include", glob, found)}
    excluded = {name for glob in exclude or () for name in _match("exclude", glob, found)}
    if include is not None and not include:
        raise TargetError("include=[] selects nothing. Leave include out for all groups of units.")
    return [
        name
        for name in found.groups
        if (name in named if include is not None else name not in found.normalized) and name not in excluded
    ]


def _match(argument: str, glob: str, found: Candidates) -> list[str]:
    names = [name for name in found.groups if fnmatch.fnmatchcase(name, glob)]
    if names:
        return names
    for name, reason in found.skipped.items():
        if fnmatch.fnmatchcase(name, glob):
            raise TargetError(
                f"{argument}: {glob!r} matches no group of units; {name!r} has none that can be pruned: {reason}."
            )
    near = difflib.get_close_matches(glob, list(found.groups), n=3, cutoff=0.0)
    raise TargetError(
        f"{argument}: {glob!r} matches no group of units. Near names: {', '.join(map(repr, near)) or 'none'}."
    )
