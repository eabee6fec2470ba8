"""CAP, the correlation-aware pruner (Kuznedelev et al. 2023, section 3.1, algorithm 1)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.fisher.blocks import ROW_CHUNK, FisherBlocks, Storage
from lightning_cap.pruners.blockwise import Blockwise
from lightning_cap.solver import Elimination, eliminate
from lightning_cap.solver.backend import Backend
from lightning_cap.solver.ranking import block_scores
from lightning_cap.sparsity.allocation import Allocation
from lightning_cap.sparsity.patterns import Pattern
from lightning_cap.utilities.progress import Progress


class CAP(Blockwise):
    """Optimal Brain Surgeon inside blocks of the empirical Fisher, one weight at a time, merged over the model.

    Args:
        block_size: Weights in a Fisher block, ``B``. Memory is ``d·B·4`` bytes, time ``O(d·B²)``.
        num_gradients: Gradient samples, ``N`` of equation 3.
        samples_per_gradient: Inputs ``m`` whose mean loss gives one gradient sample. The scale of the Fisher against
            ``damp`` changes with it, since a gradient is that of the mean loss: noise in it shrinks as ``1/m``.
            ``m = 1`` (per-sample gradients) makes the most of each image.
        damp: ``λ`` of equation 3.
        ranking: How blocks are merged: ``"marginal"`` (least predicted loss in all) or the paper's ``"cumulative"``.
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

    Raises:
        ConfigError: A number is out of range, or the backend cannot run.
        PatternError: ``pattern`` is not a pattern, such as the number 124 that YAML makes of an unquoted ``2:4``.
    """

    def __init__(
        self,
        block_size: int = 192,
        num_gradients: int = 4096,
        samples_per_gradient: int = 1,
        damp: float = 1e-8,
        ranking: Literal["marginal", "cumulative"] = "marginal",
        allocation: Allocation | None = None,
        pattern: Pattern | int | str | None = None,
        max_memory: int | str | None = None,
        storage: Storage = "auto",
        backend: Backend = "auto",
        row_chunk: int = ROW_CHUNK,
        allow_tf32: bool = False,
    ) -> None:
        if ranking not in ("marginal", "cumulative"):
            raise ConfigError(f"ranking={ranking!r}: choose 'marginal' or 'cumulative'.")
        self.ranking = ranking
        super().__init__(
            block_size,
            num_gradients,
            samples_per_gradient,
            damp,
            allocation,
            pattern,
            max_memory,
            storage,
            backend,
            row_chunk,
            allow_tf32,
        )

    def _order(
        self, fisher: FisherBlocks, weights: Tensor, alive: Tensor, chunk: int, progress: Progress | None
    ) -> Elimination:
        return eliminate(fisher, weights, alive, self.damp, self.pattern, progress, self.backend, chunk)

    def _scores(self, losses: Tensor) -> Tensor:
        return block_scores(losses, self.ranking)
