"""How relevance goes back through a model: the rules of zennit, in the form of gradients.

The relevance of a value ``a`` is ``a`` times what comes back to it, so what is between two layers with a rule, such as the sum of a
residual connection or a pooling, shares it out by what it adds up, without a rule of its own. zennit is imported here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from zennit.canonizers import NamedMergeBatchNorm
from zennit.core import BasicHook, Composite
from zennit.rules import Epsilon, NoMod, ZPlus

#: Which rule layers have: ε at Linear layers and α1β0 (z+) at convolutions; or one of them at both.
Rule = Literal["epsilon_plus", "alpha1_beta0", "epsilon"]

_CONVS: tuple[Any, ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_FORWARDS = {kind.forward for kind in (nn.Linear, *_CONVS)}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def relevance_rules(model: nn.Module, rule: Rule, epsilon: float, merged: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Gradients are those of relevance inside; the forward pass gives the same. Parameters are the same objects and bits after it.

    Args:
        model: In eval mode.
        rule: See `Rule`.
        epsilon: Of the ε rule.
        merged: Names of layers and of the batch norms that they are merged with.
    """

    def hook_of(_: Any, name: str, module: nn.Module) -> Any:
        if not _takes_rule(module):
            return None
        positive = rule == "alpha1_beta0" or (rule == "epsilon_plus" and isinstance(module, _CONVS))
        return _as_gradient(ZPlus() if positive else Epsilon(epsilon), module)

    composite = Composite(module_map=hook_of)
    with _unchanged(model), _merged(model, merged), PassedRelevance():
        try:
            composite.register(model)
            yield
        finally:
            composite.remove()


def _takes_rule(module: nn.Module) -> bool:
    """Whether it is a plain layer whose weights zennit can change while it computes what comes back."""
    plain = type(module).forward in _FORWARDS and module._parameters.get("weight") is not None
    return plain and not is_parametrized(module)


def _as_gradient(rule: Any, module: Any) -> Any:
    """A rule that takes and gives relevances as one that takes and gives them divided by the values that have them.

    It computes in the type of the weights, whatever autocast has made of the values.
    """
    kind: list[torch.dtype] = []

    def of_weights(modify: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def modified(values: Tensor) -> Tensor:
            kind[:] = [values.dtype]
            return modify(values.to(module.weight.dtype))

        return modified

    def divided(gradient: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        *parts, output = outputs
        shares = rule.gradient_mapper(gradient * output.detach(), parts)
        return [*([shares] if isinstance(shares, Tensor) else shares), torch.zeros_like(output)]

    def reduced(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        relevance, values = rule.reducer(inputs[:-1], gradients[:-1]), inputs[-1]
        return torch.where(values == 0, 0.0, relevance / values).to(kind[0])

    def itself(value: Tensor, name: str | None = None) -> Tensor:
        return value

    return BasicHook(
        [of_weights(modify) for modify in (*rule.input_modifiers, itself)],
        [*rule.param_modifiers, NoMod()],
        [*rule.output_modifiers, itself],
        divided,
        reduced,
    )


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """What rules and merging change is put back: parameters and buffers, their storage, and biases that there were not."""
    own = [(m, dict(m._parameters)) for m in model.modules() if m._parameters]
    data = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for module, parameters in own:
            module._parameters.clear()
            module._parameters.update(parameters)
        for tensor, values in data:
            tensor.data = values


def batch_norms_to_merge(model: nn.Module, forward: Callable[[], Tensor]) -> list[tuple[str, str]]:
    """Names of layers and of the batch norms that they can be merged with: those that take what a layer gives, and take it alone.

    Args:
        model: In eval mode.
        forward: Gives the model's outputs on a few samples.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}
    handles = []
    for name, module in model.named_modules():
        if _takes_rule(module):

            def leave(_: Any, args: Any, output: Tensor, name: str = name) -> None:
                made[id(output)] = name, output  # kept, so that no other one gets its id

            handles.append(module.register_forward_hook(leave))
        elif isinstance(module, _BATCH_NORMS) and module.affine and module.running_var is not None:

            def enter(_: Any, args: tuple[Any, ...], name: str = name) -> None:
                layer = made[id(args[0])][0] if args and id(args[0]) in made else None
                if layer is None or name in found:  # of another, or used twice
                    found[name] = ""
                else:
                    found[name] = layer

            handles.append(module.register_forward_pre_hook(enter))
    try:
        wanted = forward()
    finally:
        for handle in handles:
            handle.remove()
    layers = list(found.values())
    pairs = [(layer, norm) for norm, layer in found.items() if layer and layers.count(layer) == 1]
    if not pairs or _gives_the_same(model, forward, wanted, pairs):
        return pairs
    return [pair for pair in pairs if _gives_the_same(model, forward, wanted, [pair])]


def _gives_the_same(
    model: nn.Module, forward: Callable[[], Tensor], wanted: Tensor, pairs: Sequence[tuple[str, str]]
) -> bool:
    """Whether the model computes the same when they are merged, so that nothing else takes what these layers give."""
    with _unchanged(model), _merged(model, pairs):
        return bool((forward() - wanted).norm() <= 1e-2 * wanted.norm())


@contextmanager
def _merged(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Batch norms are merged with the layers before them, and give what they get."""
    norms: dict[str, Any] = {name: model.get_submodule(name) for _, name in pairs}
    eps = {name: norm.eps for name, norm in norms.items()}
    merge = NamedMergeBatchNorm([([layer], norm) for layer, norm in pairs])
    try:
        merge.apply(model)  # `_unchanged` takes it back, from whatever point
        for norm in norms.values():
            norm.eps = 0.0  # which zennit leaves
        yield
    finally:
        for name, norm in norms.items():
            norm.eps = eps[name]


class PassedRelevance(TorchFunctionMode):
    """Lets relevance through what has no rule, by what the forward pass gave, which is not changed.

    An activation gives on all that it gets. Attention and layer norms are linear, with the weights of the attention and the
    standard deviation as constants (Ali et al. 2022).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The function itself, or what stands for it."""
        named = dict(kwargs or {})
        if func in _ACTIVATIONS:
            return _activate(func, *args, **named)
        if func in _SOFTMAX:
            return func(*args, **named).detach()
        return _LINEAR.get(func, func)(*args, **named)


_ACTIVATIONS: set[Callable[..., Any]] = {
    F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.relu6, F.hardtanh, torch.tanh,
    Tensor.tanh,
}  # fmt: skip
_SOFTMAX: set[Callable[..., Any]] = {torch.softmax, F.softmax, Tensor.softmax}


def _activate(func: Callable[..., Any], input: Tensor, *args: Any, **named: Any) -> Tensor:
    if "inplace" in named:
        named["inplace"] = False
    values = input.detach()
    given = func(values, *args, **named)
    slope = torch.where(values == 0, 0.0, given / values)
    return given + (input - values) * slope  # type: ignore[no-any-return]


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Tensor:
    return F.scaled_dot_product_attention(query.detach(), key.detach(), value, *args, **named)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps).detach()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


_LINEAR: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attend,
    F.layer_norm: _layer_norm,
}
