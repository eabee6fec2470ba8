"""The names of Lightning that are private or undocumented, and needed. No other file of this package touches one.

Each is looked up where it is used. A missing one is an error that names the versions. A feature that this Lightning does not have
at all, such as weight averaging in 2.5, is no error. `check_run` looks up at the start what a run may need only after hours.
"""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_cap.calibration.batches import sampler_of
from lightning_cap.errors import UnsupportedError

#: Lightning's versions that the tests have run with, the oldest and the newest.
TESTED = ("2.5.0", "2.6.6")

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")  # Lightning 2.5 has only the second
_BATCH_HOOK = "_on_before_batch_transfer"
_AVERAGE = "_average_model"

Handler = Callable[[int, FrameType | None], Any]


def check_run(trainer: pl.Trainer, module: pl.LightningModule, resumed: bool) -> None:
    """Look up all that a pruning run may need, so that what is missing ends it now.

    Args:
        trainer: In ``fit``, before training.
        module: Its LightningModule.
        resumed: Whether a checkpoint was loaded.

    Raises:
        UnsupportedError: This Lightning has another name for something.
    """
    _look_up(module, _BATCH_HOOK)
    _validation_setup(trainer)
    _connector(trainer)
    begins_epoch(trainer)
    _batch_counters(trainer)
    averaged_models(trainer)
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        rich_lines(bar)
    elif isinstance(bar, TQDMProgressBar):
        _tqdm_parts(bar)
    if resumed:
        restarted_mid_epoch(trainer)
        _training_data(trainer)
        _makes_training_data(trainer)


def before_batch_transfer(module: pl.LightningModule, batch: Any, loader: int) -> Any:
    """A batch after the hook ``on_before_batch_transfer`` of the datamodule or the module, as Lightning chooses.

    Raises:
        UnsupportedError: As `check_run`.
    """
    return _look_up(module, _BATCH_HOOK)(batch, dataloader_idx=loader)


def set_up_validation(trainer: pl.Trainer) -> None:
    """Make the validation loaders of ``fit`` before its first validation.

    Raises:
        UnsupportedError: As `check_run`.
    """
    _validation_setup(trainer)()


def _validation_setup(trainer: pl.Trainer) -> Any:
    return _look_up(_look_up(_look_up(trainer.fit_loop, "epoch_loop"), "val_loop"), "setup_data")


def averaged_models(trainer: pl.Trainer) -> list[nn.Module]:
    """The averaged LightningModule of every averaging callback in the run, also of the user's own that names it as Lightning does.

    Raises:
        UnsupportedError: As `check_run`.
    """
    own = averaging_callbacks(trainer)
    found = [
        _look_up(callback, _AVERAGE) if callback in own else getattr(callback, _AVERAGE, None)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    ]
    return [model for model in found if isinstance(model, nn.Module)]


def averaging_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Lightning's own callbacks in the run that average weights."""
    known = tuple(getattr(callbacks, name) for name in _AVERAGING if hasattr(callbacks, name))
    return [callback for callback in trainer.callbacks if isinstance(callback, known)]  # type: ignore[attr-defined]


def averages_at_end(trainer: pl.Trainer) -> list[nn.Module]:
    """The averaged LightningModules that Lightning puts in place of the model when training ends.

    Raises:
        UnsupportedError: As `check_run`.
    """
    kind = getattr(callbacks, _AVERAGING[0], ())
    found = [_look_up(callback, _AVERAGE) for callback in averaging_callbacks(trainer) if isinstance(callback, kind)]
    return [model for model in found if isinstance(model, nn.Module)]


def restarted_mid_epoch(trainer: pl.Trainer) -> bool:
    """Whether the checkpoint that was loaded is one of the middle of an epoch.

    Raises:
        UnsupportedError: As `check_run`.
    """
    return bool(_look_up(trainer.fit_loop, "restarted_mid_epoch"))


