"""Plain weights of a model that is shared out over processes: a file of safetensors, written one tensor after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightning_cap.errors import UnsupportedError
from lightning_cap.utilities.arguments import require_instance, require_path
from lightning_cap.utilities.distributed import rank
from lightning_cap.utilities.files import atomic
from lightning_cap.utilities.sharded import check_sharding, whole

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_sharded(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of which some are sharded. Every process must call it; rank 0 writes, and has one whole tensor at a time.

    Args:
        path: The ``.safetensors`` file.
        state: Tensors by name, sharded ones with the parts of all processes.
        metadata: Strings for the file's header.

    Raises:
        ConfigError: ``path`` is no path, or ``state`` or ``metadata`` something else.
        UnsupportedError: A tensor is of a type that the format does not know, or sharded otherwise than by rows over all processes.
        OSError: The system refuses, as on a full disk; it names the file.
    """
    require_path("path", path, "model.safetensors")
    require_instance("state", state, Mapping, "model.state_dict()")
    require_instance("metadata", metadata, Mapping, '{"sparsity": "0.5"}')
    for name, tensor in state.items():
        check_sharding(name, tensor)
    names = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))
    header = _header({name: state[name] for name in names}, metadata)
    with _written(Path(path)) as file:
        if file is not None:
            file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            tensor = whole(state[name].detach())
            if file is not None:
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            del tensor


def _header(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a file of safetensors, a whole number of eight bytes."""
    held: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end = 0
    for name, tensor in state.items():
        if tensor.dtype not in _TYPES:
            raise UnsupportedError(
                f"state: {name!r} is of type {tensor.dtype}, which safetensors does not know. Leave it out."
            )
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        held[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(held, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO | None]:
    """The file on rank 0, which is there when all is written; None elsewhere."""
    if rank() != 0:
        yield None
        return
    with atomic(path) as temporary, temporary.open("wb") as file:
        yield file
