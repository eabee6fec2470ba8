"""What a comparison runs: every pruner, the same with one setting changed, each with every seed. All of it checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.comparison.fingerprint import ADDRESS, canonicalize, checksum
from lightning_cap.comparison.records import MASKS, UNPRUNED, GridPoint
from lightning_cap.errors import CAPError, ConfigError, PatternError
from lightning_cap.pruners.base import Pruner, heal_of, refuse_regrowth
from lightning_cap.sparsity.cost import StepPath, require_path_of_steps, steps_to
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.arguments import is_whole, require_instance, require_real, require_whole, shown
from lightning_cap.utilities.records import Plain

#: Setting -> values to try, one setting at a time, the others as given.
Grids = Mapping[str, Sequence[Any]]

_MOST_STEPS = 1000  # to a sparsity
_LONGEST_NAME = 80  # characters of a pruner's name
_LONGEST_FILE = 160  # bytes of a file's name, before what is added to it

RECOMPUTATIONS = "num_recomputations"  # a setting of the run, not of a pruner


@dataclass(frozen=True, eq=False)  # a pruner of the user's, or an allocation by a dict, may have no hash
class Variant:
    """One pruner with one seed: what one path is made for.

    Attributes:
        name: Of the pruner, as given.
        pruner: With the settings of this variant.
        seed: Key of the calibration samples.
        num_recomputations: Steps of rising sparsity, with fresh gradients for each.
        path: How those steps rise; see `steps_to`.
        recalibrate: Estimate the statistics of batch norm anew in the end.
        setting: What was changed, None for the pruner as given.
        value: What it was changed to.
    """

    name: str
    pruner: Pruner
    seed: int
    num_recomputations: int = 1
    path: StepPath = "exponential"
    recalibrate: bool = False
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
                **({"recalibrate": True} if self.recalibrate else {}),
                **changed,
            },
        }

    @property
    def key(self) -> str:
        """A checksum of all settings, the seed and the steps."""
        steps = [self.num_recomputations, *([self.path] if self.num_recomputations > 1 else [])]
        after = ["recalibrate"] if self.recalibrate else []
        return checksum([self.settings, canonicalize(vars(self.pruner)), self.seed, *steps, *after])

    @property
    def calibrates(self) -> bool:
        """Whether calibration data is read for it."""
        return self.pruner.statistic is not None or heal_of(self.pruner) is not None or self.recalibrate

    def steps_to(self, goal: float, start: float) -> list[float]:
        """Those on the way to a goal. See `lightning_cap.sparsity.cost.steps_to`."""
        return steps_to(goal, start, self.num_recomputations, self.path)


def make_variants(
    pruners: Mapping[str, Pruner],
    seeds: Sequence[int],
    grids: Grids | None,
    num_recomputations: int,
    path: StepPath = "exponential",
    recalibrate: bool = False,
) -> list[Variant]:
    """Every pruner as given and then at each value of the grids, with each seed.

    Raises:
        ConfigError: A name, a seed or a grid cannot work.
    """
    require_path_of_steps("recomputation_path", path)
    _check_names(pruners)
    _require_list("seeds", seeds, "[0, 1, 2]")
    if not all(is_whole(seed) and seed >= 0 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={shown(seeds)}: give different whole numbers of at least 0, such as [0, 1, 2].")
    plain = [(name, pruner, num_recomputations, None, None) for name, pruner in pruners.items()]
    every = [*plain, *_grid_variants(pruners, grids, num_recomputations)]
    for name, pruner, steps, _, _ in every:
        heal_of(pruner)
        require_whole(RECOMPUTATIONS, steps, 1, _MOST_STEPS)
        if steps > 1 and pruner.pattern.sparsity is not None:
            raise ConfigError(
                f"{RECOMPUTATIONS}={steps}: {pruner.pattern} of pruner {name!r} has only one sparsity, so that it cannot be "
                "reached in steps. Leave it at 1, or compare that pruner by itself."
            )
    variants = [
        Variant(name, _seeded(pruner, seed), seed, steps, path, recalibrate, setting, value)
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
    _require_list("sparsities", sparsities, "[0.5, 0.75, 0.9]")
    for sparsity in sparsities:
        require_real("sparsities", sparsity, "[0, 1)", 0.75, PatternError)
    if len(set(sparsities)) != len(sparsities):
        raise ConfigError(f"sparsities={shown(list(sparsities))}: give each once, such as [0.5, 0.75, 0.9].")
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
    for variant in variants:
        with naming(variant):
            variant.pruner.check(targets)
            first = variant.pruner.reached(targets, masks)
            goals = {goal for sparsity in sparsities for goal in variant.steps_to(sparsity, first)}
            variant.pruner.check_goals(targets, masks, sorted(goals))


@contextmanager
def naming(variant: Variant) -> Iterator[None]:
    """Say in errors of ours which pruner they are about."""
    try:
        yield
    except CAPError as error:
        raise type(error)(f"pruner {variant.label!r}: {error}") from error


def file_name(text: str) -> str:
    """The text without what file systems or globs could take otherwise; of a long one the start, and a checksum."""
    name = re.sub(r"[^\w=.+-]+", "-", text).strip("-.")
    return name if len(name.encode()) <= _LONGEST_FILE else f"{name[: _LONGEST_FILE // 4]}-{checksum(text)}"


def _require_list(name: str, value: object, example: str) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{name}={shown(value)}: give a list with at least one entry, such as {example}.")


def _check_names(pruners: Mapping[str, Pruner]) -> None:
    if isinstance(pruners, type) and issubclass(pruners, Pruner):
        require_instance("pruners", pruners, Pruner, "CAP()")
    if not isinstance(pruners, Mapping) or not pruners:
        example = "{'CAP': CAP(), 'magnitude': Magnitude()}"
        raise ConfigError(f"pruners={shown(pruners)}: give a pruner, or several by name, such as {example}.")
    files: dict[str, str] = {}
    for name, pruner in pruners.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ConfigError(
                f"pruners: {shown(name)} is no name. Give strings of one line, of at most {_LONGEST_NAME} characters."
            )
        require_instance(f"pruners[{name!r}]", pruner, Pruner, "CAP()")
        refuse_regrowth(pruner)
        stem = file_name(name).lower()
        if not stem or stem in (UNPRUNED, MASKS) or stem in files:
            other = f"its files would be those of {files[stem]!r}" if stem in files else "that name is not free"
            raise ConfigError(f"pruners: the name {name!r} cannot be used: {other}. Choose another.")
        files[stem] = name


def _grid_variants(
    pruners: Mapping[str, Pruner], grids: Grids | None, num_recomputations: int
) -> list[tuple[str, Pruner, int, str | None, Any]]:
    found: list[tuple[str, Pruner, int, str | None, Any]] = []
    if grids is not None and not isinstance(grids, Mapping):
        raise ConfigError(f"grids={shown(grids)}: give settings with their values, such as {{'damp': [1e-8, 1e-6]}}.")
    for setting, values in (grids or {}).items():
        _require_list(f"grids: {setting}", values, "[1e-8, 1e-6]")
        if len({_key(value) for value in values}) != len(values):
            raise ConfigError(f"grids: {setting}={shown(list(values))}: give each value once.")
        having = {name: pruner for name, pruner in pruners.items() if setting in _settings(pruner)}
        if setting == RECOMPUTATIONS:
            having = {name: pruner for name, pruner in pruners.items() if pruner.pattern.sparsity is None}
        if not having:
            raise ConfigError(
                f"grids: no pruner of {shown(list(pruners))} has a setting {shown(setting)}. Look at their arguments."
            )
        for name, pruner in having.items():
            for value in values:
                if setting == RECOMPUTATIONS and _key(value) != _key(num_recomputations):
                    found.append((name, pruner, value, setting, value))
                elif setting != RECOMPUTATIONS and _key(value) != _key(getattr(pruner, setting)):
                    found.append((name, changed(pruner, setting, value), num_recomputations, setting, value))
    return found


def _key(value: Any) -> Any:
    """Equal for equal values, whatever they are."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain else checksum(canonicalize(value))


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
