from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

import lightning_cap.callbacks.pruning as callback_module
from tests.support.toy import Toy, callback, loaders, trainer

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_shows_in_the_trainers_own_bar(tmp_path: Path, bar: type, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    if bar is RichProgressBar:
        progress_bar: Any = RichProgressBar()
        cb = callback()
        t = trainer(tmp_path, cb, progress_bar, enable_progress_bar=True)
        original = callback_module.event_progress

        def spy(*args: Any) -> Any:
            progress = progress_bar.progress
            update = progress.update

            def record(task: Any, **fields: Any) -> None:
                shown.append(str(fields.get("description")))
                update(task, **fields)

            progress.update = record
            return original(*args)

        callback_module.event_progress, restore = spy, original
        try:
            t.fit(Toy(), **loaders())
        finally:
            callback_module.event_progress = restore
        text = " ".join(shown)
    else:
        trainer(tmp_path, callback(), bar(), enable_progress_bar=True).fit(Toy(), **loaders())
        text = capsys.readouterr().out
    assert "Pruning to 0.5: collect" in text
    assert "Pruning to 0.75: solve" in text
