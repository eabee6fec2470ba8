"""The ``lightning-cap`` command."""

from __future__ import annotations

from lightning_cap.cli.command import CAPCLI, CAPTrainer, main

__all__ = ["CAPCLI", "CAPTrainer", "main"]
