"""A text classifier by transformers' BERT, pruned while it trains: `python text.py [epochs]`. It makes its own sentences.

It needs `pip install "lightning-cap[text,onnx]"`, downloads nothing, and leaves `text.onnx`.
"""

import sys

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_cap import CAPPruningCallback
from lightning_cap.export import ONNX
from lightning_cap.pruners import CAP

WORDS, LENGTH = 50, 16


class Sentences(Dataset):
    """Words by number, of different lengths; the class says whether word 1 comes before word 2."""

    def __init__(self, count, seed) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
        self.lengths = torch.randint(6, LENGTH + 1, (count,), generator=generator)
        places = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(count)])
        self.words.scatter_(1, places, torch.tensor([[1, 2]]).expand(count, 2))
        self.labels = (places[:, 0] < places[:, 1]).long()

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        there = torch.arange(LENGTH) < self.lengths[index]
        return {"input_ids": self.words[index] * there, "attention_mask": there.long(), "labels": self.labels[index]}


class TextClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        settings = BertConfig(vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                              intermediate_size=128, max_position_embeddings=LENGTH)  # fmt: skip
        self.bert = BertForSequenceClassification(settings)

    def training_step(self, batch, batch_idx):
        return self.bert(**batch).loss

    def validation_step(self, batch, batch_idx):
        right = self.bert(**batch).logits.argmax(1) == batch["labels"]
        self.log("val_acc", right.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


pl.seed_everything(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
pruner = CAP(block_size=128, num_gradients=512)
cap = CAPPruningCallback({epochs // 2: 0.5, 3 * epochs // 4: 0.75}, pruner)
trainer = pl.Trainer(max_epochs=epochs, callbacks=[cap])
model, val = TextClassifier(), DataLoader(Sentences(512, 2), 128)
trainer.fit(model, DataLoader(Sentences(2048, 1), 32, shuffle=True), val)
print(f"{trainer.callback_metrics['val_acc']:.1%} right with {cap.masks.global_sparsity:.1%} of the weights at zero")
batch = next(iter(val))
ONNX().export(model.bert, "text.onnx", {name: batch[name] for name in ("input_ids", "attention_mask")})
