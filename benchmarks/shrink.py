"""Smaller and faster: units pruned to shares of the MACs, the models shrunk, their accuracy and their time measured.

    python benchmarks/shrink.py --data ../shared/data                    # everything
    python benchmarks/shrink.py --data ../shared/data --models resnet20  # one model
    python benchmarks/shrink.py --data ../shared/data --stages measure   # times again, of models that are in --work

``--data`` is a folder with ``imagenet1k-sample``, ``cifar10`` and ``weights``. Each method prunes the same model to the first
budget and goes on from there to the next. "one-shot" is the accuracy right then, without training; "tuned" that after a few
epochs on the calibration images with the dense model's outputs as labels. Prints Markdown tables and writes a JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cifar10_data import decode, open_data
from machine import machine
from resnet20 import ResNet20
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_cap import prune
from lightning_cap.export import shrink
from lightning_cap.export.benchmark import benchmark
from lightning_cap.pruners import CAPUnits, LayerwiseUnits, MagnitudeUnits, TaylorUnits
from lightning_cap.sparsity import Flops, Units
from lightning_cap.sparsity.latency import Latency
from lightning_cap.utilities.files import save_json

GOALS = (0.25, 0.5)  # of the MACs saved
EVAL_BATCH = 100
STAGES = ("prune", "tune", "measure")
INPUTS = 512  # samples whose layer inputs and losses are taken


@dataclass(frozen=True)
class Case:
    """A published model, its images, and how it is pruned and tuned."""

    make: Callable[[], nn.Module]
    weights: str
    images: str
    num_gradients: int
    limit: int | None  # images of the training set that are decoded
    batch: int
    epochs: int
    lr: float
    recalibrate: bool  # BatchNorm statistics, before "one-shot" is measured


CASES = {
    "vit_tiny": Case(
        lambda: timm.create_model("vit_tiny_patch16_224"), "vit_tiny_patch16_224", "imagenet1k-sample",
        768, None, 25, 1, 1e-4, False,
    ),
    "resnet20": Case(
        ResNet20, "resnet20_cifar10", "cifar10",
        1024, 10000, 64, 3, 2e-3, True,
    ),
}  # fmt: skip

METHODS: dict[str, Callable[[int], Any]] = {
    "CAPUnits": lambda n: CAPUnits(cost=Flops(), num_gradients=n, num_inputs=INPUTS),
    "LayerwiseUnits": lambda n: LayerwiseUnits(cost=Flops(), num_inputs=INPUTS),
    "TaylorUnits": lambda n: TaylorUnits(cost=Flops(), num_gradients=n // 3),  # a mean needs fewer
    "MagnitudeUnits": lambda n: MagnitudeUnits(cost=Flops()),
}


@dataclass
class Row:
    """One method at one budget."""

    model: str
    method: str
    budget: float
    macs: float  # share that is left
    parameters: float  # share that is left
    one_shot: float
    one_shot_loss: float
    tuned: float | None
    seconds: float
    difference: float  # of the shrunk model's logits from the masked one's, over the largest
    times: dict[str, dict[str, float]] = field(default_factory=dict)


class Images:
    """Calibration and evaluation images of a case, decoded once."""

    def __init__(self, case: Case, root: Path) -> None:
        self.augmented, val = _imagenet(root / case.images) if "imagenet" in case.images else _cifar(root / case.images)
        torch.manual_seed(0)
        random.seed(0)
        self.train = decode(self.augmented, case.limit)  # one draw of the augmentation, for calibration
        self.val = decode(val, None)


def _cifar(root: Path) -> tuple[Any, Any]:
    data = open_data(root)
    data.setup("fit")
    return data.training_set(augment=True), data.validation_set()


def _imagenet(root: Path) -> tuple[Any, Any]:
    """Augmented images of all classes, and those of some classes to validate on."""
    normal = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    train = timm.data.create_dataset("", root=str(root / "train.tar"))
    train.transform = timm.data.create_transform(224, is_training=True, scale=(0.5, 1.0), color_jitter=None, **normal)
    val = timm.data.create_dataset("", root=str(root / "val.tar"), class_map=train.reader.class_name_to_idx)
    val.transform = timm.data.create_transform(224, crop_pct=0.9, **normal)
    return train, val


def batches(pair: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


@torch.inference_mode()
def evaluate(model: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Top-1 in percent, and mean loss."""
    model.eval()
    right, loss = 0, 0.0
    for images, labels in batches(pair, EVAL_BATCH):
        logits = model(images)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return 100 * right / len(pair[1]), loss / len(pair[1])


