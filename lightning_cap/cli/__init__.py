"""The ``lightning-cap`` command."""

from __future__ import annotations

from lightning_cap.cli.command import main
from lightning_cap.cli.lightning_cli import CAPCLI, CAPTrainer

__all__ = ["CAPCLI", "CAPTrainer", "main"]
