"""Just the memory for so many passes over the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_cap.calibration.sources import NO_MEMORY, SourceMemory
from lightning_cap.errors import CAPError
from lightning_cap.sparsity.targets import Targets


def with_passes(passes: int, make: Callable[..., Any], targets: Targets, source: SourceMemory = NO_MEMORY) -> Any:
    """``make(max_memory=...)`` with the least memory at which its plan has so many passes."""

    def suffices(limit: int) -> bool:
        try:
            found: int = make(max_memory=limit).plan(targets, source=source).passes
        except CAPError:
            return False
        return found <= passes

    too_little, enough = 0, 1 << 30
    assert suffices(enough)
    while enough - too_little > 1:
        middle = (too_little + enough) // 2
        too_little, enough = (too_little, middle) if suffices(middle) else (middle, enough)
    pruner = make(max_memory=enough)
    assert pruner.plan(targets, source=source).passes == passes
    return pruner
