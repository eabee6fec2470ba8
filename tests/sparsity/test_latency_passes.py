from __future__ import annotations

import itertools

import pytest

from lightning_cap.sparsity.latency_parts import Part
from lightning_cap.sparsity.latency_passes import cell_of, plan_passes, widths_of


@pytest.mark.parametrize(
    ("size", "widths"),
    [(1, (1,)), (3, (1, 2, 3)), (5, (1, 2, 3, 4, 5)), (6, (1, 2, 3, 4, 6)), (12, (1, 3, 6, 9, 12)), (768, (1, 191, 383, 575, 768))],
)  # fmt: skip
def test_widths_are_one_all_and_about_the_quarters(size, widths):
    assert widths_of(size) == widths


def covered(parts: list[Part], passes: list[tuple[int, ...]]) -> set[tuple[str, tuple[int, ...]]]:
    return {(part.like, cell_of(part, counts)) for counts in passes for part in parts}


def all_cells(parts: list[Part], sizes: list[int]) -> set[tuple[str, tuple[int, ...]]]:
    return {
        (part.like, cell) for part in parts for cell in itertools.product(*(widths_of(sizes[g]) for g in part.groups))
    }


def test_blocks_alike_share_the_widths_among_them():
    sizes = [3, 768] * 12
    parts = [Part(f"{i}.attn", (2 * i,), True, "attn") for i in range(12)]
    parts += [Part(f"{i}.mlp", (2 * i + 1,), True, "mlp") for i in range(12)]
    passes = plan_passes(parts, sizes)
    assert passes[0] == tuple(sizes)
    assert len(passes) == 2
    assert covered(parts, passes) == all_cells(parts, sizes)


@pytest.mark.parametrize("num_blocks", [1, 3, 5])
def test_every_pair_of_widths_of_a_stream_and_a_block_is_there(num_blocks):
    sizes = [64] + [48] * num_blocks
    parts = [Part(f"{i}", (0, 1 + i), True, "block") for i in range(num_blocks)]
    passes = plan_passes(parts, sizes)
    assert covered(parts, passes) == all_cells(parts, sizes)
    assert len(passes) <= (5 if num_blocks == 5 else 25) + 1


def test_more_groups_around_each_other_than_the_array_has_columns():
    sizes = [7] * 8
    parts = [Part(f"{a}-{b}", (a, b), True, f"{a}-{b}") for a, b in itertools.combinations(range(8), 2)]
    passes = plan_passes(parts, sizes)
    assert covered(parts, passes) == all_cells(parts, sizes)
    assert all(1 <= count <= size for counts in passes for count, size in zip(counts, sizes, strict=True))


def test_what_is_taken_to_be_linear_needs_no_passes():
    parts = [Part("", (0, 1, 2), False, "all")]
    assert plan_passes(parts, [9, 9, 9]) == [(9, 9, 9)]
