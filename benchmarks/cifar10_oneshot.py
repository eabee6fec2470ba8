"""One-shot pruning of CIFAR-10 models: global magnitude against CAP with both rankings, from the same gradients.

    python benchmarks/cifar10_oneshot.py --data ../shared/data
    python benchmarks/cifar10_oneshot.py --data ../shared/data --per-sample --methods all --tune 0.7 0.8 0.9

``--data`` is a folder with ``cifar10/train.tar``, ``cifar10/val.tar`` and ``weights/<model>_cifar10.safetensors``. Prints a
Markdown table and writes a JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar10_data import DRAW_BATCH, PaddedAfterwards, decode, open_data
from cifar10_methods import METHODS, PAPER, Method, Scale
from float64_share import float64_share
from machine import machine
from resnet20 import ResNet20
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.layer_inputs import InputCollector
from lightning_cap.calibration.statistics import GradientSamples, LayerInputs
from lightning_cap.classifier import load_weights
from lightning_cap.data import ImageNetDataModule
from lightning_cap.healing import Heal
from lightning_cap.oneshot import prune
from lightning_cap.pruners import MFAC, PruneResult, PruningPath, Random
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.files import save_json

EVAL_BATCH = 500
RECALIBRATED = 1024  # images, with --recalibrate
HELD_OUT = 10  # with --tune, every tenth training image is for tuning alone


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
    methods: list[str]
    tuned_at: list[float]
    recalibrate: bool
    sparsities: list[float]
    seeds: list[int]
    pad: str
    images: str
    augmentation: str = "pad 4, random 32x32 crop, horizontal flip"


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
    tuning: tuple[Tensor, Tensor] | None = None  # images and labels that no calibration sample is drawn from
    calibration: list[Tensor] = field(default_factory=list)  # images of the first seed
    batches: list[Any] = field(default_factory=list)  # of the seed at hand, with labels
    damps: dict[str, float] = field(default_factory=dict)
    grid: dict[str, dict[str, float]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Measure everything; the results without the facts about the machine."""
        dense = self.accuracy(self.model)
        targets = Targets.from_model(self.model)
        print(f"dense: {dense:.2f}", file=sys.stderr)
        chosen = {name: METHODS[name] for name in self.settings.methods}
        for number, seed in enumerate(self.settings.seeds):
            sources = self.sources(targets, seed, chosen)
            if number == 0:
                self.tune(targets, chosen, sources)
            for name, method in chosen.items():
                if method.stages > 1:
                    self.staged(name, method, seed)
                elif method.seeded or number == 0:
                    with self.path(targets, name, method, self.damps[name], sources, seed) as path:
                        self.sweep(path, name, seed if method.seeded else None, method.heal)
        return {
            "dense": dense,
            "val_images": len(self.labels),
            "targets": len(targets),
            "weights": targets.numel,
            "damps": self.damps,
            "grid": self.grid,
            "runs": self.runs,
            "summary": summarise(self.runs, self.settings),
            "seconds": {name: round(value, 2) for name, value in self.clock.seconds.items()},
        }

    def tune(self, targets: Targets, chosen: Mapping[str, Method], sources: Mapping[str, Any]) -> None:
        """The damp of each method by its mean accuracy on the held-out images, with the first seed's gradients."""
        for name, method in chosen.items():
            self.damps[name] = self.settings.damp
            if self.tuning is None or not method.damps:
                continue
            scores = {}
            for damp in method.damps:
                with self.path(targets, name, method, damp, sources, self.settings.seeds[0]) as path:
                    pruned = [self.pruned(path.at(s), method.heal) for s in self.settings.tuned_at]
                    scores[f"{damp:g}"] = statistics.fmean(self.accuracy(m, self.tuning) for m in pruned)
                print(f"tuning {name}, damp {damp:g}: {scores[f'{damp:g}']:.2f}", file=sys.stderr)
            self.grid[name] = scores
            self.damps[name] = float(max(scores, key=lambda damp: scores[damp]))

    def path(
        self, targets: Targets, name: str, method: Method, damp: float, sources: Mapping[str, Any], seed: int
    ) -> PruningPath:
        """Solve with one method."""
        s = self.settings
        pruner = method.make(Scale(s.block_size, s.num_gradients, s.samples_per_gradient), damp)
        if isinstance(pruner, Random):
            pruner.seed = seed
        source = () if pruner.statistic is None else sources[pruner.statistic.unit]
        if isinstance(pruner, MFAC):
            source = first_rows(source, pruner.num_gradients)
        with self.clock.phase(f"statistics and order, {name}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "damp=")  # of a grid that begins too low on purpose
            return pruner.path(targets, source)

    def sources(self, targets: Targets, seed: int, chosen: Mapping[str, Method]) -> dict[str, Any]:
        """Gradient rows of the dense model, ``4·N·d`` bytes, and layer statistics; all methods get the same."""
        count, samples = self.settings.num_gradients, self.settings.samples_per_gradient
        loader = self.data.calibration_dataloader()
        dataset: Any = self.data.training_set(augment=False) if self.settings.pad == "mean" else loader.dataset
        augmented = PaddedAfterwards(dataset) if self.settings.pad == "mean" else dataset
        if self.tuning is not None:
            augmented = Subset(augmented, [i for i in range(len(dataset)) if i % HELD_OUT])
        with self.clock.phase("images"):
            batches = list(
                CalibrationBatches(DataLoader(augmented, DRAW_BATCH), count * samples, samples, seed=seed, event=0)
            )
        self.batches = batches
        self.calibration = self.calibration or [batch[0] for batch in batches[: RECALIBRATED // len(batches[0][0])]]
        found: dict[str, Any] = {}
        read = {type(method.make(Scale(4, 2, 1), 1.0).statistic) for method in chosen.values()}
        with self.clock.phase("gradients"):
            if GradientSamples in read:
                found["gradients"] = list(GradientCollector(self.model, targets, loss, batches, count, samples))
        with self.clock.phase("layer inputs"):
            if LayerInputs in read:
                found["inputs"] = list(InputCollector(self.model, targets, loss, batches, count * samples))
        return found

    def pruned(self, result: PruneResult, heal: Heal | None) -> nn.Module:
        """A copy of the model with a result applied, and healed or with new BatchNorm statistics."""
        pruned = copy.deepcopy(self.model)
        targets = Targets.from_model(pruned)
        dense = {name: p.detach().clone() for name, p in (heal.parameters(pruned, targets) if heal else {}).items()}
        result.apply(targets)
        if heal is not None:
            with self.clock.phase("healing"):
                heal.run(pruned, targets, result.masks, dense, self.batches, loss)
            return pruned
        return self.recalibrated(pruned)

    def recalibrated(self, model: nn.Module) -> nn.Module:
        """The model itself, with new BatchNorm statistics if they are asked for."""
        if self.settings.recalibrate:
            with self.clock.phase("BatchNorm statistics"):
                recalibrate(model, self.calibration)
        return model

    def sweep(self, path: Any, method: str, seed: int | None, heal: Heal | None) -> None:
        """Evaluate a copy of the model at every sparsity of the path."""
        for sparsity in self.settings.sparsities:
            with self.clock.phase("cut and reconstruction"):
                result: PruneResult = path.at(sparsity)
            self.record(method, seed, sparsity, result, self.pruned(result, heal))

    def staged(self, name: str, method: Method, seed: int) -> None:
        """Prune copies of the model in steps, each with the samples that follow, and evaluate them."""
        s = self.settings
        pruner = method.make(Scale(s.block_size, s.num_gradients, s.samples_per_gradient), s.damp)
        for sparsity in s.sparsities:
            model = copy.deepcopy(self.model)
            with self.clock.phase(f"all of {name}"):
                result = prune(
                    model,
                    Onwards(self.batches),
                    loss,
                    sparsity,
                    pruner,
                    num_recomputations=method.stages,
                    progress=False,
                )
            self.record(name, seed, sparsity, result, self.recalibrated(model))

    def record(self, method: str, seed: int | None, sparsity: float, result: PruneResult, pruned: nn.Module) -> None:
        """Evaluate a pruned model."""
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

    def accuracy(self, model: nn.Module, on: tuple[Tensor, Tensor] | None = None) -> float:
        """Top-1 in percent, in eval mode; on the validation images unless told."""
        model.eval()
        images, labels = on or (self.images, self.labels)
        with self.clock.phase("evaluation"), torch.inference_mode():
            correct = sum(
                int((model(x).argmax(1) == y).sum())
                for x, y in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True)
            )
        return 100 * correct / len(labels)


class Onwards:
    """Batches that each reading goes on with, from the first again after the last."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._left = itertools.cycle(batches)

    def __iter__(self) -> Iterator[Any]:
        return self._left


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Estimate the BatchNorm statistics anew, as plain means over some batches."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    for images in batches if layers else ():
        model(images)
    model.eval()


def first_rows(chunks: Sequence[Mapping[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    """The first ``count`` gradient rows."""
    for chunk in chunks:
        if count <= 0:
            return
        rows = {name: tensor[:count] for name, tensor in chunk.items()}
        count -= len(next(iter(rows.values())))
        yield rows


def summarise(runs: Sequence[Mapping[str, Any]], settings: Settings) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and standard deviation over seeds: ``{method: {sparsity: {mean, sd, seeds}}}``."""
    summary: dict[str, dict[str, dict[str, Any]]] = {method: {} for method in settings.methods}
    for method in settings.methods:
        for sparsity in settings.sparsities:
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
        "| top-1 in % at a sparsity of | "
        + " | ".join(f"{100 * s:g} %" for s in sparsities)
        + " | blocks in float64 |",
        "| --- |" + " ---: |" * (len(sparsities) + 1),
    ]
    for method, cells in results["summary"].items():
        shown = [
            f"{c['mean']:.1f}" + ("" if c["sd"] is None else f" ± {c['sd']:.1f}")
            for c in (cells[f"{s:g}"] for s in sparsities)
        ]
        damp = f" (damp {results['damps'][method]:g})" if method in results["grid"] else ""
        shown.append(float64_share([run for run in results["runs"] if run["method"] == method]))
        lines.append(f"| {method}{damp} | " + " | ".join(shown) + " |")
    lines += ["", "| phase | seconds, all seeds |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.1f} |" for name, value in results["seconds"].items()]
    return "\n".join(lines)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and weights/")
    parser.add_argument("--images", default="cifar10", help="folder in --data with train.tar and val.tar")
    parser.add_argument("--weights", type=Path, help="folder of the weights, if it is another one")
    parser.add_argument("--model", choices=sorted(CASES), default="resnet20")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the gradient samples")
    parser.add_argument("--per-sample", action="store_true", help="2048 per-sample gradients, not 256 of 64 images")
    parser.add_argument("--num-gradients", type=int, help="instead of 256 or 2048")
    parser.add_argument("--block-size", type=int, help="instead of the model's own (64, ViT 128)")
    parser.add_argument("--damp", type=float, default=1e-8)
    parser.add_argument("--methods", nargs="+", choices=["all", *METHODS], default=list(PAPER), metavar="NAME")
    parser.add_argument(
        "--tune",
        type=float,
        nargs="+",
        metavar="SPARSITY",
        help="choose each method's damp from a grid by its mean accuracy at these sparsities on every tenth training image, "
        "which calibration then leaves out",
    )
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="estimate BatchNorm statistics anew after pruning, on calibration images",
    )
    parser.add_argument("--tune-images", type=int, help="evenly spaced ones of those (default: all)")
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
        methods=list(METHODS) if "all" in options.methods else options.methods,
        tuned_at=options.tune or [],
        recalibrate=options.recalibrate,
        sparsities=options.sparsities,
        seeds=options.seeds,
        pad=options.pad,
        images=options.images,
    )
    clock = Stopwatch()
    model = case.make().eval()
    load_weights(model, (options.weights or options.data / "weights") / f"{options.model}_cifar10.safetensors")
    data = open_data(options.data / options.images)
    with clock.phase("validation images"):
        images, labels = decode(data.validation_set(), options.val_images)
        tuning = decode(data.training_set(augment=False), options.tune_images, HELD_OUT) if options.tune else None
    measured = Benchmark(settings, model, data, images, labels, clock, tuning).run()
    results = {"settings": asdict(settings), "machine": machine(), **measured}
    suffix = ("_per_sample" if options.per_sample else "") + ("" if options.pad == "mean" else f"_pad_{options.pad}")
    suffix += "" if options.images == "cifar10" else f"_{options.images.removeprefix('cifar10-')}"
    suffix += ("_all" if "all" in options.methods else "") + ("_recalibrated" if options.recalibrate else "")
    output = options.output or Path(__file__).parent / "results" / f"cifar10_oneshot_{options.model}{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    save_json(output, results)
    print(markdown(results))
    print(f"\nWritten to {os.path.relpath(output)}.")
    return results


if __name__ == "__main__":
    main()
