"""Runs that draw the units to be pruned to zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap import CAPPruningCallback, MaskSparsity
from lightning_cap.data import DigitsDataModule
from lightning_cap.errors import ConfigError, DataError
from lightning_cap.pruners import MagnitudeUnits, TaylorUnits
from lightning_cap.sparsity import Units, unit_penalty
from tests.support.planned import small_model
from tests.support.stopping import CrashError, StopAfter, assert_same
from tests.support.toy import Toy, ToyData, loaders, trainer


class Plain(Toy):
    """The toy without what is drawn at random, and with plain SGD; maybe with a term in its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Identity()
        self.term: tuple[Units, dict[str, Tensor], float] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.term is None:
            return loss
        units, kept, strength = self.term
        return loss + strength * unit_penalty(dict(self.named_parameters()), units, kept)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def still() -> dict[str, Any]:
    """Data that are the same each time."""
    return {"train_dataloaders": DataLoader(ToyData(64, noise=0.0), batch_size=16)}


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, data: Any = None, **options: Any) -> None:
    trainer(folder, *callbacks, limit_val_batches=0, **options).fit(module, **(data or still()))


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_a_term_of_the_loss(tmp_path: Path, accumulate: int) -> None:
    module, twin = Plain(), Plain()
    twin.load_state_dict(module.state_dict())
    term = MaskSparsity(0.4, strength=0.05)
    fit(tmp_path, module, term, max_epochs=2, accumulate_grad_batches=accumulate)
    assert term.units is not None
    assert term.kept is not None
    twin.term = term.units, term.kept, 0.05
    fit(tmp_path, twin, max_epochs=2, accumulate_grad_batches=accumulate)
    for (name, found), wanted in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6), name


@pytest.mark.usefixtures("seeded")
def test_units_come_near_zero_and_pruning_them_changes_little(tmp_path: Path) -> None:
    changes, penalties = [], []
    start = Plain().state_dict()
    for strength in (1e-9, 0.6):
        module = Plain()
        module.load_state_dict(start)
        term = MaskSparsity(0.4, strength=strength)
        fit(tmp_path, module, term, max_epochs=12)
        penalties.append(float(term.penalty().detach()) / strength)
        images = torch.stack([ToyData(64, noise=0.0)[i][0] for i in range(64)])
        module.eval()
        with torch.no_grad():
            before = module(images)
            for name, mask in term.masks.items():
                dict(module.named_parameters())[name].mul_(mask)
            changes.append(float((module(images) - before).norm() / before.norm()))
    assert penalties[1] < 0.1 * penalties[0]
    assert changes[1] < 0.1 < changes[0]


@pytest.mark.usefixtures("seeded")
def test_a_pruner_that_looks_at_what_units_do_chooses_them(tmp_path: Path) -> None:
    term = MaskSparsity(0.4, strength=0.05, end_epoch=20, include=["net.0"])
    prunes = CAPPruningCallback(
        {20: 0.4}, TaylorUnits(num_gradients=64), include=["net.0"], save="none", evaluate=False
    )
    fit(tmp_path, Plain(), term, prunes, max_epochs=21)
    assert term.kept is not None
    assert term.units is not None
    found = term.units.kept(prunes.masks)["net.0"]
    assert torch.equal(found, term.kept["net.0"])
    assert 0 < int(found.sum()) < 16
    assert set(term.kept) == {"net.0"}


