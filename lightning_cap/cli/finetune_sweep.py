"""``lightning-cap finetune-sweep``: trains each checkpoint of a pruning run on, with the settings of one configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_cap.callbacks.fixed_masks import FixedMasks, refuse_pruning_callbacks
from lightning_cap.cli.lightning_cli import CAPCLI, CAPTrainer, SaveConfig
from lightning_cap.cli.parsing import CAPParser
from lightning_cap.cli.run_config import make_readable
from lightning_cap.errors import ConfigError, DataError, UnsupportedError
from lightning_cap.report.sweep import print_sweep
from lightning_cap.sweep import Finetuning, PrunedCheckpoint, SweepFolder, find_checkpoints
from lightning_cap.sweep.checkpoints import describe
from lightning_cap.trainer.checkpoints import check_checkpoint, naming_mismatch
from lightning_cap.trainer.compat import spawns_processes
from lightning_cap.trainer.run_records import FinetunedRecord
from lightning_cap.utilities.files import atomic, require_writable

SUMMARY = "Fine-tune each checkpoint of a pruning run, and print what that gains."

_EXAMPLE = "lightning-cap finetune-sweep RUN_DIR --config FILE"
_DESCRIPTION = f"""{SUMMARY}

RUN_DIR comes first; what follows are the options of fit, as in {_EXAMPLE} --trainer.max_epochs 100.
Of each goal one checkpoint is taken: that of the best epoch, if there is one. Pruned weights stay zero. Given again, the command
skips what is done, and what was stopped goes on from its last epoch. See lightning-cap fit --help for the options.
"""
_CONFIG = "config.yaml"


def finetune_sweep_parser(**kwargs: Any) -> CAPParser:
    """What ``lightning-cap finetune-sweep --help`` tells; the options are those of ``fit``."""
    parser = CAPParser(prog="lightning-cap finetune-sweep", description=_DESCRIPTION, **kwargs)
    parser.example = _EXAMPLE
    parser.add_argument("run_dir", metavar="RUN_DIR", type=str, help="Folder of the run, or of its checkpoints.")
    return parser


def finetune_sweep(args: Sequence[str]) -> list[FinetunedRecord]:
    """Do what ``lightning-cap finetune-sweep`` is to do.

    Args:
        args: After the word ``finetune-sweep``.

    Returns:
        A record for each checkpoint, from the least pruned on.

    Raises:
        CAPError: What is wrong, in one line.
    """
    if not args or args[0] in ("-h", "--help"):
        finetune_sweep_parser().parse_args([*args])
    if args[0].startswith("-"):
        raise ConfigError(
            f"RUN_DIR: it comes first. Give the folder of a pruning run before the options, as in {_EXAMPLE}."
        )
    folder, checkpoints = find_checkpoints(args[0])
    require_writable("RUN_DIR", args[0], folder.checkpoints)
    records = []
    for number, checkpoint in enumerate(checkpoints, 1):
        place = f"{number} of {len(checkpoints)}: {describe(checkpoint)}"
        record = folder.record(checkpoint)
        cli = _FinetuneCLI(args[1:], checkpoint, folder, place, record)
        records += [cli.record] if cli.record is not None else []
    _print_records(records, folder)
    return records


class _FinetuneCLI(CAPCLI):
    """``fit`` of one checkpoint.

    Attributes:
        record: What it ended with.
    """

    def __init__(
        self,
        args: Sequence[str],
        checkpoint: PrunedCheckpoint,
        folder: SweepFolder,
        place: str,
        record: FinetunedRecord | None,
    ) -> None:
        self._checkpoint, self._folder, self._place, self.record = checkpoint, folder, place, record
        super().__init__(
            trainer_class=CAPTrainer,
            args=["fit", *args],
            save_config_callback=_SaveBeside,
            save_config_kwargs={"overwrite": True, "folder": folder.of(checkpoint)},
        )

    def before_instantiate_classes(self) -> None:
        """Refuse what the sweep gives itself; have the logs beside the checkpoints, and no weights but those."""
        given = self.config["fit"]
        if self._ckpt_path is not None:
            raise ConfigError(f"ckpt_path={self._ckpt_path!r}: the sweep gives each checkpoint itself. Leave it out.")
        self._refuse_other_length(given["trainer"])
        settings = given["model"].get("init_args") or {}
        for name, none in (("pretrained", False), ("checkpoint", None)):
            if name in settings:
                settings[name] = none
        _log_into(given["trainer"], self._folder.of(self._checkpoint))

    def _refuse_other_length(self, trainer: Any) -> None:
        """What is done, or half done, is of so many epochs."""
        saved = self._folder.of(self._checkpoint) / _CONFIG
        if self._folder.resumable(self._checkpoint) is None or not saved.is_file():
            return
        try:
            before = yaml.safe_load(saved.read_text())["trainer"]
            begun = {name: before[name] for name in ("max_epochs", "max_steps")}
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise DataError(
                f"{saved}: it cannot be read ({type(error).__name__}), so it is not known how many epochs were begun. "
                "Remove it to go on, or move its folder away to begin anew."
            ) from error
        for name, length in begun.items():
            if length != trainer.get(name):
                raise ConfigError(
                    f"trainer.{name}={trainer.get(name)!r}: {saved.parent} was begun with {length!r}. Give that, or "
                    "move the folder away to begin anew."
                )

    def fit(self, model: pl.LightningModule, **options: Any) -> None:
        """Train the checkpoint on, unless that is done.

        Args:
            model: With fresh weights.
            options: Of the Trainer's own ``fit``.
        """
        if self.record is not None:
            _tell(f"{self._place}: done before")
            return
        refuse_pruning_callbacks(self.trainer)
        if spawns_processes(self.trainer):
            raise UnsupportedError(
                "trainer.strategy: the processes that it starts return nothing, so the sweep would not know what they ended with. "
                "Use ddp."
            )
        masks = [FixedMasks(state) for state in self._checkpoint.states]
        model.configure_model()
        with naming_mismatch(self._checkpoint.path, "checkpoint"):
            model.load_state_dict(self._checkpoint.weights)
        resumed = self._folder.resumable(self._checkpoint)
        check_checkpoint(resumed, "checkpoint", resumes=True)
        measured = Finetuning(self._checkpoint, self._folder, masks)
        self.trainer.callbacks[:] = _in_order([*self.trainer.callbacks, *masks, measured])  # type: ignore[attr-defined]
        _tell(self._place + ("" if resumed is None else ", going on from its last epoch"))
        self.trainer.fit(model, **{**options, "ckpt_path": None if resumed is None else str(resumed)})
        self.record = measured.record


class _SaveBeside(SaveConfig):
    """Saves the configuration beside the checkpoints."""

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it."""
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / _CONFIG
            with atomic(path) as temporary:
                self.parser.save(self.config, temporary, skip_none=False, overwrite=True)
                make_readable(temporary)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not here."""


def _in_order(callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """Those that save checkpoints last, as the Trainer has them."""
    return sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))


def _log_into(trainer: Any, folder: Path) -> None:
    """Let loggers that write files write them into a folder, in one of their own for each start."""
    own = {"save_dir": str(folder.parent), "name": folder.name, "version": None}
    given = trainer.get("logger")
    if given is None or given is True:
        given = trainer["logger"] = _settings(class_path=f"{CSVLogger.__module__}.{CSVLogger.__qualname__}")
    for one in given if isinstance(given, list) else [given]:
        if _writes_files(one):
            one["init_args"] = _settings(**{**vars(one.get("init_args") or _settings()), **own})
    if trainer.get("default_root_dir") is None:
        trainer["default_root_dir"] = str(folder)
    if trainer.get("enable_checkpointing") is None and not any(map(_saves, trainer.get("callbacks") or [])):
        trainer["enable_checkpointing"] = False  # the sweep has its own


def _settings(**values: Any) -> Namespace:
    return Namespace(**values)  # type: ignore[no-untyped-call]


def _writes_files(logger: Any) -> bool:
    """Whether the settings of a logger are those of one that writes a folder by name and version."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in (CSVLogger, TensorBoardLogger)}
    names = {name.rpartition(".")[2] for name in kinds}
    path = "" if isinstance(logger, bool) or logger is None else str(logger.get("class_path"))
    return path.startswith("lightning.") and path.rpartition(".")[2] in names


def _saves(callback: Any) -> bool:
    return str(callback.get("class_path")).rpartition(".")[2] == ModelCheckpoint.__name__


@rank_zero_only
def _tell(text: str) -> None:
    print(text, flush=True)


@rank_zero_only
def _print_records(records: list[FinetunedRecord], folder: SweepFolder) -> None:
    if records:
        print_sweep(records, str(folder.finetuned))
