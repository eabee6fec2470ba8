"""The exporter of plain weights; of a smaller model, with the units that were kept beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_cap.errors import DataError
from lightning_cap.export.batches import Inputs
from lightning_cap.export.exporter import WeightsExporter
from lightning_cap.export.safetensors import save_plain_weights
from lightning_cap.export.shrunk_files import write_weights
from lightning_cap.utilities.arguments import require_path, shown


class Safetensors(WeightsExporter):
    """``.safetensors`` with the model's weights under its own names, which anyone can load without this package.

    Of a model that `shrink` has made, a ``.json`` of the kept units is beside it, and `lightning_cap.export.load` makes the model.
    """

    format = "safetensors"
    suffix = ".safetensors"
    beside = ".json"

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Write the state dict."""
        write_weights(model, path, metadata, save_plain_weights)

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The state dict."""
        require_path("path", path, "model.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"path={shown(str(path))}: it cannot be read ({error}).") from error
