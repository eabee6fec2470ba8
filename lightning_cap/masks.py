"""`MaskSet`: which weights stay, kept in force on weights, gradients, optimizer state and averaged copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError
from lightning_cap.targets import Targets


class MaskSet(Mapping[str, Tensor]):
    """``{target name: bool (*shape)}``, True = kept. Starts all True, on the targets' devices.

    Args:
        targets: The weights that the masks belong to.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in targets.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def sparsity(self) -> dict[str, float]:
        """Zeros over weights of each target."""
        return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in self._masks.items()}

    @property
    def global_sparsity(self) -> float:
        """Zeros over all weights of the targets."""
        kept = sum(int(mask.sum()) for mask in self._masks.values())
        return 1 - kept / self._targets.numel

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Copy ``masks`` in; weights that were masked stay masked."""
        for name, mask in masks.items():
            self._masks[name] &= mask.to(self._masks[name].device)

    def mask_zeros(self) -> None:
        """Take the zeros that the weights have now as pruned; targets that are all zero stay free, with a warning."""
        weights = self._targets.weights()
        blank = [name for name, weight in weights.items() if not bool(weight.any())]
        if blank:
            warnings.warn(
                f"{len(blank)} targets, first {blank[0]!r}, are all zero. They are taken as not yet trained, not as pruned, "
                "and stay free.",
                stacklevel=2,
            )
        self.update({name: weight != 0 for name, weight in weights.items() if name not in blank})

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """Set masked weights to zero."""
        _multiply(list(self._targets.values()), list(self._masks.values()))

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of masked weights to zero."""
        pairs = [(w.grad, self._masks[name]) for name, w in self._targets.items() if w.grad is not None]
        _multiply([grad for grad, _ in pairs], [mask for _, mask in pairs])

    @torch.no_grad()
    def apply_to_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer's state (moments, momentum: every tensor of the weight's shape) on masked entries."""
        for name, weight in self._targets.items():
            state = optimizer.state.get(weight, {})
            entries = [v for v in state.values() if isinstance(v, Tensor) and v.shape == weight.shape]
            _multiply(entries, [self._masks[name]] * len(entries))

    @torch.no_grad()
    def apply_to_copy(self, model: nn.Module) -> None:
        """Set masked weights to zero in another model of the same parameter names, such as an averaged one."""
        names = {path: name for name, path in self._targets.paths.items()}
        pairs = [(p, self._masks[names[path]]) for path, p in model.named_parameters() if path in names]
        _multiply([p for p, _ in pairs], [mask.to(p.device) for p, mask in pairs])

    def state_dict(self) -> dict[str, Any]:
        """Bit-packed masks: ``{name: {"shape": list, "bits": uint8}}``, one byte for eight weights."""
        return {name: {"shape": list(mask.shape), "bits": pack_bits(mask)} for name, mask in self._masks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all masks.

        Raises:
            ConfigError: The names or shapes are not those of the targets.
        """
        shapes = {name: list(mask.shape) for name, mask in self._masks.items()}
        saved = {name: list(entry["shape"]) for name, entry in state.items()}
        if shapes != saved:
            different = sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n))
            raise ConfigError(
                f"checkpoint: its masks do not fit the targets of this run; {len(different)} differ, first {different[0]!r} "
                f"({saved.get(different[0])} saved, {shapes.get(different[0])} here). Use the include/exclude and the model "
                "that the checkpoint was made with."
            )
        for name, entry in state.items():
            mask = unpack_bits(entry["bits"].cpu(), self._masks[name].numel())
            self._masks[name] = mask.view(self._masks[name].shape).to(self._masks[name].device)


def pack_bits(mask: Tensor) -> Tensor:
    """Bool of any shape -> uint8 ``(ceil(n / 8),)`` on the CPU, the first element in the lowest bit."""
    flat = mask.flatten().cpu().to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`: bool ``(count,)``."""
    return (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).flatten()[:count].bool()


def _multiply(tensors: list[Tensor], masks: list[Tensor]) -> None:
    if tensors:
        torch._foreach_mul_(tensors, masks)
