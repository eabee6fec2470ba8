"""Weights that come back inside a Lightning run: dense phases (AC/DC), lower sparsities, drop and grow (RigL, GraNet)."""

from __future__ import annotations

import contextlib
import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

import lightning_cap.callbacks.pruning as callback_module
from lightning_cap.callbacks.optimizer_state import sync_optimizer_state
from lightning_cap.callbacks.run import cycle_starts
from lightning_cap.errors import ConfigError, PatternError, UnsupportedError
from lightning_cap.pruners import DropAndGrow, Magnitude, Pruner
from lightning_cap.schedules import (
    AlternatingSchedule,
    OneShot,
    PolynomialSchedule,
    RepeatedSchedule,
    SparsitySchedule,
    SparsitySteps,
)
from lightning_cap.sparsity.allocation import PerTarget, Uniform
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, check_pattern
from lightning_cap.sparsity.targets import Targets
from tests.callbacks.test_resume import CrashError, _StopAfter, assert_same, averaging
from tests.support.toy import Toy, ToyData, callback, cap, loaders, trainer, zeros

NAME = "net.4.weight"
ACDC = AlternatingSchedule(0.75, start_epoch=1, sparse_epochs=2, dense_epochs=1)  # events at 1, 3, 4 of 6 epochs


def rigl(**kwargs: Any) -> DropAndGrow:
    return DropAndGrow(**{"num_gradients": 4, "samples_per_gradient": 8, **kwargs})


@pytest.fixture(autouse=True)
def _seeded() -> None:
    pl.seed_everything(3, verbose=False)


class Watch(pl.Callback):
    """What is true at the start of each epoch, after the event, and after each step. Put it behind the pruning callback."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.sparsity: list[float] = []
        self.lr: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        cb = next(c for c in trainer.callbacks if hasattr(c, "masks"))
        self.masks.append(cb.masks[NAME].clone())
        self.weights.append(pl_module.net[4].weight.detach().clone())
        state = trainer.optimizers[0].state[pl_module.net[4].weight]
        self.states.append({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.sparsity.append(float(zeros(pl_module).float().mean()))
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(folder: Path, schedule: SparsitySchedule, pruner: Pruner, *more: pl.Callback, **kwargs: Any) -> Any:
    """The module, the callback and what a `Watch` saw in a run of six epochs of four steps."""
    module, watch = Toy(kwargs.pop("optimizer", "adamw")), Watch()
    cb = callback(schedule, pruner=pruner, dirpath=str(folder / "out"), **kwargs.pop("callback", {}))
    trainer(folder, cb, watch, *more, **{"max_epochs": 6, **kwargs}).fit(module, **loaders())
    return module, cb, watch


# dense and sparse phases in turn


@pytest.mark.parametrize("pruner", [Magnitude(), cap()], ids=["magnitude", "cap"])
def test_masks_are_lifted_and_imposed_anew(tmp_path: Path, pruner: Pruner) -> None:
    module, cb, watch = fit(tmp_path, ACDC, pruner)
    assert watch.sparsity[:4] == [0.0] * 4
    assert watch.sparsity[4:12] == [0.75] * 8
    assert max(watch.sparsity[12:16]) < 0.25, "what came back is trained"
    assert watch.sparsity[16:] == [0.75] * 8
    assert [int((~mask).sum()) for mask in watch.masks] == [0, 192, 192, 0, 192, 192]
    assert not watch.weights[3][~watch.masks[2]].any(), "weights come back from zero"
    assert cb.masks.global_sparsity == 0.75
    assert torch.equal(zeros(module), ~watch.masks[4])


def test_a_sparse_phase_prunes_the_dense_weights_anew(tmp_path: Path) -> None:
    class Tamper(pl.Callback):
        """Makes weights that the first sparse phase had pruned the largest. In front of the pruning callback."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 4:
                with torch.no_grad():
                    pl_module.net[4].weight[~watch.masks[2]] += 3.0

    watch, cb = Watch(), callback(ACDC, pruner=Magnitude(), dirpath=str(tmp_path))
    trainer(tmp_path, Tamper(), cb, watch, max_epochs=6).fit(Toy(), **loaders())
    assert not (watch.masks[4] & watch.masks[2]).any()
    assert int((~watch.masks[4]).sum()) == 192


