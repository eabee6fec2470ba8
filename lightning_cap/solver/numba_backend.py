"""The compiled CPU backend: `lightning_cap.kernels.cpu` on torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cap.kernels.cpu.threads import over_blocks
from lightning_cap.solver import linalg


def solve_numba(
    fisher: Any,
    blocks: Tensor,
    weights: Tensor,
    alive: Tensor,
    damp: Tensor,
    group: int,
    keep: int,
    together: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor and eliminate blocks on the CPU; see `lightning_cap.solver.backend.Solve`."""
    from lightning_cap.kernels.cpu.obs import solve_blocks

    k, B = weights.shape
    rank = torch.full((k, B), B, dtype=torch.int32)
    losses = torch.full((k, B), torch.inf)
    well_conditioned = torch.zeros(k, dtype=torch.bool)
    kind = torch.empty(1, dtype=dtype).numpy()
    condition = linalg.FLOAT32_CONDITION if dtype == torch.float32 else linalg.FLOAT64_CONDITION
    given = (*_triangles(fisher, blocks), *(t.contiguous().numpy() for t in (weights.to(dtype), alive, damp)))
    taken = tuple(t.numpy() for t in (rank, losses, well_conditioned))
    over_blocks(
        lambda first, last: solve_blocks(*given, group, keep, together, condition, kind, *taken, first, last), k
    )
    return rank, losses, well_conditioned


def reconstruct_numba(
    fisher: Any, blocks: Tensor, weights: Tensor, alive: Tensor, pruned: Tensor, damp: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``F_SS⁻¹ F_SQ w_Q`` of each block, ``(k, B)`` in ``dtype``, zero elsewhere, and which were solved ``(k,)``; on the CPU."""
    from lightning_cap.kernels.cpu.obs import reconstruct_blocks

    out, solved = torch.zeros(weights.shape, dtype=dtype), torch.zeros(len(weights), dtype=torch.bool)
    kind = torch.empty(1, dtype=dtype).numpy()
    tensors = weights.to(dtype), alive, pruned, damp
    given = (*_triangles(fisher, blocks), *(t.contiguous().numpy() for t in tensors))
    taken = out.numpy(), solved.numpy()
    over_blocks(lambda first, last: reconstruct_blocks(*given, kind, *taken, first, last), len(weights))
    return out, solved


def _triangles(fisher: Any, blocks: Tensor) -> tuple[Any, Any, float]:
    """Triangles, which of them are meant, and their scale: where they are, if they are packed, else packed now."""
    kept = getattr(fisher, "triangles", None)
    if kept is not None:
        places = fisher.places[blocks] if hasattr(fisher, "places") else blocks
        return kept[0].numpy(), places.numpy(), kept[1]
    return pack_triangles(fisher[blocks]).numpy(), torch.arange(len(blocks)).numpy(), 1.0


def pack_triangles(blocks: Tensor) -> Tensor:
    """``(k, B, B)`` float32 -> ``(k, B (B + 1) / 2)``, their triangles as the compiled code takes them."""
    from lightning_cap.kernels.cpu.packed import pack_blocks

    k, B, _ = blocks.shape
    full, packed = blocks.contiguous().numpy(), torch.empty(k, B * (B + 1) // 2)
    over_blocks(lambda first, last: pack_blocks(full, packed.numpy(), first, last), k)
    return packed
