"""Plots of a page, as matplotlib has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from markupsafe import Markup

from lightning_cap.report import run_plots


def test_equal_losses_are_in_sight_where_predictions_are_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def keep(draw: Callable[..., Any], *_: Any) -> Markup:
        drawn.append(draw.__self__)  # type: ignore[attr-defined]
        return Markup()

    monkeypatch.setattr(run_plots, "inline_svg", keep)
    run_plots.loss_plot("a", {"events": [(1e-5, 1e-3, 0.5), (1e-4, 1e-2, 0.75)]}, "val/loss")
    (axes,) = drawn[0].axes
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[0] < 1e-5
    assert axes.get_xlim()[1] > 1e-2
