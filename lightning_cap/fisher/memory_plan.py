"""The plan of a pruning event, made before it runs: where the Fisher lives, in how many passes, with how much memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, field, replace

import torch
from torch import Tensor

from lightning_cap.calibration.sources import NO_MEMORY, SourceMemory
from lightning_cap.errors import ConfigError
from lightning_cap.fisher.blocks import Storage, fisher_bytes, resolve_storage, update_bytes
from lightning_cap.solver.backend import Backend, chunk_blocks, work_bytes
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_counts, require_flag, require_instance, require_text
from lightning_cap.utilities.memory import format_bytes, free_memory

CPU = torch.device("cpu")

_SHARE = 0.8  # of the free memory: the rest is for training, later
# bytes for an entry of a block besides its Fisher
_FIRST_PASS = 5  # weight 4, alive 1
_LATER_PASS = 24  # and rank 2, loss 4, score 4, pruned 1, new weights 4, diagonal 4
_SOLVED = 48  # and the result, and what the scores are sorted by


@dataclass(frozen=True)
class MemoryPlan:
    """What an event will take.

    Attributes:
        device: Where blocks are solved.
        peak_bytes: Peak extra memory there, the gradient rows of the source included.
        limit: Bytes that it may take there; None if that is not known.
        argument: What to name when it does not fit.
        storage_device: Where the Fisher is kept; the CPU for one that is too large for ``device``.
        host_bytes: Peak extra main memory, where ``storage_device`` is the CPU and ``device`` is not.
        shares: For each pass over the gradients and each rank the ``(K_r,)`` indices of the blocks that it holds. There is one pass
            unless memory is short. The blocks of a rank, all passes together, are consecutive. Of sharded targets each rank numbers
            its own blocks, and of the other ranks' it is only told how many there are.
        chunk: Blocks that are solved at a time.
        rows: Gradient rows that the source is to compute at once; None for as many as it likes.
    """

    device: torch.device
    peak_bytes: int = 0
    limit: int | None = None
    argument: str = "block_size"
    storage_device: torch.device = CPU
    host_bytes: int = 0
    shares: tuple[tuple[Tensor, ...], ...] = field(default=(), compare=False)
    chunk: int = 1
    rows: int | None = None

    @property
    def passes(self) -> int:
        """Times that the gradients are computed for the elimination; as often again to build weights, if more than one."""
        return max(1, len(self.shares))

    @property
    def groups(self) -> tuple[Tensor, ...]:
        """This rank's blocks in each pass."""
        return tuple(share[distributed.rank()] for share in self.shares)

    def check(self) -> None:
        """Refuse an event that cannot fit.

        Raises:
            ConfigError: It needs more memory than it may take.
        """
        if self.limit is not None and self.peak_bytes > self.limit:
            machine = _machine.get()
            advice = f" {machine.advice}" if machine is not None and machine.advice else ""
            raise ConfigError(
                f"{self.argument}: the pruning event needs {format_bytes(self.peak_bytes)} on {self.device}, where "
                f"{format_bytes(self.limit)} may be used, even with one gradient row and one Fisher block at a time. Allow more "
                f"with max_memory, choose a smaller block_size or row_chunk, or fewer targets with include/exclude.{advice}"
            )

    def __str__(self) -> str:
        where = (
            f"on {self.device}"
            if self.storage_device == self.device
            else f"on {self.storage_device}, solved on {self.device}"
        )
        passes = f", in {self.passes} passes" if self.passes > 1 else ""
        host = f", {format_bytes(self.host_bytes)} of main memory" if self.host_bytes else ""
        return f"Fisher {where}{passes}, {format_bytes(self.peak_bytes)}{host}"


@dataclass(frozen=True)
class Deployment:
    """Where an event is to run, to plan for it on another machine.

    Args:
        device: Of the weights; it need not be there.
        device_bytes: Free there for each process before the event; None for no limit that is known.
        host_bytes: Main memory that is free for each process; None for no limit that is known.
        processes: That share the work.
        advice: Told besides, where an event does not fit.

    Raises:
        ConfigError: An argument is of the wrong kind.
    """

    device: torch.device
    device_bytes: int | None = None
    host_bytes: int | None = None
    processes: int = 1
    advice: str = ""

    def __post_init__(self) -> None:
        require_instance("device", self.device, torch.device, "torch.device('cuda')")
        require_counts(processes=self.processes)
        for name in ("device_bytes", "host_bytes"):
            if getattr(self, name) is not None:
                require_counts(**{name: getattr(self, name)})
        if self.advice != "":
            require_text("advice", self.advice, "Give --device_memory.")


#: What plans are made for in the body of `planned_for`; else this machine, with the processes that there are.
_machine: ContextVar[Deployment | None] = ContextVar("deployment", default=None)


