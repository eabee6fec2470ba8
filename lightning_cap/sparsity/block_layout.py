"""`BlockLayout`: the targets' weights as ``(K, B)`` blocks, each of ``B`` consecutive weights of one target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_cap.errors import ConfigError, TargetError
from lightning_cap.utilities.arguments import require_flag, require_instance, require_whole


@dataclass(frozen=True)
class BlockLayout:
    """The weights of all targets as ``K`` blocks of ``B`` consecutive weights, shape ``(K, B)``.

    A block never spans two targets; the last block of a target is padded, and padding is never eligible. With
    ``group_size`` > 1 (N:M), a target is flattened with its input dimension (dim 1) last, ``(O, I)`` or
    ``(O, kH, kW, I)``, so that groups lie along the input of one output row, at one kernel position.

    Args:
        shapes: Shape of each target, in order.
        block_size: ``B``.
        group_size: Weights in one group of the pattern, 1 for none.
        by_row: No block spans two output rows (dim 0) either: the last block of every row is padded.

    Raises:
        ConfigError: ``block_size`` is not a whole number of at least 1, or not a multiple of ``group_size``.
        TargetError: A target's input dimension is not divisible by ``group_size``.
    """

    shapes: Mapping[str, tuple[int, ...]]
    block_size: int
    group_size: int = 1
    by_row: bool = False

    def __post_init__(self) -> None:
        require_instance("shapes", self.shapes, Mapping, '{"fc.weight": (10, 64)}')
        require_whole("block_size", self.block_size, example=192)
        require_whole("group_size", self.group_size)
        require_flag("by_row", self.by_row)
        if self.block_size % self.group_size:
            raise ConfigError(
                f"block_size={self.block_size} is not a multiple of the pattern's group of {self.group_size}. Try "
                f"{max(1, self.block_size // self.group_size) * self.group_size}."
            )
        if self.group_size > 1:
            for name, shape in self.shapes.items():
                if len(shape) < 2 or shape[1] % self.group_size:
                    raise TargetError(
                        f"target {name!r} of shape {shape} has an input dimension (dim 1) that is not divisible by the "
                        f"pattern's group of {self.group_size}. Leave it out with exclude=[{name!r}]."
                    )

    @property
    def spans(self) -> dict[str, slice]:
        """Target name -> its range of blocks."""
        spans, first = {}, 0
        for name, shape in self.shapes.items():
            count = self._blocks_of(shape)
            spans[name] = slice(first, first + count)
            first += count
        return spans

    @property
    def num_blocks(self) -> int:
        """``K``."""
        return sum(self._blocks_of(shape) for shape in self.shapes.values())

    def _blocks_of(self, shape: tuple[int, ...]) -> int:
        if not self.by_row:
            return -(-_numel(shape) // self.block_size)
        return shape[0] * -(-_numel(shape[1:]) // self.block_size)

    @property
    def sizes(self) -> dict[str, int]:
        """Target name -> number of its weights."""
        return {name: _numel(shape) for name, shape in self.shapes.items()}

    def pack(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> Tensor:
        """``{name: (*shape)}`` -> ``(K, B)``; padding is zero (False)."""
        return self.pack_rows({name: t.unsqueeze(0) for name, t in tensors.items()}, dtype, device)[0]

    def pack_rows(
        self, rows: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> Tensor:
        """``{name: (n, *shape)}`` -> ``(n, K, B)``; padding is zero (False)."""
        first = next(iter(rows.values()))
        packed = torch.zeros(
            first.shape[0], self.num_blocks, self.block_size, dtype=dtype, device=device or first.device
        )
        Selection(self).fill(packed, rows)
        return packed

    def unpack(self, blocks: Tensor) -> dict[str, Tensor]:
        """``(K, B)`` -> ``{name: (*shape)}``, contiguous copies in the targets' own order."""
        out = {}
        for name, span in self.spans.items():
            shape = self.shapes[name]
            flat = blocks[span].reshape(-1)[: _numel(shape)]
            if self.by_row:
                flat = blocks[span].reshape(shape[0], -1)[:, : _numel(shape[1:])].reshape(-1)
            out[name] = self._from_layout(flat, shape)
        return out

    def valid(self, device: torch.device | str | None = None) -> Tensor:
        """``(K, B)`` bool, False on padding."""
        ones = {name: torch.ones(shape, dtype=torch.bool, device=device) for name, shape in self.shapes.items()}
        return self.pack(ones, torch.bool, device)

    def _to_layout(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``(n, *shape)`` in the order of the blocks, each row of it padded if need be."""
        rows = rows.movedim(2, -1) if self.group_size > 1 and len(shape) > 2 else rows
        if self.by_row:
            rows = rows.flatten(2) if rows.dim() > 2 else rows.unsqueeze(-1)
            rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % self.block_size))
        return rows

    def _from_layout(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.group_size > 1 and len(shape) > 2:
            moved = (shape[0], *shape[2:], shape[1])
            return flat.reshape(moved).movedim(-1, 1).clone(memory_format=torch.contiguous_format)
        return flat.reshape(shape).clone()


class Selection:
    """Some blocks of a layout, in order: those that are alive, those of one pass, or one process's share.

    Args:
        layout: The whole.
        blocks: ``(K',)`` rising indices of blocks. Default: all.

    Attributes:
        blocks: ``(K',)`` int64, on the CPU.
        names: The targets that have a block among them.
    """

    def __init__(self, layout: BlockLayout, blocks: Tensor | None = None) -> None:
        self.layout = layout
        self.blocks = torch.arange(layout.num_blocks) if blocks is None else blocks.cpu()
        self._parts: list[tuple[str, slice, Tensor]] = []
        for name, span in layout.spans.items():
            first, last = torch.searchsorted(self.blocks, torch.tensor([span.start, span.stop])).tolist()
            if last > first:
                self._parts.append((name, slice(first, last), self.blocks[first:last] - span.start))
        self.names = [name for name, _, _ in self._parts]

    def __len__(self) -> int:
        return len(self.blocks)

    def fill(self, out: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Write ``{name: (n, *shape)}`` into ``out`` ``(n, K', B)`` in the block view; padding becomes zero."""
        B = self.layout.block_size
        for name, place, blocks in self._parts:
            flat = self.layout._to_layout(rows[name], self.layout.shapes[name]).flatten(1)
            whole, rest = divmod(flat.shape[1], B)
            body = flat[:, : whole * B].unflatten(1, (whole, B))
            tail = rest > 0 and int(blocks[-1]) == whole
            full = len(blocks) - tail
            if full:
                source = body if full == whole else body[:, blocks[:full].to(body.device)]
                _copy(out[:, place.start : place.start + full], source)
            if tail:
                _copy(out[:, place.stop - 1, :rest], flat[:, whole * B :])
                out[:, place.stop - 1, rest:] = 0


def _copy(out: Tensor, source: Tensor) -> None:
    """``out[:] = source``. On the CPU the calling thread does it: torch's own threads wait for one another after every copy, which
    costs a slice of time for each target of each row where the cores are busy."""
    if out.device.type == source.device.type == "cpu" and out.dtype == source.dtype == torch.float32:
        np.copyto(out.numpy(), source.detach().numpy())
    else:
        out[:] = source


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
