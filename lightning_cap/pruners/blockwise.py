"""Methods that order the weights of every block by second-order information: what they have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor

from lightning_cap.calibration.sources import NO_MEMORY, GradientSource, SourceMemory, reading
from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.errors import ConfigError
from lightning_cap.fisher.blocks import ROW_CHUNK, EmpiricalFisher, Storage
from lightning_cap.fisher.memory_plan import MemoryModel, MemoryPlan, plan_event
from lightning_cap.healing import HealArgument, as_heal
from lightning_cap.pruners.base import check_path_arguments, in_blocks, require_allocation
from lightning_cap.pruners.blockwise_path import BlockMethod, BlockwisePath
from lightning_cap.pruners.paths import pack_alive
from lightning_cap.solver import reconstruct
from lightning_cap.solver.backend import Backend, choose_backend
from lightning_cap.solver.damping import Damp, as_relative, require_damp
from lightning_cap.solver.damping import RelativeDamp as RelativeDamp
from lightning_cap.sparsity.allocation import Allocation, Global
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import PatternArgument, as_pattern
from lightning_cap.sparsity.shards import BlockShards, OwnLayout
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import (
    require_choice,
    require_counts,
    require_flag,
    require_real,
    require_whole,
    shown,
)
from lightning_cap.utilities.distributed import raise_on_all_ranks, world_size
from lightning_cap.utilities.memory import parse_bytes
from lightning_cap.utilities.progress import Progress

_MOST_ROWS = 2**16  # that are added up at once


@dataclass(kw_only=True, eq=False)
class Blockwise(BlockMethod):
    """Base of methods that treat blocks of consecutive weights alone and merge them over the model.

    A subclass reads what it needs (`read_blocks`), orders the weights of blocks (`order_blocks`) and moves those that stay
    (`rebuild_blocks`). This class shares the blocks out over processes and passes and finds the global cut.

    Args:
        block_size: Weights in a block, ``B``. One never spans two targets, so it is no larger than the largest.
        damp: ``λ`` of equation 3; or relative to the blocks: a `RelativeDamp`, or ``"auto"``.
        allocation: How zeros are shared out over the targets.
        pattern: Which masks are allowed. Default: `Unstructured`.
        heal: What moves the kept weights after pruning; see `LayerwiseHeal`.

    Raises:
        ConfigError: A number is out of range.
        PatternError: ``pattern`` is not one, or one that blocks cannot enforce.
    """

    block_size: int = 192
    damp: Damp = 1e-8
    allocation: Allocation = Global()
    pattern: PatternArgument = None
    heal: HealArgument = None

    predicts_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(block_size=self.block_size)
        require_damp(self.damp)
        require_allocation(self.allocation)
        self.heal = as_heal(self.heal)
        self.pattern = in_blocks(as_pattern(self.pattern), type(self).__name__)

    @property
    def solver_backend(self) -> Backend:
        """The code that orders blocks."""
        return "torch"

    def check(self, targets: Targets) -> None:
        """Refuse targets that the pattern does not divide or the allocation does not know, and a backend that cannot run."""
        self.allocation.check(self._layout(targets).shapes)
        choose_backend(self.solver_backend, targets.device, self.pattern)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give."""
        self.pattern.check_sparsity(sparsity)

    def plan(
        self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, source: SourceMemory = NO_MEMORY
    ) -> MemoryPlan:
        """Where the Fisher is kept and in how many passes it is built. See `Pruner.plan`."""
        layout = self._layout(targets)
        shards = BlockShards(targets, layout) if targets.is_sharded else None
        alive = pack_alive(targets, layout, masks, shards)
        return self.plan_blocks(layout if shards is None else shards.own, alive, source)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource,
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> BlockwisePath:
        """Read what the blocks need and order every block to its end."""
        check_path_arguments(targets, gradients, progress)
        path = BlockwisePath(self, targets, self._layout(targets), masks, gradients, progress)
        for warning in self._warnings(path):
            warnings.warn(warning, stacklevel=2)
        return path

    def _warnings(self, path: BlockwisePath) -> list[str]:
        """What the user should know of a path."""
        raised = path.stats["blocks_damping_increased"]
        if not raised:
            return []
        return [
            f"damp={shown(self.damp)}: {raised:g} of {path.stats['blocks']:g} Fisher blocks factored only with a larger one, "
            "or needed it to rise above the rounding of few gradients' sums (up to "
            f"{path.stats['largest_damp']:g}). Raise damp if there are many."
        ]

    def _layout(self, targets: Targets) -> BlockLayout:
        require_targets(targets)
        group = self.pattern.group_size
        largest = -(-max(weight.numel() for weight in targets.values()) // group) * group
        return targets.blocks(min(self.block_size, largest), group)  # no padding beyond the largest target

    def rebuild_blocks(
        self,
        fisher: Any,
        weights: Tensor,
        alive: Tensor,
        pruned: Tensor,
        damp: Tensor,
        use_float64: Tensor,
        chunk: int,
    ) -> Tensor:
        """The joint optimum of equation 5."""
        return reconstruct(fisher, weights, alive, pruned, damp, use_float64, self.solver_backend, chunk)


@dataclass(kw_only=True, eq=False)
class GradientBlockwise(Blockwise):
    """Base of blockwise methods that read gradient rows.

    Args:
        num_gradients: Gradient samples, ``N`` of equation 3.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        max_memory: What an event may take on the device of the weights. See `CAP`.
        row_chunk: Gradient rows that are added up at once.
    """

    num_gradients: int = 4096
    samples_per_gradient: int = 1
    max_memory: int | str | None = None
    row_chunk: int = ROW_CHUNK

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(num_gradients=self.num_gradients, samples_per_gradient=self.samples_per_gradient)
        require_whole("row_chunk", self.row_chunk, at_most=_MOST_ROWS, example=ROW_CHUNK)
        parse_bytes(self.max_memory, "max_memory")

    @property
    def statistic(self) -> GradientSamples:
        """Gradient rows."""
        return GradientSamples(self.num_gradients, self.samples_per_gradient)

    @property
    def row_buffer(self) -> int:
        """Rows that are held before they are added up; no more than there are."""
        return min(self.row_chunk, self.num_gradients)

    def state_dict(self) -> dict[str, Any]:
        """The row chunk, on which results depend by rounding."""
        return {"row_chunk": self.row_chunk}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the row chunk of the checkpoint."""
        super().load_state_dict(state)
        require_whole("row_chunk", state.get("row_chunk", self.row_chunk), at_most=_MOST_ROWS)
        self.row_chunk = int(state.get("row_chunk", self.row_chunk))

    def plan_blocks(self, layout: BlockLayout, alive: Tensor, source: SourceMemory) -> MemoryPlan:
        """On the device, on the host, or in passes, as memory allows."""
        busy = alive.any(-1).nonzero().squeeze(1).cpu()
        model = self.memory_model(layout, alive, source)
        limit = parse_bytes(self.max_memory, "max_memory")
        plan = plan_event(model, busy, alive.device, limit, sharded=isinstance(layout, OwnLayout))
        plan.check()
        relative = as_relative(self.damp)
        if plan.passes > 1 and relative is not None and relative.scope == "layer":
            raise ConfigError(
                f"damp={shown(self.damp)}: memory allows the Fisher only in {plan.passes} passes, and a layer's mean is known "
                "after all of them. Use scope='block', or raise max_memory."
            )
        return plan

    @abstractmethod
    def memory_model(self, layout: BlockLayout, alive: Tensor, source: SourceMemory) -> MemoryModel:
        """What the memory of an event depends on."""


@dataclass(kw_only=True, eq=False)
class FisherBlockwise(GradientBlockwise):
    """Base of blockwise methods that add gradient rows up to Fisher blocks.

    Args:
        storage: Full blocks or lower triangles. See `CAP`.
        allow_tf32: Let a GPU multiply gradients in TF32. See `CAP`.
        shrinkage: How far blocks are shrunk towards their layer. See `CAP`.
    """

    storage: Storage = "auto"
    allow_tf32: bool = False
    shrinkage: float = 0.0

    @property
    def takes_shards(self) -> bool:
        """All methods of Fisher blocks do."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("storage", self.storage, get_args(Storage))
        require_flag("allow_tf32", self.allow_tf32)
        require_real("shrinkage", self.shrinkage, "[0, 1]", example=0.5)

    def _warnings(self, path: BlockwisePath) -> list[str]:
        found = super()._warnings(path)
        if path.plan.passes > 1 and self.shrinkage:
            found.append(
                f"shrinkage={self.shrinkage:g}: memory allows the Fisher only in {path.plan.passes} passes, each of which shrinks "
                "its blocks towards their own mean. Masks differ from those of one pass: raise max_memory, or give shrinkage=0."
            )
        return found

    def memory_model(self, layout: BlockLayout, alive: Tensor, source: SourceMemory) -> MemoryModel:
        """Blocks in the storage and the backend of this pruner."""
        backend = choose_backend(self.solver_backend, alive.device, self.pattern)
        sizes = layout.block_size, layout.num_blocks, self.row_buffer
        return MemoryModel(*sizes, self.storage, backend, source, world_size())

    def read_blocks(self, layout: BlockLayout, plan: MemoryPlan, number: int, gradients: GradientSource) -> Any:
        """Add up the Fisher of this rank's blocks of one pass."""
        where = plan.storage_device, plan.shares[number]
        with raise_on_all_ranks("Making room for the Fisher"):
            if isinstance(layout, OwnLayout):  # the rows that come are those of these blocks already
                where = plan.storage_device, (plan.groups[number],)
            settings = self.row_buffer, self.storage, *where, self.allow_tf32, self.shrinkage
            fisher = EmpiricalFisher(layout, plan.device, *settings)
        with reading(gradients) as chunks:
            for chunk in chunks:
                fisher.update(chunk)
                del chunk
        return fisher.finish()
