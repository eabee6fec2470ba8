from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_cap.calibration import GradientCollector
from lightning_cap.errors import ConfigError
from tests.support.toy import Toy, callback, cap, loaders, trainer


def test_the_first_batch_is_tried_once_and_every_event_is_planned_with_what_it_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    probe = GradientCollector.probe

    def counted(self: GradientCollector, batch: Any) -> None:
        tried.append(len(batch[0]))
        probe(self, batch)

    monkeypatch.setattr(GradientCollector, "probe", counted)
    pl.seed_everything(3, verbose=False)
    cb = callback(dirpath=str(tmp_path / "kept"))
    trainer(tmp_path, cb).fit(Toy(), **loaders())
    assert len(tried) == 1
    lines = (tmp_path / "kept" / "events.jsonl").read_text().splitlines()
    assert len(lines) > 1
    assert all('"peak_bytes": 0' not in line for line in lines)
    known = Path("/proc/self/clear_refs").exists()
    assert all(('"measured_bytes": null' in line) is not known for line in lines)


def test_an_event_that_cannot_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Toy()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cb = callback(pruner=cap(max_memory=2000), dirpath=str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match=r"max_memory: the pruning event needs .* one gradient row"):
        trainer(tmp_path, cb).fit(module, **loaders())
    assert all(bool((value == before[name]).all()) for name, value in module.state_dict().items())
