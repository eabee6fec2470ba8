"""What a run refuses before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_cap import CAPPruningCallback
from lightning_cap.callbacks.checks import refuse_sharding_by
from lightning_cap.errors import CAPError, ConfigError, DataError, ScheduleError, UnsupportedError
from lightning_cap.pruners import Magnitude
from lightning_cap.schedules import OneShot, SparsitySteps
from tests.support.toy import Toy, callback, cap, loaders, trainer


def refused(folder: Path, error: type[CAPError], message: str, *others: pl.Callback, **settings: Any) -> None:
    module, options = Toy(), settings.pop("trainer", {})
    ckpt_path = settings.pop("ckpt_path", None)
    (folder / "here").mkdir()
    with pytest.raises(error, match=message) as caught:
        trainer(folder / "here", *others, callback({0: 0.5}, **settings), **options).fit(
            module, **loaders(), ckpt_path=ckpt_path
        )
    assert "\n" not in str(caught.value)
    assert module.batches == []
    assert not list((folder / "here").iterdir())


def test_lightnings_own_pruning_beside_ours(tmp_path: Path) -> None:
    class Prunes(ModelPruning):
        pass

    other = Prunes("l1_unstructured", parameters_to_prune=[], amount=0.5, use_global_unstructured=True)
    refused(tmp_path, UnsupportedError, r"Prunes prunes the same weights.*Magnitude\(\)", other)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for i, (given, message) in enumerate(
        [
            (str(tmp_path / "file/deeper"), "dirpath='.*/file/deeper': .* cannot be written to"),
            ("a\0b", "dirpath=.*null byte"),
            (str(tmp_path / ("long" * 100)), "dirpath=.*File name too long"),
            ("s3://bucket/folder", "dirpath='s3://bucket/folder': give a local folder"),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        refused(tmp_path / str(i), ConfigError, message, dirpath=given)
    cb = callback({0: 0.5}, dirpath=str(tmp_path / "file/deeper"), save="none")  # writes nothing
    trainer(tmp_path, cb, max_epochs=1).fit(Toy(), **loaders())


def test_a_wrong_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    refused(tmp_path, DataError, r"ckpt_path='.*a\.ckpt'", ckpt_path=str(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_metric_that_validation_does_not_log(tmp_path: Path, sanity: int) -> None:
    module = Toy()
    message = r"monitor='val_ac' was not logged in validation. Did you mean 'val_acc'\?.*'val_acc', 'val_loss'"
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, callback({0: 0.5}, monitor="val_ac"), num_sanity_val_steps=sanity).fit(module, **loaders())
    assert len(module.batches) == (0 if sanity else 4)  # as soon as validation has logged
    cb = callback({0: 0.5}, monitor="val_loss", mode="min", save="both", dirpath=str(tmp_path))
    trainer(tmp_path, cb, num_sanity_val_steps=sanity, max_epochs=1).fit(module, **loaders())
    assert all(record.value is not None for record in cb.history)


def test_the_best_of_no_validation(tmp_path: Path) -> None:
    refused(
        tmp_path,
        ConfigError,
        r"save='best': nothing is validated.*save='last'",
        save="best",
        monitor="val_acc",
        trainer={"limit_val_batches": 0},
    )


def test_a_mapping_is_taken_as_steps() -> None:
    cb = CAPPruningCallback({0: 0.4, 2: 0.6})
    assert cb.schedule == SparsitySteps({0: 0.4, 2: 0.6})
    text = repr(CAPPruningCallback({0: 0.4}, Magnitude()))
    assert text.startswith("CAPPruningCallback(SparsitySteps(")
    assert len(text) < 200


def test_a_mapping_is_taken_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CAPPruningCallback, "callback")
    text = "callback: {schedule: {0: 0.4, 2: 0.6}, pruner: {class_path: lightning_cap.pruners.Magnitude}}"
    config = parser.parse_string(text)
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
    for cfg in (config, parser.parse_string(parser.dump(config))):  # as a saved config is read back
        assert instantiate(cfg).callback.schedule == SparsitySteps({0: 0.4, 2: 0.6})
    with pytest.raises(ScheduleError, match=r"epoch=0\.5"):
        instantiate(parser.parse_string(text.replace("{0:", "{0.5:")))


@pytest.mark.parametrize("how", [{"limit_train_batches": 0}, {"max_steps": 0}], ids=str)
def test_nothing_trained_is_said(tmp_path: Path, how: dict[str, Any]) -> None:
    cb = callback({0: 0.5}, save="none")
    with pytest.warns(UserWarning, match=r"Nothing was trained before the pruning events of epochs \{0: 0\.5\}"):
        trainer(tmp_path, cb, **how).fit(Toy(), **loaders())


def test_nothing_is_pruned_at_the_end_of_no_training(tmp_path: Path) -> None:
    """Neither is the head, which no forward pass has told."""
    module = Toy()
    with pytest.warns(UserWarning, match="Nothing was trained before the pruning events of epochs"):
        trainer(tmp_path, callback(OneShot(0.5, epoch=None)), limit_train_batches=0).fit(module, **loaders())
    assert all(bool((weight != 0).all()) for weight in module.net[::6].parameters())


def test_an_empty_loader_trains_nothing(tmp_path: Path) -> None:
    data = {**loaders(), "train_dataloaders": torch.utils.data.DataLoader([], batch_size=4)}
    with pytest.warns(UserWarning, match="Nothing was trained"):
        trainer(tmp_path, callback({0: 0.5}, save="none")).fit(Toy(), **data)
    assert isinstance(Toy().net, nn.Sequential)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.more, self.net[0] = nn.Linear(3, 3), nn.Linear(12, 20)

    trainer(tmp_path, callback({0: 0.5}, dirpath=str(tmp_path / "out")), max_epochs=1).fit(Toy(), **loaders())
    module = Wider()
    message = r"it is of another model: it lacks 'more.weight' and 1 more; of another shape is 'net.0.weight'.*Give"
    with pytest.raises(DataError, match=message) as caught:
        trainer(tmp_path, callback({0: 0.5}), max_epochs=2, logger=CSVLogger(tmp_path / "runs")).fit(
            module, **loaders(), ckpt_path=str(tmp_path / "out/sparsity=0.50.ckpt")
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_wrong_checkpoint_to_validate(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    with pytest.raises(DataError, match=r"a\.ckpt.*no file that torch has saved"):
        trainer(tmp_path, callback({0: 0.5})).validate(Toy(), loaders()["val_dataloaders"], str(tmp_path / "a.ckpt"))


def test_what_is_refused_on_resuming_leaves_no_logs(tmp_path: Path) -> None:
    trainer(tmp_path, callback({0: 0.5}, dirpath=str(tmp_path / "out")), max_epochs=1).fit(Toy(), **loaders())
    cb = callback({0: 0.5, 1: 0.75}, dirpath=str(tmp_path / "out"), pruner=cap(max_memory=1))
    with pytest.raises(ConfigError, match="max_memory"), pytest.warns(UserWarning, match="Other settings"):
        trainer(tmp_path, cb, max_epochs=2, logger=CSVLogger(tmp_path / "runs")).fit(
            Toy(), **loaders(), ckpt_path=str(tmp_path / "out/sparsity=0.50.ckpt")
        )
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_without_our_state_tells_what_is_past(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="dense")
    trainer(tmp_path, saver, enable_checkpointing=True, max_epochs=2).fit(Toy(), **loaders())
    cb = callback({1: 0.5, 3: 0.7}, dirpath=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match=r"Events of epochs \[3\] are to come.*Those of epochs \[1\] are not run"):
        trainer(tmp_path, cb).fit(Toy(), **loaders(), ckpt_path=str(tmp_path / "dense.ckpt"))
    assert cb.masks.global_sparsity == pytest.approx(0.7, abs=0.01)


def test_a_metric_may_come_after_the_sanity_check(tmp_path: Path) -> None:
    class Late(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not self.trainer.sanity_checking:
                super().validation_step(batch, batch_idx)

    cb = callback({0: 0.5}, monitor="val_acc", save="none")
    trainer(tmp_path, cb, num_sanity_val_steps=2, max_epochs=1).fit(Late(), **loaders())
    assert cb.history[-1].value is not None


@pytest.mark.parametrize(
    ("strategy", "ways_out"),
    [
        (FSDPStrategy, ["ModelParallelStrategy(tensor_parallel_size=1)", "fully_shard", "ddp"]),
        (DeepSpeedStrategy, ["ModelParallelStrategy(tensor_parallel_size=1)", "fully_shard", "ddp"]),
        (ModelParallelStrategy, ["plans, one-shot runs and FixedMasks need whole ones", "ddp"]),
    ],
)
def test_strategies_that_shard_are_refused_with_the_way_out(strategy: type, ways_out: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        refuse_sharding_by(strategy)
    assert f"strategy={strategy.__name__}: it shards parameters" in str(caught.value)
    assert all(way in str(caught.value) for way in ways_out)
