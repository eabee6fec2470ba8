"""All parameters are moved by Adam until the pruned model's outputs are near those that the dense one gave."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.calibration.batches import first_samples, slice_batch
from lightning_cap.calibration.checks import check_collector, check_samples
from lightning_cap.calibration.outputs import ModelOutputs
from lightning_cap.calibration.rows import Loss
from lightning_cap.errors import GradientError, TargetError
from lightning_cap.healing.base import Heal, HealReport, check_weights, count_samples
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_choice, require_real
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.memory import release_memory
from lightning_cap.utilities.precision import full_float32
from lightning_cap.utilities.progress import Progress

#: How outputs are compared: by the Kullback-Leibler divergence of the classes' probabilities, or by their mean squared difference.
OutputLoss = Literal["kl", "mse"]

_WARM_UP = 0.1  # of the steps


@dataclass(kw_only=True)
class DistillHeal(Heal):
    """The pruned model learns to give the outputs of the dense one on calibration inputs. No labels are used.

    All parameters that are not frozen are moved by Adam (betas 0.9 and 0.99), biases and normalisation included; statistics of
    batch norm are not. The learning rate rises over the first tenth of the steps and falls to zero at the end. The outputs are
    those of the outermost module with such parameters that the loss calls last.

    Every process takes its share of each update from its own batches, so on another number of processes an update may be of other
    samples: then results differ by more than rounding. On the same number they are the same.

    Memory: the samples stay where they are given until the end, with the dense outputs. Of each parameter there are six copies in
    float32 (its gradient twice, both moments of Adam, itself, and the dense one), one more on several processes, beside a forward
    and backward pass of ``batch_size`` samples, or of a batch where that is less. The plan of an event does not count them.

    Args:
        num_inputs: Samples that are read, over all processes; again from the first when the steps take more.
        steps: Updates.
        batch_size: Samples of an update, over all processes.
        lr: Largest learning rate.
        temperature: What logits are divided by for ``"kl"``.
        loss: ``"kl"`` for logits ``(n, C)``; ``"mse"`` for outputs of any shape.

    Raises:
        ConfigError: An argument is out of range.
    """

    passes: ClassVar[str] = "forward and backward passes"

    num_inputs: int = 2048
    steps: int = 64
    batch_size: int = 32
    lr: float = 5e-5
    temperature: float = 1.0
    loss: OutputLoss = "kl"

    def __post_init__(self) -> None:
        check_samples(num_inputs=self.num_inputs)
        check_samples(steps=self.steps, batch_size=self.batch_size)
        require_real("lr", self.lr, "(0, inf)", 5e-5)
        require_real("temperature", self.temperature, "(0, inf)", 1.0)
        require_choice("loss", self.loss, get_args(OutputLoss))

    def parameters(self, model: nn.Module, targets: Targets) -> dict[str, nn.Parameter]:
        """All that are not frozen. See `Heal`."""
        named = super().parameters(model, targets) | {plain_name(name): p for name, p in model.named_parameters()}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

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
            TargetError: The loss calls no module, or what that gives are no such outputs.
            GradientError: There is no batch, or no gradient is finite.
        """
        check_collector(model, targets, loss, batches, context, progress)
        parameters = self.parameters(model, targets)
        check_weights(targets, masks, dense, parameters)
        forward = ModelOutputs(model, loss, context)
        update = _Update(parameters, masks, self.lr, self.steps)
        apart: list[float] = []
        with rng.preserved(), torch.inference_mode(False):
            with distributed.raise_on_all_ranks("The dense model's outputs"), _swapped(parameters, dense):
                samples = _Samples(forward, batches, self.num_inputs)
            total = count_samples(samples.own, samples.reached, self.num_inputs)
            for step in range(self.steps):
                with distributed.raise_on_all_ranks("Healing"):
                    gradients, told = self._gradients(forward, samples, list(parameters.values()))
                found = update.take(gradients, told)
                apart += [] if found is None else [found]
                if progress is not None:
                    progress("heal", step + 1, self.steps)
        release_memory(targets.device)
        if update.skipped == self.steps:
            raise GradientError(
                "gradients: none of the healing is finite. Check the model, the calibration data and the precision."
            )
        few = max(1, len(apart) // 10)
        stats = {
            "divergence_first": statistics.fmean(apart[:few]),
            "divergence_last": statistics.fmean(apart[-few:]),
            "steps_skipped": float(update.skipped),
        }
        passes = total + update.samples
        return HealReport(samples=total, passes=passes, healed=tuple(targets), stats=stats)

    def _gradients(
        self, forward: ModelOutputs, samples: _Samples, parameters: list[nn.Parameter]
    ) -> tuple[list[Tensor], Tensor]:
        """Float32 sums over this process's next samples; and of them their number and how far outputs are apart, ``(2,)``."""
        ranks, rank = distributed.world_size(), distributed.rank()
        share = self.batch_size // ranks + (rank < self.batch_size % ranks)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        told = torch.zeros(2, device=parameters[0].device)
        for batch, size, wanted in samples.take(share):
            with torch.enable_grad():
                apart = self._apart(forward(batch), wanted)
                found = torch.autograd.grad(apart, parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient
            told += torch.stack([torch.full_like(told[0], size), apart.detach().to(told)])
            del found, apart
        return sums, told

    def _apart(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Summed over samples."""
        wanted, outputs = wanted.to(outputs.device).float(), outputs.float()
        if self.loss == "mse":
            return (outputs - wanted).square().flatten(1).mean(1).sum()
        if outputs.dim() != 2:
            raise TargetError(
                f"loss='kl': the model's outputs have shape {tuple(outputs.shape)}, no logits (n, C). Give loss='mse'."
            )
        with full_float32():
            own, dense = (F.log_softmax(values / self.temperature, 1) for values in (outputs, wanted))
            return self.temperature**2 * F.kl_div(own, dense, log_target=True, reduction="sum")


class _Samples:
    """This process's samples with the dense model's outputs, to be gone through again and again.

    Args:
        forward: Of the dense model.
        batches: This process's batches.
        num_inputs: Samples over all processes.
    """

    def __init__(self, forward: ModelOutputs, batches: Iterable[Any], num_inputs: int) -> None:
        self._parts: list[tuple[Any, int, Tensor]] = []
        self._part = self._start = self.own = self.reached = 0
        for batch, size, done in first_samples(batches, num_inputs):
            with torch.no_grad():
                outputs = forward(batch)
            if len(outputs) != size:
                raise TargetError(
                    f"model: its outputs have shape {tuple(outputs.shape)} for a batch of {size} samples, so they cannot be told "
                    "apart. Let it give the samples in dim 0."
                )
            self._parts.append((batch, size, outputs))
            self.own, self.reached = self.own + size, done

    def take(self, count: int) -> Iterator[tuple[Any, int, Tensor]]:
        """The next ``count`` samples, in as many parts as batches they are from: batch, its samples, dense outputs."""
        while count and self._parts:
            batch, size, outputs = self._parts[self._part]
            start, stop = self._start, min(size, self._start + count)
            whole = stop - start == size
            yield batch if whole else slice_batch(batch, size, start, stop), stop - start, outputs[start:stop]
            count -= stop - start
            self._start = stop % size
            self._part = (self._part + (stop == size)) % len(self._parts)


@contextmanager
def _swapped(parameters: Mapping[str, nn.Parameter], dense: Mapping[str, Tensor]) -> Iterator[None]:
    """The dense model inside."""
    before = {name: p.detach().clone() for name, p in parameters.items() if name in dense}
    try:
        with torch.no_grad():
            for name in before:
                parameters[name].copy_(dense[name])
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


class _Update:
    """Steps of Adam in float32, the same on all processes.

    Args:
        parameters: What is moved.
        masks: ``{target: bool}``, False = pruned, which stays zero.
        lr: Largest learning rate.
        steps: How many there will be.

    Attributes:
        samples: Used so far, over all processes.
        skipped: Steps left out, as their gradient was not finite.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], lr: float, steps: int
    ) -> None:
        self._parameters = list(parameters.values())
        self._masks = [masks[name].to(p.device) if name in masks else None for name, p in parameters.items()]
        self._values = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._parameters]
        self._adam = torch.optim.Adam(self._values, lr=lr, betas=(0.9, 0.99))
        self._lr, self._steps, self._step = lr, steps, 0
        self.samples = self.skipped = 0

    @torch.no_grad()
    def take(self, gradients: list[Tensor], told: Tensor) -> float | None:
        """A step along the mean gradient. Every process must call it.

        Args:
            gradients: Sums over this process's samples; emptied.
            told: Their number, and how far outputs are apart in all.

        Returns:
            How far they are apart in the mean; None where the step was left out.
        """
        flat = distributed.sum_over_ranks(torch.cat([told, *(g.flatten().to(told) for g in gradients)]))
        gradients.clear()
        count, apart = float(flat[0]), float(flat[1])
        self.samples += int(count)
        finite = bool(torch.isfinite(flat).all())
        parts = flat[2:].div_(max(1.0, count)).split([value.numel() for value in self._values])
        for group in self._adam.param_groups:
            group["lr"] = (
                self._lr * min(1.0, (self._step + 1) / (_WARM_UP * self._steps)) * (1 - self._step / self._steps)
            )
        self._step += 1
        if not finite:
            self.skipped += 1
            return None
        for value, part, mask in zip(self._values, parts, self._masks, strict=True):
            value.grad = part.view_as(value).to(value)
            if mask is not None:
                value.grad.masked_fill_(~mask, 0.0)
        self._adam.step()
        for parameter, value, mask in zip(self._parameters, self._values, self._masks, strict=True):
            if mask is not None:
                value.masked_fill_(~mask, 0.0)
            parameter.copy_(value)
        torch.clear_autocast_cache()
        return apart / max(1.0, count)
