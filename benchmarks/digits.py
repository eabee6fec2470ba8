"""What the README's first command gives, over several seeds, and one-shot pruning of the same dense models.

    python benchmarks/digits.py --seeds 0 1 2

Prints a Markdown table and writes ``results/digits.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from machine import machine

from lightning_cap.cli import CAPCLI, CAPTrainer
from lightning_cap.comparison import compare
from lightning_cap.pruners import CAP, Magnitude

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/digits_gradual.yaml"
ONESHOT = (0.5, 0.75, 0.9)


class KeepDense(pl.Callback):
    """Keeps the weights right before the first event."""

    state: dict[str, Any] | None = None

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.state = copy.deepcopy(pl_module.state_dict())


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    overrides = [
        "--seed_everything",
        str(seed),
        f"--trainer.logger.save_dir={folder}",
        "--trainer.enable_progress_bar=false",
    ]
    cli = CAPCLI(
        trainer_class=CAPTrainer,
        run=False,
        args=["--config", str(CONFIG), *overrides, f"--trainer.default_root_dir={folder}"],
        save_config_callback=None,
    )
    pruning = next(c for c in cli.trainer.callbacks if hasattr(c, "history"))  # type: ignore[attr-defined]
    dense = KeepDense(min(pruning.schedule.events(cli.trainer.max_epochs)))
    cli.trainer.callbacks.insert(0, dense)  # type: ignore[attr-defined]
    started = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.perf_counter() - started
    out: dict[str, Any] = {
        "seed": seed,
        "seconds": seconds,
        "gradual": {f"{record.goal:g}": record.value for record in pruning.history},
    }
    assert dense.state is not None
    for name, pruner in (("CAP", pruning.pruner), ("magnitude", Magnitude())):
        cli.model.load_state_dict(dense.state)
        trainer = CAPTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        records = compare(trainer, cli.model, pruner, ONESHOT, datamodule=cli.datamodule, loss_samples=0)
        out[name] = {f"{record.goal:g}": record.metrics["val/acc"] for record in records}
    assert isinstance(pruning.pruner, CAP)
    out["pruner"] = repr(pruning.pruner)
    return out


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        f"| validation accuracy (%), {len(runs)} seeds | dense | 50 % | 75 % | 90 % |",
        "|---|---|---|---|---|",
    ]
    for title, key in (("gradual CAP", "gradual"), ("one-shot CAP", "CAP"), ("one-shot global magnitude", "magnitude")):
        cells = []
        for goal in ("0", *(f"{s:g}" for s in ONESHOT)):
            values = [100 * run[key][goal] for run in runs]
            cells.append(f"{sum(values) / len(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/digits.json")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark_digits"), help="folder for checkpoints")
    arguments = parser.parse_args()
    runs = [run_seed(seed, arguments.work / f"seed{seed}") for seed in arguments.seeds]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=2) + "\n")
    print(table(runs))
    seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs)
    print(f"\nSeconds of a run, events and validation included: {seconds} ({torch.get_num_threads()} threads).")


if __name__ == "__main__":
    main()
