"""Sharing a model out over processes by `fully_shard` (FSDP2), block by block."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from lightning_cap.utilities.arguments import require_instance


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is a sequence of: of every ``Sequential`` or ``ModuleList`` the children of several layers whose
    kind it has more than once. Inner ones before those that they are in.

    Args:
        model: Any.

    Raises:
        ConfigError: It is not a module.
    """
    require_instance("model", model, nn.Module, "timm.create_model('vit_tiny_patch16_224')")
    found: dict[int, nn.Module] = {}
    for container in model.modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        kinds = Counter(type(child) for child in container)
        for child in container:
            inner = [part for part in child.modules() if next(part.parameters(recurse=False), None) is not None]
            if kinds[type(child)] > 1 and len(inner) > 1 and not isinstance(child, nn.ModuleList):
                found[id(child)] = child
    return list(found.values())[::-1]


def shard_by_blocks(model: nn.Module, mesh: Any) -> None:
    """Share the weights out over processes, so that each holds the whole of one block at a time. Done once, it stays so.

    Args:
        model: The same on every process; every process must call it.
        mesh: A `DeviceMesh` of one dimension.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
