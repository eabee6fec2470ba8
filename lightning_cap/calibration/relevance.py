"""Relevance of units by layer-wise relevance propagation: batches -> chunks ``{group: (n, size)}``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.calibration.gate_rows import UnsuitedError, find_spots, gradients_of_gates
from lightning_cap.calibration.outputs import ModelOutputs
from lightning_cap.calibration.rows import Loss, RowComputer
from lightning_cap.calibration.unit_samples import UnitSamples
from lightning_cap.errors import GradientError, TargetError, UnsupportedError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import gates_of, units_of
from lightning_cap.utilities import rng
from lightning_cap.utilities.arguments import require_choice, require_real
from lightning_cap.utilities.packages import require_package

if TYPE_CHECKING:
    from lightning_cap.calibration.relevance_rules import Rule

#: Names of `Rule`, which is beside zennit.
RULES = ("epsilon_plus", "alpha1_beta0", "epsilon")

#: Where relevance starts: at the logit of each sample's label, or of the class that the model predicts.
Classes = Literal["labels", "predicted"]

_NAMES = ("labels", "label", "targets", "target", "y")  # of labels in batches that are dicts


@dataclass(frozen=True)
class UnitRelevance(UnitSamples):
    """Relevance of every unit for each of some samples, ``{group: (n, size)}``.

    Args:
        n: Samples over all processes.
        rule: ``"epsilon_plus"``, ``"alpha1_beta0"`` or ``"epsilon"``; see `Rule`.
        epsilon: Of the ε rule.
        classes: See `Classes`.

    Raises:
        ConfigError: An argument is out of range, or zennit is not installed.
    """

    rule: Rule = "epsilon_plus"
    epsilon: float = 1e-6
    classes: Classes = "labels"

    unit: ClassVar[str] = "relevances"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("rule", self.rule, RULES)
        require_real("epsilon", self.epsilon, "(0, inf)", example=1e-6)
        require_choice("classes", self.classes, get_args(Classes))
        require_package("zennit", type(self).__name__, "relevance")

    def computer(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        context: Callable[[], AbstractContextManager[Any]],
        scale: float,
    ) -> RelevanceComputer:
        """See `UnitSamples`. The loss is called for the outputs of the model that it calls."""
        return RelevanceComputer(model, targets, loss, self, context, scale)


class RelevanceComputer(RowComputer):
    """Computes rows ``{group: (n, size)}``: the relevance of what each unit gives, summed over positions.

    That is the gradient of a gate of value 1 on it, of the logits that relevance starts at, where the way back follows the rules.

    Args:
        model: In eval mode.
        targets: All weights of units.
        loss: Calls the model, or a module of it, whose outputs are logits ``(n, C)``.
        settings: Rules and classes.
        context: Entered around the forward pass.
        scale: Factor on the logits before and off the relevance after.
    """

    way: ClassVar[str] = "computing the relevances of all samples at once"

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        settings: UnitRelevance,
        context: Callable[[], AbstractContextManager[Any]],
        scale: float,
    ) -> None:
        super().__init__(model, gates_of(targets), loss, 1, context, scale)
        self._model, self._settings, self._device = model, settings, targets.device
        self._outputs = ModelOutputs(model, loss, context)
        self._sizes = units_of(targets).sizes
        self._spots = find_spots(model, targets)
        self._merged: list[tuple[str, str]] | None = None
        unknown = [name for name, found in self._spots.items() if not found]
        if unknown:
            raise UnsupportedError(
                _unknown(f"the outputs of {len(unknown)} groups, first {unknown[0]!r}, are not told apart")
            )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """One relevance per unit."""
        return {name: (size,) for name, size in self._sizes.items()}

    def one(self, batch: Any) -> dict[str, Tensor]:
        """The sum over all samples of a batch.

        Raises:
            GradientError: Labels are not found in the batch.
            TargetError: The model's outputs are no logits ``(n, C)``.
            UnsupportedError: Relevance does not reach a group.
        """
        return {name: rows.sum(0, keepdim=True) for name, rows in self.at_once(batch).items()}

    def at_once(self, batch: Any) -> dict[str, Tensor]:
        """A row for each sample of a batch. Errors: as `one`."""
        from lightning_cap.calibration.relevance_rules import relevance_rules

        size = batch_size(batch)
        if self._merged is None:
            self._merged = self._find_merged(batch, size)

        def start() -> Tensor:
            logits = self._logits(batch, size)
            return (logits * start_of(batch, logits.detach(), self._settings.classes)).sum() * self._scale

        rules = relevance_rules(self._model, self._settings.rule, self._settings.epsilon, self._merged)
        contexts = (torch.inference_mode(False), torch.enable_grad(), rules)
        try:
            found = gradients_of_gates(self._spots, size, self._device, start, contexts)
        except UnsuitedError as error:
            raise UnsupportedError(_unknown(str(error))) from error
        return {name: self.unscaled(rows) for name, rows in found.items()}

    def _find_merged(self, batch: Any, size: int) -> list[tuple[str, str]]:
        from lightning_cap.calibration.relevance_rules import batch_norms_to_merge

        few, samples = slice_batch(batch, size, 0, min(2, size)), min(2, size)
        with rng.preserved(), torch.inference_mode(False), torch.no_grad():
            return batch_norms_to_merge(self._model, lambda: self._logits(few, samples))

    def _logits(self, batch: Any, size: int) -> Tensor:
        logits = self._outputs(batch)
        if logits.dim() != 2 or len(logits) != size:
            raise TargetError(
                f"model: its outputs have shape {tuple(logits.shape)} for a batch of {size} samples, and relevance starts at "
                "logits (n, C) of classes. Use TaylorUnits, or a model that classifies."
            )
        return logits


def start_of(batch: Any, logits: Tensor, classes: Classes) -> Tensor:
    """The share of each logit that relevance starts with, ``(n, C)``: 1 at the class of a sample, 0 elsewhere.

    Args:
        batch: ``(x, y)``, or a dict with ``labels``: whole ``(n,)``, or probabilities ``(n, C)`` as of mixup, which are the shares.
        logits: ``(n, C)``.
        classes: Where relevance starts.

    Raises:
        GradientError: The labels are not where they can be found.
    """
    if classes == "predicted":
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
    labels = _labels_in(batch)
    if isinstance(labels, Tensor) and labels.shape == logits.shape and labels.is_floating_point():
        return labels.to(logits)
    whole = isinstance(labels, Tensor) and labels.shape == logits.shape[:1] and not labels.is_floating_point()
    if whole and bool(((labels >= 0) & (labels < logits.shape[1])).all()):
        return F.one_hot(labels.long(), logits.shape[1]).to(logits)
    told = f"of shape {tuple(labels.shape)} and {labels.dtype}" if isinstance(labels, Tensor) else "none"
    raise GradientError(
        f"classes='labels': a batch ({type(batch).__name__}) is to have labels as its second part, or as 'labels', whole numbers "
        f"({len(logits)},) below {logits.shape[1]} or probabilities {tuple(logits.shape)}; found {told}. Give classes='predicted'."
    )


def _labels_in(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)):
        return batch[1] if len(batch) > 1 else None
    if hasattr(batch, "keys"):
        return next((batch[name] for name in _NAMES if name in batch), None)
    return None


def _unknown(why: str) -> str:
    return (
        f"model: relevance needs units between plain Linear, convolution and norm modules, and {why}. Leave such groups out with "
        "exclude=[...], do not compile the model before, or use TaylorUnits."
    )
