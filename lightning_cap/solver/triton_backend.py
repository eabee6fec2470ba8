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
#: Scratch of the programs that share a multiprocessor; all of it together then fits into the L2 cache.
_SCRATCH_BYTES = 320 * 1024
_MOST_WARPS = 8


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
            return cls(
                True, constants, _between_one_and(_MOST_WARPS, P * P * words // 2048)
            )  # 64 registers a thread for H
        num_warps = _between_one_and(_MOST_WARPS, P // 32)
        tile = max(1, 1024 * num_warps // (words * P))  # 32 registers a thread for the tile
        return cls(False, {**constants, "STRIDE": (B + 7) // 8 * 8, "T": tile}, num_warps)

    def programs(self, blocks: int, dtype: torch.dtype, device: torch.device) -> int:
        """Left-looking programs that run side by side, each on its own scratch and one block after another."""
        if device.type != "cuda":
            return min(blocks, 2)
        own = int(self.constants["B"] * self.constants["STRIDE"]) * dtype.itemsize
        each = max(2, min(64 // self.num_warps, _SCRATCH_BYTES // own))
        return min(blocks, each * torch.cuda.get_device_properties(device).multi_processor_count)


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
    rank = torch.empty(k, B, dtype=torch.int32, device=device)
    losses = torch.empty(k, B, dtype=dtype, device=device)
    if k == 0:
        return rank, losses
    launch = Launch.choose(B, dtype, in_registers)
    given = inverse.contiguous(), *(t.to(dtype).contiguous() for t in (floor, weights)), alive.contiguous()
    args: list[Any] = [*given[:3], given[3].view(torch.uint8), rank, losses]
    # fusion is spelt out because its default differs between versions of triton
    options = {**launch.constants, "num_warps": launch.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    with torch.cuda.device_of(inverse), telling(kernels.ASTSource):
        if launch.in_registers:
            kernels.eliminate_in_registers[(k,)](*args, group, keep, **options)
        else:
            count = programs or launch.programs(k, dtype, device)
            scratch = torch.empty(count, B, int(launch.constants["STRIDE"]), dtype=dtype, device=device)
            kernels.eliminate_left_looking[(count,)](*args, scratch, k, group, keep, **options)
    return rank, losses


def _interpreted() -> bool:
    """Whether the kernels were set up for triton's interpreter."""
    from triton.runtime import JITFunction

    from lightning_cap.kernels import triton as kernels

    return not isinstance(kernels.eliminate_in_registers, JITFunction)


def _between_one_and(most: int, wanted: int) -> int:
    return max(1, min(most, wanted))
