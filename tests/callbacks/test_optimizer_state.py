"""The optimizer's state of weights that come back, and at the start of a sparse phase."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_cap.callbacks.optimizer_state import sync_optimizer_state
from lightning_cap.pruners import Magnitude, Pruner
from lightning_cap.schedules import RepeatedSchedule, SparsitySchedule, SparsitySteps
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from tests.support.regrowing import ACDC, fit, rigl
from tests.support.toy import Toy, callback, loaders, trainer

pytestmark = pytest.mark.usefixtures("seeded")


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
