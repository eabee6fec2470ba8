"""The settings that a run's result depends on, as a checkpoint keeps them, and what differs from them after resuming."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cap.pruners import Pruner
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.sparsity.cost import Parameters
from lightning_cap.utilities.arguments import shown


def describe_settings(
    events: Mapping[int, float], pruner: Pruner, rule: SparsitySchedule | None = None, **others: Any
) -> dict[str, str]:
    """Each setting as text, by name.

    Args:
        events: Epoch -> sparsity of the run.
        pruner: Its pruner.
        rule: The schedule, if it finds its sparsities as it goes.
        others: Plain settings of the callback.
    """
    settings = {"schedule": repr(dict(events)), "pruner": type(pruner).__qualname__}
    if is_dataclass(pruner):
        own = {field.name: getattr(pruner, field.name) for field in fields(pruner) if field.init}
        if pruner.heal is None:
            own.pop("heal", None)  # unset, as in the checkpoints of versions that did not know it
        settings.update({f"pruner.{name}": _text(value) for name, value in own.items()})
    if rule is not None and is_dataclass(rule):
        settings.update({f"schedule.{field.name}": _text(getattr(rule, field.name)) for field in fields(rule)})
    if type(pruner.cost) is not Parameters:
        settings["pruner.cost"] = _text(pruner.cost)
    return {**settings, **{name: repr(value) for name, value in others.items()}}


def _text(value: Any) -> str:
    text = shown(value)
    return type(value).__qualname__ if " at 0x" in text else text


def warn_of_differences(
    saved: Mapping[str, str], now: Mapping[str, str], events: Iterable[int], done: Collection[int], due: Collection[int]
) -> None:
    """Say what a resumed run does otherwise than the run that was stopped, if anything.

    Args:
        saved: Settings of the checkpoint; none where it was saved before a run began.
        now: Settings of the run that goes on.
        events: Epochs of its events.
        done: Epochs of those that were run.
        due: Epochs of those that are to come.
    """
    changed = [name for name in {**saved, **now} if saved and saved.get(name) != now.get(name)]
    past = [epoch for epoch in events if epoch not in done and epoch not in due]
    if not changed and not past:
        return
    told = []
    if changed:
        changes = [f"{name} {saved.get(name, 'unset')} -> {now.get(name, 'unset')}" for name in changed]
        told.append(f"Other settings than the checkpoint's: {'; '.join(changes)}.")
    told.append(f"Events of epochs {list(due)} are to come, with the settings of this run.")
    if done:
        told.append(f"Those of epochs {list(done)} are done and stay as they are.")
    if past:
        told.append(f"Those of epochs {past} are not run: training goes on after them.")
    rank_zero_warn(" ".join(told))
