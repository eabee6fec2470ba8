from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cap.errors import GradientError
from lightning_cap.fisher import row_buffers
from lightning_cap.fisher.blocks import EmpiricalFisher, fisher_bytes
from lightning_cap.fisher.row_buffers import StagedRowBuffer
from lightning_cap.sparsity.block_layout import BlockLayout

SHAPES = {"a": (3, 4), "conv": (2, 4, 2, 2), "one": (1, 4)}


CPU = torch.device("cpu")


def _rows(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {name: torch.randn(n, *shape, generator=generator) for name, shape in SHAPES.items()}


def _chunks(rows: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    pieces = {name: r.split(sizes) for name, r in rows.items()}
    return [{name: p[i] for name, p in pieces.items()} for i in range(len(sizes))]


def _fisher(chunks: list[dict[str, torch.Tensor]], layout: BlockLayout, **settings: Any) -> torch.Tensor:
    fisher = EmpiricalFisher(layout, CPU, **settings)
    for chunk in chunks:
        fisher.update(chunk)
    blocks = fisher.finish()
    return blocks[torch.arange(len(blocks))]


@pytest.mark.parametrize(("block_size", "group"), [(1, 1), (5, 1), (8, 1), (8, 4), (64, 4)])
@pytest.mark.parametrize("n", [1, 31, 32, 70])
@pytest.mark.parametrize("storage", ["full", "packed"])
def test_is_the_mean_outer_product_of_each_block(storage: str, block_size: int, group: int, n: int) -> None:
    layout = BlockLayout(SHAPES, block_size, group)
    rows = _rows(n)
    expected = torch.zeros(layout.num_blocks, block_size, block_size, dtype=torch.float64)
    for i in range(n):
        g = layout.pack({name: r[i] for name, r in rows.items()}, torch.float64)
        expected += torch.einsum("ki,kj->kij", g, g) / n
    fisher = _fisher([rows], layout, storage=storage)
    torch.testing.assert_close(fisher.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(fisher, fisher.mT)
    padding = ~layout.valid()
    assert not fisher[padding].any()


@pytest.mark.parametrize("storage", ["full", "packed"])
def test_does_not_depend_on_how_rows_are_chunked(storage: str) -> None:
    layout = BlockLayout(SHAPES, 8)
    rows = _rows(70)
    one = _fisher([rows], layout, storage=storage)
    for sizes in ([1] * 70, [33, 37], [64, 6], [5, 0, 65]):
        assert torch.equal(_fisher(_chunks(rows, sizes), layout, storage=storage), one)


@pytest.mark.parametrize("storage", ["full", "packed"])
@pytest.mark.parametrize(("block_size", "group"), [(3, 1), (8, 1), (8, 4), (64, 1)])
def test_some_of_the_blocks(storage: str, block_size: int, group: int) -> None:
    layout = BlockLayout(SHAPES, block_size, group)
    rows = _rows(70)
    whole = _fisher([rows], layout, storage=storage)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        chosen = (torch.rand(layout.num_blocks, generator=generator) < 0.5).nonzero().squeeze(1)
        part = _fisher(_chunks(rows, [10, 60]), layout, storage=storage, shares=[chosen])
        assert torch.equal(part, whole[chosen])


def test_rows_copied_to_main_memory_by_turns_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout(SHAPES, 8)
    rows = _rows(70)
    direct = _fisher([rows], layout, row_chunk=8)
    staged = EmpiricalFisher(
        layout, torch.device("meta"), row_chunk=8, storage_device=CPU
    )  # whatever is not where the sums are
    assert isinstance(staged._rows, StagedRowBuffer)
    for chunk in _chunks(rows, [3, 30, 37]):
        staged.update(chunk)
    blocks = staged.finish()
    blocks.device = CPU
    assert torch.equal(blocks[torch.arange(len(blocks))], direct)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_rows_are_copied_without_the_threads_of_torch() -> None:
    """They wait for one another after each copy of a target of a row: half a minute on busy cores, where rows come one by one."""
    fisher = EmpiricalFisher(BlockLayout(SHAPES, 8), CPU, row_chunk=4)
    with _Operators() as operators:
        for chunk in _chunks(_rows(6), [1, 1, 4]):
            fisher.update(chunk)
    assert not {name for name in operators.names if name.startswith(("copy", "_to_copy", "clone", "index"))}


def test_rows_are_copied_by_several_threads_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout(SHAPES, 8)
    rows = {name: r.requires_grad_() for name, r in _rows(70).items()}
    expected = _fisher([rows], layout)
    monkeypatch.setattr(row_buffers, "_SHARED_BYTES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    fisher = _fisher([rows], layout)
    assert torch.equal(fisher, expected)
    half = _fisher([{name: r.bfloat16() for name, r in rows.items()}], layout)
    assert not half.requires_grad


def test_packed_blocks_take_half() -> None:
    for B in (1, 16, 192):
        full, packed = (fisher_bytes(10, B, storage, CPU) for storage in ("full", "packed"))
        assert full == 10 * B * B * 4
        assert packed == 10 * B * (B + 1) // 2 * 4
    assert fisher_bytes(10, 16, "auto", CPU) == fisher_bytes(10, 16, "packed", CPU)
    assert fisher_bytes(10, 16, "auto", torch.device("cuda")) == fisher_bytes(10, 16, "full", CPU)


def test_half_precision_rows_and_autocast() -> None:
    layout = BlockLayout(SHAPES, 8)
    rows = {name: r.bfloat16() for name, r in _rows(20).items()}
    expected = _fisher([{name: r.float() for name, r in rows.items()}], layout)
    with torch.autocast("cpu", torch.bfloat16):
        fisher = _fisher([rows], layout)
    assert torch.equal(fisher, expected)


def test_rows_with_a_graph_leave_none_behind() -> None:
    fisher = _fisher([{k: v.requires_grad_() for k, v in _rows(40).items()}], BlockLayout(SHAPES, 8))
    assert not fisher.requires_grad


def test_bad_gradients_are_refused_by_name() -> None:
    layout = BlockLayout(SHAPES, 8)
    with pytest.raises(GradientError, match="no gradient row"):
        _fisher([], layout)
    with pytest.raises(GradientError, match=r"rows of 'conv' are missing"):
        _fisher([{"a": torch.zeros(2, 3, 4), "one": torch.zeros(2, 1, 4)}], layout)
    with pytest.raises(GradientError, match=r"rows of 'a' have shape \(4, 3\), its weight has \(3, 4\)"):
        _fisher([{**_rows(2), "a": torch.zeros(2, 4, 3)}], layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_gradients_beyond_float32_are_refused(value: float) -> None:
    rows = _rows(3)
    rows["conv"][1, 0, 2, 1, 1] = value
    with pytest.raises(GradientError, match="1 targets, first 'conv', are not finite"):
        _fisher([rows], BlockLayout(SHAPES, 8))
