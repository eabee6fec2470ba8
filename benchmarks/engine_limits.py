"""Least arithmetic and traffic of each phase of our event, what the machine needs for that, and the fraction reached."""

from __future__ import annotations

import math
from typing import Any

from engine_cases import SPARSITIES
from engine_elimination import flops


def work_of(B: int, event: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Least flops and bytes of each phase of our event on the CPU, with half of each symmetric block.

    Accumulate: one multiply-add an entry and row; the sums read and written once a row chunk, the rows read. Solve: factor
    ``B³/3``, invert ``2B³/3``, eliminate ``B³/3``; the sums read. Results: Cholesky of each kept part and two triangular solves.
    """
    K, N = event["blocks"], event["rows"]
    half = 4 * K * B * (B + 1) // 2
    kept = event["kept"]
    return {
        "accumulate": (N * K * B * (B + 1), 2 * half * math.ceil(N / event["row_chunk"]) + 4 * N * K * B),
        "solve": (K * (B**3 + flops(B, B)["needed"]), half),
        "results": (sum(cubes / 3 + 2 * squares for squares, cubes in kept), half * len(SPARSITIES)),
    }


def limit_lines(block_size: int, events: dict[str, Any], machine_limits: dict[str, Any], threads: int) -> list[str]:
    """A table: each phase of our event, the machine's limit for it, and the fraction reached."""
    lines = [
        "| phase of our event | seconds | Gflop | GB moved | the machine's limit | bound by | reached |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    bandwidth = machine_limits["copy_gb_s"][str(threads)]
    for kind, title in (("well", "float32"), ("ill", "float64")):
        ours = events[kind]["ours"]
        for phase, (count, moved) in work_of(block_size, ours).items():
            dtype = "float32" if phase == "accumulate" else title
            compute = count / 1e9 / machine_limits["gflops"][dtype][str(threads)]
            memory = moved / 1e9 / bandwidth
            bound, seconds = max(compute, memory), ours["phases"][phase]
            ours.setdefault("limits", {})[phase] = {
                "flops": count,
                "bytes": moved,
                "seconds": bound,
                "reached": bound / seconds,
            }
            lines.append(
                f"| {phase}, {title} | {seconds:.3f} | {count / 1e9:.1f} | {moved / 1e9:.2f} | {bound:.3f} s | "
                f"{'arithmetic' if compute >= memory else 'memory'} | {100 * bound / seconds:.0f} % |"
            )
    return lines


def gpu_limit_lines(found: dict[str, Any], machine_limits: dict[str, Any]) -> list[str]:
    """The same for the GPU's phases, all in float32."""
    phases, gpu = found["phases"], machine_limits["gpu"]
    if "error" in phases or gpu is None:
        return []
    K, B, N = phases["blocks"], phases["block_size"], phases["rows"]
    work = {
        "accumulate": (2 * N * K * B * B, 2 * 4 * K * B * B * math.ceil(N / phases["row_chunk"])),
        "factor": (K * B**3, 2 * 4 * K * B * B),
        "eliminate": (K * flops(B, B)["full rows"], 4 * K * B * B),
    }
    lines = [
        "| phase on the GPU | seconds | Gflop | GB moved | the machine's limit | reached |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for phase, (count, moved) in work.items():
        seconds = phases["seconds"][phase]
        bound = max(count / 1e9 / gpu["gflops"]["float32"], moved / 1e9 / gpu["copy_gb_s"])
        phases.setdefault("limits", {})[phase] = {
            "flops": count,
            "bytes": moved,
            "seconds": bound,
            "reached": bound / seconds,
        }
        lines.append(
            f"| {phase} | {seconds:.3f} | {count / 1e9:.0f} | {moved / 1e9:.0f} | {bound:.3f} s | {100 * bound / seconds:.0f} % |"
        )
    return lines
