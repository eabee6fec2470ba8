from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap.calibration.statistics import GradientSamples, LayerInputs, Statistic
from lightning_cap.pruners import CAP, LayerwiseOBS, Magnitude
from lightning_cap.sparsity import Targets
from tests.support.toy import CLASSES, FEATURES, ToyData


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()


def test_pruners_say_what_they_read() -> None:
    assert CAP(num_gradients=40, samples_per_gradient=2).statistic == GradientSamples(40, 2)
    assert LayerwiseOBS(num_inputs=30).statistic == LayerInputs(30)
    assert Magnitude().statistic is None


@pytest.mark.parametrize(
    ("statistic", "samples", "collected"),
    [(GradientSamples(12), 12, 12), (GradientSamples(12, 2), 24, 12), (LayerInputs(20), 20, 20)],
)
def test_the_value_makes_its_own_batches_and_collector(
    model: nn.Module, statistic: Statistic, samples: int, collected: int
) -> None:
    targets = Targets.from_model(model)
    batches = statistic.batches(DataLoader(ToyData(), batch_size=8), targets, (3, 0))
    collector = statistic.collector(model, targets, loss, batches)
    chunks = list(collector)
    assert statistic.num_samples == samples
    assert collector.collected == collected
    assert collector.skipped == 0
    assert all(set(chunk) == set(targets) for chunk in chunks)
    assert statistic.unit == ("inputs" if isinstance(statistic, LayerInputs) else "gradients")
    if isinstance(statistic, GradientSamples):
        assert sum(len(next(iter(chunk.values()))) for chunk in chunks) == statistic.n


def test_a_batch_can_be_tried(model: nn.Module) -> None:
    targets = Targets.from_model(model)
    for statistic in (GradientSamples(4), LayerInputs(4)):
        with pytest.raises(Exception, match=r"size|shape|mat1"):
            statistic.collector(model, targets, loss, []).probe((torch.zeros(2, FEATURES + 1), torch.zeros(2).long()))
