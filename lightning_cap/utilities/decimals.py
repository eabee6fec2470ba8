"""Numbers as they are written: 0.29 is 29/100, not the binary number next to it."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real
from typing import cast

_HALF = Fraction(1, 2)


def as_written(number: float) -> Fraction:
    """The number that the shortest decimals of ``number`` say, which is what a person has written; NumPy's scalars too."""
    return Fraction(str(number))


def plain_float(number: object) -> float:
    """A real number of any type as a float, by its decimals: ``np.float32(0.3)`` is 0.3."""
    return float(as_written(cast(float, number))) if isinstance(number, Real) else float(cast(float, number))


def round_share(share: float, total: int) -> int:
    """The whole number that a share of a total means: exactly ``floor(share · total + 0.5)``, so that 0.29 of 50 is 15."""
    return math.floor(as_written(share) * total + _HALF)