@contextmanager
def planned_for(machine: Deployment | None) -> Iterator[None]:
    """Inside, `plan_event` and `plan_reading` plan for another machine; None for this one. Such plans cannot be carried out."""
    require_instance("machine", machine, Deployment, "Deployment(torch.device('cuda'), 80 * 10**9)", optional=True)
    token = _machine.set(machine)
    try:
        yield
    finally:
        _machine.reset(token)


@dataclass(frozen=True)
class MemoryModel:
    """What the memory of an event depends on.

    Attributes:
        block_size: ``B``.
        num_blocks: ``K``, of the layout.
        row_chunk: Rows of the Fisher's buffer.
        storage: Of the Fisher.
        backend: Of the solver, resolved.
        source: What reading the gradients takes.
        ranks: Processes that share the blocks.
        busy_blocks: Of all ranks, those that are not fully masked.
    """

    block_size: int
    num_blocks: int
    row_chunk: int
    storage: Storage
    backend: Backend = "torch"
    source: SourceMemory = NO_MEMORY
    ranks: int = 1
    busy_blocks: int = 0

    def _reading(self, rows: int, temporary: int = 0) -> int:
        """While rows are computed, or handed on; with several processes those of a batch are kept, sent and received."""
        batch = self.source.row * self.source.batch if self.ranks > 1 else 0
        handed = 3 * batch or self.source.row * rows
        return max(batch + self.source.computing(rows), handed + temporary)

    def _kept(self, blocks: int, storage: Storage, storage_device: torch.device) -> int:
        """Memory of the Fisher of some blocks."""
        return fisher_bytes(blocks, self.block_size, storage, storage_device)

    def _buffer(self, blocks: int) -> int:
        return 4 * self.row_chunk * blocks * self.block_size

    def chunk(self, device: torch.device, limit: int | None) -> int:
        """Blocks to solve at a time: what suits the device, in no more than a quarter of ``limit``."""
        chunk = chunk_blocks(self.block_size, device, packed=self._packed(device))
        while limit is not None and chunk > 1 and self._work(device, chunk) > limit // 4:
            chunk //= 2
        return chunk

    def _work(self, storage_device: torch.device, chunk: int) -> int:
        return work_bytes(self.backend, self.block_size, chunk, packed=self._packed(storage_device))

    def _packed(self, device: torch.device) -> bool:
        """Whether the compiled CPU code finds triangles where it works."""
        return self.backend == "numba" and device.type == "cpu" and resolve_storage(self.storage, device) == "packed"

    def most_rows(self, limit: int) -> int:
        """Gradient rows to compute at once: as many as the source likes, in no more than a quarter of ``limit``."""
        rows = self.source.most
        while rows > 1 and self.source.computing(rows) > limit // 4:
            rows //= 2
        return rows

    def bytes_on_device(self, blocks: int, device: torch.device, chunk: int, rows: int) -> int:
        """Peak memory with the Fisher of ``blocks`` blocks where it is solved, and ``rows`` gradient rows at once."""
        entries = self.num_blocks * self.block_size
        held = (_LATER_PASS if blocks * self.ranks < self.busy_blocks else _FIRST_PASS) * entries
        temporary = update_bytes(blocks, self.block_size, self.storage, device)
        collect = held + self._buffer(blocks) + self._reading(rows, temporary)
        solve = _SOLVED * entries + self._work(device, min(chunk, max(1, blocks)))
        return self._kept(blocks, self.storage, device) + max(collect, solve)

    def offloaded(self, blocks: int, device: torch.device, chunk: int, rows: int) -> tuple[int, int]:
        """Peak memory of the device and of the host, with the Fisher on the host."""
        kept = self._kept(blocks, "packed", CPU)
        entries = self.num_blocks * self.block_size
        copied = 2 * self.source.row * rows  # in blocks, on their way to the host
        on_device = max(
            _FIRST_PASS * entries + self._reading(rows, copied), _SOLVED * entries + self._work(device, chunk)
        )
        return on_device, kept + 2 * self._buffer(blocks) + 4 * chunk * self.block_size**2

    def most_blocks(self, device: torch.device, limit: int, chunk: int, rows: int) -> int:
        """The largest number of blocks that `bytes_on_device` fits into ``limit``."""
        low, high = 0, self.num_blocks
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.bytes_on_device(middle, device, chunk, rows) <= limit else (low, middle - 1)
            )
        return low


