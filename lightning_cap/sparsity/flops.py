"""FLOPs of a model and of each of its layers: dense, and effective, where zeros are skipped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.sparsity.layers import computed_weights, prunable_layers
from lightning_cap.utilities import rng
from lightning_cap.utilities.arguments import require_callable, require_instance, require_real, require_whole, shown
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.flops import flop_counter


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model on one example, 2 for each multiply-add; see `model_flops`.

    Attributes:
        layers: Of each parameter, the dense FLOPs of the products and convolutions that it is a weight of; 0 of all others, such
            as biases. Names are those of `Targets`; a weight that is computed from other parameters has that of the weight.
        total: Of the whole model, with what has no weights, such as the products inside attention.
    """

    layers: Mapping[str, int]
    total: int

    def effective_layers(self, sparsities: Mapping[str, float]) -> dict[str, float]:
        """FLOPs of each parameter's layer when zeros are skipped.

        Args:
            sparsities: Shares of zeros, by names of parameters; others are dense. See `zero_shares`.

        Raises:
            ConfigError: A name is of no parameter, or a share is not in [0, 1].
        """
        require_instance("sparsities", sparsities, Mapping, '{"fc.weight": 0.5}')
        for name, share in sparsities.items():
            if name not in self.layers:
                raise ConfigError(f"sparsities={shown(sparsities)}: {shown(name)} is no parameter of the model.")
            require_real(f"sparsities[{name!r}]", share, "[0, 1]", example=0.5)
        return {name: flops * (1 - sparsities.get(name, 0.0)) for name, flops in self.layers.items()}

    def effective(self, sparsities: Mapping[str, float]) -> float:
        """FLOPs of the model when zeros are skipped. Arguments and errors: see `effective_layers`."""
        skipped = math.fsum(self.layers.values()) - math.fsum(self.effective_layers(sparsities).values())
        return self.total - skipped

    def saved(self, sparsities: Mapping[str, float]) -> float:
        """Share of ``total`` that zeros save. Arguments and errors: see `effective_layers`."""
        return 1 - self.effective(sparsities) / self.total


def zero_shares(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of zeros in each weight, such as of `Targets`.

    Args:
        weights: By name, each of any shape ``(*shape)``.

    Raises:
        ConfigError: They are something else.
    """
    require_instance("weights", weights, Mapping, "targets")
    for name, weight in weights.items():
        require_instance(f"weights[{name!r}]", weight, Tensor, "model.fc.weight")
    return {name: 1 - int(w.count_nonzero()) / max(1, w.numel()) for name, w in weights.items()}


def model_flops(model: nn.Module, run: Callable[[], Any], examples: int = 1) -> ModelFlops:
    """Count the FLOPs of a forward pass with `torch.utils.flop_counter`, and whose weights they are of.

    What a product or convolution computes is its weight's, wherever in the model it is called and however often. Zeros count as
    other numbers do. The model is left as it was: it runs in eval mode, without gradients, and not compiled.

    Args:
        model: Whose parameters are looked for.
        run: Does one forward pass, such as ``lambda: model(inputs)``.
        examples: In that pass. With one the count is exact; of several, what is computed once for all of them is shared out.

    Raises:
        ConfigError: The forward pass fails or has nothing to count, or the model has no values yet.
    """
    require_instance("model", model, nn.Module, "a torch model")
    require_callable("run", run, "lambda: model(inputs)", num_arguments=0)
    require_whole("examples", examples)
    named = f"model={type(model).__name__}"
    for path, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter) or parameter.is_meta:
            raise ConfigError(
                f"{named}: {plain_name(path)!r} has no values yet. Run the model once on real inputs before."
            )
    ledger = _Ledger(model)
    with _undisturbed(model), ledger.hooks(), flop_counter() as counter:
        for operation, formula in counter.flop_registry.items():
            counter.flop_registry[operation] = ledger.keeping(formula)
        try:
            run()
        except CAPError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{named}: it does not run on the example input; {ledger.place()} failed ({type(error).__name__}: "
                f"{shown(str(error))}). Give a batch as the model takes it."
            ) from error
    total = int(counter.get_total_flops()) // examples
    if not total:
        raise ConfigError(f"{named}: its forward pass has no product or convolution to count. Let run() run the model.")
    return ModelFlops({name: count // examples for name, count in ledger.counts.items()}, total)


class _Ledger:
    """Whose weights FLOPs are of."""

    def __init__(self, model: nn.Module) -> None:
        layers = prunable_layers(model)
        self._single: dict[nn.Module, str] = {}  # layers of one weight, by which a cast or computed one is known
        for name in (*layers, *computed_weights(model)):
            path, _, attribute = name.rpartition(".")
            layer = layers.get(name)
            if attribute == "weight":
                layer = layer if layer is not None else _submodule(model, path)
                self._single.setdefault(layer, name)
        parameters = {plain_name(path): p for path, p in model.named_parameters(remove_duplicate=False)}
        self._in_storage: dict[int, list[tuple[range, str]]] = {}
        for name in sorted((n for n, p in parameters.items() if p.dim() > 1), key=lambda name: name not in layers):
            parameter = parameters[name]
            owners = self._in_storage.setdefault(parameter.untyped_storage().data_ptr(), [])
            owners.append((_extent(parameter), name))
        self._prunable = frozenset(layers)
        self._inside: list[nn.Module] = []
        self.counts = dict.fromkeys([*parameters, *(n for n in self._single.values() if n not in parameters)], 0)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Knows inside which layer the forward pass is."""

        def enter(layer: nn.Module, *_: Any) -> None:
            self._inside.append(layer)

        def leave(layer: nn.Module, *_: Any) -> None:
            self._inside.pop()

        handles = [layer.register_forward_pre_hook(enter) for layer in self._single]
        handles += [layer.register_forward_hook(leave) for layer in self._single]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def place(self) -> str:
        """The layer that the forward pass is inside."""
        return repr(self._single[self._inside[-1]].removesuffix(".weight")) if self._inside else "its own forward"

    def keeping(self, formula: Callable[..., int]) -> Callable[..., int]:
        """``formula``, whose results are kept by the weight that is among the operands."""

        def count(*args: Any, **kwargs: Any) -> int:
            flops = formula(*args, **kwargs)
            name = self._owner(args)
            if name is not None:
                self.counts[name] += flops
            return flops

        return count

    def _owner(self, operands: tuple[Any, ...]) -> str | None:
        found = [name for t in operands if isinstance(t, Tensor) and t.dim() > 1 and (name := self._named(t))]
        for name in found:
            if name in self._prunable:
                return name
        if found:
            return found[-1]
        return self._single[self._inside[-1]] if self._inside else None

    def _named(self, operand: Tensor) -> str | None:
        """The parameter that a tensor is, or is a part or another view of."""
        owners = self._in_storage.get(operand.untyped_storage().data_ptr(), ())
        return next((name for extent, name in owners if operand.data_ptr() in extent), None)


def _extent(tensor: Tensor) -> range:
    """Addresses of a tensor."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return range(start, start + (reach + 1) * tensor.element_size())


def _submodule(model: nn.Module, plain_path: str) -> nn.Module:
    modules: dict[str, nn.Module] = {plain_name(path): m for path, m in model.named_modules(remove_duplicate=False)}
    return modules[plain_path]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, nothing fused beyond counting; afterwards all is as it was."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it is one operation that no counter knows
        with rng.preserved(), torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
