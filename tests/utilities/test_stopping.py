from __future__ import annotations

import pytest
import torch

from lightning_cap.utilities.memory import in_chunks
from lightning_cap.utilities.stopping import StopRequested, poll, watch


def test_work_ends_between_two_chunks_once_told() -> None:
    done: list[int] = []
    with pytest.raises(StopRequested, match="SIGTERM"), watch(lambda: "SIGTERM" if len(done) == 2 else None):
        in_chunks(torch.arange(8), 2, lambda chunk: done.append(len(chunk)))
    assert done == [2, 2]


def test_nothing_ends_where_nobody_watches() -> None:
    poll()
    with watch(lambda: None):
        poll()
    poll()
