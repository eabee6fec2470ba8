"""What pruners of units read: gradients of gates on the units, inputs of the layers that read them, losses of pruned weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from lightning_cap.calibration.batches import CalibrationBatches, first_samples
from lightning_cap.calibration.checks import check_samples
from lightning_cap.calibration.gate_rows import GateComputer
from lightning_cap.calibration.gradients import GradientCollector, rows_at_once
from lightning_cap.calibration.layer_inputs import InputCollector, LayerGrams, sum_up
from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.calibration.rows import Loss, RowComputer
from lightning_cap.calibration.sources import SourceMemory, Trial
from lightning_cap.calibration.statistics import LayerInputs, Statistic
from lightning_cap.errors import GradientError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import consumers_of, gates_of
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_list, require_whole
from lightning_cap.utilities.progress import Progress


@dataclass(frozen=True)
class UnitSamples(Statistic):
    """Gradients of a gate of value 1 on every unit, ``{group: (n, size)}``.

    Args:
        n: Rows over all processes.
        per_sample: Inputs whose mean loss gives one row.
        num_inputs: Samples whose layer inputs and losses a method may ask for besides; 0 for none.

    Raises:
        ConfigError: A number is out of range, or they are too many samples together.
    """

    n: int
    per_sample: int = 1
    num_inputs: int = 0

    def __post_init__(self) -> None:
        check_samples(n=self.n, per_sample=self.per_sample)
        require_whole("num_inputs", self.num_inputs, at_least=0)
        if self.num_inputs:
            check_samples(num_inputs=self.num_inputs)

    unit: ClassVar[str] = "gradients"

    @property
    def num_samples(self) -> int:
        """Those of the gradients, or of the inputs if there are more."""
        return max(self.n * self.per_sample, self.num_inputs)

    def batches(
        self, source: Iterable[Any], targets: Targets, key: tuple[int, int], sampler: Iterable[Any] | None = None
    ) -> CalibrationBatches:
        """See `Statistic`."""
        most = rows_at_once(gates_of(targets))
        return CalibrationBatches(source, self.num_samples, self.per_sample, *key, most, sampler)

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
    ) -> UnitCollector:
        """See `Statistic`."""
        gradients = GradientCollector(
            model,
            gates_of(targets),
            loss,
            batches,
            self.n,
            self.per_sample,
            context=context,
            scale=scale,
            progress=progress,
            trial=trial,
            computer=self.computer(model, targets, loss, context, scale),
        )
        return UnitCollector(model, targets, loss, batches, gradients, self.num_inputs, context, progress)

    def computer(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        context: Callable[[], AbstractContextManager[Any]],
        scale: float,
    ) -> RowComputer:
        """What computes the rows of a batch. Arguments: see `GateComputer`."""
        return GateComputer(model, targets, loss, self.per_sample, context, scale)


@dataclass(frozen=True)
class UnitInputs(LayerInputs):
    """Second moments of the inputs of the layers that read units, by forward passes alone.

    Args:
        n: Samples over all processes.

    Raises:
        ConfigError: ``n`` is out of range.
    """

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
        readers = consumers_of(targets)
        return InputCollector(model, readers, loss, batches, self.n, context=context, progress=progress, trial=trial)


class MeasuringSource(Protocol):
    """A source that can read the calibration samples again, for other things than gradients."""

    def layer_inputs(self) -> LayerGrams:
        """Sums of ``x xᵀ`` of the layers that read units, over all processes. Every process must call it."""

    def losses(self, candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Mean loss with each of several sets of weights. Every process must call it."""


