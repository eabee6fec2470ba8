"""The ``lightning-cap`` command: LightningCLI plus the subcommand ``oneshot``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cap.errors import CAPError
from lightning_cap.oneshot import sweep
from lightning_cap.pruners import Pruner
from lightning_cap.report import plot_sweep, print_sweep
from lightning_cap.storage import save_json


class CAPTrainer(pl.Trainer):
    """A Trainer that can also prune in one shot."""

    def oneshot(
        self,
        model: pl.LightningModule,
        sparsities: list[float],
        pruner: Pruner | None = None,
        datamodule: pl.LightningDataModule | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        ckpt_path: str | None = None,
        output_dir: str = "oneshot",
        seed: int = 0,
        num_recomputations: int = 1,
    ) -> None:
        """Prune a trained model at several sparsities from one gradient pass; print and plot accuracy and predicted loss.

        Writes ``results.json``, ``sweep.png`` and a ``sparsity=0.50.safetensors`` for each sparsity into ``output_dir``.

        Args:
            model: The module to prune.
            sparsities: Fractions of zeros over all weights of the targets, e.g. [0.5, 0.75, 0.9].
            pruner: The method. Default: CAP.
            datamodule: Validation and calibration data.
            include: Globs or names of the weights to prune. Default: all Linear and Conv weights but the ends.
            exclude: Globs or names to leave dense.
            ckpt_path: A Lightning checkpoint to load first.
            output_dir: Folder for the results.
            seed: Key of the calibration samples and their augmentation.
            num_recomputations: Must be 1.
        """
        folder = Path(output_dir)
        rows = sweep(
            self,
            model,
            sparsities,
            pruner=pruner,
            datamodule=datamodule,
            include=include,
            exclude=exclude,
            ckpt_path=ckpt_path,
            folder=folder,
            seed=seed,
            num_recomputations=num_recomputations,
        )
        if self.is_global_zero:
            save_json(folder / "results.json", rows)
            plot_sweep(rows, folder / "sweep.png")
            print_sweep(rows)
            rank_zero_info(f"Written to {folder}: results.json, sweep.png and the pruned weights.")


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the logs; without a logger there is no folder of the run's own to write to."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class CAPCLI(LightningCLI):
    """LightningCLI with the subcommands fit, validate, test, predict and oneshot."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are subcommands, with the arguments that the CLI fills in itself."""
        return {**LightningCLI.subcommands(), "oneshot": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A recipe is given once, with the data: the model takes its regularisation from the same."""
        parser.link_arguments("data.init_args.recipe", "model.init_args.recipe")

    def _parse_ckpt_path(self) -> None:
        """The configuration describes the model; hyperparameters in a checkpoint do not change it."""


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        args: Command line, None for that of the process.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # class paths may name a file of the user's beside the configuration
    overwrite = {"overwrite": True}
    try:
        CAPCLI(trainer_class=CAPTrainer, args=args, save_config_callback=_SaveConfig, save_config_kwargs=overwrite)
    except Exception as error:
        ours = _our_error(error)
        if ours is None:
            raise
        sys.exit(f"lightning-cap: error: {ours}")


def _our_error(error: BaseException | None) -> CAPError | None:
    """The exception of this package behind ``error``, which jsonargparse may have wrapped."""
    while error is not None and not isinstance(error, CAPError):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    main()
