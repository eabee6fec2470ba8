"""WoodFisher: block OBS saliencies, all weights removed at once (Singh & Alistarh 2020; oBERT, Kurtic et al. 2022)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_cap.fisher.blocks import FisherBlocks
from lightning_cap.pruners.blockwise import FisherBlockwise
from lightning_cap.solver import Elimination, eliminate, reconstruct, update_independently
from lightning_cap.solver.backend import factor_first
from lightning_cap.solver.damping import rounding_damp
from lightning_cap.solver.one_step import rank_by_saliency
from lightning_cap.utilities.arguments import require_choice
from lightning_cap.utilities.progress import Progress

#: How kept weights move; see `WoodFisher`.
Update = Literal["joint", "simple", "none"]


@dataclass(kw_only=True, eq=False)
class WoodFisher(FisherBlockwise):
    """The saliency of equation 2 on the dense model, ``w_p² / (2 [F⁻¹]_pp)``, in blocks; the weights of least saliency are
    pruned together.

    Unlike in `CAP`, a weight's saliency does not know what else is removed, and the predicted loss, the sum of the
    saliencies, leaves their interplay out. With `lightning_cap.sparsity.BlockOf` groups are ranked by ``½ w_gᵀ ([F⁻¹]_gg)⁻¹
    w_g`` (equation 5, oBERT). For recomputations see ``num_recomputations`` of `lightning_cap.CAPPruningCallback`.

    Args:
        block_size: Weights in a Fisher block, ``B``.
        num_gradients: Gradient samples, ``N`` of equation 3.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        damp: ``λ`` of equation 3, the same for all blocks; or one that follows their gradients, a `RelativeDamp` or ``"auto"``.
        update: How kept weights move: ``"joint"``, ``δw = -F⁻¹ E_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q`` for all removed ones ``Q`` together
            (equation 5); ``"simple"``, each removed weight's own ``δw`` of equation 2 added up, as in the published code; or
            ``"none"``.
        allocation: How zeros are shared out over the targets. Default: `Global`.
        pattern: Which masks are allowed. Default: `Unstructured`.
        max_memory: See `CAP`.
        storage: See `CAP`.
        row_chunk: See `CAP`.
        allow_tf32: See `CAP`.
        shrinkage: See `CAP`.

    Raises:
        ConfigError: A setting is out of range.
        PatternError: ``pattern`` is not one, or one that blocks cannot enforce.
    """

    block_size: int = 64
    update: Update = "joint"

    def __post_init__(self) -> None:
        require_choice("update", self.update, get_args(Update))
        super().__post_init__()

    def order_blocks(
        self, fisher: FisherBlocks, weights: Tensor, alive: Tensor, damp: Tensor, chunk: int, progress: Progress | None
    ) -> Elimination:
        """All weights of a block at once, by their saliency on the dense block."""
        pattern = self.pattern
        order = functools.partial(
            factor_first, lambda inverse, floor, w, left: rank_by_saliency(inverse, floor, w, left, pattern)
        )
        least = rounding_damp(fisher.diagonal, alive, fisher.count)
        return eliminate(fisher, weights, alive, damp, pattern, progress, chunk=chunk, solve=order, least_damp=least)

    def rebuild_blocks(
        self,
        fisher: FisherBlocks,
        weights: Tensor,
        alive: Tensor,
        pruned: Tensor,
        damp: Tensor,
        use_float64: Tensor,
        chunk: int,
    ) -> Tensor:
        """The update that ``update`` says."""
        if self.update == "joint":
            return reconstruct(fisher, weights, alive, pruned, damp, use_float64, "auto", chunk)
        if self.update == "none":
            return weights.masked_fill(~alive | pruned, 0.0)
        size = self.pattern.group_size if self.pattern.whole_groups else 1
        return update_independently(fisher, weights, alive, pruned, damp, use_float64, size, chunk)
