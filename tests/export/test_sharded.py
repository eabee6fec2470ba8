"""Plain weights of a sharded model, written one tensor after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.export.safetensors import save_plain_weights
from lightning_cap.export.sharded import write_sharded
from lightning_cap.utilities import distributed
from tests.support.processes import on_ranks
from tests.support.sharding import make_net, make_sharded


def mixed() -> dict[str, torch.Tensor]:
    return {
        "b": torch.arange(6).view(2, 3),
        "a": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.5, dtype=torch.float64),
        "z": torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).T,
    }


def test_the_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    save_plain_weights(tmp_path / "plain.safetensors", mixed(), {"goal": "0.5", "architecture": "vit"})
    write_sharded(tmp_path / "sharded.safetensors", mixed(), {"goal": "0.5", "architecture": "vit"})
    assert (tmp_path / "sharded.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def write(folder: Path) -> list[str]:
    write_sharded(folder / f"{distributed.world_size()}.safetensors", make_sharded().state_dict(), {})
    torch.distributed.barrier()
    return [path.name for path in folder.iterdir() if path.is_file()]


@pytest.mark.parametrize("world", [2, 4])
def test_rank_0_writes_the_whole_weights(tmp_path: Path, world: int) -> None:
    assert on_ranks(world, tmp_path, write, tmp_path)[-1] == [f"{world}.safetensors"]
    saved = load_file(tmp_path / f"{world}.safetensors")
    wanted = make_net().state_dict()
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in wanted.items())


def write_columns(folder: Path) -> str:
    model, mesh = torch.nn.Linear(4, 4), init_device_mesh("cpu", (distributed.world_size(),))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    with pytest.raises(UnsupportedError) as caught:
        write_sharded(folder / "w.safetensors", model.state_dict(), {})
    return str(caught.value)


def test_weights_that_are_shared_out_otherwise_are_not_scrambled(tmp_path: Path) -> None:
    for told in on_ranks(2, tmp_path, write_columns, tmp_path):
        assert "'weight' is placed as" in told
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "word"), [({"path": 3}, "path=3"), ({"state": 3}, "state=3"), ({"metadata": "w"}, "metadata='w'")]
)
def test_what_cannot_be_written_is_named(tmp_path: Path, given: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        write_sharded(**{"path": tmp_path / "w.safetensors", "state": mixed(), "metadata": {}, **given})


def test_a_type_that_the_format_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'w' is of type torch\.complex64"):
        write_sharded(tmp_path / "w.safetensors", {"w": torch.ones(2, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())
