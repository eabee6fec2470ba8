"""Pruning together with int8, with fewer tokens and with a teacher: accuracy, size on disk, FLOPs and time of each combination.

    python benchmarks/composite.py --parts digits_configs digits --seeds 0 1 2
    python benchmarks/composite.py --parts cifar10 vit_tiny --data ../shared/data

Prints a Markdown table of each part and writes a JSON after every row; rows that are in it are not run again. Files are those of
``lightning-cap export``: ONNX of each model, with QuantizeLinear and DequantizeLinear for int8, and the smallest weights, a bit
mask and the values that are left, or torchao's integers. "static" is the same int8 model with constant scales
(``--to.static true``), judged by its file. Times are of the ONNX files in onnxruntime, all rows of a part in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composite_parts import PARTS, Part, without_int8
from machine import machine
from torch import Tensor, nn

from lightning_cap.errors import ExportError
from lightning_cap.export import ONNX, QDQ, Compressed, Exporter, TorchAO
from lightning_cap.export.benchmark import benchmark
from lightning_cap.quantization.layers import fake_quantized, plain_linears
from lightning_cap.sparsity import model_flops
from lightning_cap.sparsity.flops import zero_shares
from lightning_cap.sparsity.layers import prunable_layers
from lightning_cap.utilities.files import save_json

EVAL_BATCH = 50
VERIFIED = 32  # images that a file is compared with torch on, and that constant scales are taken from


@torch.inference_mode()
def right(model: Callable[[Tensor], Tensor], part: Part) -> Tensor:
    """Which images the model names rightly."""
    found = torch.cat([model(images).argmax(1) for images in part.images.split(EVAL_BATCH)])
    return found == part.labels


def judged(correct: Tensor, part: Part, row: str, seed: int) -> dict[str, Any]:
    """Top-1 in %; of int8 the points beside the same row without it, with their standard error on these images."""
    folder = part.work / f"right, seed {seed}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(correct, folder / f"{row}.pt")
    out: dict[str, Any] = {"top1": 100 * float(correct.float().mean())}
    plain = folder / f"{without_int8(row)}.pt"
    if "int8" in row and plain.is_file():
        change = correct.float() - torch.load(plain, weights_only=True).float()
        out["int8"] = {"points": 100 * float(change.mean()), "error": 100 * float(change.std()) / len(change) ** 0.5}
    return out


def counted(model: nn.Module, image: Tensor) -> dict[str, float]:
    """FLOPs, those that are left when zeros are skipped, and the share of zeros in weights of layers."""
    with plain_linears(model):
        flops = model_flops(model, lambda: model(image))
        weights = {name: weight for name, weight in model.named_parameters() if name in prunable_layers(model)}
        shares = zero_shares(weights)
        zeros = sum(shares[name] * weight.numel() for name, weight in weights.items())
    return {
        "flops": flops.total,
        "effective": flops.effective(shares),
        "zeros": zeros / sum(weight.numel() for weight in weights.values()),
    }


def static(row: str) -> str:
    """The row of the same model with constant scales."""
    return f"{row}, static"


def file_of(part: Part, row: str, suffix: str) -> Path:
    """Where a row is exported to."""
    return part.work / "files" / f"{row.replace(' ', '')}{suffix}"


def exported(model: nn.Module, part: Part, row: str, formats: Mapping[str, Exporter]) -> dict[str, Any]:
    """Bytes of the files, which are compared with torch and read back as they are written; why one could not be."""
    out: dict[str, Any] = {"files": {}, "refused": {}}
    for name, exporter in formats.items():
        try:
            path = file_of(part, row, exporter.suffix)
            out["files"][name] = exporter.export(model, path, part.images[:VERIFIED]).bytes
        except ExportError as error:
            out["refused"][name] = str(error)
    return out


def rows_of(model: nn.Module, part: Part, row: str, seed: int) -> dict[str, dict[str, Any]]:
    """The row of a model and, if it has int8, that of its file with constant scales."""
    known, int8 = counted(model, part.images[:1]), bool(fake_quantized(model))
    formats: dict[str, Exporter] = {"onnx": ONNX(), "compressed": Compressed()}
    if int8:
        formats = {"qdq": QDQ(), "torchao": TorchAO()}
    found = {row: {**known, **exported(model, part, row, formats), **judged(right(model, part), part, row, seed)}}
    if int8:
        name, exporter = static(row), QDQ(static=True)
        held = exported(model, part, name, {"qdq": exporter})
        if held["files"]:
            run = exporter.runner(file_of(part, name, exporter.suffix), threads=torch.get_num_threads())
            found[name] = {**known, **held, **judged(right(run, part), part, name, seed)}
        else:
            found[row]["refused"]["static"] = held["refused"]["qdq"]
    return found


def measured(part: Part, rows: Sequence[str], seconds: float, threads: int) -> dict[str, Any]:
    """Times of the ONNX files, each beside the first one's."""
    found: dict[str, Any] = {row: {} for row in rows}
    models = {
        row: ONNX().runner(path, threads=threads)
        for row in rows
        for path in (file_of(part, row, ONNX.suffix), file_of(part, row, QDQ.suffix))
        if path.is_file()
    }
    example = part.images[: max(part.batch_sizes)]
    for record in benchmark(
        models, example, batch_sizes=part.batch_sizes, threads=threads, seconds=seconds * len(models)
    ):
        found[record.model][str(record.batch_size)] = {
            "ms": record.milliseconds,
            "speed_up": record.speedup,
            "low": record.speedup_low,
            "high": record.speedup_high,
            "rounds": record.runs,
        }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The table of a part."""
    rows: Mapping[str, Any] = found["rows"]
    first = next(iter(rows.values()))
    sizes = sorted({size for row in rows.values() for size in row.get("times", {})}, key=int)
    head = ["", "top-1", "int8 costs", "zeros", "FLOPs", "of non-zeros", "ONNX, MB", "weights, MB"]
    head += [f"speed-up, batch {size} (quartiles)" for size in sizes]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, row in rows.items():
        files = row["files"]
        cells = [name, _accuracy(row["seeds"]), _cost(row["seeds"]), f"{100 * row['zeros']:.1f} %"]
        cells += [f"{row[key] / first['flops']:.3f}" for key in ("flops", "effective")]
        for kinds in (("onnx", "qdq"), ("compressed", "torchao")):
            cells.append(next((f"{files[kind] / 1e6:.2f}" for kind in kinds if kind in files), "-"))
        for size in sizes:
            time = row.get("times", {}).get(size)
            cells.append("-" if time is None else f"{time['speed_up']:.2f} ({time['low']:.2f} to {time['high']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(seeds: Mapping[str, Any]) -> str:
    values = [held["top1"] for held in seeds.values()]
    each = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{each}"


def _cost(seeds: Mapping[str, Any]) -> str:
    """Mean over seeds, with the standard error that images leave."""
    pairs = [held["int8"] for held in seeds.values() if "int8" in held]
    if not pairs:
        return ""
    error = sum(pair["error"] ** 2 for pair in pairs) ** 0.5 / len(pairs)
    return f"{statistics.fmean(pair['points'] for pair in pairs):+.2f} ± {error:.2f}"


class Results:
    """The JSON file, as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.is_file() else {}

    def rows(self, name: str) -> dict[str, Any]:
        """Of a part."""
        found: dict[str, Any] = self.parts.setdefault(name, {"title": PARTS[name].title, "rows": {}})["rows"]
        return found

    def save(self, name: str) -> None:
        """With the rows of a part in their order."""
        held = self.rows(name)
        names = [own for row in PARTS[name].rows for own in (row, static(row))]
        self.parts[name]["rows"] = {row: held[row] for row in names if row in held}
        self.parts[name]["machine"] = machine()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_json(self.path, {"parts": self.parts})


