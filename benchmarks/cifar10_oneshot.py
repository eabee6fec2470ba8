"""One-shot pruning of CIFAR-10 models: global magnitude against CAP with both rankings, from the same gradients.

    python benchmarks/cifar10_oneshot.py --data ../shared/data

``--data`` is a folder with ``cifar10/train.tar``, ``cifar10/val.tar`` and ``weights/<model>_cifar10.safetensors``. Prints a
Markdown table and writes a JSON.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine
from resnet20 import ResNet20
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lightning_cap.calibration import CalibrationBatches
from lightning_cap.data import ImageNetDataModule
from lightning_cap.gradients import GradientCollector
from lightning_cap.module import load_weights
from lightning_cap.pruners import CAP, Magnitude, PruneResult
from lightning_cap.storage import save_json
from lightning_cap.targets import Targets

EVAL_BATCH = 500
DRAW_BATCH = 64  # images decoded at a time
METHODS = ("magnitude", "CAP cumulative", "CAP marginal")


@dataclass(frozen=True)
class Case:
    """A published model and the block size that it is pruned with."""

    make: Callable[[], nn.Module]
    block_size: int


CASES = {
    "resnet20": Case(ResNet20, 64),
    "vit": Case(lambda: VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=10), 128),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is pruned and how."""

    model: str
    block_size: int
    num_gradients: int
    samples_per_gradient: int
    damp: float
    sparsities: list[float]
    seeds: list[int]
    pad: str
    augmentation: str = "pad 4, random 32x32 crop, horizontal flip"


class PaddedAfterwards(Dataset[Any]):
    """Normalised images padded with zeros, cropped and flipped: the border has the mean colour instead of black."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._dataset[index]
        return self._augment(image), label


class Stopwatch:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass
class Benchmark:
    """A model, its data and the accuracies measured so far."""

    settings: Settings
    model: nn.Module
    data: ImageNetDataModule
    images: Tensor
    labels: Tensor
    clock: Stopwatch
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Measure everything; the results without the facts about the machine."""
        dense = self.accuracy(self.model)
        targets = Targets.from_model(self.model)
        print(f"dense: {dense:.2f}", file=sys.stderr)
        self.sweep(Magnitude().path(targets), "magnitude", None)
        for seed in self.settings.seeds:
            rows = self.gradients(targets, seed)
            for ranking in ("cumulative", "marginal"):
                with self.clock.phase(f"Fisher and elimination, {ranking}"):
                    path = self.pruner(ranking).path(targets, rows)
                with path:
                    self.sweep(path, f"CAP {ranking}", seed)
        return {
            "dense": dense,
            "val_images": len(self.labels),
            "targets": len(targets),
            "weights": targets.numel,
            "runs": self.runs,
            "summary": summarise(self.runs, self.settings.sparsities),
            "seconds": {name: round(value, 2) for name, value in self.clock.seconds.items()},
        }

    def pruner(self, ranking: Any) -> CAP:
        s = self.settings
        return CAP(s.block_size, s.num_gradients, s.samples_per_gradient, s.damp, ranking)

    def gradients(self, targets: Targets, seed: int) -> list[dict[str, Tensor]]:
        """Gradient rows of the dense model, ``4·N·d`` bytes; both rankings get the same."""
        count, samples = self.settings.num_gradients, self.settings.samples_per_gradient
        loader = self.data.calibration_dataloader()
        if self.settings.pad == "mean":
            loader = DataLoader(PaddedAfterwards(self.data.training_set(augment=False)), DRAW_BATCH)
        with self.clock.phase("images"):
            batches = list(CalibrationBatches(loader, count * samples, samples, seed=seed, event=0))
        with self.clock.phase("gradients"):
            return list(GradientCollector(self.model, targets, loss, batches, count, samples))

    def sweep(self, path: Any, method: str, seed: int | None) -> None:
        """Evaluate a copy of the model at every sparsity of the path."""
        for sparsity in self.settings.sparsities:
            with self.clock.phase("cut and reconstruction"):
                result: PruneResult = path.at(sparsity)
                pruned = copy.deepcopy(self.model)
                result.apply(Targets.from_model(pruned))
            accuracy = self.accuracy(pruned)
            print(f"{method}, seed {seed}, {100 * sparsity:g} %: {accuracy:.2f}", file=sys.stderr)
            self.runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "target": sparsity,
                    "sparsity": result.sparsity,
                    "accuracy": accuracy,
                    "predicted_loss": result.predicted_loss,
                    "stats": dict(result.stats),
                }
            )

    def accuracy(self, model: nn.Module) -> float:
        """Top-1 in percent, in eval mode."""
        model.eval()
        with self.clock.phase("evaluation"), torch.inference_mode():
            correct = sum(
                int((model(x).argmax(1) == y).sum())
                for x, y in zip(self.images.split(EVAL_BATCH), self.labels.split(EVAL_BATCH), strict=True)
            )
        return 100 * correct / len(self.labels)


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def open_data(root: Path) -> ImageNetDataModule:
    """CIFAR-10 with the augmentation that the models were trained with."""
    return ImageNetDataModule(
        root=str(root),
        recipe="light1",
        label_smoothing=0.0,
        rand_augment="none",
        crop="pad",
        crop_padding=4,
        hflip=0.5,
        img_size=32,
        test_crop_ratio=1.0,
        batch_size=DRAW_BATCH,
        num_workers=0,
        verify_up_to=0,
    )


