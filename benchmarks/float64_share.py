"""How many blocks were solved in float64, from the statistics of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def float64_share(runs: Sequence[Mapping[str, Any]]) -> str:
    """The share of blocks over all runs in percent; empty for methods without blocks."""
    found = [run["stats"] for run in runs if "blocks_float64" in run["stats"]]
    blocks = sum(stats["blocks"] for stats in found)
    return f"{100 * sum(stats['blocks_float64'] for stats in found) / blocks:.1f} %" if blocks else ""
