"""M-FAC against dense float64 inverses, and that it never builds one."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cap.errors import ConfigError, PatternError
from lightning_cap.pruners import MFAC
from lightning_cap.sparsity.patterns import BlockOf, NofM
from lightning_cap.sparsity.targets import Targets
from tests.references.dense import (
    alive_inverse,
    cuts,
    damped_fisher,
    least_in_groups,
    least_mask,
    matrix_of,
    saliencies,
    simple_update,
)
from tests.support.problems import gradient_rows

Rows = list[dict[str, Tensor]]


Mode = Literal["dynamic", "static"]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_damp_that_float64_cannot_take_is_raised(mode: Mode) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    targets = Targets({"a": nn.Parameter(weight)})
    rows = gradient_rows(targets, 90, scale=1e3)
    with pytest.warns(UserWarning, match=r"damp=1e-30: 1 of 1 Fisher blocks factored only with a larger one"):
        path = MFAC(block_size=30, num_gradients=90, damp=1e-30, mode=mode).path(targets, rows)
    damp = path.stats["largest_damp"]
    assert 1e-11 < damp < 1e-3
    scores = saliencies(np.linalg.inv(damped_fisher(matrix_of(rows, "a"), damp)), weight.double().numpy().ravel(),
                        np.ones(30, dtype=bool))  # fmt: skip
    assert path.at(0.5).predicted_loss == pytest.approx(np.sort(scores)[:15].sum(), rel=1e-2)
    assert path.at(0.5).weights["a"].abs().max() < 100


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("block_size", "num_rows", "damp"), [(24, 60, 1e-2), (24, 9, 1e-3), (200, 30, 1e-6)])
@pytest.mark.parametrize("pattern", [None, NofM(2, 4)])
def test_the_path(
    mode: Mode,
    masked: bool,
    block_size: int,
    num_rows: int,
    damp: float,
    pattern: NofM | None,
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (8, 12), "b": (5, 8)}
    targets = Targets({n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()})
    rows = gradient_rows(targets, num_rows)
    masks = {n: torch.rand(s, generator=generator) >= (0.2 if masked else 0.0) for n, s in shapes.items()}
    path = MFAC(block_size=block_size, num_gradients=num_rows, damp=damp, mode=mode, pattern=pattern).path(
        targets, rows, masks
    )
    blocks = []
    for name, weight in targets.weights().items():
        G, alive = matrix_of(rows, name), masks[name].numpy().ravel()
        w = np.where(alive, weight.double().numpy().ravel(), 0.0)
        for part in cuts(w.size, block_size):
            inverse = alive_inverse(damped_fisher(G[:, part], damp), alive[part])
            scores = np.where(alive[part], saliencies(inverse, w[part], alive[part]), np.inf)
            blocks.append((name, part, inverse, w[part], alive[part], scores))
    flat = np.concatenate([scores for *_, scores in blocks])
    existing = sum(int((~m).sum()) for m in masks.values())
    for sparsity in (0.5,) if pattern else (0.4, 0.7, 0.95):
        result = path.at(sparsity)
        if pattern:
            gone = np.concatenate([least_in_groups(scores, alive, 2, 4) for *_, alive, scores in blocks])
        else:
            gone = least_mask(flat, math.floor(sparsity * targets.numel + 0.5) - existing)
        assert result.predicted_loss == pytest.approx(flat[gone].sum(), rel=1e-4)
        first = 0
        for name, part, inverse, w, alive, _ in blocks:
            lost = gone[first : first + len(w)]
            first += len(w)
            np.testing.assert_array_equal(~result.masks[name].numpy().ravel()[part], ~alive | lost)
            expected = simple_update(inverse, w, alive, lost) if lost.any() else w
            got = result.weights[name].numpy().ravel()[part]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * max(1, np.abs(expected).max()))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                assert sum(size >= 2048 for size in tensor.shape) < 2, (func, tensor.shape)
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_no_matrix_of_a_block_is_made(mode: Mode) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = Targets({"a": nn.Parameter(torch.randn(40, 60, generator=generator))})
    rows = [{"a": torch.randn(8, 40, 60, generator=generator)} for _ in range(2)]
    with _Largest() as largest:
        MFAC(block_size=2048, num_gradients=16, damp=1e-4, mode=mode).path(targets, rows).at(0.5)
    assert 0 < largest.numel <= 2 * 32 * 2048  # two blocks; a row chunk of the sums is 32


def test_both_modes_give_the_same_at_every_sparsity() -> None:
    targets = Targets({"a": nn.Parameter(torch.randn(9, 14, generator=torch.Generator().manual_seed(3)))})
    rows = gradient_rows(targets, 40)
    paths = [
        MFAC(block_size=64, num_gradients=40, damp=1e-5, mode=mode).path(targets, rows)
        for mode in ("dynamic", "static")
    ]
    for sparsity in (0.1, 0.5, 0.9):
        one, two = (path.at(sparsity) for path in paths)
        assert torch.equal(one.masks["a"], two.masks["a"])
        torch.testing.assert_close(one.weights["a"], two.weights["a"], rtol=1e-4, atol=1e-4)


def test_what_does_not_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode='both': choose 'dynamic' or 'static'"):
        MFAC(mode="both")  # type: ignore[arg-type]
    with pytest.raises(
        PatternError, match=r"pattern=BlockOf\(n=4\): MFAC has only the diagonal.*Use CAP, WoodFisher or"
    ):
        MFAC(pattern=BlockOf(4))