def test_a_dense_phase_is_a_cycle_with_a_row_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, cb, watch = fit(tmp_path, ACDC, Magnitude())
    assert [(row["target"], row["epoch"]) for row in cb.history] == [(0.0, 3), (0.75, 5)]
    assert cb.history[0]["sparsity"] < 0.2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.ckpt")) == ["sparsity=0.00.ckpt", "sparsity=0.75.ckpt"]
    assert torch.load(tmp_path / "out/sparsity=0.75.ckpt", weights_only=True)["epoch"] == 5
    assert "dense" in capsys.readouterr().out
    top = [i for i, (a, b) in enumerate(zip(watch.lr[:-1], watch.lr[1:-1], strict=False)) if b > a]
    assert top == [2, 10, 14]  # the last step before each of the three events; the rate then begins anew
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [(e["epoch"], e["target"], e["grown_back"]) for e in events] == [(1, 0.75, 0), (3, 0.0, 192), (4, 0.75, 0)]
    assert "after/val_acc" in events[1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_state_of_lifted_weights_is_a_new_weights(tmp_path: Path, optimizer: str) -> None:
    _, _, watch = fit(tmp_path, ACDC, Magnitude(), optimizer=optimizer)
    back, stayed = ~watch.masks[2], watch.masks[2]
    lifted = watch.states[3]
    first = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
    assert not lifted[first][back].any()
    assert lifted[first][stayed].any()
    if optimizer == "adamw":
        second = lifted["exp_avg_sq"]
        assert torch.equal(second[back], torch.full((192,), float(second[stayed].double().mean())))
    sparse_again = watch.states[4]
    assert not sparse_again[first].any(), "momentum of the dense phase is stale"
    if optimizer == "adamw":
        assert sparse_again["exp_avg_sq"][watch.masks[4]].any(), "second moments are not"


class Imposed(pl.Callback):
    """Whether momentum was left right after each epoch's event. Put it behind the pruning callback."""

    def __init__(self) -> None:
        self.left: list[bool] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.optimizers[0].state[pl_module.net[4].weight]
        self.left.append(bool(state["exp_avg"].any()) if state else False)


@pytest.mark.parametrize(
    ("schedule", "pruner", "half", "left"),
    [
        (ACDC, Magnitude(), False, [False, False, True, True, False, True]),
        (ACDC, Magnitude(), True, [False, False, True, True, False, True]),
        (ACDC, rigl(), False, [False, False, True, True, False, True]),
        (SparsitySteps({1: 0.75, 3: 0, 4: 0.75}, True), Magnitude(), False, [False, False, True, True, False, True]),
        (
            SparsitySteps({1: 0.5, 2: 0.75, 3: 0, 4: 0.75}, True),
            Magnitude(),
            True,
            [False, False, True, True, False, True],
        ),
        (SparsitySteps({1: 0.75, 3: 0.5}, True), Magnitude(), False, [False, True, True, True, True, True]),
        (SparsitySteps({1: 0.5, 3: 0.75}), Magnitude(), False, [False, True, True, True, True, True]),
    ],
)
def test_each_sparse_phase_begins_without_momentum_and_no_other_event_does(
    tmp_path: Path, schedule: SparsitySchedule, pruner: Pruner, half: bool, left: list[bool]
) -> None:
    module, seen = Toy(), Imposed()
    with torch.no_grad():
        module.net[4].weight[:, :4].mul_(float(not half))
    trainer(tmp_path, callback(schedule, pruner=pruner, save="none"), seen, max_epochs=6).fit(module, **loaders())
    assert seen.left == left


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), 1.0),
        (lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True), 1.0),
        (lambda p: torch.optim.NAdam(p, lr=1e-3), 2.0),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5), 4.0),  # the gradient itself, in standard deviations
    ],
    ids=["adamw", "amsgrad", "nadam", "rmsprop"],
)
def test_first_step_of_a_weight_that_came_back_late_in_training_is_small(make: Any, limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(8, 16, generator=generator)) for name in "ab"}
    targets = Targets(weights)
    masks, optimizer = MaskSet(targets), make(weights.values())
    masks.update({"a": torch.rand(8, 16, generator=generator) > 0.5})

    def step() -> Tensor:
        before = weights["a"].detach().clone()
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        masks.apply_to_gradients()
        optimizer.step()
        masks.apply_to_weights()
        return (weights["a"].detach() - before).abs() / 1e-3

    for _ in range(3000):
        step()
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    grown = masks.unmask_all()
    naive = step()[grown["a"]].max()
    optimizer.load_state_dict(optimizer_before)
    sync_optimizer_state(optimizer, targets, masks, grown)
    new = step()[grown["a"]].max()
    assert new < limit
    assert naive > 2 * limit, "what it would be with second moments at zero"


