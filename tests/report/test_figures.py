"""What the pictures of a comparison show, read from the figures before they are drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from safetensors.torch import save_file

from lightning_cap.comparison.records import ComparisonRecord, GridPoint, SurfaceRecord, save_masks
from lightning_cap.errors import ConfigError, DataError
from lightning_cap.report import curves, heatmaps, mask_plots, report
from lightning_cap.report.style import styles
from tests.support.comparison_records import UNPRUNED, record, saved

GOALS = [0.5, 0.6, 0.7, 0.8, 0.9]
ODD = "[/red] _$x$|\\foo"  # markup of rich, formulas of matplotlib, columns of Markdown


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Grows by every figure that would be written."""
    figures: list[Figure] = []
    for module in (curves, heatmaps, mask_plots):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
    return figures


def of_five() -> list[ComparisonRecord]:
    drops = {"A": 0.01, "B": 0.02, "C": 0.9}
    return [UNPRUNED] + [
        record(name, s, seed, 0.99 - drop * (s - 0.4) - seed / 1000)
        for name, drop in drops.items() for s in GOALS for seed in (0, 1)
    ]  # fmt: skip


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_xticklabels()]


def told(figure: Figure) -> str:
    titles = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]
    return " ".join([*titles, figure.get_supxlabel()])


def test_accuracy_has_ticks_where_it_was_asked_for_and_a_panel_where_the_methods_differ(drawn: list[Figure]) -> None:
    curves.plot_accuracy(of_five(), Path("a.png"))
    every, near = drawn[0].axes
    assert labels(every) == labels(near) == ["50", "60", "70", "80", "90"]
    low, high = near.get_ylim()
    assert 0.97 < low < 0.985  # B and A are inside, C falls out of it
    assert 0.99 <= high < 1
    assert every.get_ylim()[0] < 0.6
    assert "2 seeds" in told(drawn[0])


def test_noise_alone_has_no_panel_of_its_own(drawn: list[Figure]) -> None:
    """The best hardly differ from the unpruned model: the panel goes on to those that do."""
    values = {
        "A": [0.99, 0.991, 0.989, 0.99, 0.988],
        "B": [0.991, 0.98, 0.97, 0.96, 0.95],
        "C": [0.3, 0.2, 0.2, 0.1, 0.1],
    }
    some = [record(name, s, 0, acc) for name, column in values.items() for s, acc in zip(GOALS, column, strict=True)]
    curves.plot_accuracy([UNPRUNED, *some], Path("a.png"))
    low, high = drawn[0].axes[1].get_ylim()
    assert 0.9 < low < 0.97
    assert high > 0.991


def test_levels_of_a_surface_are_told_apart_by_their_numbers(drawn: list[Figure]) -> None:
    surface = SurfaceRecord(pruners=("A", "B"), sparsity=0.5, axis=(0.0, 0.5, 1.0), corners={"unpruned": 0.2, "A": 0.2, "B": 0.3},
                            loss=((0.25, 0.26, 0.27), (0.26, 0.27, 0.28), (0.27, 0.28, 0.29)))  # fmt: skip
    heatmaps.plot_surface(surface, Path("s.png"))
    drawn[0].canvas.draw()
    ticks = [text.get_text() for text in drawn[0].axes[1].get_yticklabels()]
    assert len(ticks) > 5
    assert len(set(ticks)) == len(ticks)


def test_one_panel_is_enough_where_all_are_alike(drawn: list[Figure]) -> None:
    curves.plot_accuracy([r for r in of_five() if r.pruner != "C"], Path("a.png"))
    curves.plot_accuracy([r for r in of_five() if r.pruner in ("unpruned", "C")], Path("a.png"))
    assert [len(figure.axes) for figure in drawn] == [1, 1]


def test_close_sparsities_do_not_write_over_each_other(drawn: list[Figure]) -> None:
    goals = [0.5, 0.9, 0.95, 0.98, 0.99]
    curves.plot_accuracy([UNPRUNED, *(record("A", s, 0, 0.9) for s in goals)], Path("a.png"))
    (axes,) = drawn[0].axes
    assert labels(axes) == ["50", "90", "95", "98", "99"]
    assert axes.get_xticklabels()[0].get_rotation() == 90


