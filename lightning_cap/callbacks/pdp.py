"""`PDPCallback`: soft masks on the weights from an epoch on, until the event that makes them hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_cap.callbacks import checks
from lightning_cap.callbacks.pruning import CAPPruningCallback
from lightning_cap.callbacks.run import is_dry
from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.pruners.pdp import PDP, soft_mask, soft_threshold, softened_zeros
from lightning_cap.sparsity.masks import count_masked
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer import compat
from lightning_cap.utilities.arguments import require_real, require_whole, shown
from lightning_cap.utilities.compiled import is_compiled, plain_name

_RUN_UP = 1.25  # of the soft epochs there are more than it takes to the goal, as in the paper (84 epochs, 0.015)


class PDPCallback(pl.Callback):
    """Train with soft masks towards the goal of a `CAPPruningCallback` whose pruner is `PDP` (Cho et al. 2023).

    From an epoch on, every target ``w`` is computed with as ``m(w)·w``, where the soft mask ``m`` is below a half for as many
    weights as are to be zero: a share of the goal that rises each epoch. The threshold follows the weights from step to step, and
    gradients flow through the mask, so weights move away from it. The goal's event takes the soft masks off and prunes those below
    the threshold; training may go on after it.

    Parameters stay the same objects under the same names, in checkpoints, too: these hold ``w``, not ``m(w)·w``. Validation inside
    ``fit`` computes with soft masks; ``trainer.test`` of a checkpoint from before the event does not.

    Args:
        epoch: The first one with soft masks; before it is the warm-up.
        tau: Temperature of the masks, in squared weights. 1e-4 in the paper.
        rate: Share of the goal's zeros by which soft masks rise per epoch, ``epsilon`` in the paper (0.015). Default: the goal is
            reached at four fifths of the soft epochs.

    Raises:
        ConfigError: An argument is out of range. What depends on the Trainer and the model is refused when ``fit`` begins.
    """

    def __init__(self, epoch: int = 0, tau: float = 1e-4, rate: float | None = None) -> None:
        require_whole("epoch", epoch, at_least=0, at_most=2**31, example=10)
        require_real("tau", tau, "(0, inf)", example=1e-4)
        if rate is not None:
            require_real("rate", rate, "(0, 1]", example=0.015)
        self.epoch, self.tau, self.rate = epoch, tau, rate
        self._partner: CAPPruningCallback | None = None
        self._event = 0
        self._planned: int | None = None
        self._handles: list[Any] = []
        self._thresholds: dict[tuple[int, str], tuple[int, int, Tensor]] = {}
        self._used: set[str] = set()
        self._told = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callback that prunes, and refuse what cannot work.

        Raises:
            ConfigError: There is none with `PDP`, or several, or its schedule does not fit.
            UnsupportedError: Weights are sharded.
        """
        if stage != "fit":
            return
        self._take_off()
        self._planned = None
        checks.refuse_sharding(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks if isinstance(c, CAPPruningCallback) and isinstance(c.pruner, PDP)]
        if len(found) != 1:
            raise ConfigError(
                "callbacks: PDPCallback trains towards the goal of one CAPPruningCallback(pruner=PDP(), ...), and there are "
                f"{len(found)}. Put one into the Trainer's callbacks."
            )
        self._partner = found[0]
        self._pruner.paired, self._pruner.zeros = True, {}  # of an earlier fit; those of a checkpoint come after this
        if not is_dry(trainer):
            self._check_schedule(trainer, found[0])

    def _check_schedule(self, trainer: pl.Trainer, partner: CAPPruningCallback) -> None:
        steps = partner.num_recomputations
        events = checks.resolve_events(trainer, partner.schedule, partner.pruner, steps, partner.save_sparsities)
        if len(events) != 1 or steps != 1 or partner.schedule.adapts:
            raise ConfigError(
                f"schedule={shown(partner.schedule)}, num_recomputations={steps}: PDPCallback trains towards one goal that is "
                "known before, in one step. Give a schedule with one event, such as {20: 0.9}."
            )
        (self._event,) = events
        if self.epoch >= self._event:
            raise ConfigError(
                f"epoch={self.epoch}: the event is at epoch {self._event}, so nothing would be trained with soft masks. Give an "
                "earlier one."
            )
        if self._share(self._event - 1) < 1:
            raise ConfigError(
                f"rate={self.rate}: soft masks would reach {self._share(self._event - 1):.3g} of the goal before its event, at "
                f"epoch {self._event}. Leave rate out, or give {1 / (self._event - self.epoch):.4g} or more."
            )

    def _share(self, epoch: int) -> float:
        """Of the goal's zeros, what soft masks stand for in an epoch."""
        rate = min(1.0, _RUN_UP / (self._event - self.epoch)) if self.rate is None else self.rate
        return min(1.0, rate * (epoch - self.epoch + 1) + 1e-9)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a compiled module.

        Raises:
            UnsupportedError: Names what is compiled.
        """
        _refuse_compiled(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put soft masks on, let them rise at each epoch, and take them off after the event.

        Raises:
            UnsupportedError: The module is compiled.
        """
        epoch, self._thresholds = trainer.current_epoch, {}
        if self._planned == epoch or is_dry(trainer):
            return
        assert self._partner is not None
        pruner, targets = self._pruner, self._partner.run.targets
        self._planned = epoch
        if not self.epoch <= epoch < self._event:
            self._take_off()
            return
        if not pruner.zeros:
            pruner.fix_zeros(targets, self._partner.masks, self._partner.run.events[self._event])
            rank_zero_info(f"Soft masks on {len(targets)} targets until epoch {self._event}.")
        existing = dict.fromkeys(targets, 0) | count_masked(self._partner.masks)
        pruner.softened = {n: softened_zeros(pruner.zeros[n], existing[n], self._share(epoch)) for n in targets}
        self._put_on(pl_module, targets, pruner)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell, once in each epoch, of targets that are computed with in another way, so that their masks were not used."""
        if not self._handles or self._told:
            return
        assert self._partner is not None
        unused = [name for name in self._partner.run.targets if name not in self._used]
        self._told = True
        if unused:
            rank_zero_warn(
                f"PDPCallback: {len(unused)} targets, first {unused[0]!r}, were not read by the forward pass of their layer, so "
                "they were trained without soft masks. Leave them out with exclude=[...]."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing stays on the module."""
        self._take_off()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Nothing stays on the module."""
        self._take_off()

    @property
    def _pruner(self) -> PDP:
        assert self._partner is not None
        assert isinstance(self._partner.pruner, PDP)
        return self._partner.pruner

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._thresholds, self._used, self._told = [], {}, set(), False

    def _take_off(self) -> None:
        self._remove_hooks()
        if self._partner is not None:
            self._pruner.softened = {}

    def _put_on(self, module: nn.Module, targets: Targets, pruner: PDP) -> None:
        """Let the layers compute with soft weights, which take the parameter's place while their forward pass runs.

        Anew in each epoch, as others may have swapped the layers (`QATCallback`).
        """
        self._remove_hooks()
        for name, path in targets.paths.items():
            owner, _, attribute = path.rpartition(".")
            parent, _, child = owner.rpartition(".")
            reads = isinstance(module.get_submodule(parent), nn.MultiheadAttention)  # reads its child's weight itself
            at, inside = (parent, child) if reads else (owner, "")
            enter, leave = self._swaps(name, inside, attribute, pruner)
            layer = module.get_submodule(at)
            self._handles.append(layer.register_forward_pre_hook(enter))
            self._handles.append(layer.register_forward_hook(leave, always_call=True))

    def _swaps(
        self, name: str, inside: str, attribute: str, pruner: PDP
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        """What puts the soft weight into ``inside`` of a layer, and what puts the parameter back."""
        held: dict[int, nn.Parameter] = {}

        def enter(layer: nn.Module, *_: Any) -> None:
            zeros, parameters = pruner.softened.get(name, 0), layer.get_submodule(inside)._parameters
            weight = parameters[attribute]
            if zeros and isinstance(weight, nn.Parameter):
                held[id(layer)] = weight
                parameters[attribute] = weight * soft_mask(weight, self._threshold(weight, name, zeros), self.tau)  # type: ignore[assignment]
                self._used.add(name)

        def leave(layer: nn.Module, *_: Any) -> None:
            if id(layer) in held:
                layer.get_submodule(inside)._parameters[attribute] = held.pop(id(layer))

        return enter, leave

    def _threshold(self, weight: Tensor, name: str, zeros: int) -> Tensor:
        """Found anew when the weight or the zeros have changed."""
        key = (id(weight), name)
        version, known, threshold = self._thresholds.get(key, (-1, -1, None))
        if threshold is None or (version, known) != (weight._version, zeros):
            threshold = soft_threshold(weight, zeros)
            self._thresholds[key] = weight._version, zeros, threshold
        return threshold


def _refuse_compiled(module: pl.LightningModule) -> None:
    """Hooks that are put on after compiling are not seen."""
    names = [plain_name(name) for name, part in module.named_modules() if is_compiled(part)]
    if names or compat.is_compiled(module):
        part = (names or [""])[0] or type(module).__name__
        raise UnsupportedError(
            f"model: {part!r} is compiled, and soft masks are put on by hooks. Train it without torch.compile, or use "
            "CAPPruningCallback(pruner=Magnitude())."
        )
