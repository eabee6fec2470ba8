"""OpenVINO's intermediate representation, its weights stored sparse."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.export.batches import Inputs, by_name, one_or_list
from lightning_cap.export.exporter import Exporter, Runner
from lightning_cap.export.tracing import dynamic_batch
from lightning_cap.utilities.arguments import require_path, require_whole

_XML = "openvino_model.xml"
_CHUNK = 1 << 16  # values whose place in a chunk two bytes tell


class OpenVINO(Exporter):
    """A folder ``.openvino`` with ``openvino_model.xml`` and ``.bin``, float32 and with a dynamic batch. Verified on the CPU.

    A weight of which a third or more is zero is stored as its non-zero values and their places; OpenVINO puts it together when
    it compiles the model, so that it runs as fast as from a dense file.
    """

    format = "openvino"
    suffix = ".openvino"
    packages = ("openvino",)
    extra = "openvino"
    is_folder = True

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Convert the program of `torch.export`."""
        import openvino

        program = dynamic_batch(model, inputs)
        converted = openvino.convert_model(program.traced)
        tensors = [isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs)]
        for parameter, is_tensor in zip(converted.get_parameters(), tensors, strict=True):
            if not is_tensor:
                converted.remove_parameter(parameter)
        for values, names in ((converted.inputs, program.inputs), (converted.outputs, program.outputs)):
            for value, name in zip(values, names, strict=True):
                value.get_tensor().set_names({name})
        for operation in converted.get_ops():
            if operation.get_type_name() == "Constant":
                _store_sparse(operation)
        for name, value in metadata.items():
            converted.set_rt_info(value, ["lightning_cap", name])
        path.mkdir()
        openvino.save_model(converted, path / _XML, compress_to_fp16=False)

    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """The model compiled for the CPU, at full precision: by default OpenVINO computes in bfloat16 where that is faster."""
        require_path("path", path, "model.openvino")
        self.require_packages()
        import openvino

        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            require_whole("threads", threads)
            settings["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(str(Path(path) / _XML), "CPU", settings)
        names = [value.any_name for value in compiled.inputs]

        def run(inputs: Inputs) -> Any:
            made = compiled({name: tensor.numpy() for name, tensor in by_name(inputs, names).items()})
            return one_or_list([torch.from_numpy(made[place].copy()) for place in range(len(compiled.outputs))])

        return run

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The constants, those that are stored sparse put together."""
        require_path("path", path, "model.openvino")
        self.require_packages()
        import openvino
        from openvino.passes import ConstantFolding, Manager

        read = openvino.Core().read_model(str(Path(path) / _XML))
        manager = Manager()
        manager.register_pass(ConstantFolding())
        manager.run_passes(read)
        constants = [operation for operation in read.get_ops() if operation.get_type_name() == "Constant"]
        return {
            constant.get_friendly_name(): torch.from_numpy(constant.data.astype(np.float32)) for constant in constants
        }


def _store_sparse(constant: Any) -> None:
    """Put, where that is smaller, in place of a constant an expression of it that is folded when the model is compiled."""
    from openvino import opset8 as ops

    values = constant.data
    if values.dtype != np.float32:
        return
    flat = values.ravel()
    places = np.flatnonzero(flat)
    num_chunks = -(-flat.size // _CHUNK)
    if places.size == 0 or 6 * places.size + 64 * num_chunks >= 4 * flat.size:
        return
    bounds = np.searchsorted(places, _CHUNK * np.arange(num_chunks + 1))
    parts = [
        ops.add(
            ops.convert(ops.constant((places[start:end] - number * _CHUNK).astype(np.uint16)), "i32"),
            ops.constant(np.int32(number * _CHUNK)),
        )
        for number, (start, end) in enumerate(pairwise(bounds))
        if end > start
    ]
    indices = ops.concat(parts, 0) if len(parts) > 1 else parts[0]
    zeros = ops.broadcast(ops.constant(np.float32(0)), ops.constant(np.array([flat.size], dtype=np.int64)))
    filled = ops.scatter_update(zeros, indices, ops.constant(flat[places]), ops.constant(np.int64(0)))
    shaped = ops.reshape(filled, ops.constant(np.array(values.shape, dtype=np.int64)), False)
    shaped.set_friendly_name(constant.get_friendly_name())
    for target in constant.output(0).get_target_inputs():
        target.replace_source_output(shaped.output(0))
