from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_cap.export import OpenVINO
from tests.support.exporting import images, small_convnet


def test_zeros_take_no_space_and_are_there_when_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2100), nn.ReLU(), nn.Linear(2100, 3))  # more than 2**16 weights: several chunks
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.1)
    record = OpenVINO().export(model, tmp_path / "m.openvino", torch.randn(3, 64))
    assert (record.weights, record.zeros_equal) == (1, 1)
    assert (tmp_path / "m.openvino" / "openvino_model.bin").stat().st_size < 0.25 * 64 * 2100 * 4 + 3 * 2100 * 4
    assert record.bytes == sum(file.stat().st_size for file in (tmp_path / "m.openvino").iterdir())


def test_an_earlier_folder_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "m.openvino").mkdir()
    (tmp_path / "m.openvino" / "old").touch()
    OpenVINO().export(small_convnet(), tmp_path / "m.openvino", images(2))
    assert sorted(file.name for file in (tmp_path / "m.openvino").iterdir()) == [
        "openvino_model.bin",
        "openvino_model.xml",
    ]
