"""The blocks of sharded targets: each process owns those that begin in the rows that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.sharded import as_shard, local, shard_ranges


@dataclass(frozen=True, eq=False)
class OwnLayout(BlockLayout):
    """The blocks that this process owns, as a layout of their own: each target is the flat piece that its blocks cover.

    Args:
        whole: The layout of all blocks.
        positions: ``(K_r,)`` rising indices of the blocks in it.
    """

    whole: BlockLayout = None  # type: ignore[assignment]
    positions: Tensor = None  # type: ignore[assignment]


class BlockShards:
    """Moves weights, masks and gradient rows between the processes that hold them and those that own their blocks.

    The block of the whole flattened target, which does not depend on the number of processes, belongs to the one that holds its
    first weight. What that one lacks of its last block, less than a block for each target, it gets from the next ones; nothing
    else of weights is sent. Every process must make this, and call its methods, with the same targets.

    Args:
        targets: Sharded ones.
        layout: Their block view.

    Attributes:
        own: The layout of the blocks that this process owns.

    Raises:
        ConfigError: An argument is something else.
    """

    def __init__(self, targets: Targets, layout: BlockLayout) -> None:
        require_targets(targets)
        require_instance("layout", layout, BlockLayout, "targets.blocks(192)")
        if not targets.is_sharded:
            raise ConfigError(
                f"targets={shown(targets)}: they are not sharded. Give those of a model after fully_shard."
            )
        self.layout = layout
        self._targets, self._rank = targets, distributed.rank()
        self._held: dict[str, list[range]] = {}  # what each process holds, in the order of the layout with its padding
        self._owned: dict[str, list[range]] = {}  # and what its blocks cover
        positions = []
        B, spans = layout.block_size, layout.spans
        for name, weight in targets.items():
            shape = layout.shapes[name]
            row = torch.Size(shape[1:]).numel()
            padded = -(-row // B) * B if layout.by_row else row
            held = [range(r.start // row * padded, r.stop // row * padded) for r in shard_ranges(weight)]
            blocks = [range(-(-r.start // B), -(-r.stop // B)) for r in held]
            self._held[name] = held
            self._owned[name] = [range(r.start * B, min(r.stop * B, shape[0] * padded)) for r in blocks]
            mine = blocks[self._rank]
            positions.append(torch.arange(mine.start, mine.stop) + spans[name].start)
        shapes = {name: (len(owned[self._rank]),) for name, owned in self._owned.items()}
        self.own = OwnLayout(shapes, B, whole=layout, positions=torch.cat(positions))

    def pack(self, values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``{target: (*shape), sharded}`` -> ``(K_r, B)``, the blocks that this process owns; padding is zero (False)."""
        carrier = torch.uint8 if dtype == torch.bool else dtype
        flat = {name: self._flat(name, local(values[name]).unsqueeze(0)).squeeze(0).to(carrier) for name in self._held}
        parts: list[list[Tensor]] = [[] for _ in range(distributed.world_size())]
        for name, piece in flat.items():
            for rank, some in self._lent(name, self._rank).items():
                parts[rank].append(_cut(piece, some, self._held[name][self._rank].start))
        lent = self._exchange(parts, lambda name, rank: self._lent(name, rank).get(self._rank, range(0)), carrier)
        pieces = {}
        for name, piece in flat.items():
            mine = _overlap(self._held[name][self._rank], self._owned[name][self._rank])
            pieces[name] = torch.cat([_cut(piece, mine, self._held[name][self._rank].start), *lent[name]])
        return self.own.pack(pieces, carrier, self._targets.device).to(dtype)

    def unpack(self, blocks: Tensor) -> dict[str, Tensor]:
        """``(K_r, B)`` -> ``{target: (*shape), sharded}``, contiguous copies."""
        carrier = blocks.to(torch.uint8) if blocks.dtype == torch.bool else blocks
        pieces = self.own.unpack(carrier)
        parts: list[list[Tensor]] = [[] for _ in range(distributed.world_size())]
        for name, piece in pieces.items():
            start = self._owned[name][self._rank].start
            for rank in range(self._rank + 1, len(parts)):
                some = self._lent(name, rank).get(self._rank, range(0))
                parts[rank].append(_cut(piece, some, start))
        lent = self._exchange(parts, lambda name, rank: self._lent(name, self._rank).get(rank, range(0)), carrier.dtype)
        out = {}
        for name, piece in pieces.items():
            held, owned = self._held[name][self._rank], self._owned[name][self._rank]
            flat = torch.cat([*lent[name], _cut(piece, _overlap(held, owned), owned.start)])
            weight = self._targets[name]
            shape = tuple(local(weight).shape)
            if self.layout.by_row:
                flat = flat.view(shape[0], len(held) // max(1, shape[0]))[:, : torch.Size(shape[1:]).numel()].reshape(
                    -1
                )
            out[name] = as_shard(self.layout._from_layout(flat, shape).to(blocks.dtype), weight)
        return out

    def exchange(self, name: str, rows: Tensor, counts: list[int]) -> Tensor:
        """Gradient rows of whole weights to the owners of their blocks, in float32.

        Args:
            name: Of the target.
            rows: ``(n, *shape)``, of this process's samples.
            counts: ``n`` of each process.

        Returns:
            ``(sum(counts), k)``, of the rows of all processes, in order of rank, what this one's blocks cover.
        """
        flat = self._flat(name, rows.float())
        owned = self._owned[name]
        own = len(owned[self._rank])
        received = distributed.exchange([flat[:, r.start : r.stop] for r in owned], [own * count for count in counts])
        return torch.cat([part.view(count, own) for part, count in zip(received, counts, strict=True)])

    def _flat(self, name: str, rows: Tensor) -> Tensor:
        """``(n, *shape)``, of some output rows or all, in the order of the layout: ``(n, weights)``."""
        return self.layout._to_layout(rows, self.layout.shapes[name]).flatten(1)

    def _lent(self, name: str, rank: int) -> dict[int, range]:
        """What a process holds of a block that another one owns, by that one's rank: the beginning of its part, if anything."""
        held, owned = self._held[name][rank], self._owned[name][rank]
        head = range(held.start, min(owned.start, held.stop)) if len(owned) else held
        if not len(head):
            return {}
        return {next(r for r, other in enumerate(self._owned[name]) if head.start in other): head}

    def _exchange(
        self, parts: list[list[Tensor]], coming: Callable[[str, int], range], dtype: torch.dtype
    ) -> dict[str, list[Tensor]]:
        """Send each process its pieces; gives what came for each target, in order of rank. ``coming``: its part."""
        empty = torch.empty(0, dtype=dtype, device=self._targets.device)
        lengths = [{name: len(coming(name, rank)) for name in self._held} for rank in range(len(parts))]
        received = distributed.exchange(
            [torch.cat([empty, *some]) for some in parts], [sum(sizes.values()) for sizes in lengths]
        )
        found: dict[str, list[Tensor]] = {name: [] for name in self._held}
        for flat, sizes in zip(received, lengths, strict=True):
            for name, piece in zip(sizes, flat.split(list(sizes.values())), strict=True):
                found[name].append(piece)
        return found


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))


def _cut(piece: Tensor, some: range, start: int) -> Tensor:
    """The entries ``some`` of a flat piece whose first entry is number ``start``."""
    return piece[some.start - start : some.stop - start] if len(some) else piece[:0]
