"""The parser of the command line: mistakes in one line, and settings of callbacks by name alone."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_cap.cli.bases import without_base
from lightning_cap.cli.messages import near, one_line
from lightning_cap.errors import ConfigError

_OPTION = re.compile(
    r"(?:Option|Group '(?P<group>[^']+)' does not accept option|Subcommand '[^']+' does not accept option) '(?P<name>[^']+)'"
)


class CAPParser(LightningArgumentParser):
    """Ends with one line that tells the mistake, without the usage of all options.

    Attributes:
        example: A command line with what must be given; empty where a file may say it.
        others: Subcommands that are no methods of the Trainer: ``{name: (parser, what it does)}``.
    """

    example = ""
    others: Mapping[str, tuple[CAPParser, str]] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_epoch is a mistake
        super().__init__(*args, **kwargs)

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Those of Lightning, and `others`."""
        action = super().add_subcommands(*args, **kwargs)
        for name, (parser, summary) in self.others.items():
            action.add_subcommand(name, parser, help=summary)
        return action

    def parse_string(self, *args: Any, **kwargs: Any) -> Any:
        """The text of a configuration file; what it builds on is on the command line already (`bases.with_bases`)."""
        args = (*map(without_base, args[:1]), *args[1:])
        kwargs |= {name: without_base(kwargs[name]) for name in ("content", "cfg_str") if name in kwargs}
        return super().parse_string(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Tell a mistake; within a class, add what may be meant and leave the rest to the parser of the command line."""
        message += self._meant(message)
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"lightning-cap: error: {one_line(message)}\n")

    def _meant(self, message: str) -> str:
        if message.startswith("the following arguments are required"):
            where = f"as in {self.example}" if self.example else "on the command line or in a file, --config FILE"
            return f". Give them {where}" if self.exit_on_error else ""
        if message.startswith("unrecognized arguments: "):
            option = message.split(": ", 1)[1].split("=")[0].split()[0]
            own = {
                string for parser in self._parsers() for action in parser._actions for string in action.option_strings
            }
            return near(option, own, 0.8) or near(option.split(".")[0], own) or near(option, own)
        wrong = _OPTION.match(message)
        if wrong is None:
            return ""
        start = f"{wrong['group']}." if wrong["group"] else ""
        names = {a.dest.removeprefix(start) for p in self._parsers() for a in p._actions if a.dest.startswith(start)}
        return near(wrong["name"], names) or near(wrong["name"].split(".")[0], names)

    def _parsers(self) -> Iterator[argparse.ArgumentParser]:
        """This one and those of its subcommands."""
        yield self
        for action in self._actions:
            if isinstance(action.choices, dict):
                yield from (parser for parser in action.choices.values() if isinstance(parser, argparse.ArgumentParser))


def find_callbacks_by_setting(parser: LightningArgumentParser, dest: str = "trainer.callbacks") -> None:
    """Have ``--trainer.callbacks.pruner...`` mean the last callback that has a ``pruner``, wherever it is in the list.

    Args:
        parser: To whose options this applies.
        dest: The list of callbacks.
    """
    for action in parser._actions:
        if action.dest == dest:
            action.__class__ = _of_any(type(action))


def _of_any(kind: type[argparse.Action]) -> type[argparse.Action]:
    """An action for a list of classes, of which jsonargparse takes the last alone."""

    class OfAny(kind):  # type: ignore[valid-type, misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            start, option = f"--{self.dest}.", str(args[3]) if len(args) > 3 else ""
            listed = args[1].get(self.dest) if option.startswith(start) else None
            if not isinstance(listed, list) or not listed:
                return super().__call__(*args, **kwargs)
            place = _place_of(option.removeprefix(start).removeprefix("init_args."), listed, option)
            args[1][self.dest] = [*listed[:place], *listed[place + 1 :], listed[place]]
            result = super().__call__(*args, **kwargs)
            *others, changed = args[1][self.dest]
            args[1][self.dest] = [*others[:place], changed, *others[place:]]
            return result

    return OfAny


def _place_of(setting: str, callbacks: list[Any], option: str) -> int:
    """Which callback takes a setting: the last that does."""
    name = setting.split(".")[0]
    if name in ("class_path", "dict_kwargs"):
        return len(callbacks) - 1
    taken = [_settings(callback) for callback in callbacks]
    having = [place for place, names in enumerate(taken) if names is not None and name in names]
    having = having or [place for place, names in enumerate(taken) if names is None]  # they take any
    if not having:
        listed = {known for names in taken for known in names or ()}
        raise ConfigError(f"{option}: no callback has a setting {name!r}{near(name, listed)}")
    return having[-1]


def _settings(callback: Any) -> set[str] | None:
    """Arguments of the class of a callback in the configuration; None if they cannot be told."""
    module, _, name = str(callback.get("class_path")).rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
