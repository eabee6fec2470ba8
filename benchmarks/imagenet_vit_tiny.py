"""One-shot pruning of an ImageNet ViT-Tiny: every method from the same gradients, with healing, and 2:4.

    python benchmarks/imagenet_vit_tiny.py --data ../shared/data
    python benchmarks/imagenet_vit_tiny.py --data ../shared/data --held-out --methods ablation --seeds 0

``--data`` is a folder with ``imagenet1k-sample/train.tar``, ``imagenet1k-sample/val.tar`` and
``weights/vit_tiny_patch16_224.safetensors``. Prints Markdown tables and writes a JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from float64_share import float64_share
from imagenet_methods import METHODS, SETS, Method
from machine import machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.classifier import load_weights
from lightning_cap.data import ImageNetDataModule
from lightning_cap.fisher.blocks import EmpiricalFisher, FisherBlocks
from lightning_cap.healing import Heal
from lightning_cap.pruners import PruneResult
from lightning_cap.sparsity.permutation import permute_channels
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.files import save_json

MODEL = "vit_tiny_patch16_224"
INCLUDE = ["*.attn.qkv.weight", "*.attn.proj.weight", "*.mlp.fc?.weight"]
YARDSTICK = "CAP, published"
HELD_OUT = 5  # every fifth training image
BATCH, EVAL_BATCH = 32, 100
HEAL_SEED = 1000  # added to the seed: healing sees other augmentations than the gradients


@dataclass(frozen=True)
class Settings:
    """What is pruned and how."""

    methods: list[str]
    sparsities: list[float]
    seeds: list[int]
    num_gradients: int
    block_size: int
    held_out: bool
    labels: str
    permute: bool
    augmentation: str = "random resized crop, horizontal flip, color jitter (light1)"


class Benchmark:
    """The model, its data, and what was measured so far."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.model = timm.create_model(MODEL, pretrained=False).eval()
        load_weights(self.model, folder / "weights" / f"{MODEL}.safetensors")
        if settings.permute:
            permute_channels(self.model, torch.zeros(1, 3, 224, 224))
        self.targets = Targets.from_model(self.model, include=INCLUDE)
        data = ImageNetDataModule(
            str(folder / "imagenet1k-sample"), recipe="light1", batch_size=BATCH, num_workers=0, mixup=0.0, cutmix=0.0,
            erasing_prob=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), test_crop_ratio=0.9,
        )  # fmt: skip
        data.setup("fit")
        training: Dataset[Any] = data.calibration_dataloader().dataset
        plain = data.training_set(augment=False)
        held = range(0, len(plain), HELD_OUT)  # type: ignore[arg-type]
        if settings.held_out:
            training = Subset(training, [i for i in range(len(plain)) if i not in held])  # type: ignore[arg-type]
        self.training = training
        judged = Subset(plain, list(held)) if settings.held_out else data.validation_set()
        self.images, self.labels = (torch.stack(list(x)) for x in zip(*map(_sample, judged), strict=True))
        self.dense = self.logits(self.model)
        self.runs: list[dict[str, Any]] = []

    def run(self) -> Iterator[dict[str, Any]]:
        """Measure everything; what is known after each seed."""
        dense = 100 * float((self.dense.argmax(1) == self.labels).float().mean())
        print(f"dense: {dense:.1f}", file=sys.stderr)
        for number, seed in enumerate(self.settings.seeds):
            chosen = {name: METHODS[name] for name in self.settings.methods if METHODS[name].seeded or number == 0}
            fishers, seconds = self.fishers(seed, {m.shrinkage for m in chosen.values() if m.reads_gradients})
            for name, method in chosen.items():
                if method.reads_gradients:
                    self.method(name, method, seed, fishers[method.shrinkage], seconds)
            fishers.clear()
            for name, method in chosen.items():
                if not method.reads_gradients:
                    self.method(name, method, seed, None, 0.0)
            yield {"dense": dense, "images": len(self.labels), "weights": self.targets.numel, "runs": self.runs}

    def batches(self, seed: int, count: int) -> list[Any]:
        """Augmented calibration batches."""
        return list(CalibrationBatches(DataLoader(self.training, BATCH), count, 1, seed=seed, event=0))

    def fishers(self, seed: int, shrinkages: Collection[float]) -> tuple[dict[float, FisherBlocks], float]:
        """Blocks of the same gradients, one for each shrinkage, and the seconds that all together took."""
        if not shrinkages:
            return {}, 0.0
        count = self.settings.num_gradients
        batches = self.batches(seed, count)
        if self.settings.labels != "given":
            batches = list(self.relabelled(batches, float(self.settings.labels), seed))
        started = time.perf_counter()
        blocks = self.targets.blocks(self.settings.block_size)
        fishers = {share: EmpiricalFisher(blocks, torch.device("cpu"), shrinkage=share) for share in sorted(shrinkages)}
        for chunk in GradientCollector(self.model, self.targets, loss, batches, count, 1):
            for fisher in fishers.values():
                fisher.update(chunk)
        finished = {share: fisher.finish() for share, fisher in fishers.items()}
        seconds = time.perf_counter() - started
        print(f"seed {seed}: gradients {seconds:.0f} s", file=sys.stderr)
        return finished, seconds

    def relabelled(self, batches: Sequence[Any], temperature: float, seed: int) -> Iterator[Any]:
        """Labels drawn from the dense model's own probabilities: the true Fisher in place of the empirical one."""
        generator = torch.Generator().manual_seed(seed)
        for images, _ in batches:
            with torch.inference_mode():
                chances = (self.model(images) / temperature).softmax(-1)
            yield images, torch.multinomial(chances, 1, generator=generator).squeeze(1)

    def method(self, name: str, method: Method, seed: int, fisher: FisherBlocks | None, gradients: float) -> None:
        """Solve with one method and evaluate it at every sparsity."""
        pruner = method.make(self.settings.block_size, self.settings.num_gradients)
        source: Any = ()
        passes = self.settings.num_gradients if method.reads_gradients else 0
        if fisher is not None:
            pruner.read_blocks = lambda *_: fisher  # type: ignore[attr-defined]
        elif pruner.statistic is not None:
            passes = pruner.statistic.num_samples
            source = pruner.statistic.collector(self.model, self.targets, loss, self.batches(seed, passes))
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "damp=")
            path = pruner.path(self.targets, source)
        solving = time.perf_counter() - started
        goals = self.settings.sparsities if pruner.pattern.sparsity is None else [pruner.pattern.sparsity]
        for goal in goals:
            started = time.perf_counter()
            result = path.at(goal)
            row = {"method": name, "seed": seed if method.seeded else None, "goal": goal, "passes": passes}
            row |= {
                "gradients": gradients,
                "solving": solving + time.perf_counter() - started,
                "stats": dict(result.stats),
            }
            for heal_name, heal in (("", None), *method.heals.items()):
                self.runs.append({**row, "heal": heal_name, **self.judged(result, heal, seed)})
                last = self.runs[-1]
                shown = f"{name}{heal_name and ' + '}{heal_name}, seed {seed}, {100 * goal:g} %"
                print(f"{shown}: {last['top1']:.1f}, divergence {last['divergence']:.3f}", file=sys.stderr, flush=True)
        path.close()

    def judged(self, result: PruneResult, heal: Heal | None, seed: int) -> dict[str, float]:
        """Accuracy of a copy of the model with a result applied, and healed."""
        model = copy.deepcopy(self.model)
        targets = Targets.from_model(model, include=INCLUDE)
        seconds, passes = 0.0, 0
        if heal is not None:
            dense = {name: p.detach().clone() for name, p in heal.parameters(model, targets).items()}
            result.apply(targets)
            batches = self.batches(HEAL_SEED + seed, heal.num_inputs)
            started = time.perf_counter()
            report = heal.run(model, targets, result.masks, dense, batches, loss, context=bfloat16)
            seconds, passes = time.perf_counter() - started, report.passes
        else:
            result.apply(targets)
        logits = self.logits(model)
        apart = F.kl_div(logits.log_softmax(-1), self.dense.log_softmax(-1), log_target=True, reduction="batchmean")
        zeros = 1 - sum(int(w.count_nonzero()) for w in targets.values()) / targets.numel
        correct = logits.argmax(1) == self.labels
        return {"top1": 100 * float(correct.float().mean()), "divergence": float(apart), "zeros": zeros,
                "healing": seconds, "heal_passes": passes}  # fmt: skip

    @torch.inference_mode()
    def logits(self, model: nn.Module) -> Tensor:
        """Of the images that methods are judged by."""
        return torch.cat([model.eval()(images) for images in self.images.split(EVAL_BATCH)])


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def bfloat16() -> AbstractContextManager[Any]:
    """Healing runs in this precision."""
    return torch.autocast("cpu", torch.bfloat16)


