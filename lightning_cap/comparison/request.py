"""What a comparison is asked for, all of it checked that can be without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.comparison.records import MASKS, UNPRUNED, ComparisonRecord
from lightning_cap.comparison.surface import LossSurface
from lightning_cap.comparison.variants import Grids, Variant, check_sparsities, file_name, make_variants
from lightning_cap.errors import ConfigError
from lightning_cap.export.safetensors import goal_stem
from lightning_cap.healing import HealArgument, as_heal
from lightning_cap.pruners.base import Pruner, with_heal
from lightning_cap.sparsity.cost import StepPath
from lightning_cap.trainer.saving import goal_name
from lightning_cap.utilities.arguments import (
    require_flag,
    require_instance,
    require_names,
    require_path,
    require_whole,
    shown,
)
from lightning_cap.utilities.memory import parse_bytes

_MOST_SAMPLES = 10**6  # to measure the loss on


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare; see `lightning_cap.comparison.compare` for the arguments.

    Attributes:
        variants: What to run.
        weights_in: The folder for the weights of a pruner, by its name; without those whose weights are not written.
        keeps_values: Whether the weights that a record's masks keep are kept beside them.
    """

    variants: Sequence[Variant]
    sparsities: Sequence[float]
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    folder: Path | None
    weights_in: Mapping[str, str]
    keeps_values: bool
    surface: LossSurface | None
    fisher_block: int
    loss_samples: int
    max_rows_memory: int | str | None

    @property
    def names(self) -> list[str]:
        """Of the pruners."""
        return list(dict.fromkeys(variant.name for variant in self.variants))

    def of(self, records: Sequence[ComparisonRecord]) -> list[ComparisonRecord]:
        """Those of the records that were asked for, and the unpruned model's."""
        wanted = {(v.label, v.seed, goal) for v in self.variants for goal in self.sparsities}
        return [r for r in records if r.pruner == UNPRUNED or (r.label, r.seed, r.goal) in wanted]

    def masks_file(self, variant: Variant, goal: float) -> str:
        """Name of the file of masks in the folder, empty without a folder."""
        return "" if self.folder is None else f"{MASKS}/{variant.slug}-{_stem(variant, goal)}.safetensors"

    def weights_file(self, variant: Variant, goal: float) -> str:
        """Name of the file of pruned weights in the folder, empty if none is wanted."""
        place = self.weights_in.get(variant.name)
        if place is None or variant.setting is not None or self.folder is None:
            return ""
        several = len({v.seed for v in self.variants}) > 1
        return f"{place}{f'seed={variant.seed}/' if several else ''}{_stem(variant, goal)}.safetensors"


def _stem(variant: Variant, goal: float) -> str:
    return goal_stem(goal, goal_name(variant.pruner))


def _healed(name: object, pruner: Pruner, heal: HealArgument) -> Pruner:
    """A pruner with another ``heal``; what is no pruner is refused later."""
    if not isinstance(pruner, Pruner):
        return pruner
    try:
        return with_heal(pruner, heal)
    except ConfigError as error:
        raise ConfigError(f"pruner {shown(name)}: {error}") from error


def make_request(
    *,
    pruners: Pruner | Mapping[str, Pruner],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    folder: Path | str | None,
    num_recomputations: int,
    recomputation_path: StepPath,
    grids: Grids | None,
    surface: LossSurface | None,
    fisher_block: int,
    save_weights: bool | None,
    loss_samples: int,
    max_rows_memory: int | str | None,
    heal: HealArgument = None,
    recalibrate: bool = False,
) -> Request:
    """The request of the arguments of `lightning_cap.comparison.compare`.

    Raises:
        ConfigError: One of them cannot work.
    """
    require_names("include", include)
    require_names("exclude", exclude)
    require_path("folder", folder, "runs/comparison", optional=True)
    if save_weights is not None:
        require_flag("save_weights", save_weights)
    require_whole("fisher_block", fisher_block, 0)
    require_whole("loss_samples", loss_samples, 0, _MOST_SAMPLES)
    parse_bytes(max_rows_memory, "max_rows_memory")
    require_instance("surface", surface, LossSurface, "LossSurface(['CAP', 'magnitude'], 0.8)", optional=True)
    single = isinstance(pruners, Pruner)
    named = {type(pruners).__name__: pruners} if isinstance(pruners, Pruner) else pruners
    require_flag("recalibrate", recalibrate)
    as_heal(heal)
    if recalibrate and surface is not None:
        raise ConfigError(
            "recalibrate=True: a surface is drawn between solutions, where statistics of batch norm are those of neither. Draw it "
            "without recalibrate."
        )
    named = (
        {name: _healed(name, pruner, heal) for name, pruner in named.items()} if isinstance(named, Mapping) else named
    )
    variants = make_variants(named, seeds, grids, num_recomputations, recomputation_path, recalibrate)
    check_sparsities(variants, sparsities)
    if surface is not None:
        surface.check(list(named), list(sparsities))
    if folder is None and (surface is not None or fisher_block or save_weights):
        raise ConfigError("folder=None: surface, fisher_block and save_weights need a folder to write to.")
    if fisher_block and not any(isinstance(pruner.statistic, GradientSamples) for pruner in named.values()):
        raise ConfigError(
            f"fisher_block={fisher_block}: none of {shown(list(named))} reads gradients. Add one, such as CAP()."
        )
    keep = single if save_weights is None else save_weights
    return Request(
        variants=variants,
        sparsities=sorted(sparsities),
        include=include,
        exclude=exclude,
        folder=None if folder is None else Path(folder),
        weights_in={name: "" if single else f"{file_name(name)}/" for name in named} if keep else {},
        keeps_values=save_weights is not False,
        surface=surface,
        fisher_block=fisher_block,
        loss_samples=loss_samples,
        max_rows_memory=max_rows_memory,
    )
