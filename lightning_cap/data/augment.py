"""Image transforms from a recipe, and mixup/cutmix as a picklable collate function."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms

from lightning_cap.data.recipes import TrainingRecipe
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import is_real, require_counts, require_real, shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Crop = Literal["rrc", "pad"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Transform = Callable[[Any], Tensor]
Channels = tuple[float, float, float]

_SECTION = (
    r"-((m|mstd|mmax|inc|n|p)\d+(\.\d+)?|t\w+)"  # of timm's RandAugment strings, which leaves out what it does not know
)


def require_channels(name: str, value: object, positive: bool) -> None:
    """Refuse what is no number for each of three channels.

    Raises:
        ConfigError: names the argument.
    """
    entries = value if isinstance(value, (tuple, list)) else ()
    if len(entries) == 3 and all(is_real(entry) and (entry > 0 or not positive) for entry in entries):
        return
    example = IMAGENET_STD if positive else IMAGENET_MEAN
    raise ConfigError(
        f"{name}={shown(value)}: give three{' positive' if positive else ''} numbers, one a channel, such as {example}."
    )


def train_transform(
    recipe: TrainingRecipe,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: Interpolation,
    crop: Crop,
    crop_padding: int,
) -> Transform:
    """Build the training augmentation of a recipe: PIL image -> tensor of shape (3, img_size, img_size).

    With `crop="pad"` timm's random resized crop gives way to the usual crop of small images: `crop_padding` zeros on
    every side, then a random crop of `img_size`. RandAugment, flip and erasing follow the recipe either way.

    Raises:
        ConfigError: `rand_augment` is no RandAugment string.
    """
    options: dict[str, Any] = {
        "scale": recipe.crop_scale,
        "hflip": recipe.hflip,
        "color_jitter": None,
        "auto_augment": None if recipe.rand_augment == "none" else recipe.rand_augment,
        "interpolation": interpolation,
        "mean": tuple(mean),
        "std": tuple(std),
        "re_prob": recipe.erasing_prob,
        "re_mode": "pixel",
        "re_count": max(1, recipe.erasing_count),
    }
    wrong = recipe.rand_augment.startswith("rand") and not re.fullmatch(f"rand({_SECTION})*", recipe.rand_augment)
    try:
        if wrong:
            raise ValueError("a section of it is unknown")
        primary, secondary, final = create_transform(img_size, is_training=True, separate=True, **options)
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"rand_augment={recipe.rand_augment!r} is no RandAugment string of timm ({error}): write 'none' or, for "
            "magnitude 9 with standard deviation 0.5, 'rand-m9-mstd0.5-inc1'."
        ) from error
    _keep_one_bit(secondary.transforms)
    if crop == "pad":
        primary = _padded_crop(img_size, interpolation, crop_padding, recipe.hflip)
    steps = [*primary.transforms, *secondary.transforms, *final.transforms]
    composed: Transform = transforms.Compose(steps)
    return composed


def _keep_one_bit(steps: Sequence[Any]) -> None:
    """Let timm's posterize keep at least one bit: at full magnitude it asks for none, which Pillow 13 refuses."""
    for step in steps:
        for operation in getattr(step, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.level_fn = _AtLeastOne(operation.level_fn)


class _AtLeastOne:
    def __init__(self, level_to_bits: Callable[[float, Any], tuple[int]]) -> None:
        self.level_to_bits = level_to_bits

    def __call__(self, level: float, options: Any) -> tuple[int]:
        return (max(1, self.level_to_bits(level, options)[0]),)


def _padded_crop(img_size: int, interpolation: str, padding: int, hflip: float) -> Any:
    steps = [
        transforms.Resize(img_size, interpolation=transforms.InterpolationMode(interpolation)),
        transforms.CenterCrop(img_size),
        transforms.RandomCrop(img_size, padding=padding),
        transforms.RandomHorizontalFlip(hflip),
    ]
    return transforms.Compose(steps)


def eval_transform(
    recipe: TrainingRecipe, img_size: int, mean: Sequence[float], std: Sequence[float], interpolation: Interpolation
) -> Transform:
    """Build the evaluation transform (resize, centre crop): PIL image -> tensor of shape (3, img_size, img_size)."""
    transform: Transform = create_transform(
        input_size=img_size,
        crop_pct=recipe.test_crop_ratio,
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
    )
    return transform


class MixupCollate:
    """Collate samples into a batch and apply timm's mixup/cutmix to it; labels become soft.

    Takes batches of any size: timm mixes sample i with sample n-1-i and refuses odd n, so the middle sample of an odd
    batch is put in twice for the mixing, which pairs it with itself, and once taken out again.

    Args:
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        label_smoothing: mixed into the soft labels.
        num_classes: length of a soft label.
    """

    def __init__(self, mixup: float, cutmix: float, label_smoothing: float, num_classes: int) -> None:
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            require_real(name, value, "[0, inf)")
        require_real("label_smoothing", label_smoothing, "[0, 1)")
        require_counts(num_classes=num_classes)
        options = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": label_smoothing}
        self.mixup = Mixup(num_classes=num_classes, **options)  # type: ignore[no-untyped-call]

    def __call__(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Return images (n, 3, H, W) and soft labels (n, num_classes); randomness is NumPy's global generator."""
        middle = len(samples) // 2
        odd = len(samples) % 2 == 1
        if odd:
            samples = [*samples[: middle + 1], *samples[middle:]]
        images, labels = self.mixup(*default_collate(list(samples)))
        if not odd:
            return images, labels
        keep = torch.arange(len(samples)) != middle
        return images[keep], labels[keep]
