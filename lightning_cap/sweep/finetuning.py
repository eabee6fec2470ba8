"""What is measured and kept of a pruned checkpoint that is trained on: a line of the sweep's table."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl

from lightning_cap.callbacks.checkpoint_io import save_checkpoint
from lightning_cap.callbacks.cycle import monitored
from lightning_cap.callbacks.fixed_masks import FixedMasks
from lightning_cap.callbacks.run import is_dry
from lightning_cap.errors import DataError
from lightning_cap.export.safetensors import save_weights
from lightning_cap.sparsity.flops import zero_shares
from lightning_cap.sparsity.targets import Targets, measured_sparsity
from lightning_cap.sweep.checkpoints import PrunedCheckpoint, SweepFolder
from lightning_cap.trainer.compat import averaged_models
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.trainer.flops import module_flops
from lightning_cap.trainer.run_records import FinetunedRecord
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_instance


class Finetuning(pl.Callback):
    """Validate a pruned checkpoint before and after it is trained on, and keep what it ends with.

    Writes ``last.ckpt`` after every epoch, and at the end a checkpoint, plain weights and a `FinetunedRecord`. It comes after the
    `FixedMasks` of the checkpoint in the list of callbacks, whose weights are in the module when ``fit`` begins.

    Args:
        checkpoint: What is trained on.
        folder: Where to write to.
        masks: Of all its pruned weights.

    Attributes:
        record: Of the checkpoint, when it was trained to the end; None before.

    Raises:
        ConfigError: An argument is something else.
    """

    def __init__(self, checkpoint: PrunedCheckpoint, folder: SweepFolder, masks: list[FixedMasks]) -> None:
        require_instance("checkpoint", checkpoint, PrunedCheckpoint, "find_checkpoints(folder)[1][0]")
        require_instance("folder", folder, SweepFolder, "find_checkpoints(folder)[0]")
        require_instance("masks", masks, list, "[FixedMasks(state)]")
        self._checkpoint, self._folder, self._masks = checkpoint, folder, masks
        self._last, self._final, self._weights = folder.files(checkpoint)
        self._metric: str | None = checkpoint.metric
        self._before: float | None = None
        self._known = False  # whether it was validated before
        self.record: FinetunedRecord | None = None

    def state_dict(self) -> dict[str, Any]:
        """What was measured before."""
        return {"metric": self._metric, "before": self._before, "source": self._checkpoint.path.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was measured before.

        Raises:
            DataError: It is of another checkpoint.
        """
        if state_dict.get("source") != self._checkpoint.path.name:
            raise DataError(
                f"{self._last}: it is of {state_dict.get('source')!r}, and not of {self._checkpoint.path.name!r}. Move it away."
            )
        self._metric, self._before, self._known = state_dict["metric"], state_dict["before"], True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the checkpoint as it is."""
        if not self._known:
            self._before = self._value(evaluate(trainer, pl_module))
            self._known = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what a sweep that is stopped goes on from."""
        if not is_dry(trainer):
            save_checkpoint(trainer, str(self._last))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate again, and write what it ended with."""
        after = self._value(evaluate(trainer, pl_module))
        self._before = self._before if self._known else after
        flops = module_flops(trainer, pl_module)
        targets = self._targets()
        self.record = FinetunedRecord(
            goal=self._checkpoint.goal,
            sparsity=measured_sparsity(targets),
            flops_saved=None if flops is None else flops.saved(zero_shares(targets)),
            metric=self._metric or "metric",
            before=self._before,
            after=after,
            epochs=trainer.current_epoch,
            source=str(self._checkpoint.path),
            checkpoint=str(self._final),
            weights=str(self._weights),
        )
        if not is_dry(trainer):
            self._write(trainer, pl_module, targets, self.record)

    def _write(self, trainer: pl.Trainer, module: Any, targets: Targets, record: FinetunedRecord) -> None:
        """The record comes last: a kill before leaves what the sweep goes on from."""
        missing = not self._final.exists() and not self._last.exists()  # as not an epoch was trained
        if distributed.gather_objects(missing)[0]:
            save_checkpoint(trainer, str(self._last))
        with distributed.raise_on_all_ranks(f"Writing {self._final}"):
            if trainer.is_global_zero:
                averages = averaged_models(trainer)
                model = getattr(averages[0], "module", averages[0]) if averages else module
                save_weights(model, targets, self._weights, sparsity=record.sparsity, goal=record.goal)
                if self._last.exists():
                    os.replace(self._last, self._final)
                self._folder.append(self._checkpoint, record)

    def _targets(self) -> Targets:
        """All weights that have masks; where units and weights were pruned, both."""
        found: dict[str, Any] = {}
        paths: dict[str, str] = {}
        for masks in self._masks:
            found |= dict(masks.masks.targets)
            paths |= masks.masks.targets.paths
        return Targets(found, paths)

    def _value(self, metrics: dict[str, float]) -> float | None:
        """Of the metric of the run, or where that is not logged, of the accuracy or the loss."""
        name, value = monitored(metrics, self._metric if self._metric in metrics else None)
        self._metric = name or self._metric
        return value
