"""The kept weights of every block once its pruned set is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.solver.backend import Backend, Blocks, check_blocks, choose_backend, chunk_blocks
from lightning_cap.solver.damping import solve_with_damping
from lightning_cap.solver.linalg import restrict, spd_solve
from lightning_cap.solver.numba_backend import reconstruct_numba
from lightning_cap.utilities.memory import in_chunks
from lightning_cap.utilities.precision import full_float32


def reconstruct(
    fisher: Blocks,
    weights: Tensor,
    alive: Tensor,
    pruned: Tensor,
    damp: Tensor,
    use_float64: Tensor,
    backend: Backend = "auto",
    chunk: int | None = None,
) -> Tensor:
    """``w'_S = w_S + F_SS⁻¹ F_SQ w_Q`` in one solve per block, ``S`` kept and ``Q`` pruned.

    The minimiser of equation 4 for a given ``Q``, equal to the sequential updates of equation 2 in exact arithmetic. Only
    ``F_SS`` is factored: blocks that keep about as many weights are solved together.

    Args:
        fisher: ``(K, B, B)`` float32 without damp: a tensor, or anything that gives some blocks for ``fisher[index]``.
        weights: ``(K, B)`` float32 or float64.
        alive: ``(K, B)`` bool, eligible before pruning.
        pruned: ``(K, B)`` bool, a subset of ``alive``.
        damp: ``(K,)`` float64.
        use_float64: ``(K,)`` bool, solve this block in float64.
        backend: As in `eliminate`; there is no triton code for this, torch takes its place.
        chunk: Blocks at a time; halved when memory runs out.

    Returns:
        ``(K, B)``, dtype of ``weights``: zero where pruned or never alive, the input bit for bit in blocks with nothing
        pruned.

    Raises:
        ConfigError: The backend cannot run here, or an argument is something else.
    """
    check_blocks(weights, chunk, alive=alive, pruned=pruned)
    kept = alive & ~pruned
    result = torch.where(kept, weights, 0.0)
    counts = kept.sum(-1)
    touched = pruned.any(-1) & (counts > 0)
    size = chunk or chunk_blocks(weights.shape[1], weights.device)
    compiled = choose_backend(backend, weights.device) == "numba"

    solve = reconstruct_numba if compiled else _reconstruct_torch

    def attempt(blocks: Tensor, damp: Tensor, dtype: torch.dtype) -> Tensor:
        shift, solved = solve(fisher, blocks, weights[blocks], alive[blocks], pruned[blocks], damp, dtype)
        moved = torch.where(kept[blocks], weights[blocks] + shift, 0.0).to(result.dtype)
        result[blocks[solved]] = moved[solved]
        return solved

    def work(blocks: Tensor) -> None:
        # the whole block did factor with its damp: only rounding, or other gradients, ask for more
        dtype = torch.float64 if bool(use_float64[blocks[0]]) else torch.float32
        solve_with_damping(blocks, damp[blocks], dtype, attempt)

    with full_float32():
        for choice in (touched & ~use_float64, touched & use_float64):
            blocks = choice.nonzero().squeeze(1)
            in_chunks(blocks[counts[blocks].argsort(stable=True)], size, work)
    return result


def _reconstruct_torch(
    fisher: Blocks, blocks: Tensor, weights: Tensor, alive: Tensor, pruned: Tensor, damp: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The change of the kept weights, zero elsewhere; blocks of about as many kept weights, padded to the most."""
    kept = alive & ~pruned
    size = int(kept.sum(-1).max())
    places = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :size]  # (k, size)
    real = kept.gather(1, places)
    removed = torch.where(pruned, weights, 0.0).to(dtype).unsqueeze(-1)
    matrix = fisher[blocks]
    rows = matrix.gather(1, places.unsqueeze(-1).expand(-1, -1, matrix.shape[2])).to(dtype)  # (k, size, B)
    rhs = torch.bmm(rows, removed).squeeze(-1).masked_fill_(~real, 0.0)
    matrix = rows.gather(2, places.unsqueeze(1).expand(-1, size, -1))
    matrix, roots = restrict(matrix, real, damp)
    shift, solved = spd_solve(matrix, rhs / roots)
    return torch.zeros_like(weights, dtype=dtype).scatter_(1, places, shift / roots), solved
