"""Gradients of gates on units: in one pass over a batch where that can be done, else off the gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        self._spots = _find_spots(model, targets)
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
            except (_UnsuitedError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                right = False
        self._compared = True
        self._spots = self._spots if right else None

    def _by_weights(self, batch: Any) -> dict[str, Tensor]:
        return gate_gradients(self._units, self._all.weights(), super().at_once(batch))

    def _by_gates(self, batch: Any, spots: Mapping[str, list[_Spot]]) -> dict[str, Tensor]:
        size, device = batch_size(batch), self._all.device
        gates = {
            spot.key: torch.ones(size, spot.channels, device=device, requires_grad=True)
            for found in spots.values()
            for spot in found
        }
        contexts = (torch.inference_mode(False), torch.enable_grad(), self._context(), PlainNormalization())
        with ExitStack() as stack:
            for spot in {spot.key: spot for found in spots.values() for spot in found}.values():
                stack.callback(spot.install(gates[spot.key]))
            for context in contexts:
                stack.enter_context(context)
            loss = self._program(batch).reshape(()) * (self._scale * size)
            grads = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        if any(grad is None for grad in grads):
            raise _UnsuitedError
        of = dict(zip(gates, grads, strict=True))
        return {
            name: self.unscaled(torch.stack([of[spot.key][:, spot.index].sum(-1) for spot in found]).sum(0))
            for name, found in spots.items()
        }


class _UnsuitedError(Exception):
    """Gates of samples cannot be put where they belong."""


@dataclass(frozen=True, eq=False)
class _Spot:
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
                raise _UnsuitedError
            shape = [1] * tensor.dim()
            shape[self.dim] = self.channels
            shape[0] = tensor.shape[0]
            wide = gates.repeat_interleave(tensor.shape[0] // samples, 0)  # windows of a sample follow each other
            return tensor * wide.reshape(shape).to(tensor.dtype)

        if self.before:

            def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                if not args:
                    raise _UnsuitedError
                return (multiply(args[0]), *args[1:])

            return self.module.register_forward_pre_hook(enter).remove
        return self.module.register_forward_hook(lambda _, args, out: multiply(out)).remove


def _find_spots(model: nn.Module, targets: Targets) -> dict[str, list[_Spot]] | None:
    """Where the gates of each group are; None if one cannot be told, as in layers of other types or compiled ones."""
    spots = {}
    for name, group in units_of(targets).items():
        found = _spots_of(model, targets, group)
        if not found:
            return None
        spots[name] = found
    return spots


def _spots_of(model: nn.Module, targets: Targets, group: UnitGroup) -> list[_Spot]:
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
            spots.append(_Spot(module, True, axis, int(module.weight.shape[1]), index))
        elif (
            dim == 0
            and set(named) == whole
            and all(torch.equal(other, index) for _, other in named.values())
            and (linear or convolution or type(module) in (*_BATCH_NORMS, nn.LayerNorm))
        ):
            spots.append(_Spot(module, False, axis, int(module.weight.shape[0]), index))
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
