"""A model whose training has diverged is told from a bad checkpoint, and from a bad loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_cap.errors import GradientError
from lightning_cap.pruners import Magnitude, Pruner
from tests.support.toy import Toy, callback, cap, loaders, loss, trainer


class Diverge(pl.Callback):
    """Weights, or another parameter that the loss needs, become NaN at the end of epoch 1."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                pl_module.get_parameter(self.name).flatten()[0] = math.nan


@pytest.mark.parametrize(
    ("name", "pruner", "words"),
    [
        ("net.4.weight", cap(), r"model: the weight 'net\.4\.weight' is not finite"),
        ("net.4.weight", Magnitude(), r"model: the weight 'net\.4\.weight' is not finite"),
        ("net.6.bias", cap(), r"loss: it is nan on a whole calibration batch"),
    ],
)
def test_training_that_diverged_before_an_event(tmp_path: Path, name: str, pruner: Pruner, words: str) -> None:
    message = rf"{words}.* after 8 training steps, so training has diverged\. Go back to an earlier checkpoint"
    cb = callback({2: 0.5}, pruner=pruner, evaluate=False)
    with pytest.raises(GradientError, match=message):
        trainer(tmp_path, Diverge(name), cb).fit(Toy(), **loaders())


@pytest.mark.filterwarnings("ignore:Other settings than the checkpoint's")
def test_a_checkpoint_of_a_diverged_run_says_so_at_the_start(tmp_path: Path) -> None:
    cb = callback({0: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, Diverge("net.6.bias"), cb, max_epochs=2).fit(Toy(), **loaders())
    module = Toy()
    with pytest.raises(GradientError, match="after 8 training steps, so training has diverged"):
        trainer(tmp_path, callback({0: 0.5, 3: 0.75}, dirpath=str(tmp_path))).fit(
            module, **loaders(), ckpt_path=str(tmp_path / "sparsity=0.50.ckpt")
        )
    assert module.batches == []


def test_a_broken_model_at_the_start(tmp_path: Path) -> None:
    module = Toy()
    with torch.no_grad():
        module.net[4].weight[0, 0] = math.inf
    with pytest.raises(
        GradientError, match=r"'net\.4\.weight' is not finite .* before training\. Load a sound checkpoint\."
    ):
        trainer(tmp_path, callback(), max_epochs=3).fit(module, **loaders())
    assert module.batches == []


class Calibrated(Toy):
    """Its loss is NaN on all samples, or on the others only."""

    some = False

    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        value = loss(self, batch)
        broken = torch.ones(len(batch[1])).bool() if not self.some else batch[1] == 0
        return value * math.nan if bool(broken.any()) else value


def test_a_calibration_step_that_gives_nan_fails_at_the_start(tmp_path: Path) -> None:
    module = Calibrated()
    with pytest.raises(
        GradientError, match=r"loss: it is nan on a whole calibration batch before training\. Check calibration_step"
    ):
        trainer(tmp_path, callback()).fit(module, **loaders())
    assert module.batches == []


def test_single_samples_without_a_finite_loss_are_skipped(tmp_path: Path) -> None:
    module, cb = Calibrated(), callback({0: 0.5}, pruner=cap(num_gradients=32))
    module.some = True
    with pytest.warns(UserWarning, match="of 32 gradient samples are not finite and were skipped"):
        trainer(tmp_path, cb, max_epochs=1).fit(module, **loaders())
    assert cb.masks.global_sparsity == 0.5
