from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightning_cap.errors import ConfigError, TargetError
from lightning_cap.sparsity.block_layout import BlockLayout

SHAPES = {"a": (5, 6), "conv": (4, 3, 3, 2), "one": (1, 1), "vector": (7,), "deep": (2, 3, 2, 1, 2)}


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 30, 31, 500])
def test_round_trip_and_padding(block_size: int) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    layout = BlockLayout(SHAPES, block_size)
    blocks = layout.pack(tensors, torch.float32)
    assert blocks.shape == (layout.num_blocks, block_size)
    assert layout.num_blocks == sum(-(-t.numel() // block_size) for t in tensors.values())
    spans = list(layout.spans.values())
    assert spans[0].start == 0
    assert spans[-1].stop == layout.num_blocks
    assert all(before.stop == after.start for before, after in pairwise(spans))
    for name, tensor in tensors.items():  # consecutive in memory order, padding zero
        flat = blocks[layout.spans[name]].flatten()
        assert torch.equal(flat[: tensor.numel()], tensor.flatten())
        assert not flat[tensor.numel() :].any()
    assert int(layout.valid().sum()) == sum(t.numel() for t in tensors.values())
    assert (
        layout.pack({k: torch.full_like(t, 3) for k, t in tensors.items()}, torch.float32) == 3 * layout.valid()
    ).all()
    back = layout.unpack(blocks)
    assert all(torch.equal(back[name], tensor) and back[name].is_contiguous() for name, tensor in tensors.items())
    back["a"].zero_()
    assert blocks[0].any()  # copies


def test_rows_and_strided_tensors() -> None:
    layout = BlockLayout(SHAPES, 4)
    rows = {name: torch.randn(3, *shape) for name, shape in SHAPES.items()}
    packed = layout.pack_rows(rows, torch.float64)
    assert packed.dtype == torch.float64
    for i in range(3):
        assert torch.equal(packed[i], layout.pack({name: r[i] for name, r in rows.items()}, torch.float64))
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in rows.items() if t.ndim > 1}
    assert torch.equal(layout.pack_rows(strided, torch.float64), packed)


def test_groups_lie_along_the_inputs_of_one_kernel_position() -> None:
    rows, inputs, H, W, m = 3, 4, 2, 3, 2
    shapes = {"conv": (rows, inputs, H, W), "linear": (rows, inputs)}
    conv = torch.arange(float(rows * inputs * H * W)).view(rows, inputs, H, W)
    linear = -torch.arange(1.0, rows * inputs + 1).view(rows, inputs)
    layout = BlockLayout(shapes, 6, m)
    blocks = layout.pack({"conv": conv, "linear": linear}, torch.float32)
    by_hand = [conv[o, i, y, x].item() for o in range(rows) for y in range(H) for x in range(W) for i in range(inputs)]
    assert blocks[layout.spans["conv"]].flatten().tolist() == by_hand
    groups = blocks.view(-1, m)
    expected = {
        tuple(conv[o, i : i + m, y, x].tolist())
        for o in range(rows)
        for i in (0, 2)
        for y in range(H)
        for x in range(W)
    }
    expected |= {tuple(linear[o, i : i + m].tolist()) for o in range(rows) for i in (0, 2)}
    assert {tuple(g.tolist()) for g in groups} == expected
    back = layout.unpack(blocks)
    assert torch.equal(back["conv"], conv)
    assert back["conv"].is_contiguous()
    assert torch.equal(back["linear"], linear)


def test_bad_blocks() -> None:
    with pytest.raises(ConfigError, match="block_size=0: give a whole number of at least 1"):
        BlockLayout({"a": (4, 4)}, 0)
    with pytest.raises(ConfigError, match=r"block_size=190 is not a multiple of the pattern's group of 4. Try 188"):
        BlockLayout({"a": (4, 4)}, 190, 4)
    with pytest.raises(ConfigError, match="Try 4"):
        BlockLayout({"a": (4, 4)}, 3, 4)
    with pytest.raises(TargetError, match=r"'odd' of shape \(4, 6\).*group of 4.*exclude=\['odd'\]"):
        BlockLayout({"a": (4, 4), "odd": (4, 6)}, 8, 4)
    with pytest.raises(TargetError, match=r"'conv' of shape \(4, 3, 2, 2\)"):  # 12 a row, but only 3 inputs
        BlockLayout({"conv": (4, 3, 2, 2)}, 8, 4)
    with pytest.raises(TargetError, match="'bias'"):
        BlockLayout({"bias": (4,)}, 8, 4)
