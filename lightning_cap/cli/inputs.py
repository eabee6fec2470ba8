"""Real inputs that an exported file is verified on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_cap.classifier.agreement import input_shape, normalization_of
from lightning_cap.cli.checkpoint_model import CheckpointModel
from lightning_cap.data import ImageNetDataModule
from lightning_cap.errors import CAPError, ConfigError, DataError
from lightning_cap.utilities.arguments import shown

_NUMBER = 32  # of inputs
_SPLITS = ("val", "validation", "val.tar", "validation.tar")


def real_inputs(
    loaded: CheckpointModel, config_given: bool, data: Path | None, file: Path | None
) -> tuple[Tensor, str]:
    """Inputs ``(n, ...)``, at most 32, and what they are, for the user.

    Taken are, of these, the first that there is: the file, the images, the data of the run's configuration, noise.

    Args:
        loaded: The model.
        config_given: Whether the user has named the configuration: then its data must be there.
        data: A folder of class folders or a .tar of them, or a folder that has a split ``val`` or ``validation``.
        file: ``.pt`` or ``.npy`` of a float tensor ``(n, ...)``.

    Raises:
        ConfigError: There is nothing to take, or it is nothing for this model.
        DataError: It cannot be read.
    """
    if file is not None:
        return _of_file(file), f"inputs of {file}"
    if data is not None:
        return _of_module(_images(loaded.model, data)), f"images of {data}"
    failed = ""
    if loaded.config is not None and loaded.config.has_data:
        try:
            return _of_module(loaded.config.make_data()), f"validation data of {loaded.config.path}"
        except (CAPError, OSError) as error:
            if config_given:
                raise
            failed = f" ({loaded.config.path}: {' '.join(str(error).split())})"
    shape = input_shape(loaded.model)
    if shape is None:
        raise ConfigError(
            f"CKPT: nothing tells the inputs of the model{failed}. Give --data FOLDER of images, or --input FILE of a tensor."
        )
    noise = torch.randn(_NUMBER, *shape, generator=torch.Generator().manual_seed(0))
    return noise, f"noise, as no data is known{failed}; for real inputs give --data FOLDER or --input FILE"


def _of_file(path: Path) -> Tensor:
    named = f"--input={shown(str(path))}"
    try:
        if path.suffix == ".npy":
            held: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # text read as a pickle raises nearly anything
        told = (
            error.strerror if isinstance(error, OSError) else None
        ) or "it is no tensor that torch or numpy has saved"
        raise DataError(
            f"{named}: it cannot be read ({told}). Give a .pt or .npy file of a tensor (n, ...)."
        ) from error
    if not isinstance(held, Tensor):
        raise DataError(f"{named}: it holds a {type(held).__name__}. Give a tensor (n, ...), such as float images.")
    if held.ndim < 2 or not len(held) or not held.is_floating_point() or not bool(held.isfinite().all()):
        raise DataError(
            f"{named}: a tensor of shape {tuple(held.shape)} and type {held.dtype}, or with values that are not finite. Give real "
            "inputs (n, ...), such as float images (8, 3, 224, 224)."
        )
    return held[:_NUMBER].float()


def _images(model: nn.Module, path: Path) -> pl.LightningDataModule:
    """Images as the model takes them in evaluation."""
    shape = input_shape(model)
    if shape is None:
        raise ConfigError("--data: the model does not tell the size of its images. Give --input FILE of a tensor.")
    if not path.exists():
        raise DataError(f"--data={shown(str(path))}: there is no such folder or file.")
    mean, std = normalization_of(model) or (None, None)
    has_splits = path.is_dir() and any((path / name).exists() for name in _SPLITS)
    alone = str(path.absolute())
    return ImageNetDataModule(
        root=str(path) if has_splits else None,
        train_split="train" if has_splits else alone,  # else whatever "train" is in the working directory
        val_split="val" if has_splits else alone,
        img_size=shape[-1],
        mean=mean,
        std=std,
        batch_size=_NUMBER,
        num_workers=0,
        verify_up_to=0,
    )


def _of_module(data: pl.LightningDataModule) -> Tensor:
    """The first inputs of the validation data."""
    data.prepare_data()
    data.setup("validate")
    taken: list[Tensor] = []
    loaders = data.val_dataloader()
    for batch in loaders[0] if isinstance(loaders, (list, tuple)) else loaders:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(inputs, Tensor):
            kind = f"mapping with {shown(list(batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigError(f"data: a batch is a {kind}, not (inputs, labels). Give --input FILE of a tensor.")
        taken.append(inputs)
        if sum(map(len, taken)) >= _NUMBER:
            break
    if not taken:
        raise DataError("data: there is no validation data. Give --data FOLDER of images, or --input FILE of a tensor.")
    return torch.cat(taken)[:_NUMBER]
