"""2:4 weights for NVIDIA's sparse tensor cores, by core torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from lightning_cap.errors import ConfigError, ExportError
from lightning_cap.export.batches import Inputs, moved
from lightning_cap.export.compressed import Compressed
from lightning_cap.export.compressed_files import read_header
from lightning_cap.export.exporter import Runner, torch_runner
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.utilities.arguments import require_choice, require_instance, require_path, shown

_HEADER = "lightning_cap.semi_structured"  # names of the weights that are to run on sparse tensor cores
_AMPERE = (8, 0)
_PRUNED = 0.1  # share of zeros from which a layer is meant to be sparse
_ROWS, _COLUMNS = 32, 64  # of which sizes are multiples, for torch's kernels in 16 bits


class SemiStructured(Compressed):
    """``.semi_structured.safetensors``: 16 bits, the Linear layers in 2:4 ready for `torch.sparse.to_sparse_semi_structured`.

    The file is small and of no GPU in particular: weights are stored as by `Compressed`, and `load_semi_structured` puts them
    into a model in the layout of the GPU at hand. Convolutions and layers without zeros stay dense.

    Args:
        tolerance: See `Exporter`; of 16 bits a larger one is due. Compared is the dense model in the same type.
        dtype: Of weights, inputs and outputs.
    """

    format = "semi_structured"
    suffix = ".semi_structured.safetensors"
    skips_zeros = True

    def __init__(self, tolerance: float = 1e-2, dtype: Literal["float16", "bfloat16"] = "float16") -> None:
        super().__init__(tolerance)
        require_choice("dtype", dtype, ("float16", "bfloat16"))
        self.dtype = dtype

    def require_packages(self) -> None:
        """Refuse to go on without a GPU that has sparse tensor cores.

        Raises:
            ConfigError: There is none.
        """
        if not torch.cuda.is_available():
            raise ConfigError(
                "to='semi_structured' needs a CUDA device, an NVIDIA GPU from Ampere on; there is none here."
            )
        if torch.cuda.get_device_capability() < _AMPERE:
            raise ConfigError(
                f"to='semi_structured' needs an NVIDIA GPU from Ampere on; here is {torch.cuda.get_device_name()!r}."
            )

    def prepare(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """Both in 16 bits, on the GPU."""
        dtype = getattr(torch, self.dtype)
        return model.to("cuda", dtype), moved(inputs, "cuda", dtype)

    def dense_runner(self, model: nn.Module, folder: Path, inputs: Inputs, threads: int | None = None) -> Runner:
        """The dense model on the GPU, in the same type."""
        return _on_gpu(self.prepare(copy.deepcopy(model).eval(), inputs)[0])

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Write the compressed weights, and the names of those in 2:4."""
        super().write(model, path, inputs, {**metadata, _HEADER: json.dumps(sparse_layers(model))})

    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """A copy of the model with these weights on the GPU, through `load_semi_structured`."""
        require_instance("model", model, nn.Module, "the model that was exported")
        own = load_semi_structured(copy.deepcopy(cast(nn.Module, model)).eval(), path)
        return _on_gpu(own)


def load_semi_structured(model: nn.Module, path: Path | str) -> nn.Module:
    """Put a file of ``lightning-cap export --to semi_structured`` into a model, on the GPU.

    Args:
        model: Of the architecture that was exported, of a shrunk one what `load(path)` gives; changed in place.
        path: The ``.semi_structured.safetensors`` file.

    Returns:
        The model, in 16 bits on the GPU, its 2:4 layers as `torch.sparse.SparseSemiStructuredTensor`: for inference alone.

    Raises:
        ConfigError: An argument is something else, or there is no GPU from Ampere on.
        DataError: The file cannot be read, or is none of these.
    """
    require_instance("model", model, nn.Module, "timm.create_model(...)")
    require_path("path", path, "model.semi_structured.safetensors")
    exporter = SemiStructured()
    exporter.require_packages()
    names = json.loads(read_header(path, _HEADER))
    state = exporter.stored(path)
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    model.to("cuda", dtype).load_state_dict(state)
    for name in names:
        layer = cast(nn.Linear, model.get_submodule(name.removesuffix(".weight")))
        sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _on_gpu(model: nn.Module) -> Runner:
    """A model there, as a function of inputs from elsewhere."""
    dtype = next(model.parameters()).dtype

    run = torch_runner(model)
    return lambda inputs: moved(run(moved(inputs, "cuda", dtype)), "cpu", torch.float32)


def sparse_layers(model: nn.Module) -> list[str]:
    """Names of the weights of Linear layers that are in 2:4, and of a size that torch's kernels take.

    Raises:
        ExportError: A pruned Linear layer is not in 2:4, or none can be used.
    """
    names, sizes = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        kept = layer.weight.detach() != 0
        if 1 - float(kept.double().mean()) < _PRUNED:
            continue
        broken = NofM(2, 4).count_violations(kept, tuple(kept.shape)) if kept.shape[1] % 4 == 0 else len(kept)
        if broken:
            raise ExportError(
                f"to='semi_structured': {f'{name}.weight'!r} is not in 2:4: {broken} groups of four weights keep more than two. "
                "Prune it with pattern=NofM(2, 4)."
            )
        if kept.shape[0] % _ROWS or kept.shape[1] % _COLUMNS:
            sizes.append(f"{name}.weight {tuple(kept.shape)}")
        else:
            names.append(f"{name}.weight")
    if not names:
        told = f"the sizes of {shown(sizes)} are no multiples of ({_ROWS}, {_COLUMNS})" if sizes else "none has zeros"
        raise ExportError(
            f"to='semi_structured': no Linear layer can run in 2:4: {told}. Prune with pattern=NofM(2, 4)."
        )
    return names
