"""A small timm ViT on the CIFAR-10 tars: train it on, prune it to 2:4 in one shot, and fine-tune briefly (the paper's table 12).

    python benchmarks/cifar10_vit.py --data ../shared/data

``--data`` is a folder with ``cifar10/train.tar``, ``cifar10/val.tar`` and ``weights/vit_cifar10.safetensors``, from which training
goes on (``--from-scratch`` begins anew). The dense weights go to ``runs/cifar10_vit/weights/vit_cifar10.safetensors``, so that
``cifar10_oneshot.py --model vit --weights runs/cifar10_vit/weights`` can sweep them. Prints a Markdown table and writes a JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from cifar10_data import open_data
from machine import machine
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_cap import CAPPruningCallback, CyclicLinearLR, VisionClassifier
from lightning_cap.classifier import load_weights
from lightning_cap.pruners import CAP, Magnitude, Pruner, WoodFisher
from lightning_cap.schedules import OneShot
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.files import save_json
from lightning_cap.utilities.records import read_records

METHODS = ("magnitude", "WoodFisher", "CAP")


def vit() -> nn.Module:
    """1.2 M parameters, 64 tokens."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=10)


def pruner(name: str, num_gradients: int, damp: float) -> Pruner:
    """To 2:4; blocks of 128, gradients of 64 images each."""
    pattern = NofM(2, 4)
    if name == "magnitude":
        return Magnitude(pattern=pattern)
    make = {"WoodFisher": WoodFisher, "CAP": CAP}[name]
    counts = {"num_gradients": num_gradients, "samples_per_gradient": 64}
    return make(block_size=128, damp=damp, pattern=pattern, **counts)


def fit(
    model: nn.Module, options: argparse.Namespace, epochs: int, lr: float, *callbacks: pl.Callback
) -> dict[str, float]:
    """Train ``model`` in place under a linearly falling learning rate; the validation metrics at the end."""
    pl.seed_everything(options.seed, verbose=False)
    module = VisionClassifier(
        model,
        weight_decay=0.05,
        label_smoothing=0.0,
        gradient_clip=1.0,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        lr_scheduler=partial(CyclicLinearLR, min_lr=lr / 100),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=options.batches or 1.0,
        limit_val_batches=options.val_batches or 1.0,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=open_data(options.data / "cifar10", options.batch_size))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def dense(options: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The dense model, trained on; where its weights are, and its accuracy."""
    model = vit()
    if not options.from_scratch:
        load_weights(model, options.data / "weights" / "vit_cifar10.safetensors")
    started = time.perf_counter()
    metrics = fit(model, options, options.dense_epochs, options.dense_lr)
    path = folder / "weights" / "vit_cifar10.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path, {"accuracy": 100 * metrics["val/acc"], "seconds": time.perf_counter() - started}


def pruned(name: str, weights: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One shot to 2:4, then fine-tuning with the masks in force; accuracies after each."""
    model = vit()
    load_weights(model, weights)
    if name == "dense":
        metrics = fit(model, options, options.epochs, options.lr)
        return {"method": "dense, trained as long", "one_shot": None, "fine_tuned": 100 * metrics["val/acc"]}
    where = folder / name
    callback = CAPPruningCallback(
        schedule=OneShot(0.5),
        pruner=pruner(name, options.num_gradients, options.damp),
        dirpath=str(where),
        seed=options.seed,
    )
    (where / "events.jsonl").unlink(missing_ok=True)
    metrics = fit(model, options, options.epochs, options.lr, callback)
    event = read_records(where / "events.jsonl", EventRecord)[-1]
    return {
        "method": f"{name} 2:4",
        "one_shot": 100 * event.after["val/acc"],
        "fine_tuned": 100 * metrics["val/acc"],
        "sparsity": callback.masks.global_sparsity,
        "event": event.to_json(),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The table."""
    s = results["settings"]
    lines = [
        f"Dense: {results['dense']['accuracy']:.1f} % top-1 after {s['dense_epochs']} more epochs; "
        f"fine-tuning: {s['epochs']} epochs.",
        "",
        "| model | one shot | fine-tuned |",
        "| --- | ---: | ---: |",
    ]
    for row in results["rows"]:
        one_shot = "" if row["one_shot"] is None else f"{row['one_shot']:.1f}"
        lines.append(f"| {row['method']} | {one_shot} | {row['fine_tuned']:.1f} |")
    return "\n".join(lines)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and weights/")
    parser.add_argument("--from-scratch", action="store_true", help="do not start from the weights there")
    parser.add_argument("--dense-epochs", type=int, default=2)
    parser.add_argument("--dense-lr", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, help="batches an epoch (default: all)")
    parser.add_argument("--val-batches", type=int, help="validation batches (default: all)")
    parser.add_argument("--num-gradients", type=int, default=256, help="of 64 images each")
    parser.add_argument("--damp", type=float, default=1e-6)
    parser.add_argument("--methods", nargs="+", choices=["dense", *METHODS], default=["dense", *METHODS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--folder", type=Path, default=Path("runs/cifar10_vit"), help="for weights and checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its table and write its JSON; returns what was written."""
    options = parse(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    weights, trained = dense(options, options.folder)
    print(f"dense: {trained['accuracy']:.2f}", file=sys.stderr)
    rows = []
    for name in options.methods:
        rows.append(pruned(name, weights, options, options.folder))
        print(f"{rows[-1]['method']}: {rows[-1]['one_shot']} -> {rows[-1]['fine_tuned']:.2f}", file=sys.stderr)
    named = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    results = {"settings": named, "machine": machine(), "dense": trained, "rows": rows}
    output = options.output or Path(__file__).parent / "results" / "cifar10_vit.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    save_json(output, results)
    print(markdown(results))
    print(f"\nWritten to {os.path.relpath(output)}.")
    return results


if __name__ == "__main__":
    main()
