"""A run that was stopped and resumed ends with the same weights, bit for bit, as the run that was never stopped."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAPUnits, Pruner, TaylorUnits
from lightning_cap.sparsity import Flops
from tests.support.stopping import CrashError, StatefulLoader, StopAfter, assert_same, averaging
from tests.support.toy import Toy, callback, cap, loaders, trainer, zeros


def run(
    folder: Path, *, ckpt: str | None = None, seed: int = 11, stop: int | None = None, data: Any = None, **kwargs: Any
) -> tuple[Toy, Any]:
    """One ``fit`` of six epochs with events at 1 and 4; ``stop`` ends it after so many epochs, as a crash would."""
    pl.seed_everything(seed, verbose=False)
    module = Toy(kwargs.pop("optimizer", "adamw"))
    cb = callback({1: 0.5, 4: 0.75}, dirpath=str(folder / "pruned"), **kwargs.pop("callback", {}))
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, **kwargs.pop("saver", {}))
    extra = kwargs.pop("callbacks", [])
    if stop is not None:
        extra = [*extra, StopAfter(stop)]
    t = trainer(folder, cb, saver, *extra, max_epochs=6, enable_checkpointing=True, **kwargs)
    with contextlib.suppress(CrashError):
        t.fit(module, **(data or loaders()), ckpt_path=ckpt)
    return module, cb


@pytest.mark.parametrize("epoch", range(5))
def test_resume_from_every_epoch_end(tmp_path: Path, epoch: int) -> None:
    whole, cb = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=epoch + 1)
    resumed, again = run(tmp_path / "cut", ckpt=str(tmp_path / "cut" / f"epoch={epoch}.ckpt"), seed=99)
    assert_same(whole, resumed)
    assert whole.batches[-4:] == resumed.batches[-4:]
    assert zeros(resumed).float().mean() == 0.75
    tables = [[replace(r, checkpoint=Path(r.checkpoint).name, weights="") for r in c.history] for c in (cb, again)]
    assert tables[0] == tables[1]  # the table is whole, too
    assert {p.name for p in (tmp_path / "whole/pruned").glob("*.ckpt")} == {
        p.name for p in (tmp_path / "cut/pruned").glob("*.ckpt")
    }


@pytest.mark.parametrize(
    "setting",
    [
        {"saver": {"save_on_train_epoch_end": True}},
        {"optimizer": "sgd"},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"data": "workers"},
        {"callback": {"num_recomputations": 2}},
        {"callback": {"save": "both", "monitor": "val_acc"}},
        {"callbacks": "ema"},
        {"callback": {"pruner": CAPUnits(num_gradients=32), "cost": Flops()}},
        {"callback": {"pruner": TaylorUnits(num_gradients=32), "num_recomputations": 2}, "callbacks": "ema"},
    ],
    ids=str,
)
def test_resume_under_other_settings(tmp_path: Path, setting: dict[str, Any]) -> None:
    def make() -> dict[str, Any]:
        out = dict(setting)
        if out.get("data") == "workers":
            out["data"] = loaders(workers=2)
        if out.get("callbacks") == "ema":
            out["callbacks"] = [averaging()]
        return out

    whole, cb = run(tmp_path / "whole", **make())
    run(tmp_path / "cut", stop=4, **make())
    resumed, again = run(tmp_path / "cut", ckpt=str(tmp_path / "cut/epoch=3.ckpt"), seed=99, **make())
    assert_same(whole, resumed)
    assert again.pruner.reached(again._active.targets, again.masks) >= 0.75
    assert all(torch.equal(mask, again.masks[name]) for name, mask in cb.masks.items())
    assert [record.best for record in cb.history] == [record.best for record in again.history]


def test_resume_from_a_sparsity_checkpoint(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    resumed, _ = run(tmp_path / "again", ckpt=str(tmp_path / "whole/pruned/sparsity=0.50.ckpt"), seed=99)
    assert_same(whole, resumed)


@pytest.mark.parametrize(("step", "pruner"), [(6, cap()), (7, cap()), (18, cap()), (18, TaylorUnits(num_gradients=16))])
def test_resume_in_the_middle_of_an_epoch_with_a_stateful_loader(tmp_path: Path, step: int, pruner: Pruner) -> None:
    def data() -> dict[str, Any]:
        return {**loaders(), "train_dataloaders": StatefulLoader()}

    saver = {"every_n_train_steps": 1, "filename": "{step}", "save_top_k": -1}

    def go(folder: Path, **kwargs: Any) -> Toy:
        pl.seed_everything(kwargs.pop("seed", 11), verbose=False)
        module = Toy()
        cb = callback({1: 0.5, 4: 0.75}, pruner=pruner, dirpath=str(folder / "pruned"))
        t = trainer(folder, cb, ModelCheckpoint(dirpath=folder, **saver), max_epochs=6, enable_checkpointing=True)
        t.fit(module, **data(), **kwargs)
        return module

    whole = go(tmp_path / "whole")
    resumed = go(tmp_path / "again", seed=99, ckpt_path=str(tmp_path / f"whole/step={step}.ckpt"))
    assert_same(whole, resumed)


def test_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    run(tmp_path)
    state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    entry = next(v for k, v in state["callbacks"].items() if "CAPPruningCallback" in k)
    bits = entry["masks"]["net.4.weight"]
    assert bits["bits"].dtype == torch.uint8
    assert bits["bits"].numel() == 16 * 16 // 8
    assert entry["done"] == [1, 4]
    assert entry["collection_index"] == 2
    assert len(entry["rng"]) == 1


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    pl.seed_everything(0, verbose=False)
    cb = callback({1: 0.5, 4: 0.75}, include=["net.0.weight"])
    with pytest.raises(ConfigError, match=r"masks do not fit the targets.*net\.0\.weight"):
        trainer(tmp_path, cb, max_epochs=6).fit(Toy(), **loaders(), ckpt_path=str(tmp_path / "epoch=2.ckpt"))


def test_averaged_weights_are_masked_and_restarted(tmp_path: Path) -> None:
    ema = averaging()
    seen: list[tuple[float, float, bool]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            average = ema._average_model.module  # type: ignore[attr-defined]
            pruned = zeros(pl_module)
            leak = float(average.net[4].weight[pruned].abs().sum()) if pruned.any() else 0.0
            equal = torch.equal(average.net[4].weight, pl_module.net[4].weight)
            seen.append((leak, float(pruned.float().mean()), equal))

    module, _ = run(tmp_path, callbacks=[ema, Watch()])
    assert max(leak for leak, _, _ in seen) == 0
    assert [s for _, s, _ in seen] == [0.0] * 4 + [0.5] * 12 + [0.75] * 8
    # the first update after an event starts the average anew, from the pruned model
    assert [equal for _, _, equal in seen] == [i in (0, 4, 16) for i in range(24)]
    assert zeros(module).float().mean() == 0.75  # Lightning copies the average into the model at the end
    saved = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert float((saved[key]["net.4.weight"] == 0).float().mean()) == 0.75
    assert not torch.equal(saved["state_dict"]["net.4.weight"], saved["current_model_state"]["net.4.weight"])
    from safetensors.torch import load_file

    plain = load_file(tmp_path / "pruned/sparsity=0.50.safetensors")
    average = torch.load(tmp_path / "pruned/sparsity=0.50.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(plain["4.weight"], average["net.4.weight"])
