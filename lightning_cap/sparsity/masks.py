"""`MaskSet`: which weights stay, kept in force on weights, gradients, optimizer state and averaged copies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, DataError
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.bits import pack_bits, unpack_bits
from lightning_cap.utilities.sharded import as_shard, is_sharded, local, part_of, whole

_Groups = list[tuple[list[Tensor], list[Tensor]]]  # tensors and multipliers, one pair per device and type


class MaskSet(Mapping[str, Tensor]):
    """``{target name: bool (*shape)}``, True = kept. Starts all True, on the targets' devices.

    What runs every training step multiplies by 1 or 0 in the weight's own type, strides and device: one
    ``torch._foreach_mul_`` call for all targets of a device and type, which CUDA runs fused and the CPU vectorised, and
    no call at all while nothing is masked. These multipliers are made at the first use after the masks changed, for
    the targets with a masked weight alone; they take as many bytes as those weights, beside one byte per weight for the
    masks. Nothing waits for the device in a step. Change masks through the methods only.

    A product keeps NaN: a masked weight or gradient that is NaN or infinite becomes NaN, so that a step that diverged
    shows as it does in a dense model (a gradient scaler has seen it, and skips the step, before gradients are masked).

    Of sharded targets masks are sharded as these are. Each process puts the mask of its own rows in force, and looks those up in
    the model each time, without communication; but all must change masks, and ask for `state_dict`, together.

    Args:
        targets: The weights that the masks belong to.

    Raises:
        ConfigError: They are none; also of the methods, for masks that are not of the targets.
    """

    def __init__(self, targets: Targets) -> None:
        require_targets(targets)
        self._targets = targets
        self._masks = {
            name: as_shard(torch.ones_like(local(w), dtype=torch.bool, requires_grad=False), w)
            for name, w in targets.items()
        }
        self._kept = {name: weight.numel() for name, weight in targets.items()}
        self._drop_made()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made from the masks, so that copies and pickles do not carry it."""
        return {"_targets": self._targets, "_masks": self._masks, "_kept": self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._drop_made()

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        """Short: ``MaskSet(48 targets, 50.00% of 5308416 weights masked)``."""
        return f"MaskSet({len(self)} targets, {self.global_sparsity:.2%} of {self._targets.numel} weights masked)"

    @property
    def targets(self) -> Targets:
        """The weights that the masks belong to."""
        return self._targets

    def sparsity(self) -> dict[str, float]:
        """Zeros over weights of each target."""
        return {name: 1 - kept / self._masks[name].numel() for name, kept in self._kept.items()}

    @property
    def global_sparsity(self) -> float:
        """Zeros over all weights of the targets."""
        return 1 - sum(self._kept.values()) / self._targets.numel

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Copy ``masks`` in, all or none; weights that were masked stay masked."""
        require_instance("masks", masks, Mapping, "result.masks")
        check_masks(self._targets, masks)
        self._masks |= {name: as_shard(local(old) & part_of(masks[name], old), old) for name, old in self._some(masks)}
        self._masks_changed()

    def replace(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put ``masks`` in the place of those in force; weights may come back.

        Returns:
            ``{target name: bool (*shape)}``, True = was masked and is kept now; only targets with such weights, or all if sharded.
        """
        require_instance("masks", masks, Mapping, "result.masks")
        check_masks(self._targets, masks)
        grown = {}
        for name, old in self._some(masks):
            new = part_of(masks[name], old).clone()
            back = new & ~local(old)
            if is_sharded(old) or bool(back.any()):
                grown[name] = as_shard(back, old)
            self._masks[name] = as_shard(new, old)
        self._masks_changed()
        return grown

    def unmask_all(self) -> dict[str, Tensor]:
        """Keep every weight again. Returns the regrown weights, as `replace`."""
        return self.replace({name: as_shard(torch.ones_like(local(m)), m) for name, m in self._masks.items()})

    def mask_zeros(self) -> None:
        """Take the zeros that the weights have now as pruned; targets that are all zero stay free, with a warning.

        Where units are pruned, those units are that have no other weight.
        """
        weights = self._targets.weights()
        units = self._targets.units
        if units is not None:
            self.update(units.masks(self._targets.shapes, units.nonzero(weights)))
            return
        found = torch.tensor([bool(local(weight).any()) for weight in weights.values()], dtype=torch.int64)
        blank = [name for name, any_left in zip(weights, self._of_all(found), strict=True) if not any_left]
        if blank:
            warnings.warn(
                f"{len(blank)} targets, first {blank[0]!r}, are all zero. They are taken as not yet trained, not as pruned, "
                "and stay free.",
                stacklevel=2,
            )
        self.update({name: as_shard(local(w) != 0, w) for name, w in weights.items() if name not in blank})

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """Set masked weights to zero."""
        for weights, multipliers in self._weight_groups():
            torch._foreach_mul_([local(weight) for weight in weights], multipliers)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of masked weights to zero."""
        for weights, multipliers in self._weight_groups():
            pairs = [(local(g), m) for w, m in zip(weights, multipliers, strict=True) if (g := w.grad) is not None]
            if pairs:
                torch._foreach_mul_([g for g, _ in pairs], [m for _, m in pairs])

    @torch.no_grad()
    def apply_to_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer's state (moments, momentum: every tensor of the weight's shape) on masked entries."""
        require_instance("optimizer", optimizer, torch.optim.Optimizer, "torch.optim.AdamW(model.parameters())")
        for name, weight in self._targets.items():
            state = optimizer.state.get(weight, {})
            entries = [local(v) for v in state.values() if isinstance(v, Tensor) and v.shape == weight.shape]
            if entries:
                torch._foreach_mul_(entries, [local(self._masks[name])] * len(entries))

    @torch.no_grad()
    def apply_to_copy(self, model: nn.Module) -> None:
        """Set masked weights to zero in another model of the same parameter names, such as an averaged one.

        Its parameters are looked up once after each change of the masks. Where it is on another device or of another
        type than the weights, it has multipliers of its own.
        """
        require_instance("model", model, nn.Module, "the averaged model")
        groups = self._copy_groups.get(model)
        if groups is None or _moved(groups):
            names = {path: name for name, path in self._targets.paths.items()}
            groups = self._grouped({names[path]: p for path, p in model.named_parameters() if path in names})
            self._copy_groups[model] = groups
        for weights, multipliers in groups:
            torch._foreach_mul_([local(weight) for weight in weights], multipliers)

    def state_dict(self) -> dict[str, Any]:
        """Bit-packed masks: ``{name: {"shape": list, "bits": uint8}}``, one byte for eight weights.

        Of sharded targets too these are whole masks, gathered one at a time: any number of processes can go on with them.
        """
        return {
            name: {"shape": list(mask.shape), "bits": pack_bits(whole(mask).flatten().cpu())}
            for name, mask in self._masks.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all masks.

        Raises:
            ConfigError: The names or shapes are not those of the targets.
            DataError: It is not what `state_dict` gave.
        """
        shapes = {name: list(mask.shape) for name, mask in self._masks.items()}
        saved = {name: list(entry["shape"]) for name, entry in _checked(state).items()}
        if shapes != saved:
            different = sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n))
            raise ConfigError(
                f"checkpoint: its masks do not fit the targets of this run; {len(different)} differ, first {different[0]!r} "
                f"({saved.get(different[0])} saved, {shapes.get(different[0])} here). Use the include/exclude and the model "
                "that the checkpoint was made with."
            )
        for name, entry in state.items():
            mask = unpack_masks({name: entry})[name]
            self._masks[name] = as_shard(part_of(mask, self._masks[name]).clone(), self._masks[name])
        self._masks_changed()

    def _some(self, masks: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Name and mask in force of the targets in ``masks``."""
        return [(name, self._masks[name]) for name in masks]

    def _of_all(self, counts: Tensor) -> list[int]:
        """The sums over all processes, if these hold different rows."""
        if self._targets.is_sharded:
            counts = distributed.sum_over_ranks(counts.to(self._targets.device))
        return [int(count) for count in counts.tolist()]

    def _masks_changed(self) -> None:
        """Count what is kept (a host sync for each target), and drop what was made from the masks."""
        counts = torch.tensor([int(local(mask).sum()) for mask in self._masks.values()], dtype=torch.int64)
        self._kept = dict(zip(self._masks, self._of_all(counts), strict=True))
        self._drop_made()

    def _drop_made(self) -> None:
        """Drop what was made from the masks."""
        self._thinned = [name for name, kept in self._kept.items() if kept < self._masks[name].numel()]
        self._multipliers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._groups: _Groups | None = None
        self._copy_groups: WeakKeyDictionary[nn.Module, _Groups] = WeakKeyDictionary()

    def _weight_groups(self) -> _Groups:
        groups = self._groups
        if groups is None or self._targets.is_sharded or _moved(groups):
            groups = self._groups = self._grouped(self._targets)
        return groups

    def _grouped(self, tensors: Mapping[str, Tensor]) -> _Groups:
        """Those of ``tensors`` that have masked entries."""
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name in self._thinned:
            if name in tensors:
                tensor = tensors[name]
                members, multipliers = groups.setdefault((tensor.device, tensor.dtype), ([], []))
                members.append(tensor)
                multipliers.append(self._multiplier(name, tensor))
        return list(groups.values())

    def _multiplier(self, name: str, like: Tensor) -> Tensor:
        """The mask as ones and zeros of the type, strides and device of ``like``; weights and averages share it."""
        key = (name, like.device, like.dtype)
        if key not in self._multipliers:
            self._multipliers[key] = torch.empty_like(local(like), requires_grad=False).copy_(local(self._masks[name]))
        return self._multipliers[key]


def count_masked(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Masked weights of each target, ``{target: count}``. Every process must call it, if the masks are sharded."""
    counts = {name: int((~local(mask)).sum()) for name, mask in masks.items()}
    if any(is_sharded(mask) for mask in masks.values()):
        device = next(iter(masks.values())).device
        total = distributed.sum_over_ranks(torch.tensor(list(counts.values()), device=device))
        counts = dict(zip(counts, total.tolist(), strict=True))
    return counts


def unpack_masks(state: object) -> dict[str, Tensor]:
    """``{target: bool (*shape)}`` on the CPU, of what `MaskSet.state_dict` gave.

    Raises:
        DataError: It is something else.
    """
    return {
        name: unpack_bits(entry["bits"].cpu(), math.prod(entry["shape"])).view(list(entry["shape"]))
        for name, entry in _checked(state).items()
    }


def check_masks(targets: Targets, masks: object, all_of_them: bool = False) -> None:
    """Refuse masks that are not those of the targets; None are no masks.

    Args:
        targets: The weights.
        masks: ``{target name: bool (*shape)}``.
        all_of_them: Whether every target must have one.

    Raises:
        ConfigError: They are no bool tensors by name, a name is not a target's, a shape not that of its weight, or one is missing.
    """
    require_instance("masks", masks, Mapping, "{target name: bool of the weight's shape}", optional=True)
    given = cast("Mapping[str, object]", masks or {})
    for name, mask in given.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"of type {mask.dtype}" if isinstance(mask, Tensor) else shown(mask)
            raise ConfigError(
                f"masks: {name!r} is {got}. Give a bool tensor of the weight's shape, True where it is kept."
            )
        if name not in targets or mask.shape != targets[name].shape:
            want = f"its weight has {tuple(targets[name].shape)}" if name in targets else "there is no such target"
            raise ConfigError(
                f"masks: {name!r} has shape {tuple(mask.shape)}, but {want}. Give {{target name: bool of the weight's shape}}."
            )
    missing = [name for name in targets if given and name not in given] if all_of_them else []
    if missing:
        raise ConfigError(f"masks: {missing[0]!r} has none. Give one for each of the {len(targets)} targets.")


def _checked(state: object) -> Mapping[str, Any]:
    """A state dict of the form that `MaskSet.state_dict` gives."""
    whole = isinstance(state, Mapping) and all(
        isinstance(entry, Mapping)
        and isinstance(entry.get("shape"), (list, tuple))
        and isinstance(entry.get("bits"), Tensor)
        and entry["bits"].dtype == torch.uint8
        and entry["bits"].numel() == -(-math.prod(entry["shape"]) // 8)
        for entry in state.values()
    )
    if not whole:
        raise DataError(
            f"checkpoint: its masks are damaged, or of another version: {shown(state)}. Resume from another checkpoint."
        )
    return cast("Mapping[str, Any]", state)


def _moved(groups: _Groups) -> bool:
    """Whether the model has been put on another device or made of another type since."""
    return any(t[0].device != m[0].device or t[0].dtype != m[0].dtype for t, m in groups)
