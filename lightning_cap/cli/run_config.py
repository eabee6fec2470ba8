"""The model and the data of a run, made anew from its ``config.yaml``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from lightning_cap.cli.bases import config_files, read_settings
from lightning_cap.cli.files import check_files
from lightning_cap.cli.messages import one_line
from lightning_cap.cli.parsing import CAPParser
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.files import atomic

_FILE = "config.yaml"
_PARENTS = 2  # checkpoints are in a folder beside it, or in the same


def find_config(checkpoint: Path) -> Path | None:
    """The ``config.yaml`` that ``lightning-cap fit`` has left beside the checkpoint's folder, or in it; None without one."""
    folders = checkpoint.absolute().parents[:_PARENTS]
    return next((folder / _FILE for folder in folders if (folder / _FILE).is_file()), None)


class RunConfig:
    """What a configuration file says of the model and the data.

    Args:
        path: The YAML file.

    Raises:
        ConfigError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        check_files(["--config", str(path)])
        self.path = path
        self._parts = [read_settings(file) for file in config_files(path)]

    @property
    def has_model(self) -> bool:
        """Whether it says which model."""
        return any(part.get("model") is not None for part in self._parts)

    @property
    def has_data(self) -> bool:
        """Whether it says which data."""
        return any(part.get("data") is not None for part in self._parts)

    def make_model(self) -> pl.LightningModule:
        """The module, with fresh weights.

        Raises:
            ConfigError: It cannot be made of these settings.
        """
        module: pl.LightningModule = self._made(pl.LightningModule, "model", _without_weights)
        return module

    def make_data(self) -> pl.LightningDataModule:
        """The data module.

        Raises:
            ConfigError: It cannot be made of these settings.
        """
        data: pl.LightningDataModule = self._made(pl.LightningDataModule, "data")
        return data

    def _made(self, kind: type[Any], name: str, changed: Callable[[Any], Any] = lambda given: given) -> Any:
        parser = CAPParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_lightning_class_args(kind, name, subclass_mode=True)
        parts = [without_default_classes(changed(part[name])) for part in self._parts if part.get(name) is not None]
        try:
            given = parser.parse_args([f"--config={yaml.safe_dump({name: part})}" for part in parts])
            return parser.instantiate(given)[name]
        except ConfigError:
            raise
        except Exception as error:  # jsonargparse, or a class of the user's
            cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
            raise ConfigError(f"{self.path}: {name}: {one_line(str(cause))}") from error


def _without_weights(given: Any) -> Any:
    """Settings of a model but for its weights, which are to come from elsewhere."""
    if not isinstance(given, dict) or not isinstance(given.get("init_args"), dict):
        return given
    return {
        **given,
        "init_args": {k: v for k, v in given["init_args"].items() if k not in ("pretrained", "checkpoint")},
    }


def without_default_classes(given: Any) -> Any:
    """Settings without those that are a class, as by default: jsonargparse writes its path, and reads it as an instance."""
    if isinstance(given, list):
        return [without_default_classes(entry) for entry in given]
    if not isinstance(given, dict):
        return given
    plain = {name: without_default_classes(value) for name, value in given.items()}
    if isinstance(plain.get("class_path"), str) and isinstance(plain.get("init_args"), dict):
        defaults = _default_classes(plain["class_path"])
        plain["init_args"] = {n: v for n, v in plain["init_args"].items() if not _is_class(v, defaults.get(n))}
    return plain


def make_readable(path: Path) -> None:
    """Leave out of a file that jsonargparse has written what it cannot read again; comments on top stay.

    Args:
        path: The ``config.yaml`` of a run.
    """
    text = path.read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    held = without_default_classes(yaml.safe_load(text))
    with atomic(path) as temporary:
        temporary.write_text(header + yaml.safe_dump(held, sort_keys=False, default_flow_style=False))


def _default_classes(class_path: str) -> dict[str, type]:
    """Arguments of a class whose default is a class."""
    try:
        parameters = inspect.signature(_imported(class_path)).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if isinstance(p.default, type) and p.default is not p.empty}


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _is_class(value: Any, default: type | None) -> bool:
    """Whether a value is the name of that class."""
    return default is not None and isinstance(value, str) and value.rpartition(".")[2] == default.__name__
