"""Plain files of a pruned model: written, read back and compared with torch."""

from __future__ import annotations

from lightning_cap.export.compressed import Compressed
from lightning_cap.export.compressed_files import load_compressed
from lightning_cap.export.coreml import CoreML
from lightning_cap.export.exporter import Exporter, Runner
from lightning_cap.export.onnx import ONNX
from lightning_cap.export.openvino import OpenVINO
from lightning_cap.export.plain_weights import Safetensors
from lightning_cap.export.pt2 import PT2
from lightning_cap.export.quantized import QDQ, TorchAO
from lightning_cap.export.records import ExportRecord
from lightning_cap.export.semi_structured import SemiStructured, load_semi_structured
from lightning_cap.export.shrunk import shrink
from lightning_cap.export.shrunk_files import load, save_shrunk

__all__ = [
    "ONNX",
    "PT2",
    "QDQ",
    "Compressed",
    "CoreML",
    "ExportRecord",
    "Exporter",
    "OpenVINO",
    "Runner",
    "Safetensors",
    "SemiStructured",
    "TorchAO",
    "load",
    "load_compressed",
    "load_semi_structured",
    "save_shrunk",
    "shrink",
]
