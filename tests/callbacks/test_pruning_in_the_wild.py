"""The callback beside what else people put into a Trainer and a LightningModule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.errors import ConfigError, ScheduleError
from lightning_cap.schedules import OneShot
from lightning_cap.sparsity.targets import Targets
from tests.support.toy import Toy, ToyData, callback, cap, loaders, trainer, zeros

pytestmark = pytest.mark.usefixtures("seeded")


class Collecting(Toy):
    """The pattern of Lightning's own migration guide: outputs in a list, used and cleared when the epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.training_outputs: list[Any] = []
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.training_outputs.append(loss)
        assert len(self.training_outputs) <= 4
        return loss

    def on_train_epoch_end(self) -> None:
        assert len(self.training_outputs) == 4
        self.training_outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outputs.append((self(batch[0]).argmax(1) == batch[1]).float())

    def on_validation_epoch_end(self) -> None:
        hits = torch.cat(self.outputs)
        self.log("val_acc", hits.mean())
        if not self.trainer.sanity_checking:
            self.sizes.append(len(hits))
        self.outputs.clear()


def test_outputs_that_steps_collect_are_left_alone(tmp_path: Path) -> None:
    logged = []
    for measure in (True, False):
        pl.seed_everything(3, verbose=False)
        module = Collecting()
        cb = callback({1: 0.5}, evaluate=measure)
        t = trainer(tmp_path, cb)
        t.fit(module, **loaders())
        assert set(module.sizes) == {32}
        logged.append(float(t.callback_metrics["val_acc"]))
        assert cb.history[0].value is not None
    assert logged[0] == logged[1]


def test_transfer_hooks_see_the_right_stage(tmp_path: Path) -> None:
    seen: set[tuple[str, bool]] = set()

    class Staged(Toy):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            kind = "train" if "train" in self.where else "val"
            seen.add((kind, self.trainer.training))
            return batch

        where = "train"

        def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            assert self.trainer.training
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert not self.trainer.training
            super().validation_step(batch, batch_idx)

    trainer(tmp_path, callback({1: 0.5})).fit(Staged(), **loaders())
    assert ("train", True) in seen


