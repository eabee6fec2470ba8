"""Weights from a local file into a model: all of them or none."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import require_instance, require_path
from lightning_cap.utilities.compiled import COMPILED_PREFIX

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the averaged weights first, as timm does
_PREFIXES = ("module.", "model.", COMPILED_PREFIX)  # DDP, this module in a Lightning checkpoint, torch.compile


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a local checkpoint into a model: every weight or none.

    Args:
        model: The model to fill, in place.
        path: A ``.safetensors`` file, or a pickled state dict (loaded with ``weights_only=True``), bare or under
            ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model`` (the first of these that is there), also a
            Lightning checkpoint of `VisionClassifier`.

    Raises:
        ConfigError: If the file does not exist or cannot be read, or if its names or shapes are not the model's.
    """
    require_instance("model", model, nn.Module, "a torch.nn.Module")
    require_path("checkpoint", path, "weights.safetensors")
    if not Path(path).is_file():
        raise ConfigError(f"checkpoint={str(path)!r} is not a file; give the path of a .safetensors or torch.save file")
    own = model.state_dict()
    state = _without_prefix(_read_state(Path(path)), own)
    missing = [k for k in own if k not in state and not k.endswith(".num_batches_tracked")]  # torch fills these in
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the model"
        for k in own
        if k in state and isinstance(own[k], torch.Tensor) and state[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
            if names
        ]
        raise ConfigError(
            f"checkpoint={str(path)!r} does not fit the model, nothing was loaded ({'; '.join(problems)}); "
            f"give the model, num_classes and model_kwargs that it was saved with"
        )
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, out of its wrapper."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message tells how to run the code in the file
        raise ConfigError(
            f"checkpoint={str(path)!r} cannot be read: it is damaged, or holds objects that could run code. Save "
            f"model.state_dict() with torch.save or safetensors."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"checkpoint={str(path)!r} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            f"save model.state_dict() with torch.save or safetensors"
        ) from error
    if isinstance(content, dict):
        content = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ConfigError(
            f"checkpoint={str(path)!r} holds no state dict of tensors, neither bare nor under {_WRAPPERS}; "
            f"save model.state_dict()"
        )
    return content


def _without_prefix(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state without the prefixes that wrappers of the model put before each of its names."""
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in state) and not all(k.startswith(prefix) for k in own):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state
