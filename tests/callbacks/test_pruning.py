from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import lightning_cap.callbacks.pruning as callback_module
from lightning_cap import CAPPruningCallback, CyclicLinearLR
from lightning_cap.callbacks.cycle import Cycle
from lightning_cap.errors import DataError, GradientError
from lightning_cap.export.records import ExportRecord
from lightning_cap.pruners import CAP, Magnitude
from lightning_cap.schedules import OneShot, PolynomialSchedule, SparsitySteps
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.toy import FEATURES, Toy, ToyData, callback, cap, loaders, trainer, zeros


@pytest.fixture(autouse=True)
def _seeded() -> None:
    pl.seed_everything(3, verbose=False)


class Watch(pl.Callback):
    """Records what is true after every step, as a user would see it. Put it behind the pruning callback."""

    def __init__(self) -> None:
        self.sparsity: list[float] = []
        self.lr: list[float] = []
        self.moments: list[float] = []
        self.gradients: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pruned = zeros(pl_module)
        weight = pl_module.net[4].weight
        self.gradients.append(float(weight.grad[pruned].abs().sum()) if pruned.any() else 0.0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pruned = zeros(pl_module)
        self.sparsity.append(float(pruned.float().mean()))
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        state = trainer.optimizers[0].state[pl_module.net[4].weight]
        tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == pruned.shape]
        self.moments.append(sum(float(v[pruned].abs().sum()) for v in tensors))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_events_happen_on_schedule_and_masks_hold(tmp_path: Path, optimizer: str, accumulate: int) -> None:
    module, watch, cb = Toy(optimizer), Watch(), callback()
    trainer(tmp_path, cb, watch, accumulate_grad_batches=accumulate).fit(module, **loaders())
    assert watch.sparsity == [0.0] * 4 + [0.5] * 4 + [0.75] * 8
    assert max(watch.moments[4:]) == 0
    assert max(watch.gradients) == 0
    assert torch.equal(cb.masks["net.4.weight"], ~zeros(module))
    assert not zeros(module, "net.0.weight").any()  # the first layer and the head stay dense
    assert not zeros(module, "net.6.weight").any()


def test_learning_rate_restarts_with_each_cycle(tmp_path: Path) -> None:
    watch = Watch()
    trainer(tmp_path, callback({1: 0.5, 3: 0.75}), watch, max_epochs=5).fit(Toy(), **loaders())
    top, low = 1e-2, 1e-4
    for start, length in ((0, 4), (4, 8), (12, 8)):  # the dense stretch is a cycle too
        expected = [top - (top - low) * (t % length) / length for t in range(1, length + 1)]
        assert watch.lr[start : start + length - 1] == pytest.approx(expected[:-1])


