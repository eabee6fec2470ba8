"""Draws `block.svg`, the elimination inside two blocks and its merge into one ranking: `python docs/images/block.py`.

The numbers are computed here, by the textbook steps of docs/how-it-works.md, for two made-up blocks of four weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

WEIGHTS = np.array([[0.90, -0.80, 0.35, 0.60], [0.90, 0.32, -0.70, 1.20]])
FACTORS = np.array(  # A of F = A A' for each block: weights 1 and 2 of block 1 do nearly the same
    [
        [[1.0, 0.1, 0.0, 0.0], [0.9, 0.4, 0.0, 0.0], [0.2, 0.1, 0.8, 0.0], [0.1, 0.3, 0.2, 0.7]],
        [[1.1, 0.0, 0.0, 0.2], [0.3, 0.6, 0.0, 0.0], [-0.5, 0.2, 0.7, 0.0], [0.1, 0.2, 0.5, 0.9]],
    ]
)
DAMP, ZEROS = 0.01, 4
CELL, LEFT, BLOCK, TOP = 46, 84, 352, 74  # pixels

STYLE = """
.cap { --ink: #1f2430; --faint: #6c7384; --line: #c9ced9; --one: #3f51b5; --two: #c75000; --off: #eceff5; font: 13px sans-serif; }
@media (prefers-color-scheme: dark) {
  .cap { --ink: #e4e7ef; --faint: #9aa1b3; --line: #4a5064; --one: #8c9eff; --two: #ff9e57; --off: #2a2f3d; } }
.cap text { fill: var(--ink); } .cap .faint { fill: var(--faint); } .cap .bold { font-weight: bold; }
.cap .b0 { fill: var(--one); } .cap .b1 { fill: var(--two); } .cap .off { fill: var(--off); }
.cap .frame { fill: none; stroke: var(--line); } .cap .s0 { stroke: var(--one); } .cap .s1 { stroke: var(--two); }
.cap .cross { stroke-width: 2; } .cap .cut { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 5 4; }
"""


def eliminate(weights: np.ndarray, fisher: np.ndarray) -> list[tuple[int, float, np.ndarray]]:
    """One weight after another: which, its loss, and the weights after it."""
    w, H, alive, steps = weights.copy(), np.linalg.inv(fisher), np.ones(len(weights), bool), []
    for _ in weights:
        losses = np.where(alive, w**2 / (2 * H.diagonal().clip(1e-12)), np.inf)
        p = int(losses.argmin())
        w = w - w[p] / H[p, p] * H[:, p]
        H = H - np.outer(H[:, p], H[p]) / H[p, p]
        alive[p], w[~alive] = False, 0.0
        w[p], H[p], H[:, p] = 0.0, 0.0, 0.0
        steps.append((p, float(losses[p]), w.copy()))
    return steps


def rising(losses: list[float]) -> list[float]:
    """Pool adjacent violators: the slopes of the lower convex envelope of the summed losses."""
    pools: list[list[float]] = []
    for loss in losses:
        pools.append([loss])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [float(np.mean(pool)) for pool in pools for _ in pool]


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{css}">{words}</text>'


def row(x: float, y: float, block: int, weights: np.ndarray, gone: set[int], now: int | None = None) -> list[str]:
    """The cells of a block: the larger a weight, the deeper its colour; removed ones are grey, that of this step crossed out."""
    out = []
    for i, weight in enumerate(weights):
        left = x + i * CELL
        css, opacity = ("off", 1.0) if i in gone else (f"b{block}", 0.12 + 0.5 * min(abs(weight), 1.6) / 1.6)
        out.append(
            f'<rect x="{left:g}" y="{y:g}" width="{CELL - 3}" height="26" rx="3" class="{css}" opacity="{opacity:.2f}"/>'
        )
        out.append(
            text(
                left + CELL / 2 - 1.5,
                y + 17.5,
                "0" if i in gone else f"{weight:+.2f}",
                "faint" if i in gone else "",
                "middle",
            )
        )
        if i == now:
            out.append(f'<path d="M{left + 4:g} {y + 22:g}l{CELL - 11} -18" class="cross s{block}"/>')
    return out


def draw() -> str:
    """The picture."""
    paths = [eliminate(w, a @ a.T + DAMP * np.eye(4)) for w, a in zip(WEIGHTS, FACTORS, strict=True)]
    scores = sorted(
        (s, b, t) for b, path in enumerate(paths) for t, s in enumerate(rising([loss for _, loss, _ in path]))
    )
    cut = {b: sum(block == b for _, block, _ in scores[:ZEROS]) for b in (0, 1)}
    out = [text(10, 20, "1. In every block: remove the weight that costs least, move the others, repeat", "bold")]
    for b, path in enumerate(paths):
        x = LEFT + b * BLOCK
        out.append(text(x, TOP - 24, f"block {b + 1}", f"bold b{b}"))
        out.append(text(x + 4 * CELL + 8, TOP - 24, "loss", "faint"))
        out += row(x, TOP - 14, b, WEIGHTS[b], set())
        gone: set[int] = set()
        for t, (p, loss, after) in enumerate(path):
            y = TOP + 20 + 34 * t
            gone.add(p)
            out += row(x, y, b, after, gone, p)
            out.append(text(x + 4 * CELL + 8, y + 17.5, f"{loss:.3f}", f"b{b}"))
    out.append(text(10, TOP + 3.5, "weights", "faint"))
    out += [text(10, TOP + 37.5 + 34 * t, f"step {t + 1}", "faint") for t in range(4)]
    y = TOP + 190
    out.append(
        text(
            10,
            y,
            "2. Over all blocks: put the losses in order, each block in its own order, and cut at the sparsity",
            "bold",
        )
    )
    bottom, wide, high = y + 112, 72, 76 / max(score for score, _, _ in scores)
    for i, (score, b, t) in enumerate(scores):
        x, height = LEFT + i * wide, max(2.0, score * high)
        out.append(
            f'<rect x="{x:g}" y="{bottom - height:.1f}" width="{wide - 14}" height="{height:.1f}" rx="2" class="b{b}"/>'
        )
        out.append(text(x + (wide - 14) / 2, bottom - height - 6, f"{score:.3f}", "", "middle"))
        out.append(text(x + (wide - 14) / 2, bottom + 17, f"block {b + 1}", f"b{b}", "middle"))
        out.append(text(x + (wide - 14) / 2, bottom + 32, f"step {t + 1}", f"b{b}", "middle"))
    x = LEFT + ZEROS * wide - 7
    out.append(f'<path d="M{x:g} {y + 14:g}V{bottom + 36:g}" class="cut"/>')
    out.append(text(x - 8, y + 30, "pruned", "faint", "end"))
    out.append(text(x + 8, y + 30, "kept", "faint"))
    y = bottom + 66
    out.append(
        text(
            10, y, f"3. Every block at its cut: 50 % of all weights are zero, {cut[0]} here and {cut[1]} there", "bold"
        )
    )
    for b, path in enumerate(paths):
        done = path[: cut[b]]
        out += row(LEFT + b * BLOCK, y + 16, b, done[-1][2] if done else WEIGHTS[b], {p for p, _, _ in done})
    body = "\n".join(out)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {y + 54:g}" class="cap">'
    return f"{opening}\n<style>{STYLE}</style>\n{body}\n</svg>\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