def begin_training_data_anew(trainer: pl.Trainer) -> None:
    """Make the iterator over the training data of the current epoch again, unless Lightning is about to.

    To be called from ``on_train_epoch_start``.

    Raises:
        UnsupportedError: As `check_run`.
    """
    fetcher = _training_data(trainer)
    if fetcher is not None and not _makes_training_data(trainer):
        iter(fetcher)


def _training_data(trainer: pl.Trainer) -> Iterable[Any] | None:
    fetcher: Iterable[Any] | None = _look_up(trainer.fit_loop, "_data_fetcher")
    return fetcher


def _makes_training_data(trainer: pl.Trainer) -> bool:
    """Whether Lightning itself makes the iterator after ``on_train_epoch_start``; 2.5.0 does so in a resumed run too."""
    resuming = getattr(trainer.fit_loop, "is_resuming", False)
    restarting = _look_up(_look_up(trainer.fit_loop, "epoch_loop"), "restarting")
    return trainer.current_epoch > 0 and not restarting and not resuming


def set_inner_checkpoint_io(outer: AsyncCheckpointIO, inner: CheckpointIO) -> None:
    """Change what a plugin writes by; the public setter takes no second one.

    Raises:
        UnsupportedError: As `check_run`.
    """
    _look_up(outer, "_checkpoint_io")
    outer._checkpoint_io = inner


def refuse_unsafe_async_io(io: AsyncCheckpointIO) -> None:
    """Refuse the plugin of Lightning before 2.5.4: it writes weights that training goes on to change, and one wait uses it up.

    Raises:
        UnsupportedError: It is that one.
    """
    if not hasattr(io, "_ensure_setup"):
        raise UnsupportedError(
            f"plugins=AsyncCheckpointIO: that of lightning {pl.__version__} writes weights while training changes them. Use "
            "lightning >= 2.5.4, or leave it out."
        )


def writes_folders(strategy: Any) -> bool:
    """Whether all processes of a `ModelParallelStrategy` write a checkpoint, which is a folder; else rank 0 writes a file.

    Raises:
        UnsupportedError: As `check_run`.
    """
    return bool(_look_up(strategy, "_save_distributed_checkpoint"))


def ending_handlers(trainer: pl.Trainer) -> dict[int, Handler]:
    """What is done at each signal that Lightning ends the run by, or saves and requeues it; none outside of the main thread.

    Raises:
        UnsupportedError: As `check_run`.
    """
    connector = _connector(trainer)
    if threading.current_thread() is not threading.main_thread():
        return {}
    found: dict[int, Handler] = {}
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        if callable(handler) and any(_is_of(part, connector) for part in getattr(handler, "signal_handlers", ())):
            found[int(number)] = handler
    return found


def note_sigterm(trainer: pl.Trainer, handler: Handler | None, frame: FrameType | None) -> None:
    """Do what Lightning does at SIGTERM, but tell no other process: all know of it.

    Args:
        trainer: ``trainer.received_sigterm`` is true afterwards.
        handler: Lightning's, which calls the user's after its own; None if this process got no signal.
        frame: Where the signal came.

    Raises:
        UnsupportedError: As `check_run`.
    """
    connector = _connector(trainer)
    connector.received_sigterm = True
    for part in getattr(handler, "signal_handlers", ()):
        if callable(part) and not _is_of(part, connector):
            part(signal.SIGTERM, frame)


def pass_on_signal(trainer: pl.Trainer, number: int) -> None:
    """Send a signal to the processes that Lightning has started, as it does itself at SIGTERM.

    Raises:
        UnsupportedError: As `check_run`.
    """
    launcher = trainer.strategy.launcher
    if launcher is not None:
        _look_up(launcher, "kill")(number)


def _connector(trainer: pl.Trainer) -> Any:
    return _look_up(trainer, "_signal_connector")


def _is_of(handler: Any, connector: Any) -> bool:
    return getattr(handler, "__self__", None) is connector


def begins_epoch(trainer: pl.Trainer) -> bool:
    """Whether Lightning is at ``on_train_epoch_start``.

    Raises:
        UnsupportedError: As `check_run`.
    """
    progress = _look_up(_look_up(trainer.fit_loop, "epoch_progress"), "current")
    return bool(progress.ready > progress.started)


