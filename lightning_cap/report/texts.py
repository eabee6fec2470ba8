"""Numbers as they are read on a page."""

from __future__ import annotations

import math

NOTHING = "–"


def share(value: float | None, digits: int = 2) -> str:
    """``0.4388`` -> ``43.88 %``."""
    return NOTHING if value is None else _minus(f"{100 * value:.{digits}f} %") if math.isfinite(value) else f"{value}"


def number(value: float | None, style: str = ".4g") -> str:
    """Four digits, or another style."""
    return NOTHING if value is None else _minus(f"{value:{style}}")


def _minus(text: str) -> str:
    """With the sign that is as wide as a plus."""
    return f"−{text[1:]}" if text.startswith("-") else text


def is_share(metric: str) -> bool:
    """Whether a metric is told in per cent: an accuracy."""
    return "acc" in metric.lower()


def metric_text(metric: str, value: float | None) -> str:
    """A metric's value: accuracies in per cent."""
    return share(value) if is_share(metric) else number(value)


def change_text(metric: str, change: float | None) -> str:
    """A metric's change, with its sign: of accuracies in percentage points."""
    if change is None:
        return NOTHING
    if not is_share(metric):
        return _minus(f"{change:+.3g}")
    return _minus(f"{100 * change:+.2f}") if abs(change) >= 5e-5 else "0.00"


def change_unit(metric: str) -> str:
    """Of `change_text`, for a header: ``" (points)"`` for accuracies."""
    return " (points)" if is_share(metric) else ""


def size(number_of_bytes: int | None) -> str:
    """``1.26 MB``."""
    if number_of_bytes is None:
        return NOTHING
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number_of_bytes >= unit:
            return f"{number_of_bytes / unit:.3g} {letter}B"
    return f"{number_of_bytes} B"


def count(value: float | None) -> str:
    """``5.7 M``."""
    if value is None:
        return NOTHING
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    """``0.42 s``, ``12.3 s`` or ``3 min 20 s``."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
