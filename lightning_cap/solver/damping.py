"""What is added to the diagonal of a block, `block_damps`; and blocks that do not factor even so are tried again: in float64, then
with ten times the damp, until they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.utilities.arguments import is_real, require_choice, require_real, shown
from lightning_cap.utilities.distributed import sum_over_ranks

#: ``attempt(blocks, damp, dtype)`` works on ``blocks`` ``(k,)`` with ``damp`` ``(k,)``. It keeps the results of those that succeed
#: and says which they are, ``(k,)`` bool. The others come back with more precision or more damp.
Attempt = Callable[[Tensor, Tensor, torch.dtype], Tensor]

#: What a damp is relative to: see `RelativeDamp`.
Scope = Literal["block", "layer"]

#: Of ``damp="auto"``.
AUTO_FRACTION = 0.02

_FACTOR = 10.0
_OF_ZEROS = 1e-30  # the damp of a block whose gradients are all zero: its weights are ordered by magnitude


@dataclass(frozen=True)
class RelativeDamp:
    """A damp that follows the scale of the gradients: a fraction of the mean diagonal of the Fisher, over weights still there.

    One value then fits all layers, models, losses and ``samples_per_gradient``; an absolute damp does not.

    Args:
        fraction: Of the mean diagonal, above 0.
        scope: ``"block"``, of the block alone, ``fraction · tr(F_b) / B``; or ``"layer"``, of all blocks of the target.

    Raises:
        ConfigError: An argument is out of range.
    """

    fraction: float
    scope: Scope = "block"

    def __post_init__(self) -> None:
        require_real("fraction", self.fraction, "(0, inf)", example=AUTO_FRACTION)
        require_choice("scope", self.scope, get_args(Scope))


#: An absolute ``λ`` of equation 3, one that follows the gradients, or ``"auto"``: `RelativeDamp` with the fraction that did best.
Damp = float | RelativeDamp | Literal["auto"]


def require_damp(damp: object) -> None:
    """Refuse what is no `Damp`.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(damp, RelativeDamp) or (isinstance(damp, str) and damp == "auto") or (is_real(damp) and damp > 0):  # type: ignore[operator]
        return
    raise ConfigError(
        f"damp={shown(damp)}: give a number above 0, e.g. 1e-8, 'auto', or RelativeDamp({AUTO_FRACTION})."
    )


def as_relative(damp: Damp) -> RelativeDamp | None:
    """The relative damp that is meant; None for an absolute one."""
    if isinstance(damp, str):
        return RelativeDamp(AUTO_FRACTION)
    return damp if isinstance(damp, RelativeDamp) else None


def block_damps(damp: Damp, diagonal: Tensor, alive: Tensor, layers: Tensor, num_layers: int) -> Tensor:
    """The damp of each block. With a relative one of a layer every process must call it.

    Args:
        damp: What was asked for.
        diagonal: ``(K, B)`` of the Fisher without damp.
        alive: ``(K, B)`` bool.
        layers: ``(K,)`` int64, the number of each block's target, the same in every process.
        num_layers: How many targets there are.

    Returns:
        ``(K,)`` float64, above 0.
    """
    relative = as_relative(damp)
    if relative is None:
        return torch.full((len(alive),), float(damp), dtype=torch.float64, device=alive.device)  # type: ignore[arg-type]
    sums = diagonal.double().masked_fill(~alive, 0.0).sum(-1)
    counts = alive.sum(-1).double()
    if relative.scope == "layer":
        totals = sums.new_zeros(2, num_layers).index_add_(1, layers, torch.stack([sums, counts]))
        sums, counts = sum_over_ranks(totals)[:, layers]
    return (relative.fraction * sums / counts.clamp_min(1)).clamp_min(_OF_ZEROS)


def solve_with_damping(blocks: Tensor, damp: Tensor, dtype: torch.dtype, attempt: Attempt) -> None:
    """Attempt all blocks, and those that failed again and again, until none is left.

    Args:
        blocks: ``(k,)`` int64 indices.
        damp: ``(k,)`` float64, what each is tried with first.
        dtype: What they are tried in first; after float32 comes float64, and only then more damp.
        attempt: The work.

    Raises:
        GradientError: A block cannot be made invertible.
    """
    while len(blocks):
        failed = ~attempt(blocks, damp, dtype)
        blocks, damp = blocks[failed], damp[failed]
        if len(blocks) and dtype == torch.float64:
            damp = more_damp(damp)
        dtype = torch.float64


def more_damp(damp: Tensor) -> Tensor:
    """Ten times the damp.

    Raises:
        GradientError: It is so large that the blocks cannot be finite.
    """
    damp = damp * _FACTOR
    if not bool(torch.isfinite(damp).all()):
        raise GradientError("fisher: a block is not finite, so no damp makes it invertible. Check the gradients for NaN and "
                            "infinity.")  # fmt: skip
    return damp


def rounding_damp(diagonal: Tensor, alive: Tensor, num_rows: int) -> Tensor:
    """The least damp that float32 sums of fewer rows than a block has weights can tell from their own rounding.

    ``num_rows`` rows leave directions of the block that nothing but the damp gives a cost. The rounding of the sums gives them a
    random one, of either sign, up to about 7 rounding units of the mean diagonal at ``B = 192``; this is twice that.

    Args:
        diagonal: ``(K, B)`` of the sums.
        alive: ``(K, B)`` bool.
        num_rows: That were added up, ``N``.

    Returns:
        ``(K,)`` float64, zero for blocks with no more alive weights than rows.
    """
    count = alive.sum(-1)
    mean = diagonal.to(alive.device).double().masked_fill(~alive, 0.0).sum(-1) / count.clamp_min(1)
    return torch.where(count > num_rows, 2.0**-24 * count.double().sqrt() * mean, 0.0)
