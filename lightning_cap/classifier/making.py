"""A timm model by its name, and what of a recipe it is given."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from lightning.pytorch.utilities import rank_zero_warn
from timm.layers.drop import DropPath
from torch import nn

from lightning_cap.data.recipes import get_training_recipe
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import require_real, shown


def create_timm(
    name: str,
    num_classes: int | None,
    pretrained: bool,
    kwargs: dict[str, Any],
    drop_path_rate: float,
    argument: str = "model",
) -> nn.Module:
    """A timm model by name, its failures as errors of ours, about the argument of this name."""
    if ":" not in name and not timm.is_model(name):  # a colon: hf-hub:..., local-dir:...
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise ConfigError(
            f"{argument}={name!r} is not a timm model; near names: {', '.join(near) or 'none'}. timm.list_models() lists all"
        )
    if drop_path_rate > 0:
        kwargs = {"drop_path_rate": drop_path_rate, **kwargs}
    if num_classes is not None:
        kwargs = {"num_classes": num_classes, **kwargs}
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        remedy = (
            "check the network, or download the weights elsewhere and give the file as checkpoint="
            if pretrained
            else "give model_kwargs (and a drop_path_rate) that this model takes"
        )
        raise ConfigError(
            f"{argument}={name!r} could not be created with pretrained={pretrained}, {kwargs} "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return model


def check_given_module(
    model: nn.Module, pretrained: bool, kwargs: dict[str, Any] | None, drop_path_rate: float, explicit: bool
) -> None:
    """Refuse, for a module that exists already, what only the making of one could honour."""
    kind = type(model).__name__
    if pretrained or kwargs:
        raise ConfigError(
            f"pretrained={pretrained} and model_kwargs={kwargs!r} need a timm name, but model is a {kind} already; "
            f"give them to the model itself, and weights as checkpoint="
        )
    if drop_path_rate > 0 and explicit:
        raise ConfigError(
            f"drop_path_rate={drop_path_rate} needs a timm name, but model is a {kind} already; "
            f"give the rate to the model itself"
        )
    if drop_path_rate > 0 and not any(isinstance(m, DropPath) for m in model.modules()):
        rank_zero_warn(
            f"The recipe's drop_path_rate={drop_path_rate} is not applied: model is a {kind} already. Give the rate to "
            f"the model itself, or drop_path_rate=0 here to say that none is wanted."
        )


def number_of_classes(model: nn.Module, given: int | None) -> int:
    """The number of classes of the model, checked against the one that was given."""
    own = getattr(model, "num_classes", None)
    if given is not None and own is not None and own != given:
        raise ConfigError(f"num_classes={given}, but the model has {own}; make the model with {given} or leave it out")
    number = own if given is None else given
    if not isinstance(number, int) or isinstance(number, bool) or number < 2:
        raise ConfigError(
            f"num_classes={shown(number)} is not a number of classes the model tells or was given; give num_classes >= 2"
        )
    return number


def with_recipe(given: dict[str, float | None], recipe: str | None) -> dict[str, Any]:
    """The training values: as given, else the recipe's, else the defaults; checked."""
    defaults = {"label_smoothing": 0.0, "weight_decay": 0.05, "drop_path_rate": 0.0, "gradient_clip": None}
    if recipe is not None:
        found = get_training_recipe(recipe)
        defaults = {name: getattr(found, name) for name in defaults}
    values = {name: defaults[name] if value is None else value for name, value in given.items()}
    for name, value in values.items():
        if value is not None:
            require_real(name, value, "[0, 1)" if name in ("label_smoothing", "drop_path_rate") else "[0, inf)")
    return values
