"""The records of a comparison, one line of ``results.jsonl`` each, and the files that belong to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_cap.errors import DataError
from lightning_cap.export.safetensors import save_plain_weights
from lightning_cap.trainer.records import Saving
from lightning_cap.utilities.bits import pack_bits, unpack_bits
from lightning_cap.utilities.records import Plain, Record

RESULTS = "results.jsonl"
SURFACE = "surface.json"
MASKS = "masks"  # a folder

#: The ``pruner`` of the record of the model as it was.
UNPRUNED = "unpruned"

_VALUES = ": kept"  # after a target's name: the weights that its mask keeps
_OTHER = ": whole"  # after the name of a bias, or of statistics of batch norm


@dataclass(frozen=True)
class GridPoint:
    """The setting that was changed for a grid, and its value there."""

    setting: str
    value: Plain


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord(Record):
    """What a pruner with a seed gave at a goal; or the model as it was.

    Attributes:
        pruner: Its name; ``"unpruned"`` for the model as it was, whose ``seed`` is None and whose ``predicted_loss`` is 0.
        label: The name, and what was changed for a grid; of a model that was sparse, how much.
        grid: What was changed, None for the pruner as given.
        seed: Key of the calibration samples.
        goal: Sparsity that was asked for, or share to save of what else the pruner's goals count.
        sparsity: Measured: zeros over all weights of the targets.
        sparsities: Measured, per target.
        saving: What is saved of what goals count; None where that is zeros, and for the model as it was.
        metrics: What the module logs in validation.
        predicted_loss: Predicted increase of the loss, None where the pruner predicts none.
        loss_increase: Measured increase on the ``validation`` and on ``calibration`` data, None where it is not known.
        seconds: Per phase: collect, solve, apply, evaluate; heal and recalibrate, where there were any.
        settings: All settings of the pruner, for people.
        parameters: Those of its settings that are plain values, what was changed for a grid, and ``num_recomputations``.
        stats: The pruner's own numbers.
        masks: File of the masks, in the folder of the results, see `load_masks`; empty if there is none.
        weights: File of the pruned weights, likewise.
        solution: Checksum of the targets' weights.
        depends: Checksums of what the record depends on: its ``settings``, the ``model`` and its validation, the ``data``, the
            ``calibration`` data and whether the pruner ``reads`` it, and the samples of its calibration ``loss``.
        fingerprint: Of all of them but the loss.
    """

    kind: ClassVar[str] = "comparison"
    version: ClassVar[int] = 3

    pruner: str
    label: str
    grid: GridPoint | None = None
    seed: int | None
    goal: float
    sparsity: float
    sparsities: Mapping[str, float]
    saving: Saving | None = None
    metrics: Mapping[str, float]
    predicted_loss: float | None
    loss_increase: Mapping[str, float | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    settings: str = ""
    parameters: Mapping[str, Plain] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    masks: str = ""
    weights: str = ""
    solution: str
    depends: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str

    @property
    def place(self) -> tuple[str, int | None, float]:
        """What no two records of a comparison share."""
        return (self.pruner if self.pruner == UNPRUNED else self.label), self.seed, self.goal

    @property
    def counted(self) -> str:
        """What the goal counts, such as ``"sparsity"`` or ``"flops"``."""
        return "sparsity" if self.saving is None else self.saving.cost

    @property
    def reached(self) -> float:
        """How much there is of that."""
        return self.sparsity if self.saving is None else self.saving.share


@dataclass(frozen=True, kw_only=True)
class SurfaceRecord(Record):
    """The loss on a grid over the plane ``w0 + α (w1 - w0) + β (w2 - w0)``, the one record of ``surface.json``.

    Attributes:
        pruners: Names of the two that gave ``w1`` and ``w2``.
        sparsity: Of both.
        axis: The values of ``α`` and of ``β``.
        loss: ``loss[j][i]`` at ``α = axis[i]``, ``β = axis[j]``.
        corners: The loss of the weights as they were (``"unpruned"``), of ``w1`` and of ``w2`` as they are, by the pruners' names.
        of: Fingerprints of the records of ``w1`` and ``w2``.
        fingerprint: Of everything that the surface depends on.
    """

    kind: ClassVar[str] = "surface"
    version: ClassVar[int] = 1

    pruners: tuple[str, ...]
    sparsity: float
    axis: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    corners: Mapping[str, float]
    of: tuple[str, ...] = ()
    fingerprint: str = ""


def save_masks(
    path: Path,
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write masks bit-packed, eight weights per byte; and what is given of the weights that they keep, and of other tensors."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    tensors = {name: pack_bits(mask.flatten().cpu()) for name, mask in masks.items()}
    tensors |= {f"{name}{_VALUES}": weight[masks[name]] for name, weight in (weights or {}).items()}
    tensors |= {f"{name}{_OTHER}": tensor for name, tensor in (others or {}).items()}
    save_plain_weights(path, tensors, {"shapes": json.dumps(shapes)})


def load_masks(path: Path) -> dict[str, Tensor]:
    """What `save_masks` wrote: ``{target: bool (*shape)}``.

    Raises:
        DataError: It is no such file.
    """
    return {name: mask for name, (mask, _) in _load(path).items()}


def load_weights(path: Path) -> dict[str, Tensor]:
    """The pruned weights, and other tensors, that `save_masks` was given, by name; empty if no weights were.

    Raises:
        DataError: It is no such file.
    """
    found = {name: (mask, values) for name, (mask, values) in _load(path).items() if values is not None}
    weights = {n: values.new_zeros(mask.shape).masked_scatter_(mask, values) for n, (mask, values) in found.items()}
    return {**weights, **_load_others(path)} if weights else {}


def _load_others(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {n.removesuffix(_OTHER): file.get_tensor(n) for n in file.keys() if n.endswith(_OTHER)}  # noqa: SIM118


def _load(path: Path) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Of each target the mask, and the weights that it keeps."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: torch.Size(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
            names = set(file.keys())
            return {
                name: (
                    unpack_bits(file.get_tensor(name), shape.numel()).view(shape),
                    file.get_tensor(f"{name}{_VALUES}") if f"{name}{_VALUES}" in names else None,
                )
                for name, shape in shapes.items()
            }
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: it holds no masks of a comparison ({' '.join(str(error).split())}). Remove it and start the comparison "
            "again, which makes it anew."
        ) from error


def intersection_over_union(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Weights that both masks keep over those that at least one keeps (section 4.1); 1 where neither keeps any."""
    both = sum(int((mask & other[name]).sum()) for name, mask in one.items())
    either = sum(int((mask | other[name]).sum()) for name, mask in one.items())
    return both / either if either else 1.0