def test_state_of_every_kind() -> None:
    weights = {name: nn.Parameter(torch.ones(2, 3)) for name in ("some", "all", "none")}
    targets = Targets(weights)
    masks = MaskSet(targets)
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    for number, weight in enumerate(weights.values()):
        optimizer.state[weight] = {
            "signed": torch.full((2, 3), -1.0),
            "square": torch.arange(6.0).view(2, 3) + 10 * number,
            "step": torch.tensor(7.0),
            "row": torch.ones(2),
            "codes": torch.ones(2, 3, dtype=torch.uint8),
        }
    masks.update({"some": torch.tensor([[True, True, False], [True, False, False]]), "all": torch.zeros(2, 3).bool()})
    masks.apply_to_optimizer(optimizer)
    after = {"some": torch.tensor([[True, True, True], [True, False, False]]), "all": torch.eye(2, 3).bool()}
    sync_optimizer_state(optimizer, targets, masks, masks.replace(after))
    some, every, none = (optimizer.state[weight] for weight in weights.values())
    assert some["signed"].tolist() == [[-1, -1, 0], [-1, 0, 0]]
    assert some["square"].tolist() == [[0, 1, pytest.approx(4 / 3)], [3, 0, 0]]
    assert every["signed"].tolist() == [[0, 0, 0], [0, 0, 0]]
    overall = (0 + 1 + 3 + 20 + 21 + 22 + 23 + 24 + 25) / 9  # none of its own was kept
    assert every["square"].flatten().tolist() == pytest.approx([overall, 0, 0, 0, overall, 0])
    assert none["square"].tolist() == [[20, 21, 22], [23, 24, 25]]
    assert [state["step"].item() for state in (some, every, none)] == [7, 7, 7]
    assert [state["row"].tolist() for state in (some, every, none)] == [[1, 1]] * 3
    sync_optimizer_state(optimizer, targets, masks, {}, reset_momentum=True)
    assert not any(state["signed"].any() for state in (some, every, none))
    assert none["square"].tolist() == [[20, 21, 22], [23, 24, 25]]


def test_phases_of_a_pattern(tmp_path: Path) -> None:
    schedule = AlternatingSchedule(0.5, 1, 2, 1)
    _, cb, watch = fit(tmp_path, schedule, cap(pattern=NofM(2, 4)))
    assert [int((~mask).sum()) for mask in watch.masks] == [0, 128, 128, 0, 128, 128]
    assert int(cb.masks[NAME].view(-1, 4).sum(1).max()) == 2
    with pytest.raises(PatternError):
        fit(tmp_path, AlternatingSchedule(0.6, 1, 2, 1), cap(pattern=NofM(2, 4)))


def test_averages_follow_a_lift(tmp_path: Path) -> None:
    ema = averaging()
    seen: list[int] = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(int((ema._average_model.module.net[4].weight == 0).sum()))

    fit(tmp_path, ACDC, Magnitude(), ema, Count())
    assert seen[:3] == [0, 192, 192]
    assert seen[3] < 50
    assert seen[4:] == [192, 192]


