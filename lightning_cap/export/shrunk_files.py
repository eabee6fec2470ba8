"""Smaller models on the disk: plain weights, and beside them the units that were kept, from which the model is made again."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_cap.errors import CAPError, ConfigError, DataError
from lightning_cap.export.compressed_files import COMPRESSED, load_compressed
from lightning_cap.export.exporter import MODEL_ARGS
from lightning_cap.export.kept_units import STEPS, ShrinkStep, ShrunkRecord
from lightning_cap.export.safetensors import save_plain_weights
from lightning_cap.export.shrunk import default_example, is_close, outputs_of
from lightning_cap.sparsity.shrinking import shrink_in_place
from lightning_cap.utilities.arguments import require_instance, require_path, shown
from lightning_cap.utilities.compiled import plain_module
from lightning_cap.utilities.files import atomic
from lightning_cap.utilities.records import Plain, read_record
from lightning_cap.utilities.rng import preserved

#: Writes a state dict, with strings for the header, as `save_plain_weights` does.
SaveWeights = Callable[[Path, Mapping[str, Tensor], Mapping[str, str]], None]

_SUFFIX = ".safetensors"
_DIGEST = "kept_units"  # in the header of the weights: what the JSON beside them must be


def save_shrunk(model: nn.Module, path: Path | str, model_args: Mapping[str, Any] | None = None) -> None:
    """Write a model that `shrink` has made, for `load`: its weights, and the units that were kept beside them in a ``.json``.

    Both files are there when it returns, or neither was changed. Call it on rank 0 alone.

    Args:
        model: What `shrink` returned, trained on or not, or a module around it.
        path: The ``.safetensors`` file.
        model_args: What `timm.create_model` was given beside the name, such as ``{"img_size": 32}``. Default: ``num_classes``,
            ``in_chans`` and ``img_size`` as the model has them. It is tried whether they make this model.

    Raises:
        ConfigError: The model is not from `shrink`, ``path`` is no such file, or ``model_args`` do not make the model.
        OSError: The system refuses, as on a full disk; it names the file.
    """
    require_instance("model", model, nn.Module, "shrink(model, masks)")
    require_instance("model_args", model_args, Mapping, '{"img_size": 32}', optional=True)
    _save_shrunk(model, _weights_file(path), model_args, {}, save_plain_weights)


def write_weights(model: nn.Module, path: Path, metadata: Mapping[str, str], save: SaveWeights) -> None:
    """Write the weights of a model in a way of one's own; of one that `shrink` has made, the kept units beside them.

    Args:
        model: Any.
        path: The file.
        metadata: Strings for its header; `MODEL_ARGS` among them is taken.
        save: How to write the weights.

    Raises:
        ConfigError: The `MODEL_ARGS` do not make the model.
        OSError: The system refuses, as on a full disk; it names the file.
    """
    if hasattr(model, STEPS):
        given = metadata.get(MODEL_ARGS)
        _save_shrunk(model, path, None if given is None else json.loads(given), metadata, save)
    else:
        save(path, model.state_dict(), metadata)


def _save_shrunk(
    model: nn.Module, path: Path, model_args: Mapping[str, Any] | None, metadata: Mapping[str, str], save: SaveWeights
) -> None:
    small = _made_by_shrink(model)
    architecture = _architecture(small)
    given = dict(model_args) if model_args is not None else _inferred_args(small) if architecture else {}
    record = ShrunkRecord(architecture=architecture, model_args=_plain(given), steps=getattr(small, STEPS))
    state = {name: value for name, value in small.state_dict().items() if isinstance(value, Tensor)}
    if architecture:
        _check_args(small, record, state)
    text = json.dumps(record.to_json(), allow_nan=False) + "\n"
    with atomic(_units_file(path)) as temporary:
        temporary.write_text(text)
        save(path, state, {**metadata, "architecture": architecture, _DIGEST: _digest(record)})


def load(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The smaller model that `save_shrunk` or ``lightning-cap export --shrink`` has written. torch-pruning is not needed.

    Args:
        path: The ``.safetensors`` file, a compressed one too; its ``.json`` must lie beside it.
        model: The dense model, with any weights; it is not changed. Default: what timm makes.

    Returns:
        The model, in evaluation mode and on the CPU, or where ``model`` is; its outputs are those of the saved one to the bit.

    Raises:
        DataError: A file is not there or damaged, or the two do not belong together.
        ConfigError: The model is not timm's and none is given, or the one that is given is another.
    """
    require_instance("model", model, nn.Module, "the dense model", optional=True)
    path = _weights_file(path)
    record = read_record(_units_file(path), ShrunkRecord)
    state, digest = _read_weights(path)
    if digest != _digest(record):
        raise DataError(
            f"{path}: its weights are not those of the units in {_units_file(path).name}. Give two files that were saved together."
        )
    if model is None and not record.architecture:
        raise ConfigError(
            "model=None: the file is of a model that timm does not make. Give the dense model that it was made of, load(path, "
            "model=MyModel())."
        )
    dense = _create(record) if model is None else copy.deepcopy(plain_module(model))
    try:
        return _rebuild(dense, record.steps, state).eval()
    except CAPError as error:
        raise ConfigError(
            f"{'path' if model is None else 'model'}={shown(str(path)) if model is None else type(model).__name__}: the weights "
            f"in {path.name} are of another model ({error})."
        ) from error


