from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_cap.trainer.evaluation import evaluate
from tests.support.toy import Toy, ToyData, loaders, trainer


def test_evaluate_is_what_validation_logs(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                seen["mine"] = evaluate(trainer, pl_module)
                seen["logged"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
                seen["count"] = pl_module.val_acc.update_count

    class Several(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    data = {
        **loaders(),
        "val_dataloaders": DataLoader(ToyData(37, noise=0.0), batch_size=16),
    }  # a last batch of another size
    trainer(tmp_path, Look(), max_epochs=2).fit(Several(scheduler=False), **data)
    assert seen["mine"] == pytest.approx(seen["logged"])
    assert set(seen["mine"]) == {"val_acc", "val_loss"}
    assert seen["count"] == 0  # metrics were updated in copies


def test_evaluate_respects_limits(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counts(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            calls.append(batch_idx)

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            calls.clear()
            evaluate(trainer, pl_module)
            assert calls == list(range(trainer.limit_val_batches))

    for limit in (0, 1):
        trainer(tmp_path, Look(), max_epochs=1, limit_val_batches=limit).fit(Counts(scheduler=False), **loaders())


def test_evaluate_may_stop_after_some_batches(tmp_path: Path) -> None:
    class Twice(Toy):
        seen: tuple[int, ...] = ()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            Twice.seen += (batch_idx,)

    module, t = Twice(), trainer(tmp_path)
    found: list[dict[str, float]] = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            found.extend(evaluate(trainer, pl_module, batches) for batches in (None, 1, 9))

    t.callbacks.append(Look())  # type: ignore[attr-defined]
    t.validate(module, loaders()["val_dataloaders"], verbose=False)
    assert Twice.seen == (0, 1, 0, 0, 1, 0, 1)  # and the Trainer's own pass
    assert found[0] == found[2] != found[1]
