"""Segmentation by torchvision's LR-ASPP, pruned while it trains: `python segmentation.py [epochs]`. It draws its own images."""

import sys

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.segmentation import MeanIoU
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from lightning_cap import CAPPruningCallback
from lightning_cap.pruners import CAP

SIDE, CLASSES = 64, 3  # background, disc, square


def draw(count, seed):
    """Images ``(n, 3, 64, 64)`` of one disc and one square on noise, and the class of each pixel ``(n, 64, 64)``."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centres = torch.randint(14, SIDE - 14, (count, 2, 2, 1, 1), generator=generator)
    disc = (y - centres[:, 0, 0]) ** 2 + (x - centres[:, 0, 1]) ** 2 < 144
    square = ((y - centres[:, 1, 0]).abs() < 10) & ((x - centres[:, 1, 1]).abs() < 10)
    masks = torch.where(square, 2, torch.where(disc, 1, 0))
    images = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return images + nn.functional.one_hot(masks, CLASSES).movedim(-1, 1).float(), masks


class Segmentation(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
        for layer in self.net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1  # 0.01 in MobileNet, for runs of thousands of steps
        self.iou = MeanIoU(CLASSES, input_format="index")

    def training_step(self, batch, batch_idx):
        images, masks = batch
        return nn.functional.cross_entropy(self.net(images)["out"], masks)

    def validation_step(self, batch, batch_idx):
        self.iou.update(self.net(batch[0])["out"].argmax(1), batch[1])
        self.log("val_iou", self.iou, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


pl.seed_everything(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
train, val = (DataLoader(TensorDataset(*draw(n, seed)), 16, shuffle=n > 64) for n, seed in ((256, 1), (64, 2)))
pruner = CAP(block_size=64, num_gradients=128, samples_per_gradient=4)
cap = CAPPruningCallback({epochs // 2: 0.5, 3 * epochs // 4: 0.75}, pruner)
trainer = pl.Trainer(max_epochs=epochs, callbacks=[cap])
trainer.fit(Segmentation(), train, val)
print(f"mean IoU {trainer.callback_metrics['val_iou']:.3f} with {cap.masks.global_sparsity:.1%} of the weights at zero")
