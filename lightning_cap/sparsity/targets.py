"""Which parameters are pruned. A *target* is a weight tensor that may be; `Targets` is the ordered set of them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_cap.errors import TargetError
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.utilities.compiled import plain_name

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_GLOB = frozenset("*?[")


class Targets(Mapping[str, Tensor]):
    """The ordered set of weights to prune: ``{parameter name: weight of shape (*shape)}``.

    Names are the model's own, less the ``_orig_mod.`` of compiled modules. The tensors are the live parameters, so
    a `Targets` follows the training of its model.

    Args:
        weights: The tensors by name, in the order in which they are laid out.
        paths: The name under which each is found in the model (differs in compiled modules). Default: the same.

    Raises:
        TargetError: There is no target, or one is empty or not of a floating-point type.
    """

    def __init__(self, weights: Mapping[str, Tensor], paths: Mapping[str, str] | None = None) -> None:
        if not weights:
            raise TargetError("targets: there is no weight to prune. Give at least one Linear or Conv weight.")
        for name, weight in weights.items():
            if nn.parameter.is_lazy(weight):
                raise TargetError(f"target {name!r} is not initialised yet. Run one forward pass before pruning.")
            if not weight.is_floating_point():
                raise TargetError(f"target {name!r} is of type {weight.dtype}. Only real floating-point weights can be "
                                  "pruned; exclude it.")  # fmt: skip
            if weight.numel() == 0:
                raise TargetError(f"target {name!r} is empty (shape {tuple(weight.shape)}). Exclude it.")
        self._weights = dict(weights)
        self._paths = {name: paths[name] if paths else name for name in weights}

    @classmethod
    def from_model(
        cls, model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> Targets:
        """Choose targets by name.

        Args:
            model: Any module; a timm model anywhere inside tells its own first layer and classifier.
            include: Globs (``*``, ``?``, ``[...]``, case-sensitive) over the weights of Linear, Conv and
                MultiheadAttention layers, or exact names of any parameter. Default: all of those but the first layer,
                the classifier head (timm's own, else the last layer) and depthwise convolutions.
            exclude: Globs or names to leave out again.

        Raises:
            TargetError: A pattern matches nothing (near names are given), nothing is left to prune, or a chosen
                weight is frozen or tied.
        """
        parameters = _named_parameters(model)
        prunable = list(_prunable_modules(model))
        if include is None:
            names = _default_names(model, prunable)
        else:
            chosen = {
                name for glob in _globs("include", include) for name in _match(glob, parameters, prunable, "include")
            }
            names = [name for name in parameters if name in chosen]
        for glob in _globs("exclude", exclude or ()):
            dropped = _match(glob, parameters, list(parameters), "exclude")
            names = [name for name in names if name not in dropped]
        if not names:
            raise TargetError(
                "include/exclude: the model has no prunable weight left. By default every Linear and Conv weight but the "
                f"first layer, the head and depthwise convolutions is a target; candidates are {_some(prunable)}. "
                "Name weights with include=[...]."
            )
        _refuse_frozen_and_tied(model, parameters, names)
        return cls({name: parameters[name][1] for name in names}, {name: parameters[name][0] for name in names})

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def paths(self) -> dict[str, str]:
        """Target name -> the name by which `torch.func.functional_call` finds it in the model."""
        return self._paths

    @property
    def device(self) -> torch.device:
        """Where the first weight is, and the work on all of them is done."""
        return next(iter(self._weights.values())).device

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Target name -> shape of its weight."""
        return {name: tuple(weight.shape) for name, weight in self._weights.items()}

    @property
    def numel(self) -> int:
        """Weights of all targets, padding not counted."""
        return sum(weight.numel() for weight in self._weights.values())

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are now, detached but not copied."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    def copies(self) -> dict[str, Tensor]:
        """Copies of the weights as they are now, for `restore`."""
        return {name: weight.clone() for name, weight in self.weights().items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write ``weights`` into the model, in place."""
        for name, weight in weights.items():
            self._weights[name].copy_(weight)

    def blocks(self, block_size: int, group_size: int = 1, by_row: bool = False) -> BlockLayout:
        """The block view. See `BlockLayout`."""
        return BlockLayout(self.shapes, block_size, group_size, by_row)

    def row_blocks(self, block_size: int, group_size: int = 1) -> BlockLayout:
        """Blocks inside output rows (dim 0), no longer than the longest row."""
        longest = max((weight[0].numel() for weight in self._weights.values()), default=1)
        return self.blocks(min(block_size, -(-longest // group_size) * group_size), group_size, by_row=True)


def _named_parameters(model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Plain name -> (path in the model, parameter), aliases of tied parameters included."""
    return {plain_name(path): (path, p) for path, p in model.named_parameters(remove_duplicate=False)}


def _prunable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name of a Linear/Conv/attention weight -> its layer, in order of registration."""
    found: dict[str, nn.Module] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        attributes: tuple[str, ...] = ()
        if isinstance(layer, (nn.Linear, *_CONV, *_CONV_TRANSPOSE)):
            attributes = ("weight",)
        elif isinstance(layer, nn.MultiheadAttention):
            attributes = _ATTENTION_WEIGHTS
        for attribute in attributes:
            if isinstance(layer._parameters.get(attribute), nn.Parameter):
                found[plain_name(f"{path}.{attribute}" if path else attribute)] = layer
    return found


def _default_names(model: nn.Module, prunable: list[str]) -> list[str]:
    layers = _prunable_modules(model)
    dense = set(_timm_ends(model, prunable)) or {prunable[0], prunable[-1]} if prunable else set()
    return [name for name in prunable if name not in dense and not _is_depthwise(layers[name])]


def _timm_ends(model: nn.Module, prunable: list[str]) -> list[str]:
    """First layer and classifier of each timm model inside, as its ``pretrained_cfg`` names them."""
    ends: list[str] = []
    for path, module in model.named_modules():
        cfg = getattr(module, "pretrained_cfg", None)
        if not isinstance(cfg, Mapping):
            continue
        prefix = plain_name(path + ".") if path else ""
        inside = [name for name in prunable if name.startswith(prefix)]
        for key, fallback in (("first_conv", inside[:1]), ("classifier", prunable[-1:])):
            value = cfg.get(key) or ()
            names = [f"{prefix}{v}.weight" for v in ((value,) if isinstance(value, str) else value)]
            found = [name for name in names if name in prunable]
            ends += found or fallback
    return ends


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, (*_CONV, *_CONV_TRANSPOSE)) and 1 < layer.groups == layer.in_channels


def _globs(argument: str, patterns: Sequence[str]) -> Sequence[str]:
    if isinstance(patterns, str):
        raise TargetError(f"{argument}={patterns!r} is a string. Give a list of patterns: {argument}=[{patterns!r}].")
    if argument == "include" and not patterns:
        raise TargetError("include=[] selects nothing. Leave include out for the default targets.")
    return patterns


def _match(glob: str, parameters: Mapping[str, object], prunable: Sequence[str], argument: str) -> list[str]:
    """Names that ``glob`` selects: prunable weights by glob, any parameter by its exact name."""
    if glob in parameters:
        return [glob]
    names = [name for name in prunable if fnmatch.fnmatchcase(name, glob)]
    if names:
        return names
    others = [name for name in parameters if fnmatch.fnmatchcase(name, glob)]
    if others:
        raise TargetError(
            f"{argument}: {glob!r} matches only {_some(others)}, which are not weights of a Linear, Conv or "
            "MultiheadAttention layer. Give the exact name of a parameter that you do want pruned."
        )
    near = difflib.get_close_matches(glob, list(prunable), n=3, cutoff=0.0)
    raise TargetError(f"{argument}: {glob!r} matches no parameter of the model. Near names: {_some(near)}.")


def _more_frozen(parameters: Mapping[str, tuple[str, nn.Parameter]], names: Sequence[str]) -> str:
    frozen = [name for name in names if not parameters[name][1].requires_grad]
    return f" (like {len(frozen) - 1} other targets, last {frozen[-1]!r})" if len(frozen) > 1 else ""


def _refuse_frozen_and_tied(
    model: nn.Module, parameters: Mapping[str, tuple[str, nn.Parameter]], names: Sequence[str]
) -> None:
    aliases: dict[tuple[torch.device, int], list[str]] = {}
    for name, (_, parameter) in parameters.items():
        if not nn.parameter.is_lazy(parameter) and parameter.device.type != "meta":
            aliases.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append(name)
    shared = {name: group for group in aliases.values() if len(group) > 1 for name in group}
    for name in names:
        parameter = parameters[name][1]
        if not parameter.requires_grad:
            raise TargetError(
                f"target {name!r} is frozen (requires_grad=False), so it has no gradient{_more_frozen(parameters, names)}. "
                f"Unfreeze it, or leave it out with exclude=[{name!r}] or a glob."
            )
        others = [n for n in shared.get(name, ()) if n != name and _overlap(parameters[n][1], parameter)]
        if others:
            raise TargetError(
                f"target {name!r} is tied: it shares its memory with {_some(others)}. Untie the weights or leave them "
                f"out with exclude=[{name!r}]."
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage really overlap (flattened parameters share a storage without overlap)."""
    return a.data_ptr() < _end(b) and b.data_ptr() < _end(a)


def _end(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "") if names else "none"


def measured_sparsity(targets: Targets) -> float:
    """Zeros among the targets' weights as they are, whatever the masks say."""
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in targets.weights().values())
    return zeros / targets.numel
