"""Tables and pictures of a comparison, from records made by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from safetensors.torch import save_file

from lightning_cap.comparison.records import GridPoint, SurfaceRecord, save_masks
from lightning_cap.report import curves, markdown, mask_plots, print_comparison, report, style
from lightning_cap.report import heatmaps as planes
from lightning_cap.utilities.records import write_records
from tests.support.comparison_records import UNPRUNED, record, saved


def records() -> list[Any]:
    every = [(name, s, seed) for name in ("A", "B") for s in (0.5, 0.9) for seed in (0, 1)]
    found = [record(name, s, seed, 0.9 - s / 10 - seed / 50, loss=0.08 + seed / 25) for name, s, seed in every]
    grid = [GridPoint("damp", value) for value in (1e-8, 1e-4)]
    found += [record("A", s, seed, 0.8, point) for point in grid for s in (0.5, 0.9) for seed in (0, 1)]
    return [UNPRUNED, *found]


def test_markdown_has_means_deviations_and_settings() -> None:
    text = markdown(records())
    lines = text.splitlines()
    assert "Mean ± standard deviation over 2 seeds (0, 1)." in lines
    assert "| pruner | unpruned | 50 % | 90 % |" in lines
    assert "| A | 0.9900 | 0.8400 ± 0.0141 | 0.8000 ± 0.0141 |" in lines
    start = lines.index("## Increase of the loss")
    assert [line for line in lines[start:] if line.startswith("| B |")][:3] == [
        "| B | 0.005 | 0.009 |", "| B | 0.1 ± 0.03 | 0.1 ± 0.03 |", "| B | 0.1 | 0.1 |",
    ]  # fmt: skip
    assert "| A | 1 / 2 / 0.5 | 1 / 2 / 0.5 |" in lines
    start = lines.index("## Grid over `damp`")
    assert [line.split(" | ")[0] for line in lines[start + 4 : start + 7]] == [
        "| A damp=1e-08", "| A damp=1e-06", "| A damp=0.0001",
    ]  # fmt: skip
    assert "- B: `mine.B: B(damp=1e-06)`, 1 step(s)" in lines
    assert text.count("damp=0.0001") == 1  # a grid's records are in its own table alone


def test_what_is_not_known_is_a_dash() -> None:
    some = [UNPRUNED, record("A", 0.5, 0, 0.9, loss=None), record("B", 0.9, 0, 0.8)]
    lines = markdown(some).splitlines()
    assert "Seed 0." in lines
    assert {"| A | 0.005 | - |", "| A | - | - |", "| A | 0.1 | - |"} <= set(lines)
    assert "| B | 0.9900 | - | 0.8000 |" in lines


def test_what_is_no_loss_is_not_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Figure, "supxlabel", lambda self, text, **style: notes.append(text))
    silent = replace(record("B", 0.5, 0, 0.8), predicted_loss=None)
    lines = markdown([UNPRUNED, record("A", 0.5, 0, 0.9), silent]).splitlines()
    assert [line for line in lines if line.startswith("| B |")][1] == "| B | - |"
    assert curves.plot_losses([UNPRUNED, record("A", 0.5, 0, 0.9), silent], tmp_path / "losses.png")
    assert notes == ["numbers: sparsity in %\nno loss predicted by: B"]
    assert not curves.plot_losses([UNPRUNED, silent], tmp_path / "losses.png")
    assert " - " in printed([UNPRUNED, silent])


def printed(some: Any) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(some, console)
    return console.export_text()


def test_the_console_has_a_line_for_each_pruner_or_for_each_sparsity_of_one() -> None:
    text = printed(records())
    assert "val_acc at each sparsity" in text
    assert "0.8400" in text
    assert "A damp=1e-08" in text
    one = printed([UNPRUNED, record("A", 0.5, 0, 0.9), record("A", 0.9, 0, 0.8)])
    assert "One-shot pruning by A" in one
    assert all(word in one for word in ("unpruned", "predicted loss", "val_loss", "0.9000", "0.005"))


def test_what_is_saved_is_printed_beside_the_sparsity() -> None:
    lines = printed([UNPRUNED, *(saved(record("A", s, 0, 0.9)) for s in (0.5, 0.75))]).splitlines()
    header, dense, half, more = (re.findall(r"[^\s┃│]+(?: [^\s┃│]+)*", lines[i]) for i in (2, 4, 5, 6))
    assert header == ["flops", "predicted", "sparsity", "predicted loss", "val_loss", "val_acc"]
    assert dense == ["unpruned", "6 M FLOPs", "0.0000", "0", "0.1000", "0.9900"]
    assert half == ["0.5000", "3 M FLOPs", "0.3750", "0.005", "0.2000", "0.9000"]
    assert more[:3] == ["0.7500", "1.5 M FLOPs", "0.6250"]
    start = replace(UNPRUNED, label="start (40 % sparse)", sparsity=0.4)
    assert "6 M FLOPs" not in printed([start, saved(record("A", 0.5, 0, 0.9))])  # not known to have all units


def test_several_pruners_are_at_what_their_goals_count() -> None:
    flops = [UNPRUNED, *(saved(record(name, 0.5, 0, 0.9)) for name in ("A", "B"))]
    assert "val_acc at each saving of flops" in " ".join(printed(flops).split())
    text = markdown(flops)
    assert "## Saving of flops" in text
    assert "| A | 0.5000, 3 M FLOPs, 0.3750 |" in text
    mixed = [*flops, record("C", 0.5, 0, 0.8)]
    text = printed(mixed)
    assert "val_acc at each goal" in text
    assert "A (flops)" in text
    assert "C (sparsity)" in text
    assert "| C (sparsity) | -, -, 0.5000 |" in markdown(mixed)
    assert "Saving" not in markdown(records())
    assert "(sparsity)" not in markdown(records()) + printed(records())


def test_names_are_printed_as_they_are() -> None:
    odd = "[/red]|[bold]:smile:"
    some = [replace(r, pruner=odd, label=odd) if r.pruner == "A" else r for r in records() if r.grid is None]
    assert odd in printed(some)
    assert f"One-shot pruning by {odd}" in printed([r for r in some if r.pruner != "B"])
    metric = {"val_acc[/red]": 0.9}
    assert "val_acc[/red] at each sparsity" in printed([replace(r, metrics=metric) for r in some])
    (line,) = [line for line in markdown(some).splitlines() if ":smile:" in line and "0.99" in line]
    assert line.startswith(r"| [/red]\|[bold]:smile: | 0.9900 |")


def test_a_model_that_was_sparse_is_not_called_dense() -> None:
    start = replace(UNPRUNED, label="start (40 % sparse)", sparsity=0.4)
    text = printed([start, *records()[1:]]) + markdown([start, *records()[1:]])
    assert "start (40 % sparse)" in text
    assert "Start (40 % sparse): 0.9900." in text
    assert "dense" not in text.lower().replace("predict", "")


def test_a_report_draws_what_there_is(tmp_path: Path) -> None:
    some = records()
    masks = {"A": torch.tensor([1, 1, 0, 0]).bool(), "B": torch.tensor([1, 0, 1, 0]).bool()}
    some = [replace(r, masks=f"masks/{r.fingerprint}.safetensors" if r.grid is None else "") for r in some]
    some[0] = UNPRUNED
    for each in some:
        if each.masks:
            save_masks(tmp_path / each.masks, {"net.0.weight": masks[each.pruner]})
    agreement = mask_plots.mask_agreement(some, tmp_path)
    third = 1 / 3
    assert agreement["0.5"] == {"pruners": ["A", "B"], "iou": [[1.0, third], [third, 1.0]]}
    surface = SurfaceRecord(
        pruners=("A", "B"), sparsity=0.5, axis=(0.0, 0.5, 1.0), loss=((1.0, 2.0, 3.0), (2.0, 3.0, 4.0), (3.0, 4.0, 5.0)),
        corners={"unpruned": 1.0, "A": 3.0, "B": 3.0}, of=(some[1].fingerprint,),
    )  # fmt: skip
    write_records(tmp_path / "surface.json", [surface])
    block = torch.eye(4) + 0.1
    save_file({"all": block}, tmp_path / "fisher_block.safetensors", {"of": "another comparison"})
    written = report(some, tmp_path)
    assert written == [
        "results.md", "accuracy.png", "layers.png", "losses.png", "iou.json", "iou.png", "grid-damp.png", "surface.json",
        "surface.png",
    ]  # fmt: skip
    assert all((tmp_path / name).is_file() for name in written)
    assert not (tmp_path / "fisher_block.png").exists()
    planes.plot_fisher_block({"all": block}, tmp_path / "fisher_block.png")
    for path in tmp_path.glob("*.png"):
        picture = imread(path)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.05  # not blank


def test_flat_surfaces_zero_blocks_and_losses_that_fell_can_be_drawn(tmp_path: Path) -> None:
    flat = SurfaceRecord(
        pruners=("A", "B"), sparsity=0.5, axis=(0.0, 1.0), loss=((1.0, 1.0), (1.0, 1.0)),
        corners={"unpruned": 1.0, "A": 1.0, "B": 1.0},
    )  # fmt: skip
    planes.plot_surface(flat, tmp_path / "surface.png")
    planes.plot_surface(replace(flat, loss=((math.nan, math.nan), (math.nan, math.inf))), tmp_path / "surface.png")
    planes.plot_fisher_block({"all": torch.zeros(3, 3)}, tmp_path / "block.png")
    assert not curves.plot_losses([UNPRUNED, record("A", 0.5, 0, 0.9, loss=-0.1)], tmp_path / "losses.png")
    assert curves.plot_losses(
        [UNPRUNED, record("A", 0.5, 0, 0.9, loss=-0.1), record("A", 0.9, 0, 0.9)], tmp_path / "losses.png"
    )
    lost = [UNPRUNED, record("A", 0.5, 0, math.nan, loss=math.nan), record("A", 0.9, 0, 0.9, loss=math.inf)]
    assert not curves.plot_losses(lost, tmp_path / "losses.png")
    curves.plot_accuracy(lost, tmp_path / "losses.png")
    assert "| A | 0.9900 | nan | 0.9000 |" in markdown(lost)
    assert {path.name for path in tmp_path.iterdir()} == {"surface.png", "block.png", "losses.png"}


def test_many_pruners_look_different() -> None:
    looks = style.styles([str(i) for i in range(24)])
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks.values()}) == 24


@pytest.mark.parametrize(("values", "logarithmic"), [([1e-8, 1e-4], True), ([2, 3], False), ([0, 8], False)])
def test_axes_of_grids(values: list[float], logarithmic: bool) -> None:
    assert curves._positions(values) == ({value: float(value) for value in values}, logarithmic)


def test_values_that_are_no_numbers_are_counted() -> None:
    assert curves._positions(["marginal", "cumulative"]) == ({"marginal": 0.0, "cumulative": 1.0}, False)


def test_a_surface_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "surface.json").write_text('{\n  "pruners": []\n}\n')
    assert "surface.png" not in report(records(), tmp_path)
    assert "surface.json, line 1" in caplog.text
