from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cap.errors import GradientError
from lightning_cap.solver.damping import (
    AUTO_FRACTION,
    Damp,
    RelativeDamp,
    block_damps,
    more_damp,
    rounding_damp,
    solve_with_damping,
)


def test_precision_comes_first_and_then_ten_times_the_damp() -> None:
    needed = torch.tensor([0.0, 1e-3, 5e-2, 5e-1], dtype=torch.float64)
    double = torch.tensor([False, True, True, True])
    seen: list[tuple[list[int], list[float], torch.dtype]] = []

    def attempt(blocks: Tensor, damp: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append((blocks.tolist(), damp.tolist(), dtype))
        return (damp >= needed[blocks]) & (~double[blocks] | torch.tensor(dtype == torch.float64))

    solve_with_damping(torch.arange(4), torch.full((4,), 1e-2, dtype=torch.float64), torch.float32, attempt)
    assert [(blocks, dtype) for blocks, _, dtype in seen] == [
        ([0, 1, 2, 3], torch.float32),
        ([1, 2, 3], torch.float64),
        ([2, 3], torch.float64),
        ([3], torch.float64),
    ]
    assert [damp[-1] for _, damp, _ in seen] == pytest.approx([1e-2, 1e-2, 1e-1, 1.0])


def test_what_cannot_be_made_invertible_is_an_error() -> None:
    with pytest.raises(GradientError, match="not finite"):
        more_damp(torch.tensor([1e308], dtype=torch.float64))
    never = torch.zeros(1, dtype=torch.bool)
    with pytest.raises(GradientError, match="not finite"):
        solve_with_damping(torch.arange(1), torch.ones(1, dtype=torch.float64), torch.float64, lambda *_: never)


@pytest.mark.parametrize(
    ("damp", "expected"),
    [
        (1e-3, [1e-3] * 4),
        (RelativeDamp(0.1), [0.1 * 2, 0.1 * 4, 0.1 * 6, 1e-30]),
        (RelativeDamp(0.1, "layer"), [0.1 * 16 / 6, 0.1 * 16 / 6, 0.1 * 24 / 8, 0.1 * 24 / 8]),
        ("auto", [AUTO_FRACTION * 2, AUTO_FRACTION * 4, AUTO_FRACTION * 6, 1e-30]),
    ],
)
def test_the_damp_of_each_block(damp: Damp, expected: list[float]) -> None:
    diagonal = torch.tensor([[2.0] * 4, [4.0] * 4, [6.0] * 4, [0.0] * 4])
    alive = torch.ones(4, 4, dtype=torch.bool)
    alive[1, 2:] = False
    diagonal[1, 2:] = 1e9  # whatever is there must not count
    found = block_damps(damp, diagonal, alive, torch.tensor([0, 0, 1, 1]), 2)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)


def test_the_rounding_of_sums_counts_where_rows_are_fewer_than_weights() -> None:
    alive = torch.ones(3, 64, dtype=torch.bool)
    alive[1, 40:] = False
    diagonal = torch.full((3, 64), 2.0)
    diagonal[2] = 0.0
    assert rounding_damp(diagonal, alive.to("meta"), 40).device.type == "meta"  # sums may be kept elsewhere
    assert rounding_damp(diagonal, alive, 40).tolist() == pytest.approx([2.0 * 8 * 2**-24, 0.0, 0.0])
