"""Which code solves the blocks, and how many at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.solver.groups import eliminate_groups
from lightning_cap.solver.linalg import restrict, spd_inverse
from lightning_cap.solver.numba_backend import solve_numba
from lightning_cap.solver.torch_backend import eliminate_left_looking
from lightning_cap.solver.triton_backend import eliminate_triton, unavailable
from lightning_cap.sparsity.patterns import Pattern
from lightning_cap.utilities.arguments import require_choice, require_whole, shown

#: Code of the solver; ``"auto"`` takes numba on the CPU, triton on CUDA where it is installed, else torch.
Backend = Literal["auto", "torch", "numba", "triton"]

#: ``solve(fisher, blocks, weights, alive, damp, dtype)`` -> ``(rank, losses, well_conditioned)``: factors and eliminates
#: ``fisher[blocks]`` in ``dtype``; ``weights``, ``alive`` ``(k, B)`` and ``damp`` ``(k,)`` are those of these blocks.
#: ``rank`` is ``(k, B)`` int, ``B`` for weights that are never pruned; ``losses`` ``(k, B)``, infinite past a block's last step;
#: ``well_conditioned`` ``(k,)``, False for blocks that cannot be trusted in that dtype, whose other outputs mean nothing.
Solve = Callable[["Blocks", Tensor, Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor, Tensor]]

#: ``eliminate(inverse, floor, weights, alive)`` -> ``(rank, losses)``, from the inverses of blocks that can be trusted.
Eliminate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_CPU_FLOATS = 2**22  # of (k, B, B) in one chunk: stays in the last-level cache
_LARGE_FLOATS = 2**26  # enough programs to fill the device a few times over


class Blocks(Protocol):
    """Fisher blocks by index: a ``(K, B, B)`` tensor, or `lightning_cap.fisher.blocks.FisherBlocks`."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """``(k,)`` int64 -> ``(k, B, B)`` float32."""


def check_blocks(weights: object, chunk: int | None, **masks: object) -> None:
    """Refuse blocks that do not fit together.

    Args:
        weights: ``(K, B)``.
        chunk: Blocks at a time, or None.
        masks: ``(K, B)`` bool, by the names of their arguments.

    Raises:
        ConfigError: One is something else; it is named.
    """
    if not isinstance(weights, Tensor) or weights.dim() != 2 or not weights.is_floating_point():
        raise ConfigError(f"weights={shown(weights)}: give a floating-point tensor (K, B), a row for each block.")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weights.shape:
            raise ConfigError(
                f"{name}={shown(mask)}: give a bool tensor of the shape of weights, {tuple(weights.shape)}."
            )
    if chunk is not None:
        require_whole("chunk", chunk, example=64)


def chunk_blocks(block_size: int, device: torch.device, *, packed: bool = False) -> int:
    """Blocks that are solved at a time; more of ``packed`` ones on the CPU, which are solved where they are."""
    large = packed or device.type != "cpu"
    return max(1, (_LARGE_FLOATS if large else _CPU_FLOATS) // block_size**2)


def work_bytes(backend: Backend, block_size: int, chunk: int, *, packed: bool) -> int:
    """Peak memory of a chunk of blocks in the solver, with a resolved ``backend``.

    The compiled CPU code works on packed blocks where they are, in a scratch for each thread. Torch and triton hold the
    matrices, factors, inverses and temporaries of the chunk, all of them in float64 if need be.
    """
    if backend == "numba":
        scratch = torch.get_num_threads() * 2 * 8 * (block_size + 64) ** 2
        return scratch + (0 if packed else 6 * chunk * block_size**2)
    return 56 * chunk * block_size**2


def choose_backend(
    backend: Backend, device: torch.device, pattern: Pattern | None = None
) -> Literal["torch", "numba", "triton"]:
    """Resolve ``"auto"`` and refuse what cannot run. Without a pattern there is none to be known.

    Raises:
        ConfigError: The backend cannot run on ``device``, or does not know ``pattern``.
    """
    require_choice("backend", backend, get_args(Backend))
    known = pattern is None or pattern.kept_in_group is not None
    groups = pattern is not None and pattern.whole_groups
    if backend == "auto":
        if device.type == "cpu":
            return "numba" if known or groups else "torch"
        return "triton" if known and unavailable(device) is None else "torch"
    if backend != "torch" and not known and not (groups and backend == "numba"):
        raise ConfigError(
            f"backend={backend!r} does not know the pattern {pattern} (its kept_in_group is None). Use backend='auto' or 'torch'."
        )
    if backend == "numba" and device.type != "cpu":
        raise ConfigError(f"backend='numba' runs on the CPU, the weights are on {device}. Use backend='auto'.")
    reason = unavailable(device) if backend == "triton" else None
    if reason is not None:
        raise ConfigError(f"backend='triton' cannot run: {reason}. Use backend='auto'.")
    return backend


def choose_solve(backend: Backend, device: torch.device, pattern: Pattern) -> Solve:
    """The function that solves a chunk of blocks. See `choose_backend`."""
    chosen, group, keep = choose_backend(backend, device, pattern), pattern.group_size, pattern.kept_in_group or 0
    if chosen == "numba":
        return lambda fisher, blocks, weights, alive, damp, dtype: solve_numba(
            fisher, blocks, weights, alive, damp, group, keep, pattern.whole_groups, dtype
        )
    if chosen == "triton":
        return functools.partial(
            factor_first, lambda inverse, floor, w, alive: eliminate_triton(inverse, floor, w, alive, group, keep)
        )
    if pattern.whole_groups:
        return functools.partial(
            factor_first, lambda inverse, floor, w, alive: eliminate_groups(inverse, floor, w, alive, group)
        )
    return functools.partial(
        factor_first, lambda inverse, floor, w, alive: eliminate_left_looking(inverse, floor, w, alive, pattern)
    )


def factor_first(
    eliminate: Eliminate,
    fisher: Blocks,
    blocks: Tensor,
    weights: Tensor,
    alive: Tensor,
    damp: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batched factorisation in torch, then elimination from the inverses that can be trusted."""
    k, B = weights.shape
    matrix, roots = restrict(fisher[blocks].to(dtype), alive, damp)
    inverse, well_conditioned = spd_inverse(matrix)
    del matrix
    rank = torch.full((k, B), B, device=weights.device)
    losses = torch.full((k, B), torch.inf, dtype=dtype, device=weights.device)
    if bool(well_conditioned.any()):
        weights = weights.to(dtype) * roots  # scores do not depend on the scale
        floor = torch.ones_like(weights)
        if bool(well_conditioned.all()):
            found = eliminate(inverse, floor, weights, alive)
            return found[0].to(rank.dtype), found[1], well_conditioned
        found = eliminate(
            inverse[well_conditioned], floor[well_conditioned], weights[well_conditioned], alive[well_conditioned]
        )
        rank[well_conditioned], losses[well_conditioned] = found[0].to(rank.dtype), found[1]
    return rank, losses, well_conditioned
