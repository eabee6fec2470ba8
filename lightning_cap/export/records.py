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
        goal: Sparsity that was asked for.
        sparsity: Share of zeros that the targets have.
        architecture: timm's name of the model, empty for others.
        bytes: Size of the file.
    """

    kind: ClassVar[str] = "export"
    version: ClassVar[int] = 1

    format: str
    path: str
    goal: float
    sparsity: float
    architecture: str
    bytes: int