def test_lifting_is_split_into_no_steps(tmp_path: Path) -> None:
    _, _, watch = fit(tmp_path, ACDC, cap(), callback={"num_recomputations": 2})
    assert [int((~mask).sum()) for mask in watch.masks] == [0, 192, 192, 0, 192, 192]


# a lower sparsity


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
    both = {"include": ["net.0.weight", NAME]}
    _, cb, _ = fit(tmp_path / "uniform", falling, Magnitude(allocation=Uniform()), callback=both)
    assert {name: int((~mask).sum()) for name, mask in cb.masks.items()} == {"net.0.weight": 96, NAME: 128}
    first = PerTarget({"net.0.weight": 0.5})
    _, cb, watch = fit(tmp_path / "given", falling, Magnitude(allocation=first), callback=both)
    assert int((~watch.masks[1]).sum()) == 336 - 96
    assert {name: int((~mask).sum()) for name, mask in cb.masks.items()} == {"net.0.weight": 96, NAME: 128}


@pytest.mark.parametrize("pruner", [cap(pattern=BlockOf(4)), Magnitude(pattern=OutputRows())], ids=["blocks", "rows"])
def test_a_decrease_that_would_break_the_pattern_is_refused_before_training(tmp_path: Path, pruner: Pruner) -> None:
    module, message = Toy(), r"pattern=.*falls from 0\.75 to 0\.5.*Unstructured"
    cb = callback(SparsitySteps({0: 0.75, 2: 0.5}, allow_decrease=True), pruner=pruner, save="none")
    with pytest.raises(PatternError, match=message):
        trainer(tmp_path, cb).fit(module, **loaders())
    assert not zeros(module).any()
    with torch.no_grad():
        module.net[4].weight[4:] = 0.0
    cb = callback(SparsitySteps({1: 0.5}, allow_decrease=True), pruner=pruner, save="none")
    with pytest.raises(PatternError, match=message):
        trainer(tmp_path, cb).fit(module, **loaders())
    assert module.batches == []
    lifted = callback(SparsitySteps({0: 0.75, 1: 0, 2: 0.5}, allow_decrease=True), pruner=pruner, save="none")
    trainer(tmp_path, lifted).fit(module, **loaders())
    check_pattern(lifted._active.targets, pruner.pattern)


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


def test_growth_without_a_calibration_step_is_refused_before_training(tmp_path: Path) -> None:
    class Manual(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    falling = SparsitySteps({0: 0.75, 2: 0.5}, allow_decrease=True)
    for schedule, pruner in ((falling, Magnitude()), (RepeatedSchedule(0.5), rigl())):
        with pytest.raises(UnsupportedError, match="calibration_step"):
            trainer(tmp_path, callback(schedule, pruner=pruner)).fit(Manual(), **loaders())


# drop and grow


def test_weights_are_exchanged_within_one_cycle(tmp_path: Path) -> None:
    module, cb, watch = fit(tmp_path, RepeatedSchedule(0.75, end_epoch=4), rigl())
    assert [int((~mask).sum()) for mask in watch.masks] == [192] * 6
    new = [int((b & ~a).sum()) for a, b in zip(watch.masks, watch.masks[1:], strict=False)]
    assert all(new[:3]), "weights come back at every event"
    assert new[4] == 0, "after the end nothing moves"
    assert not watch.weights[1][watch.masks[1] & ~watch.masks[0]].any(), "at zero"
    assert int((cb.masks[NAME] == 0).sum()) == 192
    assert zeros(module)[~cb.masks[NAME]].all()
    assert [(row["target"], row["epoch"]) for row in cb.history] == [(0.0, 0), (0.75, 5)]
    assert [p.name for p in (tmp_path / "out").glob("*.ckpt")] == ["sparsity=0.75.ckpt"]
    assert all(b < a for a, b in zip(watch.lr[:-1], watch.lr[1:-1], strict=False)), "one decay over the whole cycle"
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in events] == [0, 1, 2, 3, 4]
    assert ["after/val_acc" in e for e in events] == [True] + [False] * 4
    assert [e["gradients"] for e in events] == [0, 4, 4, 4, 4]
    assert [e["grown_back"] for e in events] == [0, *new[:4]]


