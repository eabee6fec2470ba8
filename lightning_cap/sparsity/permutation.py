"""Channel permutation: channels change places so that N:M groups of the weights that read them keep more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, PatternError, TargetError
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.sparsity.permutation_search import best_order, kept_score
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.unit_group import Slice, UnitGroup
from lightning_cap.sparsity.unit_tracing import check_of
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.compiled import plain_name

TWO_OF_FOUR = NofM(2, 4)


@dataclass(frozen=True)
class ChannelOrders:
    """What `permute_channels` has done.

    Attributes:
        orders: ``{group: (units,) int64}``, which unit of before each place has now; groups that stay as they are left out.
        before: Share of the score that the pattern kept of the weights that read the groups.
        after: The same, now.
    """

    orders: Mapping[str, Tensor]
    before: float
    after: float

    def __repr__(self) -> str:
        """Short: no tensors."""
        return f"ChannelOrders({len(self.orders)} groups, kept {self.before:.4f} before, {self.after:.4f} after)"


def permute_channels(
    model: nn.Module,
    example_input: Any,
    pattern: NofM = TWO_OF_FOUR,
    scores: Mapping[str, Tensor] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> ChannelOrders:
    """Reorder channels in place so that N:M pruning keeps more; the model computes the same (Pool & Yu 2021).

    An order is folded into all that makes and reads the channels: neurons of an MLP, channels of convolutions with the norms
    that they pass, the widths of residual streams, and the values inside each attention head. What reads the inputs of the
    model, or channels that `Units` cannot tell apart, stays as it is: no index is added at run time. Use it before pruning, and
    before an optimizer is made, whose state would not follow.

    Args:
        model: Changed in place.
        example_input: What it takes, with a batch dim. See `Units.from_model`.
        pattern: The N:M pattern that the model is pruned to afterwards. Default: 2:4.
        scores: ``{weight: (*shape)}``, not negative, what each weight matters, such as ``w²·E[x²]``, in the order before. Weights
            that are not there do not count. Default: ``w²`` of the default targets.
        include: Globs over names of groups of units. Default: all.
        exclude: Globs over names of groups that stay as they are.

    Raises:
        ConfigError: An argument is of the wrong kind, or scores do not fit the model.
        PatternError: ``pattern`` is no N:M pattern.
        TargetError: A glob matches no group, or the model has none.
        UnsupportedError: The model cannot be traced, or torch-pruning is missing.
    """
    require_instance("model", model, nn.Module, "timm.create_model('resnet18')", error=TargetError)
    require_instance("pattern", pattern, NofM, "NofM(2, 4)", error=PatternError)
    require_instance("scores", scores, Mapping, '{"fc.weight": model.fc.weight.square()}', optional=True)
    tensors: dict[str, Tensor] = {plain_name(n): t for n, t in model.named_parameters(remove_duplicate=False)}
    tensors |= {plain_name(n): t for n, t in model.named_buffers(remove_duplicate=False)}
    if scores is None:
        scores = {name: weight.square() for name, weight in Targets.from_model(model).weights().items()}
    _check_scores(scores, tensors)
    units = Units.from_model(model, example_input, ["*"] if include is None else include, exclude)
    orders, before, after, total = {}, 0.0, 0.0, 0.0
    for group in _groups(units, model, example_input, pattern.m):
        read = [part for part in group.consumers if part.name in scores and _is_aligned(part, pattern.m)]
        if not read:
            continue
        columns = torch.cat([_columns(scores[part.name].detach(), part) for part in read])
        order = best_order(columns, pattern.n, pattern.m)
        old, new = (kept_score(x, pattern.n, pattern.m) for x in (columns, columns[:, order.to(columns.device)]))
        before, after, total = before + old, after + max(old, new), total + float(columns.sum(dtype=torch.float64))
        if new > old:
            orders[group.name] = order
            for part in (*group.slices, *group.buffers):
                _permute(tensors[part.name], part, order)
    return ChannelOrders(orders, before / (total or 1.0), after / (total or 1.0))


def _check_scores(scores: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    if not scores:
        raise ConfigError(
            "scores={}: no weight has any. Give those of the weights that are pruned, or leave scores out."
        )
    for name, score in scores.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if not isinstance(score, Tensor) or tuple(score.shape) != shape:
            there = "there is no such weight" if shape is None else f"the weight has shape {shape}"
            given = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else shown(score)
            raise ConfigError(f"scores: {shown(name)} is {given}, but {there}. Give a tensor of its shape.")
        if not bool(((score >= 0) & score.isfinite()).all()):
            raise ConfigError(f"scores: {name!r} has negative or infinite entries, or NaN. Give saliencies such as w².")


def _groups(units: Units, model: nn.Module, example_input: Any, size: int) -> Iterator[UnitGroup]:
    """Channels that may change places; of heads those of the values inside each one, once they are known to be that."""
    heads = [group for group in units.values() if group.kind == "head"]
    yield from (group for group in units.values() if group.kind != "head" and not group.size % size)
    if heads:
        check = check_of(model, example_input)
        for group in heads:
            right = (parts for parts in _values(group, size) if not check.wrong(parts))
            yield from next(right, [])


def _values(group: UnitGroup, size: int) -> Iterator[list[UnitGroup]]:
    """What may be the values of heads, as groups of one head each: the last part of a layer that makes all of them first."""
    width = group.consumers[0].index.shape[1] if group.consumers else 0
    if not width or width % size or any(part.index.shape[1] != width for part in group.consumers):
        return
    makers = dict.fromkeys(part.name.rpartition(".")[0] for part in group.producers)
    for maker in reversed(list(makers)):
        made = [part for part in group.producers if part.name.rpartition(".")[0] == maker]
        widths = {part.index.shape[1] for part in made}
        if len(widths) != 1 or (wide := widths.pop()) % width:
            continue
        for first in reversed(range(0, wide, width)):
            yield [
                UnitGroup(
                    f"{group.name}.{head}",
                    "channel",
                    width,
                    tuple(_of_head(part, head, first, width) for part in made),
                    (),
                    tuple(_of_head(part, head, 0, width) for part in group.consumers),
                )
                for head in range(group.size)
            ]


def _of_head(part: Slice, head: int, first: int, width: int) -> Slice:
    return Slice(part.name, part.dim, part.index[head, first : first + width].unsqueeze(1))


def _is_aligned(part: Slice, size: int) -> bool:
    """Whether the columns of a weight are one for each unit, next to one another, from the first of an N:M group on."""
    first, width = int(part.index[0, 0]), part.index.shape[1]
    straight = torch.arange(first, first + len(part.index), device=part.index.device)
    return part.dim == 1 and width == 1 and first % size == 0 and torch.equal(part.index[:, 0], straight)


def _columns(scores: Tensor, part: Slice) -> Tensor:
    """``(R, units)``: a row for each output and kernel position."""
    return scores.index_select(1, part.index[:, 0].to(scores.device)).movedim(1, -1).flatten(0, -2)


@torch.no_grad()
def _permute(tensor: Tensor, part: Slice, order: Tensor) -> None:
    there, here = (index.flatten().to(tensor.device) for index in (part.index, part.index[order]))
    tensor.index_copy_(part.dim, there, tensor.index_select(part.dim, here))
