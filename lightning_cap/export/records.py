"""The record of an export, one line of ``exports.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_cap.utilities.records import Record

EXPORTS = "exports.jsonl"


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
