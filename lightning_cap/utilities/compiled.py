"""Names and modules inside what `torch.compile` wraps."""

from __future__ import annotations

from typing import Any

from torch import nn

#: What `torch.compile` puts before the names of a module that it wraps.
COMPILED_PREFIX = "_orig_mod."


def plain_name(name: str) -> str:
    """A parameter's name without the parts that `torch.compile` puts in."""
    return name.replace(COMPILED_PREFIX, "")


def plain_module(module: nn.Module) -> Any:
    """The module inside a compiled one; any other as it is."""
    return getattr(module, COMPILED_PREFIX.rstrip("."), module)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module go to a compiled program, by ``torch.compile`` or ``module.compile()``."""
    return any(getattr(module, mark, None) is not None for mark in ("_compiled_call_impl", "_orig_mod"))
