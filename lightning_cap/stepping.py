"""Calling a LightningModule's steps outside its loop, without a trace in the run."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_cap import distributed, rng

_LOGGING = ("log", "log_dict", "print")


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode and eager execution inside; afterwards flags, buffers, plain attributes and random state are as before."""
    modes = {layer: layer.training for layer in module.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    module.eval()
    try:
        with rng.preserved(), _attributes(*module.modules()), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Logging is suppressed and metrics stand still inside: ``self.log(on_step=True)`` raises in most hooks."""
    with _logging(module, _ignore), _metrics(module, _stand):
        yield


@contextmanager
def calibrating(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Around the reading of calibration batches and losses on them: no trace in the run, the training's augmentation."""
    with undisturbed(module), quiet(module), in_stage(trainer, RunningStage.TRAINING):
        yield


def calibration_loss(module: pl.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    """``loss(model, batch)``: the module's ``calibration_step(batch, batch_idx)``, else its ``training_step``.

    To be called inside `quiet`.
    """

    def loss(_: nn.Module, batch: Any) -> Any:
        step = getattr(module, "calibration_step", None) or module.training_step
        with _attributes(module):  # a module that collects its outputs would hold every graph
            out = step(*_arguments(step, batch, 0))
        return out["loss"] if isinstance(out, Mapping) and "loss" in out else out

    return loss


def ready_batches(
    trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], key: tuple[int, ...]
) -> Iterator[Any]:
    """Batches after the batch-transfer hooks, each computed on under generators seeded by its number."""
    for number, batch in enumerate(batches):
        rng.seed_by(*key, number * distributed.world_size() + distributed.rank())
        yield to_device(trainer, module, batch)


def to_device(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, loader: int = 0) -> Any:
    """What Lightning does to a batch before its step: precision, transfer hooks, device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)


@contextmanager
def in_stage(trainer: pl.Trainer, stage: RunningStage) -> Iterator[None]:
    """``trainer.training`` or ``trainer.validating`` inside, which transfer hooks ask for."""
    before = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = before


def evaluate(trainer: pl.Trainer, module: pl.LightningModule, batches: int | None = None) -> dict[str, float]:
    """One pass over the validation data: whatever the module logs in it, averaged or computed as Lightning would.

    Callbacks and loggers see nothing of it; metrics are updated in copies. Empty if there is nothing to validate with.

    Args:
        trainer: In ``fit`` or ``validate``.
        module: Its LightningModule.
        batches: Stop after so many of each loader. Default: as the Trainer is set.
    """
    if trainer.val_dataloaders is None and trainer.enable_validation:  # no epoch has been validated yet
        with in_stage(trainer, RunningStage.VALIDATING):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = trainer.val_dataloaders
    if loaders is None or not trainer.limit_val_batches or not trainer.num_val_batches:
        return {}
    flat = CombinedLoader(loaders, "sequential").flattened
    record = _Record()
    with (
        undisturbed(module),
        torch.no_grad(),
        in_stage(trainer, RunningStage.VALIDATING),
        _metrics(module, copy.deepcopy),
        _logging(module, record),
    ):
        module.on_validation_epoch_start()
        for index, loader in enumerate(flat):
            record.suffix = f"/dataloader_idx_{index}" if len(flat) > 1 else ""
            for number, raw in enumerate(loader):
                if number >= min(trainer.num_val_batches[index], math.inf if batches is None else batches):
                    break
                batch = to_device(trainer, module, raw, index)
                record.batch_size = size_of(batch)
                with trainer.precision_plugin.val_step_context():
                    module.validation_step(*_arguments(module.validation_step, batch, number, index))
        record.suffix, record.batch_size = "", 1
        module.on_validation_epoch_end()
        return record.results(module.device)


class _Record:
    """Stands in for ``self.log`` and keeps what it is given."""

    def __init__(self) -> None:
        self.batch_size = 1
        self.suffix = ""
        self._sums: dict[str, Tensor] = {}
        self._metrics: dict[str, Metric] = {}

    def __call__(
        self,
        name: Any,
        value: Any = None,
        *_: Any,
        batch_size: int | None = None,
        add_dataloader_idx: bool = True,
        **__: Any,
    ) -> None:
        if not isinstance(name, str):  # log_dict
            for key, entry in name.items():
                self(key, entry, batch_size=batch_size, add_dataloader_idx=add_dataloader_idx)
            return
        name += self.suffix if add_dataloader_idx else ""
        if isinstance(value, Metric):
            self._metrics[name] = value
        elif isinstance(value, (int, float, Tensor)):
            weight = float(batch_size or self.batch_size)
            entry = torch.tensor([float(value) * weight, weight], dtype=torch.float64)
            self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + entry

    def results(self, device: torch.device) -> dict[str, float]:
        out = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        for name, entry in self._sums.items():
            total = distributed.sum_over_ranks(entry.float().to(device))
            out[name] = float(total[0] / total[1])
        return out


class _StandingMetric(nn.Module):
    """Takes a metric's place and does nothing; its value is zero."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Zero."""
        return torch.zeros(())

    compute = forward

    def update(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""


class _StandingCollection(_StandingMetric):
    """The same for a collection."""

    def __init__(self, collection: MetricCollection) -> None:
        super().__init__()
        self._standing = {str(name): _StandingMetric() for name in collection.keys(keep_base=False)}

    def forward(self, *_: Any, **__: Any) -> Any:
        """Zeros by name."""
        return {name: torch.zeros(()) for name in self._standing}

    compute = forward

    def __getitem__(self, name: str) -> _StandingMetric:
        return self._standing.get(name, _StandingMetric())

    def __iter__(self) -> Iterator[str]:
        return iter(self._standing)

    def keys(self) -> Any:
        """Names."""
        return self._standing.keys()

    def items(self) -> Any:
        """Names and standing metrics."""
        return self._standing.items()


def _stand(metric: nn.Module) -> nn.Module:
    return _StandingCollection(metric) if isinstance(metric, MetricCollection) else _StandingMetric()


@contextmanager
def _metrics(module: nn.Module, replacement: Callable[[Any], nn.Module]) -> Iterator[None]:
    """Swap every metric of the module for a replacement."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        if not isinstance(parent, (Metric, MetricCollection))
        for name, child in parent._modules.items()
        if isinstance(child, (Metric, MetricCollection))
    ]
    for parent, name, metric in found:
        parent._modules[name] = replacement(metric)
    try:
        yield
    finally:
        for parent, name, metric in found:
            parent._modules[name] = metric


@contextmanager
def _logging(module: nn.Module, log: Callable[..., None]) -> Iterator[None]:
    """Swap the logging methods of a LightningModule and those inside it."""
    modules = [m for m in module.modules() if isinstance(m, pl.LightningModule)]
    before = [{name: m.__dict__[name] for name in _LOGGING if name in m.__dict__} for m in modules]
    for m in modules:
        m.__dict__.update({"log": log, "log_dict": log, "print": _ignore})
    try:
        yield
    finally:
        for m, saved in zip(modules, before, strict=True):
            for name in _LOGGING:
                del m.__dict__[name]
            m.__dict__.update(saved)


def _ignore(*_: Any, **__: Any) -> None:
    """In place of ``self.log``."""


def _arguments(step: Callable[..., Any], *values: Any) -> list[Any]:
    """Those of (batch, batch_idx, dataloader_idx) that a step takes."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(step).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return list(values[:2])
    wanted = [p for p in parameters if p.kind in kinds]
    wanted = [p for p in wanted if p.default is p.empty or p.name in ("batch_idx", "dataloader_idx")]
    return [value for value, _ in zip((*values, 0), wanted, strict=False)]


@contextmanager
def _attributes(*modules: nn.Module) -> Iterator[None]:
    """Put back the modules' own lists, dicts, sets and plain values afterwards, such as outputs that a step collects."""
    plain = (list, dict, set, bool, int, float, str, type(None))
    internal = _internal_attributes()
    saved: list[tuple[nn.Module, str, Any, Any]] = []
    for module in modules:
        for name, value in module.__dict__.items():
            if name not in internal and isinstance(value, plain):
                saved.append((module, name, value, copy.copy(value)))
    try:
        yield
    finally:
        for module, name, value, content in saved:
            if isinstance(value, list):
                value[:] = content
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(content)
            module.__dict__[name] = value


@functools.cache
def _internal_attributes() -> frozenset[str]:
    """What torch and Lightning keep in every module."""
    return frozenset(nn.Module().__dict__.keys() | pl.LightningModule().__dict__.keys())


def size_of(batch: Any) -> int:
    """Samples in a batch: dim 0 of its first tensor."""
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    return 1
