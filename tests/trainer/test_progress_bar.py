from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

import lightning_cap.callbacks.pruning as callback_module
from lightning_cap.kernels.compiling import about_to_compile
from lightning_cap.trainer.progress_bar import event_progress
from tests.support.clocks import FakeClock
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


class Shown(pl.Callback):
    """What the bar's line says of an event whose clock is moved."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        clock, bar = FakeClock(), trainer.progress_bar_callback
        with event_progress(trainer, "Pruning to 0.5", clock) as progress:
            self._look(bar)
            progress("collect", 0, 100)
            clock.now = 10.0
            progress("collect", 25, 100)
            about_to_compile()
            progress("solve", 1, 3)
            clock.now = 100.0
            progress("solve", 2, 3)

    def _look(self, bar: Any) -> None:
        if isinstance(bar, RichProgressBar):
            lines: Any = bar.progress
            update = lines.update

            def record(task: Any, **fields: Any) -> None:
                self.lines += [str(fields["description"])] if "description" in fields else []
                update(task, **fields)

            lines.update = record


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_remaining_seconds_and_compiling_are_told(
    tmp_path: Path, bar: type, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Shown()
    trainer(tmp_path, shown, bar(), max_epochs=1, enable_progress_bar=True).fit(Toy(), **loaders())
    text = "\n".join(shown.lines) or capsys.readouterr().out
    places = [
        text.find(f"Pruning to 0.5: {line}")
        for line in (
            "collect", "collect, 30 s left", "compiling the solver for this machine", "solve", "solve, 1 min 30 s left"
        )
    ]  # fmt: skip
    assert -1 not in places
    assert places == sorted(places)


def test_without_a_bar_the_log_tells_of_compiling_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = trainer(tmp_path)
    with caplog.at_level("INFO"), event_progress(t, "Pruning to 0.5") as progress:
        progress("collect", 0, 1)
        about_to_compile()
        about_to_compile()
    told = [record.getMessage() for record in caplog.records if "compiling" in record.getMessage()]
    assert told == ["Pruning to 0.5: compiling the solver for this machine, which takes a moment."]
