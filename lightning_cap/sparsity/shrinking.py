"""Makes a model smaller: cuts the entries of pruned units out of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.sparsity.narrow_attention import narrow
from lightning_cap.sparsity.partial_norms import fit_norm
from lightning_cap.sparsity.units import UnitGroup, Units
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.compiled import plain_name

_Lines = dict[int, Tensor]  # dim -> bool (entries), True = kept


def shrink_in_place(model: nn.Module, units: Units, kept: Mapping[str, Tensor]) -> None:
    """Cut the units that are not kept out of a model, whose outputs are then those that it gave with these units masked.

    Parameters and buffers get shorter; widths, groups, heads and the like that modules remember follow. A LayerNorm over
    channels of which some are gone still counts them, as zeros. What is kept has the same values, but for scales of RMS and
    response norms, which take in that the mean is over fewer channels. Optimizers, gradients and compiled code of the model
    are of no use afterwards.

    Args:
        model: Changed; if this raises, it may be in pieces.
        units: Of this model.
        kept: ``{group: bool (size)}``, True = kept; groups that are not there are whole.

    Raises:
        ConfigError: The units are of another model, or ``kept`` is not of the units, or keeps none of a group.
        UnsupportedError: A module cannot take fewer channels.
    """
    require_instance("model", model, nn.Module, "the torch model that the units are of")
    require_instance("units", units, Units, "Units.from_model(model, example_input)")
    require_kept(units, kept)
    cut = _lines(model, units, kept)
    before = _classifier_width(model)
    done: dict[int, Tensor] = {}
    for path, module in list(model.named_modules()):
        own = {name: cut[id(tensor)] for name, tensor in _tensors(module) if id(tensor) in cut}
        for name, lines in own.items():
            store = cast("dict[str, Tensor]", module._parameters if name in module._parameters else module._buffers)
            old = store[name]
            store[name] = done.setdefault(id(old), _selected(old, lines))
        if own:
            _fit(module, plain_name(path) or "the model", own)
    modules = {plain_name(path): module for path, module in model.named_modules()}
    for name, group in units.items():
        if group.kind == "head" and name in kept:
            _fit_heads(modules, group, int(kept[name].sum()))
    for module in modules.values():
        narrow(module)
    _fit_classifier(model, before)


def require_kept(units: Units, kept: object) -> None:
    """Refuse what does not say which units of each group are kept.

    Raises:
        ConfigError: It is no mapping of bool tensors, a group is not of the units, a tensor not of its size, or none is kept.
    """
    require_instance("kept", kept, Mapping, "units.kept(masks)")
    for name, which in cast("Mapping[object, object]", kept).items():
        if not isinstance(name, str) or name not in units:
            raise ConfigError(f"kept: there is no group {shown(name)}. Give units.kept(masks) of the same units.")
        size = units[name].size
        if not isinstance(which, Tensor) or which.dtype != torch.bool or which.shape != (size,):
            raise ConfigError(f"kept: {name!r} is {shown(which)}. Give a bool tensor of its {size} units, True = kept.")
        if not bool(which.any()):
            raise ConfigError(f"kept: {name!r} has none of its {size} units left. Keep at least one.")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for store in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in store.items() if tensor is not None)


def _lines(model: nn.Module, units: Units, kept: Mapping[str, Tensor]) -> dict[int, _Lines]:
    """``id`` of each tensor that is to be cut -> which entries stay along which dims."""
    tensors: dict[str, Tensor] = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    tensors |= {plain_name(n): b for n, b in model.named_buffers(remove_duplicate=False)}
    cut: dict[int, _Lines] = {}
    for name, group in units.items():
        for part in (*group.slices, *group.buffers):
            tensor = tensors.get(part.name)
            shape = None if tensor is None else tuple(tensor.shape)
            if tensor is None or part.dim >= tensor.dim() or int(part.index.max()) >= tensor.shape[part.dim]:
                raise ConfigError(
                    f"units: those of {name!r} have entries of {part.name!r}, which the model "
                    f"{'does not have' if shape is None else f'has in shape {shape}'}. Give the units of this model."
                )
            if name not in kept or bool(kept[name].all()):
                continue
            lines = cut.setdefault(id(tensor), {})
            which = lines.setdefault(part.dim, torch.ones(tensor.shape[part.dim], dtype=torch.bool))
            which[part.entries(~kept[name].cpu()).cpu()] = False
    return cut


@torch.no_grad()
def _selected(tensor: Tensor, lines: _Lines) -> Tensor:
    """The entries that stay, as what ``tensor`` is: a parameter or a buffer."""
    out = tensor.detach()
    for dim, keep in lines.items():
        out = out.index_select(dim, keep.nonzero().flatten().to(out.device))
    return nn.Parameter(out, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else out


def _fit(module: nn.Module, path: str, own: Mapping[str, _Lines]) -> None:
    """Let the attributes of a module say how large its tensors are now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        _fit_conv(module, path, own.get("weight", {}))
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    else:
        along_first = {name: lines[0] for name, lines in own.items() if 0 in lines}
        if along_first:
            fit_norm(module, path, along_first)


def _fit_conv(conv: nn.modules.conv._ConvNd, path: str, lines: _Lines) -> None:
    """With groups, whole ones are gone, or as many channels of each."""
    if conv.groups > 1 and 0 in lines:
        of_group = lines[0].reshape(conv.groups, -1).sum(1)
        of_group = of_group[of_group > 0]
        if bool((of_group != of_group[0]).any()):
            raise UnsupportedError(
                f"{path}: its groups would have {sorted({int(n) for n in of_group})} channels, but they must have as many each. "
                "Prune whole groups, or exclude the units of this convolution."
            )
        conv.groups = len(of_group)
    first, second = conv.weight.shape[:2]
    second *= conv.groups
    conv.in_channels, conv.out_channels = (first, second) if conv.transposed else (second, first)


def _fit_heads(modules: Mapping[str, nn.Module], group: UnitGroup, left: int) -> None:
    """Set the number of heads in the module around the projections of a group that counts so many as the group has."""
    path = _common([part.name for part in group.producers])
    while path and getattr(modules.get(path), "num_heads", None) != group.size:
        path = path.rpartition(".")[0]
    attention: Any = modules[path]
    if getattr(attention, "num_heads", None) != group.size:
        return  # its forward reads the number of heads off the tensors, or fails, and is refused by who tries it
    attention.num_heads = left
    if hasattr(attention, "attn_dim") and hasattr(attention, "head_dim"):
        attention.attn_dim = left * attention.head_dim


def _common(names: list[str]) -> str:
    """The innermost module that all parameters are in."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _classifier(model: nn.Module) -> nn.Linear | None:
    """That of a timm model."""
    makes = getattr(model, "get_classifier", None)
    found = makes() if hasattr(model, "pretrained_cfg") and callable(makes) else None
    return found if isinstance(found, nn.Linear) else None


def _classifier_width(model: nn.Module) -> int:
    classifier = _classifier(model)
    return 0 if classifier is None else classifier.in_features


def _fit_classifier(model: nn.Module, before: int) -> None:
    """Let a timm model, and the head in it, make another classifier of the right width when it is asked to."""
    classifier = _classifier(model)
    if classifier is None:
        return
    for module in model.modules():
        if module is not classifier and any(inside is classifier for inside in module.modules()):
            for name in ("num_features", "head_hidden_size", "embed_dim", "in_features"):
                if getattr(module, name, None) == before:
                    setattr(module, name, classifier.in_features)
