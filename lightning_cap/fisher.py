"""The empirical Fisher in blocks (equation 3), without damp: ``(1/N) Σ g gᵀ``, shape ``(K, B, B)``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cap.errors import GradientError
from lightning_cap.linalg import full_float32
from lightning_cap.targets import BlockLayout

_ROW_CHUNK = 32
_CHUNK_FLOATS = 2**22


class EmpiricalFisher:
    """Accumulates gradient rows into Fisher blocks.

    Rows are buffered and all blocks are updated by one batched product for every ``row_chunk`` of them, so the sums are
    formed in the same order whatever the sizes of the chunks that arrive.

    Args:
        layout: Block view of the targets.
        device: Where the blocks live, ``K·B·B·4`` bytes.
        row_chunk: Rows in one update, a fixed setting (results depend on it by rounding).

    Attributes:
        count: Rows taken in so far, ``N``.
    """

    def __init__(self, layout: BlockLayout, device: torch.device, row_chunk: int = _ROW_CHUNK) -> None:
        self.layout = layout
        self.count = 0
        self._row_chunk = row_chunk
        self._sums = torch.zeros(layout.num_blocks, layout.block_size, layout.block_size, device=device)
        self._rows = torch.zeros(row_chunk, layout.num_blocks, layout.block_size, device=device)
        self._filled = 0

    @torch.no_grad()
    def update(self, chunk: Mapping[str, Tensor]) -> None:
        """Take in ``{target name: (n, *weight.shape)}`` gradient rows of any float dtype.

        Raises:
            GradientError: A target is missing in the chunk or its rows do not have the weight's shape.
        """
        for name, shape in self.layout.shapes.items():
            got = tuple(chunk[name].shape[1:]) if name in chunk else None
            if got != shape:
                raise GradientError(
                    f"gradients: the rows of {name!r} have shape {got}, its weight has {shape}. Give a chunk "
                    "{target name: (n, *weight.shape)} with every target in it."
                )
        rows = self.layout.pack_rows(chunk, torch.float32, self._sums.device)
        start = 0
        while start < rows.shape[0]:
            take = min(self._row_chunk - self._filled, rows.shape[0] - start)
            self._rows[self._filled : self._filled + take] = rows[start : start + take]
            self._filled += take
            start += take
            if self._filled == self._row_chunk:
                self._flush()
        self.count += rows.shape[0]

    @staticmethod
    def bytes(layout: BlockLayout, row_chunk: int = _ROW_CHUNK) -> int:
        """Memory of the blocks and the row buffer."""
        return 4 * layout.num_blocks * layout.block_size * (layout.block_size + row_chunk)

    def finish(self) -> Tensor:
        """The Fisher blocks ``(K, B, B)``, float32, symmetric, without damp. Ends the accumulation.

        Raises:
            GradientError: No gradient row was taken in, or one was not finite or too large to be squared in float32.
        """
        if self.count == 0:
            raise GradientError("gradients: the source gave no gradient row. Check that the calibration batches are not "
                                "empty.")  # fmt: skip
        if self._filled:
            self._flush()
        del self._rows
        self._sums.div_(self.count)
        for blocks in self._sums.split(max(1, _CHUNK_FLOATS // self.layout.block_size**2)):
            blocks.copy_((blocks + blocks.mT) / 2)  # products round their two triangles differently
        bad = ~torch.isfinite(self._sums.diagonal(dim1=-2, dim2=-1)).all(-1)
        if bool(bad.any()):
            names = [name for name, span in self.layout.spans.items() if bool(bad[span].any())]
            raise GradientError(
                f"gradients: those of {len(names)} targets, first {names[0]!r}, are not finite, or their squares are beyond "
                "float32. Leave non-finite samples out, or scale the loss down."
            )
        return self._sums

    def _flush(self) -> None:
        rows = self._rows[: self._filled].transpose(0, 1)  # (K, n, B)
        with full_float32():
            self._sums.baddbmm_(rows.transpose(1, 2), rows)
        self._filled = 0