def test_several_validation_loaders_keep_their_names(tmp_path: Path) -> None:
    class Two(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
            self.log("val_acc", float(dataloader_idx), batch_size=len(batch[1]))
            self.log("val_both", float(dataloader_idx), batch_size=len(batch[1]), add_dataloader_idx=False)

    data = loaders()
    data["val_dataloaders"] = [data["val_dataloaders"], DataLoader(ToyData(16), batch_size=16)]

    class Look(pl.Callback):
        seen: dict[str, float]

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            from lightning_cap.trainer.evaluation import evaluate

            self.seen = evaluate(trainer, pl_module)

    look = Look()

    class Named(Two):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_acc", float(dataloader_idx), batch_size=len(batch[1]))

    trainer(tmp_path, look, max_epochs=1).fit(Named(), **data)
    assert look.seen == {"val_acc/dataloader_idx_0": 0.0, "val_acc/dataloader_idx_1": 1.0}


def test_steps_may_take_any_arguments(tmp_path: Path) -> None:
    class Starred(Toy):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().training_step(*args, **kwargs)

    module = Starred()
    trainer(tmp_path, callback({1: 0.5}), max_epochs=2).fit(module, **loaders())
    assert zeros(module).float().mean() == 0.5


def test_accuracy_in_the_table_is_of_the_saved_weights(tmp_path: Path) -> None:
    epochs: list[int] = []

    class Counting(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            epochs.append(self.current_epoch)
            self.log("val_acc", float(self.current_epoch))

    cb = callback({1: 0.5, 2: 0.75, 3: 0.9})
    trainer(tmp_path, cb, max_epochs=5, check_val_every_n_epoch=3).fit(Counting(), **loaders())
    assert [record.value for record in cb.history] == [1.0, 1.0, 2.0, 4.0]
    stale = callback({1: 0.5, 2: 0.75, 3: 0.9}, evaluate=False)
    trainer(tmp_path, stale, max_epochs=5, check_val_every_n_epoch=3).fit(Counting(), **loaders())
    assert [record.value for record in stale.history] == [None, None, 2.0, None]


def test_a_fit_that_crashed_leaves_nothing_behind(tmp_path: Path) -> None:
    class Crash(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("boom")

    cb = callback({1: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, cb).fit(Toy(), **loaders())
    checkpoint = str(tmp_path / "sparsity=0.50.ckpt")
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, cb, Crash(), max_epochs=6).fit(Toy(), **loaders(), ckpt_path=checkpoint)
    for other in (cb, copy.deepcopy(cb)):
        module = Toy()
        trainer(tmp_path, other).fit(module, **loaders())
        assert zeros(module).float().mean() == 0.5
        assert [record.goal for record in other.history] == [0.0, 0.5]
        assert other.history[0].sparsity == 0.0


def test_the_event_at_the_end_also_follows_an_early_stop(tmp_path: Path) -> None:
    class Flat(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    module, cb = Flat(), callback(OneShot(0.5, epoch=None), dirpath=str(tmp_path))
    trainer(tmp_path, cb, EarlyStopping("val_loss", patience=1), max_epochs=10).fit(module, **loaders())
    assert zeros(module).float().mean() == 0.5
    assert (tmp_path / "sparsity=0.50.ckpt").exists()


def test_events_that_training_never_reaches(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="max_steps=8 ends training before"):
        trainer(tmp_path, callback({2: 0.5}), max_epochs=-1, max_steps=8).fit(Toy(), **loaders())

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"before the pruning events of epochs \{2: 0.5\}"):
        trainer(tmp_path, callback({2: 0.5}), Stop()).fit(Toy(), **loaders())


@pytest.mark.parametrize(
    "finder", [LearningRateFinder(num_training_steps=5), BatchSizeFinder(max_trials=1, steps_per_trial=1)]
)
def test_tuners_do_not_disturb_the_run(tmp_path: Path, finder: pl.Callback) -> None:
    class Tunable(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 1e-2, 8

        def train_dataloader(self) -> Any:
            return DataLoader(ToyData(), batch_size=self.batch_size, shuffle=True)

        def configure_optimizers(self) -> Any:
            config = super().configure_optimizers()
            for group in config["optimizer"].param_groups:
                group["lr"] = self.lr
            return config

    module = Tunable()
    cb = callback({1: 0.5})
    trainer(tmp_path, finder, cb, max_epochs=2).fit(module, val_dataloaders=loaders()["val_dataloaders"])
    assert zeros(module).float().mean() == 0.5
    assert cb._state.done == [1]


def test_a_monitor_that_nobody_logs_is_an_error(tmp_path: Path) -> None:
    cb = callback({0: 0.5}, save="best", monitor="val/top1", dirpath=str(tmp_path))
    with pytest.raises(ConfigError, match=r"monitor='val/top1' was not logged.*'val_acc'"):
        trainer(tmp_path, cb).fit(Toy(), **loaders())


def test_samplers_are_found_in_loaders_and_in_batch_samplers() -> None:
    subset = SubsetRandomSampler(range(10))
    for options in (
        {"sampler": subset, "batch_size": 4},
        {"batch_sampler": BatchSampler(subset, 4, drop_last=False)},
    ):
        data = ToyData(100)
        list(CalibrationBatches(DataLoader(data, **options), 20, 1, 0, 0))
        assert max(data.seen) < 10


def test_rows_are_not_hoarded() -> None:
    model = Toy().net.eval()
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    calls: list[int] = []

    def counting(m: nn.Module, b: Any) -> torch.Tensor:
        calls.append(1)
        return loss(m, b)

    batch = (torch.randn(256, 12), torch.randint(4, (256,)))
    chunks = iter(GradientCollector(model, Targets.from_model(model), counting, [batch], 256))
    assert next(iter(next(chunks).values())).shape[0] == 64
    begun = len(calls)
    assert sum(next(iter(c.values())).shape[0] for c in chunks) == 192
    assert len(calls) == begun + 3  # one vmap for each chunk: the rest of the batch had not been touched
    assert cap().num_gradients == 48
