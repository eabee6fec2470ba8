"""A LightningModule that knows nothing of lightning-cap, pruned by adding one callback: `python existing_trainer.py [epochs]`."""

import sys

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_cap import CAPPruningCallback
from lightning_cap.pruners import CAP
from lightning_cap.schedules import SparsitySteps


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


pl.seed_everything(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
images, labels = load_digits(return_X_y=True)
train, val = random_split(TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels)), [0.8, 0.2])
schedule = SparsitySteps({epochs // 3: 0.50, epochs // 2: 0.75, 2 * epochs // 3: 0.90})
cap = CAPPruningCallback(schedule, CAP(block_size=64, num_gradients=1024, damp=1e-6))
trainer = pl.Trainer(max_epochs=epochs, callbacks=[cap])
trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(val, 360))
print(f"{trainer.callback_metrics['val_acc']:.1%} right with {cap.masks.global_sparsity:.1%} of the weights at zero")
