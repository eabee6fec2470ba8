"""Comparisons of the toy's pruners, and what they did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_cap.comparison import compare, measure, runner
from lightning_cap.comparison.records import ComparisonRecord
from lightning_cap.pruners import Magnitude
from lightning_cap.utilities.records import read_records
from tests.support.toy import Toy, ToyData, cap, trainer


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(ToyData(), batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(ToyData(32, noise=0.0), batch_size=16)


def toy() -> Toy:
    pl.seed_everything(0, verbose=False)
    return Toy(scheduler=False)


def run(folder: Path | None, pruners: Any = None, sparsities: Sequence[float] = (0.5, 0.75), **kwargs: Any) -> Any:
    pruners = pruners or {"CAP": cap(), "few": cap(num_gradients=20), "GM": Magnitude()}
    t = trainer(folder or ".")
    records = compare(t, kwargs.pop("module", None) or toy(), pruners, sparsities, datamodule=Data(), folder=folder,
                   **{"loss_samples": 32, **kwargs})  # fmt: skip
    assert not any("Compare" in type(callback).__name__ for callback in t.callbacks)  # type: ignore[attr-defined]
    return records


def collections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of gradients at every collection."""
    from lightning_cap.calibration.gradients import GradientCollector

    counts: list[int] = []
    read = GradientCollector.__iter__
    monkeypatch.setattr(GradientCollector, "__iter__", lambda self: counts.append(self._num_gradients) or read(self))
    return counts


def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the label at every solution."""
    labels: list[str] = []
    for name in ("_from_one_path", "_in_steps"):
        real = getattr(runner.ComparisonRunner, name)
        monkeypatch.setattr(
            runner.ComparisonRunner,
            name,
            lambda self, v, *a, real=real: labels.append(f"{v.label}/{v.seed}") or real(self, v, *a),
        )
    return labels


def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the module's class at every pass over the validation data."""
    passes: list[str] = []
    real = measure.evaluate
    monkeypatch.setattr(
        measure, "evaluate", lambda trainer, module: passes.append(type(module).__name__) or real(trainer, module)
    )
    return passes


def results(folder: Path) -> list[ComparisonRecord]:
    """The records that a comparison has written."""
    return read_records(folder / "results.jsonl", ComparisonRecord)


def comparable(records: Any) -> Any:
    return [replace(record, seconds={}) for record in records]


def assert_close(records: Any, others: Any) -> None:
    for one, other in zip(records, others, strict=True):
        assert (one.label, one.seed, one.sparsity) == (other.label, other.seed, other.sparsity)
        assert (one.predicted_loss is None) == (other.predicted_loss is None)
        assert one.predicted_loss is None or one.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-4)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4)
