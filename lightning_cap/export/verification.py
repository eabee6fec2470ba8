"""Whether a file that was written does what the model does: its outputs, and the zeros of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_cap.errors import ExportError

_CLOSE = 2e-3  # of the largest value: the same weight, perhaps stored in 16 bits


def check_outputs(name: str, outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    """Compare outputs of a file with those of torch.

    Args:
        name: Of the format, to be named.
        outputs: Of the file, each ``(n, ...)``.
        expected: Of torch.
        tolerance: Largest difference, as a share of the largest value of each output.

    Returns:
        The largest difference, as such a share.

    Raises:
        ExportError: It is more, or a shape is another.
    """
    if len(outputs) != len(expected):
        raise ExportError(
            f"to={name!r}: the file gives {len(outputs)} outputs, and torch {len(expected)}. It was removed."
        )
    return max(_difference(name, *pair, tolerance) for pair in zip(outputs, expected, strict=True))


def _difference(name: str, outputs: Tensor, expected: Tensor, tolerance: float) -> float:
    if outputs.shape != expected.shape:
        raise ExportError(
            f"to={name!r}: the file gives outputs of shape {tuple(outputs.shape)} for {len(expected)} inputs, and torch "
            f"{tuple(expected.shape)}. It was removed."
        )
    difference = largest_difference(outputs, expected)
    if not difference <= tolerance:  # nor NaN
        raise ExportError(
            f"to={name!r}: outputs of the file differ from torch's by {difference:.1e} of the largest output, more than "
            f"tolerance={tolerance:.3g}. The file was removed."
        )
    return difference


def largest_difference(outputs: Tensor, expected: Tensor) -> float:
    """Between two tensors of a shape, as a share of the largest value of the second."""
    if not expected.numel():
        return 0.0
    found, wanted = (tensor.detach().cpu().double() for tensor in (outputs, expected))
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def check_zeros(name: str, model: nn.Module, stored: Mapping[str, Tensor]) -> tuple[int, int]:
    """Compare the zeros of a model's weights with those in a file.

    A weight is looked up by its name; where a format renames, by its values or by which of them are zero, as it is or transposed.
    A scale that was folded into it does not matter. One of which nothing like it is stored counts as not read back: a format may
    store what it has computed from the weight.

    Args:
        name: Of the format, to be named.
        model: What was written.
        stored: What was read back.

    Returns:
        How many weights have zeros, and in how many of them all zeros are zero in the file.

    Raises:
        ExportError: The file holds the values of a weight, but not its zeros.
    """
    pruned = {key: value for key, value in _weights(model).items() if (value == 0).any() and (value != 0).any()}
    by_size: dict[int, list[Tensor]] = {}
    for value in stored.values():
        by_size.setdefault(value.numel(), []).append(value)
    found = 0
    for key, weight in pruned.items():
        named = stored.get(key)
        if named is not None and named.shape == weight.shape:
            verdicts = [_holds_zeros(named, weight, named=True)]
        else:
            views = (weight, weight.transpose(0, 1))
            verdicts = [_holds_zeros(value, view) for value in by_size.get(weight.numel(), []) for view in views]
        if False in verdicts and True not in verdicts:
            raise ExportError(f"to={name!r}: zeros of {key!r} are not zero in the file. The file was removed.")
        found += True in verdicts
    return len(pruned), found


def _holds_zeros(value: Tensor, weight: Tensor, named: bool = False) -> bool | None:
    """Whether all zeros of a weight are zero in an array; None where it is of something else."""
    flat = value.flatten().to("cpu", torch.float32)
    weight = weight.detach().flatten().to("cpu", torch.float32)
    zeros = weight == 0
    close = bool((flat - weight).abs().max() <= _CLOSE * weight.abs().max())
    holds = bool((flat[zeros] == 0).all())
    if holds and (named or close or bool((flat[~zeros] != 0).all())):
        return True
    return False if close else None


def share_of_zeros(model: nn.Module) -> float:
    """Share of zeros in all weights with two dimensions or more."""
    weights = _weights(model).values()
    total = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / total if total else 0.0


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters with two dimensions or more, which pruning makes zero."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2}
