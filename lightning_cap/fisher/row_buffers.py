"""Buffers of gradient rows between the backward pass and the Fisher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_cap.kernels.cpu.threads import over_blocks

#: ``fill(out, first)`` writes rows ``first, first + 1, ...`` of what has arrived into ``out`` ``(n, K, B)``.
Fill = Callable[[Tensor, int], None]
#: ``add(rows)`` adds ``(n, K, B)`` rows to the sums.
Add = Callable[[Tensor], None]


_SHARED_BYTES = 2**23  # that are worth several threads


class RowBuffer(ABC):
    """Collects rows and hands them on by ``row_chunk`` at a time, whatever the sizes in which they arrive."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._chunk, self._filled = shape[0], 0

    def append(self, n: int, fill: Fill, add: Add) -> None:
        """Take in ``n`` rows; ``add`` is called for every full chunk."""
        taken = 0
        while taken < n:
            count = min(self._chunk - self._filled, n - taken)
            self._write(self._filled, count, fill, taken)
            taken += count
            self._filled += count
            if self._filled == self._chunk:
                self._hand_on(add)

    def flush(self, add: Add) -> None:
        """Hand on what is left, and wait until all is added."""
        if self._filled:
            self._hand_on(add)

    @abstractmethod
    def _write(self, start: int, count: int, fill: Fill, first: int) -> None: ...

    @abstractmethod
    def _hand_on(self, add: Add) -> None: ...


class DirectRowBuffer(RowBuffer):
    """Rows that are where the sums are.

    Args:
        shape: ``(row_chunk, K, B)``.
        device: Of rows and sums.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        super().__init__(shape)
        self._buffer = torch.empty(shape, device=device)

    def _write(self, start: int, count: int, fill: Fill, first: int) -> None:
        out = self._buffer[start : start + count]
        if out.device.type != "cpu" or out.nbytes < _SHARED_BYTES:
            fill(out, first)
            return

        @torch.no_grad()
        def work(a: int, b: int) -> None:
            fill(out[a:b], first + a)

        over_blocks(work, count)

    def _hand_on(self, add: Add) -> None:
        add(self._buffer[: self._filled])
        self._filled = 0


class StagedRowBuffer(RowBuffer):
    """Rows of a GPU for sums in main memory: copied to pinned memory on a stream of their own, and added up by a thread
    while the next backward pass runs. Two buffers take turns.

    Args:
        shape: ``(row_chunk, K, B)``.
        device: Of the rows.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        super().__init__(shape)
        self._device = device
        pin = device.type == "cuda"
        self._buffers = [torch.empty(shape, pin_memory=pin) for _ in range(2)]
        self._busy: list[Future[None] | None] = [None, None]
        self._now = 0
        self._copies: list[torch.cuda.Event] = []
        self._stream: torch.cuda.Stream | None = None
        self._worker = ThreadPoolExecutor(1)

    def _write(self, start: int, count: int, fill: Fill, first: int) -> None:
        self._wait(self._now)
        out = self._buffers[self._now][start : start + count]
        if not out.is_pinned():
            fill(out, first)
            return
        device = self._device
        packed = torch.empty(out.shape, device=device)
        fill(packed, first)
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            out.copy_(packed, non_blocking=True)
            packed.record_stream(self._stream)
            self._copies.append(self._stream.record_event())

    def _hand_on(self, add: Add) -> None:
        rows, copies = self._buffers[self._now][: self._filled], self._copies

        def work() -> None:
            for copy in copies:
                copy.synchronize()
            add(rows)

        self._busy[self._now] = self._worker.submit(work)
        self._copies, self._filled, self._now = [], 0, 1 - self._now

    def _wait(self, buffer: int) -> None:
        job, self._busy[buffer] = self._busy[buffer], None
        if job is not None:
            job.result()

    def flush(self, add: Add) -> None:
        """Hand on what is left, and wait until all is added."""
        super().flush(add)
        self._wait(self._now)
        self._wait(1 - self._now)
        self._worker.shutdown()
