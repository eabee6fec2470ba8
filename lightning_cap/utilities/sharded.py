"""Parameters that FSDP2 (`fully_shard`) has shared out over processes: the one place that knows of `DTensor`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_cap.errors import UnsupportedError
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_instance, require_text

_OUT = "Shard with fully_shard over all processes along dim 0, as ModelParallelStrategy(tensor_parallel_size=1) does"


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which this process holds a part."""
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of several tensors is sharded."""
    return any(is_sharded(tensor) for tensor in tensors.values())


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory: rows of a sharded one, which may be none; else all of it."""
    part: Tensor = cast(Any, tensor).to_local() if is_sharded(tensor) else tensor
    return part


def shard_ranges(tensor: Tensor) -> list[range]:
    """The flat indices (row-major) of a tensor that each process holds, in order of rank: whole rows, as `torch.chunk` cuts them.

    The last ones may be empty. Every process holds all of a tensor that is not sharded.
    """
    require_instance("tensor", tensor, Tensor, "model.weight")
    if not is_sharded(tensor):
        return [range(tensor.numel())] * distributed.world_size()
    processes = cast(Any, tensor).device_mesh.size()
    rows, row = tensor.shape[0], torch.Size(tensor.shape[1:]).numel()
    size = -(-rows // processes)
    ends = [min(rows, size * rank) * row for rank in range(processes + 1)]
    return [range(first, last) for first, last in itertools.pairwise(ends)]


def shard_range(tensor: Tensor) -> range:
    """Those that this process holds."""
    return shard_ranges(tensor)[distributed.rank()]


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this process holds ``part``, sharded as ``like`` is; ``part`` itself where that is not sharded."""
    if not is_sharded(like):
        return part
    given = cast(Any, like)
    made: Tensor = _loaded("torch.distributed.tensor", "DTensor").from_local(
        part, given.device_mesh, given.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of ``like``, in the shape of `local`, on the device of ``like``."""
    if not is_sharded(like) or is_sharded(whole):
        return local(whole).to(local(like).device)
    own = shard_range(like)
    return whole.reshape(-1)[own.start : own.stop].view(local(like).shape).to(local(like).device)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process. Every process must call it."""
    if not is_sharded(tensor):
        return tensor
    ranges, own = shard_ranges(tensor), local(tensor).detach().reshape(-1)
    carrier = own.view(torch.uint8) if own.dtype == torch.bool else own
    padded = carrier.new_zeros(max(len(r) for r in ranges))
    padded[: len(carrier)] = carrier
    parts = distributed.gather_tensors(padded)
    flat = torch.cat([part[: len(r)] for part, r in zip(parts, ranges, strict=True)])
    return flat.view(own.dtype).view(tensor.shape) if own.dtype == torch.bool else flat.view(tensor.shape)


def check_sharding(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is sharded in another way than by whole rows over all processes.

    Args:
        name: Of the tensor, for the message.
        tensor: Any.

    Raises:
        UnsupportedError: It is.
    """
    require_text("name", name, "fc.weight")
    require_instance("tensor", tensor, Tensor, "model.weight")
    if not is_sharded(tensor):
        return
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    if mesh.ndim != 1:
        raise UnsupportedError(
            f"target {name!r} is sharded over a mesh of {mesh.ndim} dimensions (hybrid sharding or tensor parallel). {_OUT}."
        )
    if not placements[0].is_shard(0):
        raise UnsupportedError(f"target {name!r} is placed as {placements[0]} (tensor parallel?). {_OUT}.")
    if mesh.mesh.tolist() != list(range(distributed.world_size())):
        raise UnsupportedError(
            f"target {name!r} is sharded over processes {mesh.mesh.tolist()}, not over all {distributed.world_size()}. {_OUT}."
        )
    if local(tensor).device.type != mesh.device_type:
        raise UnsupportedError(
            f"target {name!r} is kept on {local(tensor).device}, while its processes meet on {mesh.device_type} "
            "(CPUOffloadPolicy?). Keep it there, by fully_shard without an offload_policy."
        )


def reshard(model: nn.Module) -> None:
    """Have every unit of `fully_shard` hold its own shards alone, as it does between training steps.

    After a forward pass without a backward pass the outermost unit keeps its whole weights, which hides a change of the shards.
    """
    for module in units(model):
        cast(Any, module).reshard()


def units(model: nn.Module) -> list[nn.Module]:
    """The units of `fully_shard` in a model, outer before inner; none where it is not sharded."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def parameter(model: nn.Module, owner: nn.Module, name: str) -> Tensor:
    """A sharded parameter as it is now: the one of the ``owner``, once the units of ``model`` hold their shards alone."""
    found: Tensor = getattr(owner, name)
    if not is_sharded(found):
        reshard(model)
        found = getattr(owner, name)
    return found


def _loaded(module: str, name: str) -> Any:
    """A class of torch if it has been imported; else there is no tensor or module of it."""
    return getattr(sys.modules.get(module), name, None)
