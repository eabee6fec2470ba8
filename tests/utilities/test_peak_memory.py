from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from lightning_cap.utilities import peak_memory
from lightning_cap.utilities.peak_memory import measure_peak, watch_peak

CPU = torch.device("cpu")
MB = 2**20


def megabytes(size: int) -> Tensor:
    return torch.zeros(size, MB // 4)


def test_the_most_that_was_held_at_once_is_counted_and_a_tenth_for_operators() -> None:
    given = megabytes(3)  # was there before

    def work() -> Tensor:
        first = given + 1  # 3
        second = torch.cat([first, first])  # 6
        del first
        return second[:2].clone()  # 2

    result, peak = measure_peak(work, CPU)
    assert result.shape[0] == 2
    assert peak == int(1.1 * 9 * MB)
    assert measure_peak(lambda: given.view(-1)[5:], CPU)[1] == 0, "a view takes nothing"


def test_what_is_done_in_place_is_not_counted_again() -> None:
    assert measure_peak(lambda: megabytes(2).add_(1).mul_(2), CPU)[1] == int(1.1 * 2 * MB)


def test_backward_passes_and_vmap_are_seen() -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(512, 64)
    _, peak = measure_peak(lambda: torch.autograd.grad(layer(x).relu().square().sum(), layer.weight)[0], CPU)
    assert peak >= 1.1 * 4 * (2 * x.numel() + layer.weight.numel()), "activations and the gradient"

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return (weight @ sample).square().sum()

    sizes = [
        measure_peak(lambda n=n: vmap(grad(loss), (None, 0))(layer.weight.detach(), x[:n]), CPU)[1] for n in (8, 16)
    ]
    assert sizes[0] >= 8 * 1.1 * layer.weight.nbytes
    assert 1.9 < sizes[1] / sizes[0] < 2.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell")
def test_the_peak_of_the_process_from_now_on() -> None:
    torch.ones(64 * MB).sum()  # before, and given back
    peak = watch_peak(CPU)
    torch.ones(16 * MB)  # float32; so much is given back at once, less may be kept for what comes next
    torch.ones(2 * MB)
    assert peak() == pytest.approx(64 * MB, abs=4 * MB)


def test_a_peak_that_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch_peak(torch.device("mps"))() is None
    monkeypatch.setattr(peak_memory, "_PROCESS", tmp_path)
    assert watch_peak(CPU)() is None, "another system"
    (tmp_path / "clear_refs").mkdir()
    assert watch_peak(CPU)() is None, "it may not be written to"