@pytest.mark.usefixtures("seeded")
def test_it_acts_in_its_epochs_alone(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step % 4 == 0:
                seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})

    class NoLoss(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)

    module, term = NoLoss(), MaskSparsity(0.4, strength=0.5, epoch=1, end_epoch=2)
    fit(tmp_path, module, term, Watch(), max_epochs=3)
    touched = [any(bool(gradient.any()) for gradient in gradients.values()) for gradients in seen]
    assert touched == [False, True, False]
    masks = term.masks
    for name, gradient in seen[1].items():
        assert not gradient[masks[name]].any() if name in masks else not gradient.any(), name


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resumed_runs_end_alike(tmp_path: Path, epoch: int) -> None:
    def run(folder: Path, stop: int | None = None, ckpt: str | None = None) -> tuple[Toy, MaskSparsity]:
        pl.seed_everything(3, verbose=False)
        module, term = Toy(), MaskSparsity(0.4, TaylorUnits(num_gradients=16), strength=0.01, epoch=1)
        prunes = CAPPruningCallback({3: 0.3}, MagnitudeUnits(), dirpath=str(folder / "pruned"))
        saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
        stops = [] if stop is None else [StopAfter(stop)]
        t = trainer(folder, term, prunes, saver, *stops, enable_checkpointing=True)
        try:
            t.fit(module, **loaders(), ckpt_path=ckpt)
        except CrashError:
            assert stop is not None
        return module, term

    whole, term = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=epoch + 1)
    resumed, again = run(tmp_path / "cut", ckpt=str(tmp_path / "cut" / f"epoch={epoch}.ckpt"))
    assert_same(whole, resumed)
    assert term.kept is not None
    assert again.kept is not None
    assert all(torch.equal(again.kept[name], kept) for name, kept in term.kept.items())


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    module = Plain()
    with pytest.raises(ConfigError, match="epoch=4: the run ends"):
        fit(tmp_path, module, MaskSparsity(0.4, epoch=4))
    with pytest.raises(ConfigError, match=r"sparsity=0\.999"):
        fit(tmp_path, module, MaskSparsity(0.999, epoch=3))
    with pytest.raises(ConfigError, match="include: '9' matches no group"):
        fit(tmp_path, module, MaskSparsity(0.4, include=["net.9"]))
    assert module.batches == []
    with pytest.raises(ConfigError, match="no units have been chosen"):
        _ = MaskSparsity(0.4).masks
    assert MaskSparsity(0.4).penalty() == 0


@pytest.mark.parametrize(
    "held", [None, {}, {"version": 2, "chosen": None}, {"version": 1, "chosen": {"units": {}}}, {"version": 1}]
)
def test_a_damaged_state_is_told(held: Any) -> None:
    with pytest.raises(DataError):
        MaskSparsity(0.4).load_state_dict(held)


def test_fast_dev_run(tmp_path: Path) -> None:
    term = MaskSparsity(0.4, epoch=7)
    trainer(tmp_path, term, fast_dev_run=True, max_epochs=None).fit(Toy(), **loaders())
    assert term.kept is not None


@pytest.mark.usefixtures("seeded")
def test_heads_and_neurons_of_a_classifier_are_drawn_but_not_in_its_fisher(tmp_path: Path) -> None:
    module, data = small_model(), DigitsDataModule(batch_size=64)
    term = MaskSparsity(0.3, TaylorUnits(num_gradients=16), strength=0.1)
    trainer(tmp_path, term, max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(module, datamodule=data)
    assert term.units is not None
    assert {group.kind for group in term.units.values()} == {"head", "neuron"}
    before = term.penalty()
    assert before > 0
    batch = torch.randn(4, 1, 8, 8), torch.arange(4)
    loss = module.eval().calibration_step(batch, 0)
    assert torch.equal(loss, module._cross_entropy(module(batch[0]), batch[1]))


@pytest.mark.usefixtures("seeded")
def test_the_gradient_is_scaled_where_the_optimizer_divides_by_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fused optimizers do in float16 training; the others get gradients that were divided already."""
    module, term = Plain(), MaskSparsity(0.4, strength=0.1, include=["net.0"])
    fit(tmp_path, module, term, max_epochs=1)
    monkeypatch.setattr("lightning_cap.callbacks.mask_sparsity.loss_scale", lambda _: 8.0)
    optimizer, found = torch.optim.SGD(module.parameters(), lr=0.1), []
    for divides in (False, True):
        optimizer._step_supports_amp_scaling = divides  # type: ignore[attr-defined]
        module.zero_grad()
        term.on_before_optimizer_step(module.trainer, module, optimizer)
        found.append(dict(module.named_parameters())["net.1.weight"].grad)
    assert found[0].any()
    assert torch.equal(8 * found[0], found[1])


@pytest.mark.usefixtures("seeded")
def test_only_the_weights_of_the_optimizer_get_a_gradient(tmp_path: Path) -> None:
    module, term = Plain(), MaskSparsity(0.4)
    module.net[1].requires_grad_(False)
    fit(tmp_path, module, term, max_epochs=1)
    module.zero_grad()
    term.on_before_optimizer_step(module.trainer, module, torch.optim.SGD(module.net[4].parameters(), lr=0.1))
    assert {name for name, weight in module.named_parameters() if weight.grad is not None} == {
        "net.4.weight",
        "net.4.bias",
    }
