"""The one checker of arguments: each wrong value is one error that names the argument, the value and what to give instead."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from os import PathLike
from typing import Any

from lightning_cap.errors import CAPError, ConfigError

_LONGEST = 120  # characters of a value in a message


def shown(value: object) -> str:
    """``value`` for a message: its ``repr`` in one short line; of a class, its name."""
    if isinstance(value, type):
        return value.__name__
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _LONGEST
    return " ".join(short.repr(value).split())


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number; neither True nor 32.0 is one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether ``value`` is a finite real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(-math.inf < value < math.inf)  # type: ignore[operator]


def require_whole(
    name: str,
    value: object,
    at_least: int = 1,
    at_most: int | None = None,
    example: object = None,
    error: type[ConfigError] = ConfigError,
) -> None:
    """Refuse what is no whole number in a range. ``True`` and ``32.0`` are none.

    Args:
        name: Of the argument.
        value: Of the argument.
        at_least: Smallest that is taken.
        at_most: Largest that is taken, None for no limit.
        example: A value that works, for the message.
        error: What to raise.

    Raises:
        ConfigError: Or ``error``.
    """
    if is_whole(value) and at_least <= value and (at_most is None or value <= at_most):  # type: ignore[operator]
        return
    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    raise error(f"{name}={shown(value)}: give a whole number {bounds}{_such_as(example)}.")


def require_counts(**values: object) -> None:
    """Refuse numbers that are not whole and positive, each by the name of its argument.

    Raises:
        ConfigError: One is not; it is named.
    """
    for name, value in values.items():
        require_whole(name, value)


def require_real(
    name: str, value: object, interval: str, example: object = None, error: type[ConfigError] = ConfigError
) -> None:
    """Refuse what is no finite real number in an interval.

    Args:
        name: Of the argument.
        value: Of the argument.
        interval: Such as ``"[0, 1)"`` or ``"(0, inf)"``.
        example: A value that works, for the message.
        error: What to raise.

    Raises:
        ConfigError: Or ``error``.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    if is_real(value):
        above = low <= value if interval[0] == "[" else low < value  # type: ignore[operator]
        below = value <= high if interval[-1] == "]" else value < high  # type: ignore[operator]
        if above and below:
            return
    raise error(f"{name}={shown(value)}: give a number {_in_words(interval)}{_such_as(example)}.")


def _in_words(interval: str) -> str:
    low, high = (end.strip() for end in interval[1:-1].split(","))
    if high == "inf":
        return f"of at least {low}" if interval[0] == "[" else f"above {low}"
    return f"in {interval}"


def require_choice(name: str, value: object, choices: Sequence[str], error: type[ConfigError] = ConfigError) -> None:
    """Refuse a value that is none of some strings.

    Raises:
        ConfigError: It is not (or ``error``); the choices are listed.
    """
    if not isinstance(value, str) or value not in choices:
        listed = [", ".join(repr(choice) for choice in choices[:-1]), repr(choices[-1])]
        raise error(f"{name}={shown(value)}: choose {' or '.join(filter(None, listed))}.")


def require_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: give True or False.")


def require_text(name: str, value: object, example: str, optional: bool = False) -> None:
    """Refuse what is no string with something in it.

    Raises:
        ConfigError: It is empty or no string.
    """
    if (optional and value is None) or (isinstance(value, str) and value.strip()):
        return
    raise ConfigError(f"{name}={shown(value)}: give a string{_such_as(example)}{', or None' if optional else ''}.")


def require_path(name: str, value: object, example: str, optional: bool = False) -> None:
    """Refuse what is neither a string with something in it nor a path.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, PathLike):
        require_text(name, value, example, optional)


def require_instance(
    name: str,
    value: object,
    kind: type[Any] | tuple[type[Any], ...],
    example: str,
    optional: bool = False,
    error: type[ConfigError] = ConfigError,
) -> None:
    """Refuse an object of another class; a class in place of its instance is told from it.

    Args:
        name: Of the argument.
        value: Of the argument.
        kind: What it is to be an instance of.
        example: An expression that works, such as ``"CAP()"``.
        optional: Whether None is taken.
        error: What to raise.

    Raises:
        ConfigError: Or ``error``.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, kinds) or (optional and value is None):
        return
    wanted = " or ".join(k.__name__ for k in kinds)
    if isinstance(value, type) and issubclass(value, kinds):
        raise error(f"{name}={value.__name__}: this is a class. Give an instance of it, {value.__name__}(...).")
    raise error(f"{name}={shown(value)}: give {_a(wanted)}{_such_as(example, quote=False)}.")


def require_names(
    name: str, value: object, example: str = "*.attn.qkv.weight", error: type[ConfigError] = ConfigError
) -> None:
    """Refuse what is neither None nor a list of strings. A single string is a mistake: it would be taken letter by letter.

    Raises:
        ConfigError: It is something else, or empty (or ``error``).
    """
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise error(f"{name}={shown(value)}: give a list of names or globs, such as {name}=[{example!r}], or None.")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise error(
                f"{name}={shown(value)}: {shown(entry)} is no name. Give a list of names or globs, such as {name}=[{example!r}]."
            )


def require_list(name: str, value: object, example: str, error: type[ConfigError] = ConfigError) -> None:
    """Refuse what is no list, tuple or array. A single string or number is a mistake, not a list of one.

    Raises:
        ConfigError: It is something else (or ``error``). What is in it is not looked at.
    """
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping, Set)) or _is_scalar(value):
        raise error(f"{name}={shown(value)}: give a list, such as {example}.")


def require_iterable(name: str, value: object, example: str, error: type[CAPError] = ConfigError) -> None:
    """Refuse what cannot be gone through entry by entry, and a single string, mapping or tensor, which would be taken apart.

    Raises:
        ConfigError: It is something else (or ``error``).
    """
    if isinstance(value, (str, bytes, Mapping)) or hasattr(value, "untyped_storage") or isinstance(value, type):
        raise error(f"{name}={shown(value)}: give several in a list or another iterable, such as {example}.")
    if (not isinstance(value, Iterable) and not hasattr(value, "__getitem__")) or _is_scalar(value):
        raise error(f"{name}={shown(value)}: give a list or another iterable, such as {example}.")


def require_callable(
    name: str, value: object, example: str, optional: bool = False, num_arguments: int | None = None
) -> None:
    """Refuse what is no function, or not one of so many arguments.

    Raises:
        ConfigError: It is something else; where ``num_arguments`` is given, also for a class.
    """
    if optional and value is None:
        return
    if not callable(value) or not _takes(value, num_arguments):
        of = "" if num_arguments is None else f" of {num_arguments} arguments"
        raise ConfigError(f"{name}={shown(value)}: give a function{of}{_such_as(example, quote=False)}.")


def _takes(function: Callable[..., Any], num_arguments: int | None) -> bool:
    """Whether so many arguments can be given by position; yes where that cannot be known."""
    if num_arguments is None:
        return True
    if isinstance(function, type):
        return False
    try:
        signature = inspect.signature(getattr(function, "forward", function))  # of a module: of its own
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(num_arguments))
    except TypeError:
        return False
    return True


def _is_scalar(value: object) -> bool:
    """Whether it is an array or a tensor of a single number, which only looks like a list."""
    return getattr(value, "ndim", 1) == 0


def _such_as(example: object, quote: bool = True) -> str:
    if example is None:
        return ""
    return f", such as {example!r}" if quote else f", such as {example}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"
