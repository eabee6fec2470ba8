"""Second moments of layer inputs: batches -> sums of ``x xᵀ`` for every target, by forward passes alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.calibration.batches import batch_size, first_samples
from lightning_cap.calibration.checks import check_collector
from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.calibration.rows import Loss
from lightning_cap.calibration.sources import NO_MEMORY, SourceMemory, Trial, peek, reading, repeatable
from lightning_cap.errors import GradientError, TargetError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_counts, require_flag, require_instance
from lightning_cap.utilities.memory import release_memory
from lightning_cap.utilities.peak_memory import measure_peak
from lightning_cap.utilities.precision import full_float32
from lightning_cap.utilities.progress import Progress

_FLOATS = 2**24  # of unfolded inputs at a time
_KNOWN = {nn.Linear.forward: 0, nn.Conv1d.forward: 1, nn.Conv2d.forward: 2}


class LayerGrams(dict[str, Tensor]):
    """``{target: (G, I, I)}`` float32: sums of ``x xᵀ`` over samples and positions, for each group of a grouped convolution.

    ``x`` has the ``I`` inputs of an output row in the order of the weight as stored: ``(I)``, or ``(I, kH, kW)`` flattened.

    Attributes:
        count: Samples that the sums are over.
    """

    count: int = 0


def sum_up(source: Iterable[Any], device: torch.device, names: Collection[str] | None = None) -> LayerGrams:
    """All chunks together, over all processes: float64 sums. Every process must call it.

    Args:
        source: Chunks; read once.
        device: Where to add them up.
        names: Targets that every chunk must have. Default: those that the first one has.

    Raises:
        GradientError: A chunk is none, or has nothing of a target; they are not finite, or there are none.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    with distributed.raise_on_all_ranks("Collecting layer inputs"), reading(source) as chunks:
        for chunk in chunks:
            grams = _checked(chunk, names)
            del chunk
            for name in grams if names is None else names:
                gram = grams[name].to(device)
                sums[name] = sums[name].add_(gram) if name in sums else gram.double()
            count += grams.count
            del grams
        if sums and not all(bool(torch.isfinite(total).all()) for total in sums.values()):
            raise GradientError("inputs: layer inputs are not finite. Check the model and the calibration data.")
    counts = distributed.gather_counts(count, device)
    if sum(counts) == 0:
        raise GradientError("inputs: the calibration batches are empty. Check the data set and its batch size.")
    if min(counts) == 0:  # a process without a batch of its own
        shapes = next(s for s in distributed.gather_objects({n: list(t.shape) for n, t in sums.items()}) if s)
        sums = sums or {n: torch.zeros(shape, dtype=torch.float64, device=device) for n, shape in shapes.items()}
    out = LayerGrams({name: distributed.sum_over_ranks(sums.pop(name)) for name in list(sums)})
    out.count = sum(counts)
    return out


def _checked(chunk: object, names: Collection[str] | None) -> LayerGrams:
    if not isinstance(chunk, LayerGrams):
        raise GradientError(
            f"gradients: layer-wise pruning needs layer statistics (LayerGrams), got {type(chunk).__name__}. Give an "
            "InputCollector as the source."
        )
    missing = [name for name in names or () if name not in chunk]
    if missing:
        raise GradientError(
            f"gradients: a chunk has no layer statistics of {missing[0]!r}. Give those of every target."
        )
    return chunk


