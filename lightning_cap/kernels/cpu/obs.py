"""Factor, eliminate and reconstruct Fisher blocks, one at a time in scratch that stays in the cache of its core.

Only alive weights are taken into the scratch, and pruned ones are swapped out of it, so that the cost of a step falls with the
weights that are left.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cap.kernels.cpu.groups import eliminate_groups
from lightning_cap.kernels.cpu.jit import kernel, kernel_without_nan
from lightning_cap.kernels.cpu.tile import four_rows, lanes_of, largest_of, matrix, subtract1, subtract4, whole

_MOST = float(np.finfo(np.float32).max)


@kernel
def _cholesky(A: Any, n: int, panel: Any, condition: float) -> bool:
    """``A = Tᵀ T`` with ``T`` lower triangular, in place, four rows at a time from the last; the diagonal of ``A`` is 1.

    False if that fails, or if the pivots alone show a condition number beyond ``condition`` (one over a squared pivot is a
    lower bound of it).
    """
    zero, one, lanes = A.dtype.type(0), A.dtype.type(1), lanes_of(A)
    for end in range(n, 0, -4):
        start = max(0, end - 4)
        rows, width = end - start, whole(end, lanes)
        for a in range(rows):
            for j in range(width):
                panel[a, j] = A[start + a, j]
        subtract4(panel, width, A, end, n, A, start)
        for a in range(rows - 1, -1, -1):
            pivot = panel[a, start + a]
            if not (pivot * condition > one) or not np.isfinite(pivot):
                return False
            scale = one / np.sqrt(pivot)
            row = A[start + a]
            for j in range(width):
                row[j] = panel[a, j] * scale
            for j in range(start + a + 1, width):
                row[j] = zero
            for b in range(a):
                factor = row[start + b]
                for j in range(width):
                    panel[b, j] -= factor * row[j]
    return True


@kernel
def _invert(A: Any, N: Any, n: int, panel: Any, c: Any) -> float:
    """From ``T`` to the inverse ``H`` with rows and columns in *reversed* order, lower triangle; returns its largest entry.

    Reversed, ``T`` is the transpose of the common factor ``L``; ``N = L⁻¹`` and ``H = Nᵀ N`` are formed four rows at a time.
    """
    zero, one, lanes = A.dtype.type(0), A.dtype.type(1), lanes_of(A)
    for start in range(0, n, 4):
        rows, width = min(4, n - start), whole(start + 4, lanes)
        for a in range(rows):
            for j in range(width):
                panel[a, j] = zero
            for s in range(start + a):
                c[s, a] = A[n - 1 - s, n - 1 - start - a]
        for j in range(0, start, lanes):  # rows of N end at their diagonal
            four_rows(panel, j, N, j, start, c, 0)
        for a in range(rows):
            row = N[start + a]
            for b in range(a):
                factor = c[start + b, a]
                for j in range(width):
                    panel[a, j] -= factor * N[start + b, j]
            scale = one / A[n - 1 - start - a, n - 1 - start - a]
            for j in range(width):
                row[j] = panel[a, j] * scale
            row[start + a] = scale
            for j in range(start + a + 1, row.shape[0]):
                row[j] = zero
    largest = zero
    for start in range(0, n, 4):
        rows, width = min(4, n - start), whole(start + 4, lanes)
        for a in range(4):
            for j in range(width):
                panel[a, j] = zero
        subtract4(panel, width, N, start, n, N, start)
        for a in range(rows):
            i = start + a
            row = A[i]
            for j in range(i + 1):
                row[j] = -panel[a, j]
            if not np.isfinite(row[i]):
                return np.inf
            largest = max(largest, row[i])
    return float(largest)


@kernel
def _score(w: Any, diagonal: Any, largest: Any) -> Any:
    """``w² / H_pp``, and the largest number there is where that is beyond it or undefined: every weight can be ordered."""
    score = w * w / diagonal
    return score if score <= largest else largest


@kernel_without_nan
def _least(scores: Any, m: int) -> Any:
    best = scores[0]
    for j in range(1, m):
        best = min(best, scores[j])
    return best


@kernel
def _eliminate(
    H: Any, U: Any, n: int, w: Any, where: Any, groups: Any, counts: Any, keep: int, row: Any, c: Any, work: Any,
    rank: Any, losses: Any,
) -> int:  # fmt: skip
    """Left-looking elimination; ``H`` in the lower triangle, pivot columns into ``U``; returns the number of steps.

    No ``H_pp`` falls below 1, one over the diagonal of the scaled block: only rounding could make it.
    """
    diagonal, scores, barred = work[0], work[1], work[2]
    one, half, largest = U.dtype.type(1), U.dtype.type(0.5), largest_of(U)
    for j in range(n):
        where[j] = j
        diagonal[j] = max(H[j, j], one)
        barred[j] = U.dtype.type(np.inf) if counts[groups[j]] <= keep else U.dtype.type(0)
        scores[j] = _score(w[j], diagonal[j], largest) + barred[j]
    m = n
    for t in range(n):
        best = _least(scores, m)
        if best == np.inf:
            return t
        p, o = 0, n
        for j in range(m):
            if scores[j] == best and where[j] < o:  # ties go to the earlier weight
                p, o = j, where[j]
        rank[o] = t
        losses[t] = best * half
        scale = one / np.sqrt(diagonal[p])
        factor = w[p] * scale
        for s in range(t):
            c[s, 0] = U[s, p]
        m -= 1
        for s in range(t):
            U[s, p] = U[s, m]
        w[p], diagonal[p], where[p], barred[p] = w[m], diagonal[m], where[m], barred[m]
        group = groups[o]
        counts[group] -= 1
        if keep > 0 and counts[group] == keep:
            for j in range(m):
                if groups[where[j]] == group:
                    barred[j] = U.dtype.type(np.inf)
        for j in range(m):
            q = where[j]
            row[0, j] = H[max(o, q), min(o, q)]
        subtract1(row, m, U, t, c)
        for j in range(m):
            u = row[0, j] * scale
            U[t, j] = u
            v = w[j] - factor * u
            d = max(diagonal[j] - u * u, one)
            w[j], diagonal[j], scores[j] = v, d, _score(v, d, largest) + barred[j]
    return n


@kernel
def _load(
    triangle: Any, B: int, scale: float, index: Any, n: int, damp: float, A: Any, roots: Any, inverse_roots: Any
) -> bool:  # fmt: skip
    """The alive part of a block, damped, in reversed order, into the lower triangle of ``A``; False if that cannot be.

    It is scaled by its own diagonal to one that is 1 (Jacobi), which leaves it the condition number of the correlations alone.
    ``roots`` ``(n,)``, out: the square roots of the diagonal, in the order of ``A``.
    """
    for i in range(n):
        r = B - 1 - index[n - 1 - i]
        root = np.sqrt(float(triangle[r * (r + 3) // 2]) * scale + damp)
        if not (root > 0.0 and np.isfinite(root)):
            return False
        roots[i] = root
        inverse_roots[i] = np.sqrt(scale) / root
    for i in range(n):
        row, factor = A[i], inverse_roots[i]
        r = B - 1 - index[n - 1 - i]
        source = triangle[r * (r + 1) // 2 : (r + 1) * (r + 2) // 2]
        if n == B:
            for j in range(i):
                row[j] = source[j] * factor * inverse_roots[j]
        else:
            for j in range(i):
                row[j] = source[B - 1 - index[n - 1 - j]] * factor * inverse_roots[j]
        row[i] = A.dtype.type(1)
    return True


@kernel
def solve_blocks(
    packed: Any, places: Any, scale: float, W: Any, alive: Any, damp: Any, group: int, keep: int, together: bool,
    condition: float, kind: Any, rank: Any, losses: Any, well_conditioned: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Factor and eliminate blocks ``first .. last`` in the dtype of ``kind``.

    Args:
        packed: ``(K, B (B + 1) / 2)`` triangles, see `packed.py`; the blocks are ``scale · packed[places[k]]``.
        places: ``(k,)`` int64.
        scale: ``1/N``.
        W: ``(k, B)``.
        alive: ``(k, B)`` bool.
        damp: ``(k,)`` float64.
        group: Weights in a group; one may be pruned while more than ``keep`` of its group are alive.
        together: Groups are removed as a whole.
        condition: Largest diagonal entry of the scaled inverse that is trusted.
        kind: Any array of the dtype to work in.
        rank: ``(k, B)``, out: step of each weight, untouched where it is never pruned.
        losses: ``(k, B)``, out: marginal losses by step, untouched past the last.
        well_conditioned: ``(k,)`` bool, out: False where the block cannot be trusted in this dtype, and nothing was written.
    """
    B = W.shape[1]
    A, N, panel, work = matrix(B, B, kind), matrix(B, B, kind), matrix(4, B, kind), matrix(6, B, kind)
    c, c1 = np.zeros((B, 4), kind.dtype), np.zeros((B, 1), kind.dtype)
    w, roots, inverse_roots = work[3], work[4], work[5]
    index, where, groups = np.zeros(B, np.int64), np.zeros(B, np.int64), np.zeros(B, np.int64)
    counts, starts, place = (
        np.zeros(B // group + 1, np.int64),
        np.zeros(B // group + 2, np.int64),
        np.zeros(B, np.int64),
    )
    order, out = np.zeros(B, np.int64), np.zeros(B, kind.dtype)
    members = group if together else 1
    small, tile, left = matrix(B, members, kind), matrix(members, members, kind), np.zeros(B, np.bool_)
    for b in range(first, last):
        n = 0
        counts[:] = 0
        for i in range(B):
            if alive[b, i]:
                index[n], groups[n] = i, i // group
                counts[i // group] += 1
                n += 1
        if n == 0:
            well_conditioned[b] = True
            continue
        well_conditioned[b] = _load(
            packed[places[b]], B, scale, index, n, damp[b], A, roots, inverse_roots
        ) and _cholesky(A, n, panel, condition)
        if well_conditioned[b]:
            well_conditioned[b] = _invert(A, N, n, panel, c) < condition
        if not well_conditioned[b]:
            continue
        for i in range(n):
            w[i] = W[b, index[i]] * roots[n - 1 - i]
            order[i] = -1
        if together:
            steps = n
            for g in range(B // group):
                starts[g + 1] = starts[g] + counts[g]
            eliminate_groups(A, N, n, w, where, place, groups, starts, small, left, tile, panel, c1, work, order, out)
        else:
            steps = _eliminate(A, N, n, w, where, groups, counts, keep, panel, c1, work, order, out)
        for i in range(n):
            if order[i] >= 0:
                rank[b, index[i]] = order[i]
        for t in range(steps):
            losses[b, t] = min(out[t], _MOST)


@kernel
def invert_blocks(blocks: Any, out: Any, factored: Any, first: int, last: int) -> None:
    """Inverses of symmetric ``blocks[first : last]`` ``(k, B, B)`` into ``out``; ``factored`` ``(k,)``: whether each did."""
    B = blocks.shape[1]
    A, N, panel = matrix(B, B, blocks), matrix(B, B, blocks), matrix(4, B, blocks)
    c = np.zeros((B, 4), blocks.dtype)
    for b in range(first, last):
        for i in range(B):
            for j in range(i + 1):
                A[i, j] = blocks[b, B - 1 - i, B - 1 - j]
        factored[b] = _cholesky(A, B, panel, np.inf) and _invert(A, N, B, panel, c) < np.inf
        for i in range(B):
            for j in range(i + 1):
                out[b, i, j] = out[b, j, i] = A[i, j]


@kernel
def reconstruct_blocks(
    packed: Any, places: Any, scale: float, W: Any, alive: Any, pruned: Any, damp: Any, kind: Any, out: Any, solved: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """``out[b] = F_SS⁻¹ F_SQ w_Q`` on the kept weights ``S`` of blocks ``first .. last``, in the dtype of ``kind``.

    Arguments as in `solve_blocks`; ``pruned`` ``(k, B)`` bool says ``Q``; ``solved`` ``(k,)`` bool, out:
    False where a block did not factor, or its solution is not finite.
    """
    B = W.shape[1]
    zero = kind.dtype.type(0)
    A, panel, work = matrix(B, B, kind), matrix(4, B, kind), matrix(5, B, kind)
    rhs, removed, product, roots, inverse_roots = work[0], work[1], work[2], work[3], work[4]
    kept = np.zeros(B, np.int64)
    for b in range(first, last):
        n = 0
        for i in range(B):
            removed[B - 1 - i] = W[b, i] if pruned[b, i] else zero
            product[i] = zero
            if alive[b, i] and not pruned[b, i]:
                kept[n] = i
                n += 1
        triangle = packed[places[b]]
        for r in range(B):  # F · w_Q from one triangle, in reversed order
            source = triangle[r * (r + 1) // 2 : (r + 1) * (r + 2) // 2]
            total, factor = zero, removed[r]
            for j in range(r):
                value = kind.dtype.type(source[j])
                total += value * removed[j]
                product[j] += value * factor
            product[r] += total + kind.dtype.type(source[r]) * factor
        solved[b] = _load(triangle, B, scale, kept, n, damp[b], A, roots, inverse_roots) and _cholesky(
            A, n, panel, np.inf
        )
        if not solved[b]:
            continue
        for i in range(n):
            rhs[i] = product[B - 1 - kept[n - 1 - i]] * kind.dtype.type(scale) / roots[i]
        for i in range(n - 1, -1, -1):
            rhs[i] /= A[i, i]
            for j in range(i):
                rhs[j] -= A[i, j] * rhs[i]
        for i in range(n):
            total = rhs[i]
            for j in range(i):
                total -= A[i, j] * rhs[j]
            rhs[i] = total / A[i, i]
            out[b, kept[n - 1 - i]] = rhs[i] / roots[i]
            solved[b] = solved[b] and np.isfinite(rhs[i])
