from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cap.errors import DataError
from lightning_cap.report.csv_metrics import read_metrics
from tests.support.report_runs import METRICS


def written(folder: Path, text: str) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text)
    return path


def test_metrics_and_learning_rates_over_epochs(tmp_path: Path) -> None:
    metrics = read_metrics(written(tmp_path, METRICS))
    assert metrics.curve("val/acc") == [(1.0, 0.70), (2.0, 0.98), (3.0, 0.97), (6.0, 0.96)]
    assert metrics.learning_rates() == {"lr-AdamW": [(0.0, 0.003), (1.0, 0.002), (2.0, 0.003), (5.0, 0.001)]}
    assert metrics.curve("nothing") == []
    assert not metrics.torn


def test_equal_learning_rates_are_one_and_momentum_is_none(tmp_path: Path) -> None:
    text = "epoch,lr-a/pg1,lr-a/pg2,lr-a/pg3,lr-a-momentum,step,val\n,1,1,2,0.9,0,\n0,,,,,1,3\n"
    assert list(read_metrics(written(tmp_path, text)).learning_rates()) == ["lr-a/pg1", "lr-a/pg3"]


def test_a_line_that_is_still_written_is_left_out(tmp_path: Path) -> None:
    metrics = read_metrics(written(tmp_path, METRICS + "6,,69,,0.9"))
    assert metrics.torn
    assert metrics.curve("val/acc")[-1] == (6.0, 0.96)


def test_an_empty_file_and_one_without_epochs_have_no_curves(tmp_path: Path) -> None:
    assert read_metrics(written(tmp_path, "")).learning_rates() == {}
    assert read_metrics(written(tmp_path, "lr-a,step\n1,2\n")).learning_rates() == {}


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    text = "epoch,step,val\n0,1,nan\n1,3,text\n2,5,0.5\n"
    assert read_metrics(written(tmp_path, text)).curve("val") == [(3.0, 0.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2\n", "line 1: it has no column 'step'"), ("epoch,step\n1,2\n1,2,3\n", "line 3: 3 values for 2 columns")],
)
def test_another_csv_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_metrics(written(tmp_path, text))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.csv")
