from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lightning_cap.export.safetensors import plain_model, save_plain_weights


def test_plain_weights_hold_tied_strided_and_half_tensors(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {"a": base, "tied": base, "strided": base.t(), "half": base.bfloat16(), "count": torch.tensor(3)}
    save_plain_weights(tmp_path / "w.safetensors", state, {"sparsity": "0.5"})
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) and loaded[k].dtype == state[k].dtype for k in state)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "sparsity": "0.5"}


def test_saved_timm_model_loads_as_a_plain_one(tmp_path: Path, tiny_vit: nn.Module) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.net = tiny_vit

    model, prefix = plain_model(Wrapper(), ["net.blocks.0.attn.qkv.weight"])
    assert (model is tiny_vit, prefix) == (True, "net.")
    path = tmp_path / "vit.safetensors"
    save_plain_weights(path, model.state_dict(), {})
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    again = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **options)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), tiny_vit.eval()(x))


def test_plain_model_of_other_modules() -> None:
    only = nn.ModuleDict({"body": nn.Linear(2, 2), "loss": nn.CrossEntropyLoss()})
    assert plain_model(only, ["body.weight"]) == (only["body"], "body.")
    two = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert plain_model(two, ["body.weight"]) == (two, "")
    compiled = nn.ModuleDict({"net": torch.compile(nn.Linear(2, 2))})
    model, prefix = plain_model(compiled, ["net.weight"])
    assert list(model.state_dict()) == ["weight", "bias"]
    assert prefix == "net."


def test_plain_weights_are_readable_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_plain_weights(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    path = tmp_path / "a.safetensors"
    save_plain_weights(path, {"x": torch.tensor(1.0)}, {})
    before = path.read_bytes()
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        save_plain_weights(path, {"x": torch.tensor(2.0)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    """safetensors writes the metadata in another order each time."""
    state = {f"w{i}": torch.full((3, i + 1), float(i)) for i in range(4)}
    words = {f"word {i}": f'schön {i} \\ " \n \x01 \x7f €' for i in range(20)}
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file in files:
        save_plain_weights(str(file), state, dict(reversed(words.items())) if file == files[1] else words)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt", **words}
    loaded = load_file(files[0])
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
