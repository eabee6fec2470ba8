"""Units: what goes together when a model is to get smaller: attention heads, MLP neurons, convolution channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, DataError, TargetError
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.sparsity.unit_group import Kind, Layer, Slice, UnitGroup, Width
from lightning_cap.sparsity.unit_table import UnitRecord, as_table, left_as_it_is, unit_records
from lightning_cap.sparsity.unit_tracing import trace_units
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.compiled import plain_name

__all__ = ["Kind", "Layer", "Slice", "UnitGroup", "UnitRecord", "Units", "Width"]


class Units(Mapping[str, UnitGroup]):
    """All groups of units of a model: ``{group name: UnitGroup}``.

    Args:
        groups: In the order of the forward pass.
        layers: Those whose cost depends on the groups.
        flops: Of the whole model on one example.
        skipped: ``{layer name: why its width is not pruned}``.

    Attributes:
        summary: How many units of which kind there are, and what is left as it is, in one line.
    """

    def __init__(
        self,
        groups: Iterable[UnitGroup],
        layers: Iterable[Layer] = (),
        flops: int = 0,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self._groups = {group.name: group for group in groups}
        self.layers, self.flops, self.skipped = tuple(layers), flops, dict(skipped or {})
        if not self._groups:
            raise TargetError("units: the model has none that could be pruned. Name groups with include=[...].")

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        example_input: Any,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> Units:
        """Find the units of a model by tracing a copy of it with torch-pruning (``pip install "lightning-cap[structured]"``).

        What is found is tested by forward passes on the copy; groups that fail are left out. The model is left as it is.

        Args:
            model: Any module whose forward pass autograd can follow.
            example_input: What the model takes, with a batch dim: a tensor, a tuple of arguments, or a dict of named ones.
            include: Globs (``*``, ``?``, ``[...]``, case-sensitive) over names of groups. Default: all groups but those whose
                channels pass a LayerNorm together, as the embeddings of a transformer do.
            exclude: Globs over names of groups to leave out again.

        Raises:
            TargetError: A glob matches no group (near names are given), or there is none that can be pruned.
            ConfigError: An argument is of the wrong kind.
            UnsupportedError: The forward pass fails or cannot be traced (the layer is named), or torch-pruning is missing.
        """
        found = trace_units(model, example_input, include, exclude)
        if not found.groups:
            raise TargetError(
                f"model={type(model).__name__}: it has no units that could be pruned; left as it is: "
                f"{left_as_it_is(found.skipped) or 'nothing, as there is no layer'}. Use a pruner of weights, such as CAP()."
            )
        return cls(found.groups, found.layers, found.flops, found.skipped)

    def __getitem__(self, name: str) -> UnitGroup:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        """Short: ``Units(36 heads in 12 groups, 9216 neurons in 12 groups)``."""
        return f"Units({self._counts()})"

    def __str__(self) -> str:
        """The table of all groups, and what is left as it is."""
        return "\n".join([self.table(), *([self.summary.partition("; ")[2]] if self.skipped else [])])

    @property
    def summary(self) -> str:
        """Units by kind, and what is left as it is, in one line."""
        return self._counts() + (f"; left as it is: {left_as_it_is(self.skipped)}" if self.skipped else "")

    def _counts(self) -> str:
        parts = []
        for kind in get_args(Kind):
            sizes = [group.size for group in self.values() if group.kind == kind]
            if sizes:
                parts.append(f"{sum(sizes)} {kind}s in {len(sizes)} group{'s' if len(sizes) > 1 else ''}")
        return ", ".join(parts)

    def records(self, model: nn.Module | None = None) -> list[UnitRecord]:
        """What each group has: name, kind, units, weights and multiply-adds of one unit of the dense model.

        Args:
            model: Whose units they are, for the weights of a unit. Default: these are not counted (None).

        Raises:
            TargetError: The model is another one.
        """
        require_instance(
            "model", model, nn.Module, "the torch model that the units are of", optional=True, error=TargetError
        )
        return unit_records(list(self.values()), self.layers, None if model is None else self.targets(model).shapes)

    def table(self, model: nn.Module | None = None) -> str:
        """`records` as lines of text, with a heading."""
        return as_table(self.records(model))

    @property
    def sizes(self) -> dict[str, int]:
        """Group -> number of its units."""
        return {name: group.size for name, group in self.items()}

    def targets(self, model: nn.Module) -> Targets:
        """All parameters that units have entries in, as targets whose ``units`` these are.

        Raises:
            TargetError: The model is another one: a parameter is not there, or too short.
        """
        require_instance("model", model, nn.Module, "the torch model that the units are of", error=TargetError)
        found = {plain_name(path): (path, parameter) for path, parameter in model.named_parameters()}
        for group in self.values():
            for part in group.slices:
                shape = tuple(found[part.name][1].shape) if part.name in found else None
                if shape is None or part.dim >= len(shape) or int(part.index.max()) >= shape[part.dim]:
                    raise TargetError(
                        f"model={shown(model)}: units of {group.name!r} have entries of {part.name!r}, which "
                        f"{'it does not have' if shape is None else f'has shape {shape} here'}. Give the model that they are of."
                    )
        names = dict.fromkeys(part.name for group in self.values() for part in group.slices)
        ordered = [name for name in found if name in names]
        targets = Targets({n: found[n][1] for n in ordered}, {n: found[n][0] for n in ordered})
        targets.units = self
        left = {f"{layer}.weight": why for layer, why in self.skipped.items()}
        targets.dense = {name: why for name, why in left.items() if name in found and name not in targets}
        counts, _, rest = self.summary.partition("; ")
        targets.summary = f"{counts}; {targets.numel} weights belong to them" + (f"; {rest}" if rest else "")
        return targets

    def masks(self, shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of weights in which all entries of pruned units are False.

        Args:
            shapes: ``{target: shape}``, such as ``targets.shapes``.
            kept: ``{group: bool (size)}``, True = kept.

        Returns:
            ``{target: bool (*shape)}`` on the CPU.
        """
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
        for name, group in self.items():
            pruned = ~kept[name].cpu()
            for part in group.slices if bool(pruned.any()) else ():
                masks[part.name].index_fill_(part.dim, part.entries(pruned), False)
        return masks

    def kept(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which units masks keep: ``{group: bool (size)}`` on the CPU.

        Args:
            masks: ``{target: bool (*shape)}``; targets that are not there are whole.

        Raises:
            ConfigError: A unit is pruned in part: some of its rows, columns and entries are masked, others are not.
        """
        kept = {}
        for name, group in self.items():
            gone = [_gone(part, masks[part.name].cpu()) for part in group.slices if part.name in masks]
            lines = torch.cat(gone, dim=1) if gone else torch.zeros(group.size, 1, dtype=torch.bool)
            broken = (lines.any(1) & ~lines.all(1)).nonzero().flatten()
            if len(broken) or len(gone) not in (0, len(group.slices)):
                raise ConfigError(
                    f"masks: {len(broken)} units of {name!r}, first {int(broken[0]) if len(broken) else 0}, are masked in part. "
                    "Give masks that a pruner of units has made, or mask all rows, columns and entries of a unit."
                )
            kept[name] = ~lines.all(1)
        return kept

    def nonzero(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which units have any weight that is not zero: ``{group: bool (size)}`` on the CPU."""
        gone = {
            name: torch.cat([_gone(part, weights[part.name].detach().cpu() != 0) for part in group.slices], dim=1)
            for name, group in self.items()
        }
        return {name: ~lines.all(1) for name, lines in gone.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, as checkpoints may hold them."""
        roles = ("producers", "norms", "consumers", "buffers")
        return {
            "groups": [
                {
                    "name": group.name,
                    "kind": group.kind,
                    "size": group.size,
                    **{role: [[s.name, s.dim, s.index] for s in getattr(group, role)] for role in roles},
                }
                for group in self.values()
            ],
            "layers": [
                {"name": layer.name, "flops": layer.flops, "widths": [[w.full, dict(w.per_unit)] for w in layer.widths]}
                for layer in self.layers
            ],
            "flops": self.flops,
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_state(cls, state: Any) -> Units:
        """What `state_dict` was taken of.

        Raises:
            DataError: It is something else.
        """
        try:
            groups = [
                UnitGroup(
                    entry["name"],
                    entry["kind"],
                    int(entry["size"]),
                    *(
                        tuple(Slice(str(n), int(d), torch.as_tensor(i)) for n, d, i in entry[role])
                        for role in ("producers", "norms", "consumers", "buffers")
                    ),
                )
                for entry in state["groups"]
            ]
            layers = [
                Layer(entry["name"], int(entry["flops"]), tuple(Width(int(f), dict(per)) for f, per in entry["widths"]))
                for entry in state["layers"]
            ]
            return cls(groups, layers, int(state["flops"]), cast("Mapping[str, str]", state["skipped"]))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DataError(f"units: what was saved of them is damaged ({type(error).__name__}: {error}).") from error


def _gone(part: Slice, mask: Tensor) -> Tensor:
    """``(size, width)``: which lines along the slice's dim have no entry that is kept."""
    other = [dim for dim in range(mask.dim()) if dim != part.dim]
    lines = ~(mask.any(dim=other) if other else mask)
    return lines[part.index]


def units_of(targets: Targets) -> Units:
    """The units that targets are the weights of.

    Raises:
        TargetError: They are of none.
    """
    require_targets(targets)
    if targets.units is None:
        raise TargetError(
            f"targets={targets!r}: there are no units in them, but single weights. Use "
            "Units.from_model(model, example_input).targets(model), or a pruner of weights such as CAP()."
        )
    return targets.units


def gates_of(targets: Targets) -> Targets:
    """The targets whose gradients tell those of the gates."""
    return _some(targets, {part.name for group in units_of(targets).values() for part in group.gates})


def consumers_of(targets: Targets) -> Targets:
    """The weights that read units."""
    return _some(targets, {part.name for group in units_of(targets).values() for part in group.consumers})


def _some(targets: Targets, names: set[str]) -> Targets:
    chosen = [name for name in targets if name in names]
    return Targets({name: targets[name] for name in chosen}, {name: targets.paths[name] for name in chosen})
