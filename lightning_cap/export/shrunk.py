"""`shrink`: a smaller dense model, which gives what the masked one gave."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.errors import CAPError, ConfigError, UnsupportedError
from lightning_cap.export.kept_units import STEPS, ShrinkStep
from lightning_cap.export.safetensors import plain_model
from lightning_cap.sparsity.masks import MaskSet, check_masks
from lightning_cap.sparsity.shrinking import shrink_in_place
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import Slice, UnitGroup, Units
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.compiled import plain_module, plain_name
from lightning_cap.utilities.precision import full_float32

_CLOSE, _CLOSE_IN_HALF = 1e-3, 0.1  # of the largest output, by which equal models may differ in a type


def shrink(
    model: nn.Module, masks: MaskSet | Mapping[str, Tensor], units: Units | None = None, example_input: Any = None
) -> nn.Module:
    """A copy of a model without its pruned units, whose outputs are those of the masked model.

    It is an ordinary dense module: it trains on, and goes through `torch.export`, ONNX, copies and pickles. Weights that are
    masked inside of kept units are zero in it. It can be shrunk again, and written by `save_shrunk`.

    Args:
        model: Not changed. Of a LightningModule, the model inside it is taken, and returned without it.
        masks: ``{parameter: bool of its shape}``, True = kept, with the names of the model or of the LightningModule around it. A
            unit is pruned where all its rows, columns and entries are masked.
        units: Of the model. Default: those that ``masks`` were made with, else what `Units.from_model` finds.
        example_input: A batch for the model: a tensor, a tuple of arguments, or a dict of named ones. It is needed to find units,
            and to compare the smaller model with the masked one. Default: noise of the size that a timm model tells; other models
            are not compared.

    Returns:
        The smaller model, on the same device and in the same mode.

    Raises:
        ConfigError: A unit is masked in part, all units of a group are, or masks or units are of another model.
        UnsupportedError: A module cannot take fewer channels, or the smaller model gives something else.
    """
    require_instance("model", model, nn.Module, "the pruned model")
    require_instance("masks", masks, Mapping, "{parameter: bool of its shape}, or a MaskSet")
    require_instance("units", units, Units, "Units.from_model(model, example_input)", optional=True)
    _check_example(example_input)
    if not masks or not all(isinstance(name, str) for name in masks):
        raise ConfigError(f"masks={shown(masks)}: give at least one, {{parameter: bool of its shape}}.")
    inner = _inside(model, masks)
    if units is None and isinstance(masks, MaskSet):
        units = masks.targets.units
    own = {plain_name(n) for n, _ in (*inner.named_parameters(remove_duplicate=False), *inner.named_buffers())}
    masks = _checked_masks(inner, own, masks)
    example = example_input if example_input is not None else default_example(inner)
    if units is None:
        if example is None:
            raise ConfigError("example_input=None: without it the units of this model cannot be found. Give a batch for the model, "
                              "such as torch.randn(2, 3, 224, 224), or units=.")  # fmt: skip
        units = Units.from_model(inner, example)
    units = _renamed(units, own)
    kept = units.kept(masks)
    if all(bool(which.all()) for which in kept.values()):
        warnings.warn("masks: no unit is pruned, so the model that shrink returns is as large as before.", stacklevel=2)
    small = _copy(inner)
    with torch.no_grad():
        for name, parameter in small.named_parameters(remove_duplicate=False):
            if name in masks:
                parameter.mul_(masks[name].to(parameter.device))
    with _comparing(small, example):
        shrink_in_place(small, units, kept)
    step = ShrinkStep.of(units, kept)
    if step.groups:
        setattr(small, STEPS, (*getattr(small, STEPS, ()), step))
    return small


def default_example(model: nn.Module) -> Tensor | None:
    """Noise ``(2, channels, height, width)`` that a timm model takes; None for others."""
    settings = getattr(model, "pretrained_cfg", None)
    size = settings.get("input_size") if isinstance(settings, Mapping) else None
    first = next(model.parameters(), None)
    if size is None or first is None:
        return None
    images = getattr(getattr(model, "patch_embed", None), "img_size", None) or size[1:]
    stem = cast("Mapping[str, Any]", settings).get("first_conv")
    stem = dict(model.named_modules()).get(stem if isinstance(stem, str) else (stem or ("",))[0])
    channels = stem.in_channels if isinstance(stem, nn.modules.conv._ConvNd) else size[0]
    noise = torch.randn(2, channels, *images, generator=torch.Generator().manual_seed(0))
    return noise.to(first.device, first.dtype)


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that a model gives, in evaluation mode, on its own device; its modes are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, example)
    model.eval()
    try:
        with torch.no_grad(), full_float32():
            if isinstance(example, Mapping):
                out = model(**example)
            else:
                out = model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        for module, mode in modes:
            module.training = mode
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of outputs, as a share of the largest; infinity where shapes differ."""
    if [a.shape for a in outputs] != [b.shape for b in expected]:
        return float("inf")
    largest = [0.0]
    for a, b in zip(outputs, expected, strict=True):
        if b.numel():
            a, b = a.double(), b.double()
            largest.append(float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.float32).tiny)))
    return max(largest)


