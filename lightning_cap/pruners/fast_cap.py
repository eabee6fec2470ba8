"""FastCAP: one Fisher block for all blocks of a layer, and a sweep over its columns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cap import distributed
from lightning_cap.allocation import Allocation, Global
from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.hooks import Progress
from lightning_cap.layout import BlockLayout
from lightning_cap.linalg import full_float32, spd_inverse
from lightning_cap.patterns import Pattern
from lightning_cap.planning import EventPlan
from lightning_cap.pruners.base import Pruner, in_blocks
from lightning_cap.pruners.scored import ScoredPath, check_counts, single_choice
from lightning_cap.ranking import smallest
from lightning_cap.solver.backend import more_damp
from lightning_cap.solver.groups import diagonal_groups, group_losses
from lightning_cap.sources import GradientSource, reading
from lightning_cap.targets import Targets

COLUMNS = 32


class FastCAP(Pruner):
    """Correlation-aware pruning in ``O(B²)`` memory a layer and ``O(d·B)`` time, for models too large for `CAP`.

    All blocks of a layer share the mean of their Fishers, ``F̄ = damp·I + Σ_b Σ_k g_b g_bᵀ / (N K)``. Saliencies
    ``w_p² / (2 [F̄⁻¹]_pp)`` say how many weights each layer loses. One sweep over the ``B`` columns then removes them in all of its
    blocks at once and moves the columns to the right, in the manner of SparseGPT (Frantar & Alistarh 2023, algorithm 1): the
    Cholesky factor of ``F̄⁻¹`` holds every inverse that the sweep needs. Within each batch of columns the weights that go are
    chosen anew from the moved values, so that correlations count; a higher sparsity need not remove all that a lower one does.

    Args:
        block_size: Consecutive weights that share a row of the sweep, ``B``.
        num_gradients: Gradient samples, ``N``.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        damp: Added to the diagonal of each ``F̄``, ``λ`` of equation 3.
        columns: Columns in a batch of the sweep.
        allocation: See `Scored`.
        pattern: Which masks are allowed; of whole groups those of least saliency go.

    Raises:
        ConfigError: A number is out of range.
        PatternError: ``pattern`` is not one, or one that blocks cannot enforce.
    """

    predicts_loss = True

    def __init__(
        self,
        block_size: int = 192,
        num_gradients: int = 4096,
        samples_per_gradient: int = 1,
        damp: float = 1e-8,
        columns: int = COLUMNS,
        allocation: Allocation | None = None,
        pattern: Pattern | int | str | None = None,
    ) -> None:
        self.allocation = allocation or Global()
        self.pattern = in_blocks(single_choice(pattern, "FastCAP"), "FastCAP")
        check_counts(num_gradients, samples_per_gradient)
        if not 0 < damp < float("inf"):
            raise ConfigError(f"damp={damp}: the Fisher needs a positive damp to be invertible. Try 1e-8 ... 1e-4.")
        for name, value in (("block_size", block_size), ("columns", columns)):
            if value < 1 or value != int(value):
                raise ConfigError(f"{name}={value}: give a whole number of at least 1.")
        self.block_size, self.columns = block_size, columns
        self.num_gradients, self.samples_per_gradient, self.damp = num_gradients, samples_per_gradient, damp

    def check(self, targets: Targets) -> None:
        """Refuse targets that the pattern does not divide, or that the allocation does not know."""
        self.allocation.check(self._layout(targets).shapes)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give."""
        self.pattern.check_sparsity(sparsity)

    def plan(self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, rows_bytes: int = 0) -> EventPlan:
        """A block in float64 for each layer, and ``O(d)``. See `Pruner.plan`."""
        size = 8 * self.block_size**2 * (len(targets) + 4)
        return EventPlan(targets.device, 2 * rows_bytes + size + 24 * targets.numel)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource = (),
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> FastCAPPath:
        """Accumulate and factor one block a layer."""
        return FastCAPPath(
            self, targets, self._layout(targets), masks, mean_blocks(self._layout(targets), gradients, targets.device)
        )

    def _layout(self, targets: Targets) -> BlockLayout:
        return targets.blocks(self.block_size, self.pattern.group_size)


