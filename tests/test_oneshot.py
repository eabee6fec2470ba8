from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from toy import FEATURES, Toy, ToyData, cap, trainer, zeros

from lightning_cap import prune
from lightning_cap.errors import ConfigError, GradientError, PatternError, TargetError
from lightning_cap.oneshot import sweep
from lightning_cap.pruners import Magnitude


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data() -> DataLoader[Any]:
    return DataLoader(ToyData(), batch_size=16)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(ToyData(), batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(ToyData(32, noise=0.0), batch_size=16)


def trained() -> Toy:
    pl.seed_everything(0, verbose=False)
    module = Toy(scheduler=False)
    trainer(".", max_epochs=10).fit(module, datamodule=Data())
    return module


def test_prune_is_in_place_and_exact() -> None:
    net = Toy().net
    dense = net[4].weight.detach().clone()
    net.train()
    result = prune(net, data(), loss, 0.75, cap(), progress=False)
    assert net.training
    assert torch.equal(net[4].weight, result.weights["4.weight"])
    assert (net[4].weight == 0).sum() == 192
    assert torch.equal(net[4].weight != 0, result.masks["4.weight"])
    assert result.sparsity == 0.75
    assert result.predicted_loss > 0
    kept = result.masks["4.weight"]
    assert not torch.equal(net[4].weight[kept], dense[kept])  # the kept weights compensate


def test_existing_zeros_stay() -> None:
    net = Toy().net
    with torch.no_grad():
        net[4].weight[:, :4] = 0.0
    prune(net, data(), loss, 0.5, cap(), progress=False)
    assert (net[4].weight == 0).sum() == 128
    assert not net[4].weight[:, :4].any()


def test_recomputations_and_one_shot_iterators() -> None:
    one, many = Toy().net, Toy().net
    many.load_state_dict(one.state_dict())
    a = prune(one, data(), loss, 0.75, cap(), progress=False)
    b = prune(many, data(), loss, 0.75, cap(), num_recomputations=4, progress=False)
    assert a.sparsity == b.sparsity == 0.75
    assert not torch.equal(a.masks["4.weight"], b.masks["4.weight"])
    with pytest.raises(ConfigError, match="can be read only once"):
        prune(one, iter(data()), loss, 0.8, cap(), num_recomputations=2, progress=False)
    prune(Toy().net, iter(data()), loss, 0.8, cap(), progress=False)


def test_model_is_unchanged_on_failure() -> None:
    net = Toy().net
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = lambda m, b: loss(m, b) * float("nan")  # noqa: E731
    for error, call in (
        (GradientError, lambda: prune(net, data(), bad, 0.5, cap(), progress=False)),
        (PatternError, lambda: prune(net, data(), loss, 1.0, cap(), progress=False)),
        (PatternError, lambda: prune(net, data(), loss, -0.1, cap(), progress=False)),
        (TargetError, lambda: prune(net, data(), loss, 0.5, cap(), include=["nope"], progress=False)),
        (ConfigError, lambda: prune(net, data(), loss, 0.5, cap(), num_recomputations=0, progress=False)),
    ):
        with pytest.raises(error):
            call()
    calls = []

    def late(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return loss(model, batch) * (float("nan") if len(calls) > 4 else 1.0)

    with pytest.raises(GradientError):  # in the second recomputation, when the first is applied already
        prune(net, data(), late, 0.5, cap(), num_recomputations=2, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_progress_bar_shows_the_phases(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Slow(list):  # type: ignore[type-arg]
        """Reads the terminal between two batches."""

        def __iter__(self) -> Any:
            for batch in data():
                yield batch
                time.sleep(0.15)  # the bar redraws ten times a second
                shown.append(capsys.readouterr().out)

    with monkeypatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("TTY_COMPATIBLE", "1")
        patch.setenv("TTY_INTERACTIVE", "1")
        rich.reconfigure()
        prune(Toy().net, Slow(), loss, 0.5, cap())
    rich.reconfigure()
    assert "CAP: collect" in "".join(shown)


def test_magnitude_needs_no_gradients() -> None:
    net = Toy().net
    prune(net, [], loss, 0.5, Magnitude(), progress=False)
    assert (net[4].weight == 0).float().mean() == 0.5


def test_sweep_validates_every_sparsity_from_one_pass(tmp_path: Path) -> None:
    module = trained()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    calls: list[int] = []
    pruner = cap()
    path = pruner.path
    pruner.path = lambda *a, **k: calls.append(1) or path(*a, **k)  # type: ignore[method-assign, func-returns-value]
    t = trainer(tmp_path)
    rows = sweep(t, module, [0.9, 0.5], pruner, Data(), folder=tmp_path)
    assert len(calls) == 1
    assert [row["target"] for row in rows] == [0.0, 0.5, 0.9]
    assert [row["sparsity"] for row in rows[1:]] == [0.5, pytest.approx(0.9, abs=0.002)]
    assert rows[0]["predicted_loss"] == 0 < rows[1]["predicted_loss"] < rows[2]["predicted_loss"]
    assert rows[0]["metrics"]["val_acc"] > 0.9
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    for row in rows[1:]:
        net = Toy().net
        net.load_state_dict(load_file(row["weights"]))
        assert float((net[4].weight == 0).float().mean()) == pytest.approx(row["sparsity"])
    assert not t.callbacks or all("Solve" not in type(c).__name__ for c in t.callbacks)


def test_sweep_takes_the_modules_own_data(tmp_path: Path) -> None:
    class Own(Toy):
        def train_dataloader(self) -> Any:
            return DataLoader(ToyData(), batch_size=16)

        def val_dataloader(self) -> Any:
            return DataLoader(ToyData(32), batch_size=16)

    rows = sweep(trainer(tmp_path), Own(), [0.5], cap())
    assert [row["sparsity"] for row in rows] == [0.0, 0.5]


def test_sweep_refuses_recomputations_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_recomputations=2.*one gradient pass"):
        sweep(trainer(tmp_path), Toy(), [0.5], cap(), Data(), num_recomputations=2)
    with pytest.raises(ConfigError, match=r"sparsities=\[\]"):
        sweep(trainer(tmp_path), Toy(), [], cap(), Data())
    assert not zeros(Toy()).any()
    assert FEATURES == 12
