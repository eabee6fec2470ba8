"""What a comparison runs: every pruner, the same with one setting changed, each with every seed. All of it checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.comparison.fingerprint import ADDRESS, canonicalize, checksum
from lightning_cap.comparison.records import GridPoint
from lightning_cap.comparison.surface import LossSurface
from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.export.safetensors import sparsity_stem
from lightning_cap.pruners.base import Pruner, refuse_regrowth
from lightning_cap.sparsity.cost import steps_to
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.records import Plain

#: Setting -> values to try, one setting at a time, the others as given.
Grids = Mapping[str, Sequence[Any]]

RECOMPUTATIONS = "num_recomputations"  # a setting of the run, not of a pruner


@dataclass(frozen=True)
class Variant:
    """One pruner with one seed: what one path is made for.

    Attributes:
        name: Of the pruner, as given.
        pruner: With the settings of this variant.
        seed: Key of the calibration samples.
        num_recomputations: Steps of rising sparsity, with fresh gradients for each.
        setting: What was changed, None for the pruner as given.
        value: What it was changed to.
    """

    name: str
    pruner: Pruner
    seed: int
    num_recomputations: int = 1
    setting: str | None = None
    value: Any = None

    @property
    def label(self) -> str:
        """For people: the name, and what was changed."""
        return self.name if self.setting is None else f"{self.name} {self.setting}={_short(self.value)}"

    @property
    def settings(self) -> str:
        """All settings, for people."""
        kind = type(self.pruner)
        return f"{kind.__module__}.{kind.__qualname__}: {ADDRESS.sub('', repr(self.pruner))}"

    @property
    def slug(self) -> str:
        """For names of files."""
        return file_name(f"{self.label} seed={self.seed}")

    @property
    def gradients(self) -> GradientSamples | None:
        """The gradient samples that it reads, which pruners can share; None if it reads none."""
        given = self.pruner.statistic
        return given if isinstance(given, GradientSamples) else None

    def describe(self, goal: float) -> dict[str, Any]:
        """The fields of a `ComparisonRecord` that are known before it runs."""
        own = {name: value for name, value in vars(self.pruner).items() if not name.startswith("_")}
        changed = {} if self.setting is None else {self.setting: _plain(self.value)}
        return {
            "pruner": self.name,
            "label": self.label,
            "grid": None if self.setting is None else GridPoint(self.setting, _plain(self.value)),
            "seed": self.seed,
            "goal": goal,
            "settings": self.settings,
            "parameters": {
                **{name: value for name, value in own.items() if isinstance(value, (bool, int, float, str))},
                RECOMPUTATIONS: self.num_recomputations,
                **changed,
            },
        }

    def fingerprint(self, sparsity: float, identity: Mapping[str, Any]) -> str:
        """Of everything that the record at a sparsity depends on, as far as it is known."""
        settings = self.settings, canonicalize(vars(self.pruner))
        return checksum([settings, self.seed, self.num_recomputations, sparsity, dict(identity)])


@dataclass(frozen=True)
class Request:
    """What to compare; see `lightning_cap.comparison.compare`. ``weights_in`` maps a pruner's name to a folder, if any."""

    variants: Sequence[Variant]
    sparsities: Sequence[float]
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    folder: Path | None
    weights_in: Mapping[str, str]
    surface: LossSurface | None
    fisher_block: int
    loss_samples: int
    max_rows_memory: int | str | None

    def masks_file(self, variant: Variant, goal: float) -> str:
        """Name of the file of masks in the folder, empty without a folder."""
        return "" if self.folder is None else f"masks/{variant.slug}-{sparsity_stem(goal)}.safetensors"

    def weights_file(self, variant: Variant, goal: float) -> str:
        """Name of the file of pruned weights in the folder, empty if none is wanted."""
        place = self.weights_in.get(variant.name)
        if place is None or variant.setting is not None or self.folder is None:
            return ""
        several = len({v.seed for v in self.variants}) > 1
        return f"{place}{f'seed={variant.seed}/' if several else ''}{sparsity_stem(goal)}.safetensors"


def make_variants(
    pruners: Mapping[str, Pruner], seeds: Sequence[int], grids: Grids | None, num_recomputations: int
) -> list[Variant]:
    """Every pruner as given and then at each value of the grids, with each seed.

    Raises:
        ConfigError: A name, a seed or a grid cannot work.
    """
    _check_names(pruners)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds={list(seeds)}: give different whole numbers of at least 0, such as [0, 1, 2].")
    plain = [(name, pruner, num_recomputations, None, None) for name, pruner in pruners.items()]
    every = [*plain, *_grid_variants(pruners, grids or {}, num_recomputations)]
    for name, pruner, steps, _, _ in every:
        if steps < 1 or steps != int(steps):
            raise ConfigError(f"{RECOMPUTATIONS}={steps}: give whole numbers of at least 1.")
        if steps > 1 and pruner.pattern.sparsity is not None:
            raise ConfigError(
                f"{RECOMPUTATIONS}={steps}: {pruner.pattern} of pruner {name!r} has only one sparsity, so that it cannot be "
                "reached in steps. Leave it at 1, or compare that pruner by itself."
            )
    variants = [
        Variant(name, _seeded(pruner, seed), seed, int(steps), setting, value)
        for name, pruner, steps, setting, value in every
        for seed in seeds
    ]
    slugs = [variant.slug.lower() for variant in variants]
    for variant, slug in zip(variants, slugs, strict=True):
        if slugs.count(slug) > 1:
            raise ConfigError(f"pruners/grids: two would be called {variant.label!r}. Choose another name.")
    return variants


