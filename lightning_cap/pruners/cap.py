"""CAP, the correlation-aware pruner (Kuznedelev et al. 2023, section 3.1, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_cap.fisher.blocks import FisherBlocks
from lightning_cap.pruners.blockwise import FisherBlockwise
from lightning_cap.solver import Elimination, eliminate
from lightning_cap.solver.backend import Backend
from lightning_cap.solver.damping import Damp, rounding_damp
from lightning_cap.solver.ranking import block_scores
from lightning_cap.utilities.arguments import require_choice
from lightning_cap.utilities.progress import Progress

RankingChoice = Literal["marginal", "cumulative", "auto"]


@dataclass(kw_only=True, eq=False)
class CAP(FisherBlockwise):
    """Optimal Brain Surgeon inside blocks of the empirical Fisher, one weight at a time, merged over the model.

    The defaults are what did best in ``benchmarks``. The paper's own are ``damp=1e-8, shrinkage=0.0, ranking="cumulative"``.

    Args:
        block_size: Weights in a Fisher block, ``B``; of a larger one than the largest target, as many as that has. Memory is
            ``d·B·4`` bytes, time ``O(d·B²)``.
        num_gradients: Gradient samples, ``N`` of equation 3.
        samples_per_gradient: Inputs ``m`` whose mean loss gives one gradient sample. The scale of the Fisher against
            ``damp`` changes with it, since a gradient is that of the mean loss: noise in it shrinks as ``1/m``.
            ``m = 1`` (per-sample gradients) makes the most of each sample.
        damp: ``λ`` of equation 3, the same for all blocks; or one that follows their gradients, a `RelativeDamp` or ``"auto"``.
        ranking: How blocks are merged: ``"marginal"`` (least predicted loss in all), the paper's ``"cumulative"``, or ``"auto"``:
            the one of both with the lower measured loss, where `PruningPath.candidates` are measured; else the first.
        allocation: How zeros are shared out over the targets. Default: `Global`.
        pattern: Which masks are allowed, a `Pattern`. Default: `Unstructured`.
        max_memory: What an event may take on the device of the weights, as ``"20GB"`` or bytes. A Fisher that does not fit is
            kept in main memory (of a GPU's host), or built in several passes over the gradients. Default: 80 % of what is
            free when the event begins.
        storage: ``"packed"`` keeps the lower triangle of each block, half the memory; ``"full"`` all of it. ``"auto"``: packed
            on the CPU, where it is also the faster, full on a GPU.
        backend: Code of the solver: ``"numba"`` (CPU), ``"triton"`` (CUDA), ``"torch"`` (any device), or ``"auto"``.
        row_chunk: Gradient rows that are added to the Fisher at once. Fixed, since results depend on it by rounding.
        allow_tf32: Let a GPU multiply gradients in TF32 (ten bits of mantissa) for the Fisher: faster, less exact.
        shrinkage: How far the correlations inside each block are shrunk towards their mean over all blocks at the same place of the
            output rows of its layer, in [0, 1]. The diagonal of each block stays its own. It takes the place of many gradients,
            most of all where ``block_size`` divides the rows. Rows of all groups of a grouped convolution count as alike. 0 is as
            in the paper.

    Raises:
        ConfigError: A number is out of range, or the backend cannot run.
        PatternError: ``pattern`` is not a pattern, such as the number 124 that YAML makes of an unquoted ``2:4``.
    """

    damp: Damp = "auto"
    shrinkage: float = 0.5
    ranking: RankingChoice = "marginal"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        require_choice("ranking", self.ranking, get_args(RankingChoice))
        require_choice("backend", self.backend, get_args(Backend))
        super().__post_init__()

    @property
    def solver_backend(self) -> Backend:
        """``backend``."""
        return self.backend

    def order_blocks(
        self, fisher: FisherBlocks, weights: Tensor, alive: Tensor, damp: Tensor, chunk: int, progress: Progress | None
    ) -> Elimination:
        """One weight at a time, by the Optimal Brain Surgeon."""
        least = rounding_damp(fisher.diagonal, alive, fisher.count)
        return eliminate(fisher, weights, alive, damp, self.pattern, progress, self.backend, chunk, least_damp=least)

    @property
    def takes_shards(self) -> bool:
        """Unless ``ranking`` is ``"auto"``, for which the losses of two solutions would have to be compared."""
        return self.ranking != "auto"

    def merge_scores(self, losses: Tensor) -> Tensor:
        """The scores that ``ranking`` says."""
        return block_scores(losses, "marginal" if self.ranking == "auto" else self.ranking)

    def other_scores(self, losses: Tensor) -> Iterator[Tensor]:
        """The cumulative ones, if ``ranking`` is ``"auto"``."""
        if self.ranking == "auto":
            yield block_scores(losses, "cumulative")
