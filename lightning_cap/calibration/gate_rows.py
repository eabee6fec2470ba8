"""Gradients of gates on units: in one pass over a batch where that can be done, else off the gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.calibration.rows import Loss, RowComputer, largest_difference
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import UnitGroup, Units, gates_of, units_of
from lightning_cap.utilities import rng
from lightning_cap.utilities.memory import is_out_of_memory

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GateComputer(RowComputer):
    """Computes rows ``{group: (n, size)}`` of gradients of a gate of value 1 on each unit.

    All rows of a batch come from one pass forward and back: every sample has gates of its own on the inputs of the layers that
    read units (on the outputs of norms, or of what makes units, where gates are there), and what they are to the sum of all
    losses is what each is to its sample's. This takes a loss that is the mean over samples, and layers that keep the samples in
    dim 0. It is compared with the gradients of weights on the first samples; where the two differ, those are used.

    Args:
        model: In eval mode.
        targets: All weights of units.
        loss: Mean loss of a batch.
        samples_per_gradient: Inputs of one row.
        context: Entered around every loss evaluation.
        scale: Factor on the loss before and off the gradient after.
    """

    way: ClassVar[str] = "computing the gates of all samples at once"

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        samples_per_gradient: int,
        context: Callable[[], AbstractContextManager[Any]],
        scale: float,
    ) -> None:
        super().__init__(model, gates_of(targets), loss, samples_per_gradient, context, scale)
        self._units, self._all = units_of(targets), targets
        spots = find_spots(model, targets)
        self._spots = spots if all(spots.values()) else None
        self._compared = False

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """One gate per unit."""
        return {name: (group.size,) for name, group in self._units.items()}

    def one(self, batch: Any) -> dict[str, Tensor]:
        """The row of all samples of a batch together. See `RowComputer.one`."""
        return gate_gradients(self._units, self._all.weights(), super().one(batch))

    def at_once(self, batch: Any) -> dict[str, Tensor]:
        """A row for each sample of a batch."""
        if self._spots is not None and not self._compared:
            self._compare(batch)
        return self._by_weights(batch) if self._spots is None else self._by_gates(batch, self._spots)

    def _compare(self, batch: Any) -> None:
        """Leave the gates of samples alone if they give anything else than the weights do."""
        assert self._spots is not None
        size = batch_size(batch)
        some = slice_batch(batch, size, 0, min(2, size))
        with rng.preserved():
            wanted = self._by_weights(some)
            try:
                found = self._by_gates(some, self._spots)
                right = largest_difference(found, wanted)[0] <= self.tolerance
            except (UnsuitedError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                right = False
        self._compared = True
        self._spots = self._spots if right else None

    def _by_weights(self, batch: Any) -> dict[str, Tensor]:
        return gate_gradients(self._units, self._all.weights(), super().at_once(batch))

    def _by_gates(self, batch: Any, spots: Mapping[str, list[Spot]]) -> dict[str, Tensor]:
        size = batch_size(batch)
        contexts = (torch.inference_mode(False), torch.enable_grad(), self._context(), PlainNormalization())

        def summed() -> Tensor:
            return self._program(batch).reshape(()) * (self._scale * size)  # type: ignore[no-any-return]

        found = gradients_of_gates(spots, size, self._all.device, summed, contexts)
        return {name: self.unscaled(rows) for name, rows in found.items()}


def gradients_of_gates(
    spots: Mapping[str, Sequence[Spot]],
    samples: int,
    device: torch.device,
    total: Callable[[], Tensor],
    contexts: Sequence[AbstractContextManager[Any]],
) -> dict[str, Tensor]:
    """Gradients of a scalar by gates of value 1 that every sample has on each unit.

    Args:
        spots: Where the gates of each group are.
        samples: How many there are in dim 0 of what goes through the model.
        device: Of the gates.
        total: Computes the scalar by a forward pass.
        contexts: Entered around it and the way back, in this order, after the gates are in place.

    Returns:
        ``{group: (samples, size)}``.

    Raises:
        UnsuitedError: A tensor has not the channels or samples, or the scalar does not depend on the gates of a group.
    """
    single = {spot.key: spot for found in spots.values() for spot in found}
    gates = {k: torch.ones(samples, spot.channels, device=device, requires_grad=True) for k, spot in single.items()}
    with ExitStack() as stack:
        for key, spot in single.items():
            stack.callback(spot.install(gates[key]))
        for context in contexts:
            stack.enter_context(context)
        grads = torch.autograd.grad(total(), list(gates.values()), allow_unused=True)
    of = {key: grad for key, grad in zip(gates, grads, strict=True) if grad is not None}
    missing = [name for name, found in spots.items() if any(spot.key not in of for spot in found)]
    if missing:
        raise UnsuitedError(f"nothing depends on the output of {missing[0]!r}")
    return {
        name: torch.stack([of[spot.key][:, spot.index].sum(-1) for spot in found]).sum(0)
        for name, found in spots.items()
    }


class UnsuitedError(Exception):
    """Gates of samples cannot be put where they belong."""


@dataclass(frozen=True, eq=False)
class Spot:
    """A tensor that gates multiply: the input or output of a layer, whose channels are in one dim.

    Attributes:
        module: The layer.
        before: Whether it is its input.
        dim: Of the channels: 1 or -1.
        channels: How many.
        index: int64 ``(size, width)``, the channels of each unit.
    """

    module: nn.Module
    before: bool
    dim: int
    channels: int
    index: Tensor

    @property
    def key(self) -> str:
        """Spots of one tensor share it, and its gates."""
        return f"{id(self.module)} {self.before}"

    def install(self, gates: Tensor) -> Callable[[], None]:
        """Multiply the tensor by ``gates``, ``(samples, channels)``, in every forward pass. Returns what takes that back."""

        def multiply(tensor: Tensor) -> Tensor:
            samples = gates.shape[0]
            if tensor.dim() < 2 or tensor.shape[self.dim] != self.channels or tensor.shape[0] % samples:
                raise UnsuitedError(f"a {type(self.module).__name__} keeps samples or channels in other dims")
            shape = [1] * tensor.dim()
            shape[self.dim] = self.channels
            shape[0] = tensor.shape[0]
            wide = gates.repeat_interleave(tensor.shape[0] // samples, 0)  # windows of a sample follow each other
            return tensor * wide.reshape(shape).to(tensor.dtype)

        if self.before:

            def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                if not args:
                    raise UnsuitedError(f"a {type(self.module).__name__} is called with named arguments alone")
                return (multiply(args[0]), *args[1:])

            return self.module.register_forward_pre_hook(enter).remove
        return self.module.register_forward_hook(lambda _, args, out: multiply(out)).remove


def find_spots(model: nn.Module, targets: Targets) -> dict[str, list[Spot]]:
    """Where the gates of each group are; none of one where that cannot be told, as in layers of other types or compiled ones."""
    return {name: _spots_of(model, targets, group) for name, group in units_of(targets).items()}


def _spots_of(model: nn.Module, targets: Targets, group: UnitGroup) -> list[Spot]:
    """Those of one group, none if they cannot be told."""
    parts: dict[str, dict[str, tuple[int, Tensor]]] = {}
    for part in group.gates:
        owner, _, attribute = targets.paths[part.name].rpartition(".")
        if "_orig_mod" in owner or attribute in parts.get(owner, {}):
            return []
        parts.setdefault(owner, {})[attribute] = (part.dim, part.index.to(targets.device))
    spots = []
    for owner, named in parts.items():
        module: Any = model.get_submodule(owner)
        whole = {attribute for attribute, parameter in module.named_parameters(recurse=False)}
        linear, convolution = isinstance(module, nn.Linear), isinstance(module, _CONVS)
        if "weight" not in named:
            return []
        dim, index = named["weight"]
        axis = -1 if linear or type(module) is nn.LayerNorm else 1
        if dim == 1 and set(named) == {"weight"} and (linear or (convolution and module.groups == 1)):
            spots.append(Spot(module, True, axis, int(module.weight.shape[1]), index))
        elif (
            dim == 0
            and set(named) == whole
            and all(torch.equal(other, index) for _, other in named.values())
            and (linear or convolution or type(module) in (*_BATCH_NORMS, nn.LayerNorm))
        ):
            spots.append(Spot(module, False, axis, int(module.weight.shape[0]), index))
        else:
            return []
    return spots


@torch.no_grad()
def gate_gradients(units: Units, weights: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of gates of value 1 that multiply the units: ``g_u = Σ w_i g_i`` over the entries that a gate scales.

    Args:
        units: The units.
        weights: ``{target: (*shape)}``.
        rows: ``{target: (n, *shape)}`` gradients of the targets that gates are in.

    Returns:
        ``{group: (n, size)}`` float32.
    """
    out: dict[str, Tensor] = {}
    for name, group in units.items():
        for part in group.gates:
            row, weight = rows[part.name], weights[part.name]
            other = [dim + 1 for dim in range(weight.dim()) if dim != part.dim]
            lines = row * weight.to(row.dtype)
            lines = lines.sum(other) if other else lines
            found = lines[:, part.index.to(lines.device)].sum(-1)
            out[name] = out[name] + found if name in out else found
    return out