def decode(data: ImageNetDataModule, limit: int | None) -> tuple[Tensor, Tensor]:
    """Validation images ``(n, 3, 32, 32)`` and labels ``(n,)``, decoded once; with a limit, evenly spaced ones."""
    dataset: Any = data.validation_set()
    size = len(dataset)
    count = size if limit is None else min(limit, size)
    samples = [dataset[i * size // count] for i in range(count)]
    return torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])


def summarise(runs: Sequence[Mapping[str, Any]], sparsities: Sequence[float]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and standard deviation over seeds: ``{method: {sparsity: {mean, sd, seeds}}}``."""
    summary: dict[str, dict[str, dict[str, Any]]] = {method: {} for method in METHODS}
    for method in METHODS:
        for sparsity in sparsities:
            values = [r["accuracy"] for r in runs if r["method"] == method and r["target"] == sparsity]
            sd = statistics.stdev(values) if len(values) > 1 else None
            summary[method][f"{sparsity:g}"] = {"mean": statistics.fmean(values), "sd": sd, "seeds": len(values)}
    return summary


def markdown(results: Mapping[str, Any]) -> str:
    """The two tables: accuracies, and seconds of each phase."""
    sparsities = results["settings"]["sparsities"]
    lines = [
        f"Dense: {results['dense']:.1f} % top-1 on {results['val_images']} validation images; pruned: {results['targets']} "
        f"weight tensors, {results['weights']} weights; gradient seeds {', '.join(map(str, results['settings']['seeds']))}.",
        "",
        "| top-1 in % at a sparsity of | " + " | ".join(f"{100 * s:g} %" for s in sparsities) + " |",
        "| --- |" + " ---: |" * len(sparsities),
    ]
    for method, cells in results["summary"].items():
        shown = [
            f"{c['mean']:.1f}" + ("" if c["sd"] is None else f" ± {c['sd']:.1f}")
            for c in (cells[f"{s:g}"] for s in sparsities)
        ]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    lines += ["", "| phase | seconds, all seeds |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.1f} |" for name, value in results["seconds"].items()]
    return "\n".join(lines)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and weights/")
    parser.add_argument("--model", choices=sorted(CASES), default="resnet20")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the gradient samples")
    parser.add_argument("--per-sample", action="store_true", help="2048 per-sample gradients, not 256 of 64 images")
    parser.add_argument("--num-gradients", type=int, help="instead of 256 or 2048")
    parser.add_argument("--block-size", type=int, help="instead of the model's own (64, ViT 128)")
    parser.add_argument("--damp", type=float, default=1e-8)
    parser.add_argument(
        "--pad",
        choices=["black", "mean"],
        default="mean",
        help="border of the random crops: zeros as the network sees them (after the normalisation), or black pixels",
    )
    parser.add_argument("--val-images", type=int, help="evaluate on so many images, evenly spaced (default: all)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its tables and write its JSON; returns what was written."""
    options = parse(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    case = CASES[options.model]
    settings = Settings(
        model=options.model,
        block_size=options.block_size or case.block_size,
        num_gradients=options.num_gradients or (2048 if options.per_sample else 256),
        samples_per_gradient=1 if options.per_sample else 64,
        damp=options.damp,
        sparsities=options.sparsities,
        seeds=options.seeds,
        pad=options.pad,
    )
    clock = Stopwatch()
    model = case.make().eval()
    load_weights(model, options.data / "weights" / f"{options.model}_cifar10.safetensors")
    data = open_data(options.data / "cifar10")
    with clock.phase("validation images"):
        images, labels = decode(data, options.val_images)
    measured = Benchmark(settings, model, data, images, labels, clock).run()
    results = {"settings": asdict(settings), "machine": machine(), **measured}
    suffix = ("_per_sample" if options.per_sample else "") + ("" if options.pad == "mean" else f"_pad_{options.pad}")
    output = options.output or Path(__file__).parent / "results" / f"cifar10_oneshot_{options.model}{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    save_json(output, results)
    print(markdown(results))
    print(f"\nWritten to {os.path.relpath(output)}.")
    return results


if __name__ == "__main__":
    main()