def test_points_of_losses_tell_their_sparsity(drawn: list[Figure]) -> None:
    assert curves.plot_losses(of_five(), Path("l.png"))
    (axes,) = drawn[0].axes
    assert sorted(text.get_text() for text in axes.texts) == sorted(3 * ["50", "60", "70", "80", "90"])
    assert "sparsity in %" in told(drawn[0])


def test_a_pruner_has_one_colour_everywhere(drawn: list[Figure]) -> None:
    some = [r if r.pruner != "A" else replace(r, predicted_loss=None) for r in of_five()]
    some += [record("B", s, 0, 0.9, GridPoint("damp", 1e-2)) for s in GOALS]
    want = {label: look["color"] for label, look in styles(["A", "B", "C"]).items()}
    curves.plot_accuracy(some, Path("a.png"))
    curves.plot_losses(some, Path("l.png"))
    curves.plot_grid(some, "damp", Path("g.png"))
    mask_plots.plot_layers(some, Path("y.png"))
    for figure in drawn:
        found = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
        for label in set(found) & set(want):
            handle: Any = found[label]
            color = handle.get_color() if hasattr(handle, "get_color") else handle.patches[0].get_facecolor()
            assert to_hex(color) == want[label].lower()
    surface = SurfaceRecord(pruners=("B", "C"), sparsity=0.5, axis=(0.0, 1.0), loss=((1.0, 2.0), (2.0, 3.0)),
                            corners={"unpruned": 1.0, "B": 2.0, "C": 2.0})  # fmt: skip
    heatmaps.plot_surface(surface, Path("s.png"), styles(["A", "B", "C"]))
    marks = [line.get_color() for line in drawn[-1].axes[0].lines]
    assert marks[1:] == [want["B"], want["C"]]
    assert "doubles from line to line" in drawn[-1].axes[1].get_ylabel()


def test_a_collapse_does_not_hide_the_others_in_a_grid(drawn: list[Figure]) -> None:
    some = [UNPRUNED, *(record("A", 0.5, 0, acc) for acc in (0.95,))]
    some += [
        record("A", 0.5, 0, acc, GridPoint("damp", damp)) for acc, damp in ((0.96, 1e-4), (0.955, 1e-3), (0.1, 1.0))
    ]
    curves.plot_grid(some, "damp", Path("g.png"))
    (axes,) = drawn[0].axes
    assert axes.get_ylim()[0] > 0.5
    assert axes.get_title() == "50 % sparsity (1 of 4 results are outside)"
    assert labels(axes)[0] == "1e-6"
    assert "ring: the pruner as given" in told(drawn[0])


def test_nothing_is_left_out_of_a_grid_for_little(drawn: list[Figure]) -> None:
    given = ((0.987, 1e-5), (0.982, 1e-4), (0.92, 1e-3), (0.88, 1.0))
    some = [record("A", 0.5, 0, acc, GridPoint("damp", damp)) for acc, damp in given]
    curves.plot_grid([UNPRUNED, record("A", 0.5, 0, 0.988), *some], "damp", Path("g.png"))
    (axes,) = drawn[0].axes
    assert axes.get_ylim()[0] < 0.88
    assert axes.get_title() == "50 % sparsity"


def test_a_metric_that_is_to_be_small_is_limited_from_the_other_side(drawn: list[Figure]) -> None:
    losses = {1e-6: 0.12, 1e-4: 0.13, 1e-3: 0.14, 1.0: 9.0}
    some = [replace(UNPRUNED, metrics={"val_loss": 0.1})]
    for damp, loss in losses.items():
        grid = GridPoint("damp", damp) if damp != 1e-6 else None
        some.append(replace(record("A", 0.5, 0, 0, grid), metrics={"val_loss": loss}))
    curves.plot_grid(some, "damp", Path("g.png"))
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert low < 0.12
    assert high < 1


