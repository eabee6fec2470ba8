"""The ``lightning-cap`` command: LightningCLI plus the subcommand ``oneshot``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cap.comparison import LossSurface, compare
from lightning_cap.comparison.records import RESULTS
from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.pruners import Pruner
from lightning_cap.report import print_comparison, report
from lightning_cap.utilities.arguments import require_instance, require_path
from lightning_cap.utilities.files import require_writable


class CAPTrainer(pl.Trainer):
    """A Trainer that can also prune in one shot."""

    def oneshot(
        self,
        model: pl.LightningModule,
        sparsities: list[float],
        pruner: Pruner | None = None,
        pruners: dict[str, Pruner] | None = None,
        seeds: list[int] | None = None,
        grids: dict[str, list[int | float | str]] | None = None,
        surface: LossSurface | None = None,
        fisher_block: int = 0,
        datamodule: pl.LightningDataModule | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        ckpt_path: str | None = None,
        output_dir: str = "oneshot",
        save_weights: bool | None = None,
        num_recomputations: int = 1,
        loss_samples: int = 1024,
        max_rows_memory: int | str | None = None,
    ) -> None:
        """Prune a trained model in one shot, by one pruner or several, at several sparsities; compare what they give.

        Writes ``results.jsonl``, ``results.md`` and pictures into ``output_dir``. Started again, it does what is missing there.

        Args:
            model: The module to prune.
            sparsities: Fractions of zeros over all weights of the targets, e.g. [0.5, 0.75, 0.9].
            pruner: The method, if there is one; its pruned weights are written too.
            pruners: Several methods by name.
            seeds: Keys of the calibration samples and their augmentation. Default: [0].
            grids: Settings and their values, e.g. {damp: [1e-8, 1e-6]}: each pruner that has it is run with each too.
            surface: Draw the loss in the plane of two solutions.
            fisher_block: Draw the average block of the Fisher, of this size. Default: 0, for not.
            datamodule: Validation and calibration data.
            include: Globs or names of the weights to prune. Default: all Linear and Conv weights but the ends.
            exclude: Globs or names to leave as they are.
            ckpt_path: A Lightning checkpoint to load first.
            output_dir: Folder for the results.
            save_weights: Write the pruned weights. Default: only of a single pruner.
            num_recomputations: Reach each sparsity in so many steps, with fresh gradients for each.
            loss_samples: Calibration samples to measure the loss on, beside the validation data.
            max_rows_memory: Main memory for gradients that pruners share, e.g. 20GB. Default: a quarter of what is free.
        """
        if (pruner is None) == (pruners is None):
            given = "both" if pruner is not None else "neither"
            raise ConfigError(f"pruner/pruners: {given} given. Give pruner, one method, or pruners, several by name.")
        require_instance("pruner", pruner, Pruner, "CAP()", optional=True)
        require_path("output_dir", output_dir, "oneshot")
        if self.is_global_zero:
            require_writable("output_dir", output_dir, Path(output_dir))
        records = compare(
            self,
            model,
            pruner if pruner is not None else pruners or {},
            sparsities,
            (0,) if seeds is None else seeds,
            datamodule=datamodule,
            include=include,
            exclude=exclude,
            ckpt_path=ckpt_path,
            folder=output_dir,
            num_recomputations=num_recomputations,
            grids=grids,
            surface=surface,
            fisher_block=fisher_block,
            save_weights=save_weights,
            loss_samples=loss_samples,
            max_rows_memory=max_rows_memory,
        )
        if self.is_global_zero:
            written = report(records, Path(output_dir))
            print_comparison(records)
            rank_zero_info(f"Written to {output_dir}: {RESULTS}, {', '.join(written)}.")


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

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Hide ``ckpt_path`` at first: Lightning would let hyperparameters in a checkpoint change the model that is configured."""
        super().parse_arguments(parser, args)
        given = self.config.get(self.config.get("subcommand") or "", {})
        self._ckpt_path = given.get("ckpt_path")
        if self._ckpt_path is not None:
            given["ckpt_path"] = None

    def before_instantiate_classes(self) -> None:
        """Show ``ckpt_path`` again, for the Trainer."""
        if self._ckpt_path is not None:
            self.config[self.config["subcommand"]]["ckpt_path"] = self._ckpt_path


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
