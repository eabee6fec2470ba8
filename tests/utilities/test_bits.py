from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cap.utilities.bits import pack_bits, unpack_bits


@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=60, deadline=None)
def test_round_trip(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-len(values) // 8),)
    assert torch.equal(unpack_bits(bits, len(values)), mask)
    assert [int(bits[i // 8]) >> i % 8 & 1 for i in range(len(values))] == [int(v) for v in values]


def test_rows_and_strided_masks() -> None:
    mask = torch.rand(5, 7, 13, generator=torch.Generator().manual_seed(0)) > 0.5
    assert pack_bits(mask).shape == (5, 7, 2)
    for view in (mask, mask.transpose(0, 2), mask.flatten(), mask[:, ::2]):
        assert torch.equal(unpack_bits(pack_bits(view), view.shape[-1]), view)
