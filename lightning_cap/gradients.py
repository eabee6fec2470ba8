"""Gradient samples for the Fisher: batches -> chunks ``{target name: (n, *shape)}``.

Only `torch.autograd.grad` (or `torch.func.grad`) is used, never ``.backward()``: ``.grad``, DDP's buckets and
accumulated state are not touched.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from lightning_cap import distributed
from lightning_cap.errors import GradientError
from lightning_cap.hooks import Progress
from lightning_cap.targets import Targets
from lightning_cap.vmap_support import vmap_friendly

#: ``loss(model, batch)`` -> scalar mean loss over the batch.
Loss = Callable[[nn.Module, Any], Tensor]

_VMAP_FLOATS = 2**27  # per-sample gradients held at once, 512 MiB
_VMAP_ROWS = 64


class GradientCollector:
    """A re-iterable source of gradient rows.

    Args:
        model: Put into eval mode by the caller; its parameters are not changed.
        targets: Weights to differentiate by.
        loss: Mean loss of a batch.
        batches: This rank's batches, each a whole number of gradient samples; re-iterable to be read again. With
            several processes, batch ``j`` of rank ``r`` is batch ``j·R + r`` of all.
        num_gradients: Gradient samples ``N`` over all processes.
        samples_per_gradient: Inputs ``m`` in one gradient sample. With ``m = 1`` rows are computed by `torch.func.vmap`,
            and by a loop (with a warning) for models that vmap cannot take.
        context: Entered around every loss evaluation, e.g. autocast.
        scale: Factor on the loss before and off the gradient after, against float16 underflow.
        progress: ``progress("collect", rows done, num_gradients)``.

    Attributes:
        skipped: Rows left out because they were not finite, in the last pass.
        collected: Rows given, in the last pass.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        batches: Iterable[Any],
        num_gradients: int,
        samples_per_gradient: int = 1,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scale: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self._program = _LossProgram(model, loss)
        self._targets = targets
        self._batches = batches
        self._num_gradients = num_gradients
        self._samples = samples_per_gradient
        self._context = context
        self._scale = scale
        self._progress = progress
        self._vmap = samples_per_gradient == 1
        self._checked = False
        self.skipped = 0
        self.collected = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Chunks of finite rows, in global order.

        Raises:
            GradientError: The loss has no gradient, a batch cannot be split, there are no batches, or more than half
                of the rows are not finite.
        """
        self.skipped = self.collected = 0
        attempted = 0
        own = iter(self._batches)
        while attempted < self._num_gradients:
            before = attempted
            for chunk in self._round(own, self._num_gradients - attempted):
                n = min(next(iter(chunk.values())).shape[0], self._num_gradients - attempted)
                if n:
                    attempted += n
                    yield from self._finite({name: row[:n] for name, row in chunk.items()})
                    if self._progress is not None:
                        self._progress("collect", attempted, self._num_gradients)
            if attempted == before:
                break
        self._conclude(attempted)

    def _round(self, own: Iterator[Any], most: int) -> Iterator[dict[str, Tensor]]:
        """The rows of the next batch of every rank, in order of rank; one chunk at a time in a single process."""
        if distributed.world_size() == 1:
            for batch in itertools.islice(own, 1):
                yield from self._rows(batch, most)
            return
        rows: list[dict[str, Tensor]] = []
        with distributed.agreed("Collecting gradients"):
            for batch in itertools.islice(own, 1):
                rows = list(self._rows(batch, most))
        yield from self._exchange(rows)

    def probe(self, batch: Any) -> None:
        """Compute one gradient row and throw it away, to fail early.

        Raises:
            GradientError: The loss is not a scalar, has no gradient, or does not depend on any target.
        """
        self._loop_row(next(iter(self._split(batch, 1))))

    def _conclude(self, attempted: int) -> None:
        if attempted == 0:
            raise GradientError("batches: the calibration batches are empty. Check the data set and its batch size.")
        if attempted < self._num_gradients:
            warnings.warn(
                f"num_gradients={self._num_gradients}: the batches gave only {attempted} gradient samples of "
                f"{self._samples} inputs; the Fisher is estimated from those.",
                stacklevel=3,
            )
        if 2 * self.skipped > attempted:
            raise GradientError(
                f"{self.skipped} of {attempted} gradient samples are not finite, so the Fisher cannot be trusted. The model "
                "was not changed. Check the loss and the calibration data, or use a wider precision (bf16 or float32)."
            )
        if self.skipped:
            warnings.warn(
                f"{self.skipped} of {attempted} gradient samples are not finite and were skipped.", stacklevel=3
            )

    def _finite(self, chunk: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        finite = torch.stack([torch.isfinite(row.flatten(1)).all(1) for row in chunk.values()]).all(0)
        good = int(finite.sum())
        self.skipped += len(finite) - good
        self.collected += good
        if good == len(finite):
            yield chunk
        elif good:
            yield {name: row[finite] for name, row in chunk.items()}

    def _exchange(self, rows: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """This round's rows of every rank, in order of rank."""
        counts = distributed.gather_objects([next(iter(chunk.values())).shape[0] for chunk in rows])
        for i in range(max(map(len, counts))):
            size = max(c[i] if i < len(c) else 0 for c in counts)
            own = rows[i] if i < len(rows) else {}
            gathered: dict[str, list[Tensor]] = {}
            for name, weight in self._targets.items():
                padded = torch.zeros(size, *weight.shape, device=weight.device)
                if name in own:
                    padded[: own[name].shape[0]] = own[name]
                gathered[name] = distributed.gather_tensors(padded)
            for r, count in enumerate(counts):
                if i < len(count):
                    yield {name: parts[r][: count[i]] for name, parts in gathered.items()}

    def _rows(self, batch: Any, most: int) -> Iterator[dict[str, Tensor]]:
        """Float32 rows of one batch, ``most`` of them at the most."""
        if not self._checked:
            self.probe(batch)
            self._checked = True
        if self._vmap:
            size = _batch_size(batch)
            chunk = _rows_at_once(self._targets)
            for start in range(0, min(size, most), chunk):
                piece = _slice(batch, size, start, min(start + chunk, size, most))
                try:
                    rows = self._vmap_rows(piece)
                except Exception as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    self._fall_back(error)
                    rest = _slice(batch, size, start, min(size, most))
                    yield from (self._loop_row(one) for one in self._split(rest, most))
                    return
                yield rows
            return
        yield from (self._loop_row(piece) for piece in self._split(batch, most))

    def _fall_back(self, error: Exception) -> None:
        self._vmap = False
        warnings.warn(
            "samples_per_gradient=1: torch.func.vmap cannot take this model or loss "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). Falling back to a loop "
            "over samples, which gives the same gradients more slowly.",
            stacklevel=4,
        )

    def _split(self, batch: Any, most: int) -> Iterator[Any]:
        size = _batch_size(batch, required=False)
        if size is None or size <= self._samples:
            yield batch
            return
        for start in range(0, min(size // self._samples, most)):
            yield _slice(batch, size, start * self._samples, (start + 1) * self._samples)

    def _loop_row(self, batch: Any) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad(), self._context():
            loss = self._program(batch)
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
            grads = torch.autograd.grad(loss.reshape(()) * self._scale, list(self._targets.values()), allow_unused=True)
        if all(g is None for g in grads):
            raise GradientError(
                f"loss: it depends on none of the {len(self._targets)} targets, so nothing can be pruned by it."
            )
        return {
            name: (torch.zeros_like(weight) if g is None else g.detach()).float().div_(self._scale).unsqueeze(0)
            for (name, weight), g in zip(self._targets.items(), grads, strict=True)
        }

    def _vmap_rows(self, batch: Any) -> dict[str, Tensor]:
        leaves, spec = pytree.tree_flatten(batch)
        size = _batch_size(batch)
        dims = [0 if _is_batched(leaf, size) else None for leaf in leaves]
        tensors = [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim == 0]
        names = list(self._targets)
        paths = [f"model.{self._targets.paths[name]}" for name in names]

        def loss(weights: Sequence[Tensor], sample: Sequence[Tensor]) -> Tensor:
            inputs = iter(sample)
            one = [next(inputs).unsqueeze(0) if dim == 0 else leaf for leaf, dim in zip(leaves, dims, strict=True)]
            value = functional_call(
                self._program, dict(zip(paths, weights, strict=True)), (pytree.tree_unflatten(one, spec),)
            )
            return value.reshape(()) * self._scale  # type: ignore[no-any-return]

        with torch.inference_mode(False), torch.enable_grad(), self._context(), vmap_friendly():
            weights = [weight.detach() for weight in self._targets.values()]
            rows = vmap(grad(loss), in_dims=(None, 0), randomness="different")(weights, tensors)
        return {name: row.detach().float().div_(self._scale) for name, row in zip(names, rows, strict=True)}


def _rows_at_once(targets: Targets) -> int:
    """Per-sample gradients in one vmap: a fixed function of the targets, so that results do not depend on free memory."""
    return max(1, min(_VMAP_ROWS, _VMAP_FLOATS // targets.numel))


def rows_bytes(targets: Targets, samples_per_gradient: int) -> int:
    """Memory of the gradient rows that a collector holds at once, float32, for the plan (single process)."""
    return 4 * targets.numel * (_rows_at_once(targets) if samples_per_gradient == 1 else 1)


class _LossProgram(nn.Module):
    """Makes ``loss(model, batch)`` a module's forward, so that `functional_call` can swap the weights."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def _is_batched(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _batch_size(batch: Any, required: bool = True) -> Any:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    if required:
        raise GradientError(
            f"batches: a batch of type {type(batch).__name__} holds no tensor with a batch dimension, so it cannot be split "
            "into samples. Give tensors, or tuples, lists and dicts of them."
        )
    return None


def _slice(batch: Any, size: int, start: int, stop: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[start:stop] if _is_batched(leaf, size) else leaf, batch)


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
