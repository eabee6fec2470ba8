"""Gradient samples for the Fisher: batches -> chunks ``{target name: (n, *shape)}``."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.calibration.checks import check_batch, check_collector
from lightning_cap.calibration.rows import Loss, RowComputer, largest_difference
from lightning_cap.calibration.sources import SourceMemory, Trial, peek, repeatable
from lightning_cap.errors import GradientError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_counts, require_instance, require_real
from lightning_cap.utilities.memory import is_out_of_memory, release_memory
from lightning_cap.utilities.peak_memory import measure_peak
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.stopping import poll

_log = logging.getLogger(__name__)

_VMAP_FLOATS = 2**27  # per-sample gradients held at once, 512 MiB
_VMAP_ROWS = 64
_TRIED = 2  # rows that are computed to see what one takes; more would break a small limit themselves


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
        trial: What an earlier collector of the same model has found out by its first batch. Default: this one tries.
        computer: Of the rows, if they are of something else than the targets.

    Raises:
        ConfigError: An argument is out of range; when it is read, the first batch has fewer samples than one gradient.

    Attributes:
        trial: What the first batch has told; None before.
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
        trial: Trial | None = None,
        computer: RowComputer | None = None,
    ) -> None:
        check_collector(model, targets, loss, batches, context, progress)
        require_counts(num_gradients=num_gradients, samples_per_gradient=samples_per_gradient)
        require_real("scale", scale, "(0, inf)", example=65536.0)
        require_instance("trial", trial, Trial, "earlier.trial", optional=True)
        require_instance("computer", computer, RowComputer, "GateComputer(...)", optional=True)
        self._computer = computer or RowComputer(model, targets, loss, samples_per_gradient, context, scale)
        self._row_bytes = 4 * sum(math.prod(shape) for shape in self._computer.shapes.values())
        self._targets = targets
        self._batches = batches
        self._num_gradients = num_gradients
        self._samples = samples_per_gradient
        self._progress = progress
        self._vmap = samples_per_gradient == 1 if trial is None else trial.vmap
        self._at_once = rows_at_once(targets)
        self.trial = trial
        self.skipped = 0
        self.collected = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Chunks of finite rows, in global order.

        With several processes, each gives its own rows, one chunk per round of batches, empty ones included: all give the same
        number of chunks, and the global order is that of the rounds, and of the ranks in a round.

        Raises:
            GradientError: The loss has no gradient, a batch cannot be split, there are no batches, or more than half
                of the rows are not finite.
        """
        self.skipped = self.collected = 0
        attempted = 0
        for chunk, tried, good in self._rounds() if distributed.world_size() > 1 else self._chunks():
            attempted += tried
            self.collected += good
            self.skipped += tried - good
            yield chunk
            del chunk  # before the next one is computed
            if self._progress is not None:
                self._progress("collect", attempted, self._num_gradients)
        release_memory(self._targets.device)
        self._conclude(attempted)

    def _chunks(self) -> Iterator[tuple[dict[str, Tensor], int, int]]:
        """``(finite rows, rows tried, finite ones)`` of a single process."""
        left = self._num_gradients
        for batch in self._batches:
            for chunk in self._rows(batch, left):
                tried = next(iter(chunk.values())).shape[0]
                left -= tried
                kept = _finite(chunk)
                del chunk
                yield kept, tried, next(iter(kept.values())).shape[0]
                del kept
            if left <= 0:
                return

    def _rounds(self) -> Iterator[tuple[dict[str, Tensor], int, int]]:
        """The same with several processes; the counts are those of all of them together."""
        own, left = iter(self._batches), self._num_gradients
        while left > 0:
            batch, counts = self._together(lambda: self._next(own))
            most = min(counts[distributed.rank()], max(0, left - sum(counts[: distributed.rank()])))
            tried = min(left, sum(counts))
            if tried == 0:
                return
            left -= tried
            rows, good = self._together(functools.partial(self._finite_rows, batch, most))
            yield rows, tried, sum(good)
            del rows

    def _together(self, work: Callable[[], tuple[Any, int]]) -> tuple[Any, list[int]]:
        """What ``work`` gives, and the counts of all ranks; an error on one of them is raised on all."""
        error: Exception | None = None
        value, count = None, -1
        try:
            value, count = work()
        except Exception as caught:
            error = caught
        counts = distributed.gather_counts(count, self._targets.device)
        if min(counts) < 0:
            with distributed.raise_on_all_ranks("Collecting gradients"):
                if error is not None:
                    raise error
        return value, counts

    def _next(self, own: Iterator[Any]) -> tuple[Any, int]:
        """This rank's next batch, and how many gradient samples are in it."""
        batch = next(own, None)
        size = 0 if batch is None else batch_size(batch, default=0)
        return batch, 0 if batch is None else 1 if size <= self._samples else size // self._samples

    def _finite_rows(self, batch: Any, most: int) -> tuple[dict[str, Tensor], int]:
        """All finite rows of a batch at once, ``most`` of them at the most."""
        chunks = []
        for chunk in self._rows(batch, most) if most > 0 else ():
            poll()
            chunks.append(_finite(chunk))
        if not chunks:
            device = self._targets.device
            return {name: torch.zeros(0, *shape, device=device) for name, shape in self._computer.shapes.items()}, 0
        rows = chunks[0] if len(chunks) == 1 else {n: torch.cat([chunk[n] for chunk in chunks]) for n in chunks[0]}
        return rows, next(iter(rows.values())).shape[0]

    @property
    def repeatable(self) -> bool:
        """Whether the batches can be read again."""
        return repeatable(self._batches)

    def memory(self) -> SourceMemory:
        """What reading this takes, as the first batch tells, which is read if it is not known yet. Every process must call it.

        Raises:
            GradientError: As `probe`.
        """
        if self.trial is None:
            with rng.preserved():
                self._try_first()
            release_memory(self._targets.device)
        assert self.trial is not None
        return self.trial.memory

    def _try_first(self) -> None:
        with distributed.raise_on_all_ranks("The first gradient"):
            batch, self._batches = peek(self._batches)
            self.probe(batch)

    def limit_rows(self, rows: int) -> None:
        """Compute ``rows`` of them at once at the most; the results depend on it by rounding alone."""
        self._at_once = min(self._at_once, rows)

    def probe(self, batch: Any) -> None:
        """Compute a few gradient rows and throw them away, to fail early: what they take is known then. The first is computed by
        autograd and by vmap, and where the two differ, the loop is used. A process without a batch gives None.

        Raises:
            GradientError: The loss is not a scalar, has no gradient, or does not depend on any target.
        """
        if batch is None:
            size = self._row_bytes
            self.trial = Trial(SourceMemory(0, size, size), self._vmap)
            return
        with rng.preserved():  # so that rows do not depend on whether they were tried before
            self._try(batch)

    def _try(self, batch: Any) -> None:
        check_batch(self._samples, batch_size(batch, default=0))
        one, samples = next(iter(self._computer.split(batch, 1))), batch_size(batch, default=1)
        row, peak = measure_peak(lambda: self._computer.one(one), self._targets.device)
        size = self._row_bytes
        memory = SourceMemory(peak, 0, size, 1, max(1, samples // self._samples))
        if self._vmap:
            rows = min(samples, self._at_once)
            fixed, per_row = self._try_vmap(batch, one, row) or (peak - size, size)
            memory = SourceMemory(fixed, per_row, size, rows, rows) if self._vmap else memory
        self.trial = Trial(memory, self._vmap)

    def _try_vmap(self, batch: Any, one: Any, row: dict[str, Tensor]) -> tuple[int, int] | None:
        """Bytes whatever the rows, and more for each; None where that cannot be told."""
        device, size = self._targets.device, batch_size(batch)
        most = min(size, self._at_once, _TRIED)
        peaks: dict[int, int] = {}
        for n in sorted({most, -(-most // 2)}):
            some = slice_batch(batch, size, 0, n)
            try:
                rows, peaks[n] = measure_peak(functools.partial(self._computer.at_once, some), device)
            except Exception as error:
                if is_out_of_memory(error):
                    break
                self._fall_back(error)
                return None
            if not self._agrees(rows, row, one):
                return None
            del rows
        if not peaks:
            return None
        least, most = min(peaks), max(peaks)
        per_row = (peaks[most] - peaks[least]) // (most - least) if most > least else peaks[most]
        return max(0, peaks[most] - most * per_row), per_row

    def _agrees(self, rows: dict[str, Tensor], row: dict[str, Tensor], one: Any) -> bool:
        """Whether vmap gives the row of autograd; else it is done without."""
        tolerance = self._computer.tolerance
        apart, name = largest_difference({n: some[:1] for n, some in rows.items()}, row)
        if apart <= tolerance or not bool(torch.stack([torch.isfinite(r).all() for r in row.values()]).all()):
            return True
        again, _ = largest_difference(self._computer.one(one), row)
        if again > tolerance / 10:  # the loss is random, and its gradients cannot be compared
            return True
        self._vmap = False
        warnings.warn(
            f"samples_per_gradient=1: {self._computer.way} gives another gradient than autograd for {name!r} (relative difference "
            f"{apart:.2g}), so one of them is wrong. Falling back to a loop over samples, which is slower. Compare the "
            "gradient with finite differences; see Troubleshooting in the README.",
            stacklevel=4,
        )
        return False

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

    def _rows(self, batch: Any, most: int) -> Iterator[dict[str, Tensor]]:
        """Float32 rows of one batch, ``most`` of them at the most."""
        if self.trial is None:
            self.probe(batch)
        if self._vmap:
            size = batch_size(batch)
            start, stop = 0, min(size, most)
            while start < stop:
                end = min(start + self._at_once, stop)
                try:
                    rows = self._computer.at_once(slice_batch(batch, size, start, end))
                except Exception as error:
                    if not is_out_of_memory(error):
                        self._fall_back(error)
                    elif self._at_once == 1:
                        raise
                    rows = None
                if rows is not None:
                    yield rows
                    del rows
                    start = end
                elif self._vmap:
                    self._at_once //= 2
                    _log.warning("Out of memory in the gradients; going on with %d samples at once.", self._at_once)
                else:
                    rest = slice_batch(batch, size, start, stop)
                    yield from (self._computer.one(one) for one in self._computer.split(rest, most))
                    return
            return
        yield from (self._computer.one(piece) for piece in self._computer.split(batch, most))

    def _fall_back(self, error: Exception) -> None:
        self._vmap = False
        warnings.warn(
            f"samples_per_gradient=1: {self._computer.way} cannot take this model or loss "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). Falling back to a loop "
            "over samples, which gives the same gradients more slowly.",
            stacklevel=4,
        )


def _finite(chunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """The chunk without the rows that are not finite. Sums tell, which take one reading and no room; those of finite rows overflow
    hardly ever, and such rows are looked at again."""
    sums = torch.stack([rows.sum(tuple(range(1, rows.dim()))) for rows in chunk.values()])
    finite = sums.isfinite().all(0)
    for i in (~finite).nonzero().flatten().tolist():
        finite[i] = all(bool(rows[i].isfinite().all()) for rows in chunk.values())
    return chunk if bool(finite.all()) else {name: rows[finite] for name, rows in chunk.items()}


def rows_at_once(targets: Targets) -> int:
    """Per-sample gradients in one vmap, at the most: a fixed function of the targets. Where memory is short, the plan takes fewer,
    and results differ by rounding.
    """
    most = 1 if targets.is_sharded else _VMAP_ROWS  # one after the other
    return max(1, min(most, _VMAP_FLOATS // targets.numel))
