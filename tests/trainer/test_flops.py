from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity import ModelFlops, Targets
from lightning_cap.trainer.flops import module_flops
from tests.support.toy import CLASSES, FEATURES, Toy, loaders, trainer


class Counting(Toy):
    """Counts at the start of training, or with ``wrong`` fails in validation."""

    wrong = False
    found: ModelFlops | None = None

    def on_train_start(self) -> None:
        before = {name: value.clone() for name, value in self.state_dict().items()}
        self.found = module_flops(self.trainer, self)
        assert all(torch.equal(value, before[name]) for name, value in self.state_dict().items())
        assert self.net.training

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.wrong:
            batch = (batch[0][:, :3], batch[1])
        super().validation_step(batch, batch_idx)


def test_flops_are_those_of_one_example(tmp_path: Path) -> None:
    module = Counting()
    trainer(tmp_path, max_epochs=1).fit(module, **loaders())
    assert module.found is not None
    wanted = {"net.0.weight": 2 * FEATURES * 16, "net.4.weight": 2 * 16 * 16, "net.6.weight": 2 * 16 * CLASSES}
    assert {name: count for name, count in module.found.layers.items() if count} == wanted
    assert module.found.total == sum(wanted.values())
    assert set(Targets.from_model(module)) <= set(module.found.layers)


def test_none_without_validation(tmp_path: Path) -> None:
    module = Counting()
    module.found = ModelFlops({}, 1)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, **loaders())
    assert module.found is None


def test_a_step_that_fails_is_told_with_its_layer(tmp_path: Path) -> None:
    module = Counting()
    module.wrong = True
    with pytest.raises(ConfigError, match=r"model=Counting: it does not run on the example input; 'net.0' failed"):
        trainer(tmp_path, max_epochs=1).fit(module, **loaders())
    assert isinstance(module.net, nn.Sequential)
