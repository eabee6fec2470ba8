"""FLOPs of what trains, counted inside a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_cap.sparsity.flops import ModelFlops
from lightning_cap.trainer.model_flops import count_flops
from tests.support.toy import FEATURES, Toy, loaders, trainer

pytestmark = pytest.mark.usefixtures("seeded")

TOY = {"net.0.weight": 2 * 12 * 16, "net.4.weight": 2 * 16 * 16, "net.6.weight": 2 * 16 * 4}


class Parts(Toy):
    """Its loss calls the layers one by one, never the network as a whole."""

    def forward(self, x: Any) -> Any:
        for layer in self.net:
            x = layer(x)
        return x


class Student(Toy):
    """Beside a teacher, whose weights do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(FEATURES, 64).requires_grad_(False)

    def forward(self, x: Any) -> Any:
        return self.net(x) + 0 * self.teacher(x).sum()


class Failing(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise RuntimeError("not before the data is warm")


class Manual(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Count(pl.Callback):
    def __init__(self) -> None:
        self.found: ModelFlops | None = None
        self.same = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        before = torch.random.get_rng_state(), {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.found = count_flops(trainer, pl_module, 0)
        after = pl_module.state_dict()
        self.same = torch.equal(before[0], torch.random.get_rng_state()) and pl_module.training
        self.same &= all(torch.equal(value, after[name]) for name, value in before[1].items())
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("module", "expected"), [(Toy, TOY), (Parts, TOY), (Student, TOY), (Failing, None), (Manual, None)]
)
def test_the_model_that_trains_is_counted_or_nothing(tmp_path: Path, module: type[Toy], expected: Any) -> None:
    count = Count()
    trainer(tmp_path, count, max_epochs=1).fit(module(), **loaders())
    assert count.same
    if expected is None:
        assert count.found is None
    else:
        assert count.found is not None
        assert {name: flops for name, flops in count.found.layers.items() if flops} == expected
        assert count.found.total == sum(expected.values())
