from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, DataError
from lightning_cap.export import Compressed, Exporter, Safetensors, SemiStructured, load, save_shrunk, shrink
from lightning_cap.sparsity.units import Units
from tests.support.shrinking import group, shapes_of, unsettle

OPTIONS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def neurons(model: nn.Module, kept: int = 20) -> tuple[dict[str, Tensor], Units]:
    """Masks that keep some neurons of one block of a ViT."""
    shapes = shapes_of(model)
    fc1 = [("blocks.0.mlp.fc1.weight", 0), ("blocks.0.mlp.fc1.bias", 0)]
    qkv = [("blocks.1.attn.qkv.weight", 0), ("blocks.1.attn.qkv.bias", 0)]
    size, heads = shapes[fc1[0][0]][0], model.blocks[1].attn.num_heads  # type: ignore[index, union-attr]
    units = Units(
        [
            group("blocks.0.mlp", "neuron", size, fc1, [], [("blocks.0.mlp.fc2.weight", 1)], shapes),
            group(
                "blocks.1.attn",
                "head",
                heads,
                qkv,
                [],
                [("blocks.1.attn.proj.weight", 1)],
                shapes,
                {n: 3 for n, _ in qkv},
            ),
        ]
    )
    keep = {"blocks.0.mlp": torch.arange(size) < kept, "blocks.1.attn": torch.arange(heads) == 0}
    return units.masks(units.targets(model).shapes, keep), units


@pytest.fixture
def small(tiny_vit: nn.Module) -> nn.Module:
    return shrink(unsettle(tiny_vit), *neurons(tiny_vit))


