"""The empirical Fisher in blocks (equation 3), without damp: ``(1/N) Σ g gᵀ``, shape ``(K, B, B)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_cap.calibration.sources import check_any_rows, check_rows
from lightning_cap.errors import GradientError
from lightning_cap.fisher.row_buffers import DirectRowBuffer, Fill, RowBuffer, StagedRowBuffer
from lightning_cap.fisher.shrinkage import Shrinkable, correlations, shrink_blocks
from lightning_cap.kernels.cpu.threads import over_blocks
from lightning_cap.sparsity.block_layout import BlockLayout, Selection
from lightning_cap.sparsity.shards import OwnLayout
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import (
    require_choice,
    require_counts,
    require_flag,
    require_instance,
    require_real,
)
from lightning_cap.utilities.precision import full_float32

#: ``"full"`` blocks, or ``"packed"`` lower triangles (half the memory). ``"auto"``: packed on the CPU, full on a GPU.
Storage = Literal["auto", "full", "packed"]

ROW_CHUNK = 32
_POOLED_FLOATS = 2**22  # of blocks that are shrunk at a time
_TEMPORARY_FLOATS = 2**26  # of whole blocks while packed ones are updated on a GPU


class FisherBlocks:
    """The finished blocks; ``blocks[index]`` gives some of them, full and symmetric.

    Args:
        sums: Where they are kept.
        scale: ``1/N``.
        device: Where to hand them out.
    """

    def __init__(self, sums: BlockSums, scale: float, device: torch.device) -> None:
        self._sums, self._scale, self.device = sums, scale, device

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def count(self) -> int:
        """Gradient rows that they are of, ``N``."""
        return round(1 / self._scale)

    @property
    def diagonal(self) -> Tensor:
        """``(K, B)``, what tells whether two passes saw the same gradients."""
        return self._sums.diagonal() * self._scale

    @property
    def triangles(self) -> tuple[Tensor, float] | None:
        """``(K, B (B + 1) / 2)`` in the order of `lightning_cap.kernels.cpu.packed`, and the factor to scale it with; None if the
        blocks are not kept so."""
        sums = self._sums
        cpu = self.device.type == sums.device.type == "cpu"
        return (sums.sums, self._scale) if cpu and isinstance(sums, _PackedSums) else None

    def __getitem__(self, index: Tensor) -> Tensor:
        """``(k,)`` int64 -> ``(k, B, B)`` float32 on `device`."""
        taken = self._sums.take(index.to(self._sums.device), self._scale)
        return taken.to(self.device, non_blocking=taken.is_pinned()) if taken.device != self.device else taken


class EmpiricalFisher:
    """Accumulates gradient rows into Fisher blocks.

    Rows are buffered and all blocks are updated by one batched product for every ``row_chunk`` of them, so the sums are
    formed in the same order whatever the sizes of the chunks that arrive.

    Args:
        layout: Block view of the targets.
        device: Where the rows are and the finished blocks are wanted.
        row_chunk: RowBuffer in one update, a fixed setting (results depend on it by rounding).
        storage: Full blocks or lower triangles.
        storage_device: Where the sums are kept. Default: ``device``. The CPU for a GPU's rows: they are copied to pinned memory and
            added up there while the next ones are computed.
        shares: ``(K_r,)`` rising indices of the blocks that each rank ``r`` holds. Rows are sent to the ranks that hold their
            blocks, and added up there in global order: that of the calls of `update`, and of the ranks in each. Then every rank
            must call `update` and `finish` equally often, with rows of its own samples. Default: this process holds all.
        allow_tf32: Let a GPU round the rows to TF32 in products (ten bits of mantissa).
        shrinkage: How far the correlations of each block are shrunk towards those of its layer, in [0, 1]. See
            `lightning_cap.fisher.shrinkage`.

    Raises:
        ConfigError: An argument is out of range.

    Attributes:
        count: RowBuffer taken in so far, ``N``, of all ranks.
    """

    def __init__(
        self,
        layout: BlockLayout,
        device: torch.device,
        row_chunk: int = ROW_CHUNK,
        storage: Storage = "auto",
        storage_device: torch.device | None = None,
        shares: Sequence[Tensor] | None = None,
        allow_tf32: bool = False,
        shrinkage: float = 0.0,
    ) -> None:
        require_instance("layout", layout, BlockLayout, "targets.blocks(192)")
        require_instance("device", device, torch.device, "torch.device('cpu')")
        require_instance("storage_device", storage_device, torch.device, "torch.device('cpu')", optional=True)
        require_counts(row_chunk=row_chunk)
        require_choice("storage", storage, get_args(Storage))
        require_flag("allow_tf32", allow_tf32)
        require_real("shrinkage", shrinkage, "[0, 1]", example=0.5)
        self.count = 0
        self._layout, self._device, self._shrinkage = layout, device, shrinkage
        self._shares = [Selection(layout, share) for share in shares] if shares else [Selection(layout)]
        self._selection = self._shares[distributed.rank() if len(self._shares) > 1 else 0]
        storage_device = storage_device or device
        if storage_device != device:
            storage = "packed"  # added up by a thread of its own, which must not touch torch's settings
        self._together = len(self._shares) > 1 or isinstance(layout, OwnLayout)  # whether others have other blocks
        self._sums = self._make_sums(storage, storage_device, allow_tf32)
        shape = (row_chunk, len(self._selection), layout.block_size)
        self._rows: RowBuffer = (
            DirectRowBuffer(shape, storage_device) if storage_device == device else StagedRowBuffer(shape, device)
        )

    def _make_sums(self, storage: Storage, storage_device: torch.device, allow_tf32: bool) -> BlockSums:
        make = _PackedSums if resolve_storage(storage, storage_device) == "packed" else _FullSums
        return make(len(self._selection), self._layout.block_size, storage_device, allow_tf32)

    @torch.no_grad()
    def update(self, chunk: Mapping[str, Tensor]) -> None:
        """Take in ``{target name: (n, *weight.shape)}`` gradient rows of any float dtype.

        Raises:
            GradientError: A target is missing in the chunk or its rows do not have the weight's shape.
        """
        check_rows(chunk, self._layout.shapes, {name for share in self._shares for name in share.names})
        n = next(iter(chunk.values())).shape[0]
        if len(self._shares) > 1:
            for rows in self._exchange(chunk, n):
                self._rows.append(len(rows), _copier(rows), self._sums.add)
                self.count += len(rows)
        else:
            self._rows.append(n, lambda out, first: self._fill(out, chunk, first), self._sums.add)
            self.count += n

    def _exchange(self, chunk: Mapping[str, Tensor], n: int) -> list[Tensor]:
        """This rank's blocks of the rows of every rank, ``(n_r, K_r, B)`` in order of rank."""
        B, device = self._layout.block_size, next(iter(chunk.values())).device
        parts = [torch.empty(n, len(share), B, device=device) for share in self._shares]
        for part, share in zip(parts, self._shares, strict=True):
            share.fill(part, chunk)
        counts = distributed.gather_counts(n, device)
        received = distributed.exchange(parts, [count * len(self._selection) * B for count in counts])
        return [rows.view(count, len(self._selection), B) for rows, count in zip(received, counts, strict=True)]

    def _fill(self, out: Tensor, chunk: Mapping[str, Tensor], first: int) -> None:
        """Rows ``first, first + 1, ...`` of the chunk into ``out`` ``(n, K', B)``."""
        last = first + out.shape[0]
        self._selection.fill(out, {name: chunk[name][first:last] for name in self._selection.names})

    def finish(self) -> FisherBlocks:
        """The Fisher blocks, float32, symmetric, without damp. Ends the accumulation.

        Raises:
            GradientError: No gradient row was taken in, or one was not finite or too large to be squared in float32.
        """
        self._rows.flush(self._sums.add)
        del self._rows
        with distributed.raise_on_all_ranks("Adding up the Fisher") if self._together else nullcontext():
            self._check()
        if self._shrinkage and isinstance(self._sums, Shrinkable):
            with full_float32():
                among = self._device if self._together else None
                shrink_blocks(self._sums, self._layout, self._selection, self._shrinkage, among)
        return FisherBlocks(self._sums, 1 / self.count, self._device)

    def _check(self) -> None:
        check_any_rows([self.count])
        bad = self._selection.blocks[~torch.isfinite(self._sums.diagonal()).all(-1).cpu()]
        if len(bad):
            bad_names = [n for n, span in self._layout.spans.items() if ((bad >= span.start) & (bad < span.stop)).any()]
            raise GradientError(
                f"gradients: those of {len(bad_names)} targets, first {bad_names[0]!r}, are not finite, or their squares are "
                "beyond float32. Leave non-finite samples out, or scale the loss down."
            )