@torch.no_grad()
def recalibrate(model: nn.Module, images: Tensor) -> None:
    """BatchNorm statistics of the calibration images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average
    model.train()
    for batch in images[:2048].split(EVAL_BATCH):
        model(batch)
    model.eval()


def augmented(dataset: Any, size: int, limit: int | None, epoch: int) -> Iterator[Tensor]:
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(epoch))[:limit]
    for chosen in order.split(size):
        yield torch.stack([dataset[int(index)][0] for index in chosen])


def tune(model: nn.Module, teacher: nn.Module, case: Case, images: Images) -> nn.Module:
    """A few epochs on augmented calibration images, with the outputs of the dense model as labels."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    count = case.limit or len(images.augmented)
    steps = case.epochs * -(-count // case.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, case.lr, total_steps=steps, pct_start=0.1)
    for epoch in range(case.epochs):
        model.train()
        for batch in augmented(images.augmented, case.batch, case.limit, epoch):
            with torch.no_grad():
                labels = teacher(batch).softmax(-1)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def flops(model: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return int(counter.get_total_flops())


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def run(name: str, case: Case, images: Images, dense: nn.Module, args: argparse.Namespace, work: Path) -> list[Row]:
    """All methods at all budgets; the shrunk models go to ``work``."""
    example = images.val[0][:2]
    rows = []
    for method in args.methods:
        model, started, seconds = copy.deepcopy(dense), time.perf_counter(), 0.0
        for goal in args.goals:
            pruner = METHODS[method](min(case.num_gradients, len(images.train[0])))
            result = prune(
                model,
                batches(images.train, EVAL_BATCH),
                loss_fn,
                goal,
                pruner,
                num_recomputations=args.steps,
                progress=False,
            )
            seconds += time.perf_counter() - started
            if case.recalibrate:
                recalibrate(model, images.train[0])
            small = shrink(model, result.masks, example_input=example[:1])
            with torch.inference_mode():
                before, after = model(example), small(example)
            accuracy, loss = evaluate(small, images.val)
            rows.append(
                Row(
                    name, method, 1 - goal, flops(small, example[:1]) / flops(dense, example[:1]),
                    sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters()),
                    accuracy, loss, None, seconds, float((before - after).abs().max() / before.abs().max()),
                )
            )  # fmt: skip
            torch.save((result.masks, small), work / f"{name}-{method}-{1 - goal:g}.pt")
            print(rows[-1], flush=True)
            started = time.perf_counter()
    return rows


def tune_all(name: str, case: Case, rows: list[Row], images: Images, dense: nn.Module, work: Path) -> None:
    """Accuracy of each shrunk model after fine-tuning."""
    for row in rows:
        _, small = torch.load(work / f"{name}-{row.method}-{row.budget:g}.pt", weights_only=False)
        row.tuned = evaluate(tune(small, dense, case, images), images.val)[0]
        print(f"{row.method} {row.budget:g}: {row.tuned:.2f} after tuning", flush=True)


def measure(name: str, rows: list[Row], images: Images, dense: nn.Module, args: argparse.Namespace, work: Path) -> None:
    """Times of the dense and the shrunk models in turns, beside what the table of layers predicts."""
    units = Units.from_model(dense, images.val[0][:1])
    targets = units.targets(dense)
    for size in args.batch_sizes:
        cost = Latency(batch_size=size, table=str(work / f"latency-{name}-{size}.json"))
        cost.prepare(dense, units, images.val[0][:1])
        prices = cost.unit_prices(units, targets.shapes)
        models: dict[str, Any] = {"dense": dense}
        predicted = {"dense": prices.total}
        for row in rows:
            masks, small = torch.load(work / f"{name}-{row.method}-{row.budget:g}.pt", weights_only=False)
            key = f"{row.method} {row.budget:g}"
            models[key] = small.eval()
            predicted[key] = prices.of({group: int(kept.sum()) for group, kept in units.kept(masks).items()})
        found = {r.model: r for r in benchmark(models, images.val[0][:1], batch_sizes=(size,))}
        for row in rows:
            key = f"{row.method} {row.budget:g}"
            dense_ms, ms = found["dense"].milliseconds, found[key].milliseconds
            row.times[str(size)] = {
                "dense_ms": dense_ms, "ms": ms, "speed_up": dense_ms / ms, "predicted_ms": predicted[key],
                "predicted_dense_ms": predicted["dense"], "predicted_over_measured": predicted[key] / ms,
            }  # fmt: skip


def report(name: str, dense: tuple[float, float], rows: list[Row]) -> str:
    sizes = sorted({size for row in rows for size in row.times}, key=int)
    head = ["method", "MACs", "parameters", "one-shot", "loss", "tuned", "seconds"]
    head += [text for size in sizes for text in (f"ms, batch {size}", "speed-up", "predicted/measured")]
    lines = [
        f"{name}: dense {dense[0]:.2f} %, loss {dense[1]:.3f}",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        cells = [
            row.method,
            f"{row.macs:.3f}",
            f"{row.parameters:.3f}",
            f"{row.one_shot:.2f}",
            f"{row.one_shot_loss:.3f}",
        ]
        cells += ["-" if row.tuned is None else f"{row.tuned:.2f}", f"{row.seconds:.0f}"]
        for size in sizes:
            t = row.times[size]
            cells += [f"{t['ms']:.2f}", f"{t['speed_up']:.2f}x", f"{t['predicted_over_measured']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--goals", nargs="+", type=float, default=list(GOALS), help="shares of the MACs to save")
    parser.add_argument("--steps", type=int, default=2, help="collections of gradients on the way to each budget")
    parser.add_argument(
        "--stages", nargs="+", default=STAGES, choices=STAGES, help="those left out are as --work has them"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32], help="to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("shrink-work"), help="folder of the shrunk models")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shrink.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(args).items() if not isinstance(v, Path)},
        "models": {},
    }
    for name in args.models:
        case = CASES[name]
        images = Images(case, args.data)
        dense = case.make()
        dense.load_state_dict(load_file(args.data / "weights" / f"{case.weights}.safetensors"))
        dense.eval()
        held = args.work / f"{name}.json"
        if "prune" in args.stages:
            accuracy, rows = evaluate(dense, images.val), run(name, case, images, dense, args, args.work)
        else:
            saved = json.loads(held.read_text())
            accuracy, rows = saved["dense"], [Row(**row) for row in saved["rows"]]
        if "tune" in args.stages:
            tune_all(name, case, rows, images, dense, args.work)
        if "measure" in args.stages:
            measure(name, rows, images, dense, args, args.work)
        save_json(held, {"dense": accuracy, "rows": [asdict(row) for row in rows]})
        print(report(name, accuracy, rows), flush=True)
        results["models"][name] = {"dense": accuracy, "rows": [asdict(row) for row in rows]}
    save_json(args.out, results)


if __name__ == "__main__":
    main()
