"""FastCAP: Fisher blocks shared by all output rows of a layer, and a sweep over their columns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_cap.calibration.sources import (
    NO_MEMORY,
    GradientSource,
    SourceMemory,
    check_any_rows,
    check_rows,
    reading,
)
from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.errors import GradientError
from lightning_cap.fisher.memory_plan import MemoryPlan, plan_reading
from lightning_cap.healing import HealArgument, as_heal
from lightning_cap.pruners.base import Pruner, check_path_arguments, in_blocks, require_allocation
from lightning_cap.pruners.scored import ScoredPath, require_weightwise_pattern
from lightning_cap.pruners.zero_gradients import check_zeros
from lightning_cap.solver.damping import Damp, block_damps, require_damp, solve_with_damping
from lightning_cap.solver.groups import diagonal_groups, group_losses
from lightning_cap.solver.linalg import spd_inverse
from lightning_cap.solver.ranking import smallest
from lightning_cap.sparsity.allocation import Allocation, Global
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.masks import check_masks
from lightning_cap.sparsity.patterns import PatternArgument
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_counts, shown
from lightning_cap.utilities.precision import full_float32
from lightning_cap.utilities.progress import Progress

COLUMNS = 32


@dataclass(kw_only=True, eq=False)
class FastCAP(Pruner):
    """Correlation-aware pruning in ``O(B)`` memory an input of a layer and ``O(d·B)`` time, for models too large for `CAP`.

    Output rows are cut into blocks of ``B`` inputs (one block of ``B × B`` per layer, if rows are no longer than ``B``). The blocks
    at one place of all rows share one Fisher, their mean ``F̄``, each scaled to its own trace: ``F_b ≈ s_b (F̄ + damp·I)``.
    Saliencies ``s_b w_p² / (2 [F̄⁻¹]_pp)`` say how many weights of each layer are pruned. One sweep over the ``B`` columns then
    removes them in all blocks at once and moves the columns to the right, in the manner of SparseGPT (Frantar & Alistarh 2023,
    algorithm 1): the Cholesky factor of ``F̄⁻¹`` holds every inverse that the sweep needs. Within each batch of columns the
    pruned weights are chosen anew from the moved values, so that correlations count; a higher sparsity need not remove all that
    a lower one does.

    Args:
        block_size: Inputs of an output row in a block, ``B``; best no smaller than a row.
        num_gradients: Gradient samples, ``N``.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        damp: Added to the diagonal of each ``F̄``, ``λ`` of equation 3; or relative to it, a `RelativeDamp` or ``"auto"``.
        columns: Columns in a batch of the sweep.
        allocation: See `Scored`.
        pattern: Which masks are allowed; of whole groups those of least saliency are pruned.
        heal: What moves the kept weights after pruning; see `LayerwiseHeal`.

    Raises:
        ConfigError: A number is out of range.
        PatternError: ``pattern`` is not one, or one that blocks cannot enforce.
    """

    block_size: int = 192
    num_gradients: int = 4096
    samples_per_gradient: int = 1
    damp: Damp = 1e-8
    columns: int = COLUMNS
    allocation: Allocation = Global()
    pattern: PatternArgument = None
    heal: HealArgument = None

    predicts_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.pattern = in_blocks(require_weightwise_pattern(self.pattern, "FastCAP"), "FastCAP")
        require_counts(num_gradients=self.num_gradients, samples_per_gradient=self.samples_per_gradient)
        require_counts(block_size=self.block_size, columns=self.columns)
        require_damp(self.damp)
        require_allocation(self.allocation)
        self.heal = as_heal(self.heal)

    @property
    def statistic(self) -> GradientSamples:
        """Gradient rows."""
        return GradientSamples(self.num_gradients, self.samples_per_gradient)

    def check(self, targets: Targets) -> None:
        """Refuse targets that the pattern does not divide, or that the allocation does not know."""
        self.allocation.check(self._layout(targets).shapes)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give."""
        self.pattern.check_sparsity(sparsity)

    def plan(
        self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, source: SourceMemory = NO_MEMORY
    ) -> MemoryPlan:
        """Blocks and factors in float64 for each place in the rows of each layer, and ``O(d)``. See `Pruner.plan`."""
        require_targets(targets)
        check_masks(targets, masks)
        layout = self._layout(targets)
        places = sum(_places(layout, name) for name in layout.shapes)
        entries = layout.num_blocks * layout.block_size
        sums = 8 * places * layout.block_size**2
        temporary = 26 * max(
            weight.numel() for weight in targets.values()
        )  # its rows in blocks, squares, copies for the product
        return plan_reading(targets.device, source, 2 * sums, temporary, 3 * sums + 60 * entries)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource = (),
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> FastCAPPath:
        """Accumulate and factor the shared blocks."""
        check_path_arguments(targets, gradients, progress)
        layout = self._layout(targets)
        path = FastCAPPath(self, targets, layout, masks, shared_blocks(layout, gradients, targets.device))
        damping_increased = path.stats["blocks_damping_increased"]
        if damping_increased:
            warnings.warn(
                f"damp={shown(self.damp)}: {damping_increased:g} shared Fisher blocks factored only with a larger one (up to "
                f"{path.stats['largest_damp']:g}). Raise damp if there are many.",
                stacklevel=2,
            )
        return path

    def _layout(self, targets: Targets) -> BlockLayout:
        require_targets(targets)
        return targets.row_blocks(self.block_size, self.pattern.group_size)


