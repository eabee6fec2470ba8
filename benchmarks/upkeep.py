"""What keeping the masks in force costs between pruning events, as a share of a training step.

    python benchmarks/upkeep.py --threads 1

Steps without and with the upkeep take turns; a step is forward, backward and AdamW. The upkeep is both of its calls:
masked gradients before the optimizer step, masked weights after it. The last case is a hard one: a deep
stack of tiny layers, where a training step itself is little more than calls. Prints a Markdown table and writes
``results/upkeep.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from machine import machine
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """A model, the shape of one input, and the batch on the CPU and on a GPU (bf16 autocast there)."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    gpu_batch: int


def digits() -> nn.Module:
    return VisionTransformer(8, 2, 1, 10, global_pool="avg", embed_dim=64, depth=4, num_heads=4)


def many() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(302) for layer in (nn.Linear(32, 32), nn.ReLU())))


CASES = {
    "digits ViT": Case(digits, (1, 8, 8), 128, 128),
    "deit_small_patch16_224": Case(lambda: timm.create_model("deit_small_patch16_224"), (3, 224, 224), 4, 256),
    "302 layers of 32 x 32": Case(many, (32,), 512, 512),
}


class Operators(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Training:
    """One model in training; ``sparsity`` of its targets' weights are masked at random."""

    def __init__(self, case: Case, device: torch.device, sparsity: float) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = case.make().to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        batch = case.batch if device.type == "cpu" else case.gpu_batch
        self.inputs = torch.randn(batch, *case.shape, device=device)
        with torch.no_grad():
            classes = self.model(self.inputs[:1]).shape[1]
        self.labels = torch.randint(classes, (batch,), device=device)
        self.targets = Targets.from_model(self.model)
        self.masks = MaskSet(self.targets)
        self.masks.update({name: torch.rand_like(w) >= sparsity for name, w in self.targets.weights().items()})
        self.average = copy.deepcopy(self.model)

    def clock(self, call: Callable[[], Any]) -> float:
        """Seconds of a call, from an idle device to an idle device."""
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = nn.functional.cross_entropy(self.model(self.inputs), self.labels)
        loss.backward()

    def upkeep(self) -> None:
        self.masks.apply_to_gradients()
        self.masks.apply_to_weights()

    @torch.no_grad()
    def by_bool(self) -> None:
        """The same products without the multipliers that `MaskSet` keeps."""
        weights, masks = list(self.targets.values()), list(self.masks.values())
        torch._foreach_mul_([w.grad for w in weights], masks)
        torch._foreach_mul_(weights, masks)

    def plain_step(self) -> dict[str, float]:
        return {"without": self.clock(lambda: (self.backward(), self.optimizer.step()))}

    def masked_step(self) -> dict[str, float]:
        parts = {
            "backward": self.clock(self.backward),
            "gradients": self.clock(self.masks.apply_to_gradients),
            "optimizer": self.clock(self.optimizer.step),
            "weights": self.clock(self.masks.apply_to_weights),
        }
        parts["with"] = sum(parts.values())
        parts["upkeep"] = parts["gradients"] + parts["weights"]
        parts["average"] = self.clock(lambda: self.masks.apply_to_copy(self.average))
        parts["bool"] = self.clock(self.by_bool)
        return parts


def operators(training: Training) -> dict[str, int]:
    """Name -> number of the torch operators that one step's upkeep calls."""
    with Operators() as counted:
        training.upkeep()
    return dict(counted.calls)


def on_the_gpu(training: Training) -> dict[str, int]:
    """Kernels of one step's upkeep; raises if it makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.upkeep()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        training.clock(training.upkeep)
    events = profile.events() or []
    return {"kernels": sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events), "host_syncs": 0}


def measure(name: str, device: torch.device, repeats: int, sparsity: float) -> dict[str, Any]:
    training = Training(CASES[name], device, sparsity)
    for _ in range(2):
        training.plain_step()
        training.masked_step()
    parts: dict[str, list[float]] = {}
    for _ in range(repeats):
        for key, value in {**training.plain_step(), **training.masked_step()}.items():
            parts.setdefault(key, []).append(value)
    seconds = {key: median(values) for key, values in parts.items()}
    return {
        "case": name,
        "batch": len(training.inputs),
        "targets": len(training.targets),
        "weights": training.targets.numel,
        "seconds": seconds,
        "upkeep_percent": 100 * seconds["upkeep"] / seconds["without"],
        "average_percent": 100 * seconds["average"] / seconds["without"],
        "bool_percent": 100 * seconds["bool"] / seconds["without"],
        "operators": operators(training),
        "operators_unmasked": operators(Training(CASES[name], device, sparsity=0.0)),
        **(on_the_gpu(training) if device.type == "cuda" else {}),
    }


def table(results: list[dict[str, Any]]) -> str:
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "batch": lambda r: str(r["batch"]),
        "targets": lambda r: str(r["targets"]),
        "weights of the targets": lambda r: f"{r['weights']:,}",
        "step without upkeep, ms": lambda r: f"{1e3 * r['seconds']['without']:.2f}",
        "step with upkeep, ms": lambda r: f"{1e3 * r['seconds']['with']:.2f}",
        "upkeep: gradients, ms": lambda r: f"{1e3 * r['seconds']['gradients']:.3f}",
        "upkeep: weights, ms": lambda r: f"{1e3 * r['seconds']['weights']:.3f}",
        "**upkeep, % of the step**": lambda r: f"**{r['upkeep_percent']:.2f}**",
        "the same by bool masks, %": lambda r: f"{r['bool_percent']:.2f}",
        "an averaged copy besides, %": lambda r: f"{r['average_percent']:.2f}",
        "torch operators of the upkeep": lambda r: str(sum(r["operators"].values())),
        "the same with nothing masked": lambda r: str(sum(r["operators_unmasked"].values())),
    }
    if all("kernels" in r for r in results):
        rows["kernels of the upkeep"] = lambda r: str(r["kernels"])
        rows["host syncs of the upkeep"] = lambda r: str(r["host_syncs"])
    head = [
        "| median of the steps | " + " | ".join(r["case"] for r in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    return "\n".join(
        head + [f"| {title} | " + " | ".join(cell(r) for r in results) + " |" for title, cell in rows.items()]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=15, help="pairs of steps")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/upkeep.json")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    results = [measure(name, device, arguments.repeats, arguments.sparsity) for name in arguments.cases]
    out = {
        "machine": machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "settings": {"repeats": arguments.repeats, "sparsity": arguments.sparsity},
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(out, indent=2) + "\n")
    print(table(results))
    print(f"\n{out['device']}, {torch.get_num_threads()} CPU threads.")
    return out


if __name__ == "__main__":
    main()
