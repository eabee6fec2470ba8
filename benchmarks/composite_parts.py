"""The models that `composite.py` measures: pruned, with int8, with fewer tokens, and all of that together."""

from __future__ import annotations

import copy
import shutil
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from cifar10_data import decode, open_data
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models.vision_transformer import VisionTransformer
from tokens import Images
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap import CAPPruningCallback, CyclicLinearLR, DistillationLoss, QATCallback, VisionClassifier, prune
from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.classifier import load_weights
from lightning_cap.cli import CAPCLI, CAPTrainer
from lightning_cap.data import DigitsDataModule, ImageNetDataModule
from lightning_cap.pruners import CAP
from lightning_cap.quantization.layers import choose_layers, prepare
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.tokens import DynamicViT, KeptTokenDistillation, ZeroTPrune

ROOT = Path(__file__).resolve().parent.parent


def without_int8(row: str) -> str:
    """The row that it is compared with."""
    return " + ".join(what for what in row.removesuffix(", static").split(" + ") if what != "int8") or "dense"


class Part(ABC):
    """A model and its images; rows are named after what is done to it, joined by " + ".

    Args:
        data: Folder with ``cifar10/``, ``imagenet1k-sample/`` and ``weights/``.
        work: Folder for what rows leave to each other.
        limit: Of images to judge by.
    """

    title: ClassVar[str]
    rows: ClassVar[tuple[str, ...]]
    batch_sizes: ClassVar[tuple[int, ...]] = (1, 32)
    reads_data: ClassVar[bool] = True

    def __init__(self, data: Path | None, work: Path, limit: int | None) -> None:
        self.data, self.work, self.limit = data or Path(), work, limit
        self.images, self.labels = self.judged_by()

    @abstractmethod
    def judged_by(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""

    @abstractmethod
    def make(self, row: str, seed: int) -> nn.Module:
        """The model of a row, in eval mode; fake quantized for int8."""


class DigitsConfigs(Part):
    """The runs of ``configs/digits_gradual.yaml`` and of ``configs/digits_quantized.yaml``, to 90 %."""

    title = "Digits, as configured"
    rows = ("90 %", "90 % + int8")
    reads_data = False
    config: ClassVar[str] = "configs/digits_{}.yaml"

    def judged_by(self) -> tuple[Tensor, Tensor]:
        """The 360 that are held out."""
        return decode(DigitsDataModule().validation_set(), self.limit)

    def make(self, row: str, seed: int) -> nn.Module:
        """That with int8 goes on from the other one before its last event: until int8 begins both are the same, bit for bit."""
        before = self.work / f"gradual, seed {seed}/digits_gradual/version_0/checkpoints/sparsity=0.75.ckpt"
        kind = "quantized" if "int8" in row else "gradual"
        folder = self.work / f"{kind}, seed {seed}"
        shutil.rmtree(folder, ignore_errors=True)
        given = ["--config", str(ROOT / self.config.format(kind)), "--seed_everything", str(seed),
                 f"--trainer.logger.save_dir={folder}", f"--trainer.default_root_dir={folder}",
                 "--trainer.enable_progress_bar=false"]  # fmt: skip
        cli = CAPCLI(trainer_class=CAPTrainer, run=False, args=given, save_config_callback=None)
        resumed = str(before) if kind == "quantized" and before.is_file() else None
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resumed)
        made: nn.Module = cli.model.model.eval()
        return made


class Trained(Part):
    """A dense model that is the teacher of all rows; each of them is trained on from it for as many epochs."""

    rows = (
        "dense", "75 %", "75 % + int8", "tokens", "75 % + tokens", "75 % + tokens + int8", "int8", "tokens + int8",
    )  # fmt: skip
    epochs: ClassVar[int]
    lr: ClassVar[float]
    events: ClassVar[dict[int, float]]
    int8_from: ClassVar[int]
    stages: ClassVar[list[int]]  # blocks that get fewer tokens
    pruner: ClassVar[dict[str, Any]]
    batches: ClassVar[int | None] = None  # of an epoch

    @abstractmethod
    def dense(self, seed: int) -> nn.Module:
        """The teacher."""

    @abstractmethod
    def loaders(self) -> pl.LightningDataModule:
        """What is trained on."""

    def make(self, row: str, seed: int) -> nn.Module:
        """Train it; with int8 from where that begins, if the row without it has left its checkpoint."""
        teacher = self.dense(seed)
        model, loss = copy.deepcopy(teacher), DistillationLoss(teacher, alpha=0.5, temperature=2.0)
        if "tokens" in row:
            model, loss = DynamicViT(model, self.stages, keep_ratio=0.8), KeptTokenDistillation(teacher)
        folder = self.work / f"{without_int8(row)}, seed {seed}"
        callbacks: list[pl.Callback] = []
        if "%" in row:
            callbacks.append(
                CAPPruningCallback(dict(self.events), CAP(**self.pruner), save="none", evaluate=False, seed=seed)
            )
        before = folder / f"epoch={self.int8_from - 1}.ckpt"
        if "int8" in row:
            callbacks.append(QATCallback(self.int8_from))
        elif "%" in row:  # this callback has the random state in the checkpoint, too
            shutil.rmtree(folder, ignore_errors=True)
            callbacks.append(ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=self.int8_from))
        resumed = before if "int8" in row and before.is_file() else None
        return self.fit(model, seed, self.epochs, loss, callbacks, resumed)

    def fit(
        self, model: nn.Module, seed: int, epochs: int, loss: DistillationLoss | None = None,
        callbacks: list[pl.Callback] | None = None, resumed: Path | None = None,
    ) -> nn.Module:  # fmt: skip
        """Train under a learning rate that falls from each event to the next."""
        pl.seed_everything(seed, verbose=False)
        module = VisionClassifier(
            model,
            weight_decay=0.05,
            gradient_clip=1.0,
            optimizer=partial(torch.optim.AdamW, lr=self.lr),
            lr_scheduler=partial(CyclicLinearLR, min_lr=self.lr / 100),
            distillation=loss,
        )
        given = callbacks or []
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            limit_train_batches=self.batches or 1.0,
            limit_val_batches=0,
            callbacks=given,
            logger=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in given),
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=self.work,
        )
        module.train()  # Lightning leaves a copy of a teacher in eval mode
        trainer.fit(module, datamodule=self.loaders(), ckpt_path=resumed)
        return module.model.eval()