@dataclass(frozen=True)
class SharedFisher:
    """What the blocks of a target share.

    Attributes:
        mean: ``(P, B, B)`` float64 without damp: the mean over output rows, for each of the ``P`` places of a block in a row.
        traces: ``(O, P)`` float64, of each block's own Fisher.
    """

    mean: Tensor
    traces: Tensor


class FastCAPPath(ScoredPath):
    """Saliencies from the shared blocks, and their factors for the sweep."""

    nested = False

    def __init__(
        self,
        pruner: FastCAP,
        targets: Targets,
        layout: BlockLayout,
        masks: Mapping[str, Tensor] | None,
        fishers: Mapping[str, SharedFisher],
    ) -> None:
        super().__init__(pruner, targets, layout, masks)
        self._columns = max(pruner.columns // layout.group_size, 1) * layout.group_size
        self._factors: dict[str, Tensor] = {}  # (P, B, B) upper, UᵀU = F̄⁻¹
        self._scales: dict[str, Tensor] = {}  # (O, P)
        saliency = torch.zeros(self.weights.shape, dtype=torch.float64, device=self.weights.device)
        damping_increased, largest = 0, 0.0
        for name, span in layout.spans.items():
            fisher = fishers[name]
            there = self._by_place(name, self._alive[span]).any(0)  # (P, B)
            one_layer = torch.zeros(len(there), dtype=torch.int64, device=there.device)
            asked = block_damps(pruner.damp, fisher.mean.diagonal(dim1=-2, dim2=-1), there, one_layer, 1)
            inverse, damps = _inverse(fisher.mean, asked)
            damping_increased += int((damps > asked).sum())
            largest = max(largest, float(damps.max()))
            self._factors[name] = torch.linalg.cholesky(inverse).mT.contiguous()
            traces = fisher.traces + damps * layout.block_size
            self._scales[name] = traces / traces.mean(0)
            weights = self._by_place(name, self.weights[span]).double()  # (O, P, B)
            if self._pattern.whole_groups:
                cost = _group_saliency(inverse, weights, self._pattern.group_size)
            else:
                cost = weights.square() / inverse.diagonal(dim1=-2, dim2=-1) / 2
            saliency[span] = (cost * self._scales[name].unsqueeze(-1)).reshape(saliency[span].shape)
        self.stats = {
            "blocks": float(layout.num_blocks),
            "blocks_damping_increased": float(damping_increased),
            "largest_damp": largest,
        }
        self.score(saliency)

    def _by_place(self, name: str, blocks: Tensor) -> Tensor:
        """``(O·P, B)`` -> ``(O, P, B)``."""
        return blocks.view(-1, _places(self._layout, name), blocks.shape[-1])

    def _solution(self, pruned: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.weights.clone(), pruned.clone()
        for name, span in self._layout.spans.items():
            if bool(pruned[span].any()):
                moved, swept = self._sweep(name, span, self._by_place(name, pruned[span]))
                weights[span], chosen[span] = moved.flatten(0, 1), swept.flatten(0, 1)
        return weights, chosen

    def _sweep(self, name: str, span: slice, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """Remove as many weights of each batch of columns as ``pruned`` ``(O, P, B)`` has there, and move the columns after."""
        factor = self._factors[name].to(torch.promote_types(torch.float32, self.weights.dtype))
        before, alive = self._by_place(name, self.weights[span]), self._by_place(name, self._alive[span])
        weights, chosen = before.clone(), torch.zeros_like(pruned)
        roots = self._scales[name].to(factor.dtype).sqrt().unsqueeze(-1)
        with full_float32():
            for first in range(0, weights.shape[-1], self._columns):
                part = slice(first, min(first + self._columns, weights.shape[-1]))
                pivots = factor.diagonal(dim1=-2, dim2=-1)[:, part]
                scores = roots * weights[..., part] / pivots
                chosen[..., part] = self._choose(scores, alive[..., part], pruned[..., part])
                dead = chosen[..., part] | ~alive[..., part]
                errors = torch.zeros_like(scores)
                for j in range(part.start, part.stop):
                    error = torch.where(dead[..., j - first], weights[..., j] / factor[:, j, j], 0.0)
                    errors[..., j - first] = error
                    weights[..., j : part.stop] -= error.unsqueeze(-1) * factor[:, j, j : part.stop]
                rest = factor[:, part, part.stop :]  # (P, c, B - stop)
                weights[..., part.stop :] -= torch.bmm(errors.transpose(0, 1), rest).transpose(0, 1)
        untouched = ~chosen.any(-1, keepdim=True)  # a block without a pruned weight is left alone
        weights = torch.where(untouched, before, weights)
        return weights.masked_fill(chosen | ~alive, 0.0), chosen

    def _choose(self, scores: Tensor, alive: Tensor, pruned: Tensor) -> Tensor:
        """Which weights of some columns ``(O, P, c)`` are pruned: those of least ``s_b w² / U_jj²`` as they are now."""
        if self._pattern.whole_groups:
            return pruned
        squares = scores.float().square().nan_to_num(posinf=torch.finfo(torch.float32).max).contiguous()
        if self._pattern.sparsity is not None:
            return self._pattern.lowest_scores(squares, alive.contiguous())
        return smallest(squares.masked_fill(~alive, torch.inf), int(pruned.sum()))


def _places(layout: BlockLayout, name: str) -> int:
    """Blocks in an output row of a target."""
    span = layout.spans[name]
    count: int = (span.stop - span.start) // layout.shapes[name][0]
    return count


def shared_blocks(layout: BlockLayout, gradients: GradientSource, device: torch.device) -> dict[str, SharedFisher]:
    """The Fisher blocks that output rows share, over gradient rows and processes. Padding counts as zeros.

    Args:
        layout: With blocks inside output rows.
        gradients: Rows; read once.
        device: Where to add them up.

    Raises:
        GradientError: There is no row, all are zero, a row is not finite, a target is missing or its rows do not have its shape.
    """
    B = layout.block_size
    shapes = {name: (_places(layout, name), shape[0]) for name, shape in layout.shapes.items()}
    sums = {name: torch.zeros(P, B, B, dtype=torch.float64, device=device) for name, (P, _) in shapes.items()}
    traces = {name: torch.zeros(rows, P, dtype=torch.float64, device=device) for name, (P, rows) in shapes.items()}
    count = 0
    parts = {name: replace(layout, shapes={name: shape}) for name, shape in layout.shapes.items()}
    with reading(gradients) as chunks:
        for chunk in chunks:
            check_rows(chunk, layout.shapes, layout.shapes)
            for name in layout.shapes:
                rows = parts[name].pack_rows({name: chunk[name]}, torch.float32, device)  # (n, O·P, B)
                traces[name] += rows.square().sum((0, 2), dtype=torch.float64).view_as(traces[name])
                columns = rows.view(-1, shapes[name][0], B).transpose(0, 1)  # (P, n·O, B)
                with full_float32():
                    sums[name] += torch.bmm(columns.mT, columns)
            count += next(iter(chunk.values())).shape[0]
            del chunk
    counts = distributed.gather_counts(count, device)
    check_any_rows(counts)
    for name, (_, outputs) in shapes.items():
        sums[name] = distributed.sum_over_ranks(sums[name]) / (sum(counts) * outputs)
        traces[name] = distributed.sum_over_ranks(traces[name]) / sum(counts)
        if not bool(torch.isfinite(sums[name]).all()):
            raise GradientError(
                f"gradients: those of {name!r} are not finite. Leave such samples out, or scale the loss down."
            )
    check_zeros({name: bool(trace.any()) for name, trace in traces.items()}, sum(counts), "gradients")
    return {name: SharedFisher(sums[name], traces[name]) for name in shapes}


def _inverse(fisher: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of the damped blocks ``(P, B, B)``, in float64, and the damps ``(P,)``, raised where ``damp`` was not enough."""
    eye = torch.eye(fisher.shape[-1], dtype=fisher.dtype, device=fisher.device)
    damps = damp.clone()
    inverses = torch.empty_like(fisher)

    def attempt(blocks: Tensor, more: Tensor, _: torch.dtype) -> Tensor:
        inverse, well_conditioned = spd_inverse(fisher[blocks] + more.view(-1, 1, 1) * eye)
        inverses[blocks], damps[blocks] = (inverse + inverse.mT) / 2, more
        return well_conditioned

    solve_with_damping(torch.arange(len(fisher), device=fisher.device), damps.clone(), torch.float64, attempt)
    return inverses, damps


def _group_saliency(inverse: Tensor, weights: Tensor, size: int) -> Tensor:
    """``½ w_gᵀ ([F̄⁻¹]_gg)⁻¹ w_g``, an equal part for each weight of a group; ``(O, P, B)``."""
    rows, places, B = weights.shape
    small = diagonal_groups(inverse, size).expand(rows, places, -1, -1, -1).flatten(0, 1)
    groups = weights.reshape(rows * places, -1, size)
    cost = group_losses(small, torch.zeros_like(groups), groups)
    return (cost / size).unsqueeze(-1).expand(-1, -1, size).reshape(rows, places, B)