class UnitCollector:
    """A re-iterable source of gate gradients.

    Args:
        model: Put into eval mode by the caller; its parameters are not changed.
        targets: All weights of units.
        loss: Mean loss of a batch.
        batches: This rank's batches; re-iterable if ``num_inputs`` is above 0.
        gradients: Of the gates, from the same batches.
        num_inputs: Samples for `layer_inputs` and `losses`, over all processes.
        context: Entered around every loss evaluation, e.g. autocast.
        progress: See `GradientCollector`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        batches: Iterable[Any],
        gradients: GradientCollector,
        num_inputs: int = 0,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._targets = model, targets
        self._loss, self._batches, self._gradients = loss, batches, gradients
        self._num_inputs, self._context, self._progress = num_inputs, context, progress

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Chunks ``{group: (n, size)}`` of finite rows; see `GradientCollector`."""
        yield from self._gradients

    @property
    def collected(self) -> int:
        """Rows given, in the last pass."""
        return self._gradients.collected

    @property
    def skipped(self) -> int:
        """Rows left out because they were not finite, in the last pass."""
        return self._gradients.skipped

    @property
    def trial(self) -> Trial | None:
        """What the first batch has told; None before."""
        return self._gradients.trial

    @property
    def repeatable(self) -> bool:
        """Whether the batches can be read again."""
        return self._gradients.repeatable

    @property
    def measures(self) -> bool:
        """Whether `layer_inputs` and `losses` can be asked for."""
        return self._num_inputs > 0

    def probe(self, batch: Any) -> None:
        """See `GradientCollector.probe`."""
        self._gradients.probe(batch)

    def memory(self) -> SourceMemory:
        """See `GradientCollector.memory`."""
        return self._gradients.memory()

    def limit_rows(self, rows: int) -> None:
        """See `GradientCollector.limit_rows`."""
        self._gradients.limit_rows(rows)

    def layer_inputs(self) -> LayerGrams:
        """See `MeasuringSource`; those that are not known, as of attention by torch's own module, are left out."""
        self._check_repeatable()
        readers = consumers_of(self._targets)
        inputs = InputCollector(
            self._model,
            readers,
            self._loss,
            self._batches,
            self._num_inputs,
            context=self._context,
            progress=self._progress,
            optional=True,
        )
        return sum_up(inputs, self._targets.device)

    def losses(self, candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """See `MeasuringSource`. All are measured on the same samples, one batch after the other.

        Args:
            candidates: ``{target: (*shape)}`` each; targets that are not there are as they are.

        Raises:
            GradientError: There are no batches, or they can be read only once.
        """
        require_list("candidates", candidates, "[result.weights]")
        self._check_repeatable()
        device = self._targets.device
        sums = torch.zeros(len(candidates) + 1, dtype=torch.float64, device=device)
        before = self._targets.copies()
        with distributed.raise_on_all_ranks("Measuring the loss"):
            for batch, size, done in first_samples(self._batches, self._num_inputs):
                try:
                    for number, weights in enumerate(candidates):
                        self._targets.restore({**before, **weights})
                        sums[number] += size * self._loss_of(batch)
                finally:
                    self._targets.restore(before)
                sums[-1] += size
                if self._progress is not None:
                    self._progress("loss", done, self._num_inputs)
        sums = distributed.sum_over_ranks(sums)
        if not float(sums[-1]):
            raise GradientError("batches: the calibration batches are empty. Check the data set and its batch size.")
        return [float(value) for value in sums[:-1] / sums[-1]]

    def _loss_of(self, batch: Any) -> float:
        with (
            rng.preserved(),  # a loss that is random is so alike for all candidates
            torch.inference_mode(False),
            torch.no_grad(),
            self._context(),
            PlainNormalization(),
        ):
            return float(self._loss(self._model, batch))

    def _check_repeatable(self) -> None:
        if not self.repeatable:
            raise GradientError(
                "batches: an iterator can be read only once, but the inputs of layers are collected in another pass. Give a list "
                "or a DataLoader, or a pruner with compensate=False."
            )


def measuring(source: object) -> MeasuringSource | None:
    """``source``, if it is a `MeasuringSource`, as it tells by an attribute ``measures``."""
    return cast(MeasuringSource, source) if getattr(source, "measures", False) else None
