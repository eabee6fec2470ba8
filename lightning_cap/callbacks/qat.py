"""`QATCallback`: int8 weights and activations by fake quantization from an epoch on, beside the callback that prunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_cap.callbacks import checks
from lightning_cap.callbacks.run import is_dry
from lightning_cap.errors import ConfigError, DataError, UnsupportedError
from lightning_cap.quantization.layers import choose_layers, make_plain, prepare
from lightning_cap.utilities.arguments import require_choice, require_names, require_whole, shown
from lightning_cap.utilities.packages import require_package

_VERSION = 1  # of the state


class QATCallback(pl.Callback):
    """Train with int8 weights and activations from an epoch on (quantization-aware training of torchao).

    Linear layers compute with weights rounded to int8 (symmetric, a scale per output row) and inputs rounded to int8 (a scale and a
    zero point per token, found anew for each input). Gradients go straight through the rounding. A weight that is zero stays
    exactly zero, so masks hold: put it before or after `CAPPruningCallback`, and prune before or after the epoch. Parameters stay
    the same objects under the same names; so do checkpoints, the optimizer's state and averaged weights.

    A pruning event is computed without the rounding, whose clipping would take the gradient of each row's largest weight away.
    ``lightning-cap export --to qdq`` or ``--to torchao`` writes the integers of a checkpoint.

    Args:
        epoch: The first one that trains with fake quantization.
        include: Globs or names of weights of Linear layers to quantize. Default: all of them, heads too.
        exclude: Globs or names to leave in float.
        unsupported: What becomes of chosen layers that torchao cannot take, such as convolutions: ``"skip"`` names them and leaves
            them in float, ``"refuse"`` raises.

    Raises:
        ConfigError: An argument is out of range, or torchao is not installed. What depends on the Trainer and the model is refused
            when ``fit`` begins.
    """

    def __init__(
        self,
        epoch: int = 0,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        unsupported: Literal["skip", "refuse"] = "skip",
    ) -> None:
        require_whole("epoch", epoch, at_least=0, at_most=2**31, example=10)
        require_names("include", include)
        require_names("exclude", exclude, "*.head.weight")
        require_choice("unsupported", unsupported, ("skip", "refuse"))
        require_package("torchao", type(self).__name__, "quantization")
        self.epoch, self.include, self.exclude, self.unsupported = epoch, include, exclude, unsupported
        self._layers: list[str] = []
        self._begun = False

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are quantized; empty before they are."""
        return list(self._layers) if self._begun else []

    def state_dict(self) -> dict[str, Any]:
        """Which layers are quantized."""
        return {"version": _VERSION, "quantized": self.layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state.

        Raises:
            DataError: It is damaged, or of another version.
        """
        self._layers = _decode(state_dict)
        self._begun = bool(self._layers)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        if stage != "fit":
            return
        self._layers, self._begun = [], False
        checks.refuse_sharding(trainer)
        last = trainer.max_epochs
        if last is not None and 0 <= last <= self.epoch and not is_dry(trainer):
            raise ConfigError(
                f"epoch={self.epoch}: the run ends after max_epochs={last}, and nothing would be quantized. Give an earlier one."
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Quantize what was when the checkpoint was saved, also to validate, test and predict."""
        held = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if held is not None:
            names = _decode(held)
            make_plain(pl_module, keep=names)
            prepare(pl_module, names)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the layers; name those that cannot be quantized, or refuse them.

        Raises:
            TargetError: A pattern matches nothing, or nothing is left.
            UnsupportedError: ``unsupported="refuse"``, and some cannot.
        """
        if self._begun:
            chosen = choose_layers(pl_module, self.include, self.exclude)[0]
            if set(chosen) != set(self._layers):
                rank_zero_warn(
                    f"include, exclude: the checkpoint has {len(self._layers)} layers quantized, and these choose {len(chosen)}. "
                    "Those of the checkpoint stay."
                )
            return
        make_plain(pl_module)  # of an earlier fit: it begins at its epoch
        self._layers, left = choose_layers(pl_module, self.include, self.exclude)
        told = "; ".join(f"{name}: {why}" for name, why in left.items())
        if left and self.unsupported == "refuse":
            raise UnsupportedError(
                f"unsupported='refuse': torchao cannot quantize {len(left)} of the layers ({told}). Leave them out with "
                "exclude=[...], or use unsupported='skip'."
            )
        rank_zero_info(
            f"Quantizing {len(self._layers)} Linear layers from epoch {self.epoch} on."
            + (f" Left in float, as torchao cannot take them: {told}." if left else "")
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, at the epoch."""
        if not self._begun and (trainer.current_epoch >= self.epoch or is_dry(trainer)):
            prepare(pl_module, self._layers)
            self._begun = True


def quantized_layers(states: Any) -> list[str]:
    """Names of the layers that a run has quantized, of the states of all callbacks in a checkpoint: ``checkpoint["callbacks"]``.

    Raises:
        DataError: They are damaged.
    """
    for key, held in states.items() if isinstance(states, Mapping) else ():
        if isinstance(held, Mapping) and "quantized" in held and (key == QATCallback.__name__ or "version" in held):
            return _decode(held)
    return []


def _decode(held: object) -> list[str]:
    names: object = held.get("quantized") if isinstance(held, Mapping) else None
    if not isinstance(held, Mapping) or held.get("version") != _VERSION or not _are_names(names):
        raise DataError(
            f"ckpt_path: the state of QATCallback in the checkpoint cannot be used: {shown(held)}. To go on from its weights, load "
            "its 'state_dict' into the model and start anew."
        )
    return list(names)  # type: ignore[call-overload, no-any-return]


def _are_names(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)