def check_sparsities(variants: Sequence[Variant], sparsities: Sequence[float]) -> None:
    """Refuse sparsities that a pruner cannot give.

    Raises:
        ConfigError: There are none, or one is given twice, or it is refused by a pruner, which is named.
    """
    if not sparsities or len(set(sparsities)) != len(sparsities):
        raise ConfigError(f"sparsities={list(sparsities)}: give at least one, each once, such as [0.5, 0.75, 0.9].")
    for variant in variants:
        for sparsity in sparsities:
            try:
                variant.pruner.check_sparsity(sparsity)
            except CAPError as error:
                raise type(error)(
                    f"pruner {variant.label!r}: {error} All pruners of a comparison are run at all sparsities."
                ) from error


def check_targets(
    variants: Sequence[Variant], targets: Targets, masks: Mapping[str, Tensor], sparsities: Sequence[float]
) -> None:
    """Refuse targets that do not fit a pruner, and sparsities that its allocation cannot place on them; the pruner is named.

    Args:
        variants: What to run.
        targets: The weights.
        masks: Weights that are zero already.
        sparsities: To be reached by every variant, by way of those of its recomputations.

    Raises:
        CAPError: The pruner's own.
    """
    first = 1 - sum(int(mask.sum()) for mask in masks.values()) / targets.numel
    for variant in variants:
        steps = variant.num_recomputations
        with naming(variant):
            variant.pruner.check(targets)
            goals = {goal for sparsity in sparsities for goal in steps_to(sparsity, first, steps)}
            variant.pruner.check_goals(targets, masks, sorted(goals))


@contextmanager
def naming(variant: Variant) -> Iterator[None]:
    """Say in errors of ours which pruner they are about."""
    try:
        yield
    except CAPError as error:
        raise type(error)(f"pruner {variant.label!r}: {error}") from error


def file_name(text: str) -> str:
    """The text without what file systems or globs could take otherwise."""
    return re.sub(r"[^\w=.+-]+", "-", text).strip("-.")


def _check_names(pruners: Mapping[str, Pruner]) -> None:
    if not pruners:
        raise ConfigError("pruners={}: give at least one, such as {'CAP': CAP(), 'magnitude': Magnitude()}.")
    files: dict[str, str] = {}
    for name, pruner in pruners.items():
        if not isinstance(pruner, Pruner):
            raise ConfigError(f"pruners: {name!r} is a {type(pruner).__name__}, not a Pruner.")
        refuse_regrowth(pruner)
        stem = file_name(name).lower()
        if not stem or stem in ("dense", "masks") or stem in files:
            other = f"its files would be those of {files[stem]!r}" if stem in files else "that name is not free"
            raise ConfigError(f"pruners: the name {name!r} cannot be used: {other}. Choose another.")
        files[stem] = name


def _grid_variants(
    pruners: Mapping[str, Pruner], grids: Grids, num_recomputations: int
) -> list[tuple[str, Pruner, int, str | None, Any]]:
    found: list[tuple[str, Pruner, int, str | None, Any]] = []
    for setting, values in grids.items():
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"grids: {setting}={list(values)}: give at least one value, each once.")
        having = {name: pruner for name, pruner in pruners.items() if setting in _settings(pruner)}
        if setting == RECOMPUTATIONS:
            having = {name: pruner for name, pruner in pruners.items() if pruner.pattern.sparsity is None}
        if not having:
            raise ConfigError(
                f"grids: no pruner of {list(pruners)} has a setting {setting!r}. Look at their arguments."
            )
        for name, pruner in having.items():
            for value in values:
                if setting == RECOMPUTATIONS and value != num_recomputations:
                    found.append((name, pruner, value, setting, value))
                elif setting != RECOMPUTATIONS and value != getattr(pruner, setting):
                    found.append((name, changed(pruner, setting, value), num_recomputations, setting, value))
    return found


def changed(pruner: Pruner, setting: str, value: Any) -> Pruner:
    """The same pruner with another value of one setting.

    A dataclass is made anew, so that the value is checked; any other pruner is copied.

    Raises:
        CAPError: The pruner refuses the value.
    """
    if _made_from_fields(pruner):
        other: Pruner = replace(pruner, **{setting: value})  # type: ignore[type-var]
        return other
    other = copy.copy(pruner)
    setattr(other, setting, value)
    return other


def _settings(pruner: Pruner) -> list[str]:
    """What a grid may change: the fields of a dataclass, else every public attribute."""
    if _made_from_fields(pruner):
        return [field.name for field in fields(pruner) if field.init]  # type: ignore[arg-type]
    return [name for name in vars(pruner) if not name.startswith("_")]


def _made_from_fields(pruner: Pruner) -> bool:
    """Whether the pruner is a dataclass, and no subclass of one with an ``__init__`` of its own."""
    maker = next(kind for kind in type(pruner).__mro__ if "__init__" in vars(kind))
    return "__dataclass_fields__" in vars(maker)


def _seeded(pruner: Pruner, seed: int) -> Pruner:
    """A pruner with a setting ``seed`` of its own draws otherwise with each seed of the comparison."""
    own = vars(pruner).get("seed")
    return changed(pruner, "seed", own + seed) if isinstance(own, int) and seed else pruner


def _short(value: Any) -> str:
    """As few digits as tell it from any other."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _plain(value: Any) -> Plain:
    """For a record: what is no plain value, as text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else ADDRESS.sub("", str(value))
