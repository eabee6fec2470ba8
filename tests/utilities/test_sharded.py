"""What processes hold of sharded tensors, on 1, 3 and 4 gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.errors import CAPError, UnsupportedError
from lightning_cap.utilities import distributed, sharded
from tests.support.processes import on_ranks
from tests.support.sharding import make_net, make_sharded

SIZES = [1, 3, 4]


def look_at_shards() -> dict[str, Any]:
    """What this process holds, and whether every way back gives the whole."""
    plain, model = dict(make_net().named_parameters()), make_sharded()
    out: dict[str, Any] = {}
    for name, weight in model.named_parameters():
        own, whole = sharded.shard_range(weight), plain[name].detach()
        part = sharded.local(weight)
        again = sharded.as_shard(part.clone(), weight)
        out[name] = {
            "range": own,
            "ranges": sharded.shard_ranges(weight),
            "sharded": sharded.is_sharded(weight),
            "part": torch.equal(part.reshape(-1), whole.reshape(-1)[own.start : own.stop]),
            "memory": part.data_ptr() == sharded.local(weight).data_ptr(),
            "cut": torch.equal(sharded.part_of(whole, weight), part),
            "whole": torch.equal(sharded.whole(again), whole) and again.shape == whole.shape,
            "bool": torch.equal(sharded.whole(sharded.as_shard(part > 0, weight)), whole > 0),
        }
    with torch.no_grad():
        model(torch.zeros(1, 1, 4, 4))
    before = sharded.is_sharded(model[0].weight)
    weight = sharded.parameter(model, model[0], "weight")
    out["left whole"] = before, sharded.is_sharded(weight), sharded.is_sharded(model[0].weight)
    out["units"] = len(sharded.units(model))
    out["refused"] = _refusals()
    return out


def _refusals() -> list[str]:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    world = distributed.world_size()
    line, plane = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world, 1))
    weight = torch.ones(8, 8)
    told = []
    for mesh, placements in ((line, [Shard(1)]), (line, [Replicate()]), (plane, [Shard(0), Replicate()])):
        with pytest.raises(UnsupportedError) as caught:
            sharded.check_sharding("fc.weight", distribute_tensor(weight, mesh, placements))
        told.append(str(caught.value))
    elsewhere = DTensor.from_local(torch.ones(4, 8, device="meta"), line, [Shard(0)], run_check=False)
    with pytest.raises(UnsupportedError) as caught:
        sharded.check_sharding("fc.weight", elsewhere)
    return [*told, str(caught.value)]


@pytest.fixture(scope="module", params=SIZES)
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(request.param, tmp_path_factory.mktemp("shards"), look_at_shards)


def test_processes_hold_whole_rows_one_after_the_other(found: list[dict[str, Any]]) -> None:
    for name, weight in make_net().named_parameters():
        ranges = found[0][name]["ranges"]
        assert [own[name]["range"] for own in found] == ranges
        assert [i for r in ranges for i in r] == list(range(weight.numel()))
        rows = weight.detach().reshape(len(weight), -1).chunk(len(found))
        assert [len(r) for r in ranges if len(r)] == [chunk.numel() for chunk in rows]
        for own in found:
            assert own[name]["ranges"] == ranges
            assert all(own[name][what] for what in ("sharded", "part", "memory", "cut", "whole", "bool")), name


def test_units_give_their_whole_weights_back(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["left whole"] == (False, True, True)
        assert own["units"] == 3


def test_other_ways_to_shard_are_refused_with_the_way_out(found: list[dict[str, Any]]) -> None:
    columns, copies, plane, elsewhere = found[0]["refused"]
    assert "'fc.weight' is kept on meta, while its processes meet on cpu (CPUOffloadPolicy?)" in elsewhere
    assert "'fc.weight' is placed as" in columns
    assert "'fc.weight' is placed as" in copies
    assert "mesh of 2 dimensions" in plane
    assert all("fully_shard" in told for told in (columns, copies, plane))


def test_plain_tensors_are_held_by_all() -> None:
    weight = torch.randn(3, 4)
    assert not sharded.is_sharded(weight)
    assert sharded.local(weight) is weight
    assert sharded.whole(weight) is weight
    assert sharded.as_shard(weight, weight) is weight
    assert sharded.shard_ranges(weight) == [range(12)]
    assert sharded.units(nn.Linear(2, 2)) == []
    with pytest.raises(CAPError, match="tensor=None"):
        sharded.shard_ranges(None)  # type: ignore[arg-type]
