"""ViT-Tiny whose tokens are left out: top-1 without training, FLOPs and time, over keep ratios.

    python benchmarks/tokens.py --data ../shared/data
    python benchmarks/tokens.py --data ../shared/data --held-out   # on training images: what settings were chosen on

``--data`` is a folder with ``imagenet1k-sample/train.tar``, ``imagenet1k-sample/val.tar`` and
``weights/vit_tiny_patch16_224.safetensors``. Prints a Markdown table and writes a JSON after every row; rows that are in it are not
measured again. ``DynamicViT`` has predictors that were not trained: of it FLOPs and time are told, no top-1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor, nn

from lightning_cap.classifier import load_weights
from lightning_cap.data import ImageNetDataModule
from lightning_cap.export.benchmark import benchmark
from lightning_cap.tokens import DynamicViT, ZeroTPrune
from lightning_cap.tokens.base import TokenPruning, highest
from lightning_cap.tokens.page_rank import HEAD_VARIANCE
from lightning_cap.tokens.vision_transformer import Attended
from lightning_cap.utilities.files import save_json
from lightning_cap.utilities.flops import count_flops

MODEL = "vit_tiny_patch16_224"
EVAL_BATCH = 50


class RandomTokens(TokenPruning):
    """Any tokens, always the same: what choosing must be better than."""

    def choose(self, stage: int, tokens: Tensor, seen: Attended, count: int) -> Tensor:
        """By noise."""
        number = tokens.shape[1] - self.vit.num_prefix_tokens
        noise = torch.rand(tokens.shape[0], number, generator=torch.Generator().manual_seed(stage))
        return highest(noise, count)


LATE = [4, 5, 6, 7, 8, 9, 10, 11]
#: Name -> class and settings.
ROWS: dict[str, tuple[type[TokenPruning], dict[str, Any]]] = {
    "blocks 4 to 11, keep 0.87": (ZeroTPrune, {"blocks": LATE, "keep_ratio": 0.87}),
    "blocks 4 to 11, keep 0.92": (ZeroTPrune, {"blocks": LATE, "keep_ratio": 0.92}),
    "blocks 4 to 11, keep 0.82": (ZeroTPrune, {"blocks": LATE, "keep_ratio": 0.82}),
    "blocks 4, 6, 8, 10, keep 0.78": (ZeroTPrune, {"blocks": [4, 6, 8, 10], "keep_ratio": 0.78}),
    "blocks 4, 7, 10, keep 0.72": (ZeroTPrune, {"blocks": [4, 7, 10], "keep_ratio": 0.72}),
    "blocks 3, 6, 9, keep 0.9": (ZeroTPrune, {"keep_ratio": 0.9}),
    "blocks 3, 6, 9, keep 0.8": (ZeroTPrune, {"keep_ratio": 0.8}),
    "blocks 3, 6, 9, keep 0.77": (ZeroTPrune, {"keep_ratio": 0.77}),
    "blocks 3, 6, 9, keep 0.7": (ZeroTPrune, {"keep_ratio": 0.7}),
    "blocks 3, 6, 9, keep 0.6": (ZeroTPrune, {"keep_ratio": 0.6}),
    "keep 0.77, by importance alone": (ZeroTPrune, {"keep_ratio": 0.77, "similarity": 0.0}),
    "keep 0.77, by similarity alone": (ZeroTPrune, {"keep_ratio": 0.77, "similarity": 1.0}),
    "keep 0.77, dropped": (ZeroTPrune, {"keep_ratio": 0.77, "merge": False}),
    "keep 0.77, dropped, the paper's heads and 5 steps": (
        ZeroTPrune,
        {"keep_ratio": 0.77, "merge": False, "iterations": 5, "head_variance": HEAD_VARIANCE},
    ),
    "blocks 4 to 11, keep 0.87, dropped": (ZeroTPrune, {"blocks": LATE, "keep_ratio": 0.87, "merge": False}),
    "keep 0.77, random ones dropped": (RandomTokens, {"keep_ratio": 0.77}),
    "DynamicViT, keep 0.8": (DynamicViT, {"keep_ratio": 0.8}),
}
DENSE = "dense"


class Images:
    """What is classified."""

    def __init__(self, folder: Path, held_out: bool, limit: int | None) -> None:
        data = ImageNetDataModule(
            str(folder / "imagenet1k-sample"), recipe="light1", batch_size=EVAL_BATCH, num_workers=0, mixup=0.0, cutmix=0.0,
            erasing_prob=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), test_crop_ratio=0.9,
        )  # fmt: skip
        data.setup("fit")
        judged: Any = data.training_set(augment=False) if held_out else data.validation_set()
        samples = [judged[number] for number in range(limit or len(judged))]
        self.images = torch.stack([image for image, _ in samples])
        self.labels = torch.tensor([int(label) for _, label in samples])

    @torch.inference_mode()
    def logits(self, model: nn.Module) -> Tensor:
        """Of all images."""
        return torch.cat([model(images) for images in self.images.split(EVAL_BATCH)])

    def top1(self, logits: Tensor) -> float:
        """In %."""
        return 100 * float((logits.argmax(1) == self.labels).float().mean())


def judged(images: Images, logits: Tensor, dense: Tensor) -> dict[str, float]:
    """Accuracy, its standard error beside the dense model on the same images, and the divergence of the outputs."""
    right, before = (given.argmax(1) == images.labels for given in (logits, dense))
    change = right.float() - before.float()
    apart = F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    return {
        "top1": images.top1(logits),
        "points": 100 * float(change.mean()),
        "error": 100 * float(change.std()) / len(change) ** 0.5,
        "divergence": float(apart),
    }


def measure(models: Mapping[str, nn.Module], example: Tensor, sizes: Sequence[int], seconds: float) -> dict[str, Any]:
    """Times in turns with the dense model."""
    found: dict[str, Any] = {name: {} for name in models}
    for record in benchmark(models, example, batch_sizes=sizes, seconds=seconds):
        found[record.model][str(record.batch_size)] = {
            "ms": record.milliseconds,
            "speed_up": record.speedup,
            "low": record.speedup_low,
            "high": record.speedup_high,
        }
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The table."""
    rows = results["rows"]
    sizes = sorted({size for row in rows.values() for size in row.get("times", {})}, key=int)
    head = ["", "tokens at the end", "FLOPs", "top-1", "points", "divergence"]
    head += [text for size in sizes for text in (f"ms, batch {size}", "speed-up (quartiles)")]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        cells = [name, str(row["tokens"]), f"{row['flops']:.3f}"]
        cells += (
            [f"{row['top1']:.1f}", f"{row['points']:+.1f} ± {row['error']:.1f}", f"{row['divergence']:.3f}"]
            if "top1" in row
            else ["-"] * 3
        )
        for size in sizes:
            time = row.get("times", {}).get(size)
            cells += (
                ["-", "-"]
                if time is None
                else [f"{time['ms']:.1f}", f"{time['speed_up']:.2f} ({time['low']:.2f} to {time['high']:.2f})"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not in the file yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--held-out", action="store_true", help="judge on training images")
    parser.add_argument("--limit", type=int, help="so many images")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a model, at each batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tokens.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vit = timm.create_model(MODEL, pretrained=False).eval()
    load_weights(vit, args.data / "weights" / f"{MODEL}.safetensors")
    images = Images(args.data, args.held_out, args.limit)
    example = images.images[: max(args.batch_sizes)]
    results: dict[str, Any] = {"rows": {}}
    if args.out.is_file():
        results = json.loads(args.out.read_text())
    results |= {"machine": machine(), "images": len(images.labels), "held_out": args.held_out}
    dense, whole = images.logits(vit), count_flops(vit, example[:1])
    results["rows"].setdefault(DENSE, {"tokens": 196, "flops": 1.0, **judged(images, dense, dense)})
    models = {name: ROWS[name][0](vit, **ROWS[name][1]).eval() for name in args.rows}
    for name, model in models.items():
        if name in results["rows"]:
            continue
        row: dict[str, Any] = {"tokens": model.num_kept(196)[-1], "flops": count_flops(model, example[:1]) / whole}
        row["settings"] = ROWS[name][1]
        if not isinstance(model, DynamicViT):
            row |= judged(images, images.logits(model), dense)
        results["rows"][name] = row
        save_json(args.out, results)
        print(name, row, file=sys.stderr, flush=True)
    waiting = {name: model for name, model in models.items() if "times" not in results["rows"][name]}
    if waiting:
        times = measure({DENSE: vit, **waiting}, example, args.batch_sizes, args.seconds)
        for name, found in times.items():
            results["rows"][name]["times"] = found
        save_json(args.out, results)
    print(markdown(results))


if __name__ == "__main__":
    main()
