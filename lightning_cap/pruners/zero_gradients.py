"""Gradients, or layer inputs, that are zero say nothing: all of them are refused, those of some targets are told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from lightning_cap.errors import GradientError

_REMEDY = {
    "gradients": "Check the loss: all labels may be ignored, or it is multiplied by 0 or detached from these weights.",
    "relevances": "Check the model, whose logits may be zero, and the calibration data.",
    "inputs": "Check the calibration data and what is done to it.",
}


def check_zeros(found: Mapping[str, bool], count: int, unit: str) -> None:
    """Refuse what would be pruned by magnitude alone, and be called something else.

    Args:
        found: Whether anything of a target is not zero, the same on every process.
        count: Samples, on all processes.
        unit: What they are: ``"gradients"``, ``"relevances"`` or ``"inputs"``.

    Raises:
        GradientError: Everything is zero.
    """
    zero = [name for name, any_found in found.items() if not any_found]
    if not zero:
        return
    if len(zero) == len(found):
        raise GradientError(
            f"{unit}: all {count} are zero, or too small to be squared, for all {len(found)} targets. {_REMEDY[unit]}"
        )
    warnings.warn(
        f"{unit}: all {count} are zero for {len(zero)} of {len(found)} targets, first {zero[0]!r}: these weights seem to matter to "
        "nothing and are pruned first. Exclude those that do matter.",
        stacklevel=3,
    )
