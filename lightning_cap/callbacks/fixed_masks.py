"""`FixedMasks`: trains a pruned checkpoint on, and what it has pruned stays so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_cap.callbacks import checks
from lightning_cap.callbacks.checkpoint_io import make_checkpoints_atomic
from lightning_cap.callbacks.companions import pruning_callbacks
from lightning_cap.callbacks.lr_restart import restart_schedulers
from lightning_cap.callbacks.resume import DataOrder, begin_epoch_anew, random_state, restore_random_state
from lightning_cap.callbacks.state import decode_state, load_masks
from lightning_cap.callbacks.weight_averaging import mask_averages
from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.sparsity.masks import MaskSet, unpack_masks
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer import compat
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.compiled import plain_name


class FixedMasks(pl.Callback):
    """Keep the masks of a pruned checkpoint in force while its weights are trained on: weights, gradients, optimizers, averages.

    Load the weights of that checkpoint into the module first. Nothing more is pruned, and nothing grows back. Runs resume
    exactly, as those of `CAPPruningCallback` do; a `CyclicLinearLR` without a period has one cycle.

    Args:
        state: Of the `CAPPruningCallback` in the checkpoint: a value of its ``checkpoint["callbacks"]``.

    Raises:
        ConfigError: It is none, or nothing was pruned yet.
        DataError: It is damaged, or of another version.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        require_instance("state", state, Mapping, 'checkpoint["callbacks"]["CAPPruningCallback"]')
        self._held = dict(state)
        _, restored = decode_state(state)
        if restored.masks is None:
            raise ConfigError(
                f"state={shown(dict(state))}: it has no masks, as nothing was pruned yet. Give that of a later one."
            )
        self._packed, self._units = restored.masks, restored.units
        self._rng: list[Any] | None = None
        self._masks: MaskSet | None = None
        self._order = DataOrder()

    @property
    def state_key(self) -> str:
        """The class, and whether units are pruned: as a run may have pruned both, there may be one for each."""
        return f"{super().state_key}[units]" if self._units is not None else super().state_key

    @property
    def masks(self) -> MaskSet:
        """The masks in force (during and after ``fit``)."""
        if self._masks is None:
            raise ConfigError(
                "FixedMasks: it has not been part of a running fit yet. Pass it to Trainer(callbacks=[...])."
            )
        return self._masks

    def state_dict(self) -> dict[str, Any]:
        """That of the pruning callback, with this run's random state; call it on every rank, as Lightning does."""
        return {**self._held, "rng": random_state(self._order)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the random state, put in force when ``fit`` goes on.

        Raises:
            DataError: It is damaged.
        """
        self._rng = decode_state(state_dict)[1].rng

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        make_checkpoints_atomic(trainer)
        if stage != "fit":
            return
        checks.refuse_sharding(trainer)
        checks.refuse_other_pruning(trainer)
        refuse_pruning_callbacks(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masks in force."""
        compat.check_run(trainer, pl_module, resumed=self._rng is not None)
        self._masks = MaskSet(_masked_targets(pl_module, self._packed))
        load_masks(self._masks, self._packed)
        self._masks.apply_to_weights()
        mask_averages(trainer, self._masks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask the optimizer state; begin the cycle of the learning rate; restore the random state mid-epoch."""
        self._order.begin(trainer, self._rng or [])
        for optimizer in trainer.optimizers:
            self.masks.apply_to_optimizer(optimizer)
        others = {type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs}
        restart_schedulers(trainer, [], others, only_new=self._rng is not None)
        if self._rng is not None and compat.restarted_mid_epoch(trainer):
            restore_random_state(self._rng)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the random state of the run that was stopped."""
        resumed = self._rng is not None and restore_random_state(self._rng)
        self._order.begin_epoch(trainer)
        if resumed:
            begin_epoch_anew(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients of pruned weights are zero."""
        self.masks.apply_to_gradients()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pruned weights are zero, in averaged copies too."""
        self.masks.apply_to_weights()
        mask_averages(trainer, self.masks)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The next ``fit`` begins anew."""
        self._rng = None


def refuse_pruning_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that prune on.

    Raises:
        UnsupportedError: There is one.
    """
    found = pruning_callbacks(trainer)
    if found:
        raise UnsupportedError(
            f"callbacks: {type(found[0]).__name__} prunes on, where masks are to stay as they are. Leave it out: the masks are "
            "those of the checkpoint."
        )


def _masked_targets(module: nn.Module, packed: Mapping[str, Any]) -> Targets:
    """What the masks are of."""
    names = unpack_masks(packed)
    found = {plain_name(path): (path, p) for path, p in module.named_parameters(remove_duplicate=False)}
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"state: it has masks of {missing[0]!r}, which the model does not have. Give the model that was pruned."
        )
    return Targets({name: found[name][1] for name in names}, {name: found[name][0] for name in names})
