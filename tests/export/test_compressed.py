from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_cap.errors import DataError
from lightning_cap.export import Compressed, Safetensors, load_compressed
from tests.support.exporting import images, small_convnet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_value_and_type_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_convnet().to(dtype)  # counts of BatchNorm stay int64
    path = tmp_path / "m.compressed.safetensors"
    Compressed().write(model, path, images(), {})
    loaded, state = load_compressed(path), model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)


@pytest.mark.parametrize(("zeros", "smaller"), [(0.0, False), (0.05, True), (0.5, True), (1.0, True)])
def test_size_on_disk(tmp_path: Path, zeros: float, smaller: bool) -> None:
    model = nn.Linear(256, 256, bias=False)
    torch.manual_seed(0)
    with torch.no_grad():
        model.weight.mul_(torch.rand_like(model.weight) >= zeros)
    for exporter, name in ((Compressed(), "m.compressed.safetensors"), (Safetensors(), "m.safetensors")):
        exporter.write(model, tmp_path / name, images(), {})
    size, dense = (tmp_path / "m.compressed.safetensors").stat().st_size, (tmp_path / "m.safetensors").stat().st_size
    assert (size < dense) == smaller
    assert size < dense * (1 - zeros) + 65536 / 8 + 400
    assert torch.equal(load_compressed(tmp_path / "m.compressed.safetensors")["weight"], model.weight)


def test_odd_shapes_and_values_that_are_not_finite(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("odd", torch.tensor([[0.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0], [0.0] * 3] * 7))
    model.register_buffer("none", torch.zeros(0, 4))
    model.register_buffer("scalar", torch.tensor(0.0))
    path = tmp_path / "m.compressed.safetensors"
    Compressed().write(model, path, images(), {})
    loaded = load_compressed(path)
    torch.testing.assert_close(loaded, dict(model.state_dict()), rtol=0, atol=0, equal_nan=True)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "m.compressed.safetensors"
    Compressed().write(small_convnet(), path, images(), {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        load_compressed(path)
