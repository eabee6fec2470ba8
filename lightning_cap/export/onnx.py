"""ONNX, by torch's dynamo exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_cap.export.batches import Inputs, by_name, one_or_list
from lightning_cap.export.exporter import Exporter, Runner
from lightning_cap.export.tracing import dynamic_batch
from lightning_cap.utilities.arguments import require_path, require_whole


class ONNX(Exporter):
    """``.onnx`` with its weights in the same file, and a dynamic batch. Verified in onnxruntime on the CPU.

    Its inputs are named as the arguments of the forward method, and its outputs as the keys of what that returns, else ``output_0``
    and so on. Where the model takes one tensor, that is ``input``; where it gives one, that is ``output``.
    """

    format = "onnx"
    suffix = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Trace the model by `torch.export` and translate the program."""
        traced, given, made = dynamic_batch(model, inputs)
        program = torch.onnx.export(traced, dynamo=True, input_names=given, output_names=made, verbose=False)
        assert program is not None
        ends = {id(value) for value in program.model.graph.outputs}
        for node in program.model.graph:
            node.metadata_props.clear()  # places in the code of this machine
            for value in node.outputs:
                if id(value) not in ends and value.name in (*given, *made):
                    value.name = f"{value.name}_inside"  # names are there once
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
        names = [value.name for value in session.get_inputs()]

        def run(inputs: Inputs) -> Any:
            given = {name: tensor.numpy() for name, tensor in by_name(inputs, names).items()}
            return one_or_list([torch.from_numpy(value) for value in session.run(None, given)])

        return run

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The initializers."""
        require_path("path", path, "model.onnx")
        self.require_packages()
        import onnx

        graph = onnx.load(str(path)).graph
        return {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
