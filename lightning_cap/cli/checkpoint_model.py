"""The model of a checkpoint: what architecture it is of, and its weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_cap.classifier import VisionClassifier, load_weights
from lightning_cap.cli.run_config import RunConfig, find_config
from lightning_cap.errors import CAPError, ConfigError, DataError
from lightning_cap.export.exporter import MODEL_ARGS
from lightning_cap.export.safetensors import plain_model
from lightning_cap.trainer.checkpoints import check_checkpoint, naming_mismatch
from lightning_cap.utilities.arguments import shown

_GIVE = "Give --config FILE, the config.yaml of its run, or --module CLASS, the class of its LightningModule."


@dataclass(frozen=True)
class CheckpointModel:
    """A model with the weights of a checkpoint.

    Attributes:
        model: In evaluation mode, without the LightningModule around it.
        module: That LightningModule; None of plain weights.
        callbacks: States of the callbacks; empty of plain weights.
        model_args: What timm's model is made of, beside its name; None where that is not known.
        config: Of the run, where there is one.
    """

    model: nn.Module
    module: pl.LightningModule | None
    callbacks: Mapping[str, Any]
    config: RunConfig | None
    model_args: Mapping[str, Any] | None = None


def load_checkpoint_model(path: Path, config: Path | None, class_path: str | None) -> CheckpointModel:
    """The model of a checkpoint of a Trainer, or of plain weights with timm's name of the model in their header.

    Args:
        path: A ``.ckpt`` or ``.safetensors`` file.
        config: Of its run. Default: the ``config.yaml`` in the folder of the checkpoint or the one above, if there is one.
        class_path: Of the LightningModule, where the file does not tell the model.

    Raises:
        DataError: The file cannot be read, or is of another model.
        ConfigError: It is not known of which model it is, or that cannot be made.
    """
    found = config or find_config(path)
    run = None if found is None else RunConfig(found)
    if path.suffix == ".safetensors" and path.is_file():
        return CheckpointModel(_of_plain_weights(path, run).eval(), None, {}, run)
    check_checkpoint(path, "CKPT")
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    module = _module(path, held, run, config is not None, class_path)
    module.eval()
    model, _ = plain_model(module, [])
    return CheckpointModel(model, module, held.get("callbacks") or {}, run, _model_args(module))


def _module(
    path: Path, held: Mapping[str, Any], run: RunConfig | None, is_given: bool, class_path: str | None
) -> pl.LightningModule:
    if class_path is not None:
        return _of_class(path, class_path)
    known = dict(held.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {})
    if run is not None and run.has_model and (is_given or not isinstance(known.get("model"), str)):
        module = run.make_model()
    elif isinstance(known.get("model"), str):
        settings = {name: value for name, value in known.items() if not name.startswith("_")}
        try:
            module = VisionClassifier(**settings)
        except TypeError as error:
            raise ConfigError(f"CKPT={shown(str(path))}: it is of no VisionClassifier ({error}). {_GIVE}") from error
    else:
        raise ConfigError(f"CKPT={shown(str(path))}: it does not tell its model. {_GIVE}")
    module.configure_model()
    with naming_mismatch(path, "CKPT"):
        module.load_state_dict(held["state_dict"])
    return module


def _model_args(module: pl.LightningModule) -> dict[str, Any] | None:
    """Of a module that says by its hyper-parameters that it has made a model of timm."""
    held: Mapping[str, Any] = module.hparams
    if not isinstance(held.get("model"), str):
        return None
    classes = {} if held.get("num_classes") is None else {"num_classes": held["num_classes"]}
    return {**classes, **(held.get("model_kwargs") or {})}


def _of_class(path: Path, class_path: str) -> pl.LightningModule:
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--module={shown(class_path)}: it cannot be imported ({error}).") from error
    if not isinstance(found, type) or not issubclass(found, pl.LightningModule):
        raise ConfigError(f"--module={shown(class_path)}: it is no LightningModule. Give the path of its class.")
    with naming_mismatch(path, "CKPT"):
        try:
            return found.load_from_checkpoint(path, map_location="cpu")
        except (CAPError, RuntimeError):
            raise
        except Exception as error:  # whatever the class raises without arguments that the checkpoint does not hold
            raise ConfigError(
                f"--module={shown(class_path)}: it cannot be made from CKPT={shown(str(path))} ({type(error).__name__}: "
                f"{' '.join(str(error).split())}). Its class must save its arguments with save_hyperparameters()."
            ) from error


def _of_plain_weights(path: Path, run: RunConfig | None) -> nn.Module:
    """The model that the header names, else that of the run."""
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"CKPT={shown(str(path))}: it cannot be read ({error}).") from error
    architecture = header.get("architecture", "")
    if run is not None and run.has_model:
        model, _ = plain_model(run.make_model(), [])
    elif architecture and timm.is_model(architecture):
        model = _create(architecture, shapes, header.get(MODEL_ARGS))
    else:
        raise ConfigError(
            f"CKPT={shown(str(path))}: its header tells no model of timm (architecture={architecture!r}). Give the .ckpt beside "
            "it, or --config FILE, the config.yaml of its run."
        )
    try:
        load_weights(model, path)
    except ConfigError as error:
        raise DataError(f"CKPT={shown(str(path))}: it is of another model: {error}.") from error
    return model


def _create(architecture: str, shapes: Mapping[str, list[int]], given: str | None) -> nn.Module:
    """timm's model, of the arguments in the header, else with as many classes as the weights have."""
    if given is not None:
        made: nn.Module = timm.create_model(architecture, **json.loads(given))
        return made
    settings = timm.get_pretrained_cfg(architecture)
    head = getattr(settings, "classifier", None)
    rows = shapes.get(f"{head}.weight") if isinstance(head, str) else None
    classes: dict[str, Any] = {} if rows is None else {"num_classes": rows[0]}
    model: nn.Module = timm.create_model(architecture, **classes)
    return model
