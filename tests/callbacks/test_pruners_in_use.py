"""Pruners inside a Lightning run, one-shot with recomputations, and in several passes over the gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cap import prune
from lightning_cap.pruners import WoodFisher
from lightning_cap.sparsity.allocation import Allocation, Global, Uniform
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern, Unstructured, check_pattern
from lightning_cap.sparsity.targets import Targets
from tests.support.memory import with_passes
from tests.support.pruners import METHODS, USUAL
from tests.support.toy import Toy, ToyData, callback, loaders, loss, trainer, zeros

GIVEN: dict[str, Any] = {"block_size": 16, "num_gradients": 32, "num_inputs": 32, "damp": 1e-4}
RUNS: list[tuple[Pattern, Allocation]] = [
    (Unstructured(), Global(0.1)),
    (BlockOf(4), Uniform()),
    (OutputRows(), Uniform()),
]


@pytest.mark.parametrize(
    ("name", "pattern", "allocation"),
    [(name, *how) for name, case in USUAL.items() for how in RUNS if case.takes(how[0])],
    ids=str,
)
def test_events_in_a_run(tmp_path: Path, name: str, pattern: Pattern, allocation: Allocation) -> None:
    module = Toy()
    pruner = USUAL[name].pruner(**GIVEN, pattern=pattern, allocation=allocation)
    hook = callback({1: 0.5, 2: 0.75}, pruner=pruner, num_recomputations=2)
    seen: list[Tensor] = []
    module.on_train_epoch_end = lambda: seen.append(zeros(module).clone())  # type: ignore[method-assign]
    trainer(tmp_path, hook, max_epochs=3).fit(module, **loaders())
    assert [int(z.sum()) for z in seen] == [0, 128, 192]
    assert not (seen[1] & ~seen[2]).any()
    check_pattern(Targets.from_model(module), pattern)
    assert all(p.isfinite().all() for p in module.parameters())


def test_one_pattern_after_another() -> None:
    """3:4, then 2:4, each from what is left."""
    net = Toy().net
    data = DataLoader(ToyData(noise=0.0), batch_size=16)
    for n in (3, 2):
        pruner = WoodFisher(block_size=16, num_gradients=32, damp=1e-4, pattern=NofM(n, 4))
        prune(net, data, loss, 1 - n / 4, pruner, progress=False)
        check_pattern(Targets.from_model(net), NofM(n, 4))
    assert int((net[4].weight == 0).sum()) == 128


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("name", [name for name, case in METHODS.items() if case.reads != "nothing"])
def test_other_precisions(tmp_path: Path, name: str, precision: Any) -> None:
    module = Toy()
    batches = loaders()
    if precision == "64-true":
        module.transfer_batch_to_device = lambda batch, *_: (batch[0].double(), batch[1])  # type: ignore[method-assign]
    hook = callback({1: 0.5}, pruner=METHODS[name].pruner(**GIVEN))
    trainer(tmp_path, hook, max_epochs=2, precision=precision).fit(module, **batches)
    assert int(zeros(module).sum()) == 128


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (name, pattern)
        for name, case in USUAL.items()
        for pattern in (Unstructured(), BlockOf(4))
        if case.takes("max_memory") and case.takes(pattern)
    ],
    ids=str,
)
def test_several_passes_give_what_one_gives(name: str, pattern: Pattern) -> None:
    given = {**GIVEN, "block_size": 8, "shrinkage": 0.0}  # each pass would shrink towards the mean of its own blocks
    make = partial(USUAL[name].pruner, **given, pattern=pattern, allocation=Global(0.2))
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(30, 40, generator=generator), "b": torch.randn(20, 24, generator=generator)}
    targets = Targets(weights)
    rows = [{n: torch.randn(8, *w.shape, generator=generator) for n, w in weights.items()} for _ in range(4)]
    one = make().path(targets, rows)
    two = with_passes(2, make, targets).path(targets, rows)
    assert (one.plan.passes, two.plan.passes) == (1, 2)
    for sparsity in (0.4, 0.7):
        a, b = one.at(sparsity), two.at(sparsity)
        for n in weights:
            assert torch.equal(a.masks[n], b.masks[n])
            torch.testing.assert_close(a.weights[n], b.weights[n], rtol=1e-4, atol=1e-5)
        assert a.saliency == pytest.approx(b.saliency, rel=1e-5)
