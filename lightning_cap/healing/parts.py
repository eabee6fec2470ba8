"""What pruning, healing and the re-estimation of batch norm change in a model: to be copied before, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_cap.healing.base import Heal
from lightning_cap.healing.batchnorm import batch_norms
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import require_flag, require_instance, require_list


class ModelParts:
    """The live tensors that change, by name.

    Args:
        model: Has the targets.
        targets: Their weights always belong to it.
        heals: What moves more than those, if it is to be copied too; None stands for none.
        statistics: Whether those of batch norms do.

    Raises:
        ConfigError: An argument is something else.
    """

    def __init__(
        self, model: nn.Module, targets: Targets, *, heals: Sequence[Heal | None] = (), statistics: bool = False
    ) -> None:
        require_instance("model", model, nn.Module, "timm.create_model('resnet18')")
        require_targets(targets)
        require_list("heals", heals, "[LayerwiseHeal()]")
        require_flag("statistics", statistics)
        self._tensors: dict[str, Tensor] = dict(targets)
        for heal in heals:
            require_instance("heals", heal, Heal, "LayerwiseHeal()", optional=True)
            moved = heal.parameters(model, targets) if heal is not None else {}
            self._tensors.update({name: tensor for name, tensor in moved.items() if name not in targets})
        for name, layer in batch_norms(model).items() if statistics else ():
            for kind in ("running_mean", "running_var"):
                self._tensors[f"{name}.{kind}"] = getattr(layer, kind)

    def tensors(self) -> dict[str, Tensor]:
        """As they are now, detached but not copied."""
        return {name: tensor.detach() for name, tensor in self._tensors.items()}

    def copies(self) -> dict[str, Tensor]:
        """Copies of what they are now, for `restore`."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the model, in place.

        Args:
            values: Of some of them, or of all, by name.

        Raises:
            ConfigError: It is no mapping.
        """
        require_instance("values", values, Mapping, "parts.copies()")
        for name, value in values.items():
            self._tensors[name].copy_(value)
