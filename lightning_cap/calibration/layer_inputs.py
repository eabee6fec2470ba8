"""Second moments of layer inputs: batches -> sums of ``x xᵀ`` for every target, by forward passes alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.calibration.checks import check_collector
from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.calibration.rows import Loss
from lightning_cap.calibration.sources import NO_MEMORY, SourceMemory, Trial, peek, repeatable
from lightning_cap.errors import TargetError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_counts, require_instance
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
    ) -> None:
        check_collector(model, targets, loss, batches, context, progress)
        require_counts(num_inputs=num_inputs)
        require_instance("trial", trial, Trial, "earlier.trial", optional=True)
        self._model, self._loss, self._batches = model, loss, batches
        self._num_inputs, self._context, self._progress = num_inputs, context, progress
        self._layers = {name: _layer(model, name, path) for name, path in targets.paths.items()}
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
        self.collected = before = 0
        for batch in self._batches:
            size = batch_size(batch)
            before = self.collected * distributed.world_size() + distributed.rank() * size  # those of all processes
            if before >= self._num_inputs:
                return
            wanted = min(size, self._num_inputs - before)
            grams = self._of(batch if wanted == size else slice_batch(batch, size, 0, wanted))
            self.collected += grams.count
            yield grams
            del grams  # before the next ones are computed
            if self._progress is not None:
                self._progress("collect", min(before + size, self._num_inputs), self._num_inputs)
            before = self.collected * distributed.world_size() + distributed.rank() * size
        release_memory(self._device)
        if before < self._num_inputs:
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
                gram = _gram(layer, args[0] if args else named["input"])
                grams[name] = grams[name].add_(gram) if name in grams else gram

            return take

        with ExitStack() as stack:
            for name, layer in self._layers.items():
                handle = layer.register_forward_pre_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            with torch.inference_mode(False), torch.no_grad(), self._context(), PlainNormalization():
                self._loss(self._model, batch)
        missing = [name for name in self._layers if name not in grams]
        if missing:
            raise TargetError(
                f"targets: the layers of {len(missing)}, first {missing[0]!r}, were not called in the forward pass, so their "
                "inputs are not known. Leave them out with exclude=[...]."
            )
        grams.count = batch_size(batch)
        return grams


def _layer(model: nn.Module, name: str, path: str) -> Any:
    owner, _, attribute = path.rpartition(".")
    layer = model.get_submodule(owner)
    if attribute != "weight" or type(layer).forward not in _KNOWN:
        raise TargetError(
            f"target {name!r} belongs to a {type(layer).__name__}, whose inputs to a row are not known: layer-wise pruning needs "
            f"plain Linear, Conv1d or Conv2d layers. Leave it out with exclude=[{name!r}]."
        )
    return layer


def _groups(layer: Any) -> int:
    return int(getattr(layer, "groups", 1))


def _inputs(layer: Any) -> int:
    return int(layer.weight[0].numel())


@torch.no_grad()
def _gram(layer: Any, x: Tensor) -> Tensor:
    """``(G, I, I)`` sum of the outer products of a layer's inputs."""
    size = _inputs(layer)
    total = torch.zeros(_groups(layer), size, size, dtype=torch.float32, device=x.device)
    dims = _KNOWN[type(layer).forward]
    if not dims:
        with full_float32():
            for rows in x.detach().reshape(-1, x.shape[-1]).split(max(1, _FLOATS // x.shape[-1])):
                part = rows.float()
                total[0] += part.mT @ part
        return total
    x = x.detach() if x.dim() == dims + 2 else x.detach().unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    if dims == 1:
        x = x.unsqueeze(2)
    kernel, stride, dilation = ((1,) * (2 - dims) + tuple(v) for v in (layer.kernel_size, layer.stride, layer.dilation))
    with full_float32():
        for images in x.split(max(1, _FLOATS // (x[0].numel() * kernel[0] * kernel[1]))):
            columns = F.unfold(images.float(), kernel, dilation, 0, stride)  # (n, G·I, L)
            part = columns.unflatten(1, (_groups(layer), -1)).transpose(0, 1)  # (G, n, I, L)
            part = part.transpose(2, 3).flatten(1, 2)
            total += part.mT @ part
    return total
