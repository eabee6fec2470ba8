"""The records of a run: what it is and on what, what each cycle ends with, and what fine-tuning its checkpoints gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_cap.trainer.records import Saving
from lightning_cap.utilities.records import Record

RUN = "run.jsonl"
CYCLES = "cycles.jsonl"
FINETUNED = "finetuned.jsonl"
_LESS_IS_BETTER = ("loss", "error", "mse", "mae", "perplexity")


def less_is_better(metric: str) -> bool:
    """Whether a metric, as its name tells, is the better the less it is."""
    return any(word in metric.lower() for word in _LESS_IS_BETTER)


@dataclass(frozen=True)
class LayerRecord:
    """A weight of a layer that could be pruned.

    Attributes:
        name: Of the parameter.
        shape: Of the weight.
        dense: Why it is left dense, such as ``"first"``; empty for a target.
        flops: Of the layer on one example, zeros counted as other numbers; None where that is not known.
    """

    name: str
    shape: tuple[int, ...]
    dense: str = ""
    flops: int | None = None


@dataclass(frozen=True)
class PlanRecord:
    """The memory plan of the events; see `lightning_cap.fisher.memory_plan.MemoryPlan`.

    Attributes:
        device: Where blocks are solved.
        peak_bytes: Peak extra memory there.
        limit: Bytes that it may take there; None if that is not known.
        storage_device: Where the Fisher is kept.
        host_bytes: Peak extra main memory, where that is not ``device``.
        passes: Over the gradients.
        chunk: Blocks that are solved at a time.
        rows: Gradient rows computed at once; None for as many as the source likes.
    """

    device: str
    peak_bytes: int
    limit: int | None
    storage_device: str
    host_bytes: int
    passes: int
    chunk: int
    rows: int | None


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """A start of a run: one line of ``run.jsonl`` for each, the last one of that which goes on or was the last to.

    Attributes:
        state: ``"running"`` (or killed), ``"finished"`` or ``"stopped"`` by an exception or the user.
        started: Time in UTC, ISO 8601.
        ended: Likewise; empty while it runs.
        epoch: That it begins with, from 0.
        max_epochs: Of the Trainer; -1 for no limit.
        schedule: ``{epoch: goal}`` of all events, the epoch as text.
        counted: What goals count: ``"sparsity"``, ``"parameters"``, ``"flops"`` or ``"latency"``.
        metric: Of the table of cycles; None if it is not known yet.
        mode: Whether more (``"max"``) or less of it is better.
        model: Name of the model.
        weights: Its parameters, all in all.
        layers: Those that could be pruned, with what is left dense and why.
        flops: Of the model on one example; None where that could not be counted.
        plan: Of its events; None where there are none to come.
        settings: Of the callback and the pruner, as text.
        environment: Versions, machine, processes.
    """

    kind: ClassVar[str] = "run"
    version: ClassVar[int] = 1

    state: str
    started: str
    ended: str = ""
    epoch: int
    max_epochs: int
    schedule: Mapping[str, float]
    counted: str
    metric: str | None = None
    mode: str = "max"
    model: str
    weights: int
    layers: tuple[LayerRecord, ...] = ()
    flops: int | None = None
    plan: PlanRecord | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CycleRecord(Record):
    """The model before the first event, at the end or at the best epoch of a cycle: a line of ``cycles.jsonl`` and of the table.

    Attributes:
        goal: Sparsity, or share of what else goals count, that was asked for; 0 for the model before the first event.
        epochs: Trained when the weights were so; an event at the start of epoch 3 finds 3 of them.
        value: Of the monitored metric, None if it is not known.
        sparsity: Measured: zeros over all weights of the targets.
        best: Whether this is the best epoch of the cycle instead of its end.
        checkpoint: Path of the Lightning checkpoint, empty if none was written.
        weights: Path of the ``.safetensors`` file, empty if none was written.
        saving: What is saved of what goals count; None where that is zeros.
    """

    kind: ClassVar[str] = "cycle"
    version: ClassVar[int] = 3

    goal: float
    epochs: int
    value: float | None
    sparsity: float
    best: bool = False
    checkpoint: str = ""
    weights: str = ""
    saving: Saving | None = None


@dataclass(frozen=True, kw_only=True)
class FinetunedRecord(Record):
    """A checkpoint of a sweep after fine-tuning: a line of ``finetuned.jsonl``.

    Attributes:
        goal: Of the cycle that ended with the checkpoint.
        sparsity: Measured, of all targets, after fine-tuning: the same as before.
        flops_saved: Share of the model's FLOPs that its zeros save; None where that could not be counted.
        metric: That ``before`` and ``after`` are of.
        before: Its value of the checkpoint.
        after: Its value after fine-tuning.
        epochs: That it was fine-tuned for.
        source: Path of the checkpoint that was fine-tuned.
        checkpoint: Path of that after fine-tuning.
        weights: Path of its ``.safetensors`` file.
    """

    kind: ClassVar[str] = "finetuned"
    version: ClassVar[int] = 1

    goal: float
    sparsity: float
    flops_saved: float | None
    metric: str
    before: float | None
    after: float | None
    epochs: int
    source: str
    checkpoint: str = ""
    weights: str = ""
