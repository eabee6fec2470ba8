"""Ends long work early and cleanly where the process was told to end. Who watches for that says so; the work asks now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_told: ContextVar[Callable[[], str | None] | None] = ContextVar("told", default=None)


class StopRequested(Exception):  # noqa: N818 - nothing has gone wrong
    """Raised in the midst of work that is to be abandoned. Whoever watches catches it."""


@contextmanager
def watch(told: Callable[[], str | None]) -> Iterator[None]:
    """Let `poll` raise inside, as soon as ``told()`` says what the process was told to end by."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


def poll() -> None:
    """To be called in the midst of long work, where it may be abandoned.

    Raises:
        StopRequested: The process was told to end, and somebody watches for that.
    """
    told = _told.get()
    reason = None if told is None else told()
    if reason is not None:
        raise StopRequested(reason)
