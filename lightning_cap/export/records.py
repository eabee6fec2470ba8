"""The records of an export, one line of ``exports.jsonl``, and of its measured speed, one of ``benchmarks.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_cap.utilities.machine import Machine
from lightning_cap.utilities.records import Record

EXPORTS = "exports.jsonl"
BENCHMARKS = "benchmarks.jsonl"


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """A file that a pruned model was written to.

    Attributes:
        format: Of the file, such as ``"safetensors"``.
        path: Of the file, from the folder that has ``exports.jsonl``.
        goal: Sparsity that was asked for; None where it is not known.
        sparsity: Share of zeros that the targets have; where these are not known, of all weights with two dimensions or more.
        architecture: timm's name of the model, empty for others.
        bytes: Size of the file, or of all files of a folder.
        dense_bytes: Size of the weights of the model before it was shrunk, each value stored; None where it was not measured.
        shrunk: Whether the pruned units are gone from the model.
        inputs: How many inputs the file was run on, and compared with torch; 0 for none.
        difference: The largest, over all outputs, as a share of the largest output; None where the file was not run.
        tolerance: The largest difference that is taken; None where the file was not run.
        weights: How many weights have zeros.
        zeros_equal: In how many of these the stored zeros were read back, and are those of the model.
    """

    kind: ClassVar[str] = "export"
    version: ClassVar[int] = 2

    format: str
    path: str
    goal: float | None
    sparsity: float
    architecture: str
    bytes: int
    dense_bytes: int | None = None
    shrunk: bool = False
    inputs: int = 0
    difference: float | None = None
    tolerance: float | None = None
    weights: int = 0
    zeros_equal: int = 0


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord(Record):
    """What one model took at one batch size, beside the dense one.

    Attributes:
        model: Its name, such as that of its file.
        dense: Name of the model that it is compared with; its own for that one.
        batch_size: Samples in one call.
        milliseconds: Median of a call.
        speedup: How many times as fast as the dense one, median over pairs of calls that were taken next to each other.
        speedup_low: Lower quartile of those.
        speedup_high: Upper quartile.
        runs: Calls of each model that count.
        flops: On one sample, zeros counted as other numbers; null where that is not known.
        bytes: Size of the file, null for none.
        threads: Of torch on the CPU.
        device: Of the input.
        machine: What it was measured on.
        remark: Why there is no speed-up, or that the times vary too much to tell; empty where there is one.
    """

    kind: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 1

    model: str
    dense: str
    batch_size: int
    milliseconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    runs: int
    flops: int | None
    bytes: int | None
    threads: int
    device: str
    machine: Machine
    remark: str
