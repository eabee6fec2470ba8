"""What a pruner reads, as a value that makes its own collector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.checks import check_samples
from lightning_cap.calibration.gradients import GradientCollector, rows_at_once
from lightning_cap.calibration.layer_inputs import InputCollector
from lightning_cap.calibration.rows import Loss
from lightning_cap.calibration.sharded_rows import ShardedCollector
from lightning_cap.calibration.sources import SourceMemory, Trial
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.progress import Progress

_MOST_INPUTS = 2**16  # samples in a batch of layer inputs


class Collector(Protocol):
    """A re-iterable source of chunks, one pass of it a collection."""

    @property
    def collected(self) -> int:
        """What the last pass gave."""

    @property
    def skipped(self) -> int:
        """What it left out."""

    @property
    def trial(self) -> Trial | None:
        """What the first batch has told; None before."""

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        """Chunks for every target."""

    def probe(self, batch: Any) -> None:
        """Compute what one batch gives and throw it away, to fail early; `trial` is known then. None: there is no batch."""

    def memory(self) -> SourceMemory:
        """What reading it takes; the first batch is tried for it, if none was. Every process must call it."""


class Statistic(ABC):
    """What a pruner reads of the model on calibration data.

    Attributes:
        unit: What is counted, for logs.
    """

    unit: ClassVar[str]

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples of the data that it takes, over all processes."""

    @abstractmethod
    def batches(
        self, source: Iterable[Any], targets: Targets, key: tuple[int, int], sampler: Iterable[Any] | None = None
    ) -> CalibrationBatches:
        """This process's batches of ``source``, drawn by a key (seed, collection index). See `CalibrationBatches`."""

    @abstractmethod
    def collector(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        batches: Iterable[Any],
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scale: float = 1.0,
        progress: Progress | None = None,
        trial: Trial | None = None,
    ) -> Collector:
        """What computes it from batches. Arguments: see `GradientCollector`."""


@dataclass(frozen=True)
class GradientSamples(Statistic):
    """Gradient rows of the mean loss.

    Args:
        n: Rows over all processes, ``N`` of equation 3.
        per_sample: Inputs whose mean loss gives one row.

    Raises:
        ConfigError: A number is out of range, or they are too many samples together.
    """

    n: int
    per_sample: int = 1

    def __post_init__(self) -> None:
        check_samples(n=self.n, per_sample=self.per_sample)

    unit: ClassVar[str] = "gradients"

    @property
    def num_samples(self) -> int:
        """``n`` times ``per_sample``."""
        return self.n * self.per_sample

    def batches(
        self, source: Iterable[Any], targets: Targets, key: tuple[int, int], sampler: Iterable[Any] | None = None
    ) -> CalibrationBatches:
        """See `Statistic`."""
        return CalibrationBatches(source, self.num_samples, self.per_sample, *key, rows_at_once(targets), sampler)

    def collector(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        batches: Iterable[Any],
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scale: float = 1.0,
        progress: Progress | None = None,
        trial: Trial | None = None,
    ) -> GradientCollector:
        """See `Statistic`."""
        counts = self.n, self.per_sample
        make = ShardedCollector if targets.is_sharded else GradientCollector
        return make(
            model, targets, loss, batches, *counts, context=context, scale=scale, progress=progress, trial=trial
        )


@dataclass(frozen=True)
class LayerInputs(Statistic):
    """Second moments of the inputs of each target's layer, by forward passes alone.

    Args:
        n: Samples over all processes.

    Raises:
        ConfigError: ``n`` is out of range.
    """

    n: int

    def __post_init__(self) -> None:
        check_samples(n=self.n)

    unit: ClassVar[str] = "inputs"

    @property
    def num_samples(self) -> int:
        """``n``."""
        return self.n

    def batches(
        self, source: Iterable[Any], targets: Targets, key: tuple[int, int], sampler: Iterable[Any] | None = None
    ) -> CalibrationBatches:
        """See `Statistic`."""
        return CalibrationBatches(source, self.n, 1, *key, _MOST_INPUTS, sampler)

    def collector(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        batches: Iterable[Any],
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scale: float = 1.0,
        progress: Progress | None = None,
        trial: Trial | None = None,
    ) -> InputCollector:
        """See `Statistic`. There is no gradient to scale."""
        return InputCollector(model, targets, loss, batches, self.n, context=context, progress=progress, trial=trial)
