from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.planning.files import lightning_files, optimizer_bytes
from tests.support.planned import configured


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_the_state_of_an_optimizer_is_foreseen(kind: Any, settings: dict[str, Any]) -> None:
    weights = [nn.Parameter(torch.ones(40, 50)), nn.Parameter(torch.ones(30))]
    optimizer = kind(weights, **settings)
    expected = optimizer_bytes([optimizer])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = [
        v for own in optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor) and v.numel() > 1
    ]
    assert expected == sum(v.numel() * v.element_size() for v in state)


def test_an_optimizer_that_cannot_be_made_again_counts_as_adam() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, params: Any, secret: int) -> None:
            super().__init__(params, lr=0.1)

    assert optimizer_bytes([Own([nn.Parameter(torch.ones(10))], 1)]) == 2 * 4 * 10


def test_checkpoints_of_lightning_count() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    trainer = configured(ModelCheckpoint(monitor="val/loss", save_top_k=2, save_last=True), enable_checkpointing=True)
    assert [(f.count, f.bytes) for f in lightning_files(trainer, 100, 10)] == [(3, 100)]
    trainer = configured(ModelCheckpoint(save_top_k=-1, save_weights_only=True), enable_checkpointing=True)
    assert [(f.count, f.bytes) for f in lightning_files(trainer, 100, 10)] == [(6, 10)]
    assert lightning_files(configured(enable_checkpointing=False), 100, 10) == []
