"""What the triton kernels take of a GPU, from compiling them; no GPU is needed.

``engine.py`` runs this file in a process of its own:

    python benchmarks/engine_kernels.py '{"block_sizes": [64, 128, 192, 256], "archs": [75, 80, 86, 90], "dtypes": ["float32"]}'

Registers, stack and shared memory are read from the machine code by the ``cuobjdump`` of triton's wheel.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_cap.solver.triton_backend import Launch

REGISTERS = 65536  # of a multiprocessor, 4 bytes each


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor holds at most (CUDA's programming guide, table of compute capabilities)."""

    gpu: str
    threads: int
    programs: int
    shared: int  # bytes that can be asked for
    reserved: int  # bytes of it that the system takes for each program


MULTIPROCESSORS = {
    75: Multiprocessor("T4", 1024, 16, 64 * 1024, 0),
    80: Multiprocessor("A100", 2048, 32, 164 * 1024, 1024),
    86: Multiprocessor("A6000", 1536, 16, 100 * 1024, 1024),
    90: Multiprocessor("H100, H200", 2048, 32, 228 * 1024, 1024),
}


def resident_programs(registers: int, shared: int, num_warps: int, on: Multiprocessor) -> int:
    """How many programs run on a multiprocessor at a time: as many as registers, shared memory and threads are enough for."""
    warp = -(-registers * 32 // 256) * 256  # registers are handed out by 256 a warp
    by_shared = on.shared // (shared + on.reserved) if shared + on.reserved else on.programs
    return min(REGISTERS // (warp * num_warps), by_shared, on.threads // (32 * num_warps), on.programs)


def is_new() -> bool:
    """Whether it is a triton later than 3.2, which comes with torch 2.6."""
    from triton.compiler import ASTSource

    return "constexprs" in inspect.signature(ASTSource).parameters


def compiled(launch: Launch, dtype: torch.dtype, arch: int) -> Any:
    """The kernel as `eliminate_triton` has it compiled when a GPU of this ``arch`` is there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_cap.kernels import triton as kernels

    kernel = kernels.eliminate_in_registers if launch.in_registers else kernels.eliminate_left_looking
    number = "*fp32" if dtype == torch.float32 else "*fp64"
    types = {"alive": "*u8", "rank": "*i32", "blocks": "i32", "group": "i32", "keep": "i32"}
    signature = {
        name: "constexpr" if name in launch.constants else types.get(name, number) for name in kernel.arg_names
    }
    aligned: Any = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    if not is_new():
        from triton.backends.compiler import AttrsDescriptor

        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        properties = {"tt.divisibility": [i for (i,) in aligned], "tt.equal_to": []}
        aligned = AttrsDescriptor.from_dict({"arg_properties": properties, "cls": AttrsDescriptor.__name__})
    source = ASTSource(kernel, signature, dict(launch.constants), aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def facts(block_size: int, dtype: torch.dtype, arch: int, in_registers: bool | None = None) -> dict[str, Any]:
    """What the kernel for a block size takes, a thread or a program, and how many programs are resident."""
    import triton

    launch = Launch.choose(block_size, dtype, in_registers)
    kernel = compiled(launch, dtype, arch)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(kernel.asm["cubin"])
        command = [tool, "-res-usage", "kernel.cubin"]
        usage = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared = int(kernel.metadata.shared)
    return {
        "block_size": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "arch": arch,
        "kernel": "registers" if launch.in_registers else "left-looking",
        "threads": 32 * launch.num_warps,
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": shared,
        "resident": resident_programs(found["REG"], shared, launch.num_warps, MULTIPROCESSORS[arch]),
        "columns_bytes": None if launch.in_registers else launch.columns_bytes(dtype),
        "new_triton": is_new(),
        "read_only_loads": ".nc." in kernel.asm["ptx"],
    }


def run(
    block_sizes: list[int], archs: list[int], dtypes: list[str], in_registers: bool | None = None
) -> list[dict[str, Any]]:
    """The facts of each kernel, type and GPU."""
    return [
        facts(B, getattr(torch, dtype), arch, in_registers) for B in block_sizes for dtype in dtypes for arch in archs
    ]


def kernel_lines(found: list[dict[str, Any]]) -> list[str]:
    """The facts as a Markdown table."""
    lines = [
        "| kernel | B | numbers | GPU | threads | registers | spilled | shared memory | columns, at most | resident |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        columns = "-" if row["columns_bytes"] is None else f"{row['columns_bytes'] / 1024:.0f} KiB"
        lines.append(
            f"| {row['kernel']} | {row['block_size']} | {row['dtype']} | sm_{row['arch']} ({MULTIPROCESSORS[row['arch']].gpu}) | "
            f"{row['threads']} | {row['registers']} | {row['spilled_bytes']} | {row['shared_bytes'] / 1024:.0f} KiB | "
            f"{columns} | {row['resident']} |"
        )
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(json.dumps({"kernels": run(**json.loads(sys.argv[1]))}))
