"""ONNX, by torch's dynamo exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_cap.export.exporter import Exporter, Runner, dynamic_batch
from lightning_cap.utilities.arguments import require_path, require_whole


class ONNX(Exporter):
    """``.onnx`` with its weights in the same file, and a dynamic batch. Verified in onnxruntime on the CPU."""

    format = "onnx"
    suffix = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        """Trace the model by `torch.export` and translate the program."""
        program = torch.onnx.export(
            dynamic_batch(model, inputs), dynamo=True, input_names=["input"], output_names=["output"], verbose=False
        )
        assert program is not None
        for node in program.model.graph:  # places in the code of this machine
            node.metadata_props.clear()
        program.model.metadata_props.update(metadata)
        program.save(path, external_data=False)

    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """A session of onnxruntime on the CPU."""
        require_path("path", path, "model.onnx")
        self.require_packages()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            require_whole("threads", threads)
            options.intra_op_num_threads = threads
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The initializers."""
        require_path("path", path, "model.onnx")
        self.require_packages()
        import onnx

        graph = onnx.load(str(path)).graph
        return {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
