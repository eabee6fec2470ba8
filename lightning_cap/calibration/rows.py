"""Gradient rows of one batch: one after another by autograd, or all at once by `torch.func.vmap`.

Only `torch.autograd.grad` (or `torch.func.grad`) is used, never ``.backward()``: ``.grad``, DDP's buckets and
accumulated state are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_cap.calibration.batches import batch_size, flatten_batch, is_batched, slice_batch
from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.calibration.vmap_rules import vmap_friendly
from lightning_cap.errors import GradientError
from lightning_cap.sparsity.targets import Targets

#: ``loss(model, batch)`` -> scalar mean loss over the batch.
Loss = Callable[[nn.Module, Any], Tensor]


class RowComputer:
    """Computes gradient rows ``{target: (n, *shape)}``, float32.

    Args:
        model: In eval mode.
        targets: Weights to differentiate by.
        loss: Mean loss of a batch.
        samples_per_gradient: Inputs of one row.
        context: Entered around every loss evaluation.
        scale: Factor on the loss before and off the gradient after.

    Attributes:
        way: How rows are computed at once, for messages.
    """

    way: ClassVar[str] = "torch.func.vmap"

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        samples_per_gradient: int,
        context: Callable[[], AbstractContextManager[Any]],
        scale: float,
    ) -> None:
        self._program = _LossProgram(model, loss)
        self._targets, self._samples, self._context, self._scale = targets, samples_per_gradient, context, scale

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of what a row has."""
        return self._targets.shapes

    @property
    def tolerance(self) -> float:
        """Relative difference of one gradient computed in two ways that rounding explains; a wrong gradient is beyond it."""
        device = self._targets.device.type
        with self._context():
            coarse = torch.is_autocast_enabled(device) or any(w.dtype.itemsize < 4 for w in self._targets.values())
        return 0.5 if coarse else 0.1

    def split(self, batch: Any, most: int) -> Iterator[Any]:
        """The batches of single rows, ``most`` of them at the most."""
        size = batch_size(batch, default=0)
        if size <= self._samples:
            yield batch
            return
        for start in range(0, min(size // self._samples, most)):
            yield slice_batch(batch, size, start * self._samples, (start + 1) * self._samples)

    def one(self, batch: Any) -> dict[str, Tensor]:
        """The row of all samples of a batch together.

        Raises:
            GradientError: The loss is not a scalar, has no gradient, or does not depend on any target.
        """
        with torch.inference_mode(False), torch.enable_grad(), self._context(), PlainNormalization():
            loss = check_loss(self._program(batch))
            grads = torch.autograd.grad(loss.reshape(()) * self._scale, list(self._targets.values()), allow_unused=True)
        refuse_independent_loss(grads, len(self._targets))
        return {
            name: self.unscaled(torch.zeros_like(weight) if g is None else g).unsqueeze(0)
            for (name, weight), g in zip(self._targets.items(), grads, strict=True)
        }

    def at_once(self, batch: Any) -> dict[str, Tensor]:
        """A row for each sample of a batch, by vmap."""
        leaves, rebuild = flatten_batch(batch)
        size = batch_size(batch)
        dims = [0 if is_batched(leaf, size) else None for leaf in leaves]
        tensors = [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim == 0]
        names = list(self._targets)
        paths = [f"model.{self._targets.paths[name]}" for name in names]

        def loss(weights: Sequence[Tensor], sample: Sequence[Tensor]) -> Tensor:
            inputs = iter(sample)
            one = [next(inputs).unsqueeze(0) if dim == 0 else leaf for leaf, dim in zip(leaves, dims, strict=True)]
            value = functional_call(self._program, dict(zip(paths, weights, strict=True)), (rebuild(one),))
            return value.reshape(()) * self._scale  # type: ignore[no-any-return]

        with torch.inference_mode(False), torch.enable_grad(), self._context(), vmap_friendly():
            weights = [weight.detach() for weight in self._targets.values()]
            rows = vmap(grad(loss), in_dims=(None, 0), randomness="different")(weights, tensors)
        return {name: self.unscaled(row) for name, row in zip(names, rows, strict=True)}

    def unscaled(self, rows: Tensor) -> Tensor:
        """Float32 gradients, detached, with the factor on the loss taken off, in place where that is possible."""
        rows = rows.detach().float()
        return rows if self._scale == 1 else rows.div_(self._scale)


class _LossProgram(nn.Module):
    """Makes ``loss(model, batch)`` a module's forward, so that `functional_call` can swap the weights."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def check_loss(loss: Any) -> Tensor:
    """The loss of a batch, if gradients can be taken of it.

    Raises:
        GradientError: It is not a scalar, or has no gradient.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise GradientError(
            f"loss: got {_describe(loss)} instead of a scalar tensor. Return the mean loss of the batch, or define "
            "calibration_step(batch, batch_idx) that does."
        )
    if not loss.requires_grad:
        raise GradientError(
            "loss: it has no gradient (requires_grad is False). Do not detach it or compute it under no_grad; or "
            "define calibration_step(batch, batch_idx) that returns a differentiable loss."
        )
    return loss


def refuse_independent_loss(grads: Sequence[Tensor | None], num_targets: int) -> None:
    """Refuse a loss that has a gradient by no target.

    Raises:
        GradientError: All of ``grads`` are None.
    """
    if all(g is None for g in grads):
        raise GradientError(f"loss: it depends on none of the {num_targets} targets, so nothing can be pruned by it.")


def largest_difference(rows: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> tuple[float, str]:
    """How far two gradients are apart in the target where that is the most, and its name.

    In units of the target's own norm and a thousandth of that of all targets together, below which all is noise.
    """
    norms = {name: float(torch.linalg.vector_norm(other)) for name, other in others.items()}
    floor = 1e-3 * math.hypot(*norms.values())
    apart = {n: float(torch.linalg.vector_norm(row - others[n])) / (norms[n] + floor or 1.0) for n, row in rows.items()}
    name = max(apart, key=lambda n: math.inf if math.isnan(apart[n]) else apart[n])
    return apart[name], name


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value)) or 'nothing'}, without their sum as 'loss',"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