def test_a_loaded_model_gives_the_same_to_the_bit(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # it is not needed
    save_shrunk(small, tmp_path / "s.safetensors", OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"s.safetensors", "s.json"}
    state = torch.get_rng_state()
    again = load(tmp_path / "s.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again(X), small(X))
    assert again.blocks[1].attn.num_heads == 1  # type: ignore[index, union-attr]
    assert not again.training
    written = json.loads((tmp_path / "s.json").read_text())
    assert (written["architecture"], written["model_args"]) == ("vit_tiny_patch16_224", OPTIONS)
    groups = {entry["name"]: entry["kept"] for entry in written["steps"][0]["groups"]}
    assert groups == {"blocks.0.mlp": list(range(20)), "blocks.1.attn": [0]}
    save_shrunk(again, tmp_path / "t.safetensors", OPTIONS)
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def test_a_model_that_was_shrunk_twice_and_trained_comes_back(small: nn.Module, tmp_path: Path) -> None:
    smaller = shrink(small, *neurons(small, 7))
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter += 0.1
    save_shrunk(nn.Sequential(smaller), tmp_path / "s.safetensors", OPTIONS)
    again = load(tmp_path / "s.safetensors")
    assert torch.equal(again(X), smaller(X))
    assert again.blocks[0].mlp.fc1.out_features == 7  # type: ignore[index, union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_comes_back(small: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    save_shrunk(small.to(dtype), tmp_path / "s.safetensors", OPTIONS)
    again = load(tmp_path / "s.safetensors")
    assert torch.equal(again(X.to(dtype)), small(X.to(dtype)))


def test_arguments_of_timm_are_read_off_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = unsettle(timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, num_classes=7))
    save_shrunk(shrink(model, *neurons(model)), tmp_path / "s.safetensors")
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["model_args"] == {"num_classes": 7, "in_chans": 1, "img_size": 32}
    assert load(tmp_path / "s.safetensors")(torch.randn(1, 1, 32, 32)).shape == (1, 7)


def test_arguments_that_make_another_model_are_refused(small: nn.Module, tmp_path: Path) -> None:
    for wrong, word in (
        (None, "makes another model of them ('blocks.0.attn.proj.bias' has shape"),
        ({**OPTIONS, "num_classes": 6}, "('head.bias' has shape (6,) in the model and (5,) in the file)"),
        ({**OPTIONS, "class_token": False, "global_pool": "avg"}, "another model"),
        ({**OPTIONS, "act_layer": "relu"}, "its outputs differ"),
        ({**OPTIONS, "colour": 3}, "cannot make a model of them"),
        ({**OPTIONS, "norm_layer": nn.LayerNorm}, "cannot be written as JSON"),
        ({3: 3}, "cannot be written as JSON"),
    ):
        with pytest.raises(ConfigError, match=r"model_args=\{") as refused:
            save_shrunk(small, tmp_path / "s.safetensors", wrong)
        assert word in str(refused.value)
    assert not list(tmp_path.iterdir())


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def small_plain() -> nn.Module:
    model = plain()
    units = Units([group("0", "neuron", 8, [("0.weight", 0), ("0.bias", 0)], [], [("2.weight", 1)], shapes_of(model))])
    return shrink(model, units.masks(units.targets(model).shapes, {"0": torch.arange(8) % 2 == 1}), units)


def test_a_model_that_timm_does_not_make_needs_its_dense_one(tmp_path: Path) -> None:
    model, path = small_plain(), tmp_path / "s.safetensors"
    save_shrunk(model, path)
    dense = plain()
    before = copy.deepcopy(dense.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(load(path, dense)(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    with pytest.raises(ConfigError, match=r"model=None: the file is of a model that timm does not make"):
        load(path)
    for other in (nn.Linear(4, 8), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))):
        with pytest.raises(
            ConfigError, match=f"model={type(other).__name__}: the weights in s.safetensors are of another"
        ):
            load(path, other)


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "s.json").read_text())
        change(record)
        (folder / "s.json").write_text(json.dumps(record))

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda d: (d / "s.json").unlink(), "s.json: it cannot be read"),
    "torn json": (lambda d: (d / "s.json").write_text('{"record": "shru'), "s.json: it is torn"),
    "foreign json": (lambda d: (d / "s.json").write_text('{"a": 1}\n'), "is not a record"),
    "another version": (damaged(lambda r: r.update(version=2)), "version 2 of a record of kind 'shrunk'"),
    "wrong type": (damaged(lambda r: r["steps"][0]["groups"][0].update(kept=["a"])), "kept[0]='a'"),
    "other units": (damaged(lambda r: r["steps"][0]["groups"][0].update(kept=[0, 1])), "are not those of the units"),
    "no weights": (lambda d: (d / "s.safetensors").unlink(), "s.safetensors: it cannot be read"),
    "torn weights": (lambda d: (d / "s.safetensors").write_bytes(b"torn"), "s.safetensors: it cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    save_shrunk(small_plain(), tmp_path / "s.safetensors")
    damage, word = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(DataError) as refused:
        load(tmp_path / "s.safetensors", plain())
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_units_that_do_not_fit_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written by hand, with the right digest."""
    monkeypatch.setattr("lightning_cap.export.shrunk_files._digest", lambda record: "x")
    save_shrunk(small_plain(), tmp_path / "s.safetensors")
    for change in (
        {"kept": [0, 9]},
        {"size": 7},
        {"kept": []},
        {"producers": [{"name": "0.weight", "dim": 0, "runs": []}]},
    ):
        before = (tmp_path / "s.json").read_text()
        damaged(lambda r, change=change: r["steps"][0]["groups"][0].update(change))(tmp_path)  # type: ignore[misc]
        with pytest.raises((DataError, ConfigError), match=r"model=Sequential: the weights in s\.safetensors"):
            load(tmp_path / "s.safetensors", plain())
        (tmp_path / "s.json").write_text(before)


def test_a_full_disk_leaves_both_old_files(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    path = tmp_path / "s.safetensors"
    save_shrunk(small_plain(), path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        save_shrunk(small_plain(), path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_only_what_shrink_made_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model=Sequential: it was not made by shrink"):
        save_shrunk(plain(), tmp_path / "s.safetensors")


@pytest.mark.parametrize("kind", [Safetensors, Compressed, SemiStructured])
def test_a_shrunk_model_comes_back_from_every_file_of_weights(
    kind: type[Exporter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_cap.export.semi_structured.sparse_layers", lambda model: [])
    model, path = small_plain(), tmp_path / f"a.b{kind.suffix}"
    with torch.no_grad():
        model[0].weight[:, :2] = 0  # type: ignore[index]
    kind().write(model, path, torch.randn(2, 4), {"note": "x"})
    assert {file.name for file in tmp_path.iterdir()} == {path.name, path.with_suffix(".json").name}
    x = torch.randn(3, 4)
    assert torch.equal(load(path, plain())(x), model(x))
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="it cannot be read"):
        load(path, plain())
