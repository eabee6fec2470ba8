"""Layer-wise OBS (OBC, SparseGPT): the solver of CAP on the Hessian of each layer's output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from lightning_cap.calibration.layer_inputs import sum_up
from lightning_cap.calibration.sources import GradientSource, SourceMemory
from lightning_cap.calibration.statistics import LayerInputs
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.pruners.blockwise import Blockwise
from lightning_cap.solver import Elimination, eliminate, reconstruct
from lightning_cap.solver.backend import Backend, choose_backend, work_bytes
from lightning_cap.solver.numba_backend import pack_triangles
from lightning_cap.solver.ranking import pool_adjacent_violators
from lightning_cap.sparsity.allocation import Allocation, Uniform
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import require_choice, require_counts, require_real
from lightning_cap.utilities.distributed import gather_rows, raise_on_all_ranks, rank, world_size
from lightning_cap.utilities.progress import Progress


@dataclass(kw_only=True, eq=False)
class LayerwiseOBS(Blockwise):
    """OBS on ``‖(W - Ŵ) X‖²``, the change of each layer's output on calibration inputs, in place of the loss.

    The Hessian ``2 X Xᵀ / n`` of a row's error is the same for all output rows of a layer (OBC, Frantar & Alistarh 2022), and
    needs forward passes alone: no labels, no gradients. For the masks rows are cut into blocks of ``block_size`` inputs; with one
    no smaller than a row it is OBC itself. The kept weights of a row are then solved for with the whole Hessian of its layer. The
    saliency is the squared error of the layers' outputs, as the blocks tell it, not the loss: a sum over targets of different
    scales, which is why zeros are shared out uniformly by default.

    Args:
        block_size: Weights of an output row in a block, ``B``, in which masks are chosen: time of it is ``O(d·B²)``. That of the
            weights is ``O(d·I²)`` with rows of ``I``.
        num_inputs: Samples whose layer inputs are collected, ``n``.
        damp: Added to the diagonal of a layer's Hessian, as a fraction of its mean.
        allocation: How zeros are shared out over the targets. Default: `Uniform`.
        pattern: Which masks are allowed. Default: `Unstructured`.
        backend: See `CAP`.

    Raises:
        ConfigError: A number is out of range, or the backend cannot run.
        PatternError: ``pattern`` is not one, or one that blocks cannot enforce.
    """

    num_inputs: int = 1024
    damp: float = 0.01
    allocation: Allocation = Uniform()
    backend: Backend = "auto"

    predicts_loss: ClassVar[bool] = False  # but the error of outputs

    def __post_init__(self) -> None:
        require_counts(num_inputs=self.num_inputs)
        require_real("damp", self.damp, "(0, inf)", example=0.01)  # relative as it is
        require_choice("backend", self.backend, get_args(Backend))
        super().__post_init__()

    @property
    def statistic(self) -> LayerInputs:
        """Inputs of the targets' layers."""
        return LayerInputs(self.num_inputs)

    @property
    def solver_backend(self) -> Backend:
        """``backend``."""
        return self.backend

    def _layout(self, targets: Targets) -> BlockLayout:
        require_targets(targets)
        return targets.row_blocks(self.block_size, self.pattern.group_size)

    def plan_blocks(self, layout: BlockLayout, alive: Tensor, source: SourceMemory) -> MemoryPlan:
        """The Hessians of all layers, and chunks of blocks that are solved. No limit is known."""
        busy = alive.any(-1).nonzero().squeeze(1).cpu()
        shares = tuple(busy.tensor_split(world_size()))
        B, entries = layout.block_size, layout.num_blocks * layout.block_size
        backend = choose_backend(self.backend, alive.device, self.pattern)
        chunk = max(1, min(2**22 // B**2, len(shares[0])))
        inputs = [torch.Size(shape[1:]).numel() for shape in layout.shapes.values()]  # at the most: groups have fewer
        hessians, largest = 8 * sum(n**2 for n in inputs), 8 * max(inputs, default=0) ** 2
        blocks = 4 * B * sum(n + B for n in inputs)
        reading = 5 * entries + hessians + max(source.computing(1), source.row + largest)
        cutting = 5 * entries + hessians + blocks + 3 * largest
        held = 32 * entries + blocks + hessians // 2
        solve = held + work_bytes(backend, B, chunk, packed=False) + 8 * chunk * B**2
        rows = [Rows.bytes_of(shape[0], n, backend) for shape, n in zip(layout.shapes.values(), inputs, strict=True)]
        peak = max(reading, cutting, solve, held + max(rows, default=0))
        return MemoryPlan(alive.device, peak, None, "block_size", alive.device, 0, (shares,), chunk)

    def read_blocks(
        self, layout: BlockLayout, plan: MemoryPlan, number: int, gradients: GradientSource
    ) -> SharedBlocks:
        """Add up the Hessians."""
        grams = sum_up(gradients, plan.device, layout.shapes)
        hessians = {name: grams.pop(name).mul_(2 / grams.count) for name in layout.shapes}
        return SharedBlocks(layout, hessians, grams.count, plan.groups[number], plan.device)

    def order_blocks(
        self, fisher: SharedBlocks, weights: Tensor, alive: Tensor, damp: Tensor, chunk: int, progress: Progress | None
    ) -> Elimination:
        """By the Optimal Brain Surgeon; losses in the units of the layers' outputs."""
        out = eliminate(fisher, weights, alive, damp, self.pattern, progress, self.backend, chunk)
        out.losses.mul_(fisher.scale.unsqueeze(-1))
        return out

    def rebuild_together(
        self, fisher: SharedBlocks | None, layout: BlockLayout, weights: Tensor, alive: Tensor, pruned: Tensor
    ) -> Tensor:
        """The joint optimum of every row under the whole Hessian of its layer; rows are shared out over the processes."""
        moved: dict[str, Tensor] = {}
        shares: dict[str, tuple[Tensor, ...]] = {}
        spans = layout.spans if fisher is not None else {}
        with raise_on_all_ranks("Reconstructing the weights"):
            backend = choose_backend(self.backend, weights.device)
            for name, span in spans.items():
                assert fisher is not None
                w, stays, goes = (_in_rows(part[span], layout.shapes[name]) for part in (weights, alive, pruned))
                shares[name] = goes.any(-1).nonzero().squeeze(1).tensor_split(world_size())
                own = shares[name][rank()]
                given = Rows(fisher.hessians[name], own, len(w), backend)
                damp = torch.full((len(own),), self.damp, dtype=torch.float64, device=own.device)
                exact = torch.ones_like(own, dtype=torch.bool)
                moved[name] = reconstruct(given, w[own], stays[own], goes[own], damp, exact, backend, given.chunk)
        out = weights.clone()
        for name, found in moved.items():
            rows = torch.cat(shares[name])
            if len(rows):
                in_rows = _in_rows(out[spans[name]], layout.shapes[name])
                in_rows[rows] = gather_rows(found, [len(share) for share in shares[name]])
        return out

    def merge_scores(self, losses: Tensor) -> Tensor:
        """The lower convex envelope of each block's losses."""
        return pool_adjacent_violators(losses)


class Rows:
    """The Hessian of a layer as the block of each of some of its rows, for `reconstruct`.

    Args:
        hessian: ``(G, I, I)`` float32.
        rows: ``(k,)`` those that are meant.
        count: Rows of the layer.
        backend: That it is for, resolved.

    Attributes:
        triangles: For compiled code, ``(G, I (I + 1) / 2)`` and their scale; else None.
        places: ``(k,)`` which of the ``G`` are the rows'.
        chunk: Rows to solve at a time.
    """

    def __init__(self, hessian: Tensor, rows: Tensor, count: int, backend: Backend) -> None:
        self._hessian, self.places = hessian, rows // (count // len(hessian))
        self.triangles = (pack_triangles(hessian), 1.0) if backend == "numba" else None
        self.chunk = self._chunk(count, hessian.shape[-1], backend)

    @staticmethod
    def _chunk(rows: int, inputs: int, backend: Backend) -> int:
        return max(1, min(rows, (2**26 if backend == "numba" else 2**24) // inputs**2))

    @classmethod
    def bytes_of(cls, rows: int, inputs: int, backend: Backend) -> int:
        """What it takes to solve so many rows, the Hessian itself not counted."""
        chunk = cls._chunk(rows, inputs, backend)
        return 2 * inputs**2 + 32 * rows * inputs + work_bytes(backend, inputs, chunk, packed=True)

    def __getitem__(self, index: Tensor) -> Tensor:
        """``(k,)`` int64 -> ``(k, I, I)`` float32."""
        return self._hessian[self.places[index]]


class SharedBlocks:
    """Blocks ``(k, B, B)`` on the diagonal of the layers' Hessians, each layer's scaled to a mean diagonal of 1.

    Args:
        layout: With blocks inside output rows.
        hessians: ``{target: (G, I, I)}`` float64, ``I`` in the order of the weight as stored; emptied.
        count: Samples that they are of.
        own: ``(K_r,)`` indices of this process's blocks.
        device: Where to hand them out.

    Attributes:
        hessians: ``{target: (G, I, I)}`` float32, ``I`` in the order of the layout, of which the blocks are.
        scale: ``(K_r,)`` float32, what each block was divided by.
        triangles: None: blocks are not packed.
    """

    triangles = None

    def __init__(
        self, layout: BlockLayout, hessians: dict[str, Tensor], count: int, own: Tensor, device: torch.device
    ) -> None:
        B, self.count = layout.block_size, count
        self.hessians: dict[str, Tensor] = {}
        blocks, places, scales, first = [], [], [], 0
        for name, shape in layout.shapes.items():
            hessian = _ordered(hessians.pop(name), shape, layout.group_size)
            scale = float(hessian.diagonal(dim1=-2, dim2=-1).mean()) or 1.0
            self.hessians[name] = whole = (hessian / scale).float().to(device)
            groups, count = len(hessian), -(-hessian.shape[-1] // B)
            extra = count * B - hessian.shape[-1]
            padded = torch.nn.functional.pad(whole, (0, extra, 0, extra))
            parts = padded.view(groups, count, B, count, B).diagonal(dim1=1, dim2=3).movedim(-1, 1)
            blocks.append(parts.reshape(-1, B, B))
            row = torch.arange(shape[0]) // (shape[0] // groups)
            places.append((first + row.unsqueeze(1) * count + torch.arange(count)).flatten())
            scales.append(torch.full((shape[0] * count,), scale))
            first += groups * count
        self._blocks = torch.cat(blocks).to(device)
        self._places = torch.cat(places)[own].to(device)
        self.scale = torch.cat(scales)[own].to(device)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def diagonal(self) -> Tensor:
        """``(K_r, B)``, zero for inputs that are zero in every sample."""
        return self._blocks.diagonal(dim1=-2, dim2=-1)[self._places]

    def __getitem__(self, index: Tensor) -> Tensor:
        """``(k,)`` int64 -> ``(k, B, B)`` float32."""
        taken: Tensor = self._blocks[self._places[index]]
        return taken


def _in_rows(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The blocks of a target as its rows ``(O, I)``, a view."""
    return blocks.view(shape[0], -1)[:, : torch.Size(shape[1:]).numel()]


def _ordered(hessian: Tensor, shape: tuple[int, ...], group_size: int) -> Tensor:
    """Rows and columns in the order of the layout: kernel positions before inputs where groups lie along the inputs."""
    if group_size == 1 or len(shape) < 3:
        return hessian
    inputs = shape[1]
    split: Tensor = hessian.unflatten(2, (inputs, -1)).unflatten(1, (inputs, -1))  # (G, I, k, I, k)
    return split.permute(0, 2, 1, 4, 3).reshape(hessian.shape)
