"""Tells a user's mistake from a fault of the program."""

from __future__ import annotations

import traceback

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cap.errors import CAPError


def mistake_behind(error: BaseException | None) -> BaseException | None:
    """The exception behind ``error`` that tells of a user's mistake; jsonargparse may have wrapped it."""
    while error is not None and not isinstance(error, (CAPError, MisconfigurationException)):
        if isinstance(error, (ValueError, ModuleNotFoundError)) and _raised_by_lightning(error):
            return error
        error = error.__cause__
    return error


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself has raised it, as it does for settings of the Trainer that do not fit each other."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).startswith("lightning.")
