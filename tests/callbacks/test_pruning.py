from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lightning_cap.callbacks.pruning as callback_module
from lightning_cap import CAPPruningCallback
from lightning_cap.errors import GradientError
from lightning_cap.fisher.memory_plan import CPU, MemoryPlan
from lightning_cap.pruners import CAP, Magnitude
from lightning_cap.schedules import OneShot, PolynomialSchedule, SparsitySteps
from tests.support.toy import FEATURES, Toy, callback, cap, loaders, trainer, zeros
from tests.support.watch import Watch

pytestmark = pytest.mark.usefixtures("seeded")


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
    monkeypatch.setattr(callback_module.PruningEvent, "dry_run", lambda self, collection_index: MemoryPlan(CPU))
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
    assert cb._state.done == [1, 3]
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
    assert cb._state.collection_index == 2


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
    assert once._state.collection_index == 1
    assert thrice._state.collection_index == 3
    assert [float((w == 0).float().mean()) for w in results] == [0.75, 0.75]
    assert not torch.equal(*[w == 0 for w in results])


def test_failed_event_leaves_model_and_masks_unchanged(tmp_path: Path) -> None:
    class Breaks(Toy):
        def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            scale = float("nan") if self.trainer.current_epoch == 2 else 1.0
            return nn.functional.cross_entropy(self(batch[0]), batch[1]) * scale

    module, cb, watch = Breaks(), callback({1: 0.5, 2: 0.75}), Watch()
    with pytest.raises(GradientError, match="loss: it is nan on a whole calibration batch after 8 training steps"):
        trainer(tmp_path, cb, watch).fit(module, **loaders())
    assert zeros(module).float().mean() == 0.5
    assert cb.masks.global_sparsity == 0.5


@pytest.mark.slow
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


def test_default_pruner_is_cap() -> None:
    assert isinstance(CAPPruningCallback(SparsitySteps({0: 0.5})).pruner, CAP)
    assert FEATURES == 12
    assert cap().block_size == 16
