"""`Heal`: what moves the weights that are kept after pruning, on a fixed mask, by calibration data without labels."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_cap.calibration.rows import Loss
from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_instance, shown
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.progress import Progress


@dataclass(frozen=True, kw_only=True)
class HealReport:
    """What healing did, for logs.

    Attributes:
        samples: That were read, over all processes.
        passes: Of a sample through the model, forward alone or forward and backward, over all processes.
        healed: Names of the targets whose rows were solved.
        left: Why each other target was left as it was, such as ``{"attn.in_proj_weight": "not a plain layer"}``.
        stats: Numbers of the method's own.
    """

    samples: int
    passes: int = 0
    healed: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)


class Heal(ABC):
    """A way to heal. YAML names it by class path, such as ``lightning_cap.healing.LayerwiseHeal``.

    Attributes:
        num_inputs: Samples that it reads, over all processes.
        passes: What they are read by, for messages.
    """

    num_inputs: int
    passes: ClassVar[str] = "forward passes alone"

    def parameters(self, model: nn.Module, targets: Targets) -> dict[str, nn.Parameter]:
        """All that `run` may move, by the model's own names: the targets' weights and the biases of their layers.

        The caller copies them before pruning, for ``dense``, and puts them back when something fails.

        Args:
            model: Has the targets.
            targets: Weights of it.

        Raises:
            ConfigError: An argument is something else.
        """
        biases = biases_of(model, targets)
        return {name: model.get_parameter(path) for name, path in targets.paths.items()} | biases

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
        """Move kept weights and other `parameters`, in place. Every process must call it.

        Masked weights stay exactly zero, and all else in the model stays as it is.

        Args:
            model: Pruned, in eval mode.
            targets: Its weights.
            masks: ``{target: bool (*shape)}``, False = pruned.
            dense: What `parameters` were before pruning, ``{name: (*shape)}``; of targets it must be there.
            batches: This process's batches, of ``num_inputs`` samples or more over all processes.
            loss: ``loss(model, batch)``, called for the forward pass in it; its value is not used.
            context: Entered around every forward pass, such as autocast.
            progress: ``progress("heal", done, total)``.

        Raises:
            CAPError: Whatever went wrong. The caller then puts `parameters` back.
        """


#: A `Heal`, ``"layerwise"`` or ``"distill"`` for the one of that name with its defaults, or None for none.
HealArgument = Heal | Literal["layerwise", "distill"] | None


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


def check_weights(
    targets: Targets, masks: Mapping[str, Tensor], dense: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> None:
    """Refuse masks and dense weights that do not fit.

    Args:
        targets: The weights.
        masks: Must have a bool tensor for each.
        dense: Must have a floating-point tensor for each.
        others: Further parameters, of which ``dense`` may have some.

    Raises:
        ConfigError: Something is missing, or of another shape or type.
    """
    require_instance("masks", masks, Mapping, "result.masks")
    require_instance("dense", dense, Mapping, "targets.copies()")
    shapes = targets.shapes
    _check_tensors("masks", masks, shapes, "a bool tensor", lambda mask: mask.dtype == torch.bool)
    shapes |= {name: tuple(other.shape) for name, other in others.items() if name in dense}
    _check_tensors("dense", dense, shapes, "a floating-point tensor", torch.is_floating_point)


def _check_tensors(
    argument: str,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    kind: str,
    is_right: Callable[[Tensor], bool],
) -> None:
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not is_right(tensor):
            raise ConfigError(
                f"{argument}={shown(tensors)}: {shown(tensor)} for {name!r}. Give {kind} of shape {shape}."
            )


def count_samples(own: int, reached: int, wanted: int) -> int:
    """The samples that were read, over all processes. Every process must call it.

    Args:
        own: Of this process.
        reached: See `first_samples`.
        wanted: Of all processes; fewer are told.

    Raises:
        GradientError: There is none at all.
    """
    samples: int = sum(distributed.gather_objects(own))
    if samples == 0:
        raise GradientError("inputs: the calibration batches are empty. Check the data set and its batch size.")
    if own and reached < wanted:
        warnings.warn(
            f"num_inputs={wanted}: the batches of this process gave only {own} samples; the model is healed by what there is.",
            stacklevel=4,
        )
    return samples