class FastCAPPath(ScoredPath):
    """Saliencies from the shared blocks, and their factors for the sweep."""

    nested = False

    def __init__(
        self,
        pruner: FastCAP,
        targets: Targets,
        layout: BlockLayout,
        masks: Mapping[str, Tensor] | None,
        fishers: Mapping[str, Tensor],
    ) -> None:
        super().__init__(targets, layout, masks, pruner.pattern, pruner.allocation)
        self._columns = max(pruner.columns // layout.group_size, 1) * layout.group_size
        self._factors: dict[str, Tensor] = {}  # upper, UᵀU = F̄⁻¹
        saliency = torch.zeros(self.weights.shape, dtype=torch.float64, device=self.weights.device)
        redamped = 0
        for name, span in layout.spans.items():
            inverse, raised = _inverse(fishers[name].to(self.weights.device), pruner.damp)
            redamped += raised
            self._factors[name] = torch.linalg.cholesky(inverse).mT.contiguous()
            weights = self.weights[span].double()
            if self._pattern.whole_groups:
                saliency[span] = _group_saliency(inverse, weights, self._pattern.group_size)
            else:
                saliency[span] = weights.square() / inverse.diagonal() / 2
        self.stats = {"blocks": float(layout.num_blocks), "blocks_redamped": float(redamped)}
        self.score(saliency)

    def _solution(self, pruned: Tensor) -> tuple[Tensor, Tensor]:
        weights, gone = self.weights.clone(), pruned.clone()
        for name, span in self._layout.spans.items():
            if bool(pruned[span].any()):
                weights[span], gone[span] = self._sweep(name, span, pruned[span])
        return weights, gone

    def _sweep(self, name: str, span: slice, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """Remove as many weights of each batch of columns as ``pruned`` has there, and move the columns after them."""
        factor = self._factors[name].to(torch.promote_types(torch.float32, self.weights.dtype))
        alive, weights = self._alive[span], self.weights[span].clone()
        gone = torch.zeros_like(pruned)
        with full_float32():
            for first in range(0, weights.shape[1], self._columns):
                part = slice(first, min(first + self._columns, weights.shape[1]))
                gone[:, part] = self._choose(weights[:, part], factor.diagonal()[part], alive[:, part], pruned[:, part])
                dead = gone[:, part] | ~alive[:, part]
                errors = torch.zeros_like(weights[:, part])
                for j in range(part.start, part.stop):
                    error = torch.where(dead[:, j - first], weights[:, j] / factor[j, j], 0.0)
                    errors[:, j - first] = error
                    weights[:, j : part.stop] -= error.unsqueeze(1) * factor[j, j : part.stop]
                weights[:, part.stop :] -= errors @ factor[part, part.stop :]
        untouched = ~gone.any(-1, keepdim=True)  # a block that loses none is left alone
        weights = torch.where(untouched, self.weights[span], weights)
        return weights.masked_fill(gone | ~alive, 0.0), gone

    def _choose(self, weights: Tensor, pivots: Tensor, alive: Tensor, pruned: Tensor) -> Tensor:
        """Which weights of some columns ``(K_t, c)`` go: those of least ``w² / U_jj²`` as they are now."""
        if self._pattern.whole_groups:
            return pruned
        scores = (weights / pivots).float().square().nan_to_num(posinf=torch.finfo(torch.float32).max)
        if self._pattern.sparsity is not None:
            return self._pattern.least(scores, alive)
        return smallest(scores.masked_fill(~alive, torch.inf), int(pruned.sum()))


def mean_blocks(layout: BlockLayout, gradients: GradientSource, device: torch.device) -> dict[str, Tensor]:
    """The mean Fisher block of each target, without damp: ``{name: (B, B)}`` float64, over rows, blocks and processes.

    Padding counts as zeros of the last block.

    Args:
        layout: Block view of the targets.
        gradients: Rows; read once.
        device: Where to add them up.

    Raises:
        GradientError: There is no row, a row is not finite, a target is missing or its rows do not have its shape.
    """
    B = layout.block_size
    sums = {name: torch.zeros(B, B, dtype=torch.float64, device=device) for name in layout.shapes}
    count = 0
    parts = {name: BlockLayout({name: shape}, B, layout.group_size) for name, shape in layout.shapes.items()}
    with reading(gradients) as chunks:
        for chunk in chunks:
            for name, shape in layout.shapes.items():
                got = tuple(chunk[name].shape[1:]) if name in chunk else None
                if got != shape:
                    raise GradientError(
                        f"gradients: the rows of {name!r} have shape {got}, its weight has {shape}. Give a chunk "
                        "{target name: (n, *weight.shape)} with every target in it."
                    )
                rows = parts[name].pack_rows({name: chunk[name]}, torch.float32, device).flatten(0, 1)
                with full_float32():
                    sums[name] += rows.mT @ rows
            count += next(iter(chunk.values())).shape[0]
    counts = distributed.gather_counts(count, device)
    if sum(counts) == 0:
        raise GradientError(
            "gradients: the source gave no gradient row. Check that the calibration batches are not empty."
        )
    for name, total in sums.items():
        blocks = layout.spans[name].stop - layout.spans[name].start
        sums[name] = distributed.sum_over_ranks(total) / (sum(counts) * blocks)
        if not bool(torch.isfinite(sums[name]).all()):
            raise GradientError(
                f"gradients: those of {name!r} are not finite. Leave such samples out, or scale the loss down."
            )
    return sums


def _inverse(fisher: Tensor, damp: float) -> tuple[Tensor, bool]:
    """Of the damped block, in float64, and whether the damp had to be raised."""
    damps = torch.tensor([damp], dtype=torch.float64, device=fisher.device)
    while True:
        inverse, safe = spd_inverse(
            (fisher + damps * torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device))[None]
        )
        if bool(safe.all()):
            return (inverse[0] + inverse[0].mT) / 2, bool(damps[0] > damp)
        damps = more_damp(damps)


def _group_saliency(inverse: Tensor, weights: Tensor, size: int) -> Tensor:
    """``½ w_gᵀ ([F̄⁻¹]_gg)⁻¹ w_g``, an equal part for each weight of a group; ``(K_t, B)``."""
    small = diagonal_groups(inverse.unsqueeze(0), size).expand(len(weights), -1, -1, -1)
    groups = weights.view(len(weights), -1, size)
    cost = group_losses(small, torch.zeros_like(groups), groups)
    return (cost / size).unsqueeze(-1).expand(-1, -1, size).reshape(weights.shape)
