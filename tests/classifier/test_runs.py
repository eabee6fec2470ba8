"""`VisionClassifier` under a Trainer and from YAML."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from timm.models.vision_transformer import VisionTransformer

from lightning_cap import CAPPruningCallback
from lightning_cap.classifier import VisionClassifier
from lightning_cap.errors import ConfigError
from lightning_cap.pruners import Magnitude
from lightning_cap.schedules import OneShot
from lightning_cap.schedules.learning_rate import CosineLR, CyclicLinearLR
from tests.support.classifying import NAME, SMALL, loader, same_weights, trainer, vit

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter", "ignore:You defined a `validation_step`"
)


def test_fit_logs_and_gives_the_scheduler_the_whole_run(tmp_path: Path) -> None:
    class Watch(Callback):
        rates: tuple[float, ...] = ()

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            self.rates += (trainer.optimizers[0].param_groups[0]["lr"],)

    module, watch = VisionClassifier(vit()), Watch()
    run = trainer(tmp_path, max_epochs=2, callbacks=[watch])
    run.fit(module, loader(), loader())
    assert {"train/loss", "val/loss", "val/acc", "val/acc5"} <= run.callback_metrics.keys()
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, CyclicLinearLR)
    assert scheduler.period == 4
    assert scheduler.last_epoch == 4
    assert watch.rates == pytest.approx([1e-5 + 49e-5 * left for left in (1, 0.75, 0.5, 0.25)])


def test_a_cosine_is_given_the_whole_run_and_pruning_does_not_restart_it(tmp_path: Path) -> None:
    class Watch(Callback):
        rates: tuple[float, ...] = ()

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            self.rates += (trainer.optimizers[0].param_groups[0]["lr"],)

    module = VisionClassifier(vit(), lr_scheduler=lambda optimizer: CosineLR(optimizer, min_lr=1e-5, warmup=0.25))
    pruning = CAPPruningCallback(OneShot(0.5, epoch=1), Magnitude(), dirpath=str(tmp_path), evaluate=False)
    watch = Watch()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no restart")
        trainer(tmp_path, max_epochs=2, callbacks=[watch, pruning]).fit(module, loader(), loader())
    assert watch.rates == pytest.approx([1e-5, 5e-4, 1e-5 + 49e-5 * 0.75, 1e-5 + 49e-5 * 0.25])


def test_unlimited_run_with_a_cosine_is_refused(tmp_path: Path) -> None:
    module = VisionClassifier(vit(), lr_scheduler=lambda optimizer: CosineLR(optimizer))
    with pytest.raises(ConfigError, match=r"steps=None of CosineLR .*unknown .*give steps="):
        trainer(tmp_path, max_epochs=-1).fit(module, loader())


def test_test_metrics_are_those_of_all_samples(tmp_path: Path) -> None:
    module, data = VisionClassifier(vit(), label_smoothing=0.3), loader(7, batch_size=4)
    [logged] = trainer(tmp_path).test(module, data, verbose=False)
    images, targets = data.dataset[:]
    with torch.no_grad():
        logits = module.eval()(images)
    assert logged["test/acc"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    top5 = (logits.topk(5).indices == targets[:, None]).any(-1).float().mean().item()
    assert logged["test/acc5"] == pytest.approx(top5)
    assert logged["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("of_trainer", "of_module", "norm"), [(None, 1e-3, 1e-3), (1e-2, 1e-3, 1e-2), (None, 0.0, None)]
)
def test_gradient_clipping(tmp_path: Path, of_trainer: float | None, of_module: float, norm: float | None) -> None:
    class Norm(Callback):
        seen = 0.0

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.seen = float(
                torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).norm()
            )

    watch = Norm()
    module = VisionClassifier(vit(), gradient_clip=of_module)
    trainer(tmp_path, max_steps=1, gradient_clip_val=of_trainer, callbacks=[watch]).fit(module, loader())
    if norm is None:
        assert watch.seen > 1e-2
    else:
        assert watch.seen == pytest.approx(norm, rel=1e-2)


def test_unlimited_run_without_period_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"period=None .*unknown .*give period="):
        trainer(tmp_path, max_epochs=-1).fit(VisionClassifier(vit()), loader())


def test_checkpoint_loads_with_weights_only_and_resumes(tmp_path: Path) -> None:
    module = VisionClassifier(NAME, 10, model_kwargs=SMALL, recipe="light1")
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer(tmp_path, enable_checkpointing=True, callbacks=[saver]).fit(module, loader())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(name.startswith("model.") for name in content["state_dict"])
    assert content["hyper_parameters"]["model"] == NAME
    again = VisionClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert same_weights(again.model, module.model)
    assert (again.num_classes, again.label_smoothing) == (10, 0.1)
    fresh = VisionClassifier(NAME, 10, model_kwargs=SMALL, checkpoint=str(tmp_path / "last.ckpt"))
    assert same_weights(fresh.model, module.model)
    resumed = trainer(tmp_path, max_epochs=2)
    safely = {"weights_only": True} if "weights_only" in inspect.signature(resumed.fit).parameters else {}  # not in 2.5
    resumed.fit(again, loader(), ckpt_path=str(tmp_path / "last.ckpt"), **safely)
    scheduler = resumed.lr_scheduler_configs[0].scheduler
    assert (resumed.global_step, scheduler.period, scheduler.last_epoch) == (4, 2, 4)  # the period of the first run


CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model:
  model:
    class_path: timm.models.vision_transformer.VisionTransformer
    init_args: {img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2, num_classes: 10,
                global_pool: avg}
  weight_decay: 0.001
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
  lr_scheduler: {class_path: lightning_cap.schedules.learning_rate.CyclicLinearLR, init_args: {min_lr: 0.05, period: 4}}
"""


def cli(args: Any) -> LightningCLI:
    return LightningCLI(
        VisionClassifier,
        args=args,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=1,
    )


def test_classes_come_from_yaml(tmp_path: Path) -> None:
    made = cli({**yaml.safe_load(CONFIG)})
    assert isinstance(made.model.model, VisionTransformer)
    made.trainer.fit(made.model, loader())
    [optimizer] = made.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9, 0.9]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.001]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.075, 0.075])  # two of four steps
    made.trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = VisionClassifier.load_from_checkpoint(tmp_path / "a.ckpt", model=vit(), weights_only=True)
    assert same_weights(again.model, made.model.model)


def test_defaults_can_be_changed_one_by_one() -> None:
    made = cli(
        [
            "--model.model=resnet18",
            "--model.num_classes=3",
            "--model.optimizer.lr=0.01",
            "--model.lr_scheduler.period=9",
        ]
    )
    configured: Any = made.model.configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.AdamW)
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert (scheduler.period, scheduler.min_lr, scheduler.get_last_lr()) == (9, 1e-5, [0.01, 0.01])


def test_schedulers_of_torch() -> None:
    plateau = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "val/acc"}}
    configured: Any = cli({"model": {"model": "resnet18", "lr_scheduler": plateau}}).model.configure_optimizers()
    assert configured["lr_scheduler"]["monitor"] == "val/acc"
    assert "interval" not in configured["lr_scheduler"]