def is_close(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two models that give this may be the same, computed in another order."""
    half = any(out.dtype in (torch.float16, torch.bfloat16) for out in expected)
    return difference(outputs, expected) <= (_CLOSE_IN_HALF if half else _CLOSE)


@contextmanager
def _comparing(model: nn.Module, example: Any) -> Iterator[None]:
    """Compare what a model gives before and after the body, if there is something to run it on."""
    if example is None:
        yield
        return
    try:
        expected = outputs_of(model, example)
    except Exception as error:
        raise ConfigError(
            f"example_input={_shape(example)}: the model cannot be run on it ({type(error).__name__}: {shown(str(error))}). Give a "
            "batch that it takes."
        ) from error
    yield
    try:
        outputs = outputs_of(model, example)
    except CAPError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"model={type(model).__name__}: it cannot be run without its pruned units ({type(error).__name__}: "
            f"{shown(str(error))}). A forward method holds on to a width; exclude the units that it needs."
        ) from error
    if not is_close(outputs, expected):
        raise UnsupportedError(
            f"model={type(model).__name__}: without its pruned units it differs from the masked model by "
            f"{difference(outputs, expected):.1e} of the largest output. Something else reads them; exclude these units."
        )


def _shape(example: Any) -> str:
    """What to call an example in a message: its shape where it is one tensor."""
    return f"tensor of shape {tuple(example.shape)}" if isinstance(example, Tensor) else shown(example)


def _check_example(example: object) -> None:
    require_instance(
        "example_input", example, (Tensor, tuple, list, Mapping), "torch.randn(2, 3, 224, 224)", optional=True
    )
    if example is not None and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example)):
        raise ConfigError(
            f"example_input={shown(example)}: there is no tensor in it. Give a batch, such as torch.randn(2, 3, 224, 224)."
        )


def _inside(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """What a user of the model would load."""
    model = plain_module(model)
    if not isinstance(model, pl.LightningModule):
        return model
    inner, prefix = plain_model(model, list(names))
    known = {plain_name(name) for name, _ in inner.named_parameters(remove_duplicate=False)}
    if not prefix and not known.issuperset(names):  # names of the model inside
        inner, _ = plain_model(model, [])
    return inner


def _prefix(argument: str, names: Iterable[str], own: set[str]) -> str:
    """What stands before all names and is not part of the model's own."""
    names = list(names)
    first = names[0]
    for length in (0, *(at + 1 for at, letter in enumerate(first) if letter == ".")):
        if all(name.startswith(first[:length]) and name[length:] in own for name in names):
            return first[:length]
    missing = next((name for name in names if name not in own), first)
    raise ConfigError(f"{argument}: {missing!r} is no parameter of the model. Give those of this model.")


def _checked_masks(model: nn.Module, own: set[str], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the model's own names."""
    length = len(_prefix("masks", masks, own))
    renamed = {name[length:]: mask for name, mask in masks.items()}
    parameters = {
        plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False) if plain_name(n) in renamed
    }
    _prefix("masks", renamed, set(parameters))  # buffers have none
    check_masks(Targets(parameters), renamed)
    return renamed


def _renamed(units: Units, own: set[str]) -> Units:
    """Under the model's own names."""
    names = [part.name for group in units.values() for part in (*group.slices, *group.buffers)]
    prefix = _prefix("units", names, own)

    def parts(old: tuple[Slice, ...]) -> tuple[Slice, ...]:
        return tuple(replace(part, name=part.name.removeprefix(prefix)) for part in old)

    def renamed(group: UnitGroup) -> UnitGroup:
        return replace(
            group,
            name=group.name.removeprefix(prefix),
            producers=parts(group.producers),
            norms=parts(group.norms),
            consumers=parts(group.consumers),
            buffers=parts(group.buffers),
        )

    return Units([renamed(group) for group in units.values()]) if prefix else units


def _copy(model: nn.Module) -> nn.Module:
    """Without the trainer of a LightningModule, and without what `torch.compile` has put around modules inside."""
    try:
        trainer = model.trainer if isinstance(model, pl.LightningModule) else None
    except RuntimeError:  # has none
        trainer = None
    small = copy.deepcopy(model, {id(trainer): None} if trainer is not None else {})
    small.zero_grad(set_to_none=True)
    for path, module in list(small.named_modules()):
        inside = plain_module(module)
        if inside is not module:
            small.set_submodule(plain_name(path), inside)
    return small
