"""Weights with many zeros in little space: one bit for each value, and the values that are not zero."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_cap.errors import DataError
from lightning_cap.export.safetensors import check_plain_weights, save_plain_weights
from lightning_cap.utilities.arguments import require_path, shown
from lightning_cap.utilities.bits import pack_bits, unpack_bits

#: In the header: {name: shape} of what is stored by its bits.
COMPRESSED = "lightning_cap.compressed"

_BITS, _VALUES = ".bits", ".values"


def save_compressed(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what is smaller of each tensor: itself, or its bits and values.

    Args:
        path: The ``.compressed.safetensors`` file.
        state: Tensors by the model's own names.
        metadata: Strings for the file's header.

    Raises:
        ConfigError: ``path`` is a folder or no path, or ``state`` or ``metadata`` something else.
        OSError: The system refuses, as on a full disk; it names the file.
    """
    check_plain_weights(state, metadata)
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, value in state.items():
        kept = value != 0 if value.is_floating_point() and value.itemsize > 1 else None
        if kept is None or value.numel() / 8 + int(kept.sum()) * value.itemsize >= value.nbytes:
            stored[name] = value
            continue
        stored[name + _BITS] = pack_bits(kept.flatten())
        stored[name + _VALUES] = value[kept]
        shapes[name] = list(value.shape)
    save_plain_weights(path, stored, {**metadata, COMPRESSED: json.dumps(shapes, sort_keys=True)})


def load_compressed(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a file of ``lightning-cap export --to compressed``.

    Args:
        path: The ``.compressed.safetensors`` file.

    Returns:
        Dense tensors on the CPU by the model's own names, in the types that they had; every value as it was (a negative zero is
        zero).

    Raises:
        ConfigError: ``path`` is no path.
        DataError: The file cannot be read, or is none of these.
    """
    shapes = json.loads(read_header(path, COMPRESSED))
    try:
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {
            **{
                name: value
                for name, value in held.items()
                if name.removesuffix(_BITS).removesuffix(_VALUES) not in shapes
            },
            **{name: _dense(held[name + _BITS], held[name + _VALUES], shape) for name, shape in shapes.items()},
        }
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def read_header(path: Path | str, key: str) -> str:
    """An entry of the header of a file of safetensors.

    Raises:
        ConfigError: ``path`` is no path.
        DataError: The file cannot be read, or has no such entry.
    """
    require_path("path", path, "model.compressed.safetensors")
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if key not in header:
        raise DataError(
            f"path={shown(str(path))}: its header has no {key!r}. Give a file that lightning-cap has exported."
        )
    return header[key]


def _unreadable(path: Path | str, error: Exception) -> DataError:
    return DataError(f"path={shown(str(path))}: it cannot be read ({' '.join(str(error).split())}).")


def _dense(bits: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    kept = unpack_bits(bits, prod(shape)).reshape(shape)
    dense = torch.zeros(shape, dtype=values.dtype)
    if int(kept.sum()) != len(values):
        raise ValueError("it is damaged: other numbers of bits and of values")
    dense[kept] = values
    return dense
