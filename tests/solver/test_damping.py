from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cap.errors import GradientError
from lightning_cap.solver.damping import more_damp, solve_with_damping


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