def _sample(sample: Any) -> tuple[Tensor, Tensor]:
    return sample[0], torch.tensor(int(sample[1]))


def markdown(results: Mapping[str, Any]) -> str:
    """Accuracy, and what it took."""
    settings, runs = results["settings"], results["runs"]
    goals = sorted({(run["goal"], "2:4" in run["method"]) for run in runs}, key=lambda goal: (goal[1], goal[0]))
    names = list(dict.fromkeys((run["method"], run["heal"]) for run in runs))
    judged = "held-out training images" if settings["held_out"] else "validation images"
    seeds = ", ".join(map(str, settings["seeds"]))
    head = [f"{100 * goal:g} %" for goal, pattern in goals if not pattern] + ["2:4"] * any(
        pattern for _, pattern in goals
    )
    lines = [
        f"Dense: {results['dense']:.1f} % top-1 on {results['images']} {judged}; pruned: {results['weights']} weights; "
        f"{settings['num_gradients']} gradients, blocks of {settings['block_size']}, seeds {seeds}. Top-1 in %, with the standard "
        "deviation over seeds, and the divergence from the dense model's outputs.",
        "",
        "| method | " + " | ".join(head) + " | image passes | gradients, s | solving, s | healing, s | float64 |",
        "| --- |" + " ---: |" * (len(head) + 5),
    ]
    for name, heal in names:
        here = [run for run in runs if (run["method"], run["heal"]) == (name, heal)]
        cells = [
            _cell([r for r in here if r["goal"] == goal and ("2:4" in name) == pattern]) for goal, pattern in goals
        ]
        cells += [str(here[0]["passes"] + here[0]["heal_passes"])]
        cells += [f"{statistics.fmean(r[key] for r in here):.0f}" for key in ("gradients", "solving", "healing")]
        cells.append(float64_share(here))
        lines.append(f"| {name}{heal and ' + '}{heal} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_paired(runs, names)])


def _paired(runs: Sequence[Mapping[str, Any]], names: Sequence[tuple[str, str]]) -> list[str]:
    """Points above `YARDSTICK`, seed by seed, with the standard error of their mean; nothing of fewer than two seeds."""
    top1 = {(run["method"], run["heal"], run["goal"], run["seed"]): run["top1"] for run in runs}
    goals = sorted({run["goal"] for run in runs if run["method"] == YARDSTICK})
    rows = []
    for name in names:
        cells = []
        for goal in goals:
            own = {seed: value for (*what, seed), value in top1.items() if what == [*name, goal]}
            gains = [own[seed] - top1[YARDSTICK, "", goal, seed] for seed in own if (YARDSTICK, "", goal, seed) in top1]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
            cells.append("" if error is None else f"{statistics.fmean(gains):+.1f} ± {error:.1f}")
        if name[0] != YARDSTICK and "2:4" not in name[0] and any(cells):
            rows.append(f"| {name[0]}{name[1] and ' + '}{name[1]} | " + " | ".join(cells) + " |")
    head = [f"| points above {YARDSTICK}, paired by seed | " + " | ".join(f"{100 * g:g} %" for g in goals) + " |"]
    return ["", *head, "| --- |" + " ---: |" * len(goals), *rows] if rows else []


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several that differ in seeds and methods; of runs without a seed the first counts."""
    runs: dict[Any, Mapping[str, Any]] = {}
    for run in (run for part in parts for run in part["runs"]):
        runs.setdefault((run["method"], run["heal"], run["goal"], run["seed"]), run)
    seeds = sorted({seed for part in parts for seed in part["settings"]["seeds"]})
    return {**parts[0], "runs": list(runs.values()), "settings": {**parts[0]["settings"], "seeds": seeds}}


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return ""
    values = [run["top1"] for run in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} ({statistics.fmean(run['divergence'] for run in runs):.2f})"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="folder with imagenet1k-sample/ and weights/")
    what.add_argument(
        "--show", type=Path, nargs="+", help="print the table of the runs in these JSON files, of other seeds each"
    )
    parser.add_argument("--methods", nargs="+", choices=[*SETS, *METHODS], default=["table"], metavar="NAME")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration samples")
    parser.add_argument("--num-gradients", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=192)
    parser.add_argument("--held-out", action="store_true", help="for tuning: judge by every fifth training image, and calibrate "
                        "by the others")  # fmt: skip
    parser.add_argument(
        "--labels", default="given", help="a temperature: sample them from the dense model's probabilities"
    )
    parser.add_argument("--permute", action="store_true", help="channels first, for 2:4")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its tables and write its JSON; returns what was written."""
    options = parse(args)
    if options.show:
        results = joined([json.loads(path.read_text()) for path in options.show])
        print(markdown(results))
        return results
    if options.threads:
        torch.set_num_threads(options.threads)
    methods = list(dict.fromkeys(name for given in options.methods for name in SETS.get(given, [given])))
    settings = Settings(
        methods,
        options.sparsities,
        options.seeds,
        options.num_gradients,
        options.block_size,
        options.held_out,
        options.labels,
        options.permute,
    )
    suffix = ("_held_out" if options.held_out else "") + ("" if options.labels == "given" else "_sampled_labels")
    suffix += "_permuted" if options.permute else ""
    suffix += "" if options.methods == ["table"] else f"_{options.methods[0].replace(' ', '_').replace(':', '')}"
    output = options.output or Path(__file__).parent / "results" / f"imagenet_vit_tiny{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for measured in Benchmark(settings, options.data).run():
        results = {"settings": asdict(settings), "machine": machine(), **measured}
        save_json(output, results)
    print(markdown(results))
    print(f"\nWritten to {os.path.relpath(output)}.")
    return results


if __name__ == "__main__":
    main()
