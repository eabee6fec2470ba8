from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_cap.cli import main
from tests.support.report_runs import event_record, write_run


def test_report_writes_a_page_beside_the_first_run_or_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "one", events=[])
    write_run(tmp_path / "two", events=[event_record(2, 0.5, seconds={}, sparsities={}, peak_bytes=0)])
    monkeypatch.chdir(tmp_path)
    main(["report", "one"])
    assert "<h1>one</h1>" in Path("one/report.html").read_text()
    main(["report", "one", "two", "--output", "pages/both.html"])
    assert "<h1>2 runs side by side</h1>" in Path("pages/both.html").read_text()
    assert capsys.readouterr().out == "Written to one/report.html.\nWritten to pages/both.html.\n"


def test_report_is_told_in_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-cap", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "Write a page about runs and comparisons" in " ".join(capsys.readouterr().out.split())