def test_pictures_say_what_goals_count(drawn: list[Figure]) -> None:
    some = [UNPRUNED, *(saved(record(name, s, 0, 0.9)) for name in ("A", "B") for s in (0.5, 0.75))]
    curves.plot_accuracy(some, Path("a.png"))
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "saving of flops (%)"
    assert list(axes.lines[-1].get_xdata()) == [50, 75]
    mask_plots.plot_layers(some, Path("l.png"))
    assert "model: 50 % saving of flops" in told(drawn[1])
    agreement = {"0.5": {"pruners": ["A", "B"], "iou": [[1.0, 0.4], [0.4, 1.0]]}}
    mask_plots.plot_agreement(agreement, Path("i.png"), counted="saving of flops")
    assert "50 % saving of flops" in told(drawn[2])
    assert "by chance" not in told(drawn[2])


def test_layers_and_agreement_show_every_sparsity(drawn: list[Figure]) -> None:
    mask_plots.plot_layers(of_five(), Path("l.png"))
    agreement = {f"{s:g}": {"pruners": ["A", "B"], "iou": [[1.0, 0.4], [0.4, 1.0]]} for s in GOALS}
    mask_plots.plot_agreement(agreement, Path("i.png"), mask_plots.seed_note(of_five()))
    for figure in drawn:
        titles = told(figure)
        assert all(f"{100 * s:.0f} %" in titles for s in GOALS)
        assert "of seed 0, the first of 2" in titles
        assert "not shown" not in titles


def test_sparsities_for_which_there_is_no_room_are_named(drawn: list[Figure]) -> None:
    goals = [i / 100 for i in range(10, 40)]
    mask_plots.plot_layers([record("A", s, 0, 0.9) for s in goals], Path("l.png"))
    shown = [axes.get_title(loc="left").removeprefix("model: ") for axes in drawn[0].axes]
    missing = [f"{100 * s:.4g} %" for s in goals if f"{100 * s:.4g} %" not in shown]
    text = drawn[0].get_supxlabel().replace("\n", " ")
    assert text == f"24 of 30 sparsities, for want of room; not shown: {', '.join(missing)}"


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    names = {"A": ODD, "B": "_$\\frac", "C": "n" * 80}
    some = [
        replace(r, pruner=names[r.pruner], label=names[r.pruner]) for r in of_five() if r.goal == 0.5 and not r.seed
    ]
    grid = replace(record("A", 0.5, 0, 0.9, GridPoint("damp", 1e-2)), pruner=ODD, label=f"{ODD} damp=0.01")
    some = [UNPRUNED, *some, grid]
    some = [replace(r, masks="m.safetensors") if r.grid is None and r.pruner != "unpruned" else r for r in some]
    save_masks(tmp_path / "m.safetensors", {"net.0.weight": torch.ones(2).bool()})
    assert {"accuracy.png", "layers.png", "losses.png", "iou.png", "grid-damp.png"} <= set(report(some, tmp_path))
    for name in map(curves.plain, names.values()):
        assert not name.startswith("_")
        assert len(name) <= 70


def test_endings_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "a.xyz", tmp_path / "a", "a.png"):
        with pytest.raises(ConfigError, match=r"path=.*ends in one of \.png, \.svg, \.pdf"):
            curves.plot_accuracy(of_five(), path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"5", b"null", b"\xff" * 100], ids=["empty", "5", "null", "bytes"])
def test_a_foreign_fisher_block_is_left_out(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture, drawn: list[Figure]
) -> None:
    (tmp_path / "fisher_block.safetensors").write_bytes(content)
    assert "fisher_block.png" not in report(of_five(), tmp_path)
    assert "fisher_block.safetensors" in caplog.text


def test_a_fisher_block_without_its_marks_is_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    save_file({"all": torch.eye(3)}, tmp_path / "fisher_block.safetensors")
    assert "fisher_block.png" not in report(of_five(), tmp_path)


def test_foreign_masks_are_one_error(tmp_path: Path, drawn: list[Figure]) -> None:
    some = [replace(r, masks="m.safetensors") if r.pruner != "unpruned" else r for r in of_five()]
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=r"m\.safetensors: it holds no masks of a comparison") as caught:
        report(some, tmp_path)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_do_not_set_the_limits(drawn: list[Figure]) -> None:
    some = [*of_five(), record("D", 0.5, 0, math.nan), record("D", 0.6, 0, math.inf)]
    curves.plot_accuracy(some, Path("a.png"))
    assert all(math.isfinite(end) for axes in drawn[0].axes for end in axes.get_ylim())
