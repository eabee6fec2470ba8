from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.healing.batchnorm import BatchNormStatistics, batch_norms, estimate_statistics
from lightning_cap.utilities import distributed
from tests.support.layers import output_energy
from tests.support.processes import on_ranks


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 3, 3), nn.SyncBatchNorm(3), nn.Dropout(0.5))
    return net.double().eval()


def batches(count: int = 6) -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 2, 8, 8).double() * (1 + number),) for number in range(count)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_first_layer_gets_mean_and_variance_of_all_that_it_is_given() -> None:
    net = model()
    found = estimate_statistics(net, batches(), output_energy)
    given = torch.cat([net[0](x) for (x,) in batches()]).detach()
    torch.testing.assert_close(found.mean["1"], given.mean((0, 2, 3)))
    torch.testing.assert_close(found.var["1"], given.transpose(0, 1).flatten(1).var(1))
    assert found.samples == 24


def test_of_one_batch_it_is_what_training_mode_gives() -> None:
    net = model()
    net[3] = nn.BatchNorm2d(3).double().eval()
    want = copy.deepcopy(net)
    want[4].p = 0.0
    update_bn(batches(1), want)
    estimate_statistics(net, batches(1), output_energy).write(net)
    for number in (1, 3):
        torch.testing.assert_close(net[number].running_mean, want[number].running_mean)
        torch.testing.assert_close(net[number].running_var, want[number].running_var)


def test_writing_changes_the_two_statistics_and_nothing_else() -> None:
    net = model()
    before = state(net)
    found = estimate_statistics(net, batches(), output_energy)
    assert_same(before, state(net))
    assert not any(module._forward_pre_hooks for module in net.modules())
    found.write(net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "3.running_mean", "3.running_var"}
    assert [net[1].momentum, net.training, net[1].training] == [0.1, False, False]


def test_layers_without_statistics_of_their_own_are_left_alone() -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2)
    )
    assert list(batch_norms(net)) == ["1"]


def test_of_a_model_without_batch_norm_nothing_is_read() -> None:
    def never() -> Iterator[Any]:
        raise AssertionError("a batch was read")
        yield

    assert estimate_statistics(nn.Linear(2, 2), never(), output_energy) == BatchNormStatistics({}, {}, 0)


def test_no_more_batches_are_read_than_are_asked_for() -> None:
    told: list[tuple[str, int, int]] = []
    found = estimate_statistics(
        model(), batches(), output_energy, num_samples=6, progress=lambda *news: told.append(news)
    )
    assert found.samples == 8
    assert told == [("recalibrate", 4, 6), ("recalibrate", 6, 6)]


def estimated() -> BatchNormStatistics:
    ranks = slice(distributed.rank(), None, distributed.world_size())
    return estimate_statistics(model(), batches(5)[ranks], output_energy)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    one, other = on_ranks(2, tmp_path, estimated)
    want = estimated()
    for name in ("1", "3"):
        assert torch.equal(one.mean[name], other.mean[name])
        assert torch.equal(one.var[name], other.var[name])
        torch.testing.assert_close(one.mean[name], want.mean[name])
        torch.testing.assert_close(one.var[name], want.var[name])
    assert one.samples == other.samples == want.samples == 20


def test_a_last_batch_of_one_sample_is_left_out() -> None:
    torch.manual_seed(0)
    given = [(torch.randn(4, 2, 5, 5).double(),), (torch.randn(1, 2, 5, 5).double(),)]
    want, found = (estimate_statistics(model(), batches, output_energy) for batches in (given[:1], given))
    torch.testing.assert_close(found.mean["3"], want.mean["3"])
    torch.testing.assert_close(found.var["3"], want.var["3"])
    assert not torch.equal(found.mean["1"], want.mean["1"])  # which gets more than one value from it


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            [torch.ones(4, 2, 8, 8), torch.full((4, 2, 8, 8), torch.nan)],
            GradientError,
            "batch norm '1' gets is not finite",
        ),
        ([], GradientError, "the calibration batches are empty"),
        (
            [torch.ones(1, 2, 5, 5)],
            ConfigError,
            "a batch of 1 samples gives the batch norm '3' a single value per channel",
        ),
        ([torch.ones(4, 2, 8, 8), torch.ones(4, 3, 8, 8)], RuntimeError, "channels"),
    ],
    ids=["nan", "empty", "single", "broken"],
)
def test_failures_leave_the_model_as_it_was(given: list[Tensor], error: type[Exception], message: str) -> None:
    net = model()
    before = state(net)
    with pytest.raises(error, match=message):
        estimate_statistics(net, [(x.double(),) for x in given], output_energy)
    assert_same(before, state(net))
