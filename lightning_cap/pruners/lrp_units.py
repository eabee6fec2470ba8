"""Pruning of units by their relevance for the model's decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_cap.calibration.relevance import UnitRelevance
from lightning_cap.calibration.sources import GradientSource
from lightning_cap.pruners.unit_scores import Normalize, ScoredUnits, mean_over_gates
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import units_of
from lightning_cap.utilities.arguments import require_counts
from lightning_cap.utilities.packages import require_package


@dataclass(kw_only=True, eq=False)
class LRPUnits(ScoredUnits):
    """Remove the units of least relevance, by layer-wise relevance propagation (Yeom et al. 2021, "Pruning by explaining").

    The relevance of a sample starts as the logit of its class and is shared out over what each layer adds up, back to the units:
    that of a unit is summed over positions and over samples, with its sign, and divided by its layer's. Kept weights are not
    changed. For models that classify, by the package zennit (``pip install 'lightning-cap[relevance]'``).

    A batch norm is merged with the layer before it. Relevance goes through activations as it is, and through residual connections
    and pooling by what they add up; layer norms and attention are linear, with their deviations and weights as constants
    (Ali et al. 2022, "XAI for transformers").

    Args:
        num_inputs: Reference samples, over all processes.
        rule: How layers share it out: ``"epsilon_plus"`` by ε at Linear layers and by α1β0 (positive parts alone) at convolutions,
            as the authors' code does, ``"alpha1_beta0"`` or ``"epsilon"`` at both.
        epsilon: What the ε rule adds to the size of a divisor.
        classes: Relevance starts at the class of ``"labels"``, the second part of a batch or its ``labels``; or at the
            ``"predicted"`` one.
        normalize: See `ScoredUnits`. The paper's is ``"sum"``.
        cost: What a goal counts. See `UnitPruner`.
        allocation: How units are shared out over the groups. See `UnitPruner`.

    Raises:
        ConfigError: An argument is out of range, or zennit is not installed.
    """

    num_inputs: int = 1024
    rule: Literal["epsilon_plus", "alpha1_beta0", "epsilon"] = "epsilon_plus"
    epsilon: float = 1e-6
    classes: Literal["labels", "predicted"] = "labels"
    normalize: Normalize = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_package("zennit", type(self).__name__, "relevance")
        require_counts(num_inputs=self.num_inputs)
        _ = self.statistic  # checks the rest

    @property
    def statistic(self) -> UnitRelevance:
        """Relevance of units."""
        return UnitRelevance(self.num_inputs, rule=self.rule, epsilon=self.epsilon, classes=self.classes)

    def _saliency(self, targets: Targets, gradients: GradientSource) -> dict[str, Tensor]:
        return mean_over_gates(targets, units_of(targets), gradients, lambda rows: rows.sum(0), "relevances")[0]