def _copier(rows: Tensor) -> Fill:
    def fill(out: Tensor, first: int) -> None:
        out.copy_(rows[first : first + len(out)])

    return fill


def resolve_storage(storage: Storage, storage_device: torch.device) -> Literal["full", "packed"]:
    """What ``"auto"`` means on a device."""
    if storage == "auto":
        return "packed" if storage_device.type == "cpu" else "full"
    return storage


def fisher_bytes(num_blocks: int, block_size: int, storage: Storage, storage_device: torch.device) -> int:
    """Memory of the sums: ``d·B·4`` bytes, or a little more than half of it if packed."""
    packed = resolve_storage(storage, storage_device) == "packed"
    return 4 * num_blocks * (block_size * (block_size + 1) // 2 if packed else block_size**2)


def update_bytes(num_blocks: int, block_size: int, storage: Storage, storage_device: torch.device) -> int:
    """Temporary memory of an update beyond the row buffer."""
    if storage_device.type == "cpu" or resolve_storage(storage, storage_device) == "full":
        return 0
    return 2 * 4 * min(num_blocks, max(1, _TEMPORARY_FLOATS // block_size**2)) * block_size**2


class BlockSums(ABC):
    """``Σ g gᵀ`` of ``K'`` blocks."""

    device: torch.device

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Add ``(n, K', B)`` float32 rows on the same device."""

    @abstractmethod
    def take(self, index: Tensor, scale: float) -> Tensor:
        """``scale`` times some blocks, ``(k, B, B)``, full and symmetric."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``(K', B)``."""


class _FullSums(BlockSums, Shrinkable):
    def __init__(self, num_blocks: int, block_size: int, device: torch.device, allow_tf32: bool) -> None:
        self._sums = torch.zeros(num_blocks, block_size, block_size, device=device)
        self._tf32, self.device = allow_tf32, device

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, rows: Tensor) -> None:
        columns = rows.transpose(0, 1)  # (K', n, B)
        with full_float32(allow_tf32=self._tf32):
            self._sums.baddbmm_(columns.transpose(1, 2), columns)

    def take(self, index: Tensor, scale: float) -> Tensor:
        blocks = self._sums[index].mul_(scale / 2)
        return blocks + blocks.mT  # products round their two triangles differently

    def diagonal(self) -> Tensor:
        return self._sums.diagonal(dim1=-2, dim2=-1)

    def pool(self, index: Tensor) -> Tensor:
        total = torch.zeros(self._sums.shape[1:], dtype=torch.float64, device=self.device)
        return sum((self._sums[some].sum(0, dtype=torch.float64) for some in _some_of(index, self._sums)), total)

    def shrink(self, index: Tensor, pooled: Tensor, share: float) -> None:
        i = torch.arange(pooled.shape[0], device=self.device)
        target = correlations(pooled, i.unsqueeze(1), i, pooled.diagonal()).float().fill_diagonal_(1.0)
        for some in _some_of(index, self._sums):
            blocks = self._sums[some]
            root = blocks.diagonal(dim1=-2, dim2=-1).sqrt()
            self._sums[some] = blocks.lerp_(target * root.unsqueeze(2) * root.unsqueeze(1), share)


class _PackedSums(BlockSums, Shrinkable):
    """Triangles, ``(K', B (B + 1) / 2)``; in the order of `lightning_cap.kernels.cpu.packed` on the CPU."""

    def __init__(self, num_blocks: int, block_size: int, device: torch.device, allow_tf32: bool) -> None:
        self._block_size, self._tf32, self.device = block_size, allow_tf32, device
        self.sums = torch.zeros(num_blocks, block_size * (block_size + 1) // 2, device=device)

    def __len__(self) -> int:
        return len(self.sums)

    def add(self, rows: Tensor) -> None:
        if self.device.type == "cpu":
            from lightning_cap.kernels.cpu.packed import accumulate_blocks

            packed, given = self.sums.numpy(), rows.numpy()
            over_blocks(lambda first, last: accumulate_blocks(packed, given, first, last), len(self))
            return
        lower = torch.tril_indices(self._block_size, self._block_size, device=self.device)
        columns = rows.transpose(0, 1)
        with full_float32(allow_tf32=self._tf32):
            size = max(1, _TEMPORARY_FLOATS // self._block_size**2)
            for sums, some in zip(self.sums.split(size), columns.split(size), strict=True):
                sums += torch.bmm(some.transpose(1, 2), some)[:, lower[0], lower[1]]

    def take(self, index: Tensor, scale: float) -> Tensor:
        B = self._block_size
        if self.device.type == "cpu":
            from lightning_cap.kernels.cpu.packed import unpack_blocks

            out = torch.empty(len(index), B, B)
            packed, chosen, full = self.sums.numpy(), index.numpy(), out.numpy()
            over_blocks(lambda first, last: unpack_blocks(packed, chosen, scale, full, first, last), len(index))
            return out
        i = torch.arange(B, device=self.device)
        high, low = torch.maximum(i, i.unsqueeze(1)), torch.minimum(i, i.unsqueeze(1))
        return self.sums[index][:, high * (high + 1) // 2 + low].mul_(scale)

    def diagonal(self) -> Tensor:
        diagonal = self._on_diagonal(self.sums)
        return diagonal.flip(-1) if self.device.type == "cpu" else diagonal

    def pool(self, index: Tensor) -> Tensor:
        total = torch.zeros(self.sums.shape[1], dtype=torch.float64, device=self.device)
        if self.device.type == "cpu":
            from lightning_cap.kernels.cpu.shrink import pool_triangles

            packed, chosen, out = self.sums.numpy(), index.numpy(), total.numpy()
            over_blocks(lambda first, last: pool_triangles(packed, chosen, out, first, last), len(total))
            return total
        return sum((self.sums[some].sum(0, dtype=torch.float64) for some in _some_of(index, self.sums)), total)

    def shrink(self, index: Tensor, pooled: Tensor, share: float) -> None:
        B = self._block_size
        rows, columns = torch.tril_indices(B, B, device=self.device)
        target = correlations(pooled, rows, columns, self._on_diagonal(pooled)).float()
        if self.device.type == "cpu":
            from lightning_cap.kernels.cpu.shrink import shrink_triangles

            packed, chosen, goal = self.sums.numpy(), index.numpy(), target.numpy()
            over_blocks(lambda first, last: shrink_triangles(packed, chosen, goal, share, first, last), len(index))
            return
        target[rows == columns] = 1.0
        for some in _some_of(index, self.sums):
            root = self._on_diagonal(self.sums[some]).sqrt()
            self.sums[some] = self.sums[some].lerp_(target * root[:, rows] * root[:, columns], share)

    def _on_diagonal(self, triangles: Tensor) -> Tensor:
        """The entries on the diagonal, in the order of the triangle's rows."""
        i = torch.arange(self._block_size, device=triangles.device)
        return triangles[..., i * (i + 3) // 2]


def _some_of(index: Tensor, sums: Tensor) -> Sequence[Tensor]:
    """The index of blocks in parts that are pooled or shrunk at a time."""
    parts: Sequence[Tensor] = index.to(sums.device).split(max(1, _POOLED_FLOATS // sums.shape[1:].numel()))
    return parts
