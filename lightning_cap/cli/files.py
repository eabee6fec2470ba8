"""Configuration files, looked at before jsonargparse reads them: what is wrong with one in one line."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import shown

CONFIG = ("--config", "-c")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_ENDINGS = (".yaml", ".yml", ".json")


def check_files(args: Sequence[str]) -> None:
    """Refuse configuration files, and values in YAML, that cannot be read or that say one thing twice.

    Args:
        args: The command line.

    Raises:
        ConfigError: Names the file, the line and what is wrong.
    """
    for option, value in _options(args):
        path = Path(value)
        if option in CONFIG and not value.strip():
            raise ConfigError(f"{option}={shown(value)}: give a YAML file.")
        if option in CONFIG and "://" not in value and not any(c in value for c in "{\n") and not os.path.exists(path):
            raise ConfigError(f"{option} {shown(value)}: there is no such file.")
        if option in CONFIG and os.path.isdir(path):
            raise ConfigError(f"{option} {shown(value)}: this is a folder. Give a file in it.")
        if os.path.isfile(path) and (option in CONFIG or path.suffix in _ENDINGS):
            check_file(path)
        elif "{" in value:
            _refuse_twice(value, option)


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their values, where they have one."""
    for place, argument in enumerate(args):
        if not argument.startswith("-"):
            continue
        option, equals, value = argument.partition("=")
        if equals:
            yield option, value
        elif place + 1 < len(args) and not args[place + 1].startswith("-"):
            yield option, args[place + 1]


def check_file(path: Path) -> None:
    """Refuse a configuration file that cannot be read, holds no settings, or has a key twice.

    Args:
        path: Of a file that exists.

    Raises:
        ConfigError: Names the file, the line and what is wrong.
    """
    named = shown(str(path))
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{named} is no UTF-8 text (byte {error.start}). Give a YAML file, saved as UTF-8."
        ) from error
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise ConfigError(f"{named} is no text. Give a YAML file, saved as UTF-8.")
    try:
        found = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{named} is no YAML: {_what(error)}.") from error
    if not isinstance(found, yaml.MappingNode):
        held = "is empty" if found is None else "holds no settings by name"
        raise ConfigError(f"{named} {held}. Give a YAML file such as configs/digits_gradual.yaml.")
    _check_keys(found, named)


def _what(error: yaml.YAMLError) -> str:
    """The problem and its line, as PyYAML tells them."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}: {problem}"


def _refuse_twice(value: str, option: str) -> None:
    try:
        found = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # perhaps no YAML at all; jsonargparse knows what belongs there
        return
    if found is not None:
        _check_keys(found, option)


def _check_keys(node: yaml.Node, named: str) -> None:
    """Refuse a key that is there twice in a mapping, of which the last would win."""
    seen: dict[Any, int] = {}
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, _ in pairs:
        line = key.start_mark.line + 1
        name = _constructed(key)
        if ":" in str(key.value) and key.tag in _NUMBERS:  # to YAML it is in base 60
            raise ConfigError(
                f"{named}: {key.value!r} in line {line} is one number. Write a space after the colon, as in {{1: 0.5}}."
            )
        if name in seen and key.tag != "tag:yaml.org,2002:merge":
            raise ConfigError(f"{named}: {shown(name)} is given twice, in lines {seen[name]} and {line}. Keep one.")
        seen[name] = line
    children = [child for pair in pairs for child in pair] if pairs else node.value
    for child in children if isinstance(children, list) else ():
        _check_keys(child, named)


def _constructed(key: yaml.Node) -> Hashable:
    """What a key is to Python: 1 and 1.0 are one, and so are a and 'a'."""
    if not isinstance(key, yaml.ScalarNode):
        return id(key)
    try:
        found: Hashable = yaml.SafeLoader("").construct_object(key)
    except (yaml.YAMLError, ValueError, TypeError):
        return str(key.value)
    return found
