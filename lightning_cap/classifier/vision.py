"""The image classifier that the recipes train and prune: any timm model as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_cap.classifier.agreement import (
    Normalization,
    check_classes,
    check_images,
    normalization_of,
    tell_other_normalization,
)
from lightning_cap.classifier.distillation import DistillationLoss
from lightning_cap.classifier.making import check_given_module, create_timm, number_of_classes, with_recipe
from lightning_cap.classifier.sharding import shard_by_blocks
from lightning_cap.classifier.weights import load_weights
from lightning_cap.errors import ConfigError
from lightning_cap.schedules.learning_rate import CosineLR, CyclicLinearLR
from lightning_cap.utilities.arguments import require_flag, require_instance, require_path, require_whole, shown
from lightning_cap.utilities.compiled import plain_module

try:
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # an older timm has it one module further in
    from timm.optim.optim_factory import param_groups_weight_decay  # type: ignore[no-redef, unused-ignore]


class VisionClassifier(LightningModule):
    """Train and evaluate an image classifier, ready for ``CAPPruningCallback``.

    A batch is ``(images, labels)``: images ``(b, C, H, W)`` and either class indices ``(b,)`` or, after mixup, class
    probabilities ``(b, num_classes)``. Logs ``train/loss`` each step and ``val/loss``, ``val/acc``, ``val/acc5``
    (``test/...`` likewise) each epoch; top-5 only with more than five classes. A data module that tells its ``num_classes``
    or ``image_shape`` is compared with the model before the first step.

    Args:
        model: A timm model name, or any module from images to logits (in YAML: its ``class_path``). What its method
            ``auxiliary_loss()`` gives, if it has one, is added to the loss of each batch.
        num_classes: The number of classes; ``None`` takes the model's own.
        pretrained: Load timm's published weights of the named model (needs network or a filled cache).
        checkpoint: A local file to start from, see `load_weights`.
        model_kwargs: Further arguments of ``timm.create_model``.
        recipe: Name of a training recipe whose weight decay, label smoothing, drop path rate and gradient clip apply
            where the arguments below are ``None``.
        label_smoothing: In ``[0, 1)``; applied to class indices only. 0 without recipe.
        weight_decay: Of all weights but biases, norms and what the model excludes; it overrides a
            ``weight_decay`` among the optimizer's own arguments. 0.05 without recipe.
        drop_path_rate: Stochastic depth of the named timm model, in ``[0, 1)``. 0 without recipe.
        gradient_clip: Largest gradient norm, 0 for none; ``Trainer(gradient_clip_val=...)`` wins over it. None
            without recipe.
        optimizer: Makes the optimizer from parameter groups; in YAML its ``class_path`` and ``init_args``.
        lr_scheduler: Makes the scheduler, stepped once per optimizer step (``ReduceLROnPlateau`` once per epoch);
            ``None`` for a constant learning rate.
        distillation: A teacher, whose outputs are a part of the loss in training and in calibration.

    Raises:
        ConfigError: If an argument cannot work, or the pretrained weights cannot be had.
    """

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        recipe: str | None = None,
        label_smoothing: float | None = None,
        weight_decay: float | None = None,
        drop_path_rate: float | None = None,
        gradient_clip: float | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-4),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: CyclicLinearLR(optimizer, min_lr=1e-5),
        distillation: DistillationLoss | None = None,
    ) -> None:
        super().__init__()
        require_instance("model", model, (str, nn.Module), "'deit_tiny_patch16_224'")
        if num_classes is not None:
            require_whole("num_classes", num_classes, 2, example=1000)
        require_flag("pretrained", pretrained)
        require_path("checkpoint", checkpoint, "weights.safetensors", optional=True)
        require_instance("model_kwargs", model_kwargs, dict, "{'img_size': 32}", optional=True)
        _require_function("optimizer", optimizer, "lambda groups: torch.optim.AdamW(groups, lr=5e-4)")
        if lr_scheduler is not None:
            _require_function("lr_scheduler", lr_scheduler, "lambda optimizer: CyclicLinearLR(optimizer, min_lr=1e-5)")
        require_instance("distillation", distillation, DistillationLoss, "DistillationLoss(teacher)", optional=True)
        given = {
            "label_smoothing": label_smoothing,
            "weight_decay": weight_decay,
            "drop_path_rate": drop_path_rate,
            "gradient_clip": gradient_clip,
        }
        # hyperparameters are to load with weights_only=True: plain values alone, and none that a checkpoint makes obsolete
        complex_ones = [n for n, v in (("model", model), ("model_kwargs", model_kwargs)) if not _is_plain(v)]
        self.save_hyperparameters(
            ignore=["pretrained", "checkpoint", "optimizer", "lr_scheduler", "distillation", *complex_ones]
        )
        values = with_recipe(given, recipe)
        self.label_smoothing, self.weight_decay = values["label_smoothing"], values["weight_decay"]
        self.gradient_clip = values["gradient_clip"]
        if pretrained and checkpoint is not None:
            raise ConfigError(f"pretrained=True and checkpoint={checkpoint!r} are both given; keep one of them")
        if isinstance(model, str):
            self.model = create_timm(model, num_classes, pretrained, model_kwargs or {}, values["drop_path_rate"])
        else:
            check_given_module(model, pretrained, model_kwargs, values["drop_path_rate"], drop_path_rate is not None)
            self.model = model
        self.num_classes = number_of_classes(self.model, num_classes)
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.pretrained = pretrained
        self.distillation = distillation
        if distillation is not None:
            distillation.check(self.model)
        if distillation is not None and distillation.num_classes not in (None, self.num_classes):
            raise ConfigError(
                f"distillation={distillation}: its teacher has {distillation.num_classes} classes, the model {self.num_classes}. "
                "Give a teacher of the same classes."
            )
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.val_metrics = _accuracies(self.num_classes, "val/")
        self.test_metrics = _accuracies(self.num_classes, "test/")

    @property
    def normalization(self) -> Normalization | None:
        """Mean and standard deviation per channel of the images that the model expects, from timm's ``pretrained_cfg``."""
        return normalization_of(self.model)

    def configure_model(self) -> None:
        """With `ModelParallelStrategy`, share the weights out over the processes, block by block, by `fully_shard` (FSDP2)."""
        if self.device_mesh is not None:
            shard_by_blocks(self.model, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Compare the model with the data module, as far as that tells its classes, its images and their normalisation.

        Raises:
            ConfigError: The data has another number of classes, or images that the model does not take.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if stage != "predict":
            check_classes(self.num_classes, data)
        check_images(self.model, self.num_classes, data, self.trainer.strategy.root_device)
        if self.pretrained:
            tell_other_normalization(self.normalization, data)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(b, num_classes)`` of images ``(b, C, H, W)``."""
        logits: torch.Tensor = self.model(images)
        return logits

    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The training loss, a scalar, without logging anything; for the pruner's gradients."""
        images, labels = batch
        if self.distillation is None:
            loss = self._cross_entropy(self(images), labels)
        else:
            loss = self.distillation(self.model, images, lambda logits: self._cross_entropy(logits, labels))
        own_loss: Callable[[], Any] | None = getattr(plain_module(self.model), "auxiliary_loss", None)
        return loss if own_loss is None else loss + own_loss()

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.is_floating_point():  # soft labels carry their smoothing in them
            return F.cross_entropy(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The training loss, logged as ``train/loss``."""
        loss = self.calibration_step(batch, batch_idx)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss (without smoothing) and the accuracies as ``val/...``."""
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss (without smoothing) and the accuracies as ``test/...``."""
        self._evaluate(batch, self.test_metrics, "test/loss")

    def _evaluate(self, batch: Any, metrics: MetricCollection, loss_name: str) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)
        loss = F.cross_entropy(logits, labels)
        self.log(loss_name, loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Class probabilities ``(b, num_classes)`` of a batch of images, with or without labels."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        probabilities: torch.Tensor = self(images).softmax(dim=-1)
        return probabilities

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over timm's groups with and without weight decay, and the scheduler, stepped every step."""
        model = plain_module(self.model)  # of a compiled model: names without prefix
        skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        groups = param_groups_weight_decay(model, self.weight_decay, no_weight_decay_list=skip)
        optimizer: Optimizer = _made("optimizer", self.make_optimizer, groups)
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = _made("lr_scheduler", self.make_lr_scheduler, optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", "val/loss")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the Trainer's ``gradient_clip_val`` if it has one, else by ``gradient_clip``."""
        value = self.gradient_clip if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, value, gradient_clip_algorithm)

    def on_train_start(self) -> None:
        """Give a scheduler whose length nobody set (no pruning callback, or a cosine) the whole run.

        Raises:
            ConfigError: If the length of the run is not known.
        """
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if isinstance(scheduler, CyclicLinearLR) and scheduler.period is None:
                scheduler.restart(self._steps_of_run("period=None of CyclicLinearLR"))
            elif isinstance(scheduler, CosineLR) and scheduler.steps is None:
                scheduler.span(self._steps_of_run("steps=None of CosineLR"))

    def _steps_of_run(self, setting: str) -> int:
        steps = self.trainer.estimated_stepping_batches
        if not 1 <= steps < float("inf"):
            raise ConfigError(
                f"{setting} cannot be set to the length of the run, which is unknown ({steps} steps); give "
                f"{setting.split('=')[0]}=, or the Trainer max_epochs or max_steps"
            )
        return int(steps)


def _accuracies(num_classes: int, prefix: str) -> MetricCollection:
    """Top-1 and, with more than five classes, top-5 accuracy over all samples."""
    metrics: dict[str, Metric | MetricCollection] = {"acc": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes > 5:
        metrics["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)  # equal states at first must not merge them


def _made(name: str, make: Callable[[Any], Any], of: Any) -> Any:
    """What a function of the user's makes; that it refuses its settings is told with the name of the argument."""
    try:
        return make(of)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name} cannot be made: {error}. Correct its settings.") from error


def _require_function(name: str, value: object, example: str) -> None:
    if not callable(value):
        raise ConfigError(f"{name}={shown(value)}: give a function or a class, such as {example}.")


def _is_plain(value: Any) -> bool:
    """Whether a value consists of plain Python values only."""
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)
