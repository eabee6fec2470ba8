"""Which parameters are pruned. A *target* is a weight tensor that may be; `Targets` is the ordered set of them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_cap.errors import TargetError, UnsupportedError
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.ends import PENDING, Ends
from lightning_cap.sparsity.layers import computed_weights, is_depthwise, prunable_layers
from lightning_cap.utilities import distributed, sharded
from lightning_cap.utilities.arguments import require_instance, require_names, shown
from lightning_cap.utilities.compiled import plain_name

if TYPE_CHECKING:
    from lightning_cap.sparsity.units import Units

_NAMED = 4  # layers that a summary names of those that are dense for one reason


class Targets(Mapping[str, Tensor]):
    """The ordered set of weights to prune: ``{parameter name: weight of shape (*shape)}``.

    Names are the model's own, less the ``_orig_mod.`` of compiled modules. The tensors are the live parameters, so
    a `Targets` follows the training of its model. Of a model that `fully_shard` has shared out over processes they are sharded
    ones, which are looked up in the model anew at each use; shapes and counts are those of the whole.

    Args:
        weights: The tensors by name, in the order in which they are laid out.
        paths: The name under which each is found in the model (differs in compiled modules). Default: the same.

    Attributes:
        ends: The first and last layers that were left out; None where they were not asked for.
        dense: Why each other weight of a layer is left dense, as ``{"head.weight": "last"}``; empty if not by `from_model`.
        units: What is pruned together, where units are pruned (see `Units.targets`); else None.
        summary: What is pruned and what is left dense, and why, in one line; empty if not made by `from_model`.

    Raises:
        TargetError: There is no target, or one is empty or not of a floating-point type.
        UnsupportedError: One is sharded in another way than by rows over all processes, or only some are.
    """

    def __init__(self, weights: Mapping[str, Tensor], paths: Mapping[str, str] | None = None) -> None:
        require_instance("weights", weights, Mapping, '{"fc.weight": model.fc.weight}', error=TargetError)
        require_instance("paths", paths, Mapping, '{"fc.weight": "fc.weight"}', optional=True, error=TargetError)
        if not weights:
            raise TargetError("targets: there is no weight to prune. Give at least one Linear or Conv weight.")
        for name, weight in weights.items():
            if not isinstance(name, str) or not isinstance(weight, Tensor):
                raise TargetError(f"weights={shown(weights)}: {shown(name)} -> {shown(weight)} is no name with a tensor. Give "
                                  "such pairs, or use Targets.from_model(model).")  # fmt: skip
            if paths and name not in paths:
                raise TargetError(f"paths={shown(paths)}: {name!r} has no path. Give one for every weight.")
            if nn.parameter.is_lazy(weight):
                raise TargetError(f"target {name!r} is not initialised yet. Run one forward pass before pruning.")
            if not weight.is_floating_point():
                raise TargetError(f"target {name!r} is of type {weight.dtype}. Only real floating-point weights can be "
                                  "pruned; exclude it.")  # fmt: skip
            sharded.check_sharding(name, weight)
            if weight.numel() == 0:
                raise TargetError(f"target {name!r} is empty (shape {tuple(weight.shape)}). Exclude it.")
        split = [name for name, weight in weights.items() if sharded.is_sharded(weight)]
        if split and len(split) < len(weights):
            other = next(name for name in weights if name not in split)
            raise UnsupportedError(
                f"target {other!r} is not sharded, and {split[0]!r} is. Call fully_shard on the whole model too, or exclude one."
            )
        self._weights = dict(weights)
        self._paths = {name: paths[name] if paths else name for name in weights}
        self._places: dict[str, tuple[nn.Module, nn.Module, str]] = {}  # of sharded ones: model, owner, name in it
        self.ends: Ends | None = None
        self.units: Units | None = None
        self.dense: dict[str, str] = {}
        self.summary = ""

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        ends: Ends | None = None,
    ) -> Targets:
        """Choose targets: all Linear, Conv and MultiheadAttention weights but some, or those named.

        Args:
            model: Any module.
            include: Globs (``*``, ``?``, ``[...]``, case-sensitive) over the weights of Linear, Conv and
                MultiheadAttention layers, or exact names of any parameter. They replace the default, which is all of those
                weights but the first layers, the last ones (heads), depthwise convolutions, and what is frozen.
            exclude: Globs or names to leave out again.
            ends: The first and last layers, as `find_ends` reads them off a forward pass. Default: the first and the last by
                order of registration, or those that a timm model anywhere inside names, which is wrong for models with several
                heads or none, or with another model beside. ``include`` needs none.

        Raises:
            TargetError: A pattern matches nothing (near names are given), nothing is left to prune, or a chosen
                weight is tied, or named by ``include`` and frozen.
        """
        require_instance("model", model, nn.Module, "a torch model", error=TargetError)
        require_instance(
            "ends", ends, Ends, "find_ends(model, lambda: model(x).sum())", optional=True, error=TargetError
        )
        require_names("include", include, error=TargetError)
        require_names("exclude", exclude, error=TargetError)
        sharded.reshard(model)
        parameters = _named_parameters(model)
        layers, computed = prunable_layers(model), computed_weights(model)
        reasons: dict[str, str] = dict(computed)
        if include is None:
            if ends is None:
                ends = Ends.registered(model, "no forward pass was run")
            names = list(layers)
            reasons |= _dense_by_default(layers, parameters, ends)
        else:
            ends = None
            chosen = matches("include", include, parameters, layers, computed)
            names = [name for name in parameters if name in chosen]
            reasons |= dict.fromkeys([name for name in layers if name not in chosen], "not in include")
        reasons |= dict.fromkeys(matches("exclude", exclude or (), parameters, parameters, computed), "excluded")
        names = [name for name in names if name not in reasons]
        dense = {name: reasons[name] for name in (*layers, *computed) if name in reasons}
        if not names:
            raise TargetError(
                f"include/exclude: the model has no prunable weight left; dense: {_groups(dense) or 'none'}. Name weights with "
                "include=[...], or unfreeze those that are frozen."
            )
        if ends is not PENDING:  # else a tied head may be among them
            _refuse_frozen_and_tied(model, parameters, names)
        targets = cls({name: parameters[name][1] for name in names}, {name: parameters[name][0] for name in names})
        if targets.is_sharded:
            targets._places = {name: _place(model, targets._paths[name]) for name in names}
        targets.ends, targets.dense = ends, dense
        targets.summary = _summary(model, targets, dense, ends)
        return targets

    def __getitem__(self, name: str) -> Tensor:
        return sharded.parameter(*self._places[name]) if name in self._places else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        """Short: ``Targets(48 of 5308416 weights, first 'blocks.0.attn.qkv.weight')``."""
        return f"Targets({len(self)} of {self.numel} weights, first {next(iter(self))!r})"

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds some rows of every target."""
        return sharded.any_sharded(self._weights)

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
        return {name: weight.detach() for name, weight in self.items()}

    def copies(self) -> dict[str, Tensor]:
        """Copies of the weights as they are now, for `restore`."""
        return {name: weight.clone() for name, weight in self.weights().items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write ``weights`` into the model, in place."""
        for name, weight in weights.items():
            self[name].copy_(weight)

    def blocks(self, block_size: int, group_size: int = 1, by_row: bool = False) -> BlockLayout:
        """The block view. See `BlockLayout`."""
        return BlockLayout(self.shapes, block_size, group_size, by_row)

    def row_blocks(self, block_size: int, group_size: int = 1) -> BlockLayout:
        """Blocks inside output rows (dim 0), no longer than the longest row."""
        longest = max((weight[0].numel() for weight in self._weights.values()), default=1)
        return self.blocks(min(block_size, -(-longest // group_size) * group_size), group_size, by_row=True)


def _place(model: nn.Module, path: str) -> tuple[nn.Module, nn.Module, str]:
    """Where `sharded.parameter` finds a parameter."""
    owner, _, name = path.rpartition(".")
    return model, model.get_submodule(owner), name


def _named_parameters(model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Plain name -> (path in the model, parameter), aliases of tied parameters included."""
    return {plain_name(path): (path, p) for path, p in model.named_parameters(remove_duplicate=False)}


def _dense_by_default(
    layers: Mapping[str, nn.Module], parameters: Mapping[str, tuple[str, nn.Parameter]], ends: Ends
) -> dict[str, str]:
    """Name -> why it is no target by default."""
    reasons = dict.fromkeys(ends.unreached, "no gradient")
    reasons |= {name: "depthwise" for name, layer in layers.items() if is_depthwise(layer)}
    reasons |= dict.fromkeys(ends.last, "last") | dict.fromkeys(ends.first, "first")
    return reasons | {name: "frozen" for name in layers if not parameters[name][1].requires_grad}


def matches(
    argument: str,
    globs: Sequence[str],
    parameters: Mapping[str, object],
    among: Mapping[str, object],
    computed: Mapping[str, str],
) -> set[str]:
    """Names that any of ``globs`` selects.

    Args:
        argument: What the user calls the globs.
        globs: Or exact names of parameters.
        parameters: All, by plain name.
        among: What globs choose from.
        computed: Weights that are no parameters -> by what they are computed.

    Raises:
        TargetError: One matches nothing (near names are given), or ``include`` is empty.
    """
    if argument == "include" and not globs:
        raise TargetError("include=[] selects nothing. Leave include out for the default targets.")
    return {name for glob in globs for name in _match(glob, parameters, among, computed, argument)}


def _match(
    glob: str, parameters: Mapping[str, object], among: Mapping[str, object], computed: Mapping[str, str], argument: str
) -> list[str]:
    """Names that ``glob`` selects: those of ``among`` by glob, any parameter by its exact name."""
    if glob in parameters:
        return [glob]
    names = [name for name in among if fnmatch.fnmatchcase(name, glob)]
    made = [name for name in computed if fnmatch.fnmatchcase(name, glob)]
    if names or (made and argument == "exclude"):
        return names + made
    if made:
        raise TargetError(
            f"{argument}: {glob!r} matches only weights that are no parameters, {_groups(computed)}. Take that off first, as "
            "torch.nn.utils.remove_weight_norm, torch.nn.utils.parametrize.remove_parametrizations or "
            "torch.nn.utils.prune.remove does."
        )
    others = [name for name in parameters if fnmatch.fnmatchcase(name, glob)]
    if others:
        raise TargetError(
            f"{argument}: {glob!r} matches only {_some(others)}, which are not weights of a Linear, Conv or "
            "MultiheadAttention layer. Give the exact name of a parameter that you do want pruned."
        )
    near = difflib.get_close_matches(glob, list(among), n=3, cutoff=0.0)
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
            where = id(parameter) if sharded.is_sharded(parameter) else parameter.untyped_storage().data_ptr()
            aliases.setdefault((parameter.device, where), []).append(name)
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
    if sharded.is_sharded(a):
        return True  # it is the same one
    return a.data_ptr() < _end(b) and b.data_ptr() < _end(a)


def _end(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "") if names else "none"


def _summary(model: nn.Module, targets: Targets, dense: Mapping[str, str], ends: Ends | None) -> str:
    """``48 targets, 92.8 % of 5.7 M weights; dense: patch_embed.proj (first), head (last)``."""
    total = sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
    how = f"; first and last by order of registration: {ends.by_order}" if ends is not None and ends.by_order else ""
    plural = "s" if len(targets) > 1 else ""
    share = f"{len(targets)} target{plural}, {100 * targets.numel / total:.1f} % of {_short(total)} weights"
    return f"{share}; dense: {_groups(dense) or 'none'}{how}"


def _groups(dense: Mapping[str, str]) -> str:
    """``a (first), b (last), 12 frozen (c, d, e, ...)``."""
    names: dict[str, list[str]] = {"first": [], "last": []}
    for name, why in dense.items():
        names.setdefault(why, []).append(name.removesuffix(".weight"))
    parts = []
    for why, group in names.items():
        if len(group) <= _NAMED:
            parts += [f"{name} ({why})" for name in group]
        else:
            parts.append(f"{len(group)} {why} ({', '.join(group[:_NAMED])}, ...)")
    return ", ".join(parts)


def _short(number: int) -> str:
    """``5.7 M``."""
    for size, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def require_targets(targets: object) -> None:
    """Refuse what is no `Targets`, such as the model itself.

    Raises:
        ConfigError: It is something else.
    """
    require_instance("targets", targets, Targets, "Targets.from_model(model)")


def measured_sparsity(targets: Targets) -> float:
    """Zeros among the targets' weights as they are, whatever the masks say. Every process must call it, if they are sharded."""
    parts = [sharded.local(weight) for weight in targets.weights().values()]
    zeros = sum(part.numel() - int(part.count_nonzero()) for part in parts)
    if targets.is_sharded:
        zeros = int(distributed.sum_over_ranks(torch.tensor(zeros, device=targets.device)))
    return zeros / targets.numel
