"""Re-estimation of the statistics of batch norm, which pruning makes stale: forward passes alone, no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_cap.calibration.batches import batch_size
from lightning_cap.calibration.rows import Loss
from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import (
    require_callable,
    require_counts,
    require_instance,
    require_iterable,
)
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.progress import Progress

#: Samples that statistics are estimated from, where there are so many.
NUM_SAMPLES = 1024


@dataclass(frozen=True)
class BatchNormStatistics:
    """New statistics of the batch norms of a model.

    Attributes:
        mean: ``{layer: (C)}`` float64.
        var: ``{layer: (C)}`` float64, without bias.
        samples: That were read, over all processes.
    """

    mean: Mapping[str, Tensor]
    var: Mapping[str, Tensor]
    samples: int

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Put them into the layers, in place. Momentum and ``num_batches_tracked`` stay as they are.

        Args:
            model: Which they were estimated of.

        Raises:
            ConfigError: ``model`` is no module.
        """
        for name, layer in batch_norms(model).items():
            if name in self.mean and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.copy_(self.mean[name])
                layer.running_var.copy_(self.var[name])


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that keep running statistics: batch norms of torch and timm, and those that are synchronised.

    Args:
        model: Any module.

    Raises:
        ConfigError: ``model`` is no module.
    """
    require_instance("model", model, nn.Module, "timm.create_model('resnet18')")
    return {
        plain_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and isinstance(layer.running_mean, Tensor) and layer.track_running_stats
    }


def estimate_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    num_samples: int = NUM_SAMPLES,
    *,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Progress | None = None,
) -> BatchNormStatistics:
    """Means and variances of what the batch norms get, over whole batches. Every process must call it; all get the same.

    Each batch is normalised by its own statistics, as in training, so that one pass serves all layers. What one process would
    find is found by several, up to rounding, since layers do not communicate in the passes. The model is afterwards as before.

    Args:
        model: In eval mode.
        batches: This process's batches.
        loss: ``loss(model, batch)``, called for its forward pass; its value is not used.
        num_samples: Samples after which no further batch is read, over all processes.
        context: Entered around every forward pass, such as autocast.
        progress: ``progress("recalibrate", samples done, num_samples)``.

    Returns:
        Statistics of the layers that were called; none of a model without batch norm, of which nothing is read.

    Raises:
        ConfigError: An argument is wrong, or a batch gives a layer a single value per channel, of which there is no variance.
        GradientError: What a layer gets is not finite, or there is no batch.
    """
    require_iterable("batches", batches, "a DataLoader")
    require_callable("loss", loss, "lambda model, batch: cross_entropy(model(batch[0]), batch[1])")
    require_counts(num_samples=num_samples)
    require_callable("context", context, "contextlib.nullcontext")
    require_callable("progress", progress, "lambda phase, done, total: None", optional=True)
    layers = batch_norms(model)
    if not layers:
        return BatchNormStatistics({}, {}, 0)
    moments = {name: _Moments(layer) for name, layer in layers.items()}
    samples = 0
    with (
        distributed.raise_on_all_ranks("Estimating the statistics of batch norm"),
        torch.inference_mode(False),
        torch.no_grad(),
        _watched(layers, moments),
    ):
        for batch in batches:
            with context():
                loss(model, batch)
            samples += batch_size(batch)
            done = samples * distributed.world_size()
            if progress is not None:
                progress("recalibrate", min(done, num_samples), num_samples)
            if done >= num_samples:
                break
    return _merged(moments, samples)


@contextmanager
def _watched(layers: Mapping[str, _BatchNorm], moments: Mapping[str, _Moments]) -> Iterator[None]:
    """Let the layers normalise every batch by its own statistics, and tell these; put their buffers back in the end."""
    before = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in layers.items()}  # type: ignore[union-attr]
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(_hook(name, moments[name]), with_kwargs=True)
            stack.callback(handle.remove)
        try:
            yield
        finally:
            for name, layer in layers.items():
                layer.running_mean.copy_(before[name][0])  # type: ignore[union-attr]
                layer.running_var.copy_(before[name][1])  # type: ignore[union-attr]


def _hook(name: str, moments: _Moments) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def take(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(named.values()))).detach()
        count = x.numel() // x.shape[1]
        if count < 2 and moments.count:
            return  # a last batch of one: normalised by the statistics of the one before it, and not counted
        if count < 2:
            raise ConfigError(
                f"recalibrate=True: a batch of {x.shape[0]} samples gives the batch norm {name!r} a single value per channel, of "
                "which there is no variance. Give batches of 2 samples or more."
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        var, mean = torch.var_mean(x.to(wide), dim=(0, *range(2, x.dim())), correction=0)
        moments.add(count, mean, var)
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)

    return take


class _Moments:
    """Count, mean and sum of squared deviations of values per channel, in float64.

    Args:
        layer: That they are of.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.device = layer.running_mean.device  # type: ignore[union-attr]
        own = torch.device("cpu") if self.device.type == "mps" else self.device  # which has no float64
        self.count = 0
        self.mean = torch.zeros(layer.num_features, dtype=torch.float64, device=own)
        self.squares = torch.zeros_like(self.mean)

    def add(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Take further values, by their number, mean and biased variance."""
        if count == 0:
            return
        mean, squares = mean.to(self.mean), count * var.to(self.mean)
        total = self.count + count
        apart = mean - self.mean
        self.squares += squares + apart.square() * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total


def _merged(moments: Mapping[str, _Moments], samples: int) -> BatchNormStatistics:
    """Those of all processes together, merged in order of rank on every one."""
    parts = [torch.cat([m.mean.new_tensor([m.count]), m.mean, m.squares]) for m in moments.values()]
    own = torch.cat([part.to(parts[0].device) for part in parts])
    own = torch.cat([own.new_tensor([samples]), own])
    gathered = distributed.gather_tensors(own)
    mean, var = {}, {}
    for found in moments.values():
        found.count, found.mean, found.squares = 0, torch.zeros_like(found.mean), torch.zeros_like(found.squares)
    for one in gathered:
        for found, part in zip(moments.values(), one[1:].split([len(p) for p in parts]), strict=True):
            channels = len(found.mean)
            count = int(part[0])
            found.add(count, part[1 : 1 + channels], part[1 + channels :] / max(1, count))
    for name, found in moments.items():
        if found.count:
            mean[name], var[name] = found.mean, found.squares / (found.count - 1)
    read = sum(int(one[0]) for one in gathered)
    if read == 0:
        raise GradientError(
            "recalibrate=True: the calibration batches are empty. Check the data set and its batch size."
        )
    broken = [name for name in mean if not bool((mean[name].isfinite() & var[name].isfinite()).all())]
    if broken:
        raise GradientError(
            f"recalibrate=True: what the batch norm {broken[0]!r} gets is not finite. Check the model and the calibration data."
        )
    return BatchNormStatistics(mean, var, read)
