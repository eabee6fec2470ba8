"""The image classifier that the recipes train and prune: any timm model as a LightningModule."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file
from timm.layers.drop import DropPath
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_cap.data.recipes import get_training_recipe
from lightning_cap.errors import ConfigError
from lightning_cap.schedules.learning_rate import CyclicLinearLR
from lightning_cap.utilities.compiled import COMPILED_PREFIX, plain_module

try:
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # an older timm has it one module further in
    from timm.optim.optim_factory import param_groups_weight_decay  # type: ignore[no-redef, unused-ignore]

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the averaged weights first, as timm does
_PREFIXES = ("module.", "model.", COMPILED_PREFIX)  # DDP, this module in a Lightning checkpoint, torch.compile


class VisionClassifier(LightningModule):
    """Train and evaluate an image classifier, ready for ``CAPPruningCallback``.

    A batch is ``(images, labels)``: images ``(b, C, H, W)`` and either class indices ``(b,)`` or, after mixup, class
    probabilities ``(b, num_classes)``. Logs ``train/loss`` each step and ``val/loss``, ``val/acc``, ``val/acc5``
    (``test/...`` likewise) each epoch; top-5 only with more than five classes.

    Args:
        model: A timm model name, or any module from images to logits (in YAML: its ``class_path``).
        num_classes: The number of classes; ``None`` takes the model's own.
        pretrained: Load timm's published weights of the named model (needs network or a filled cache).
        checkpoint: A local file to start from, see :func:`load_weights`.
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
    ) -> None:
        super().__init__()
        given = {
            "label_smoothing": label_smoothing,
            "weight_decay": weight_decay,
            "drop_path_rate": drop_path_rate,
            "gradient_clip": gradient_clip,
        }
        # hyperparameters are to load with weights_only=True: plain values alone, and none that a checkpoint makes obsolete
        complex_ones = [n for n, v in (("model", model), ("model_kwargs", model_kwargs)) if not _is_plain(v)]
        self.save_hyperparameters(ignore=["pretrained", "checkpoint", "optimizer", "lr_scheduler", *complex_ones])
        values = _with_recipe(given, recipe)
        self.label_smoothing, self.weight_decay = values["label_smoothing"], values["weight_decay"]
        self.gradient_clip = values["gradient_clip"]
        if pretrained and checkpoint is not None:
            raise ConfigError(f"pretrained=True and checkpoint={checkpoint!r} are both given; keep one of them")
        if isinstance(model, str):
            self.model = _create_timm(model, num_classes, pretrained, model_kwargs or {}, values["drop_path_rate"])
        elif isinstance(model, nn.Module):
            _check_given_module(model, pretrained, model_kwargs, values["drop_path_rate"], drop_path_rate is not None)
            self.model = model
        else:
            raise ConfigError(f"model={model!r} is neither a timm model name nor a torch.nn.Module; give one of them")
        self.num_classes = _num_classes(self.model, num_classes)
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.val_metrics = _accuracies(self.num_classes, "val/")
        self.test_metrics = _accuracies(self.num_classes, "test/")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(b, num_classes)`` of images ``(b, C, H, W)``."""
        logits: torch.Tensor = self.model(images)
        return logits

    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The training loss, a scalar, without logging anything; for the pruner's gradients."""
        images, labels = batch
        logits = self(images)
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
        optimizer = self.make_optimizer(groups)
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
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
        """Give a cyclic scheduler whose period nobody set (no pruning callback) the whole run as its one cycle.

        Raises:
            ConfigError: If the length of the run is not known.
        """
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, CyclicLinearLR) and scheduler.period is None:
                steps = self.trainer.estimated_stepping_batches
                if not 1 <= steps < float("inf"):
                    raise ConfigError(
                        f"period=None of CyclicLinearLR cannot be set to the length of the run, which is unknown "
                        f"({steps} steps); give period=, or the Trainer max_epochs or max_steps"
                    )
                scheduler.restart(int(steps))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a local checkpoint into a model: every weight or none.

    Args:
        model: The model to fill, in place.
        path: A ``.safetensors`` file, or a pickled state dict (loaded with ``weights_only=True``), bare or under
            ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model`` (the first of these that is there), also a
            Lightning checkpoint of :class:`VisionClassifier`.

    Raises:
        ConfigError: If the file does not exist or cannot be read, or if its names or shapes are not the model's.
    """
    if not Path(path).is_file():
        raise ConfigError(f"checkpoint={str(path)!r} is not a file; give the path of a .safetensors or torch.save file")
    own = model.state_dict()
    state = _without_prefix(_read_state(Path(path)), own)
    missing = [k for k in own if k not in state and not k.endswith(".num_batches_tracked")]  # torch fills these in
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the model"
        for k in own
        if k in state and isinstance(own[k], torch.Tensor) and state[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
            if names
        ]
        raise ConfigError(
            f"checkpoint={str(path)!r} does not fit the model, nothing was loaded ({'; '.join(problems)}); "
            f"give the model, num_classes and model_kwargs that it was saved with"
        )
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, out of its wrapper."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"checkpoint={str(path)!r} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"save model.state_dict() with torch.save or safetensors"
        ) from error
    if isinstance(content, dict):
        content = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ConfigError(
            f"checkpoint={str(path)!r} holds no state dict of tensors, neither bare nor under {_WRAPPERS}; "
            f"save model.state_dict()"
        )
    return content


def _without_prefix(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state without the prefixes that wrappers of the model put before each of its names."""
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in state) and not all(k.startswith(prefix) for k in own):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _create_timm(
    name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any], drop_path_rate: float
) -> nn.Module:
    """A timm model by name, its failures as errors of ours."""
    if ":" not in name and not timm.is_model(name):  # a colon: hf-hub:..., local-dir:...
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise ConfigError(
            f"model={name!r} is not a timm model; near names: {', '.join(near) or 'none'}. timm.list_models() lists all"
        )
    if drop_path_rate > 0:
        kwargs = {"drop_path_rate": drop_path_rate, **kwargs}
    if num_classes is not None:
        kwargs = {"num_classes": num_classes, **kwargs}
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        remedy = (
            "check the network, or download the weights elsewhere and give the file as checkpoint="
            if pretrained
            else "give model_kwargs (and a drop_path_rate) that this model takes"
        )
        raise ConfigError(
            f"model={name!r} could not be created with pretrained={pretrained}, {kwargs} "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return model


def _check_given_module(
    model: nn.Module, pretrained: bool, kwargs: dict[str, Any] | None, drop_path_rate: float, explicit: bool
) -> None:
    """Refuse, for a module that exists already, what only the making of one could honour."""
    kind = type(model).__name__
    if pretrained or kwargs:
        raise ConfigError(
            f"pretrained={pretrained} and model_kwargs={kwargs!r} need a timm name, but model is a {kind} already; "
            f"give them to the model itself, and weights as checkpoint="
        )
    if drop_path_rate > 0 and explicit:
        raise ConfigError(
            f"drop_path_rate={drop_path_rate} needs a timm name, but model is a {kind} already; "
            f"give the rate to the model itself"
        )
    if drop_path_rate > 0 and not any(isinstance(m, DropPath) for m in model.modules()):
        rank_zero_warn(
            f"The recipe's drop_path_rate={drop_path_rate} is not applied: model is a {kind} already. Give the rate to "
            f"the model itself, or drop_path_rate=0 here to say that none is wanted."
        )


def _num_classes(model: nn.Module, given: int | None) -> int:
    """The number of classes of the model, checked against the one that was given."""
    own = getattr(model, "num_classes", None)
    if given is not None and own is not None and own != given:
        raise ConfigError(f"num_classes={given}, but the model has {own}; make the model with {given} or leave it out")
    number = own if given is None else given
    if not isinstance(number, int) or number < 2:
        raise ConfigError(
            f"num_classes={number!r} is not a number of classes the model tells or was given; give num_classes >= 2"
        )
    return number


def _with_recipe(given: dict[str, float | None], recipe: str | None) -> dict[str, Any]:
    """The training values: as given, else the recipe's, else the defaults; checked."""
    defaults = {"label_smoothing": 0.0, "weight_decay": 0.05, "drop_path_rate": 0.0, "gradient_clip": None}
    if recipe is not None:
        found = get_training_recipe(recipe)
        defaults = {name: getattr(found, name) for name in defaults}
    values = {name: defaults[name] if value is None else value for name, value in given.items()}
    for name, value in values.items():
        below = 1.0 if name in ("label_smoothing", "drop_path_rate") else float("inf")
        if value is not None and not 0 <= value < below:
            raise ConfigError(f"{name}={value!r} is out of range; give a number in [0, {below})")
    return values


def _accuracies(num_classes: int, prefix: str) -> MetricCollection:
    """Top-1 and, with more than five classes, top-5 accuracy over all samples."""
    metrics: dict[str, Metric | MetricCollection] = {"acc": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes > 5:
        metrics["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)  # equal states at first must not merge them


def _is_plain(value: Any) -> bool:
    """Whether a value consists of plain Python values only."""
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)
