"""`MaskSparsity`: draws the units that a pruner would prune to zero while training, so that pruning them costs little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_cap.callbacks import checks
from lightning_cap.callbacks.run import is_dry
from lightning_cap.errors import ConfigError, DataError
from lightning_cap.pruners import MagnitudeUnits
from lightning_cap.pruners.units import UnitPruner
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.unit_penalty import unit_penalty
from lightning_cap.sparsity.units import Units
from lightning_cap.trainer.calibration import loss_scale
from lightning_cap.trainer.event import PruningEvent
from lightning_cap.trainer.units import find_module_units, prepare_cost
from lightning_cap.utilities.arguments import (
    require_flag,
    require_instance,
    require_names,
    require_real,
    require_whole,
    shown,
)

_VERSION = 1  # of the state


class MaskSparsity(pl.Callback):
    """Sparse regularization of the units that are to be pruned, and of no others (Jiang et al. 2022, MaskSparsity).

    At the start of ``epoch`` the pruner says which units it would prune to the goal; nothing is pruned. From then on
    `unit_penalty` of these, times ``strength``, is part of the loss: its gradient is added to that of the training step, once per
    optimizer step, as it is the same for every batch and on every process. The module needs no change. The Fisher, and what else
    is read for pruning, is of the module's own loss without the term. The units are in checkpoints; a resumed run goes on with
    the same.

    Prune when they are near zero, by `CAPPruningCallback` in a later epoch and a pruner that looks at what units do, such as
    ``TaylorUnits()`` or ``CAPUnits()``: it then chooses these. `MagnitudeUnits` would look at all their weights, also those that
    the term leaves alone. In ``training_step`` of your own, add ``strength * unit_penalty(...)`` instead.

    Args:
        goal: Share of what ``pruner.cost`` counts that the chosen units would save, above 0 and below 1.
        pruner: Chooses them: a pruner of units. Default: `MagnitudeUnits`.
        strength: Factor of the term, above 0. Adaptive optimizers such as Adam divide it by the size of the gradients.
        epoch: The first one (counted from 0) with the term.
        end_epoch: The first one without it again. Default: none.
        shifts: See `unit_penalty`. False for the paper's term.
        include: Globs over groups of units to choose from; see `Units.from_model`.
        exclude: Globs over groups to leave alone.
        seed: Key of the samples that the pruner reads.

    Raises:
        ConfigError: An argument is out of range. What depends on the Trainer and the model is refused when ``fit`` begins.
    """

    def __init__(
        self,
        goal: float,
        pruner: UnitPruner | None = None,
        strength: float = 5e-4,
        epoch: int = 0,
        end_epoch: int | None = None,
        shifts: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        require_real("goal", goal, "(0, 1)", example=0.5)
        require_instance("pruner", pruner, UnitPruner, "TaylorUnits()", optional=True)
        require_real("strength", strength, "(0, inf)", example=5e-4)
        require_whole("epoch", epoch, at_least=0, at_most=2**31, example=10)
        if end_epoch is not None:
            require_whole("end_epoch", end_epoch, at_least=epoch + 1, at_most=2**31, example=max(20, epoch + 10))
        require_flag("shifts", shifts)
        require_names("include", include, "blocks.*.mlp")
        require_names("exclude", exclude, "blocks.*.attn")
        require_whole("seed", seed, at_least=0, at_most=2**63 - 1, example=0)
        self.goal, self.strength, self.shifts = goal, strength, shifts
        self.pruner = MagnitudeUnits() if pruner is None else pruner
        self.epoch, self.end_epoch = epoch, end_epoch
        self.include, self.exclude, self.seed = include, exclude, seed
        self._units: Units | None = None
        self._kept: dict[str, Tensor] | None = None
        self._targets: Targets | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights, so that copies and pickles do not carry the model."""
        attached = ("log", "log_dict")  # by Lightning, the model's own
        return {**{name: value for name, value in self.__dict__.items() if name not in attached}, "_targets": None}

    @property
    def units(self) -> Units | None:
        """All units of the model, by their names in the LightningModule; None before they are known."""
        return self._units

    @property
    def kept(self) -> dict[str, Tensor] | None:
        """``{group: bool (size)}`` on the CPU, False = to be pruned; None before they are chosen."""
        return None if self._kept is None else dict(self._kept)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks that prune the chosen units, ``{target: bool (*shape)}`` on the CPU (during and after ``fit``).

        Raises:
            ConfigError: They are not chosen yet.
        """
        if self._units is None or self._kept is None or self._targets is None:
            raise ConfigError(
                "MaskSparsity: no units have been chosen yet. Pass it to Trainer(callbacks=[...]), and train as far as "
                f"epoch={self.epoch}."
            )
        return self._units.masks(self._targets.shapes, self._kept)

    def penalty(self) -> Tensor:
        """The term as it is now, a scalar that autograd can follow; 0 before the units are chosen."""
        if self._units is None or self._kept is None or self._targets is None:
            return torch.zeros(())
        return self.strength * unit_penalty(self._targets, self._units, self._kept, self.shifts)

    def state_dict(self) -> dict[str, Any]:
        """The units, and which of them were chosen."""
        if self._units is None or self._kept is None:
            return {"version": _VERSION, "chosen": None}
        return {"version": _VERSION, "chosen": {"units": self._units.state_dict(), "kept": self._kept}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state.

        Raises:
            DataError: It is damaged, or of another version.
        """
        self._units, self._kept = _decode(state_dict)

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        if stage != "fit":
            return
        self._units, self._kept, self._targets = None, None, None
        checks.refuse_sharding(trainer)
        checks.refuse_manual(pl_module, [self.pruner])
        last = trainer.max_epochs
        if last is not None and 0 <= last <= self.epoch and not is_dry(trainer):
            raise ConfigError(
                f"epoch={self.epoch}: the run ends after max_epochs={last}, and no unit would be chosen. Give an earlier one."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the units of the model; refuse a goal that cannot be had of them."""
        if self._units is None:
            self._units = find_module_units(trainer, pl_module, self.include, self.exclude, self.seed)
        self._targets = self._units.targets(pl_module)
        if self._kept is None:
            prepare_cost(trainer, pl_module, self.pruner.cost, self._units, self.seed)
            self.pruner.check(self._targets)
            self.pruner.check_goals(self._targets, None, [self.goal])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the units, at the epoch; log the term."""
        if self._kept is None and (trainer.current_epoch >= self.epoch or is_dry(trainer)):
            self._kept = self._choose(trainer, pl_module)
        if self._acts(trainer):
            pl_module.log("unit_penalty", self.penalty().detach(), on_step=False, on_epoch=True)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of the term to those of the loss."""
        if not self._acts(trainer):
            return
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        with torch.enable_grad():
            term = self.penalty()
            weights = [w for w in (self._targets or {}).values() if w.requires_grad and id(w) in held]
            found = torch.autograd.grad(term, weights, allow_unused=True) if term.requires_grad and weights else ()
        scaled = getattr(optimizer, "_step_supports_amp_scaling", False)  # then its step divides the gradients
        scale = loss_scale(trainer) if scaled else 1.0
        for weight, gradient in zip(weights, found, strict=False):
            if gradient is not None:
                weight.grad = gradient * scale if weight.grad is None else weight.grad.add_(gradient, alpha=scale)

    def _acts(self, trainer: pl.Trainer) -> bool:
        return self._kept is not None and (self.end_epoch is None or trainer.current_epoch < self.end_epoch)

    def _choose(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """What the pruner would keep. Units that are zero already are pruned already, and nothing else is."""
        assert self._units is not None
        assert self._targets is not None
        masks = MaskSet(self._targets)
        there = self._units.nonzero(self._targets.weights())
        masks.update(self._units.masks(self._targets.shapes, there))
        event = PruningEvent(trainer, module, self.pruner, self._targets, masks, self.seed)
        with event.path(0, masks) as path, torch.inference_mode(False):
            kept = self._units.kept(path.at(self.goal).masks)
        gone = {name: there[name] & ~left for name, left in kept.items()}
        counted = f"{sum(int(units.sum()) for units in gone.values())} of {sum(self._units.sizes.values())} units"
        rank_zero_info(
            f"Epoch {trainer.current_epoch}: {counted} are drawn to zero, {self.pruner.cost.name} {self.goal:g} of the model."
        )
        return {name: ~units for name, units in gone.items()}


def _decode(held: object) -> tuple[Units | None, dict[str, Tensor] | None]:
    """What `MaskSparsity.state_dict` was given."""
    chosen: object = held.get("chosen", held) if isinstance(held, Mapping) else held
    if isinstance(held, Mapping) and held.get("version") == _VERSION and chosen is None:
        return None, None
    if isinstance(held, Mapping) and held.get("version") == _VERSION and isinstance(chosen, Mapping):
        kept = chosen.get("kept")
        units = Units.from_state(chosen.get("units"))
        sizes = {name: torch.Size([size]) for name, size in units.sizes.items()}
        if isinstance(kept, Mapping) and {n: getattr(k, "shape", None) for n, k in kept.items()} == sizes:
            return units, {name: left.cpu().bool() for name, left in kept.items()}
    raise DataError(
        f"ckpt_path: the state of MaskSparsity in the checkpoint cannot be used: {shown(held)}. To go on from its weights, load "
        "its 'state_dict' into the model and start anew."
    )
