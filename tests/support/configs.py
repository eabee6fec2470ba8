"""Configuration files for tests: whole, with what they build on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_cap.cli.bases import config_files, read_settings


def whole(path: Path) -> dict[str, Any]:
    """The settings of a file and of those that it builds on, in one mapping; ``a+`` is appended to ``a``."""
    settings: dict[str, Any] = {}
    for file in config_files(path):
        _merge(settings, read_settings(file))
    return settings


def _merge(settings: dict[str, Any], later: dict[str, Any]) -> None:
    for name, value in later.items():
        if name.endswith("+"):
            settings[name[:-1]] = [*settings.get(name[:-1], []), *value]
        elif isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value
