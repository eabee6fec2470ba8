"""Which modules of a model take time that units change, and which of them take the same."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.errors import UnsupportedError
from lightning_cap.sparsity.shrinking import shrink_in_place
from lightning_cap.sparsity.units import Units

#: A forward pass of a model on the example.
Call = Callable[[nn.Module], Any]

_GRID = 2  # groups whose widths are timed in all combinations
_LINEAR = 4  # groups of a module whose own work is taken to grow evenly with each of them

_Shapes = tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """A module, as far as its time is taken alone.

    Attributes:
        module: Its path, empty for the model.
        groups: Places, among the units, of the groups that its time depends on.
        whole: Whether with all modules inside; else without those that are parts themselves.
        like: Equal for parts that take equally long, given as many units of each of their groups.
    """

    module: str
    groups: tuple[int, ...]
    whole: bool
    like: str

    @property
    def on_grid(self) -> bool:
        """Whether it is timed at all combinations of its groups' widths. If not, its time is taken to be linear in them."""
        return self.whole and len(self.groups) <= _GRID


def find_parts(model: nn.Module, units: Units, call: Call) -> list[Part]:
    """Divide a model into the largest modules whose time depends on one group, or on two together; others into what is in them.

    Each group is shrunk to half, alone: what it changes the shapes of depends on it. Of a module that is divided, what it computes
    itself is a part too, which depends on the groups of all in it, or where these are many, of its inputs and outputs.

    Args:
        model: In eval mode.
        units: Its units.
        call: A forward pass, with a batch of any size.

    Raises:
        UnsupportedError: A shrunk copy does not run.
    """
    return _Division(model, units, call).parts


def shrunk(model: nn.Module, units: Units, counts: dict[int, int]) -> nn.Module:
    """A copy with so many units of each group, the first ones; ``{place of the group: units}``, others have all."""
    smaller = copy.deepcopy(model)
    sizes = list(units.sizes.items())
    kept = {
        sizes[place][0]: torch.arange(sizes[place][1]) < count
        for place, count in counts.items()
        if count < sizes[place][1]
    }
    shrink_in_place(smaller, units, kept)
    return smaller


class _Division:
    def __init__(self, model: nn.Module, units: Units, call: Call) -> None:
        self._modules, self._sizes = dict(model.named_modules()), list(units.sizes.values())
        self._dense = _shapes(model, call)
        self._changed: list[dict[str, _Shapes]] = []  # by each group: modules -> their shapes then
        for place, (name, group) in enumerate(units.items()):
            try:
                now = self._dense if group.size == 1 else _shapes(shrunk(model, units, {place: group.size // 2}), call)
            except Exception as error:
                raise UnsupportedError(
                    f"units: with half the units of {name!r} the model does not run ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:200]}). Exclude this group."
                ) from error
            self._changed.append({path: shapes for path, shapes in now.items() if shapes != self._dense.get(path)})
        self.parts = list(self._divide(""))

    def _divide(self, path: str) -> Iterator[Part]:
        inside = self._called(path)
        groups = self._groups_of(inside)
        joined = any(len(self._groups_of([leaf])) == _GRID for leaf in inside if not self._children(leaf))
        whole = len(groups) < _GRID or (len(groups) == _GRID and joined) or not self._children(path)
        if path in self._dense:
            if len(groups) > _LINEAR:
                groups = self._groups_of([path], since=1)
            effects = sorted((self._effect(place, inside, path), place) for place in groups)
            shapes = [(other[len(path) :], self._dense[other]) for other in inside]
            roles = [(effect, self._sizes[place]) for effect, place in effects]
            like = repr((whole, str(self._modules[path]), shapes, roles))
            yield Part(
                path, tuple(place for _, place in effects), whole, hashlib.sha256(like.encode()).hexdigest()[:16]
            )
            if whole:
                return
        for child in self._children(path):
            yield from self._divide(child)

    def _called(self, path: str) -> list[str]:
        """Modules from this one on that the forward pass calls."""
        return [other for other in self._dense if other == path or other.startswith(f"{path}." if path else "")]

    def _children(self, path: str) -> list[str]:
        names = [f"{path}.{name}" if path else name for name, _ in self._modules[path].named_children()]
        return [name for name in names if name in self._modules and self._called(name)]  # others were met elsewhere

    def _groups_of(self, paths: list[str], since: int = 0) -> list[int]:
        """Those that change the shapes of some modules; ``since=1``: of their inputs or outputs."""
        return [
            place
            for place, changed in enumerate(self._changed)
            if any(path in changed and changed[path][since:] != self._dense[path][since:] for path in paths)
        ]

    def _effect(self, place: int, inside: list[str], path: str) -> str:
        """What half the group's units do to shapes in a module: tells the group's role there."""
        changed = self._changed[place]
        return repr([(other[len(path) :], changed[other]) for other in inside if other in changed])


def _shapes(model: nn.Module, call: Call) -> dict[str, _Shapes]:
    """Of each module that is called: the shapes of its parameters, then those of the inputs and outputs of each call."""
    seen: dict[str, list[Any]] = {}
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        own = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaves = pytree.tree_leaves((args, kwargs, output))
            seen.setdefault(path, [own]).append(tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)))

        handles.append(module.register_forward_hook(note, with_kwargs=True))

    for path, module in model.named_modules():
        watch(path, module)
    try:
        call(model)
    finally:
        for handle in handles:
            handle.remove()
    return {path: tuple(shapes) for path, shapes in seen.items()}
