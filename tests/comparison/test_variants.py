from __future__ import annotations

from lightning_cap.comparison.variants import make_variants
from tests.support.toy import cap


def test_labels_tell_values_apart() -> None:
    variants = make_variants({"CAP": cap()}, [0], {"damp": [0.1, 0.1000001, 1e-8], "block_size": [8]}, 1)
    assert [v.label for v in variants] == [
        "CAP", "CAP damp=0.1", "CAP damp=0.1000001", "CAP damp=1e-08", "CAP block_size=8",
    ]  # fmt: skip
    assert len({v.slug for v in variants}) == 5
