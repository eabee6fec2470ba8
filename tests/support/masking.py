"""Masks over a model, and the torch operators that an action calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls(action: Callable[[], object]) -> dict[str, int]:
    """The torch operators that ``action`` calls."""
    with Calls() as seen:
        action()
    return dict(seen.names)


CNN_TARGETS = ["2.weight", "6.weight"]  # of the fixture `tiny_cnn`
ONE_CALL = {"_foreach_mul_": 1}


def half_masks(targets: Targets) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(w.shape, generator=generator) > 0.5 for name, w in targets.items()}


def half_masked(model: nn.Module) -> tuple[Targets, MaskSet, dict[str, torch.Tensor]]:
    targets = Targets.from_model(model)
    masks, half = MaskSet(targets), half_masks(targets)
    masks.update(half)
    return targets, masks, half
