from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError, DataError, ExportError
from lightning_cap.export import SemiStructured, load_semi_structured
from lightning_cap.export.compressed_files import read_header
from lightning_cap.export.semi_structured import sparse_layers
from tests.support.exporting import images


def mlp() -> nn.Sequential:
    """Two layers in 2:4, a small one in 2:4, a dense one, and a convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(108, 128), nn.Linear(128, 64), nn.Linear(64, 96), nn.Linear(96, 4),
        nn.Linear(4, 5),
    )  # fmt: skip
    for layer in (model[3], model[4], model[5]):
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.mul_(torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(layer.in_features // 4))
    return model.eval()


def test_layers_in_2_of_4_are_found() -> None:
    assert sparse_layers(mlp()) == ["3.weight", "4.weight"]  # not those that are dense, or of another size


def test_a_layer_that_is_not_in_2_of_4_is_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, :8] = 1.0
    with pytest.raises(ExportError, match=r"'4.weight' is not in 2:4: 2 groups .*pattern=NofM\(2, 4\)"):
        sparse_layers(model)
    odd = nn.Sequential(nn.Linear(6, 32))
    with torch.no_grad():
        odd[0].weight[:, ::2] = 0
    with pytest.raises(ExportError, match=r"'0.weight' is not in 2:4"):
        sparse_layers(odd)
    with pytest.raises(ExportError, match="no Linear layer can run in 2:4: none has zeros"):
        sparse_layers(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ExportError, match=r"no multiples of .32, 64."):
        sparse_layers(mlp()[5:])


def test_the_file_names_the_layers(tmp_path: Path) -> None:
    path = tmp_path / "m.semi_structured.safetensors"
    exporter, model = SemiStructured(), mlp().half()
    exporter.write(model, path, images(), {})
    assert read_header(path, "lightning_cap.semi_structured") == '["3.weight", "4.weight"]'
    stored, state = exporter.stored(path), model.state_dict()
    assert all(torch.equal(stored[name], state[name]) and stored[name].dtype == torch.float16 for name in state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        SemiStructured().export(mlp(), tmp_path / "m.semi_structured.safetensors", images())
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        load_semi_structured(mlp(), tmp_path / "m.semi_structured.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "m.semi_structured.safetensors"
    record = SemiStructured().export(mlp(), path, images())
    assert (record.weights, record.zeros_equal) == (3, 3)
    loaded = load_semi_structured(mlp(), path)
    assert isinstance(loaded[3].weight, torch.sparse.SparseSemiStructuredTensor)
    torch.testing.assert_close(SemiStructured().runner(path, mlp())(images()), mlp()(images()), rtol=1e-2, atol=1e-2)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        load_semi_structured(mlp(), tmp_path / "other.safetensors")