def _rebuild(dense: nn.Module, steps: tuple[ShrinkStep, ...], state: Mapping[str, Tensor]) -> nn.Module:
    """A dense model, cut as the steps say, with these weights."""
    for step in steps:
        shrink_in_place(dense, *step.restore())
    types = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(types) == 1:
        dense.to(types.pop())
    own = dense.state_dict()
    wrong = [name for name in own.keys() | state.keys() if name not in own or name not in state]
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        name = min(wrong)
        here, there = (tuple(values[name].shape) if name in values else None for values in (own, state))
        raise DataError(f"{name!r} has shape {here} in the model and {there} in the file")
    dense.load_state_dict(dict(state))
    setattr(dense, STEPS, steps)
    return dense


def _create(record: ShrunkRecord) -> nn.Module:
    """The dense model as timm makes it, with random weights."""
    with preserved():
        try:
            model: nn.Module = timm.create_model(
                record.architecture, pretrained=False, **cast("dict[str, Any]", record.model_args)
            )
        except Exception as error:
            raise ConfigError(
                f"model_args={shown(dict(record.model_args))}: timm.create_model({record.architecture!r}, ...) cannot make a model "
                f"of them ({type(error).__name__}: {shown(str(error))}). Give those that the model was made with."
            ) from error
    return model


def _check_args(small: nn.Module, record: ShrunkRecord, state: Mapping[str, Tensor]) -> None:
    """Make the model again, in memory, and compare."""
    given = shown(dict(record.model_args))
    hint = f"model_args={given}: timm.create_model({record.architecture!r}, ...) makes another model of them"
    dense = _create(record)
    try:
        again = _rebuild(dense, record.steps, {name: value.cpu() for name, value in state.items()})
    except CAPError as error:
        raise ConfigError(f"{hint} ({error}). Give those that the model was made with.") from error
    example = default_example(small)
    if example is not None:
        here = [value.cpu() for value in outputs_of(small, example)]
        if not is_close([value.cpu() for value in outputs_of(again.to(example.device), example)], here):
            raise ConfigError(f"{hint} (its outputs differ). Give those that the model was made with.")


def _made_by_shrink(model: nn.Module) -> nn.Module:
    found = next((module for module in model.modules() if hasattr(module, STEPS)), None)
    if found is None:
        raise ConfigError(
            f"model={type(model).__name__}: it was not made by shrink. Give what shrink(model, masks) returned."
        )
    return found


def _inferred_args(model: Any) -> dict[str, Any]:
    """What of the arguments of `timm.create_model` a model shows."""
    settings = cast("Mapping[str, Any]", model.pretrained_cfg)
    found: dict[str, Any] = {"num_classes": model.num_classes} if hasattr(model, "num_classes") else {}
    example, size = default_example(model), settings.get("input_size")
    if example is not None and size is not None:
        channels, *images = example.shape[1:]
        if channels != size[0]:
            found["in_chans"] = channels
        if images != list(size[1:]):
            found["img_size"] = images[0] if images[0] == images[1] else tuple(images)
    return found


def _plain(args: Mapping[Any, Any]) -> dict[str, Plain | tuple[Plain, ...]]:
    """Arguments that a record can hold."""
    plain: dict[str, Plain | tuple[Plain, ...]] = {}
    for name, value in args.items():
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not isinstance(name, str) or not all(isinstance(v, (bool, int, float, str, type(None))) for v in values):
            raise ConfigError(
                f"model_args={shown(args)}: {shown(name)} -> {shown(value)} cannot be written as JSON. Give numbers, strings, "
                "True, False, None, or lists of those, by name."
            )
        plain[name] = values if isinstance(value, (list, tuple)) else value
    return plain


def _architecture(model: nn.Module) -> str:
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))


def _weights_file(path: object) -> Path:
    require_path("path", path, f"small{_SUFFIX}")
    file = Path(cast("str | os.PathLike[str]", path))
    if file.suffix != _SUFFIX:
        raise ConfigError(f"path={shown(str(path))}: give the name of a {_SUFFIX} file, such as small{_SUFFIX}.")
    return file


def _units_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(record: ShrunkRecord) -> str:
    return hashlib.sha256(json.dumps(record.to_json(), sort_keys=True).encode()).hexdigest()


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights, and the digest of the units that they belong to."""
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            held = {} if COMPRESSED in header else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: it cannot be read ({error}). Give a file that save_shrunk has written.") from error
    return load_compressed(path) if COMPRESSED in header else held, header.get(_DIGEST, "")
