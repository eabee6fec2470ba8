"""Core ML's package, its weights stored sparse."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cap.errors import ExportError
from lightning_cap.export.batches import Inputs
from lightning_cap.export.exporter import Exporter, Runner
from lightning_cap.export.tracing import dynamic_batch
from lightning_cap.utilities.arguments import require_choice, require_path
from lightning_cap.utilities.bits import unpack_bits

_LARGEST_BATCH = 128
_SHAPE, _PARTS = re.compile(r"_sparsified_shape_(\d+)$"), ("shape", "mask", "nonzero_data")  # coremltools' own names
_NEVER_ZERO = 1e-12  # what is nearer to 0 is stored as 0


class CoreML(Exporter):
    """A package ``.mlpackage`` for iOS 16, macOS 13 and later, with a batch of 1 to 128.

    Weights of which a tenth or more is zero are stored as a bit mask and their non-zero values. Core ML runs on macOS alone:
    elsewhere the stored weights are compared, and nothing is run.

    Args:
        tolerance: See `Exporter`; of 16 bits a larger one is due.
        precision: Of what is stored and computed; the neural engine computes in float16 alone.
    """

    format = "coreml"
    suffix = ".mlpackage"
    packages = ("coremltools",)
    extra = "coreml"
    is_folder = True

    def __init__(self, tolerance: float = 1e-2, precision: Literal["float16", "float32"] = "float16") -> None:
        super().__init__(tolerance)
        require_choice("precision", precision, ("float16", "float32"))
        self.precision = precision

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Convert the program of `torch.export`, then prune what is zero in it."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not isinstance(model(inputs), Tensor):
            raise ExportError(
                "to='coreml': only a model from one float tensor to one tensor is written. Choose onnx, openvino, pt2, or a format "
                "of weights, such as safetensors."
            )
        program = dynamic_batch(model, inputs, _LARGEST_BATCH).traced.run_decompositions({})
        with _quiet() as tools:
            converted = tools.convert(
                program,
                minimum_deployment_target=tools.target.iOS16,
                compute_precision=getattr(tools.precision, self.precision.upper()),
                skip_model_load=True,
            )
            optimize: Any = tools.optimize.coreml
            pruning = optimize.OpThresholdPrunerConfig(
                threshold=_NEVER_ZERO, minimum_sparsity_percentile=0.1, weight_threshold=512
            )
            sparse = optimize.prune_weights(converted, optimize.OptimizationConfig(global_config=pruning))
            sparse.user_defined_metadata.update(metadata)
            sparse.save(str(path))

    def runs_here(self) -> bool:
        """Whether this is macOS."""
        return sys.platform == "darwin"

    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """Predictions of Core ML, on any of its devices; ``threads`` is Core ML's own choice."""
        require_path("path", path, "model.mlpackage")
        self.require_packages()
        if not self.runs_here():
            raise ExportError("to='coreml': Core ML runs on macOS alone. Run the file there.")
        with _quiet() as tools:
            loaded = tools.models.MLModel(str(path))
        description = loaded.get_spec().description
        given, made = description.input[0].name, description.output[0].name
        return lambda inputs: torch.from_numpy(np.asarray(loaded.predict({given: inputs.numpy()})[made]))

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The weights, those that are stored sparse put together."""
        require_path("path", path, "model.mlpackage")
        self.require_packages()
        with _quiet() as tools:
            loaded = tools.models.MLModel(str(path), skip_model_load=True)
            held = tools.optimize.coreml.get_weights_metadata(loaded, weight_threshold=0)
        values = {name: np.asarray(entry.val) for name, entry in held.items()}
        for name in [name for name in values if _SHAPE.search(name)]:
            shape, bits, kept = (values.pop(_SHAPE.sub(rf"_sparsified_{part}_\1", name)) for part in _PARTS)
            mask = unpack_bits(torch.from_numpy(bits.astype(np.uint8)), int(shape.prod())).numpy()
            dense = np.zeros(mask.shape, kept.dtype)
            dense[mask] = kept
            values[_SHAPE.sub("", name)] = dense.reshape(shape)
        return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """The module coremltools, without its progress bars and its messages about versions that it has not tried."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            import coremltools
            import coremltools.optimize.coreml

            yield coremltools
    finally:
        logging.disable(before)
