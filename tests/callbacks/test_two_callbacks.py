"""Two callbacks in one run: units are pruned first, then weights of what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cap import CAPPruningCallback
from lightning_cap.errors import UnsupportedError
from lightning_cap.pruners import CAP, CAPUnits, DropAndGrow, Magnitude
from lightning_cap.schedules import SparsitySteps
from lightning_cap.sparsity.patterns import NofM, check_pattern
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.stopping import assert_same, averaging
from tests.support.toy import Toy, callback, cap, loaders, trainer
from tests.support.unit_runs import BOTH_LAYERS, Holds, kept, units, weights

pytestmark = pytest.mark.usefixtures("seeded")


class AtEvents(pl.Callback):
    """After the events of each epoch: zeros of each layer of weights, and learning rate."""

    def __init__(self) -> None:
        self.zeros: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            found = dict(pl_module.named_parameters())
            weights = torch.cat([found[name].detach().flatten() for name in BOTH_LAYERS])
            self.zeros.append(float((weights == 0).float().mean()))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_both_masks_hold(tmp_path: Path) -> None:
    """CAPUnits changes the weights that stay, and CAP counts those of pruned units as pruned."""
    first = units(pruner=CAPUnits(num_gradients=32), dirpath=str(tmp_path))
    second, holds, look = weights(pruner=cap(), dirpath=str(tmp_path)), Holds(), AtEvents()
    t = trainer(tmp_path, first, second, averaging(), holds, look, max_epochs=6)
    t.fit(Toy(), **loaders())
    assert len(holds.seen) == 24
    assert [round(share, 4) for share in (look.zeros[2], *look.zeros[4:])] == [0.6, 0.9, 0.9]
    assert look.zeros[2] < look.zeros[3] < 0.9
    for name in BOTH_LAYERS:
        assert not second.masks[name][~first.masks[name]].any(), "pruned with their units"
    assert first.pruner.reached(first._active.targets, first.masks) >= 0.5
    assert {"flops", "sparsity"} <= set(t.callback_metrics)
    records = read_records(tmp_path / "events.jsonl", EventRecord)
    told = [(record.epoch, record.goal, record.saving is not None) for record in records]
    assert told == [(1, 0.3, True), (2, 0.6, False), (3, 0.5, True), (4, 0.9, False)]
    rates = look.rates
    assert rates[1] == rates[2] == rates[3] == rates[4] > rates[5], "a new cycle after each event of either"


def test_a_cycle_ends_at_the_next_event_of_either(tmp_path: Path) -> None:
    first, second = units(dirpath=str(tmp_path)), weights(dirpath=str(tmp_path))
    trainer(tmp_path, first, second, max_epochs=6).fit(Toy(), **loaders())
    lines = [(Path(r.checkpoint).name, r.epochs) for r in (*first.history, *second.history) if r.checkpoint]
    assert lines == [
        ("flops=0.30.ckpt", 2),
        ("flops=0.50.ckpt", 4),
        ("sparsity=0.60.ckpt", 3),
        ("sparsity=0.90.ckpt", 6),
    ]
    saved = torch.load(tmp_path / "flops=0.50.ckpt", weights_only=True)["callbacks"]
    assert {"CAPPruningCallback", "CAPPruningCallback[units]"} <= set(saved)


def test_events_of_the_same_epoch(tmp_path: Path) -> None:
    first, second = units({0: 0.3, 1: 0.5}, dirpath=str(tmp_path)), weights({0: 0.6, 1: 0.9}, dirpath=str(tmp_path))
    trainer(tmp_path, first, second, Holds(), max_epochs=2).fit(Toy(), **loaders())
    assert second.masks.global_sparsity == pytest.approx(0.9, abs=1e-3)
    assert [r.epochs for r in first.history] == [r.epochs for r in second.history] == [0, 1, 2]


def test_a_pattern_beside_units(tmp_path: Path) -> None:
    first = units({0: 0.5}, save="none")
    second = weights({1: 0.5}, pruner=cap(pattern=NofM(2, 4)), save="none")
    trainer(tmp_path, first, second, Holds(), max_epochs=2).fit(Toy(), **loaders())
    check_pattern(second._active.targets, NofM(2, 4))
    assert second.masks.global_sparsity >= 0.5


def run(
    folder: Path, *, ckpt: Path | None = None, seed: int = 11
) -> tuple[Toy, CAPPruningCallback, CAPPruningCallback]:
    pl.seed_everything(seed, verbose=False)
    pruned = str(folder / "pruned")
    first, second = units(dirpath=pruned), weights(pruner=cap(), dirpath=pruned)
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    module = Toy()
    t = trainer(folder, first, second, saver, max_epochs=6, enable_checkpointing=True)
    t.fit(module, **loaders(), ckpt_path=None if ckpt is None else str(ckpt))
    return module, first, second


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


@pytest.mark.parametrize(
    "name", [*(f"epoch={e}" for e in range(5)), "pruned/flops=0.30", "pruned/sparsity=0.60", "pruned/flops=0.50"]
)
def test_resumed_runs_are_exact(whole: tuple[Path, Any], tmp_path: Path, name: str) -> None:
    folder, (module, *callbacks) = whole
    resumed, *again = run(tmp_path, ckpt=folder / f"{name}.ckpt", seed=99)
    assert_same(module, resumed)
    for one, other in zip(callbacks, again, strict=True):
        assert all(torch.equal(mask, other.masks[target]) for target, mask in one.masks.items())
        assert [(r.goal, r.epochs, r.value, r.sparsity, r.saving) for r in one.history] == [
            (r.goal, r.epochs, r.value, r.sparsity, r.saving) for r in other.history
        ]


def test_a_run_of_units_goes_on_with_weights(tmp_path: Path) -> None:
    first = units({0: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, first, max_epochs=2).fit(Toy(), **loaders())
    again, second = units({0: 0.5}, dirpath=str(tmp_path)), weights({3: 0.9}, dirpath=str(tmp_path))
    t = trainer(tmp_path, again, second, Holds(), max_epochs=4)
    t.fit(Toy(), **loaders(), ckpt_path=str(tmp_path / "flops=0.50.ckpt"))
    assert kept(again) == kept(first)
    assert second.masks.global_sparsity == pytest.approx(0.9, abs=1e-3)


WRONG: dict[str, tuple[list[CAPPruningCallback], str]] = {
    "order": (
        [callback(), units()],
        r"CAPPruningCallback\(pruner=MagnitudeUnits\) comes after .*Put the one that prunes units first",
    ),
    "a pruner that regrows": ([units(), weights(pruner=DropAndGrow())], r"pruner=DropAndGrow\) grow back"),
    "a schedule that falls": (
        [units(), weights(SparsitySteps({0: 0.5, 1: 0.3}, allow_decrease=True))],  # type: ignore[arg-type]
        r"pruner=Magnitude\) grow back",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_companions_that_cannot_work_are_refused(tmp_path: Path, name: str) -> None:
    callbacks, message = WRONG[name]
    module = Toy()
    with pytest.raises(UnsupportedError, match=message):
        trainer(tmp_path, *callbacks).fit(module, **loaders())
    assert module.batches == []


def test_two_of_weights_are_lightnings_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(tmp_path, callback(), callback(pruner=CAP()))
    assert CAPPruningCallback({0: 0.5}, Magnitude()).state_key == "CAPPruningCallback"
