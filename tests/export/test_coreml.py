from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cap.errors import ExportError
from lightning_cap.export import CoreML
from tests.support.exporting import images, small_convnet


@pytest.mark.slow
def test_weights_are_stored_sparse_and_compared(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    exporter, model = CoreML(), small_convnet()
    record = exporter.export(model, tmp_path / "m.mlpackage", images())
    assert record.weights == record.zeros_equal == 4
    held = {
        value.numel(): float((value == 0).float().mean())
        for value in exporter.stored(tmp_path / "m.mlpackage").values()
    }
    assert held[64 * 256] == pytest.approx(0.6, abs=0.05)
    weights = tmp_path / "m.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert weights.stat().st_size < 0.7 * 2 * (64 * 256)  # of 16 bits
    if exporter.runs_here():
        assert record.difference is not None
    else:
        assert (record.inputs, record.difference, record.tolerance) == (0, None, None)
        with pytest.raises(ExportError, match="macOS alone"):
            exporter.runner(tmp_path / "m.mlpackage")
