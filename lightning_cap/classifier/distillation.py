"""Training, and calibration, with a teacher: part of the loss is how far the model's outputs are from another one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.classifier.making import create_timm
from lightning_cap.classifier.weights import load_weights
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import (
    require_choice,
    require_flag,
    require_instance,
    require_path,
    require_real,
    require_text,
)

#: What the teacher teaches: its probabilities, its most probable class, or what one of its layers gives.
Lesson = Literal["soft", "hard", "token"]


class DistillationLoss:
    """``(1 - α) · loss + α · distance``, the distance being that of a model's outputs from those of a teacher.

    - ``"soft"``: ``T² KL(softmax(teacher / T) ‖ softmax(model / T))``, a sample (Hinton et al. 2015).
    - ``"hard"``: cross-entropy with the teacher's most probable class for a label (Touvron et al. 2021, DeiT).
    - ``"token"``: mean squared difference of what a layer gives in both, such as the tokens ``(b, L, C)`` of a ViT's last norm.

    The teacher is frozen and in eval mode. It is no part of the module that holds this object: it is in no checkpoint, in no
    optimizer and in none of DDP's buckets, and follows the inputs to their device by itself. The gradient of this loss is one of
    the model alone, so that the Fisher can be taken of it: call it in ``calibration_step``, as `VisionClassifier` does.

    Args:
        teacher: A module from the model's inputs to outputs of the same shape; or the name of a timm model.
        alpha: ``α`` in [0, 1], the share of the distance.
        temperature: ``T``, of ``"soft"`` alone.
        kind: What is taught.
        layer: For ``"token"``, the name of the layer in both models, as ``named_modules()`` has it: timm's last norm is ``"norm"``.
        pretrained: Of a timm name: load its published weights.
        checkpoint: Of a timm name: a local file of weights, see `load_weights`.
        model_kwargs: Of a timm name: further arguments of ``timm.create_model``, such as ``{"num_classes": 10}``.

    Raises:
        ConfigError: An argument is out of range, or the teacher cannot be made.
    """

    def __init__(
        self,
        teacher: str | nn.Module,
        alpha: float = 0.5,
        temperature: float = 1.0,
        kind: Lesson = "soft",
        layer: str = "norm",
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require_instance("teacher", teacher, (str, nn.Module), "'deit_small_patch16_224'")
        require_real("alpha", alpha, "[0, 1]", 0.5)
        require_real("temperature", temperature, "(0, inf)", 1.0)
        require_choice("kind", kind, get_args(Lesson))
        require_text("layer", layer, "norm")
        require_flag("pretrained", pretrained)
        require_path("checkpoint", checkpoint, "weights.safetensors", optional=True)
        require_instance("model_kwargs", model_kwargs, dict, "{'num_classes': 10}", optional=True)
        self.alpha, self.temperature, self.kind, self.layer = alpha, temperature, kind, layer
        self.teacher = _teacher(teacher, pretrained, checkpoint, model_kwargs)
        if kind == "token":
            _layer("teacher", self.teacher, layer)

    def __repr__(self) -> str:
        of = f"layer {self.layer!r}" if self.kind == "token" else f"temperature={self.temperature:g}"
        return f"{type(self).__name__}({type(self.teacher).__name__}, {self.kind!r}, alpha={self.alpha:g}, {of})"

    @property
    def num_classes(self) -> int | None:
        """The classes of the teacher, if it tells them."""
        told = getattr(self.teacher, "num_classes", None)
        return told if isinstance(told, int) and not isinstance(told, bool) else None

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the teacher cannot teach, as far as it can be told before training.

        Raises:
            ConfigError: Says why.
        """
        return

    def __call__(self, model: nn.Module, inputs: Any, loss: Callable[[Any], Tensor]) -> Tensor:
        """The loss of a batch: ``model(inputs)`` is computed once, ``loss(outputs)`` is the loss without a teacher.

        Args:
            model: The one that learns.
            inputs: What both models take.
            loss: ``loss(outputs)``, a scalar, such as the cross-entropy with the labels.

        Raises:
            ConfigError: Model and teacher do not go together: the same module, outputs of other shapes, no such layer.
        """
        if any(module is self.teacher for module in model.modules()):
            raise ConfigError("teacher: it is the model itself. Give a copy, as copy.deepcopy(model), before pruning.")
        if self.kind == "token":
            with _outputs_of(_layer("model", model, self.layer)) as given:
                outputs = model(inputs)
            mine = given[-1] if given else None
        else:
            mine = outputs = model(inputs)
        wanted = self._taught(inputs)
        if not isinstance(mine, Tensor) or not isinstance(wanted, Tensor) or mine.shape != wanted.shape:
            raise ConfigError(
                f"teacher: it gives {_described(wanted)}, and the model {_described(mine)}. Give a teacher of the same classes "
                "(and of the same tokens for kind='token')."
            )
        return (1 - self.alpha) * loss(outputs) + self.alpha * self._distance(mine, wanted)

    @torch.no_grad()
    def _taught(self, inputs: Any) -> Any:
        held = next(self.teacher.parameters(), None)
        if isinstance(inputs, Tensor) and held is not None:
            if held.device != inputs.device:
                self.teacher.to(inputs.device)
            inputs = inputs.to(held.dtype) if inputs.is_floating_point() else inputs
        self.teacher.eval()
        if self.kind != "token":
            return self.teacher(inputs)
        with _outputs_of(_layer("teacher", self.teacher, self.layer)) as given:
            self.teacher(inputs)
        return given[-1] if given else None

    def _distance(self, mine: Tensor, wanted: Tensor) -> Tensor:
        if self.kind == "token":
            return F.mse_loss(mine, wanted.to(mine.dtype))
        if self.kind == "hard":
            return F.cross_entropy(mine, wanted.argmax(-1))
        own, other = (F.log_softmax(logits.float() / self.temperature, -1) for logits in (mine, wanted))
        return self.temperature**2 * F.kl_div(own, other, reduction="batchmean", log_target=True)


def _teacher(
    teacher: str | nn.Module, pretrained: bool, checkpoint: str | None, model_kwargs: dict[str, Any] | None
) -> nn.Module:
    if isinstance(teacher, str):
        if pretrained and checkpoint is not None:
            raise ConfigError(f"pretrained=True and checkpoint={checkpoint!r} are both given; keep one of them")
        made = create_timm(teacher, None, pretrained, model_kwargs or {}, 0.0, "teacher")
        if checkpoint is not None:
            load_weights(made, checkpoint)
    elif pretrained or checkpoint is not None or model_kwargs is not None:
        raise ConfigError(
            f"pretrained={pretrained}, checkpoint={checkpoint!r} and model_kwargs={model_kwargs!r} are for the name of a timm "
            f"model, but teacher is a {type(teacher).__name__} already. Load its weights yourself."
        )
    else:
        made = teacher
    return made.requires_grad_(False).eval()


def _layer(name: str, model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(
            f"layer={path!r}: the {name} ({type(model).__name__}) has none of this name. Name one of named_modules()."
        ) from error


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[Any]]:
    """What the layer gives inside."""
    given: list[Any] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    try:
        yield given
    finally:
        handle.remove()


def _described(outputs: Any) -> str:
    return f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
