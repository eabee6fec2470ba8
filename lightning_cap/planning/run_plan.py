"""The plan of a run, as a record: what ``lightning-cap plan --json`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from lightning_cap.trainer.run_records import LayerRecord, PlanRecord
from lightning_cap.utilities.records import Record


@dataclass(frozen=True)
class ChoicePlan:
    """What is pruned of a model, and what is not.

    Attributes:
        layers: Weights of layers, with why those are left dense that are.
        total: Parameters of the model.
        pruned: Of them, those of targets.
        others: Of them, those that belong to no layer that could be pruned: biases, norms, embeddings.
        units: Units and their groups, in one line; empty where single weights are pruned.
        note: How the first and last layers were found, where no forward pass told them.
    """

    layers: tuple[LayerRecord, ...]
    total: int
    pruned: int
    others: int
    units: str = ""
    note: str = ""


@dataclass(frozen=True)
class EventPlan:
    """One pruning event, or one goal of a comparison.

    Attributes:
        epoch: At the start of which it comes; None in a comparison.
        goal: Sparsity, or what else goals count.
        collections: Times that gradients or inputs are collected anew for it; 0 where nothing is pruned.
        cycle: Epochs until the next event that begins a cycle, or to the end; 0 in a comparison.
        seconds: All phases of it, on this machine; None where that was not measured.
    """

    epoch: int | None
    goal: float
    collections: int
    cycle: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class FilePlan:
    """Files that a run writes.

    Attributes:
        name: One of them, or what they have in common.
        count: How many.
        bytes: Of one.
    """

    name: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What one pruner does in a run.

    Attributes:
        label: Of the pruner.
        settings: Of the pruner, as text.
        choice: Place of what it prunes in `RunPlan.choices`.
        counted: What goals count: ``"sparsity"``, ``"parameters"``, ``"flops"`` or ``"latency"``.
        prices: What goals of units leave, such as ``"45.2 ms dense, 22.6 ms at goal 0.5"``; empty for weights.
        events: In order.
        unit: What is collected, such as ``"gradients"``; empty for nothing.
        samples: How many of them for a collection, over all processes.
        memory: Of an event, for each process.
        seconds: Of each phase for one collection, on this machine; None where that was not measured.
        cached: Whether gradients are kept for several pruners: ``"memory"``, ``"disk"`` or empty.
        cached_bytes: Of them, for each process; 0 for those that read what another pruner has collected.
        seeds: Times that all of it is done, with other samples.
    """

    label: str
    settings: str
    choice: int
    counted: str
    prices: str = ""
    events: tuple[EventPlan, ...]
    unit: str = ""
    samples: int = 0
    memory: PlanRecord
    seconds: Mapping[str, float] | None = None
    cached: str = ""
    cached_bytes: int = 0
    seeds: int = 1

    @property
    def total_seconds(self) -> float | None:
        """Of all events together, with all seeds."""
        if any(event.seconds is None for event in self.events):
            return None
        return self.seeds * sum(event.seconds or 0.0 for event in self.events)


@dataclass(frozen=True)
class EpochPlan:
    """An epoch.

    Attributes:
        epoch: From 0.
        goal: Of the last event until then: sparsity, or what else goals of the first pruner count.
        lr: Learning rate of the first parameter group in the first step.
        last_lr: In the last step.
    """

    epoch: int
    goal: float
    lr: float
    last_lr: float


@dataclass(frozen=True)
class TimelinePlan:
    """Sparsity and learning rate over a run.

    Attributes:
        epochs: All in all; -1 for no limit.
        steps: Optimizer steps of an epoch.
        samples: Training samples that this is of.
        known: Whether the data tells that number; otherwise it is assumed.
        scheduler: Name of the class; empty for a constant learning rate.
        points: Each epoch; of very many epochs some.
    """

    epochs: int
    steps: int
    samples: int
    known: bool
    scheduler: str
    points: tuple[EpochPlan, ...]


@dataclass(frozen=True)
class MachinePlan:
    """What the plan is for.

    Attributes:
        device: Of a process.
        processes: All in all.
        device_bytes: Free on the device of a process for an event; None where that is not known.
        model_bytes: Weights, gradients and the optimizer's state, on the device of each process besides.
        measured_on: Where seconds were measured.
    """

    device: str
    processes: int
    device_bytes: int | None
    model_bytes: int
    measured_on: str


@dataclass(frozen=True, kw_only=True)
class RunPlan(Record):
    """The plan of a run.

    Attributes:
        command: ``"fit"`` or ``"oneshot"``.
        model: Its name.
        machine: What it is planned for.
        choices: What is pruned, each once.
        pruning: What each pruner does.
        timeline: Of a training run; None in a comparison.
        folder: Where files go.
        files: What is written there.
        notes: What is assumed, and what could not be told.
    """

    kind: ClassVar[str] = "plan"
    version: ClassVar[int] = 1

    command: str
    model: str
    machine: MachinePlan
    choices: tuple[ChoicePlan, ...] = ()
    pruning: tuple[PruningPlan, ...] = ()
    timeline: TimelinePlan | None = None
    folder: str = ""
    files: tuple[FilePlan, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def with_notes(self, notes: Iterable[str]) -> RunPlan:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    @property
    def disk_bytes(self) -> int:
        """Of all files."""
        return sum(file.count * file.bytes for file in self.files)

    @property
    def seconds(self) -> float | None:
        """Of all events of all pruners; None where one was not measured."""
        found = [plan.total_seconds for plan in self.pruning]
        return None if any(each is None for each in found) else sum(each or 0.0 for each in found)