def plan_event(
    model: MemoryModel, blocks: Tensor, device: torch.device, max_memory: int | None = None, *, sharded: bool = False
) -> MemoryPlan:
    """Choose the placement: all on the device, with fewer gradient rows at once if need be; the Fisher on the host; or passes
    over groups of blocks.

    Every process must call it; all come to the same plan, that of the one with the least memory.

    Args:
        model: What the memory of the event depends on.
        blocks: ``(K',)`` rising indices of the blocks that are not fully masked.
        device: Of the weights.
        max_memory: Bytes that the event may take on ``device``. Default: 80 % of what is free.
        sharded: Model and blocks are those of this process alone, which owns them; the plan is that of the one with the most.

    Raises:
        ConfigError: An argument is of the wrong kind. Whether it fits is for `MemoryPlan.check` to say.
    """
    require_instance("model", model, MemoryModel, "MemoryModel(192, 1000, 32, 'auto')")
    require_instance("blocks", blocks, Tensor, "torch.arange(1000)")
    require_instance("device", device, torch.device, "torch.device('cpu')")
    if max_memory is not None:
        require_counts(max_memory=max_memory)
    require_flag("sharded", sharded)
    argument = "block_size" if max_memory is None else "max_memory"
    model, device = _elsewhere(model, device)
    source, free, host = _of_all_ranks(model.source, device)
    limit = free if max_memory is None else max_memory
    by_rank = list(blocks.tensor_split(model.ranks))
    if sharded:
        held = distributed.gather_objects((len(blocks), model.num_blocks))
        by_rank = [torch.arange(busy) for busy, _ in held]
        by_rank[distributed.rank()] = blocks
        model = replace(model, ranks=1, num_blocks=max(all_blocks for _, all_blocks in held))
    count = max(len(own) for own in by_rank)
    model = replace(model, busy_blocks=count if sharded else len(blocks), source=source)
    chunk = min(model.chunk(device, limit), max(1, count))
    plan = functools.partial(MemoryPlan, device, limit=limit, argument=argument, chunk=chunk)
    if count == 0:
        return plan(0, storage_device=device, shares=(tuple(by_rank),))
    fewest = 1 if device.type == "cpu" else max(1, source.most // 8)  # few at once are slow on a GPU
    for rows in _halves(source.most, fewest):
        peak = model.bytes_on_device(count, device, chunk, rows)
        if limit is None or peak <= limit:
            return plan(peak, storage_device=device, shares=(tuple(by_rank),), rows=rows)
    assert limit is not None
    rows = model.most_rows(limit)
    if device.type != "cpu":
        on_device, on_host = model.offloaded(count, device, chunk, rows)
        if on_device <= limit and (host is None or on_host <= host):
            return plan(on_device, storage_device=CPU, host_bytes=on_host, shares=(tuple(by_rank),), rows=rows)
    most = max(1, model.most_blocks(device, limit, chunk, rows))
    pieces = [own.tensor_split(-(-count // most)) for own in by_rank]
    shares = tuple(zip(*pieces, strict=True))
    largest = max(len(share) for share in shares[0])
    peak = model.bytes_on_device(largest, device, chunk, rows)
    return plan(peak, storage_device=device, shares=shares, rows=rows)


def plan_reading(device: torch.device, source: SourceMemory, held: int, temporary: int, after: int = 0) -> MemoryPlan:
    """The plan of a method that reads its source once and has no limit of its own but what is free. Every process must call it.

    Args:
        device: Of the weights.
        source: What reading takes.
        held: Bytes that the method holds while it reads.
        temporary: Bytes that it takes besides for each row that is handed to it.
        after: Bytes that it takes when all is read.

    Raises:
        ConfigError: It does not fit.
    """
    machine = _machine.get()
    device = device if machine is None else machine.device
    source, limit, _ = _of_all_ranks(source, device)
    for rows in _halves(source.most, 1):
        single = (distributed.world_size() if machine is None else machine.processes) == 1
        handed = (source.row + temporary) * (rows if single else source.batch)
        computing = source.computing(rows) + (0 if single else source.row * source.batch)
        plan = MemoryPlan(device, max(held + max(computing, handed), after), limit, "include", rows=rows)
        if limit is None or plan.peak_bytes <= limit:
            break
    plan.check()
    return plan


def _halves(most: int, fewest: int) -> Iterator[int]:
    while most > fewest:
        yield most
        most //= 2
    yield max(most, fewest)


def _elsewhere(model: MemoryModel, device: torch.device) -> tuple[MemoryModel, torch.device]:
    """The model and the device on the machine that is planned for."""
    machine = _machine.get()
    if machine is None:
        return model, device
    backend = "torch" if model.backend == "numba" and machine.device.type != "cpu" else model.backend
    return replace(model, ranks=machine.processes, backend=backend), machine.device


def _of_all_ranks(source: SourceMemory, device: torch.device) -> tuple[SourceMemory, int | None, int | None]:
    """The largest source, and the least that may be used of ``device`` and of the host."""
    machine = _machine.get()
    if machine is not None:
        most = (None if free is None else int(_SHARE * free) for free in (machine.device_bytes, machine.host_bytes))
        return source, *most  # type: ignore[return-value]
    sources, *free = zip(*distributed.gather_objects((astuple(source), _may_use(device), _may_use(CPU))), strict=True)
    on_device, on_host = (None if None in values else min(values) for values in free)
    return SourceMemory(*map(max, zip(*sources, strict=True))), on_device, on_host


def _may_use(device: torch.device) -> int | None:
    free = free_memory(device)
    if free is None:
        return None
    if device.type == "cpu":  # processes of one machine share it
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    return int(_SHARE * free)
