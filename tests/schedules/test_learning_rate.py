from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.schedules.learning_rate import CosineLR, CyclicLinearLR


def make(lr: float | torch.Tensor = 1.0, second: float | None = None) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}]
    if second is not None:
        groups.append({"params": [nn.Parameter(torch.ones(2))], "lr": second})
    return torch.optim.SGD(groups, lr=lr)


def advance(scheduler: CyclicLinearLR | CosineLR, steps: int) -> list[float]:
    """The learning rate of group 0 in force during each of the next steps."""
    seen = []
    for _ in range(steps):
        seen.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def equation_8(t: int, top: float, low: float, period: int) -> float:
    return top - (top - low) * ((t % period) / period)


def test_follows_equation_8_over_several_cycles() -> None:
    seen = advance(CyclicLinearLR(make(0.5), min_lr=0.1, period=4), 10)
    assert seen == [equation_8(t, 0.5, 0.1, 4) for t in range(10)]
    assert seen[0] == seen[4] == seen[8] == 0.5
    assert seen[2] == pytest.approx(0.3)


def test_nothing_accumulates() -> None:
    scheduler = CyclicLinearLR(make(0.3), min_lr=1e-5, period=7)
    assert advance(scheduler, 7 * 300 + 4)[-1] == equation_8(3, 0.3, 1e-5, 7)


def test_each_group_decays_from_its_own_lr() -> None:
    scheduler = CyclicLinearLR(make(1.0, second=0.5), min_lr=0.1, period=10)
    advance(scheduler, 5)
    assert scheduler.get_last_lr() == pytest.approx([0.55, 0.3])
    assert [g["lr"] for g in scheduler.optimizer.param_groups] == scheduler.get_last_lr()


def test_restart_begins_a_cycle_at_once() -> None:
    scheduler = CyclicLinearLR(make(1.0), period=10)
    advance(scheduler, 3)
    assert scheduler.cycle_step == 3
    scheduler.restart()
    assert (scheduler.period, scheduler.cycle_step) == (10, 0)
    assert scheduler.optimizer.param_groups[0]["lr"] == 1.0
    assert scheduler.get_last_lr() == [1.0]
    assert advance(scheduler, 3) == [1.0, 0.9, 0.8]
    scheduler.restart(2)
    assert scheduler.period == 2
    assert advance(scheduler, 4) == [1.0, 0.5, 1.0, 0.5]


def test_open_period_holds_the_maximum_and_says_what_to_do() -> None:
    scheduler = CyclicLinearLR(make(0.5))
    assert scheduler.period is None
    assert scheduler.auto_period
    assert scheduler.cycle_step == 0
    assert scheduler.get_last_lr() == [0.5]
    scheduler.restart()
    scheduler.optimizer.step()
    with pytest.warns(UserWarning, match=r"period=None.*give period=.*CAPPruningCallback"):
        scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()  # said once
    assert scheduler.get_last_lr() == [0.5]
    scheduler.restart(2)
    assert advance(scheduler, 3) == [0.5, 0.25, 0.5]
    assert scheduler.auto_period  # still: a gap of another length may follow


def test_given_period_is_not_automatic() -> None:
    assert not CyclicLinearLR(make(), period=3).auto_period


@pytest.mark.parametrize("restored_optimizer", [True, False])
def test_state_continues_exactly(restored_optimizer: bool) -> None:
    straight = CyclicLinearLR(make(0.3, second=0.7), min_lr=0.01, period=5)
    advance(straight, 3)
    straight.restart(7)
    advance(straight, 4)
    state = straight.state_dict()
    resumed = CyclicLinearLR(make(0.3, second=0.7))
    if restored_optimizer:
        resumed.optimizer.load_state_dict(straight.optimizer.state_dict())
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.get_last_lr() == straight.get_last_lr()
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [g["lr"] for g in straight.optimizer.param_groups]
    assert advance(resumed, 20) == advance(straight, 20)


def plain(value: object) -> bool:
    if isinstance(value, list):
        return all(plain(v) for v in value)
    return value is None or type(value) in (int, float, bool)


