"""Checks of arguments that many constructors share."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_cap.errors import ConfigError


def require_counts(**values: int) -> None:
    """Refuse numbers that are not whole and positive.

    Args:
        values: Each by the name of its argument.

    Raises:
        ConfigError: One is not; it is named.
    """
    for name, value in values.items():
        if value < 1 or value != int(value):
            raise ConfigError(f"{name}={value}: give a whole number of at least 1.")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of some strings.

    Raises:
        ConfigError: It is not; the choices are listed.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices[:-1])
        raise ConfigError(f"{name}={value!r}: choose {listed} or {choices[-1]!r}.")
