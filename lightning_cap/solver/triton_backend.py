"""OBS elimination on the GPU: launches the kernels of `lightning_cap.kernels.triton`."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cap.kernels.compiling import telling

#: Largest padded block whose ``H`` is kept in registers.
_REGISTER_BLOCK = 64
#: Registers a thread that the left-looking kernel may use; left alone, ptxas spills some to run more programs side by side.
_MAX_REGISTERS = 128
_MOST_WARPS = 8
_TILE = 64  # places that are summed at a time: a block of 192 takes three, of 256 four
_EVERY = 32  # removals after which the places close up
_STATE_ROWS = 5


@dataclass(frozen=True)
class Launch:
    """Which kernel solves blocks of a size, and its compile-time constants.

    Attributes:
        in_registers: `eliminate_in_registers`, else `eliminate_left_looking`.
        constants: The kernel's compile-time arguments.
        num_warps: Warps of one program.
    """

    in_registers: bool
    constants: dict[str, int | float]
    num_warps: int

    @classmethod
    def choose(cls, block_size: int, dtype: torch.dtype, in_registers: bool | None = None) -> Launch:
        """For blocks of ``block_size`` in float32 or float64; ``in_registers`` overrules what is best."""
        B, words = block_size, dtype.itemsize // 4
        P = max(16, 1 << (B - 1).bit_length())
        constants: dict[str, int | float] = {"B": B, "P": P, "LARGEST": torch.finfo(dtype).max}
        if P <= _REGISTER_BLOCK if in_registers is None else in_registers:
            num_warps = _between_one_and(_MOST_WARPS, P * P * words // 2048)  # 64 registers a thread for H
            return cls(True, constants, num_warps)
        num_warps, C = _between_one_and(_MOST_WARPS, P // 32), min(_TILE, P)
        entries = 256 * num_warps // words  # of a tile: 8 registers a thread
        constants |= {"STRIDE": -(-B // _EVERY) * _EVERY, "C": C, "T": max(1, entries // C)}
        constants |= {"EVERY": min(_EVERY, C), "ROWS": max(1, entries // P)}
        return cls(False, constants, num_warps)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        # fusion is spelt out because its default differs between versions of triton
        told: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        return told if self.in_registers else {**told, "maxnreg": _MAX_REGISTERS}

    def columns_bytes(self, dtype: torch.dtype) -> int:
        """Most bytes of the pivot columns that a left-looking program reads in a step; fewer before and after.

        A column is as long as the weights that are left, so that this is little more than a quarter of a block.
        """
        B, every = int(self.constants["B"]), int(self.constants["EVERY"])
        return max(min(B, B - left + every) * left for left in range(every, B + every, every)) * dtype.itemsize

    def programs(self, blocks: int, dtype: torch.dtype, device: torch.device) -> int:
        """Left-looking programs that run side by side, each on its own scratch and one block after another.

        As many as the registers of a multiprocessor are enough for, if its cache or its share of the L2 cache holds all their
        columns; but at least two, so that one computes while the other waits. Two of 192 in float32 have 96 KiB at most: that
        is more than a share of 73 KiB (A6000: 84 share 6 MiB), where the L1 cache of 128 KiB has room for them, and about all
        of a T4's share (102 KiB, which the blocks themselves pass through too). In float64 it is twice that, and there some
        is read from memory.
        """
        if device.type != "cuda":
            return min(blocks, 2)
        properties = torch.cuda.get_device_properties(device)
        count = properties.multi_processor_count
        # shared memory is the part of the L1 cache's memory that can be asked for; older versions of torch tell neither size
        own = getattr(properties, "shared_memory_per_multiprocessor", 0)
        cache = max(own, getattr(properties, "L2_cache_size", 0) // count)
        resident = 65536 // (_MAX_REGISTERS * 32 * self.num_warps)
        return min(blocks, count * max(2, min(resident, cache // self.columns_bytes(dtype))))


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``; None if they can.

    Under ``TRITON_INTERPRET=1``, set before the first use, they run anywhere, slowly.
    """
    try:
        if _interpreted():
            return None
    except ImportError as error:
        return f"triton is not installed, or broken ({error})"
    if device.type != "cuda":
        return (
            f"its kernels run on CUDA devices, the weights are on {device} (TRITON_INTERPRET=1 interprets them there)"
        )
    if torch.version.hip is not None:
        return "its kernels are untested on AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, triton needs 7.0 or more"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "triton needs a C compiler to launch kernels: install gcc or clang, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "triton needs Python.h to launch kernels: install Python's development files (python3-dev)"
    return None


def eliminate_triton(
    inverse: Tensor,
    floor: Tensor,
    weights: Tensor,
    alive: Tensor,
    group: int,
    keep: int,
    in_registers: bool | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove weights one at a time in every block, least marginal loss first; `eliminate_left_looking` of torch, compiled.

    A weight may be pruned while more than ``keep`` of its ``group`` consecutive weights are alive. What ``inverse``, ``floor``
    and ``weights`` hold for dead weights does not matter. Nothing is changed in place.

    Args:
        inverse: ``H0 = F_AA⁻¹``, ``(k, B, B)`` float32 or float64.
        floor: ``(k, B)`` lower bound of every ``H_pp`` to come, ``1 / F_pp``; guards against cancellation.
        weights: ``(k, B)``.
        alive: ``(k, B)`` bool.
        group: Weights in a group, 1 for unstructured; divides ``B``.
        keep: How many of a group stay, 0 for unstructured.
        in_registers: Which kernel; by default whichever suits ``B``.
        programs: How many programs the left-looking kernel is run with; by default a few a multiprocessor.

    Returns:
        ``rank`` ``(k, B)`` int32, the step at which each weight is pruned, ``B`` if never, and the marginal losses by step
        ``(k, B)``, dtype of ``inverse``, infinite past the block's last step.
    """
    from lightning_cap.kernels import triton as kernels

    k, B = weights.shape
    dtype, device = inverse.dtype, inverse.device
    rank = torch.full((k, B), B, dtype=torch.int32, device=device)
    losses = torch.full((k, B), torch.inf, dtype=dtype, device=device)
    if k == 0:
        return rank, losses
    launch = Launch.choose(B, dtype, in_registers)
    given = inverse.contiguous(), *(t.to(dtype).contiguous() for t in (floor, weights)), alive.contiguous()
    args: list[Any] = [*given[:3], given[3].view(torch.uint8), rank, losses]
    options = {**launch.constants, **launch.options}
    with torch.cuda.device_of(inverse), telling(kernels.ASTSource):
        if launch.in_registers:
            kernels.eliminate_in_registers[(k,)](*args, group, keep, **options)
        else:
            count = programs or launch.programs(k, dtype, device)
            shape = count, _STATE_ROWS + B, int(launch.constants["STRIDE"])
            scratch = torch.empty(shape, dtype=dtype, device=device)
            kernels.eliminate_left_looking[(count,)](*args, scratch, k, group, keep, **options)
    return rank, losses


def _interpreted() -> bool:
    """Whether the kernels were set up for triton's interpreter."""
    from triton.runtime import JITFunction

    from lightning_cap.kernels import triton as kernels

    return not isinstance(kernels.eliminate_in_registers, JITFunction)


def _between_one_and(most: int, wanted: int) -> int:
    return max(1, min(most, wanted))
