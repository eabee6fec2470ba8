from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_cap import CAPPruningCallback, QATCallback
from lightning_cap.callbacks.qat import quantized_layers
from lightning_cap.errors import ConfigError, DataError, TargetError, UnsupportedError
from lightning_cap.pruners import Magnitude
from lightning_cap.quantization.layers import fake_quantized
from tests.support.processes import as_by_torchrun
from tests.support.quantizing import quantizing_run
from tests.support.stopping import StatefulLoader, assert_same, averaging
from tests.support.toy import TARGET, Toy, callback, loaders, trainer, zeros

pytest.importorskip("torchao")
LAYERS = ["net.0", "net.4", "net.6"]


class Watch(pl.Callback):
    """Looks after each step at what the target layer computes with."""

    def __init__(self) -> None:
        self.quantized: list[int] = []
        self.optimizer: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.optimizers[0].state[pl_module.net[4].weight]
        self.optimizer = {name: value.clone() for name, value in state.items()}
        self.parameters = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        layer = fake_quantized(pl_module).get("net.4")
        masks = next(c for c in trainer.callbacks if isinstance(c, CAPPruningCallback)).masks
        assert (pl_module.net[4].weight[~masks[TARGET]] == 0).all()
        if layer is not None:
            self.quantized.append(trainer.current_epoch)
            assert (layer.weight_fake_quantizer(layer.weight)[~masks[TARGET]] == 0).all()


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_masks_hold_in_either_order(tmp_path: Path, epoch: int, first: bool) -> None:
    """Events at 1 and 3 come before the epoch, at it and after it; zeros are zero in what is computed with, in every step."""
    watch = Watch()
    module, qat, cb = quantizing_run(tmp_path, epoch, first, more=[watch])
    assert sorted(set(watch.quantized)) == list(range(epoch, 5))
    assert qat.layers == LAYERS
    assert list(fake_quantized(module)) == LAYERS
    assert zeros(module).float().mean() == 0.75
    assert torch.equal(zeros(module), ~cb.masks[TARGET])
    assert cb.run.targets[TARGET] is module.net[4].weight
    assert sum(id(p) in watch.parameters for p in module.parameters()) == len(list(module.parameters()))


def test_the_optimizer_keeps_its_state(tmp_path: Path) -> None:
    before, after = Watch(), Watch()
    pl.seed_everything(0, verbose=False)
    qat = QATCallback(1, include=["net.4.weight"])
    trainer(tmp_path, callback({1: 0.5}), before, qat, after, max_epochs=2).fit(Toy(), **loaders())
    assert qat.layers == ["net.4"]
    assert before.parameters == after.parameters
    assert before.optimizer["exp_avg"].abs().sum() > 0
    assert all(torch.equal(value, after.optimizer[name]) for name, value in before.optimizer.items())


