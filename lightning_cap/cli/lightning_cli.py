"""LightningCLI with our checks: what ``fit``, ``validate``, ``test``, ``predict`` and ``oneshot`` are run by."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cap.cli.bases import with_bases
from lightning_cap.cli.files import check_files
from lightning_cap.cli.leftovers import folders_to_come, log_folders, remove_unused
from lightning_cap.cli.messages import is_tree, one_line
from lightning_cap.cli.mistakes import mistake_behind
from lightning_cap.cli.parsing import CAPParser, find_callbacks_by_setting
from lightning_cap.cli.run_config import make_readable
from lightning_cap.comparison import LossSurface, compare
from lightning_cap.comparison.records import RESULTS
from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.healing import HealArgument
from lightning_cap.pruners import Pruner
from lightning_cap.report import print_comparison, report
from lightning_cap.sparsity.cost import StepPath
from lightning_cap.trainer.checkpoints import check_checkpoint, naming_mismatch
from lightning_cap.utilities.arguments import require_instance, require_path, require_whole
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
        recomputation_path: StepPath = "exponential",
        loss_samples: int = 1024,
        max_rows_memory: int | str | None = None,
        heal: HealArgument = None,
        recalibrate: bool = False,
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
            recomputation_path: How they rise: exponential (the density falls by the same factor in each) or linear.
            loss_samples: Calibration samples to measure the loss on, beside the validation data.
            max_rows_memory: Main memory for gradients that pruners share, e.g. 20GB. Default: a quarter of what is free.
            heal: layerwise, distill or a class path: moves kept weights without labels. Default: what each pruner's own heal says.
            recalibrate: Estimate the statistics of batch norm anew for each result, from calibration samples.
        """
        asked = comparison_arguments(
            sparsities=sparsities,
            pruner=pruner,
            pruners=pruners,
            seeds=seeds,
            grids=grids,
            surface=surface,
            fisher_block=fisher_block,
            include=include,
            exclude=exclude,
            output_dir=output_dir,
            save_weights=save_weights,
            num_recomputations=num_recomputations,
            recomputation_path=recomputation_path,
            loss_samples=loss_samples,
            max_rows_memory=max_rows_memory,
            heal=heal,
            recalibrate=recalibrate,
            writes=self.is_global_zero,
        )
        records = compare(self, model, datamodule=datamodule, ckpt_path=ckpt_path, **asked)
        if self.is_global_zero:
            written = report(records, Path(output_dir))
            print_comparison(records)
            rank_zero_info(f"Written to {output_dir}: {RESULTS}, {', '.join(written)}.")


def comparison_arguments(
    *,
    pruner: Pruner | None = None,
    pruners: dict[str, Pruner] | None = None,
    seeds: list[int] | None = None,
    output_dir: str = "oneshot",
    writes: bool = True,
    **others: Any,
) -> dict[str, Any]:
    """The arguments of `CAPTrainer.oneshot` as those of `lightning_cap.comparison.compare`.

    Args:
        pruner: See `CAPTrainer.oneshot`.
        pruners: Likewise.
        seeds: Likewise.
        output_dir: Likewise.
        writes: Whether this process does.
        others: Taken over as they are.

    Raises:
        ConfigError: Not one of ``pruner`` and ``pruners`` is given, or ``output_dir`` cannot be written to.
    """
    if (pruner is None) == (pruners is None):
        given = "both" if pruner is not None else "neither"
        raise ConfigError(f"pruner/pruners: {given} given. Give pruner, one method, or pruners, several by name.")
    require_instance("pruner", pruner, Pruner, "CAP()", optional=True)
    require_path("output_dir", output_dir, "oneshot")
    if writes:
        require_writable("output_dir", output_dir, Path(output_dir))
    return {
        **others,
        "pruners": pruner if pruner is not None else pruners or {},
        "seeds": (0,) if seeds is None else seeds,
        "folder": output_dir,
    }


class SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the logs once a run has begun, where it has a logger, and so a folder of its own."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it, in ``fit``."""
        self._save(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it, in ``validate``."""
        if not trainer.sanity_checking:
            self._save(trainer, pl_module, "validate")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it, in ``test``."""
        self._save(trainer, pl_module, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it, in ``predict``."""
        self._save(trainer, pl_module, "predict")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.loggers or self.already_saved:
            return
        super().setup(trainer, pl_module, stage)
        folder = trainer.log_dir  # every process must ask for it
        if trainer.is_global_zero and folder is not None:
            make_readable(Path(folder) / self.config_filename)


class CAPCLI(LightningCLI):
    """LightningCLI with the subcommands fit, validate, test, predict and oneshot."""

    def __init__(self, **kwargs: Any) -> None:
        self._to_come: list[Path] = []
        try:
            try:
                super().__init__(**kwargs)
            except RuntimeError:
                with naming_mismatch(getattr(self, "_ckpt_path", None)):
                    raise
        except Exception as error:
            if mistake_behind(error) is not None:
                remove_unused(self._to_come)
            raise

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, but for its messages; only from 2.6 on does Lightning take its class."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])
        parser = CAPParser(**kwargs)
        parser.others = self.others()
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in YAML or JSON.")
        return parser

    @classmethod
    def others(cls) -> Mapping[str, tuple[CAPParser, str]]:
        """Subcommands that are no methods of the Trainer and are run elsewhere: ``{name: (parser, what it does)}``."""
        return {}

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are subcommands, with the arguments that the CLI fills in itself."""
        return {**LightningCLI.subcommands(), "oneshot": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A recipe is given once, with the data: the model takes its regularisation from the same."""
        parser.link_arguments("data.init_args.recipe", "model.init_args.recipe")
        find_callbacks_by_setting(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Look at files first; hide ``ckpt_path``: Lightning would let hyperparameters in it change the configured model."""
        args = sys.argv[1:] if args is None else args
        if isinstance(args, list):
            check_files(args)
            self.config = parser.parse_args(with_bases(args))
        else:
            super().parse_arguments(parser, args)
        command = self.config.get("subcommand") or ""
        if command in self.others():
            raise ConfigError(f"{command}: write it first, as in {self.others()[command][0].example}.")
        given = self.config.get(command, self.config)
        seed = given.get("seed_everything")
        if not isinstance(seed, bool) and seed is not None:
            require_whole("seed_everything", seed, 0, 2**32 - 1)
        self._ckpt_path = given.get("ckpt_path")
        self.look_at_checkpoint(self._ckpt_path, resumes=command == "fit")
        if self._ckpt_path is not None:
            given["ckpt_path"] = None

    def look_at_checkpoint(self, path: Any, resumes: bool) -> None:
        """Refuse a checkpoint that cannot be loaded.

        Raises:
            CAPError: It cannot.
        """
        check_checkpoint(path, resumes=resumes, folders=resumes)

    def before_instantiate_classes(self) -> None:
        """Show ``ckpt_path`` again, for the Trainer."""
        if self._ckpt_path is not None:
            self.config[self.config["subcommand"]]["ckpt_path"] = self._ckpt_path

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer.

        Raises:
            ConfigError: A class does not take its settings, or its package is missing; jsonargparse tells it in a tree.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if mistake_behind(error) is not None or not is_tree(str(error)):
                raise
            raise ConfigError(one_line(str(error))) from error

    def after_instantiate_classes(self) -> None:
        """Refuse a logger that cannot write. Remember what is not there yet, to leave nothing behind."""
        if not self.trainer.is_global_zero:
            return
        for place in log_folders(self.trainer.loggers):
            require_writable("trainer.logger", str(place), place)
        self._to_come = folders_to_come(self.trainer.loggers)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer; what it refuses is a mistake in the configuration.

        Raises:
            ConfigError: Tells what Lightning says of it.
        """
        given = self.config.get(self.subcommand or "", self.config)["trainer"]
        for name in ("check_val_every_n_epoch", "accumulate_grad_batches"):  # which the Trainer divides by
            if given.get(name) is not None:
                require_whole(f"trainer.{name}", given[name])
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            if isinstance(error, CAPError):
                raise
            names = ("accelerator", "devices", "strategy", "num_nodes")
            told = [f"{name}={given[name]!r}" for name in names if given.get(name) not in (None, "auto", 1)]
            settings = f" ({', '.join(told)})" if told else ""
            raise ConfigError(f"trainer: {error}{settings}") from error