class Digits(Trained):
    """A small ViT on the digits."""

    title = "Digits, with a teacher"
    reads_data = False
    epochs, lr, events, int8_from, stages = 70, 3e-3, {0: 0.5, 20: 0.75}, 50, [1, 2, 3]
    pruner: ClassVar = {"block_size": 64, "num_gradients": 1024}
    before: ClassVar[int] = 60  # epochs that the teacher is trained

    def judged_by(self) -> tuple[Tensor, Tensor]:
        """The 360 that are held out."""
        return decode(DigitsDataModule().validation_set(), self.limit)

    def loaders(self) -> pl.LightningDataModule:
        """The others, with noise."""
        return DigitsDataModule(batch_size=128)

    def dense(self, seed: int) -> nn.Module:
        """Trained once for each seed."""
        torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
        )
        held = self.work / f"teacher, seed {seed}.pt"
        if not held.is_file():
            self.fit(model, seed, self.before)
            held.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), held)
        model.load_state_dict(torch.load(held, weights_only=True))
        return model.eval()


class Cifar(Trained):
    """A small ViT on the CIFAR-10 tars, from the weights there."""

    title = "CIFAR-10 tars, a small ViT with a teacher"
    epochs, lr, events, int8_from, stages = 4, 3e-4, {0: 0.75}, 2, [2, 3, 4]
    pruner: ClassVar = {"block_size": 128, "num_gradients": 256}
    batches = 40  # of 64 images: half of them in 4 epochs

    def judged_by(self) -> tuple[Tensor, Tensor]:
        """The 10,000 test images, decoded once."""
        self._data = open_data(self.data / "cifar10", 64)
        self._data.setup("fit")
        return decode(self._data.validation_set(), self.limit)

    def loaders(self) -> pl.LightningDataModule:
        """The training images, cropped and flipped."""
        return self._data

    def dense(self, seed: int) -> nn.Module:
        """As it was trained."""
        model = VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=10)
        load_weights(model, self.data / "weights/vit_cifar10.safetensors")
        return model.eval()


class ViTTiny(Part):
    """The real ImageNet ViT-Tiny, with nothing trained: pruned in one shot, tokens left out by its attention, rounded to int8."""

    title = "ImageNet ViT-Tiny, nothing trained"
    rows = tuple(
        " + ".join(filter(None, (sparse, tokens, int8))) or "dense"
        for sparse in ("", "50 %", "2:4") for tokens in ("", "tokens") for int8 in ("", "int8")
    )  # fmt: skip
    batch_sizes = (1, 8)
    name: ClassVar[str] = "vit_tiny_patch16_224"
    block_size, num_gradients = 96, 512
    tokens: ClassVar[dict[str, Any]] = {"blocks": [4, 6, 8, 10], "keep_ratio": 0.78}

    def judged_by(self) -> tuple[Tensor, Tensor]:
        """The 1,000 validation images."""
        found = Images(self.data, held_out=False, limit=self.limit)
        return found.images, found.labels

    def make(self, row: str, seed: int) -> nn.Module:
        """Prune it, or take what was pruned for another row; then the rest, which is at once."""
        model: nn.Module = timm.create_model(self.name, pretrained=False).eval()
        load_weights(model, self.data / "weights" / f"{self.name}.safetensors")
        sparse = next((name for name in ("50 %", "2:4") if name in row), None)
        if sparse is not None:
            held = self.work / f"{sparse}, seed {seed}.pt"
            if not held.is_file():
                self.prune(model, sparse, seed)
                held.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), held)
            model.load_state_dict(torch.load(held, weights_only=True))
        if "tokens" in row:
            model = ZeroTPrune(model, **self.tokens).eval()
        if "int8" in row:
            prepare(model, choose_layers(model, None, None)[0])
        return model

    def prune(self, model: nn.Module, sparse: str, seed: int) -> None:
        """In one shot."""
        data = ImageNetDataModule(
            str(self.data / "imagenet1k-sample"), recipe="light1", batch_size=32, num_workers=0, mixup=0.0, cutmix=0.0,
            erasing_prob=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), test_crop_ratio=0.9,
        )  # fmt: skip
        data.setup("fit")
        training = DataLoader(data.calibration_dataloader().dataset, 32)
        batches = list(CalibrationBatches(training, self.num_gradients, 1, seed=seed, event=0))
        kind: dict[str, Any] = {"pattern": NofM(2, 4)} if sparse == "2:4" else {}
        pruner = CAP(block_size=self.block_size, num_gradients=self.num_gradients, **kind)
        prune(model, batches, _loss, 0.5, pruner, progress=False)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


PARTS: dict[str, type[Part]] = {
    "digits_configs": DigitsConfigs,
    "digits": Digits,
    "cifar10": Cifar,
    "vit_tiny": ViTTiny,
}