def test_state_is_plain_even_with_a_tensor_lr(tmp_path) -> None:
    lr = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=lr, capturable=True)
    scheduler = CyclicLinearLR(optimizer, period=4)
    scheduler.restart(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer step before
        scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    scheduler.restart()
    assert float(optimizer.param_groups[0]["lr"]) == 1.0
    state = scheduler.state_dict()
    assert all(plain(v) for v in state.values())
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def test_torch_warnings_stay_as_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = CyclicLinearLR(make(), period=3)  # the initial step does not warn
        advance(scheduler, 4)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        CyclicLinearLR(make(), period=3).step()


def test_continues_from_last_epoch() -> None:
    optimizer = make(1.0)
    CyclicLinearLR(optimizer, period=4)
    assert CyclicLinearLR(optimizer, period=4, last_epoch=1).get_last_lr() == [0.5]


@pytest.mark.parametrize("period", [0, -1, 2.5, "3", True])
def test_refuses_a_bad_period(period: object) -> None:
    with pytest.raises(ConfigError, match=f"period={period!r}: give a whole number of at least 1"):
        CyclicLinearLR(make(), period=period)  # type: ignore[arg-type]
    scheduler = CyclicLinearLR(make(), period=3)
    with pytest.raises(ConfigError, match=f"period={period!r}"):
        scheduler.restart(period)  # type: ignore[arg-type]
    assert scheduler.period == 3


@pytest.mark.parametrize("min_lr", [-1.0, float("nan"), float("inf")])
def test_refuses_a_bad_min_lr(min_lr: float) -> None:
    with pytest.raises(ConfigError, match=r"min_lr=.*: give a number of at least 0"):
        CyclicLinearLR(make(), min_lr=min_lr, period=3)


def test_refuses_min_lr_above_any_group() -> None:
    with pytest.raises(ConfigError, match=r"min_lr=0\.1: it is above .*0\.05.*Lower min_lr"):
        CyclicLinearLR(make(1.0, second=0.05), min_lr=0.1, period=3)
    CyclicLinearLR(make(0.1), min_lr=0.1, period=3)  # equal is a constant rate


def cosine(t: int, top: float, low: float, steps: int, rise: int) -> float:
    if t < rise:
        return low + (top - low) * t / rise
    return low + (top - low) * (1 + math.cos(math.pi * (t - rise) / (steps - rise))) / 2


def test_cosine_after_a_linear_rise() -> None:
    seen = advance(CosineLR(make(0.5), min_lr=0.1, warmup=0.3, steps=10), 10)
    assert seen == pytest.approx([cosine(t, 0.5, 0.1, 10, 3) for t in range(10)])
    assert (seen[0], seen[3]) == (0.1, 0.5)


def test_cosine_stays_at_the_minimum_after_the_end() -> None:
    seen = advance(CosineLR(make(0.5), min_lr=0.1, steps=4), 7)
    assert seen[0] == 0.5
    assert seen[4:] == [0.1, 0.1, 0.1]
    assert seen[2] == pytest.approx(0.3)


def test_cosine_of_unknown_length_warns_and_takes_it_later() -> None:
    scheduler = CosineLR(make(1.0, second=0.5), min_lr=0.1, warmup=0.5)
    with pytest.warns(UserWarning, match=r"steps=None: CosineLR .* call span"):
        assert advance(scheduler, 2) == [1.0, 1.0]
    scheduler.span(8)
    assert [g["lr"] for g in scheduler.optimizer.param_groups] == pytest.approx([0.55, 0.3])
    assert scheduler.get_last_lr() == pytest.approx([0.55, 0.3])


def test_cosine_goes_on_after_a_restore() -> None:
    whole = CosineLR(make(), min_lr=0.01, warmup=0.2)
    whole.span(20)
    expected = advance(whole, 20)
    first = CosineLR(make(), min_lr=0.01, warmup=0.2)
    first.span(20)
    advance(first, 7)
    optimizer = make()
    second = CosineLR(optimizer, min_lr=0.01, warmup=0.2)
    optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert advance(second, 13) == expected[7:]