class InputCollector:
    """A re-iterable source of layer statistics.

    Args:
        model: Put into eval mode by the caller; its parameters are not changed.
        targets: Weights of Linear, Conv1d and Conv2d layers.
        loss: ``loss(model, batch)``; called for its forward pass, without gradients.
        batches: This rank's batches; re-iterable to be read again.
        num_inputs: Samples over all processes.
        context: Entered around every forward pass, e.g. autocast.
        progress: ``progress("collect", samples done, num_inputs)``.
        trial: See `GradientCollector`.
        optional: Leave out targets whose inputs are not known, instead of refusing them.

    Raises:
        ConfigError: An argument is out of range.
        TargetError: A target is not the weight of such a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        batches: Iterable[Any],
        num_inputs: int,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
        trial: Trial | None = None,
        optional: bool = False,
    ) -> None:
        check_collector(model, targets, loss, batches, context, progress)
        require_counts(num_inputs=num_inputs)
        require_flag("optional", optional)
        require_instance("trial", trial, Trial, "earlier.trial", optional=True)
        self._model, self._loss, self._batches = model, loss, batches
        self._num_inputs, self._context, self._progress = num_inputs, context, progress
        layers = {name: model.get_submodule(path.rpartition(".")[0]) for name, path in targets.paths.items()}
        if not optional:
            for name, layer in layers.items():
                _check_layer(layer, name, targets.paths[name])
        self._layers: dict[str, Any] = {n: x for n, x in layers.items() if inputs_known(x, targets.paths[n])}
        self._optional = optional
        self._device = targets.device
        self.trial = trial
        self.skipped = 0
        self.collected = 0

    @property
    def repeatable(self) -> bool:
        """Whether the batches can be read again."""
        return repeatable(self._batches)

    def memory(self) -> SourceMemory:
        """What reading this takes, as the first batch tells, which is read if it is not known yet. Every process must call it."""
        if self.trial is None:
            with distributed.raise_on_all_ranks("The first layer inputs"), rng.preserved():
                batch, self._batches = peek(self._batches)
                self.probe(batch)
            release_memory(self._device)
        assert self.trial is not None
        return self.trial.memory

    def __iter__(self) -> Iterator[LayerGrams]:
        """One chunk per batch."""
        self.collected = done = 0
        for batch, _, done in first_samples(self._batches, self._num_inputs):
            grams = self._of(batch)
            self.collected += grams.count
            yield grams
            del grams  # before the next ones are computed
            if self._progress is not None:
                self._progress("collect", done, self._num_inputs)
        release_memory(self._device)
        if done < self._num_inputs:
            warnings.warn(
                f"num_inputs={self._num_inputs}: the batches of this process gave only {self.collected} samples; the "
                "statistics are those of what there is.",
                stacklevel=2,
            )

    def probe(self, batch: Any) -> None:
        """Collect from one batch and throw it away, to fail early; what that takes is known then."""
        if batch is None:  # this process has none
            self.trial = Trial(NO_MEMORY)
            return
        grams, peak = measure_peak(lambda: self._of(batch), self._device)
        size = sum(gram.nbytes for gram in grams.values())
        self.trial = Trial(SourceMemory(peak, 0, size))

    def _of(self, batch: Any) -> LayerGrams:
        grams = LayerGrams()

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def take(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
                gram = outer_products(layer, args[0] if args else named["input"])
                grams[name] = grams[name].add_(gram) if name in grams else gram

            return take

        with ExitStack() as stack:
            for name, layer in self._layers.items():
                handle = layer.register_forward_pre_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            run_forward(self._model, self._loss, batch, self._context)
        missing = [name for name in self._layers if name not in grams]
        if missing and not self._optional:
            raise TargetError(
                f"targets: the layers of {len(missing)}, first {missing[0]!r}, were not called in the forward pass, so their "
                "inputs are not known. Leave them out with exclude=[...]."
            )
        grams.count = batch_size(batch)
        return grams


def run_forward(model: nn.Module, loss: Loss, batch: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """A forward pass for what hooks see of it."""
    with torch.inference_mode(False), torch.no_grad(), context(), PlainNormalization():
        loss(model, batch)


def inputs_known(layer: nn.Module, path: str) -> bool:
    """Whether ``path`` is the weight of a layer whose inputs to an output row are known: a plain Linear, Conv1d or Conv2d."""
    return path.rpartition(".")[2] == "weight" and type(layer).forward in _KNOWN


def _check_layer(layer: nn.Module, name: str, path: str) -> None:
    if not inputs_known(layer, path):
        raise TargetError(
            f"target {name!r} belongs to a {type(layer).__name__}, whose inputs to a row are not known: layer-wise pruning needs "
            f"plain Linear, Conv1d or Conv2d layers. Leave it out with exclude=[{name!r}]."
        )


def _groups(layer: Any) -> int:
    return int(getattr(layer, "groups", 1))


def _inputs(layer: Any) -> int:
    return int(layer.weight[0].numel())


def outer_products(layer: Any, x: Tensor, ones: bool = False) -> Tensor:
    """Sum of the outer products of what the output rows of a layer are given.

    Args:
        layer: See `inputs_known`.
        x: What it is called with.
        ones: Add an input that is always 1, as the last: the bias as one more weight.

    Returns:
        ``(G, I, I)`` float32 for the ``G`` groups of a convolution, in the order of the weight as stored; with ``ones``, ``I + 1``.
    """
    size = _inputs(layer)
    total = torch.zeros(_groups(layer), size + ones, size + ones, dtype=torch.float32, device=x.device)
    with torch.no_grad(), full_float32():
        for rows in _rows(layer, x.detach()):
            total[:, :size, :size] += rows.mT @ rows
            if ones:
                total[:, -1, :size] += rows.sum(1)
                total[:, -1, -1] += rows.shape[1]
    if ones:
        total[:, :size, -1] = total[:, -1, :size]
    return total


def _rows(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """What the output rows of a layer are multiplied with, in chunks ``(G, n, I)`` float32, over all samples and positions."""
    dims = _KNOWN[type(layer).forward]
    if not dims:
        for rows in x.reshape(-1, x.shape[-1]).split(max(1, _FLOATS // x.shape[-1])):
            yield rows.float().unsqueeze(0)
        return
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    if dims == 1:
        x = x.unsqueeze(2)
    kernel, stride, dilation = ((1,) * (2 - dims) + tuple(v) for v in (layer.kernel_size, layer.stride, layer.dilation))
    for images in x.split(max(1, _FLOATS // (x[0].numel() * kernel[0] * kernel[1]))):
        columns = F.unfold(images.float(), kernel, dilation, 0, stride)  # (n, G·I, L)
        yield columns.unflatten(1, (_groups(layer), -1)).permute(1, 0, 3, 2).flatten(1, 2)
