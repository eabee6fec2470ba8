from __future__ import annotations

import dataclasses

import pytest

from lightning_cap.data import get_training_recipe
from lightning_cap.errors import ConfigError

TABLE_5 = {  # of the paper, with RandAugment as timm's string; stochastic depth of deit as DeiT itself has it
    "deit": (0.05, 0.1, 0.0, 0.1, None, 0.5, (0.08, 1.0), "rand-m9-mstd0.5-inc1", 0.8, 1.0, 0.25, 1, 0.9),
    "light1": (0.03, 0.1, 0.0, 0.0, 1.0, 0.5, (0.08, 1.0), "rand-m2-mstd0.5-inc1", 0.0, 0.0, 0.0, 0, 0.9),
}


@pytest.mark.parametrize("name", TABLE_5)
def test_recipes_are_the_papers(name: str) -> None:
    assert dataclasses.astuple(get_training_recipe(name)) == (name, *TABLE_5[name])


def test_override_keeps_what_is_none_and_leaves_the_recipe_alone() -> None:
    recipe = get_training_recipe("deit").override(mixup=0.0, cutmix=None)
    assert (recipe.mixup, recipe.cutmix) == (0.0, 1.0)
    assert get_training_recipe("deit").mixup == 0.8


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"recipe='light2'.*did you mean 'light1'.*deit, light1"):
        get_training_recipe("light2")
    with pytest.raises(ConfigError, match="Choose one of deit, light1"):
        get_training_recipe("zzz")
