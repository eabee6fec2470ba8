"""One pass over the validation data outside of the Trainer's loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torchmetrics import Metric

from lightning_cap.calibration.batches import batch_size
from lightning_cap.trainer import compat
from lightning_cap.trainer.calibration import step_arguments, to_device
from lightning_cap.trainer.isolation import in_stage, preserve_state, replace_logging, replace_metrics
from lightning_cap.utilities import distributed
from lightning_cap.utilities.sharded import units
from lightning_cap.utilities.stopping import poll


def evaluate(trainer: pl.Trainer, module: pl.LightningModule, batches: int | None = None) -> dict[str, float]:
    """One pass over the validation data: whatever the module logs in it, averaged or computed as Lightning would.

    Callbacks and loggers see nothing of it; metrics are updated in copies. Empty if there is nothing to validate with.

    Args:
        trainer: In ``fit`` or ``validate``.
        module: Its LightningModule.
        batches: Stop after so many of each loader. Default: as the Trainer is set.

    Raises:
        StopRequested: See `poll`; on all ranks.
    """
    if not validation_loaders(trainer):
        return {}
    logged = _LoggedValues()
    with (
        preserve_state(module),
        torch.no_grad(),
        in_stage(trainer, RunningStage.VALIDATING),
        replace_metrics(module, copy.deepcopy),
        replace_logging(module, logged),
    ):
        with distributed.raise_on_all_ranks("The validation of the pruning event"):
            _validate(trainer, module, logged, batches)
        logged.suffix, logged.batch_size = "", 1
        module.on_validation_epoch_end()
        return logged.results(module.device)


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders over the validation data, made if no epoch has been validated yet; none if there is nothing to validate with.

    Args:
        trainer: In ``fit`` or ``validate``.
    """
    if trainer.val_dataloaders is None and trainer.enable_validation:
        with in_stage(trainer, RunningStage.VALIDATING):
            compat.set_up_validation(trainer)
    if trainer.val_dataloaders is None or not trainer.limit_val_batches or not trainer.num_val_batches:
        return []
    return list(CombinedLoader(trainer.val_dataloaders, "sequential").flattened)


def _validate(trainer: pl.Trainer, module: pl.LightningModule, logged: _LoggedValues, batches: int | None) -> None:
    """The steps. They do not communicate, but for the weights of a sharded model; what comes after them does."""
    flat = validation_loaders(trainer)
    ask = distributed.poll_together if units(module) else poll
    module.on_validation_epoch_start()
    for index, loader in enumerate(flat):
        logged.suffix = f"/dataloader_idx_{index}" if len(flat) > 1 else ""
        for number, raw in enumerate(loader):
            if number >= min(trainer.num_val_batches[index], math.inf if batches is None else batches):
                break
            ask()
            batch = to_device(trainer, module, raw, index)
            logged.batch_size = batch_size(batch, default=1)
            with trainer.precision_plugin.val_step_context():
                module.validation_step(*step_arguments(module.validation_step, batch, number, index))


class _LoggedValues:
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
