"""Tells whoever asks that a kernel is about to be compiled, which takes a moment; not when it is found already compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_asked: list[Callable[[], None]] = []


@contextmanager
def when_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` right before each kernel is compiled inside the body, on any thread."""
    _asked.append(tell)
    try:
        yield
    finally:
        _asked.remove(tell)


def about_to_compile() -> None:
    """To be called by what compiles."""
    for tell in tuple(_asked):
        tell()


@contextmanager
def telling(source: type[Any]) -> Iterator[None]:
    """Around the launch of a kernel of triton's, which looks into its cache and only then makes code of a ``source``.

    Args:
        source: `triton.compiler.ASTSource`; as it was, afterwards.
    """
    make_ir = source.make_ir

    def make_and_tell(*given: Any, **named: Any) -> Any:
        about_to_compile()
        return make_ir(*given, **named)

    source.make_ir = make_and_tell
    try:
        yield
    finally:
        source.make_ir = make_ir
