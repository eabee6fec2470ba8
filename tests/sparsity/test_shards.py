"""Blocks of sharded targets on 1, 2 and 4 gloo processes: each is owned once, and comes and goes whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.shards import BlockShards
from lightning_cap.sparsity.targets import Targets, measured_sparsity
from lightning_cap.utilities import distributed, sharded
from tests.support.processes import on_ranks
from tests.support.sharding import NAMES, make_net, make_sharded

LAYOUTS: dict[str, dict[str, Any]] = {
    "blocks": {"block_size": 32},
    "larger than shards": {"block_size": 700},
    "groups": {"block_size": 32, "group_size": 4},
    "by row": {"block_size": 16, "by_row": True},
}


def move_blocks() -> dict[str, Any]:
    """Every layout on this rank."""
    targets, plain = Targets.from_model(make_sharded(), include=NAMES), Targets.from_model(make_net(), include=NAMES)
    out: dict[str, Any] = {}
    for case, settings in LAYOUTS.items():
        names = NAMES[:1] if "group_size" in settings else NAMES
        some = Targets({name: targets[name] for name in names})
        whole = Targets({name: plain[name] for name in names})
        layout = whole.blocks(**settings)
        shards = BlockShards(some, layout)
        positions = shards.own.positions
        wanted = layout.pack(whole.weights(), torch.float32)
        packed = shards.pack(some.weights(), torch.float32)
        masks = {name: sharded.as_shard(sharded.local(w) > 0, w) for name, w in some.weights().items()}
        back = shards.unpack(packed)
        rank, world = distributed.rank(), distributed.world_size()
        rows = {
            n: torch.randn(world, 2, *s, generator=torch.Generator().manual_seed(2)) for n, s in layout.shapes.items()
        }
        exchanged = {n: shards.exchange(n, r[rank], [2] * world) for n, r in rows.items()}
        all_rows = layout.pack_rows({n: r.flatten(0, 1) for n, r in rows.items()}, torch.float32)
        out[case] = {
            "positions": positions.tolist(),
            "of": layout.num_blocks,
            "packed": torch.equal(packed, wanted[positions]),
            "masks": torch.equal(
                shards.pack(masks, torch.bool),
                layout.pack({n: w > 0 for n, w in whole.weights().items()}, torch.bool)[positions],
            ),
            "back": all(torch.equal(sharded.local(back[n]), sharded.local(w)) for n, w in some.weights().items()),
            "bools back": all(
                torch.equal(sharded.local(m), sharded.local(masks[n]))
                for n, m in shards.unpack(shards.pack(masks, torch.bool)).items()
            ),
            "rows": torch.equal(shards.own.pack_rows(exchanged, torch.float32), all_rows[:, positions]),
        }
    out["masks"] = _mask_away(targets, plain)
    return out


def _mask_away(targets: Targets, plain: Targets) -> dict[str, Any]:
    """Masks of sharded weights do what those of whole ones do."""
    masks, wanted = MaskSet(targets), MaskSet(plain)
    wanted.update({name: weight > 0 for name, weight in plain.weights().items()})
    masks.update({name: weight > 0 for name, weight in plain.weights().items()})  # of whole ones
    again = MaskSet(targets)
    again.load_state_dict(masks.state_dict())
    for weight in targets.values():
        weight.grad = sharded.as_shard(torch.ones_like(sharded.local(weight)), weight)
    optimizer = torch.optim.SGD(list(targets.values()), lr=1e-3, momentum=0.9)
    optimizer.step()
    again.apply_to_gradients()
    again.apply_to_weights()
    again.apply_to_optimizer(optimizer)
    gone = {name: ~sharded.local(mask) for name, mask in again.items()}
    momenta = {name: sharded.local(optimizer.state[w]["momentum_buffer"]) for name, w in targets.items()}
    states = masks.state_dict(), wanted.state_dict()
    return {
        "state": all(torch.equal(states[0][name]["bits"], states[1][name]["bits"]) for name in states[1]),
        "sparsity": (again.sparsity(), again.global_sparsity) == (wanted.sparsity(), wanted.global_sparsity),
        "weights": not any(bool(sharded.local(w)[gone[name]].any()) for name, w in targets.weights().items()),
        "gradients": not any(
            bool(sharded.local(w.grad)[gone[name]].any()) for name, w in targets.items() if w.grad is not None
        ),
        "momentum": not any(bool(momentum[gone[name]].any()) for name, momentum in momenta.items()),
        "measured": abs(measured_sparsity(targets) - wanted.global_sparsity) < 0.02,
        "lifted": sum(int(sharded.local(back).sum()) for back in again.unmask_all().values())
        == sum(int(some.sum()) for some in gone.values()),
    }


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(request.param, tmp_path_factory.mktemp("blocks"), move_blocks)


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_block_has_one_owner_who_has_all_of_it(found: list[dict[str, Any]], case: str) -> None:
    owned = [position for own in found for position in own[case]["positions"]]
    assert sorted(owned) == list(range(found[0][case]["of"]))
    for own in found:
        for what in ("packed", "masks", "back", "bools back", "rows"):
            assert own[case][what], what


def test_masks_of_shards_do_what_masks_of_whole_weights_do(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert all(own["masks"].values()), own["masks"]


def test_whole_weights_have_no_shards() -> None:
    targets = Targets.from_model(make_net(), include=NAMES)
    with pytest.raises(ConfigError, match="they are not sharded"):
        BlockShards(targets, targets.blocks(32))
