"""A schedule that finds its sparsities in the weights, by how unequal these are: the PQ index of Diao et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError, ScheduleError
from lightning_cap.schedules.base import (
    SparsitySchedule,
    check_events,
    every,
    require_epoch,
    require_sparsity,
)
from lightning_cap.utilities.arguments import require_instance, require_real, require_whole, shown
from lightning_cap.utilities.decimals import round_share


@dataclass(frozen=True)
class PQAdaptive(SparsitySchedule):
    """Prune at given epochs as far as the weights of that moment allow (Diao et al. 2023, SAP, algorithm 1).

    An event takes the ``d`` weights of all targets that are left. Their PQ index ``I``, see `pq_index`, bounds from below how
    many of them are needed (theorem 2): where all but the ``r`` largest sum up, as ``|w|^p``, to at most ``eta`` times what
    these do, ``r >= d (1 + eta)^(-q / (q - p)) (1 - I)^(pq / (q - p))``. With the smallest such ``r`` it prunes
    ``floor(d min(gamma (1 - r/d), beta))`` more: many where few weights are much larger than all others, none where all are
    alike, about 15 % of normal ones. Training goes on from the weights that are left; the paper's own runs go back to those at
    the start.

    Which weights go is up to the pruner. The sparsities, and so the names of checkpoints, are known when the events come. Where
    one finds nothing to prune, as when ``max_sparsity`` is reached, it only begins a new cycle. For pruners of single weights in
    a pattern of any sparsity, that let none grow back; not for sharded weights (FSDP2).

    Args:
        start_epoch: Epoch (counted from 0) of the first event.
        end_epoch: Epoch of the last event at the latest.
        frequency: Epochs between two events.
        max_sparsity: The sparsity beyond which nothing is pruned, above 0 and below 1.
        p: Of the index, above 0.
        q: Of the index, above ``p``.
        eta: Share of the sum that may be lost, at least 0. More of it prunes more.
        gamma: Factor of what the bound lets go, above 0.
        beta: Largest share of the weights left that one event prunes, above 0 and below 1.

    Raises:
        ScheduleError: If a value is out of range or the epochs are not in order.
    """

    start_epoch: int
    end_epoch: int
    frequency: int = 1
    max_sparsity: float = 0.95
    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        require_epoch("start_epoch", self.start_epoch)
        require_epoch("end_epoch", self.end_epoch)
        if self.end_epoch < self.start_epoch:
            raise ScheduleError(
                f"end_epoch={self.end_epoch!r}: it is before start_epoch={self.start_epoch!r}. Raise it, or begin earlier."
            )
        require_whole("frequency", self.frequency, example=5, error=ScheduleError)
        require_real("max_sparsity", self.max_sparsity, "(0, 1)", example=0.95, error=ScheduleError)
        _require_exponents(self.p, self.q, ScheduleError)
        require_real("eta", self.eta, "[0, inf)", example=0.0, error=ScheduleError)
        require_real("gamma", self.gamma, "(0, inf)", example=1.0, error=ScheduleError)
        require_real("beta", self.beta, "(0, 1)", example=0.9, error=ScheduleError)
        every(self.frequency, self.start_epoch, self.end_epoch + 1)

    @property
    def adapts(self) -> bool:
        """Yes."""
        return True

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """``max_sparsity``, the most that it may be, every ``frequency`` epochs; see `SparsitySchedule.events`."""
        epochs = every(self.frequency, self.start_epoch, self.end_epoch + 1)
        return check_events(dict.fromkeys(epochs, self.max_sparsity), max_epochs)

    def adapted(self, planned: float, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float | None:
        """What the PQ index of the weights that are left allows, ``planned`` at most; see `SparsitySchedule.adapted`."""
        require_sparsity("planned", planned)
        require_instance("weights", weights, Mapping, "targets.weights()", error=ScheduleError)
        require_instance("masks", masks, Mapping, "{target: bool tensor of its shape}", error=ScheduleError)
        for name, weight in weights.items():
            mask = masks.get(name)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
                raise ScheduleError(
                    f"masks={shown(masks)}: give {name!r} a bool tensor of shape {tuple(weight.shape)}."
                )
        total = sum(weight.numel() for weight in weights.values())
        left, share = _share([(weight.detach(), masks[name]) for name, weight in weights.items()], self.p, self.q)
        needed = math.exp(self.q / (self.q - self.p) * (self.p * share - math.log1p(self.eta)))  # r / d
        pruned = math.floor(left * min(self.gamma * (1 - needed), self.beta))
        present, most = total - left, round_share(planned, total)
        if pruned < 1 or present >= most:
            return None
        return (present + pruned) / total if present + pruned < most else planned


def pq_index(weights: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """The PQ index of weights ``(*shape)``: ``1 - d^(1/q - 1/p) ||w||_p / ||w||_q`` (Diao et al. 2023, definition 1).

    0 where all ``d`` are equal in size, ``1 - d^(1/q - 1/p)`` where one alone is not zero; the scale of the weights does not
    matter. It is 0 where all are zero. Computed in float64, on the CPU.

    Args:
        weights: Any tensor of finite real numbers.
        p: Above 0.
        q: Above ``p``.

    Raises:
        ConfigError: An argument is of the wrong kind or out of range.
    """
    require_instance("weights", weights, Tensor, "model.fc.weight")
    if weights.numel() == 0 or weights.is_complex():
        raise ConfigError(f"weights={shown(weights)}: give a tensor of real numbers, with one at least.")
    _require_exponents(p, q, ConfigError)
    return max(0.0, -math.expm1(_share([(weights.detach(), None)], p, q)[1]))


def _require_exponents(p: object, q: object, error: type[ConfigError]) -> None:
    require_real("p", p, "(0, inf)", example=0.5, error=error)
    require_real("q", q, "(0, inf)", example=1.0, error=error)
    if q <= p:  # type: ignore[operator]
        raise error(f"q={q!r}: it is not above p={p!r}. Give such as p=0.5, q=1.0.")


def _share(parts: Sequence[tuple[Tensor, Tensor | None]], p: float, q: float) -> tuple[int, float]:
    """How many weights masks keep, and ``log(1 - I)`` of them: at most 0, but for rounding.

    Sizes are divided by the largest, so that no power leaves the range of floats.
    """
    count = sum(weight.numel() if mask is None else int(mask.sum()) for weight, mask in parts)
    largest = max((float(sizes.max()) for sizes in map(_sizes, parts) if sizes.numel()), default=0.0)
    if not math.isfinite(largest):
        raise ConfigError("weights: one is not finite (NaN or inf). Give those of a sound model.")
    if not largest:
        return count, 0.0
    low = high = 0.0
    for part in parts:
        sizes = _sizes(part).cpu().double() / largest
        low, high = low + float((sizes**p).sum()), high + float((sizes**q).sum())
    return count, (1 / q - 1 / p) * math.log(count) + math.log(low) / p - math.log(high) / q


def _sizes(part: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, mask = part
    return (weight if mask is None else weight[mask]).abs()