def leave_epoch(trainer: pl.Trainer) -> None:
    """Go back from the start of an epoch to the end of the one before it, where checkpoints can be gone on from.

    From a checkpoint of ``on_train_epoch_start`` itself Lightning leaves out the whole epoch, taking the batches of the one
    before for its own.

    Raises:
        UnsupportedError: As `check_run`.
    """
    if begins_epoch(trainer):
        _move_epoch(trainer, -1)
        for reset in _batch_counters(trainer):
            reset()


@contextmanager
def before_epoch(trainer: pl.Trainer) -> Iterator[None]:
    """As `leave_epoch`, for the body alone.

    Raises:
        UnsupportedError: As `check_run`.
    """
    begins = begins_epoch(trainer)
    leave_epoch(trainer)
    try:
        yield
    finally:
        if begins:
            _move_epoch(trainer, 1)


def _batch_counters(trainer: pl.Trainer) -> list[Callable[[], None]]:
    """What sets the counters of one epoch's batches to zero, as Lightning does right after the epoch's start."""
    loop = _look_up(trainer.fit_loop, "epoch_loop")
    optimization = _look_up(loop, "automatic_optimization")
    owners = (loop, "batch_progress"), (loop, "scheduler_progress"), (optimization, "optim_progress")
    return [_look_up(_look_up(owner, name), "reset_on_run") for owner, name in owners]


def _move_epoch(trainer: pl.Trainer, by: int) -> None:
    progress = _look_up(trainer.fit_loop, "epoch_progress")
    for counter in (progress.current, progress.total):
        counter.ready += by


def inner_sampler(loader: DataLoader[Any]) -> Iterable[Any] | None:
    """The sampler that Lightning has put a distributed one around; None where it has not.

    Raises:
        UnsupportedError: As `check_run`.
    """
    outer = sampler_of(loader)
    if not isinstance(outer, DistributedSampler) or not type(outer).__module__.startswith("lightning."):
        return None
    inner: Iterable[Any] = _look_up(outer.dataset, "_sampler")
    return inner


def spawns_processes(trainer: pl.Trainer) -> bool:
    """Whether the strategy starts processes that return nothing, as ``ddp_spawn`` does.

    Raises:
        UnsupportedError: As `check_run`.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        return False
    return isinstance(launcher, _imported("lightning.pytorch.strategies.launchers", "_MultiProcessingLauncher"))


def rich_lines(bar: RichProgressBar) -> Any:
    """The display of a Rich bar, which lines can be added to; None before it is shown.

    Raises:
        UnsupportedError: As `check_run`.
    """
    return _look_up(bar, "progress")


def tqdm_line(bar: TQDMProgressBar, title: str, **options: Any) -> Any:
    """A line below those of a tqdm bar, in its format.

    Raises:
        UnsupportedError: As `check_run`.
    """
    line, position, form = _tqdm_parts(bar)
    return line(desc=title, position=2 * position + 1, leave=False, bar_format=form, **options)


def _tqdm_parts(bar: TQDMProgressBar) -> tuple[Any, int, str]:
    line = _imported("lightning.pytorch.callbacks.progress.tqdm_progress", "Tqdm")
    return line, _look_up(bar, "process_position"), _look_up(bar, "BAR_FORMAT")


def _look_up(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise _renamed(type(owner).__name__, name)
    return getattr(owner, name)


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _renamed(module, name) from error


def _renamed(owner: str, name: str) -> UnsupportedError:
    oldest, newest = TESTED
    return UnsupportedError(
        f"lightning {pl.__version__} (with torch {torch.__version__}): {owner} has no {name!r}, a name inside Lightning that "
        f"lightning-cap needs here. It was tested with lightning {oldest} to {newest}. Install one of those, "
        f"pip install 'lightning>={oldest},<={newest},!=2.6.2,!=2.6.3', or a newer lightning-cap."
    )


def is_compiled(module: pl.LightningModule) -> bool:
    """Whether ``fit`` was given ``torch.compile(module)``."""
    return getattr(module, "_compiler_ctx", None) is not None
