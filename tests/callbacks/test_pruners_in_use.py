"""The new pruners inside a Lightning run, one-shot with recomputations, and in several passes over the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap import prune
from lightning_cap.errors import CAPError
from lightning_cap.pruners import (
    CAP,
    MFAC,
    DiagonalFisher,
    FastCAP,
    GradientTimesWeight,
    LayerwiseOBS,
    Pruner,
    Random,
    Taylor,
    WoodFisher,
)
from lightning_cap.pruners.blockwise import Blockwise
from lightning_cap.sparsity.allocation import Global
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, check_pattern
from lightning_cap.sparsity.targets import Targets
from tests.support.toy import Toy, ToyData, callback, loaders, trainer, zeros

GIVEN: dict[str, Any] = {"num_gradients": 32, "damp": 1e-4}
PRUNERS: list[Pruner] = [
    WoodFisher(block_size=16, **GIVEN),
    WoodFisher(block_size=16, **GIVEN, update="simple", pattern=BlockOf(4)),
    CAP(block_size=16, **GIVEN, pattern=BlockOf(4), ranking="cumulative"),
    MFAC(block_size=64, **GIVEN, mode="static"),
    FastCAP(block_size=16, **GIVEN, allocation=Global(0.1)),
    FastCAP(block_size=16, **GIVEN, pattern=BlockOf(2)),
    LayerwiseOBS(block_size=16, num_inputs=32),
    LayerwiseOBS(block_size=8, num_inputs=32, pattern=BlockOf(4)),
    DiagonalFisher(**GIVEN, pattern=OutputRows()),
    GradientTimesWeight(num_gradients=32),
    Taylor(num_gradients=32),
    Random(seed=1, pattern=OutputRows()),
]


def _name(pruner: Pruner) -> str:
    return f"{type(pruner).__name__}-{pruner.pattern}"


@pytest.mark.parametrize("pruner", PRUNERS, ids=_name)
def test_events_in_a_run(tmp_path: Any, pruner: Pruner) -> None:
    module = Toy()
    hook = callback({1: 0.5, 2: 0.75}, pruner=pruner, num_recomputations=2)
    seen: list[Tensor] = []
    module.on_train_epoch_end = lambda: seen.append(zeros(module).clone())  # type: ignore[method-assign]
    trainer(tmp_path, hook, max_epochs=3).fit(module, **loaders())
    assert [int(z.sum()) for z in seen] == [0, 128, 192]
    assert not (seen[1] & ~seen[2]).any()
    check_pattern(Targets.from_model(module), pruner.pattern)
    assert all(p.isfinite().all() for p in module.parameters())


def test_one_pattern_after_another() -> None:
    """3:4, then 2:4, each from what is left."""
    net = Toy().net
    data = DataLoader(ToyData(noise=0.0), batch_size=16)
    for n in (3, 2):
        pruner = WoodFisher(block_size=16, **GIVEN, pattern=NofM(n, 4))
        prune(net, data, loss, 1 - n / 4, pruner, progress=False)
        check_pattern(Targets.from_model(net), NofM(n, 4))
    assert int((net[4].weight == 0).sum()) == 128


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize(
    "pruner",
    [LayerwiseOBS(block_size=16, num_inputs=32), MFAC(block_size=64, **GIVEN), FastCAP(block_size=16, **GIVEN)],
    ids=_name,
)
def test_other_precisions(tmp_path: Any, pruner: Pruner, precision: Any) -> None:
    module = Toy()
    batches = loaders()
    if precision == "64-true":
        module.transfer_batch_to_device = lambda batch, *_: (batch[0].double(), batch[1])  # type: ignore[method-assign]
    trainer(tmp_path, callback({1: 0.5}, pruner=pruner), max_epochs=2, precision=precision).fit(module, **batches)
    assert int(zeros(module).sum()) == 128


@pytest.mark.parametrize(
    "pruner",
    [
        WoodFisher(block_size=8, **GIVEN),
        WoodFisher(block_size=8, **GIVEN, update="simple", pattern=BlockOf(4)),
        CAP(block_size=8, **GIVEN, pattern=BlockOf(4), ranking="cumulative", allocation=Global(0.2)),
        MFAC(block_size=8, **GIVEN),
        MFAC(block_size=8, **GIVEN, mode="static"),
    ],
    ids=_name,
)
def test_several_passes_give_what_one_gives(pruner: Blockwise) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(30, 40, generator=generator), "b": torch.randn(20, 24, generator=generator)}
    targets = Targets(weights)
    rows = [{n: torch.randn(8, *w.shape, generator=generator) for n, w in weights.items()} for _ in range(4)]
    one = pruner.path(targets, rows)
    pruner.max_memory = _limit_of_two_passes(pruner, targets)
    try:
        two = pruner.path(targets, rows)
        assert (one.plan.passes, two.plan.passes) == (1, 2)
        for sparsity in (0.4, 0.7):
            a, b = one.at(sparsity), two.at(sparsity)
            for name in weights:
                assert torch.equal(a.masks[name], b.masks[name])
                torch.testing.assert_close(a.weights[name], b.weights[name], rtol=1e-4, atol=1e-5)
            assert a.predicted_loss == pytest.approx(b.predicted_loss, rel=1e-5)
    finally:
        pruner.max_memory = None


def _limit_of_two_passes(pruner: Blockwise, targets: Targets) -> int:
    for limit in range(10_000, 10**7, 10_000):
        pruner.max_memory = limit
        try:
            if pruner.plan(targets).passes == 2:
                return limit
        except CAPError:
            continue
    raise AssertionError
