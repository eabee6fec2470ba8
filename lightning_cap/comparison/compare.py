"""`compare`: pruners by sparsities by seeds, on one trained model, in one validation run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_cap.comparison.records import RESULTS, ComparisonRecord
from lightning_cap.comparison.request import Request, make_request
from lightning_cap.comparison.runner import ComparisonRunner
from lightning_cap.comparison.surface import LossSurface
from lightning_cap.comparison.variants import Grids
from lightning_cap.errors import ConfigError
from lightning_cap.healing import HealArgument
from lightning_cap.pruners.base import Pruner
from lightning_cap.sparsity.cost import StepPath
from lightning_cap.trainer.checkpoints import WORDS, check_checkpoint, naming_mismatch
from lightning_cap.trainer.compat import spawns_processes
from lightning_cap.utilities.arguments import require_instance
from lightning_cap.utilities.files import require_writable
from lightning_cap.utilities.records import read_records


def compare(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    pruners: Pruner | Mapping[str, Pruner],
    sparsities: Sequence[float],
    seeds: Sequence[int] = (0,),
    datamodule: pl.LightningDataModule | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    ckpt_path: str | Path | None = None,
    folder: Path | str | None = None,
    num_recomputations: int = 1,
    recomputation_path: StepPath = "exponential",
    grids: Grids | None = None,
    surface: LossSurface | None = None,
    fisher_block: int = 0,
    save_weights: bool | None = None,
    loss_samples: int = 1024,
    max_rows_memory: int | str | None = None,
    heal: HealArgument = None,
    recalibrate: bool = False,
) -> list[ComparisonRecord]:
    """Prune a trained model by each pruner to each sparsity, with each seed, and validate each result.

    Each path is solved once for all sparsities. Gradients are collected once for a seed and ``samples_per_gradient`` and read
    by all pruners that want them (the first ``num_gradients`` of them), from main memory, or from a file in ``folder``; only
    where there is room for neither does each pruner collect its own.

    A comparison with a ``folder`` that is started again does what is missing: records are not made again whose weights, settings
    (of the pruner; public attributes and hyperparameters of module and datamodule), data (by its size and its first calibration
    batch) and version are the same. Those of them that are not asked for this time stay in ``results.jsonl``. With other
    ``loss_samples`` the calibration loss alone is measured again, of the pruned weights in ``masks/``.

    Args:
        trainer: Validates, and gives device, precision and processes.
        model: Its weights are as before afterwards.
        pruners: Names and methods; or one method, which is a comparison of one and writes its weights into ``folder`` itself.
        sparsities: Zeros over all weights of the targets; every pruner must be able to give each. Of pruners of units, the share of
            their cost that is saved. Where there is one, the targets are all weights of units, for the other pruners too.
        seeds: Keys of the calibration samples and their augmentation. A pruner with a setting ``seed`` has it added.
        datamodule: Validation data and ``calibration_dataloader()`` (else ``train_dataloader()``).
        include: Globs or names of the weights to prune.
        exclude: Globs or names to leave as they are.
        ckpt_path: A Lightning checkpoint to load first.
        folder: Where to write results, None for nowhere.
        num_recomputations: Reach each sparsity in so many steps, with fresh gradients for each.
        recomputation_path: How they rise: ``"exponential"``, the density falls by the same factor in each, or ``"linear"``.
        grids: Settings and values, such as ``{"damp": [1e-8, 1e-6]}``: every pruner that has the setting is run with each value
            too, the others as given. ``num_recomputations`` is a setting of all.
        surface: Take the loss in the plane of two solutions; needs a ``folder`` and a validation loss.
        fisher_block: Average the blocks of the Fisher, of this size, 0 for not; needs a ``folder``.
        save_weights: Write the weights of every record but those of grids. Default: only of a single pruner. False also leaves
            out the weights in ``masks/``, which take ``1 - sparsity`` of those of the targets.
        loss_samples: Calibration samples whose loss is measured beside that of the validation data, 0 for none.
        max_rows_memory: Main memory for shared gradients of a process, as ``"20GB"`` or bytes. Default: a quarter of the free.
        heal: ``"layerwise"``, ``"distill"`` or a `Heal`, for all pruners: moves the weights that are kept, without labels. Default:
            what each pruner's own ``heal`` says; it can also be a setting in ``grids``.
        recalibrate: Estimate the statistics of batch norm anew for each result, from up to 1,024 calibration samples.

    Returns:
        A record for the model as it was, then one for each pruner, each value of the grids, seed and sparsity, as in
        ``results.jsonl``.

    Raises:
        ConfigError: An argument cannot work. Nothing has run then.
        DataError: The checkpoint cannot be loaded, or ``results.jsonl`` or ``exports.jsonl`` in ``folder`` holds something else.
            Nothing has run then.
    """
    require_instance("trainer", trainer, pl.Trainer, "lightning.pytorch.Trainer()")
    require_instance("model", getattr(model, "_orig_mod", model), pl.LightningModule, "VisionClassifier(...)")
    require_instance("datamodule", datamodule, pl.LightningDataModule, "DigitsDataModule()", optional=True)
    check_validation(getattr(model, "_orig_mod", model), datamodule)
    request = make_request(
        pruners=pruners,
        sparsities=sparsities,
        seeds=seeds,
        include=include,
        exclude=exclude,
        folder=folder,
        num_recomputations=num_recomputations,
        recomputation_path=recomputation_path,
        grids=grids,
        surface=surface,
        fisher_block=fisher_block,
        save_weights=save_weights,
        loss_samples=loss_samples,
        max_rows_memory=max_rows_memory,
        heal=heal,
        recalibrate=recalibrate,
    )
    if ckpt_path in WORDS:
        raise ConfigError(f"ckpt_path={ckpt_path!r}: a comparison takes the path of a checkpoint. Give a .ckpt file.")
    check_checkpoint(ckpt_path)
    spawned = spawns_processes(trainer)
    if request.folder is None and spawned:
        raise ConfigError(
            "folder=None: the strategy spawns processes, which take their records with them. Give a folder."
        )
    if request.folder is not None and trainer.is_global_zero:
        require_writable("folder", folder, request.folder)
    hook = CompareInValidation(request)
    trainer.callbacks.append(hook)  # type: ignore[attr-defined]
    try:
        with naming_mismatch(ckpt_path):
            trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
    finally:
        trainer.callbacks.remove(hook)  # type: ignore[attr-defined]
    if spawned and request.folder is not None:
        return request.of(read_records(request.folder / RESULTS, ComparisonRecord))
    return hook.records


def check_validation(model: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> None:
    """Refuse what a comparison cannot validate.

    Raises:
        ConfigError: There is no validation step, or no validation data.
    """
    if not is_overridden("validation_step", model):
        raise ConfigError(
            f"model={type(model).__name__}: a comparison validates every result. Define validation_step() and log metrics in it."
        )
    if not any(is_overridden("val_dataloader", owner) for owner in (model, datamodule) if owner is not None):
        raise ConfigError(
            f"datamodule={None if datamodule is None else type(datamodule).__name__}: a comparison validates every result. Give a "
            "datamodule with val_dataloader()."
        )


class CompareInValidation(pl.Callback):
    """Does all of the work when validation starts, with the model on its device."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._records: list[ComparisonRecord] | None = None

    @property
    def records(self) -> list[ComparisonRecord]:
        """What the comparison found."""
        if self._records is None:
            raise ConfigError("limit_val_batches=0: a comparison validates every result. Give it validation data.")
        return self._records

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the Trainer's own pass, which then sees the model as it was."""
        with torch.inference_mode(False):
            self._records = ComparisonRunner(trainer, pl_module, self._request).run()
