"""Small pruned models that take and give more than one tensor, and what they are given."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

WORDS, LENGTH = 20, 6


def _pruned(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(torch.rand_like(parameter) < 0.5)
    return model.eval()


class _Words(nn.Module):
    """Of words by number and a mask: logits, and what the head is given, in a dict, with None between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        there = attention_mask.unsqueeze(-1).float()
        pooled = (self.first(self.embedding(input_ids)).relu() * there).sum(1) / there.sum(1)
        return OrderedDict(logits=scale * self.head(pooled), loss=None, linear=pooled, first=self.first(pooled))


class _Pair(nn.Module):
    """Of two tensors, of which one is split: a tensor, and a tuple in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        both = self.left(left) + self.right(right)
        return both, (both.relu(), both.argmax(1))


class _Named(nn.Module):
    """One tensor to a dict of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(x)}


def words(number: int = 4) -> dict[str, Any]:
    """Sentences of different lengths."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(2, LENGTH + 1, (number, 1), generator=generator)
    return {
        "attention_mask": (torch.arange(LENGTH) < lengths).long(),  # in another order than the arguments
        "input_ids": torch.randint(WORDS, (number, LENGTH), generator=generator),
        "scale": 2.0,
    }


def pair(number: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(number, 4, generator=generator), torch.randn(number, 3, generator=generator)


def pictures(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def made(name: str) -> nn.Module:
    """Always the same: ``"words"``, ``"pair"`` or ``"named"``."""
    torch.manual_seed(0)
    return _pruned({"words": _Words, "pair": _Pair, "named": _Named}[name]())


#: What a model is given, so many at once.
INPUTS = {"words": words, "pair": pair, "named": pictures}


class Sentences(pl.LightningModule):
    """A module of a user's own around the first model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = made("words")


class SentencesData(pl.LightningDataModule):
    """Batches as those of transformers: mappings with labels, padded to the longest sentence of each.

    Args:
        left_out: What a batch has not.
        last: Length of the last batch.
    """

    def __init__(self, left_out: str = "", last: int = LENGTH) -> None:
        super().__init__()
        self.left_out, self.last = left_out, last

    def val_dataloader(self) -> DataLoader[Any]:
        """Three batches of 8."""
        batches = []
        for length in (LENGTH, LENGTH, self.last):
            batch = {**words(8), "labels": torch.zeros(8), "text": ["a"] * 8}
            batch |= {key: batch[key][:, :length] for key in ("attention_mask", "input_ids")}
            batches.append(UserDict({key: value for key, value in batch.items() if key != self.left_out}))
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
