"""One line for what jsonargparse tells in a tree of lines: where the mistake is, what it is, and what was meant."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from textwrap import dedent

_KEY = re.compile(r'Parser key "([^"]+)"(?: element (\d+))?:\s*?(?:\n|\s)')
_CLASS = re.compile(r"Problem with given class_path '([^']*)':\n")
_PATH = re.compile(r"- Expected a path but .* either not accessible or invalid\n- ")
_CALLABLE = re.compile(
    r"Type [^\n]*? expects a function or a callable class: (.*?)(?:\. Got value: Namespace.*)?\Z", re.DOTALL
)
_UNION = "Does not validate against any of the Union subtypes"
_BRANCHES = re.compile(r"^Errors:\n(.*)^Given value type: [^\n]*\nGiven value: ?(.*)\Z", re.DOTALL | re.MULTILINE)
_NESTED = re.compile(r"NestedArg\(key='[^']*', val=(.*)\)\Z", re.DOTALL)
_TYPE = re.compile(r"Expected (?:an? )?(.+?)(?:\. Got value: (.*))?\Z", re.DOTALL)
_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "Mapping": "a mapping such as {a: 1}",
    "dict": "a mapping such as {a: 1}",
    "list": "a list",
    "Iterable": "a list",
    "List": "a list",
}
_MODULES = ("lightning_cap", "lightning", "timm", "torch", "torchvision")


@dataclass(frozen=True)
class _Mistake:
    """A leaf of the tree, and the way to it."""

    told: str
    path: tuple[str, ...] = ()
    depth: int = 0  # names and classes on the way
    kinds: tuple[str, ...] = ()  # that were expected, where no more is told
    value: str | None = None
    hint: str = ""


def one_line(message: str) -> str:
    """What jsonargparse tells, in one line.

    Args:
        message: Of its error: lines, indented by what is tried in what.

    Returns:
        ``a.b.c: what is wrong``, of that which was tried and came furthest.
    """
    found = _mistake(message)
    told = found.told
    if found.kinds:
        value = "" if found.value is None else f", not {found.value or repr('')}"
        told = f"give {' or '.join(dict.fromkeys(found.kinds))}{value}{found.hint}"
    return " ".join(f"{'.'.join(found.path)}{': ' if found.path else ''}{told}".split())


def is_tree(message: str) -> bool:
    """Whether jsonargparse tells in a tree what it has tried."""
    return bool(message.startswith(_UNION) or _KEY.match(message) or _CLASS.match(message))


def near(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean 'x'?`` of the nearest name, if one is near."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]!r}?" if found else ""


def _mistake(text: str) -> _Mistake:
    text = _PATH.sub("", dedent(text).strip(), count=1)
    if key := _KEY.match(text):
        inner = _mistake(text[key.end() :])
        name = key[1] if key[2] is None else f"{key[1]}[{int(key[2]) - 1}]"
        return replace(inner, path=(name, *inner.path), depth=inner.depth + 1)
    if given := _CLASS.match(text):
        inner = _mistake(text[given.end() :])
        if inner.depth == 0 and "is not accepted" not in inner.told:
            return _Mistake(f"class_path {given[1]!r}: {inner.told}{_near_class(given[1])}", depth=1)
        return replace(inner, depth=inner.depth + 1)
    if made := _CALLABLE.match(text):
        return _mistake(made[1])
    if text.startswith(_UNION) and (union := _BRANCHES.search(text)):
        return _furthest([_mistake(branch) for branch in _items(union[1])], union[2])
    if (expected := _TYPE.match(text)) and ", but " not in expected[1]:
        return _expected(expected[1], expected[2])
    first = text.split("\nSubclass types expect one of:")[0]
    return _Mistake(first)


def _furthest(branches: list[_Mistake], value: str) -> _Mistake:
    """The branch that came furthest; where none came anywhere, what all of them expect."""
    best = max(branches, key=lambda branch: branch.depth)
    kinds = tuple(kind for branch in branches for kind in branch.kinds)
    if best.depth or not any(kind != "null" for kind in kinds):
        return best if best.depth else next((branch for branch in branches if branch.told), best)
    nested = _NESTED.search(value)
    hint = "".join(branch.hint for branch in branches)
    return replace(best, told="", kinds=kinds, value=nested[1] if nested else value, hint=hint)


def _items(listed: str) -> list[str]:
    """The entries of an indented list, each of one line or more."""
    entries = re.split(r"^- ", dedent(listed), flags=re.MULTILINE)[1:]
    split = [entry.partition("\n") for entry in entries]
    return [f"{first}\n{dedent(rest)}".strip() for first, _, rest in split]


def _expected(kind: str, value: str | None) -> _Mistake:
    if kind.startswith("dot import path string"):
        name = kind.partition(":")[2].strip() or value or ""
        return _Mistake("", kinds=("a class path",), value=name, hint=near(name, _known_classes()))
    short = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>|(?:typing|collections\.abc)\.", r"\1", kind)
    if short.startswith("Literal["):
        short = short.removeprefix("Literal[").removesuffix("]")
    return _Mistake("", kinds=(_NAMES.get(short.split("[")[0], short),), value=value)


def _known_classes() -> set[str]:
    """Names of classes that may be meant: of this package, Lightning's and torch's optimizers."""
    places = ("lightning_cap.", "lightning.pytorch.", "torch.optim.")
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith(places)]
    classes = [value for module in loaded for value in vars(module).values() if isinstance(value, type)]
    return {found.__name__ for found in classes if found.__module__.startswith(places) and found.__name__[0] != "_"}


def _near_class(path: str) -> str:
    """What may be meant by the path of a class that cannot be imported."""
    parts = path.split(".")
    if parts[0] not in sys.modules:
        return near(parts[0], _MODULES)
    module = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 1):
        inside = {found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))}
        if part not in inside:
            return "" if hasattr(module, part) else near(part, {*inside, *dir(module)})
        try:
            module = importlib.import_module(".".join(parts[: place + 1]))
        except Exception:  # whatever that module does; the error tells it
            return ""
    return ""