def test_exchanged_share_falls_by_a_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setattr(DropAndGrow, "begin_event", lambda self, done: heard.append(done))
    fit(tmp_path, RepeatedSchedule(0.75, end_epoch=3), rigl())
    assert heard == [0.0, 0.25, 0.5, 0.75]


def test_a_rising_sparsity_is_granet(tmp_path: Path) -> None:
    _, cb, watch = fit(tmp_path, PolynomialSchedule(0.75, 0, 4, power=1), rigl(drop_fraction=0.5))
    counts = [int((~mask).sum()) for mask in watch.masks]
    assert counts == [0, 48, 96, 144, 192, 192]
    assert any((b & ~a).any() for a, b in zip(watch.masks, watch.masks[1:], strict=False))
    assert [row["target"] for row in cb.history] == pytest.approx([0.0, 0.1875, 0.375, 0.5625, 0.75])


def test_a_sparser_model_grows_to_the_target(tmp_path: Path) -> None:
    module, cb = Toy(), callback(OneShot(0.5), pruner=rigl(), dirpath=str(tmp_path))
    with torch.no_grad():
        module.net[4].weight[:, 2:] = 0.0
    trainer(tmp_path, cb).fit(module, **loaders())
    assert int((~cb.masks[NAME]).sum()) == 128


def test_state_of_exchanged_weights(tmp_path: Path) -> None:
    _, _, watch = fit(tmp_path, RepeatedSchedule(0.75, end_epoch=4), rigl())
    for before, after, state in zip(watch.masks[:4], watch.masks[1:], watch.states[1:], strict=False):
        back, stayed = after & ~before, after & before
        assert not state["exp_avg"][~stayed].any()
        assert state["exp_avg"][stayed].any(), "no momentum is reset within a cycle"
        assert not state["exp_avg_sq"][~after].any()
        assert torch.equal(
            state["exp_avg_sq"][back],
            torch.full((int(back.sum()),), float(state["exp_avg_sq"][stayed].double().mean())),
        )


def test_averages_go_on_within_a_cycle(tmp_path: Path) -> None:
    ema = averaging()
    updates: list[int] = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            updates.append(int(ema._average_model.n_averaged))

    fit(tmp_path, RepeatedSchedule(0.75), rigl(), ema, Count())
    assert updates == [4, 8, 12, 16, 20, 24]


def test_recomputations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_recomputations=2: DropAndGrow exchanges"):
        fit(tmp_path, RepeatedSchedule(0.5), rigl(), callback={"num_recomputations": 2})


@pytest.mark.parametrize("schedule", [ACDC, RepeatedSchedule(0.5, frequency=2)])
def test_fast_dev_run(tmp_path: Path, schedule: SparsitySchedule) -> None:
    cb = callback(schedule, pruner=rigl())
    trainer(tmp_path, cb, fast_dev_run=True, max_epochs=None).fit(Toy(), **loaders())
    assert cb.masks.global_sparsity == next(iter(schedule.events(9).values()))


def test_a_longer_second_fit_saves_again(tmp_path: Path) -> None:
    module, cb = Toy(), callback(RepeatedSchedule(0.75), pruner=rigl(), dirpath=str(tmp_path))
    t = trainer(tmp_path, cb, max_epochs=4)
    t.fit(module, **loaders())
    t.fit_loop.max_epochs = 8
    t.fit(module, **loaders())
    assert cb._done == [0, 1, 2, 3, 4, 5, 6]
    assert torch.load(tmp_path / "sparsity=0.75.ckpt", weights_only=True)["epoch"] == 7


def test_cycles_begin_where_the_target_changes() -> None:
    events = {0: 0.5, 1: 0.5, 2: 0.75, 3: 0.75, 4: 0.5}
    assert cycle_starts(events, rigl()) == [0, 2, 4]
    assert cycle_starts(events, Magnitude()) == [0, 1, 2, 3, 4]


