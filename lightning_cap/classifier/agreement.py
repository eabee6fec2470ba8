"""Whether model and data fit each other: told before the first step, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import is_real, is_whole
from lightning_cap.utilities.compiled import plain_module

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]


def normalization_of(model: nn.Module) -> Normalization | None:
    """Mean and standard deviation per channel that a timm model was trained with, from its ``pretrained_cfg``.

    Returns:
        None if it does not tell both, or has not three channels.
    """
    told = getattr(plain_module(model), "pretrained_cfg", None)
    if not isinstance(told, Mapping):
        return None
    mean, std = (tuple(told.get(name) or ()) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not all(map(is_real, (*mean, *std))):
        return None
    return mean, std


def input_shape(model: nn.Module) -> tuple[int, ...] | None:
    """``(channels, height, width)`` of the images that a timm model takes; None for others."""
    settings: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(settings, Mapping) or not settings.get("input_size"):
        return None
    channels, *size = settings["input_size"]
    embed = getattr(model, "patch_embed", None)
    if isinstance(getattr(embed, "img_size", None), tuple):
        size = list(embed.img_size)  # type: ignore[union-attr]
    stem = settings.get("first_conv")
    layer = dict(model.named_modules()).get(stem if isinstance(stem, str) else "")
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and isinstance(layer, nn.Conv2d):
        channels = layer.in_channels
    return (channels, *size)


def check_classes(num_classes: int, data: LightningDataModule) -> None:
    """Refuse data with another number of classes than the model, as far as the data tells it (``num_classes``).

    Raises:
        ConfigError: Tells both numbers.
    """
    of_data = getattr(data, "num_classes", None)
    if is_whole(of_data) and of_data != num_classes:
        raise ConfigError(
            f"num_classes={num_classes} of the model, but the data has {of_data} classes ({type(data).__name__}): give the "
            f"model num_classes={of_data}, or other data."
        )


def check_images(model: nn.Module, num_classes: int, data: LightningDataModule, device: torch.device) -> None:
    """Refuse data whose images the model does not take: shows it one, where the data tells their shape (``image_shape``).

    Args:
        model: From images ``(b, C, H, W)`` to logits ``(b, num_classes)``. It is left as it is.
        num_classes: The number of logits.
        data: With ``image_shape``, ``(C, H, W)``; without, nothing is checked.
        device: Where the run will be.

    Raises:
        ConfigError: Tells the shape and what the model says of it.
    """
    shape = getattr(data, "image_shape", None)
    if not isinstance(shape, tuple):
        return
    given = f"the data gives images {tuple(shape)} ({type(data).__name__})"
    try:
        logits = _shown_one(plain_module(model), shape, device)
    except torch.OutOfMemoryError:  # the run may share the weights out
        return
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{given}, which the model does not take ({' '.join(str(error).split())}): give the model in_chans={shape[0]} and an "
            f"img_size of {shape[-1]}, or the data the img_size of the model."
        ) from error
    if logits is None or tuple(logits.shape) == (1, num_classes):
        return
    raise ConfigError(
        f"{given}, of which the model makes {tuple(logits.shape)} and not logits (1, {num_classes}): give the model "
        f"num_classes={num_classes} and a pooling that leaves one vector for each image."
    )


def _shown_one(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """Logits of a black image, on a device; None if there are no weights yet or the model gives something else."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any(tensor.is_meta or nn.parameter.is_lazy(tensor) for tensor in tensors.values()):
        return None
    first = next(model.parameters(), None)
    image = torch.zeros(1, *shape, device=device, dtype=None if first is None else first.dtype)
    training = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            there = {name: tensor.to(device) for name, tensor in tensors.items()}
            logits: Any = torch.func.functional_call(model, there, (image,))
        finally:
            for module, mode in training.items():
                module.training = mode
    return logits if isinstance(logits, torch.Tensor) else None


def tell_other_normalization(of_model: Normalization | None, data: LightningDataModule) -> None:
    """Warn of images that are normalised otherwise than those that the pretrained weights were trained on."""
    of_data = getattr(data, "normalization", None)
    if of_model is None or of_data is None:
        return
    pairs = zip((*of_model[0], *of_model[1]), (*of_data[0], *of_data[1]), strict=True)
    if any(abs(a - b) > 1e-3 for a, b in pairs):
        rank_zero_warn(
            f"mean={of_data[0]} and std={of_data[1]} of the data are not those that the pretrained weights were trained with, "
            f"mean={of_model[0]} and std={of_model[1]}. Leave them out to take those of the model."
        )
