"""A regression on a table, pruned while it trains: `python tabular.py [epochs]`."""

import sys

import lightning.pytorch as pl
import torch
from sklearn.datasets import make_friedman1
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_cap import CAPPruningCallback
from lightning_cap.pruners import CAP


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1)
        )

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]).squeeze(1), batch[1])

    def validation_step(self, batch, batch_idx):
        error = nn.functional.mse_loss(self.net(batch[0]).squeeze(1), batch[1])
        self.log("val_r2", 1 - error / batch[1].var(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


pl.seed_everything(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
columns, values = (torch.tensor(x).float() for x in make_friedman1(4000, noise=0.5, random_state=0))
train, val = random_split(TensorDataset(columns, (values - values.mean()) / values.std()), [0.8, 0.2])
cap = CAPPruningCallback({epochs // 3: 0.75, 2 * epochs // 3: 0.95}, CAP(block_size=128, num_gradients=1024))
trainer = pl.Trainer(max_epochs=epochs, callbacks=[cap])
trainer.fit(Regression(), DataLoader(train, 64, shuffle=True), DataLoader(val, 800))
print(f"R² {trainer.callback_metrics['val_r2']:.3f} with {cap.masks.global_sparsity:.1%} of the weights at zero")