# resuming


RUNS: dict[str, tuple[SparsitySchedule, Any]] = {
    "acdc": (ACDC, Magnitude),
    "rigl": (RepeatedSchedule(0.75), rigl),
}


def go(folder: Path, kind: str, *, ckpt: str | None = None, seed: int = 11, stop: int | None = None) -> tuple[Toy, Any]:
    pl.seed_everything(seed, verbose=False)
    schedule, pruner = RUNS[kind]
    cb = callback(schedule, pruner=pruner(), dirpath=str(folder / "pruned"))
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    extra = [] if stop is None else [_StopAfter(stop)]
    module = Toy()
    t = trainer(folder, cb, saver, *extra, max_epochs=6, enable_checkpointing=True)
    with contextlib.suppress(CrashError):
        t.fit(module, **loaders(), ckpt_path=ckpt)
    return module, cb


@pytest.mark.parametrize("kind", RUNS)
def test_resume_from_every_epoch_end(tmp_path: Path, kind: str) -> None:
    whole, cb = go(tmp_path / "whole", kind)
    for epoch in range(5):
        cut = tmp_path / f"cut{epoch}"
        go(cut, kind, stop=epoch + 1)
        resumed, again = go(cut, kind, ckpt=str(cut / f"epoch={epoch}.ckpt"), seed=99)
        assert_same(whole, resumed)
        assert torch.equal(cb.masks[NAME], again.masks[NAME])
        values = [[(row["target"], row["epoch"], row["value"]) for row in c.history] for c in (cb, again)]
        assert values[0] == values[1]
        assert {p.name for p in (cut / "pruned").glob("*.ckpt")} == {
            p.name for p in (tmp_path / "whole/pruned").glob("*.ckpt")
        }


def test_an_event_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is gone")

    module, cb = Toy(), callback(RepeatedSchedule(0.75, start_epoch=1), pruner=rigl(), dirpath=str(tmp_path))

    class Break(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                self.before = pl_module.net[4].weight.detach().clone(), cb.masks[NAME].clone()
                monkeypatch.setattr(callback_module.PruningEvent, "_put", broken)

    around = Break()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer(tmp_path, around, cb, max_epochs=6).fit(module, **loaders())
    assert torch.equal(module.net[4].weight, around.before[0])
    assert torch.equal(cb.masks[NAME], around.before[1])
    assert cb._done == [1]


class Dump(pl.Callback):
    """Every rank writes its weights and masks at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        cb = next(c for c in trainer.callbacks if hasattr(c, "masks"))
        state = pl_module.net[4].weight.detach().clone(), cb.masks[NAME].clone()
        torch.save(state, self.folder / f"{trainer.current_epoch}-{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_go_together(tmp_path: Path, kind: str) -> None:
    schedule, pruner = RUNS[kind]
    cb = callback(schedule, pruner=pruner(), dirpath=str(tmp_path / "out"))
    t = trainer(tmp_path, cb, Dump(tmp_path), max_epochs=6, devices=2, strategy="ddp_spawn")
    try:
        t.fit(Toy(), **loaders())
    except ProcessExitedException as error:  # gloo's threads may abort a process that has done all of its work
        if error.signal_name != "SIGABRT" or not all((tmp_path / f"5-{rank}.pt").exists() for rank in range(2)):
            raise
    masks = []
    for epoch in range(6):
        (weight, mask), (other, other_mask) = (torch.load(tmp_path / f"{epoch}-{rank}.pt") for rank in range(2))
        assert torch.equal(weight, other)
        assert torch.equal(mask, other_mask)
        assert not weight[~mask].any()
        masks.append(mask)
    assert int((~masks[-1]).sum()) == 192
    assert any((later & ~earlier).any() for earlier, later in pairwise(masks)), "weights came back"
    assert (tmp_path / "out/sparsity=0.75.ckpt").exists()
