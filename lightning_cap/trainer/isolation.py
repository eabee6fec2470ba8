"""Calling a LightningModule's steps outside its loop, without a trace in the run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_cap.utilities import rng

_LOGGING = ("log", "log_dict", "print")


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Eval mode and eager execution inside; afterwards flags, buffers, plain attributes and random state are as before."""
    modes = {layer: layer.training for layer in module.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    module.eval()
    try:
        with rng.preserved(), preserve_attributes(*module.modules()), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


@contextmanager
def suppress_logging(module: nn.Module) -> Iterator[None]:
    """Logging is suppressed and metrics stand still inside: ``self.log(on_step=True)`` raises in most hooks."""
    with replace_logging(module, _ignore), replace_metrics(module, _stand):
        yield


@contextmanager
def in_stage(trainer: pl.Trainer, stage: RunningStage) -> Iterator[None]:
    """``trainer.training`` or ``trainer.validating`` inside, which transfer hooks ask for."""
    before = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = before


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
def replace_metrics(module: nn.Module, replacement: Callable[[Any], nn.Module]) -> Iterator[None]:
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
def replace_logging(module: nn.Module, log: Callable[..., None]) -> Iterator[None]:
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


@contextmanager
def preserve_attributes(*modules: nn.Module) -> Iterator[None]:
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