def run(name: str, results: Results, options: argparse.Namespace) -> None:
    """What is not in the results yet, row by row; times in the end, when all rows are there."""
    rows = [row for row in PARTS[name].rows if options.rows is None or row in options.rows]
    held = results.rows(name)
    missing = [
        (seed, row) for seed in options.seeds for row in rows if str(seed) not in held.get(row, {"seeds": ()})["seeds"]
    ]
    untimed = options.seconds > 0 and (missing or any("times" not in row for row in held.values()))
    if not missing and not untimed:
        return
    part = PARTS[name](options.data, options.work / name, options.limit)
    for seed, row in missing:
        started = time.perf_counter()
        model = part.make(row, seed)
        spent = time.perf_counter() - started
        for own, found in rows_of(model, part, row, seed).items():
            told = {key: found.pop(key) for key in ("top1", "int8") if key in found}
            held.setdefault(own, {"seeds": {}, **found})["seeds"][str(seed)] = {**told, "seconds": spent}
            print(f"{part.title}, {own}, seed {seed}: {told}", file=sys.stderr, flush=True)
        results.save(name)
        held = results.rows(name)
    if untimed and len(held) > 1:
        for row, times in measured(part, list(held), options.seconds, options.threads).items():
            held[row]["times"] = times
        results.save(name)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", type=Path, help="folder with cifar10/, imagenet1k-sample/ and weights/")
    parser.add_argument("--rows", nargs="+", help="of all parts (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=int, help="images to judge by (default: all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a model at each batch size; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/composite"), help="for checkpoints and files")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "composite.json", help="JSON file"
    )
    options = parser.parse_args(args)
    if options.data is None and any(PARTS[name].reads_data for name in options.parts):
        parser.error("--data is needed for these parts")
    return options


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print the tables; returns what is in the JSON."""
    options = parse(args)
    torch.set_num_threads(options.threads)
    results = Results(options.output)
    for name in options.parts:
        run(name, results, options)
        print(f"### {PARTS[name].title}\n\n{markdown(results.parts[name])}\n", flush=True)
    print(f"Written to {os.path.relpath(options.output)}.")
    return results.parts


if __name__ == "__main__":
    main()
