"""What the dense model teaches one that leaves tokens out: its probabilities, and the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.classifier.distillation import DistillationLoss
from lightning_cap.errors import ConfigError
from lightning_cap.tokens.base import TokenOutput, TokenPruning
from lightning_cap.tokens.vision_transformer import require_tokens
from lightning_cap.utilities.arguments import require_real
from lightning_cap.utilities.compiled import plain_module


class KeptTokenDistillation(DistillationLoss):
    """``(1 - α) · loss + α · (KL + token_weight · distance of the kept tokens)``, section 3.3 of DynamicViT.

    The distance is the mean squared difference from the teacher's last norm, over the patch tokens that the model keeps. The
    defaults have DynamicViT's weights 1, 0.5 and 0.5, up to a factor of 2/3, which ``ratio_weight`` of `DynamicViT` has not. The
    teacher is kept apart as `DistillationLoss` does.

    Args:
        teacher: A timm `VisionTransformer` with as many tokens and channels, or the name of one; the dense model.
        alpha: ``α`` in [0, 1].
        temperature: Of the probabilities, see `DistillationLoss`.
        token_weight: Of the tokens' distance, at least 0.
        pretrained: Of a timm name: load its published weights.
        checkpoint: Of a timm name: a local file of weights.
        model_kwargs: Of a timm name: further arguments of ``timm.create_model``.

    Raises:
        ConfigError: An argument is out of range, or the teacher has no tokens.
    """

    def __init__(
        self,
        teacher: str | nn.Module,
        alpha: float = 1 / 3,
        temperature: float = 1.0,
        token_weight: float = 1.0,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require_real("token_weight", token_weight, "[0, inf)", 1.0)
        if isinstance(teacher, nn.Module):
            require_tokens("teacher", teacher)
        super().__init__(teacher, alpha, temperature, "token", "norm", pretrained, checkpoint, model_kwargs)
        require_tokens("teacher", self.teacher)
        self.token_weight = token_weight

    def check(self, model: nn.Module) -> None:
        """See `DistillationLoss.check`."""
        super().check(model)
        student = plain_module(model)
        if not isinstance(student, TokenPruning):
            raise ConfigError(
                f"model={type(student).__name__}: it leaves no tokens out. Give a DynamicViT or ZeroTPrune, or use "
                "DistillationLoss(teacher, kind='token')."
            )
        if any(module is self.teacher for module in model.modules()):
            raise ConfigError("teacher: it is the model itself. Give a copy, as copy.deepcopy(model), before pruning.")
        both: list[Any] = [self.teacher, student.vit]
        found = [(int(vit.patch_embed.num_patches), int(vit.embed_dim)) for vit in both]
        if found[0] != found[1]:
            raise ConfigError(
                "teacher: it has {} patches of {} channels, and the model {} of {}. Give the dense model of the same size and "
                "classes.".format(*found[0], *found[1])
            )

    def __call__(self, model: nn.Module, inputs: Any, loss: Callable[[Any], Tensor]) -> Tensor:
        """The loss of a batch: ``model(inputs)`` is computed once, ``loss(logits)`` is the loss without a teacher.

        Args:
            model: A `TokenPruning`.
            inputs: Images ``(b, C, H, W)``.
            loss: Of the logits, a scalar.

        Raises:
            ConfigError: The model leaves no tokens out, or the teacher has other tokens or classes.
        """
        self.check(model)
        student: Any = plain_module(model)
        output: TokenOutput = model(inputs, return_tokens=True)
        tokens = self._taught(inputs)
        with torch.no_grad():
            logits = self.teacher.forward_head(tokens)  # type: ignore[operator]
        prefix = student.vit.num_prefix_tokens
        wanted, weights = _at(tokens[:, self.teacher.num_prefix_tokens :], output)
        mine = output.tokens[:, prefix:]
        if logits.shape != output.logits.shape or wanted.shape != mine.shape:
            raise ConfigError(
                f"teacher: it gives logits {tuple(logits.shape)} and patch tokens {tuple(wanted.shape)}, and the model "
                f"{tuple(output.logits.shape)} and {tuple(mine.shape)}. Give the dense model of the same size and "
                "classes."
            )
        apart = (mine - wanted.to(mine.dtype)).square().mean(-1)
        apart = apart.mean() if weights is None else (apart * weights).sum() / weights.sum().clamp(min=1)
        own, other = (F.log_softmax(given.float() / self.temperature, -1) for given in (output.logits, logits))
        soft = self.temperature**2 * F.kl_div(own, other, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * loss(output.logits) + self.alpha * (soft + self.token_weight * apart)


def _at(tokens: Tensor, output: TokenOutput) -> tuple[Tensor, Tensor | None]:
    """The teacher's patch tokens where the model has some, and the weight of each."""
    kept = output.kept
    if kept is None:
        return tokens, None
    if kept.is_floating_point():
        return tokens, kept.detach()
    return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[2])), None
