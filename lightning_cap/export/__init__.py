"""Plain files of a pruned model: written, read back and compared with torch."""

from __future__ import annotations

from lightning_cap.export.compressed import Compressed, load_compressed
from lightning_cap.export.exporter import Exporter, Runner
from lightning_cap.export.onnx import ONNX
from lightning_cap.export.pt2 import PT2
from lightning_cap.export.records import ExportRecord
from lightning_cap.export.safetensors import Safetensors

__all__ = ["ONNX", "PT2", "Compressed", "ExportRecord", "Exporter", "Runner", "Safetensors", "load_compressed"]
