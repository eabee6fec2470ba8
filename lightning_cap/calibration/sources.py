"""Sources of gradient rows: what any iterable of chunks is, and what a source that can be read again adds to it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from lightning_cap.errors import GradientError
from lightning_cap.sparsity.shards import BlockShards
from lightning_cap.utilities.distributed import gather_counts

T = TypeVar("T")

#: Gradient rows in chunks: ``{target name: (n, *weight.shape)}``. Re-iterable if it is to be read more than once.
GradientSource = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class SourceMemory:
    """Bytes that a source takes while it is read, on the device of the weights.

    Attributes:
        fixed: While rows are computed, however many.
        per_row: More for each row that is computed at once, the row itself included.
        row: Of a row that is handed on.
        most: Rows that are computed at once if memory allows.
        batch: Rows of a batch, which several processes hand on together.
    """

    fixed: int = 0
    per_row: int = 0
    row: int = 0
    most: int = 1
    batch: int = 1

    def computing(self, rows: int) -> int:
        """Peak while so many rows are computed at once."""
        return self.fixed + self.per_row * rows


NO_MEMORY = SourceMemory()


@dataclass(frozen=True)
class Trial:
    """What the first batch has told about a source.

    Attributes:
        memory: What reading it takes.
        vmap: Whether rows are computed by `torch.func.vmap`.
    """

    memory: SourceMemory
    vmap: bool = False


class ExchangedRows:
    """Gives each process the part of all processes' whole rows that its blocks cover: ``{target: (n, k)}``. See `to_owners`."""

    def __init__(self, source: GradientSource, shards: BlockShards) -> None:
        self._source, self._shards = source, shards

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        shapes = self._shards.layout.shapes
        with reading(self._source) as chunks:
            for chunk in chunks:
                check_rows(chunk, shapes, shapes)
                first = next(iter(chunk.values()))
                counts = gather_counts(len(first), first.device)
                yield {name: self._shards.exchange(name, chunk[name], counts) for name in shapes}
                del chunk, first

    @property
    def repeatable(self) -> bool:
        """As the source says."""
        return repeatable(self._source)


def to_owners(source: GradientSource, shards: BlockShards) -> GradientSource:
    """A source whose rows, of the samples of all processes in global order, have only what this process's blocks cover.

    Args:
        source: Hands its rows on so itself, by a method ``hand_to_owners``; or gives whole rows, as many chunks in every process.
        shards: Which blocks these are.
    """
    tell = getattr(source, "hand_to_owners", None)
    if not callable(tell):
        return ExchangedRows(source, shards)
    tell(shards)
    return source


def memory_of(source: object) -> SourceMemory:
    """What reading ``source`` takes, as it tells by a method ``memory``; else nothing. Every process must call it."""
    tell = getattr(source, "memory", None)
    return tell() if callable(tell) else NO_MEMORY


def limit_rows(source: object, rows: int | None) -> None:
    """Let ``source`` compute ``rows`` rows at once at the most, if it has a method ``limit_rows``; None for no limit."""
    limit = getattr(source, "limit_rows", None)
    if rows is not None and callable(limit):
        limit(rows)


def repeatable(source: object) -> bool:
    """Whether ``source`` can be read more than once, as it tells by an attribute ``repeatable``; else if it is no iterator."""
    return bool(getattr(source, "repeatable", not isinstance(source, Iterator)))


def peek(batches: Iterable[T]) -> tuple[T | None, Iterable[T]]:
    """The first batch, None if there is none, and what to read instead of ``batches``: nothing is lost of an iterator."""
    own = iter(batches)
    first = next(own, None)
    if repeatable(batches):
        return first, batches
    return first, own if first is None else itertools.chain([first], own)


def check_repeatable(source: GradientSource, passes: int) -> None:
    """Refuse a source that is used up by one pass when there are to be several.

    Raises:
        GradientError: It is an iterator.
    """
    if passes > 1 and not repeatable(source):
        raise GradientError(
            f"gradients: memory allows the Fisher only in {passes} passes over the gradients, but the source is an iterator, "
            "which can be read once. Give a source that gives the same rows each time, or raise max_memory."
        )


def check_rows(chunk: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> None:
    """Refuse a chunk of gradient rows that does not fit the weights.

    Args:
        chunk: ``{target: (n, *shape)}``.
        shapes: Shape of each target.
        names: The targets whose rows are read.

    Raises:
        GradientError: The chunk is none, one is missing in it, its rows do not have the weight's shape, or not all are as many.
    """
    if not isinstance(chunk, Mapping):
        raise GradientError(
            f"gradients: a chunk is a {type(chunk).__name__}. Give {{target name: (n, *weight.shape)}}."
        )
    counts = set()
    for name in names:
        rows = chunk.get(name)
        shape = tuple(rows.shape) if isinstance(rows, Tensor) and rows.is_floating_point() else ()
        if not shape or shape[1:] != shapes[name]:
            kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            got = f"have shape {shape[1:]}" if shape else "are missing" if rows is None else f"are of type {kind}"
            raise GradientError(
                f"gradients: the rows of {name!r} {got}, its weight has {shapes[name]}. Give a chunk of floating-point tensors "
                "{target name: (n, *weight.shape)} with every target in it."
            )
        counts.add(shape[0])
    if len(counts) > 1:
        raise GradientError(
            f"gradients: a chunk has {sorted(counts)} rows. Give every target as many rows as the others."
        )


def check_any_rows(counts: Sequence[int]) -> None:
    """Refuse a source that gave no row on any process.

    Args:
        counts: Rows on each process.

    Raises:
        GradientError: All are 0.
    """
    if sum(counts) == 0:
        raise GradientError(
            "gradients: the source gave no gradient row. Check that the calibration batches are not empty."
        )


@contextmanager
def reading(source: GradientSource) -> Iterator[Iterator[Mapping[str, Tensor]]]:
    """Iterate over ``source`` and end it at once when the body fails, so that what it has entered is left."""
    chunks = iter(source)
    try:
        yield chunks
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


class TimedSource:
    """Passes a source on within a context, and adds up the seconds that it takes.

    Args:
        source: Its rows.
        context: Entered for the length of every pass.

    Attributes:
        seconds: Spent in the source so far, over all passes.
    """

    def __init__(
        self, source: GradientSource, context: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._source, self._context = source, context
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        started = time.perf_counter()
        with self._context(), reading(self._source) as chunks:
            for chunk in chunks:
                self.seconds += time.perf_counter() - started
                yield chunk
                del chunk  # before the next one is computed
                started = time.perf_counter()
        self.seconds += time.perf_counter() - started

    @property
    def repeatable(self) -> bool:
        """As the source says."""
        return repeatable(self._source)

    @property
    def measures(self) -> bool:
        """As the source says."""
        return bool(getattr(self._source, "measures", False))

    def layer_inputs(self) -> Any:
        """Those of the source, a `MeasuringSource`."""
        with self._measuring() as source:
            return source.layer_inputs()

    def losses(self, candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Those of the source, a `MeasuringSource`."""
        with self._measuring() as source:
            found: list[float] = source.losses(candidates)
            return found

    @contextmanager
    def _measuring(self) -> Iterator[Any]:
        started = time.perf_counter()
        with self._context():
            yield self._source
        self.seconds += time.perf_counter() - started

    def memory(self) -> SourceMemory:
        """As the source says."""
        return memory_of(self._source)

    def hand_to_owners(self, shards: BlockShards) -> None:
        """Have the source do so, or do it for it."""
        self._source = to_owners(self._source, shards)

    def limit_rows(self, rows: int) -> None:
        """Tell the source."""
        limit_rows(self._source, rows)
