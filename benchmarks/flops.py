"""FLOPs that zeros save in DeiT, counted by this package and as the paper counts them, beside the paper's numbers.

    python benchmarks/flops.py [--models deit_tiny] [--layers]

All weights of the blocks' Linear layers, the paper's targets, are equally sparse. Nothing is trained, no weights are loaded.
Prints a Markdown table, with ``--layers`` also one per layer at 50 %, and writes ``results/flops.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from machine import machine
from torch import nn

from lightning_cap.sparsity import ModelFlops, Targets, model_flops

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.5, 0.6, 0.75, 0.8, 0.9)
PAPER: dict[str, tuple[float, ...]] = {  # tables 3 and 4, the rows of CAP, in percent
    "deit_tiny": (43.9, 52.6, 65.8, 70.2, 79.0),
    "deit_small": (46.9, 56.2, 70.2, 74.9, 84.1),
    "deit_base": (48.5, 58.2, 72.8, 77.7, 87.4),
}
TARGETS = ("blocks.*.attn.qkv.weight", "blocks.*.attn.proj.weight", "blocks.*.mlp.fc?.weight")


def saved_by_the_papers_count(
    width: int, sparsity: float, depth: int = 12, tokens: int = 197, side: int = 224
) -> float:
    """Share of FLOPs that zeros save as the paper's published code counts them (``research/aux_utils/flops_utils.py``).

    It differs from this package in two ways. What it prunes as the projection after attention is the size of the product of the
    attention with its values, ``tokens² · width``, and the projection itself, ``tokens · width²``, is not counted at all. And it
    counts biases, norms, softmax, activations and residual sums, an operation each, while a multiply-add is one too.
    """
    weights = (
        11 * width**2 * tokens + width * tokens**2
    )  # q, k, v, both of the MLP; then what stands for the projection
    elementwise = 3 + 1 + 8 + 2 * 5 + 4 * 8 + 2  # biases of the three parts, norms, GELU, residual sums
    dense = width * tokens**2 + 5 * tokens**2 + elementwise * tokens * width
    ends = 3 * width * side**2 + 1000 * width
    return sparsity * depth * weights / (depth * (weights + dense) + ends)


def count(model: nn.Module) -> ModelFlops:
    image = torch.zeros(1, 3, 224, 224)
    return model_flops(model, lambda: model(image))


def measure(name: str) -> dict[str, Any]:
    """The counts of a model, and the table's row at each sparsity; shares in percent."""
    model = timm.create_model(f"{name}_patch16_224")
    targets = list(Targets.from_model(model, include=list(TARGETS)))
    flops = count(model)
    rows = []
    for sparsity, paper in zip(SPARSITIES, PAPER[name], strict=True):
        ours = 100 * flops.saved(dict.fromkeys(targets, sparsity))
        theirs = 100 * saved_by_the_papers_count(model.embed_dim, sparsity)
        rows.append({"sparsity": sparsity, "torch": ours, "papers_count": theirs, "paper": paper})
    weights = sum(flops.layers[target] for target in targets)
    return {"model": name, "flops": flops.total, "flops_of_targets": weights, "targets": len(targets), "rows": rows}


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| FLOPs saved (%) | counted by | " + " | ".join(f"{100 * s:.0f} %" for s in SPARSITIES) + " |"]
    lines += ["|---|---|" + "---|" * len(SPARSITIES)]
    told = {"torch": "this package", "papers_count": "the paper's code", "paper": "as printed in the paper"}
    for each in found:
        share = 100 * each["flops_of_targets"] / each["flops"]
        dense = f"{each['model']}, {each['flops'] / 1e9:.2f} GFLOPs, {share:.1f} % in targets"
        for key, by in told.items():
            lines.append(f"| {dense} | {by} | " + " | ".join(f"{row[key]:.1f}" for row in each["rows"]) + " |")
            dense = ""
    return lines


def layer_table(name: str, sparsity: float = 0.5) -> list[str]:
    """Dense and effective FLOPs of each layer, and of all that has no weights."""
    model = timm.create_model(f"{name}_patch16_224")
    flops = count(model)
    effective = flops.effective_layers(dict.fromkeys(Targets.from_model(model, include=list(TARGETS)), sparsity))
    rows = [(layer, dense, effective[layer]) for layer, dense in flops.layers.items() if dense]
    rest = flops.total - sum(flops.layers.values())
    rows += [("without weights (attention)", rest, rest), ("total", flops.total, sum(effective.values()) + rest)]
    lines = [f"| {name} at {100 * sparsity:.0f} % | dense MFLOPs | effective MFLOPs |", "|---|---|---|"]
    return lines + [f"| {layer} | {dense / 1e6:.1f} | {left / 1e6:.1f} |" for layer, dense, left in rows]


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Count, print and write; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PAPER), default=list(PAPER))
    parser.add_argument("--layers", action="store_true", help="Print the layers of each model too, at 50 %%.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "flops.json")
    given = parser.parse_args(args)
    found = [measure(name) for name in given.models]
    lines = table(found) + [line for name in given.models if given.layers for line in ("", *layer_table(name))]
    print("\n".join(lines))
    written = {"machine": machine(), "results": found}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(written, indent=1) + "\n")
    return written


if __name__ == "__main__":
    main()
