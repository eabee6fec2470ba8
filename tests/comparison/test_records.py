from __future__ import annotations

from pathlib import Path

import torch

from lightning_cap.comparison.records import intersection_over_union, load_masks, save_masks


def test_intersection_over_union_by_hand(tmp_path: Path) -> None:
    one = {"a": torch.tensor([1, 1, 0, 0]).bool(), "b": torch.tensor([[1], [0]]).bool()}
    two = {"a": torch.tensor([1, 0, 1, 0]).bool(), "b": torch.tensor([[1], [0]]).bool()}
    assert intersection_over_union(one, two) == 2 / 4
    assert intersection_over_union(one, one) == 1.0
    save_masks(tmp_path / "m.safetensors", one)
    assert all(torch.equal(mask, one[name]) for name, mask in load_masks(tmp_path / "m.safetensors").items())
