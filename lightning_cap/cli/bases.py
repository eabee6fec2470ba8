"""Configuration files that name the files they build on, by a key ``base``: each is read before the file that names it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_cap.cli.files import CONFIG, check_file
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import shown

_BASE = "base"
_EXAMPLE = "such as base: [parts/imagenet.yaml]"


def with_bases(args: Sequence[str]) -> list[str]:
    """A command line whose configuration files are preceded by those that they name as ``base``.

    Args:
        args: The command line, as in ``["fit", "--config", "configs/digits_gradual.yaml"]``.

    Returns:
        The same with one ``--config FILE`` more for each file that is a base, read once however often it is named.

    Raises:
        ConfigError: A file that is a base is missing or is none, files name each other in a circle, or a file has a key ``config``.
    """
    taken: list[str] = []
    read: set[Path] = set()
    waiting = list(args)
    while waiting:
        argument = waiting.pop(0)
        option, value = _option(argument)
        if option not in CONFIG or (value is None and not waiting):
            taken.append(argument)
            continue
        given = waiting.pop(0) if value is None else value
        if not os.path.isfile(given):
            _check_text(given, option)
            taken.append(f"--config={given}")
            continue
        *bases, own = config_files(Path(given))
        taken += [f"--config={path}" for path in (*(base for base in bases if base.resolve() not in read), own)]
        read.update(path.resolve() for path in (*bases, own))
    return taken


def config_files(path: Path) -> list[Path]:
    """A configuration file after those that it builds on, in the order in which they are to be read, each once.

    Args:
        path: The file.

    Raises:
        ConfigError: One of them is missing or is no configuration file, or they name each other in a circle.
    """
    found: list[Path] = []
    _collect(path, (), found)
    return found


def setting_names(path: Path) -> set[str]:
    """The keys at the top of a configuration file and of those that it builds on, without ``base``.

    Args:
        path: The file.

    Raises:
        ConfigError: As `config_files`.
    """
    return {str(key) for file in config_files(path) for key in read_settings(file)}


def read_settings(path: Path) -> dict[str, Any]:
    """What one configuration file says itself, without ``base``."""
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key: value for key, value in settings.items() if key != _BASE}


def without_base(text: str) -> str:
    """The text of a configuration file without its key ``base``; as it is, where there is none.

    Args:
        text: YAML.
    """
    if _BASE not in text:
        return text
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode) or all(key.value != _BASE for key, _ in node.value):
        return text
    node.value = [(key, value) for key, value in node.value if key.value != _BASE]
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper))


def _option(argument: str) -> tuple[str, str | None]:
    """An option and its value, where it is in the same argument."""
    option, equals, value = argument.partition("=")
    if equals and option in CONFIG:
        return option, value
    if argument.startswith("-c") and argument not in CONFIG:
        return "-c", argument[2:]
    return argument, None


def _check_text(text: str, option: str) -> None:
    """Refuse a ``base`` in YAML that is in no file, and so in no folder that it could be relative to."""
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:  # which jsonargparse tells
        return
    if isinstance(settings, dict):
        _refuse_config(settings, option)
        if _BASE in settings:
            raise ConfigError(f"{option}: 'base' is for files. Give one more --config FILE before this one.")


def _collect(path: Path, above: tuple[Path, ...], found: list[Path]) -> None:
    """Append a file after its bases; ``above`` are the files that lead to it."""
    if path.resolve() in [file.resolve() for file in above]:
        way = " -> ".join(file.name for file in (*above, path))
        raise ConfigError(
            f"{shown(str(above[-1]))}: base: {way} is a circle. Take {shown(path.name)} out of one of them."
        )
    if path.resolve() in [file.resolve() for file in found]:
        return
    if above and not path.is_file():
        there = "is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(
            f"{shown(str(above[-1]))}: base {shown(str(path))}: {there}. Give a YAML file, relative to this one."
        )
    check_file(path)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    _refuse_config(settings, shown(str(path)))
    for name in _bases(settings, path):
        _collect(path.parent / Path(name).expanduser(), (*above, path), found)
    found.append(path)


def _bases(settings: dict[str, Any], path: Path) -> list[str]:
    """The names under ``base``."""
    given = settings.get(_BASE, [])
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or (_BASE in settings and not listed):
        raise ConfigError(f"{shown(str(path))}: base={shown(given)}: give a list of YAML files, {_EXAMPLE}.")
    for name in listed:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(
                f"{shown(str(path))}: base={shown(given)}: {shown(name)} is no file. Give YAML files, {_EXAMPLE}."
            )
    return listed


def _refuse_config(settings: dict[str, Any], named: str) -> None:
    """Refuse a key that jsonargparse would leave out without a word."""
    if "config" in settings:
        raise ConfigError(f"{named}: 'config' in a file is not read. Name the files to build on by base, {_EXAMPLE}.")
