from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_cap.comparison import LossSurface
from lightning_cap.comparison.records import SurfaceRecord
from lightning_cap.utilities.records import read_record
from tests.support.comparing import paths, run


def test_the_corners_of_the_surface_are_the_three_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surface = LossSurface(("CAP", "GM"), 0.75, points=2, margin=0.0)
    records = run(tmp_path, surface=surface, fisher_block=16)
    found = read_record(tmp_path / "surface.json", SurfaceRecord)
    losses = {record.pruner: record.metrics["val_loss"] for record in records if record.goal in (0.0, 0.75)}
    assert found.axis == (0.0, 1.0)
    assert found.loss[0] == pytest.approx([losses["unpruned"], losses["CAP"]], rel=1e-5)
    assert found.loss[1][0] == pytest.approx(losses["GM"], rel=1e-5)
    assert found.corners == pytest.approx({name: losses[name] for name in ("unpruned", "CAP", "GM")}, rel=1e-5)
    block = load_file(tmp_path / "fisher_block.safetensors")["all"]
    assert block.shape == (16, 16)
    assert torch.equal(block, block.T)
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in ("surface.json", "fisher_block.safetensors")}
    solved = paths(monkeypatch)
    run(tmp_path, surface=surface, fisher_block=16)
    assert solved == []
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in stamps}
    run(tmp_path, surface=LossSurface(("CAP", "GM"), 0.75, points=3, batches=1), fisher_block=8)
    assert solved == []  # their weights are beside the masks
    assert len(read_record(tmp_path / "surface.json", SurfaceRecord).axis) == 3
    (tmp_path / "surface.json").write_text("5")
    run(tmp_path, surface=LossSurface(("CAP", "GM"), 0.75, points=2), fisher_block=8)
    assert len(read_record(tmp_path / "surface.json", SurfaceRecord).axis) == 2  # what is none is made anew
    assert load_file(tmp_path / "fisher_block.safetensors")["all"].shape == (8, 8)
