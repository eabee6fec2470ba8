"""Packages that not every installation has."""

from __future__ import annotations

import importlib.util

from lightning_cap.errors import CAPError, ConfigError


def require_package(package: str, what: str, extra: str | None = None, error: type[CAPError] = ConfigError) -> None:
    """Refuse to go on without a package; it is not imported.

    Args:
        package: Its module's name.
        what: Needs it, as the user names it.
        extra: Of lightning-cap, that installs it. Default: it is installed by its own name.
        error: What is raised.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec(package) is None:
        install = package if extra is None else f"'lightning-cap[{extra}]'"
        raise error(f"{what} needs the package {package}, not installed here: pip install {install}.")
