"""`Heal`: what moves the weights that are kept after pruning, on a fixed mask, by calibration data without labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lightning_cap.calibration.rows import Loss
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import require_instance
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.progress import Progress


@dataclass(frozen=True, kw_only=True)
class HealReport:
    """What healing did, for logs.

    Attributes:
        samples: That were read, over all processes.
        healed: Names of the targets whose rows were solved.
        left: Why each other target was left as it was, such as ``{"attn.in_proj_weight": "not a plain layer"}``.
        stats: Numbers of the method's own.
    """

    samples: int
    healed: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)


class Heal(ABC):
    """A way to heal. YAML names it by class path, such as ``lightning_cap.healing.LayerwiseHeal``.

    Attributes:
        num_inputs: Samples that it reads, over all processes, by forward passes alone.
    """

    num_inputs: int

    @abstractmethod
    def run(
        self,
        model: nn.Module,
        targets: Targets,
        masks: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        batches: Iterable[Any],
        loss: Loss,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
    ) -> HealReport:
        """Move, in place, kept weights of the targets and the biases of their layers. Every process must call it.

        Masked weights stay exactly zero, and all else in the model stays as it is.

        Args:
            model: Pruned, in eval mode.
            targets: Its weights.
            masks: ``{target: bool (*shape)}``, False = pruned.
            dense: What weights and biases were before pruning: ``{target: (*shape)}``, and ``{name: (O)}`` for the names that
                `biases_of` gives.
            batches: This process's batches, of ``num_inputs`` samples or more over all processes.
            loss: ``loss(model, batch)``, called for its forward pass; its value is not used.
            context: Entered around every forward pass, such as autocast.
            progress: ``progress("heal", done, total)``.

        Raises:
            CAPError: Whatever went wrong. The caller then puts weights and biases back.
        """


#: A `Heal`, ``"layerwise"`` for the one of that name with its defaults, or None for none.
HealArgument = Heal | Literal["layerwise"] | None


def biases_of(model: nn.Module, targets: Targets) -> dict[str, nn.Parameter]:
    """The biases of the layers that have the targets as their ``weight``, by their own names, such as ``"fc.bias"``.

    Args:
        model: Has the targets.
        targets: Weights of it.

    Raises:
        ConfigError: ``model`` is no module, or ``targets`` no `Targets`.
    """
    require_instance("model", model, nn.Module, "timm.create_model('resnet18')")
    require_targets(targets)
    found = {}
    for path in targets.paths.values():
        layer, _, own = path.rpartition(".")
        bias = getattr(model.get_submodule(layer), "bias", None) if own == "weight" else None
        if isinstance(bias, nn.Parameter):
            found[plain_name(f"{layer}.bias" if layer else "bias")] = bias
    return found
