from __future__ import annotations

import pytest
import torch

from lightning_cap.fisher.row_buffers import StagedRowBuffer


def test_an_error_in_the_adding_thread_reaches_the_caller() -> None:
    rows = StagedRowBuffer((2, 1, 4), torch.device("cpu"))

    def broken(_: torch.Tensor) -> None:
        raise RuntimeError("no more")

    rows.append(2, lambda out, first: out.fill_(1.0), broken)
    with pytest.raises(RuntimeError, match="no more"):
        rows.flush(broken)
