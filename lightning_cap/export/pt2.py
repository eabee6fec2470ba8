"""`torch.export`'s own file: the graph and the weights, for torch's runtimes without the code of the model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_cap.export.batches import Inputs
from lightning_cap.export.exporter import Exporter, Runner, torch_runner
from lightning_cap.export.tracing import dynamic_batch
from lightning_cap.utilities.arguments import require_path


class PT2(Exporter):
    """``.pt2`` of ``torch.export.save``, with a dynamic batch. ``torch.export.load(path).module()`` runs it."""

    format = "pt2"
    suffix = ".pt2"

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Trace the model by `torch.export` and save the program."""
        program = dynamic_batch(model, inputs).traced
        held = io.BytesIO()  # torch's writer of files ends the process where the disk is full
        torch.export.save(program, held, extra_files=dict(metadata))
        path.write_bytes(held.getbuffer())

    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """The loaded program, run by torch."""
        require_path("path", path, "model.pt2")
        return torch_runner(torch.export.load(path).module())

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """Parameters and buffers of the program."""
        require_path("path", path, "model.pt2")
        return {n: v for n, v in torch.export.load(path).state_dict.items() if isinstance(v, Tensor)}
