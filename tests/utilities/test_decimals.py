from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_cap.utilities.decimals import as_written, plain_float, round_share


@given(st.decimals(0, 1, places=4), st.integers(0, 10**9))
def test_a_share_is_rounded_as_its_decimals_say(share: Decimal, total: int) -> None:
    expected = int((share * total).to_integral_value(ROUND_HALF_UP))
    assert round_share(float(share), total) == expected
    assert round_share(np.float64(share), total) == expected


@given(st.integers(0, 1000), st.integers(0, 10**6))
def test_half_precision_scalars_mean_their_decimals(thousandths: int, total: int) -> None:
    assert round_share(np.float32(thousandths / 1000), total) == round_share(thousandths / 1000, total)


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_any_float_is_within_a_half_and_kept(share: float, total: int) -> None:
    assert abs(round_share(share, total) - Fraction(share) * total) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert plain_float(share) == share


@pytest.mark.parametrize(
    ("share", "total", "expected"), [(0.29, 50, 15), (0.57, 50, 29), (0.5, 1, 1), (0, 9, 0), (1, 9, 9)]
)
def test_by_hand(share: float, total: int, expected: int) -> None:
    assert round_share(share, total) == expected


def test_numbers_of_other_types() -> None:
    assert as_written(Fraction(1, 3)) == Fraction(1, 3)  # type: ignore[arg-type]
    assert as_written(1e-9) == Fraction(1, 10**9)
    assert plain_float(np.float32(0.3)) == plain_float(np.float16(0.3)) == 0.3
    assert plain_float(np.int64(3)) == 3.0
