"""Means over gradient rows, for every weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource, check_any_rows, check_rows, reading
from lightning_cap.pruners.zero_gradients import check_zeros
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed


def temporary_bytes(targets: Targets) -> int:
    """Memory that `RowMean.over` takes for a row of a chunk, beyond the row: copies of the largest target's, one in float64."""
    return 16 * max(weight.numel() for weight in targets.values())


class RowMean:
    """Adds up a statistic of gradient rows over all processes, in float64.

    Args:
        statistic: ``(n, *shape)`` rows -> ``(n, *shape)``, such as their squares.
    """

    def __init__(self, statistic: Callable[[Tensor], Tensor]) -> None:
        self._statistic = statistic

    def over(self, targets: Targets, gradients: GradientSource) -> dict[str, Tensor]:
        """Mean over all rows, ``{target: (*shape)}`` float64. Every process must call it.

        Args:
            targets: The weights.
            gradients: Rows; read once.

        Raises:
            GradientError: There is no row, all are zero, a target is missing, or its rows do not have the weight's shape.
        """
        sums = {n: torch.zeros(w.shape, dtype=torch.float64, device=w.device) for n, w in targets.items()}
        count = 0
        with reading(gradients) as chunks:
            for chunk in chunks:
                check_rows(chunk, targets.shapes, targets)
                for name, total in sums.items():
                    total += self._statistic(chunk[name].to(total.device).float()).sum(0, dtype=torch.float64)
                count += next(iter(chunk.values())).shape[0]
                del chunk
        counts = distributed.gather_counts(count, targets.device)
        check_any_rows(counts)
        means = {name: distributed.sum_over_ranks(total) / sum(counts) for name, total in sums.items()}
        check_zeros({name: bool(mean.any()) for name, mean in means.items()}, sum(counts), "gradients")
        return means
