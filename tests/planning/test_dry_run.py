from __future__ import annotations

from lightning_cap.planning.dry_run import mending_notes
from lightning_cap.pruners import CAP, Magnitude


def test_what_is_read_to_mend_the_model_is_noted() -> None:
    notes = mending_notes([CAP(heal="layerwise"), Magnitude(heal="layerwise"), Magnitude()], recalibrate=True)
    assert [note.partition(",")[0] for note in notes] == [
        "after each collection 512 samples are read for healing",
        "after each event 1024 samples are read for batch norm",
    ]
    assert mending_notes([CAP(heal="distill")], recalibrate=False)[0].startswith(
        "after each collection 2048 samples are read for healing, by forward and backward passes"
    )
    assert mending_notes([Magnitude()], recalibrate=False) == []
