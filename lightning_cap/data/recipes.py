"""Training recipes of the paper (Table 5): augmentation and regularisation by name, every value overridable."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import is_real, require_real, require_text, require_whole, shown


@dataclass(frozen=True)
class TrainingRecipe:
    """One column of the paper's Table 5: how images are augmented and the model is regularised.

    Attributes:
        name: the name by which `get_training_recipe` finds it.
        weight_decay: of the optimizer (model side).
        label_smoothing: the paper's epsilon; mixed into the soft labels when mixup or cutmix is on, else for the loss.
        dropout: dropout rate of the model (model side).
        drop_path_rate: stochastic depth rate of the model (model side).
        gradient_clip: largest gradient norm, None for no clipping (model or trainer side).
        hflip: probability of a horizontal flip.
        crop_scale: smallest and largest share of the image area a random resized crop takes.
        rand_augment: timm's RandAugment string, "none" for no RandAugment.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        erasing_prob: probability of random erasing.
        erasing_count: largest number of erased boxes an image.
        test_crop_ratio: side of the evaluation's centre crop over the side of the resized image.

    Raises:
        ConfigError: a value cannot work.
    """

    name: str
    weight_decay: float
    label_smoothing: float
    dropout: float
    drop_path_rate: float
    gradient_clip: float | None
    hflip: float
    crop_scale: tuple[float, float]
    rand_augment: str
    mixup: float
    cutmix: float
    erasing_prob: float
    erasing_count: int
    test_crop_ratio: float

    def __post_init__(self) -> None:
        require_text("name", self.name, "deit")
        for name in ("hflip", "erasing_prob"):
            require_real(name, getattr(self, name), "[0, 1]")
        for name in ("label_smoothing", "dropout", "drop_path_rate"):
            require_real(name, getattr(self, name), "[0, 1)")
        for name in ("weight_decay", "mixup", "cutmix"):
            require_real(name, getattr(self, name), "[0, inf)")
        if self.gradient_clip is not None:
            require_real("gradient_clip", self.gradient_clip, "[0, inf)", example=1.0)
        require_shares("crop_scale", self.crop_scale)
        require_text("rand_augment", self.rand_augment, "rand-m9-mstd0.5-inc1")
        require_whole("erasing_count", self.erasing_count, 0)
        require_real("test_crop_ratio", self.test_crop_ratio, "(0, 1]", example=0.9)

    def override(self, **values: Any) -> TrainingRecipe:
        """Return a copy with the given values; those that are None keep the recipe's own."""
        return dataclasses.replace(self, **{name: value for name, value in values.items() if value is not None})


def require_shares(name: str, value: object) -> None:
    """Refuse what is no pair of shares of an area, the smaller one first.

    Raises:
        ConfigError: names the argument.
    """
    pair = value if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_real, value)) else None
    if pair is None or not 0 < pair[0] <= pair[1] <= 1:
        raise ConfigError(
            f"{name}={shown(value)}: give two shares of the area, 0 < smallest <= largest <= 1, such as (0.08, 1.0)."
        )


DEIT = TrainingRecipe(
    name="deit",
    weight_decay=0.05,
    label_smoothing=0.1,
    dropout=0.0,
    drop_path_rate=0.1,
    gradient_clip=None,
    hflip=0.5,
    crop_scale=(0.08, 1.0),
    rand_augment="rand-m9-mstd0.5-inc1",
    mixup=0.8,
    cutmix=1.0,
    erasing_prob=0.25,
    erasing_count=1,
    test_crop_ratio=0.9,
)

LIGHT1 = TrainingRecipe(
    name="light1",
    weight_decay=0.03,
    label_smoothing=0.1,
    dropout=0.0,
    drop_path_rate=0.0,
    gradient_clip=1.0,
    hflip=0.5,
    crop_scale=(0.08, 1.0),
    rand_augment="rand-m2-mstd0.5-inc1",
    mixup=0.0,
    cutmix=0.0,
    erasing_prob=0.0,
    erasing_count=0,
    test_crop_ratio=0.9,
)


def get_training_recipe(name: str) -> TrainingRecipe:
    """Return the paper's recipe of that name (`deit` or `light1`, Table 5).

    Raises:
        ConfigError: there is no such recipe; the message names the nearest.
    """
    recipes = {recipe.name: recipe for recipe in (DEIT, LIGHT1)}
    if isinstance(name, str) and name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(str(name).lower(), recipes, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"recipe={shown(name)} is unknown: {hint}Choose one of {', '.join(sorted(recipes))}.")
