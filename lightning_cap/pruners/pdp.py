"""PDP: soft masks by magnitude while training goes on, made hard at the event."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.errors import ConfigError, PatternError
from lightning_cap.pruners.magnitude import Magnitude
from lightning_cap.pruners.scored import ScoredPath
from lightning_cap.sparsity.allocation import Allocation, Budgets
from lightning_cap.sparsity.cost import Shapes
from lightning_cap.sparsity.masks import count_masked
from lightning_cap.sparsity.patterns import Unstructured
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.arguments import require_instance, require_real, require_whole, shown
from lightning_cap.utilities.progress import Progress


@dataclass(kw_only=True, eq=False)
class PDP(Magnitude):
    """Remove the weights that soft masks have trained to be small (PDP, Cho et al. 2023, "Parameter-free differentiable pruning").

    Goes with `PDPCallback`, which fixes at its first epoch how many weights of each target the goal takes, by magnitude over all
    targets, and trains with soft masks until the event. There, the masks become hard: of each target, the weights below its
    threshold are pruned. Alone, as in `prune` and `compare`, which do not train, it is `Magnitude`.

    Args:
        allocation: How the goal is shared out over the targets at the first soft epoch.
        pattern: Single weights alone.
        heal: See `Scored`.

    Raises:
        ConfigError: ``allocation`` is none.
        PatternError: ``pattern`` is another one than `Unstructured`.

    Attributes:
        zeros: ``{target: its zeros at the goal}``, empty before they are fixed.
        softened: ``{target: zeros that its soft mask stands for}`` now; empty where weights are as they are.
        paired: Whether a `PDPCallback` trains the soft masks.
    """

    zeros: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    softened: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    paired: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, Unstructured):
            raise PatternError(
                f"pattern={shown(self.pattern)}: PDP makes masks of single weights. Leave pattern out, or use CAP."
            )

    @property
    def takes_shards(self) -> bool:
        """Thresholds are of whole targets."""
        return False

    def fix_zeros(self, targets: Targets, masks: Mapping[str, Tensor] | None, sparsity: float) -> None:
        """Fix how many zeros each target is to have, by its magnitudes now.

        Args:
            targets: The weights.
            masks: As for `path`.
            sparsity: The goal.
        """
        with Magnitude(allocation=self.allocation).path(targets, (), masks) as path:
            self.zeros = count_masked(path.at(sparsity).masks)

    def begin_event(self, done: float) -> None:
        """Masks are hard from now on; see `Pruner.begin_event`."""
        super().begin_event(done)
        if not self.paired:
            warnings.warn(
                "pruner=PDP: no soft masks are trained, so the event prunes by magnitude. Put a PDPCallback(epoch=...) "
                "into the Trainer's callbacks, or use Magnitude().",
                stacklevel=2,
            )
        self.softened = {}

    def state_dict(self) -> dict[str, Any]:
        """Zeros of each target."""
        return {"zeros": dict(self.zeros)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Pruner.load_state_dict`."""
        super().load_state_dict(state)
        zeros = state.get("zeros", {})
        require_instance("zeros", zeros, Mapping, "those of a checkpoint")
        for name, count in zeros.items():
            require_whole(f"zeros[{name!r}]", count, at_least=0)
        self.zeros = dict(zeros)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource = (),
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> ScoredPath:
        """Order the weights of each target by magnitude. See `Pruner.path`."""
        fixed = copy.copy(self)
        fixed.allocation = _Fixed(self.zeros, self.allocation) if self.zeros else self.allocation
        return super(PDP, fixed).path(targets, gradients, masks, progress=progress)


class _Fixed(Allocation):
    """So many zeros for each target, where they are to be as many in all; else another allocation's."""

    def __init__(self, zeros: Mapping[str, int], other: Allocation) -> None:
        self._zeros, self._other = zeros, other
        self.min_density = other.min_density

    def budgets(self, shapes: Shapes, existing: Mapping[str, int], zeros: int) -> Budgets:
        """One budget per target."""
        if set(self._zeros) != set(shapes):
            raise ConfigError(
                f"pruner=PDP: soft masks were of {len(self._zeros)} targets, and these are {len(shapes)} others. Give the targets "
                "that they were trained on."
            )
        if sum(self._zeros.values()) != zeros or any(existing[name] > count for name, count in self._zeros.items()):
            return self._other.budgets(shapes, existing, zeros)
        return [([name], self._zeros[name]) for name in shapes]


def soft_threshold(weight: Tensor, zeros: int) -> Tensor:
    """What parts the ``zeros`` smallest of a target from the others: the mean of the two magnitudes that are next to it.

    Args:
        weight: ``(*shape)``.
        zeros: 1 or more; all of them at the most.

    Returns:
        A scalar ``t`` without gradient: ``t = (max W_l + min W_h) / 2``.
    """
    magnitudes = weight.detach().abs().flatten()
    magnitudes = magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32))
    below = magnitudes.kthvalue(zeros).values
    above = magnitudes.kthvalue(min(zeros + 1, len(magnitudes))).values
    return (below + above) / 2


def soft_mask(weight: Tensor, threshold: Tensor, tau: float) -> Tensor:
    """``m(w) = exp(w²/τ) / (exp(w²/τ) + exp(t²/τ))``, a half at the threshold; gradients flow through it.

    Args:
        weight: ``(*shape)``.
        threshold: ``t``.
        tau: Temperature, in squared weights.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.sigmoid((wide.square() - threshold.square()) / tau).to(weight.dtype)


def softened_zeros(zeros: int, existing: int, share: float) -> int:
    """Zeros that a soft mask stands for on the way to ``zeros``; those that are there already count."""
    require_real("share", share, "[0, 1]", example=0.5)
    return max(existing, math.floor(share * zeros + 1e-9))