@pytest.mark.parametrize(("epoch", "step"), [(2, 6), (2, 10), (2, 14), (0, 6)])
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, epoch: int, step: int) -> None:
    """Before and after the model was quantized."""

    def data() -> dict[str, Any]:
        return {"train_dataloaders": StatefulLoader()}

    whole, *_ = quantizing_run(tmp_path / "whole", epoch, data=data())
    file = str(tmp_path / f"whole/step={step}.ckpt")
    resumed, qat, _ = quantizing_run(tmp_path / "again", epoch, ckpt=file, seed=99, data=data())
    assert_same(whole, resumed)
    assert qat.layers == LAYERS
    assert quantized_layers(torch.load(file, weights_only=True)["callbacks"]) == (LAYERS if step // 4 >= epoch else [])


@pytest.mark.parametrize(("first", "averages"), [(False, False), (False, True), (True, True)], ids=str)
def test_resume_at_the_end_of_an_epoch(tmp_path: Path, first: bool, averages: bool) -> None:
    """After a crash that followed the first epoch that was quantized, also with averaged weights."""

    def more() -> list[pl.Callback]:
        return [averaging()] if averages else []

    whole, *_ = quantizing_run(tmp_path / "whole", first=first, more=more())
    assert zeros(whole).float().mean() == 0.75
    quantizing_run(tmp_path / "cut", first=first, stop=3, more=more())
    file = str(tmp_path / "cut/pruned/sparsity=0.50.ckpt")
    resumed, *_ = quantizing_run(tmp_path / "cut", first=first, ckpt=file, seed=99, more=more())
    assert_same(whole, resumed)


def test_a_checkpoint_is_validated_as_it_was_trained(tmp_path: Path) -> None:
    quantizing_run(tmp_path)
    module = Toy()
    t = trainer(tmp_path, QATCallback(9))
    file = str(tmp_path / "step=20.ckpt")
    t.validate(module, loaders()["val_dataloaders"], ckpt_path=file, verbose=False)
    assert list(fake_quantized(module)) == LAYERS


class Seen(pl.Callback):
    """How many layers are quantized in each epoch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.counts.append(len(fake_quantized(pl_module)))


def test_a_second_fit_begins_at_its_epoch(tmp_path: Path) -> None:
    """With the masks of the first, and plain layers until then."""
    module, qat, cb = quantizing_run(tmp_path)
    parameters, seen = list(map(id, module.parameters())), Seen()
    t = trainer(tmp_path, cb, qat, seen, limit_train_batches=1, max_epochs=4)
    with pytest.warns(UserWarning, match="already at 0.75"):
        t.fit(module, **loaders())
    assert seen.counts == [0, 0, len(LAYERS), len(LAYERS)]
    assert list(map(id, module.parameters())) == parameters
    assert qat.layers == LAYERS
    assert zeros(module).float().mean() == 0.75


@pytest.mark.parametrize("pruner", [Magnitude(), None])
def test_the_fisher_is_that_of_plain_layers(tmp_path: Path, pruner: Any) -> None:
    """An event right after the swap chooses the weights that one without it would."""
    kept = []
    for callbacks in ([], [QATCallback(1)]):
        pl.seed_everything(3, verbose=False)
        module = Toy()
        cb = callback({1: 0.5}, **({} if pruner is None else {"pruner": pruner}))
        t = trainer(tmp_path, *callbacks, cb, max_epochs=2, limit_train_batches=1)
        t.fit(module, **loaders())
        kept.append(zeros(module))
    assert torch.equal(*kept)


def test_a_quantized_module_resumes_from_before_it_was(tmp_path: Path) -> None:
    """Bit for bit as a new one does."""
    module, _, _ = quantizing_run(tmp_path / "whole")
    early = str(tmp_path / "whole" / "step=2.ckpt")
    ends = []
    for again in (Toy(), module):
        t = trainer(tmp_path / "again", callback({1: 0.5, 3: 0.75}), QATCallback(2), max_epochs=5)
        t.fit(again, **loaders(), ckpt_path=early)
        ends.append(again.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_other_layers_than_those_of_a_checkpoint_are_told(tmp_path: Path) -> None:
    quantizing_run(tmp_path)
    late = str(max(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1])))
    qat = QATCallback(2, exclude=["net.0.*"])
    t = trainer(tmp_path / "again", callback({1: 0.5, 3: 0.75}), qat, max_epochs=6)
    with pytest.warns(UserWarning, match=f"has {len(LAYERS)} layers quantized, and these choose {len(LAYERS) - 1}"):
        t.fit(Toy(), **loaders(), ckpt_path=late)
    assert qat.layers == LAYERS


def fit_on_ranks(folder: Path, first: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    module, qat, _ = quantizing_run(folder, first=first, devices=2, strategy="ddp")
    return {name: value.clone() for name, value in module.state_dict().items()}, qat.layers


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_two_processes(tmp_path: Path, first: bool) -> None:
    (one, layers), (other, _) = as_by_torchrun(2, tmp_path, fit_on_ranks, tmp_path, first)
    assert layers == LAYERS
    assert all(torch.equal(one[name], other[name]) for name, _ in Toy().named_parameters())
    assert (one[TARGET] == 0).float().mean() == 0.75


class Convolving(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(40, 4))


def test_layers_that_torchao_cannot_take(tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture) -> None:
    qat = QATCallback()
    with caplog.at_level("INFO"):
        trainer(tmp_path, qat, max_epochs=1, limit_train_batches=1).fit(Convolving(), **loaders())
    assert qat.layers == ["net.3"]
    assert (
        "Left in float, as torchao cannot take them: net.1.weight: a Conv1d." in caplog.text + capsys.readouterr().err
    )
    refusing = trainer(tmp_path, QATCallback(unsupported="refuse"), max_epochs=1)
    with pytest.raises(
        UnsupportedError, match=r"unsupported='refuse': torchao cannot quantize 1 .*net.1.weight: a Conv1d"
    ):
        refusing.fit(Convolving(), **loaders())
    allowed = QATCallback(exclude=["net.1.weight"], unsupported="refuse")
    trainer(tmp_path, allowed, max_epochs=1, limit_train_batches=1).fit(Convolving(), **loaders())


def test_what_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="epoch=4: the run ends after max_epochs=4"):
        trainer(tmp_path, QATCallback(4)).fit(Toy(), **loaders())
    with pytest.raises(TargetError, match=r"include: '\*\.fc\.weight' matches no parameter"):
        trainer(tmp_path, QATCallback(include=["*.fc.weight"])).fit(Toy(), **loaders())
    with pytest.raises(DataError, match="the state of QATCallback in the checkpoint cannot be used: "):
        QATCallback().load_state_dict({"version": 7, "quantized": []})
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"QATCallback needs the package torchao.*'lightning-cap\[quantization\]'"):
        QATCallback()


def test_a_dry_run_tries_it(tmp_path: Path) -> None:
    qat = QATCallback(30)
    trainer(tmp_path, qat, fast_dev_run=True).fit(Toy(), **loaders())
    assert qat.layers == LAYERS
