"""A sparsity that falls inside a Lightning run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_cap.pruners import Magnitude, Pruner
from lightning_cap.schedules import SparsitySchedule, SparsitySteps
from lightning_cap.sparsity.allocation import PerTarget, Uniform
from tests.support.regrowing import fit
from tests.support.toy import TARGET, Toy, ToyData, callback, cap, loaders, trainer, zeros
from tests.support.watch import Watch

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("pruner", [Magnitude(), cap(num_gradients=64)], ids=["magnitude", "cap"])
def test_a_declared_decrease_brings_back_the_largest_gradients(tmp_path: Path, pruner: Pruner) -> None:
    class Before(pl.Callback):
        """The gradient of the calibration loss right before the event of epoch 2."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                pl_module.eval()
                x, y = exact.x, exact.y
                loss = torch.nn.functional.cross_entropy(pl_module(x), y)
                self.gradient = torch.autograd.grad(loss, pl_module.net[4].weight)[0].abs()
                pl_module.train()

    class Exact(Toy):
        """Calibrates on whole passes over the data, without noise: one by 64 samples, eight by the default of `DropAndGrow`."""

        def calibration_dataloader(self) -> Any:
            return DataLoader(exact, batch_size=16)

    exact = ToyData(noise=0.0)
    own, watch = Before(), Watch()
    cb = callback(SparsitySteps({0: 0.75, 2: 0.5}, allow_decrease=True), pruner=pruner, dirpath=str(tmp_path))
    module = Exact()
    trainer(tmp_path, own, cb, watch).fit(module, **loaders())
    assert zeros(module).sum() == 128
    back = watch.masks[2] & ~watch.masks[1]
    assert back.sum() == 64
    assert not (watch.masks[1] & ~watch.masks[2]).any(), "none is dropped"
    assert not watch.weights[2][back].any()
    masked = own.gradient.masked_fill(watch.masks[1], -1.0)
    assert torch.equal(back.flatten().nonzero().flatten(), masked.flatten().topk(64).indices.sort().values)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["sparsity=0.50.ckpt", "sparsity=0.75.ckpt"]


def test_a_decrease_keeps_to_the_pruners_allocation(tmp_path: Path) -> None:
    falling = SparsitySteps({0: 0.75, 2: 0.5}, allow_decrease=True)
    both = {"include": ["net.0.weight", TARGET]}
    _, cb, _ = fit(tmp_path / "uniform", falling, Magnitude(allocation=Uniform()), callback=both)
    assert {name: int((~mask).sum()) for name, mask in cb.masks.items()} == {"net.0.weight": 96, TARGET: 128}
    first = PerTarget({"net.0.weight": 0.5})
    _, cb, watch = fit(tmp_path / "given", falling, Magnitude(allocation=first), callback=both)
    assert int((~watch.masks[1]).sum()) == 336 - 96
    assert {name: int((~mask).sum()) for name, mask in cb.masks.items()} == {"net.0.weight": 96, TARGET: 128}


def test_an_undeclared_decrease_changes_nothing_and_saves_nothing(tmp_path: Path) -> None:
    class Falling(SparsitySchedule):
        """One that does not say that it regrows."""

        def events(self, max_epochs: int | None) -> dict[int, float]:
            return {0: 0.75, 2: 0.5}

    with pytest.warns(UserWarning, match=r"sparsity 0\.5 at epoch 2, but the model is already at 0\.75"):
        module, _, watch = fit(tmp_path, Falling(), Magnitude())
    assert zeros(module).sum() == 192
    assert all(int((~mask).sum()) == 192 for mask in watch.masks)
    assert [p.name for p in (tmp_path / "out").glob("*.ckpt")] == ["sparsity=0.75.ckpt"]