def test_other_schedulers_are_left_alone_with_one_warning(tmp_path: Path) -> None:
    class Cosine(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    with pytest.warns(UserWarning, match="CosineAnnealingLR has no restart") as record:
        trainer(tmp_path, callback()).fit(Cosine(), **loaders())
    assert sum("has no restart" in str(w.message) for w in record) == 1


def test_a_run_with_a_no_op_event_sees_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Toy:
        pl.seed_everything(5, verbose=False)
        module = Toy()
        trainer(tmp_path, callback()).fit(module, **loaders())
        return module

    pruned = run()
    monkeypatch.setattr(
        callback_module.PruningEvent, "run", lambda self, sparsities, collection_index: collection_index
    )
    monkeypatch.setattr(callback_module.PruningEvent, "dry_run", lambda self, collection_index: None)
    monkeypatch.setattr(callback_module, "evaluate", lambda trainer, module: {})
    plain = run()
    assert zeros(pruned).float().mean() == 0.75
    assert not zeros(plain).any()
    assert pruned.batches == plain.batches


def test_event_leaves_gradients_buffers_flags_and_metrics_alone(tmp_path: Path) -> None:
    class Around(pl.Callback):
        """Surrounds the pruning callback: ``before`` runs first in the hook, ``after`` last."""

        def __init__(self, other: Around | None = None) -> None:
            self.other, self.seen = other, None

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch != 1:
                return
            self.seen = {
                "buffers": {k: v.clone() for k, v in pl_module.named_buffers()},
                "training": [m.training for m in pl_module.modules()],
                "rng": torch.get_rng_state(),
                "metric": pl_module.train_acc.metric_state,
                "updates": pl_module.train_acc.update_count,
                "grads": [p.grad is None for p in pl_module.parameters()],
            }

    class Mixed(Toy):
        def on_train_start(self) -> None:
            self.net[3].eval()  # a user's own choice survives

    before, after = Around(), Around()
    trainer(tmp_path, before, callback({1: 0.5}), after).fit(Mixed(), **loaders())
    assert before.seen is not None
    assert after.seen is not None
    for name, value in before.seen["buffers"].items():
        assert torch.equal(value, after.seen["buffers"][name]), name
    assert before.seen["training"] == after.seen["training"]
    assert False in after.seen["training"]
    assert torch.equal(before.seen["rng"], after.seen["rng"])
    assert before.seen["updates"] == after.seen["updates"]
    assert before.seen["grads"] == after.seen["grads"]
    for name, value in before.seen["metric"].items():
        assert torch.equal(value, after.seen["metric"][name])


def test_checkpoints_table_and_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cb = callback(dirpath=str(tmp_path / "out"))
    module = Toy()
    trainer(tmp_path, cb).fit(module, **loaders())
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    stems = ("sparsity=0.50", "sparsity=0.75")
    assert names == [
        "events.jsonl",
        "exports.jsonl",
        *(f"{stem}.{end}" for stem in stems for end in ("ckpt", "safetensors")),
    ]
    for stem, sparsity in zip(stems, (0.5, 0.75), strict=True):
        plain = load_file(tmp_path / "out" / f"{stem}.safetensors")
        fresh = Toy().net
        fresh.load_state_dict(plain)  # strict, no prefix
        assert (fresh[4].weight == 0).float().mean() == sparsity
        saved = torch.load(tmp_path / "out" / f"{stem}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(saved["net.4.weight"], fresh[4].weight)
    events = read_records(tmp_path / "out" / "events.jsonl", EventRecord)
    assert [(e.epoch, e.goal) for e in events] == [(1, 0.5), (2, 0.75)]
    assert events[1].sparsities == {"net.4.weight": 0.75}
    assert (events[0].unit, events[0].samples) == ("gradients", 48)
    assert {"val_acc", "val_loss"} == events[0].before.keys() == events[0].after.keys()
    assert events[0].seconds.keys() == {"plan", "collect", "solve", "apply"}
    exports = read_records(tmp_path / "out" / "exports.jsonl", ExportRecord)
    assert [(e.path, e.goal, e.sparsity) for e in exports] == [
        ("sparsity=0.50.safetensors", 0.5, 0.5),
        ("sparsity=0.75.safetensors", 0.75, 0.75),
    ]
    assert all(e.bytes == (tmp_path / "out" / e.path).stat().st_size for e in exports)
    assert [record.goal for record in cb.history] == [0.0, 0.5, 0.75]
    assert cb.history[-1].value == pytest.approx(float(module.trainer.callback_metrics["val_acc"]))
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "75.00 %" in printed
    assert "sparsity=0.75.ckpt" in printed


def test_best_of_cycle_is_saved_when_asked(tmp_path: Path) -> None:
    class Scripted(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("score", [0.1, 0.9, 0.2, 0.3, 0.8, 0.5][self.current_epoch])

    cb = callback({0: 0.5, 3: 0.75}, dirpath=str(tmp_path), save="both", monitor="score", save_sparsities=[0.5, 0.75])
    trainer(tmp_path, cb, max_epochs=6).fit(Scripted(), **loaders())
    best = {record.goal: record for record in cb.history if record.best}
    last = {record.goal: record for record in cb.history if not record.best}
    assert [best[s].epoch for s in (0.5, 0.75)] == [1, 4]
    assert [last[s].epoch for s in (0.5, 0.75)] == [2, 5]
    for name in ("sparsity=0.50-best", "sparsity=0.50", "sparsity=0.75-best", "sparsity=0.75"):
        epoch = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["epoch"]
        assert epoch == {record.checkpoint: record.epoch for record in cb.history}[str(tmp_path / f"{name}.ckpt")]


@pytest.mark.parametrize("name", ["events.jsonl", "exports.jsonl"])
def test_a_folder_with_foreign_records_is_refused_before_training(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"epoch": 1, "target": 0.5}\n')
    module = Toy()
    with pytest.raises(DataError, match=rf"{name}, line 1: .* move the file away"):
        trainer(tmp_path, callback(dirpath=str(tmp_path))).fit(module, **loaders())
    assert module.batches == []
    cb = callback({1: 0.5}, dirpath=str(tmp_path), save="none")  # writes none
    trainer(tmp_path, cb, max_epochs=2).fit(module, **loaders())
    assert cb.masks.global_sparsity == 0.5


def test_the_table_and_the_cycle_survive_a_checkpoint(tmp_path: Path) -> None:
    cb = callback(dirpath=str(tmp_path))
    trainer(tmp_path, cb).fit(Toy(), **loaders())
    cb.history[0] = replace(cb.history[0], value=math.nan)
    torch.save(cb.state_dict(), tmp_path / "state.pt")
    again = callback(dirpath=str(tmp_path))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.history[1:] == cb.history[1:]
    assert math.isnan(again.history[0].value or 0.0)
    assert again._cycle == cb._cycle == Cycle(0.75, saved=True)


def test_a_cycle_knows_its_best_value() -> None:
    cycle = Cycle(0.5)
    values = [None, math.nan, 0.5, 0.4, 0.5, 0.6]
    assert [cycle.improves(value, "max") for value in values] == [False, False, True, False, False, True]
    assert cycle.best == 0.6
    assert [cycle.improves(value, "min") for value in values] == [False, False, True, True, False, False]
    assert cycle.best == 0.4


def test_only_requested_sparsities_are_saved(tmp_path: Path) -> None:
    cb = callback({1: 0.3, 2: 0.5, 3: 0.75}, dirpath=str(tmp_path), save_sparsities=[0.3, 0.75])
    trainer(tmp_path, cb).fit(Toy(), **loaders())
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["sparsity=0.30.ckpt", "sparsity=0.75.ckpt"]


def test_logs_go_to_every_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="logs")
    trainer(tmp_path, callback(), logger=logger).fit(Toy(), **loaders())
    text = Path(logger.log_dir, "metrics.csv").read_text()
    header = text.splitlines()[0]
    for name in (
        "cap/sparsity",
        "cap/sparsity/net.4.weight",
        "cap/predicted_loss",
        "cap/after/val_acc",
        "cap/seconds/solve",
    ):
        assert name in header.split(",")
    assert Path(logger.log_dir, "checkpoints", "sparsity=0.50.ckpt").exists()


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_shows_in_the_trainers_own_bar(tmp_path: Path, bar: type, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    if bar is RichProgressBar:
        progress_bar: Any = RichProgressBar()
        cb = callback()
        t = trainer(tmp_path, cb, progress_bar, enable_progress_bar=True)
        original = callback_module.event_progress

        def spy(*args: Any) -> Any:
            progress = progress_bar.progress
            update = progress.update

            def record(task: Any, **fields: Any) -> None:
                shown.append(str(fields.get("description")))
                update(task, **fields)

            progress.update = record
            return original(*args)

        callback_module.event_progress, restore = spy, original
        try:
            t.fit(Toy(), **loaders())
        finally:
            callback_module.event_progress = restore
        text = " ".join(shown)
    else:
        trainer(tmp_path, callback(), bar(), enable_progress_bar=True).fit(Toy(), **loaders())
        text = capsys.readouterr().out
    assert "Pruning to 0.5: collect" in text
    assert "Pruning to 0.75: solve" in text


def test_model_that_is_already_sparse(tmp_path: Path) -> None:
    module = Toy()
    with torch.no_grad():
        module.net[4].weight[:, ::2] = 0.0
    start = zeros(module)
    watch = Watch()
    trainer(tmp_path, callback({2: 0.75}), watch).fit(module, **loaders())
    assert watch.sparsity[:8] == [0.5] * 8  # held before the first event
    assert (zeros(module) & start).sum() == start.sum()
    free = Toy()
    with torch.no_grad():
        free.net[4].weight[:, ::2] = 0.0
    trainer(tmp_path, callback({3: 0.75}, existing_zeros=False), watch).fit(free, **loaders())
    assert watch.sparsity[20] < 0.1  # they grow back when not taken as masks


def test_a_sparser_model_is_not_changed(tmp_path: Path) -> None:
    module = Toy()
    with torch.no_grad():
        module.net[4].weight[:, 2:] = 0.0
    with pytest.warns(UserWarning, match="already at 0.875"):
        trainer(tmp_path, callback({0: 0.5})).fit(module, **loaders())
    assert zeros(module).float().mean() == 0.875


def test_second_fit_goes_on(tmp_path: Path) -> None:
    module, cb = Toy(), callback({1: 0.5, 3: 0.75})
    t = trainer(tmp_path, cb, max_epochs=4)
    t.fit(module, **loaders())
    t.fit_loop.max_epochs = 6
    t.fit(module, **loaders())
    assert zeros(module).float().mean() == 0.75
    assert cb._done == [1, 3]
    mask = cb.masks["net.4.weight"].clone()
    with pytest.warns(UserWarning, match="sparsity 0.5 at epoch 1, but the model is already at 0.75"):
        trainer(tmp_path, cb, max_epochs=4).fit(
            module, **loaders()
        )  # a new Trainer: masks stay, the schedule begins anew
    assert not (cb.masks["net.4.weight"] & ~mask).any()
    other = Toy()
    trainer(tmp_path, cb, max_epochs=4, limit_train_batches=1).fit(
        other, **loaders()
    )  # another model: nothing carries over
    assert zeros(other).float().mean() == 0.75
    assert cb._collection_index == 2


def test_deepcopy_and_pickle_carry_the_state_but_not_the_model(tmp_path: Path) -> None:
    module, cb = Toy(), callback()
    t = trainer(tmp_path, cb)
    t.fit(module, **loaders())
    twin = copy.deepcopy(t.callbacks)[0]
    again = pickle.loads(pickle.dumps(cb))
    for other in (twin, again):
        assert isinstance(other, CAPPruningCallback)
        assert other._run is None
        state, mine = other.state_dict(), cb.state_dict()
        assert state["done"] == mine["done"] == [1, 2]
        bits = [s["masks"]["net.4.weight"]["bits"] for s in (state, mine)]
        assert torch.equal(*bits)
    assert len(pickle.dumps(cb)) < 100_000


def test_one_shot_at_the_end_of_training(tmp_path: Path) -> None:
    module = Toy()
    cb = callback(OneShot(0.5, epoch=None), dirpath=str(tmp_path))
    watch = Watch()
    trainer(tmp_path, cb, watch, max_epochs=2).fit(module, **loaders())
    assert watch.sparsity == [0.0] * 8
    assert zeros(module).float().mean() == 0.5
    assert (tmp_path / "sparsity=0.50.safetensors").exists()


def test_polynomial_schedule_and_magnitude_run_the_same_way(tmp_path: Path) -> None:
    watch = Watch()
    schedule = PolynomialSchedule(final=0.75, start_epoch=0, end_epoch=3, power=1)
    trainer(tmp_path, callback(schedule, pruner=Magnitude()), watch).fit(Toy(), **loaders())
    assert watch.sparsity[::4] == pytest.approx([0.0, 0.25, 0.5, 0.75])


def test_recomputations_use_fresh_gradients(tmp_path: Path) -> None:
    once, thrice = callback({1: 0.75}), callback({1: 0.75}, num_recomputations=3)
    results = []
    for cb in (once, thrice):
        pl.seed_everything(1, verbose=False)
        module = Toy()
        trainer(tmp_path, cb, max_epochs=2).fit(module, **loaders())
        results.append(module.net[4].weight.detach().clone())
    assert once._collection_index == 1
    assert thrice._collection_index == 3
    assert [float((w == 0).float().mean()) for w in results] == [0.75, 0.75]
    assert not torch.equal(*[w == 0 for w in results])


def test_failed_event_leaves_model_and_masks_unchanged(tmp_path: Path) -> None:
    class Breaks(Toy):
        def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            scale = float("nan") if self.trainer.current_epoch == 2 else 1.0
            return nn.functional.cross_entropy(self(batch[0]), batch[1]) * scale

    module, cb, watch = Breaks(), callback({1: 0.5, 2: 0.75}), Watch()
    with pytest.raises(GradientError, match="48 of 48 gradient samples are not finite"):
        trainer(tmp_path, cb, watch).fit(module, **loaders())
    assert zeros(module).float().mean() == 0.5
    assert cb.masks.global_sparsity == 0.5


def test_bf16_mixed_and_compiled_modules(tmp_path: Path) -> None:
    module = Toy()
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    cb = callback(dirpath=str(tmp_path))
    trainer(tmp_path, cb, precision="bf16-mixed").fit(module, **loaders())
    assert list(cb.masks) == ["net.4.weight"]
    assert float((module.net._orig_mod[4].weight == 0).float().mean()) == 0.75
    Toy().net.load_state_dict(load_file(tmp_path / "sparsity=0.75.safetensors"))
    whole = Toy()
    trainer(tmp_path, callback()).fit(torch.compile(whole, backend="eager"), **loaders())
    assert zeros(whole).float().mean() == 0.75


def test_bf16_true_weights(tmp_path: Path) -> None:
    module = Toy()
    trainer(tmp_path, callback(), precision="bf16-true").fit(module, **loaders())
    assert module.net[4].weight.dtype == torch.bfloat16
    assert zeros(module).float().mean() == 0.75


def test_manual_optimization_with_calibration_step(tmp_path: Path) -> None:
    class Manual(Toy):
        def __init__(self) -> None:
            super().__init__(scheduler=False)
            self.automatic_optimization = False

        def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.calibration_step(batch, batch_idx))
            optimizer.step()

    module, watch = Manual(), Watch()
    trainer(tmp_path, callback(), watch).fit(module, **loaders())
    assert watch.sparsity == [0.0] * 4 + [0.5] * 4 + [0.75] * 8


def test_fast_dev_run_tries_the_wiring_once(tmp_path: Path) -> None:
    module = Toy()
    trainer(tmp_path, callback({20: 0.5}, dirpath=str(tmp_path / "out")), fast_dev_run=True).fit(module, **loaders())
    assert zeros(module).float().mean() == 0.5
    assert not (tmp_path / "out").exists()


def test_model_checkpoint_can_name_the_sparsity(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{sparsity:.2f}", save_top_k=-1)
    trainer(tmp_path, callback(), saver, enable_checkpointing=True).fit(Toy(), **loaders())
    assert (tmp_path / "epoch=3-sparsity=0.75.ckpt").exists()


def test_evaluation_around_an_event_can_be_left_out(tmp_path: Path) -> None:
    calls = []

    class Counts(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            calls.append(self.current_epoch)
            super().validation_step(batch, batch_idx)

    cb = callback(evaluate=False)
    trainer(tmp_path, cb).fit(Counts(), **loaders())
    assert len(calls) == 4 * 2
    assert cb.history[0].value is not None  # from the last validation before the first event


def test_training_without_validation(tmp_path: Path) -> None:
    cb = callback()
    trainer(tmp_path, cb).fit(Toy(), DataLoader(ToyData(), batch_size=16, shuffle=True))
    assert [record.value for record in cb.history] == [None, None, None]


def test_early_stop_still_saves_the_last_cycle(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    cb = callback({1: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, cb, Stop(), max_epochs=10).fit(Toy(), **loaders())
    assert (tmp_path / "sparsity=0.50.ckpt").exists()


def test_max_steps_ends_the_last_cycle(tmp_path: Path) -> None:
    cb, watch = callback({1: 0.5}, dirpath=str(tmp_path)), Watch()
    trainer(tmp_path, cb, watch, max_epochs=-1, max_steps=10).fit(Toy(), **loaders())
    assert watch.lr[-2] < watch.lr[4]  # the cycle's last step; after it equation 8 begins anew
    assert (tmp_path / "sparsity=0.50.ckpt").exists()


def test_period_that_was_fixed_is_kept(tmp_path: Path) -> None:
    class Fixed(Toy):
        def configure_optimizers(self) -> Any:
            config = super().configure_optimizers()
            config["lr_scheduler"]["scheduler"] = CyclicLinearLR(config["optimizer"], min_lr=1e-4, period=2)
            return config

    watch = Watch()
    trainer(tmp_path, callback({1: 0.5}), watch, max_epochs=2).fit(Fixed(), **loaders())
    assert len(set(watch.lr)) == 2


def test_default_pruner_is_cap() -> None:
    assert isinstance(CAPPruningCallback(SparsitySteps({0: 0.5})).pruner, CAP)
    assert FEATURES == 12
    assert cap().block_size == 16
