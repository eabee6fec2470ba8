"""What a page tells of runs that are finished, running or stopped, of comparisons, and of several of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from lightning_cap.errors import ConfigError, DataError
from lightning_cap.export.records import BENCHMARKS, BenchmarkRecord
from lightning_cap.report import comparison_sections, run_plots, write_report
from lightning_cap.trainer.records import EVENTS, Saving
from lightning_cap.trainer.run_records import CYCLES, RUN, CycleRecord, LayerRecord
from lightning_cap.utilities.machine import Machine
from lightning_cap.utilities.records import write_records
from tests.support.report_runs import (
    LAYERS,
    METRICS,
    add_export,
    add_finetuned,
    comparison_records,
    event_record,
    run_record,
    with_planes,
    write_comparison,
    write_run,
)  # fmt: skip

_VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """The text of a page, its links, its ids, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.ids += [str(given["id"])] if "id" in given else []
        self.links += [str(given["href"])] if tag == "a" else []
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)
        if self.cells and self.cells[-1] and {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(*folders: Path, output: Path | None = None) -> Reader:
    return Reader(write_report(folders, output).read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the plots of pages out, for what is not about them: drawing takes most of the time."""
    for module in (run_plots, comparison_sections):
        monkeypatch.setattr(
            module, "inline_svg", lambda draw, name, title, **given: Markup('<svg id="{}"></svg>').format(name)
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Of a run with everything that there may be."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "digits" / "version_0")
    add_finetuned(folder)
    add_export(folder)
    (folder / "config.yaml").write_text("model: </pre><script>alert(1)</script>\n")
    return page(folder)


def test_the_summary_has_a_line_for_each_model(whole: Reader) -> None:
    start = whole.cells.index(
        ["model", "epochs", "val/acc", "drop (points)", "sparsity", "FLOPs saved", "size", "files"]
    )
    assert whole.cells[start + 1 : start + 4] == [
        ["dense", "–", "98.00 %", "–", "–", "–", "–", "–"],
        ["50 %", "4", "97.50 %", "+0.50", "50.00 %", "40.00 %", "1.5 kB", ".safetensors .ckpt"],
        ["75 %", "6", "96.00 %", "+2.00", "75.00 %", "60.00 %", "1.5 kB", ".safetensors .ckpt"],
    ]
    for words in (
        "digits/version_0",
        "finished",
        "Gradual pruning of small_vit (202 k weights) by CAP to 50 and 75 % sparsity, 6 epochs.",
    ):
        assert words in whole.text


def test_sparsities_that_were_found_at_the_events_take_the_place_of_the_highest(tmp_path: Path) -> None:
    done = page(write_run(tmp_path / "done", schedule={"2": 0.9, "4": 0.9}))
    assert "by CAP to 50 and 75 % sparsity" in done.text
    begun = page(write_run(tmp_path / "begun", schedule={"2": 0.9, "4": 0.9, "9": 0.9}))
    assert "by CAP to 50, 75 and 90 % sparsity" in begun.text


def test_each_event_has_its_drop_losses_seconds_and_bytes(whole: Reader) -> None:
    assert ["2", "50 %", "50.00 %", "98.00 %", "95.50 %", "2.55 %", "128 gradients", "0", "0"] in whole.cells
    assert ["2", "50 %", "0.05", "0.0625", "1.25"] in whole.cells
    costs = ["4", "75 %", "0.1 s", "2 s", "1.5 s", "0.2 s", "3.8 s", "3 MB", "2.5 MB"]
    assert costs in whole.cells


def test_layers_tell_zeros_flops_and_why_they_are_dense(whole: Reader) -> None:
    assert ["model.blocks.0.fc.weight", "16 × 8", "–", "40.00 %", "65.00 %", "4 k", "1.4 k"] in whole.cells
    assert ["model.stem.weight", "8 × 3 × 4 × 4", "first", "–", "–", "400", "400"] in whole.cells
    assert ["FLOPs of the whole model", "", "", "40.0 % saved", "60.0 % saved", "10 k", "4 k"] in whole.cells


def test_fine_tuning_exports_settings_and_environment_are_there(whole: Reader) -> None:
    assert ["75 %", "75.00 %", "60.00 %", "96.00 %", "96.40 %", "+0.40", "10", "–", ".safetensors"] in whole.cells
    assert ["sparsity=0.75.onnx", "onnx", "900 B", "90.0 %", "75.00 %", "1.0e-06", "2 of 2 weights"] in whole.cells
    for words in ("pruner.damp 1e-06", "torch 2.6.0", "model: </pre><script>alert(1)</script>"):
        assert words in whole.text


def test_the_page_needs_nothing_but_itself(whole: Reader) -> None:
    assert not {"script", "img", "iframe", "object"} & whole.tags
    assert len(set(whole.ids)) == len(whole.ids)
    inside = [link for link in whole.links if link.startswith("#")]
    assert {link[1:] for link in inside} <= set(whole.ids)
    assert not [link for link in whole.links if ":" in link]


@pytest.mark.usefixtures("undrawn")
def test_links_lead_to_the_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a run")
    (folder / "checkpoints/sparsity=0.50.ckpt").unlink()
    found = page(folder, output=tmp_path / "pages" / "page.html")
    files = [link for link in found.links if not link.startswith("#")]
    assert "../a%20run/checkpoints/sparsity%3D0.75.ckpt" in files
    assert not [link for link in files if "0.50.ckpt" in link]
    assert ["sparsity=0.50.ckpt", "no longer there"] in found.cells
    (tmp_path / "pages").rename(tmp_path / "moved")
    for link in files:
        assert (tmp_path / "moved" / link.replace("%20", " ").replace("%3D", "=")).exists()


def test_names_with_markup_are_text(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>&amp;$x$"
    folder = write_run(
        tmp_path / "a<b>\"'&",
        model=bad,
        metric=bad,
        settings={bad: bad},
        layers=(LayerRecord(bad, (1,), bad, 1), *LAYERS),
    )
    before, after = {bad: 0.9, "val/loss": 1.0}, {bad: 0.8, "val/loss": 2.0}
    events = [event_record(2, 0.5, before=before, after=after, sparsities={bad: 0.5}, seconds={bad: 1.0})]
    write_records(folder / "checkpoints" / EVENTS, events)
    (folder / "metrics.csv").write_text(METRICS.replace("val/acc", bad))
    found = page(folder)
    assert not {"script", "b"} & found.tags
    assert found.text.count(bad) > 5
    assert "a<b>\"'&" in found.text


@pytest.mark.usefixtures("undrawn")
def test_a_running_run_tells_what_is_to_come(tmp_path: Path) -> None:
    write_records(tmp_path / RUN, [run_record(state="running", ended="")])
    (tmp_path / EVENTS).touch()
    text = page(tmp_path).text
    for words in (
        "running, or killed",
        "No pruning event has taken place yet. The first is due at epoch 2.",
        "there is no metrics.csv. Train with CSVLogger",
        "The plan of the events",
    ):
        assert words in text


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_told_in_a_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path, flops=None, layers=(), plan=None)
    (folder / "metrics.csv").write_text("epoch,step,val/acc\n1,19,0.9\n2,29,0.91\n")
    silent = [event_record(2, 0.5, measured_bytes=None, predicted_loss=None, before={}, after={})]
    write_records(folder / "checkpoints" / EVENTS, silent)
    text = page(folder).text
    for words in (
        "No learning rate was logged: add LearningRateMonitor to the callbacks",
        "FLOPs of layers are not shown",
        "The pruner predicts no loss.",
        "Memory was not measured",
        "No loss was measured right before and after events",
    ):
        assert words in text


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_run_without_its_record_is_shown_from_its_events(tmp_path: Path) -> None:
    write_records(tmp_path / EVENTS, [event_record(2, 0.5), event_record(4, 0.75)])
    text = page(tmp_path).text
    assert "state unknown" in text
    assert "there is no run.jsonl" in text
    assert "No cycle has ended yet" in text


@pytest.mark.usefixtures("undrawn")
def test_a_torn_line_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path, state="stopped")
    path = folder / "checkpoints" / EVENTS
    path.write_text(path.read_text() + '{"record": "ev')
    text = page(folder).text
    assert "events.jsonl: the last line is torn, as after a kill or on a full disk; it is left out." in text
    assert "stopped" in text


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_tells_all_its_starts(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    starts = [run_record(state="running", ended=""), run_record(started="2026-01-03T00:00:00+00:00", epoch=3)]
    write_records(folder / "checkpoints" / RUN, starts)
    found = page(folder)
    assert ["2026-01-02 03:04:05", "–", "running", "0", "6"] in found.cells
    assert ["2026-01-03 00:00:00", "2026-01-02 04:04:05", "finished", "3", "6"] in found.cells


def test_goals_that_count_something_else_tell_what_is_saved(tmp_path: Path) -> None:
    saving = Saving("latency", 0.5, 6.0, "ms")
    events = [event_record(2, 0.5, saving=saving, sparsity=0.3)]
    folder = write_run(tmp_path, events=events, counted="latency", schedule={"2": 0.5})
    write_records(folder / "checkpoints" / CYCLES, [CycleRecord(0.5, 6, 0.97, 0.3, saving=saving)])
    found = page(folder)
    header = [
        "model",
        "epochs",
        "val/acc",
        "drop (points)",
        "latency saved",
        "left, as predicted",
        "sparsity",
        "FLOPs saved",
        "size",
        "files",
    ]
    assert found.cells[found.cells.index(header) + 2][:7] == [
        "50 %",
        "6",
        "97.00 %",
        "+1.00",
        "50.00 %",
        "6 ms",
        "30.00 %",
    ]
    assert "latency saved (%)" in found.text


@pytest.mark.usefixtures("undrawn")
def test_less_of_a_loss_is_better(tmp_path: Path) -> None:
    folder = write_run(tmp_path, metric="val/loss", mode="min")
    losses = [CycleRecord(0.0, 2, 0.1, 0.0), CycleRecord(0.5, 4, 0.15, 0.5)]
    write_records(folder / "checkpoints" / CYCLES, losses)
    found = page(folder)
    assert [row for row in found.cells if row[:4] == ["50 %", "4", "0.15", "+0.05"]]
    assert ["model", "epochs", "val/loss", "rise"] in [row[:4] for row in found.cells]


def test_many_events_and_layers_are_drawn_too(tmp_path: Path) -> None:
    names = [f"blocks.{i}.fc.weight" for i in range(70)]
    layers = tuple(LayerRecord(name, (4, 4), "", 32) for name in names)
    events = [event_record(2 * i, 0.01 * (i + 1), sparsities=dict.fromkeys(names, 0.01 * (i + 1))) for i in range(45)]
    text = page(write_run(tmp_path, events=events, layers=layers)).text
    assert "The last 40 of 45 events are drawn; the table has all." in text
    assert "layer, from the first to the last" in text


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_has_means_plots_and_settings(tmp_path: Path) -> None:
    found = page(write_comparison(tmp_path / "digits_compare"))
    assert ["pruner", "unpruned", "50 %", "90 %"] in found.cells
    assert ["A", "99.00", "91.00 ± 1.41", "87.00 ± 1.41"] in found.cells
    for words in (
        "digits_compare",
        "2 pruners in one shot at 50, 90 % sparsity, means over 2 seeds.",
        "mine.B: B(damp=1e-06)",
    ):
        assert words in found.text


def test_a_comparison_shows_its_grids_masks_surface_and_fisher(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", with_planes(tmp_path / "c"))
    found = page(folder)
    for words in (
        "Grid over damp",
        "Agreement of masks",
        "weight in the block",
        "from unpruned (0) to A (1)",
        "A damp=0.1",
    ):
        assert words in found.text
    assert re.search(r"1 0 − \d", found.text)  # powers of ten, which are written in parts
    (folder / "masks" / "A.safetensors").unlink()
    assert "1 files of masks are no longer there, such as masks/A.safetensors" in page(folder).text


@pytest.mark.usefixtures("undrawn")
def test_measured_speed_comes_with_its_remarks(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    add_export(folder)
    machine = Machine(name="m", processor="p", accelerator="", torch="2")
    measured = BenchmarkRecord(
        model="sparsity=0.75.onnx", dense="dense, onnx", batch_size=1, milliseconds=2.0, speedup=1.0, speedup_low=0.9,
        speedup_high=1.1, runs=5, flops=None, bytes=None, threads=1, device="cpu", machine=machine, remark="no speed-up here",
    )  # fmt: skip
    write_records(folder / "checkpoints" / "export" / BENCHMARKS, [measured])
    found = page(folder)
    assert ["sparsity=0.75.onnx", "1", "2 ms", "1.00", "0.90 to 1.10", "–", "cpu, 1 threads"] in found.cells
    assert "sparsity=0.75.onnx, batch 1: no speed-up here" in found.text


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_of_one_result_and_of_none(tmp_path: Path) -> None:
    unpruned, one, *_ = comparison_records()
    assert "1 pruner in one shot at 50 % sparsity." in page(write_comparison(tmp_path / "one", [unpruned, one])).text
    assert "No pruner has been run yet." in page(write_comparison(tmp_path / "none", [unpruned])).text


@pytest.mark.usefixtures("undrawn")
def test_several_are_side_by_side_under_names_of_their_own(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a" / "version_0")
    add_finetuned(one)
    two, three = write_run(tmp_path / "b" / "a" / "version_0"), write_comparison(tmp_path / "cmp")
    found = page(one, two, three)
    assert (one / "report.html").exists()
    start = found.cells.index(["", "dense", "50 %", "75 %"])
    names = [row[0] for row in found.cells[start + 1 : start + 4]]
    assert names[1] == f"{names[0]}, fine-tuned"
    assert names[0] != names[2]
    assert [name.split("/")[-2:] for name in names[::2]] == [["a", "version_0"]] * 2
    assert len(set(found.ids)) == len(found.ids)
    assert "cmp: A" in found.text


@pytest.mark.usefixtures("undrawn")
def test_runs_in_one_folder_get_names_of_their_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    write_run(tmp_path / "r", suffix="-v1")
    text = page(folder).text
    assert "2 runs side by side r (v0), r (v1)." in text


@pytest.mark.usefixtures("undrawn")
def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    once = write_report(folder).read_text()
    assert write_report([str(folder)]).read_text() == once
    assert not re.search(re.escape(str(tmp_path)), once)


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="this is a folder"):
        write_report(folder, tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(folder, tmp_path / "file" / "report.html")


@pytest.mark.parametrize("folders", [[], ["missing"], ["run", "run"], ["run", "missing"]])
@pytest.mark.usefixtures("undrawn")
def test_nothing_is_written_where_a_folder_is_wrong(tmp_path: Path, folders: Sequence[str]) -> None:
    write_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ConfigError, DataError)):
        write_report([tmp_path / name for name in folders])
    assert sorted(tmp_path.rglob("*")) == before
