"""Layer after layer, the weights that are kept solve least squares for the dense layer's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.calibration.batches import first_samples
from lightning_cap.calibration.checks import check_collector, check_samples
from lightning_cap.calibration.layer_inputs import inputs_known, run_forward
from lightning_cap.calibration.rows import Loss
from lightning_cap.errors import TargetError
from lightning_cap.healing.base import Heal, HealReport, biases_of, check_weights, count_samples
from lightning_cap.healing.layer import Fit, HealedLayer
from lightning_cap.healing.lockstep import Lockstep, in_paused_call, pause
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_real
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.memory import release_memory
from lightning_cap.utilities.progress import Progress


@dataclass(kw_only=True)
class LayerwiseHeal(Heal):
    """Kept weights and the bias of each layer are fitted to what the dense layer makes of the pruned model's own inputs.

    A row ``w`` with support ``S`` becomes ``argmin (w - d)ᵀ G (w - d) + ridge·m·‖w - p‖²`` over ``S``: ``d`` is the dense row,
    ``p`` the pruned one, ``G`` the second moment of the layer's inputs, with a 1 for the bias, and ``m`` its mean diagonal over the
    inputs. No labels are needed and no gradients. Layers are healed in the order in which the model calls them, each on the inputs
    that the healed ones before it give, all in a single pass over the samples: the forward passes of all batches run in turn,
    each in a thread of its own, and wait for each other at every layer, until that is healed.

    So a model must not keep values of a forward pass in its modules until later in it. All batches must call the layers in the
    same order. A layer that is called several times in a pass is healed by its first call.

    Memory: while passes wait, each keeps its batch and what the rest of it needs (in a network without long skips the input of
    the layer, in a transformer that and the residual stream; 0.6 MB per sample in a ViT-Tiny, 310 MB for 512), beside the peak of
    one forward pass. ``G`` takes ``12·I²`` bytes for the layer with the longest rows of ``I`` inputs, and solving about
    ``16·I²`` more. With several processes each keeps its own batches only.

    Args:
        num_inputs: Samples that are read, over all processes.
        ridge: How much the pruned weights are held on to, in units of the mean square of the inputs.

    Raises:
        ConfigError: A number is out of range.
    """

    num_inputs: int = 512
    ridge: float = 0.5

    def __post_init__(self) -> None:
        check_samples(num_inputs=self.num_inputs)
        require_real("ridge", self.ridge, "(0, inf)", 0.5)

    @distributed.fail_together("Healing")
    def run(
        self,
        model: nn.Module,
        targets: Targets,
        masks: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        batches: Iterable[Any],
        loss: Loss,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
    ) -> HealReport:
        """See `Heal`.

        Raises:
            ConfigError: An argument is something else.
            TargetError: Batches call the layers in different orders.
            GradientError: There is no batch, or inputs of a layer are not finite.
        """
        check_collector(model, targets, loss, batches, context, progress)
        work = _Work(_layers(model, targets, masks, dense), self.ridge, progress)
        with (
            rng.preserved(),
            torch.inference_mode(False),
            context(),  # what it sets for the whole process, the threads leave in any order, but this one last
            work.hooked(),
            Lockstep(targets.device) as passes,
        ):
            samples = self._start(passes, lambda batch: run_forward(model, loss, batch, context), batches)
            while (name := _next(passes)) is not None:
                work.fit(name)
                with distributed.raise_on_all_ranks("Healing"):
                    passes.advance()
        release_memory(targets.device)
        return work.report(samples, targets)

    def _start(self, passes: Lockstep, forward: Callable[[Any], None], batches: Iterable[Any]) -> int:
        """Run a forward pass of every batch to its first layer. Returns their samples, over all processes."""
        own = reached = 0
        with distributed.raise_on_all_ranks("The forward passes for healing"):
            for batch, size, done in first_samples(batches, self.num_inputs):
                passes.start(lambda batch=batch: forward(batch))  # type: ignore[misc]
                own, reached = own + size, done
        return count_samples(own, reached, self.num_inputs)


def _next(passes: Lockstep) -> str | None:
    """The target whose layer all forward passes, of all processes, wait at; None at their end. Every process must call it.

    Raises:
        TargetError: Not all wait at the same.
    """
    waiting = set().union(*distributed.gather_objects(set(passes.waiting)))
    if len(waiting) > 1:
        first, second = sorted("its end" if name is None else repr(name) for name in waiting)[:2]
        raise TargetError(
            f"targets: one batch calls the layer of {first} next where another has {second}, so the layers cannot be healed one "
            "after the other. Leave those that not every batch calls, or not in this order, out with exclude=[...]."
        )
    name: str | None = waiting.pop()
    return name


class _Work:
    """The layers that are healed, and what became of them."""

    def __init__(self, layers: dict[str, HealedLayer], ridge: float, progress: Progress | None) -> None:
        self._layers, self._ridge, self._progress = layers, ridge, progress
        self._fits: dict[str, Fit | None] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, a forward pass in a `Lockstep` waits where it first calls a layer, whose inputs are taken in."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.module.register_forward_pre_hook(self._hook(name), with_kwargs=True).remove)
            yield

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def take(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name not in self._fits:  # else it is not the first call
                if not in_paused_call():
                    raise TargetError(
                        f"targets: the layer of {name!r} is called in a thread that the model has started, as DataParallel does, "
                        "where it cannot wait to be healed. Give the plain model."
                    )
                self._layers[name].add(args[0] if args else named["input"])
                pause(name)

        return take

    def fit(self, name: str) -> None:
        """Heal a layer. Every process must call it."""
        self._fits[name] = self._layers[name].fit(self._ridge)
        torch.clear_autocast_cache()  # holds the weight as it was in another dtype
        if self._progress is not None:
            self._progress("heal", len(self._fits), len(self._layers))

    def report(self, samples: int, targets: Targets) -> HealReport:
        """What was done, of all targets."""
        fits = {name: fit for name, fit in self._fits.items() if fit is not None}
        left = {}
        for name in targets:
            if name not in self._layers:
                left[name] = "no plain Linear, Conv1d or Conv2d layer"
            elif name not in self._fits:
                left[name] = "its layer is not called in the forward pass"
            elif name not in fits:
                left[name] = "its inputs are all zero"
        n = len(fits) or 1
        stats = {
            "output_error_before": sum(fit.before for fit in fits.values()) / n,
            "output_error_after": sum(fit.after for fit in fits.values()) / n,
            "ridge_raised": float(sum(fit.raised for fit in fits.values())),
            "rows_left": float(sum(fit.left for fit in fits.values())),
        }
        return HealReport(samples=samples, passes=samples, healed=tuple(fits), left=left, stats=stats)


def _layers(
    model: nn.Module, targets: Targets, masks: Mapping[str, Tensor], dense: Mapping[str, Tensor]
) -> dict[str, HealedLayer]:
    """Those whose inputs are known, by the names of their targets."""
    check_weights(targets, masks, dense, biases_of(model, targets))
    layers = {}
    for name, path in targets.paths.items():
        owner = path.rpartition(".")[0]
        module = model.get_submodule(owner)
        if inputs_known(module, path):
            bias = dense.get(plain_name(f"{owner}.bias" if owner else "bias"))
            layers[name] = HealedLayer(name, module, masks[name], dense[name], bias)
    return layers
