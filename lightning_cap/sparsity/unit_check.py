"""Finds out by forward passes whether groups of units are right: whether any units of them could be taken out of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_cap.sparsity.unit_group import Slice, UnitGroup

_TOLERANCE = {torch.float64: 1e-9}  # of the largest output
_COARSE = 1e-4  # of float32 and shorter
_NOISE = 0.1  # standard deviations of a parameter; so that scales of 0 or 1e-6 hide nothing


class UnitCheck:
    """Tests groups on a copy of the model, whose parameters are disturbed first.

    Units may go where both hold:

    - They are alike: the outputs stay the same when the units of a group change places, in all slices at once.
    - They are closed: what a unit makes reaches the outputs through the columns that read it alone; or, where the model
      normalizes over its channels, those columns do not count any more when all that makes the unit is zero.

    Args:
        model: A copy of the model, in evaluation mode. It is changed.
        forward: Runs it and returns its outputs.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], Sequence[Tensor]]) -> None:
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._forward, self._rng = forward, torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
                    scale = _NOISE * max(float(tensor.std(correction=0)), _NOISE)
                    tensor.add_(scale * self._draw(tensor))
                elif name.endswith("running_mean"):
                    tensor.add_(_NOISE * self._draw(tensor))
                elif name.endswith("running_var"):
                    tensor.mul_(1 + _NOISE * self._draw(tensor).abs())
        self._expected = self._outputs()

    def wrong(self, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
        """Those of ``groups`` whose units cannot go; found by halves."""
        if not groups or self._holds(groups):
            return []
        if len(groups) == 1:
            return list(groups)
        half = len(groups) // 2
        return self.wrong(groups[:half]) + self.wrong(groups[half:])

    def _holds(self, groups: Sequence[UnitGroup]) -> bool:
        with self._restoring(groups):
            for group in groups:
                order = torch.randperm(group.size, generator=self._rng)
                for part in (*group.slices, *group.buffers):
                    self._permute(part, order)
            if not self._same(self._outputs(), self._expected):
                return False
        with self._restoring(groups):
            pruned = {group.name: self._half(group) for group in groups}
            self._zero([(part, pruned[group.name]) for group in groups for part in group.consumers])
            without_readers = self._outputs()
            self._zero([(part, pruned[g.name]) for g in groups for part in (*g.producers, *g.norms)])
            without = self._outputs()
        if self._same(without_readers, without):
            return True
        with self._restoring(groups):
            self._zero([(part, pruned[g.name]) for g in groups for part in (*g.producers, *g.norms)])
            return self._same(self._outputs(), without)

    def _half(self, group: UnitGroup) -> Tensor:
        """A random half of the units, one at least and never all."""
        chosen = torch.zeros(group.size, dtype=torch.bool)
        chosen[torch.randperm(group.size, generator=self._rng)[: max(1, group.size // 2)]] = True
        return chosen

    @torch.no_grad()
    def _permute(self, part: Slice, order: Tensor) -> None:
        tensor = self._tensors[part.name]
        there, here = (index.flatten().to(tensor.device) for index in (part.index, part.index[order]))
        tensor.index_copy_(part.dim, there, tensor.index_select(part.dim, here))

    @torch.no_grad()
    def _zero(self, parts: Sequence[tuple[Slice, Tensor]]) -> None:
        for part, units in parts:
            tensor = self._tensors[part.name]
            tensor.index_fill_(part.dim, part.entries(units).to(tensor.device), 0)

    @contextmanager
    def _restoring(self, groups: Sequence[UnitGroup]) -> Iterator[None]:
        names = {part.name for group in groups for part in (*group.slices, *group.buffers)}
        before = {name: self._tensors[name].detach().clone() for name in names}
        try:
            yield
        finally:
            self._write(before)

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor)

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return [output.detach().clone() for output in self._forward()]

    def _same(self, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        if [a.shape for a in outputs] != [b.shape for b in expected]:
            return False  # it depends on the values
        limits = [_TOLERANCE.get(b.dtype, _COARSE) * float(b.abs().amax()) if b.numel() else 0.0 for b in expected]
        return all(bool(((a - b).abs() <= limit).all()) for a, b, limit in zip(outputs, expected, limits, strict=True))

    def _draw(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=self._rng, dtype=torch.float64).to(tensor.device, tensor.dtype)
