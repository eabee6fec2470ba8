from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_cap.errors import CAPError
from lightning_cap.pruners import Magnitude
from lightning_cap.sparsity.allocation import Global
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.stopping import StopRequested
from tests.support.processes import on_ranks


def differ() -> str:
    same = {"a": torch.ones(5), "b": torch.arange(4) < 2}
    distributed.check_equal_on_all_ranks({"the weights": same, "the masks": same})
    other = {**same, "b": torch.arange(4) >= 2 - distributed.rank()}
    try:
        distributed.check_equal_on_all_ranks({"the weights": same, "the masks": other})
    except CAPError as error:
        return str(error)
    return "nothing"


def test_ranks_that_ran_apart_are_found_out(tmp_path: Path) -> None:
    for text, rank in zip(on_ranks(2, tmp_path, differ), (1, 0), strict=True):
        assert f"the masks of 1 targets, first 'b', differ between rank {1 - rank} and rank {rank}" in text


def gather_odd() -> Any:
    rank, counts = distributed.rank(), [0, 1, 0, 3]
    own = torch.full((counts[rank], 2), float(rank))
    flags = (torch.arange(36).view(4, 9) % 3 == 0)[sum(counts[:rank]) : sum(counts[: rank + 1])]
    masks = Magnitude().path(Targets({"a": torch.arange(8.0).view(2, 4)})).at(0.5).masks
    return distributed.gather_rows(own, counts), distributed.gather_rows(flags, counts), masks


def test_other_pruners_and_uneven_gathers(tmp_path: Path) -> None:
    for ones, bits, masks in on_ranks(4, tmp_path, gather_odd):
        assert ones.flatten().tolist() == [1.0] * 2 + [3.0] * 6
        assert torch.equal(bits, torch.arange(36).view(4, 9) % 3 == 0)
        assert torch.equal(
            masks["a"],
            Magnitude(allocation=Global()).path(Targets({"a": torch.arange(8.0).view(2, 4)})).at(0.5).masks["a"],
        )


def end_by(ends: dict[int, str], together: bool) -> str:
    """What a rank raises, where some are told to end and others fail."""
    how = distributed.fail_together if together else distributed.raise_on_all_ranks
    try:
        with how("The work"):
            end = ends.get(distributed.rank())
            if end == "told":
                raise StopRequested("SIGTERM")
            if end == "fails":
                raise ValueError("broken")
            if together:
                distributed.gather_objects(0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def each_end() -> list[str]:
    cases: list[dict[int, str]] = [{}, {0: "told"}, {0: "told", 1: "fails"}, {1: "fails"}]
    return [end_by(ends, together) for together in (False, True) for ends in cases]


def test_to_be_told_to_end_is_one_thing_on_all_ranks(tmp_path: Path) -> None:
    """Where another rank has failed, it is no end in good order, but that failure."""
    elsewhere = "CAPError: The work failed on another process; "
    both = f"{elsewhere}rank 0: StopRequested: SIGTERM; rank 1: ValueError: broken"
    first, second = on_ranks(2, tmp_path, each_end)
    assert first == 2 * ["nothing", "StopRequested: SIGTERM", both, f"{elsewhere}rank 1: ValueError: broken"]
    assert second == 2 * ["nothing", "StopRequested: SIGTERM", "ValueError: broken", "ValueError: broken"]
