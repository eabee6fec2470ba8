"""What a run must remember across a crash, and its form in a checkpoint: tensors and plain Python values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from lightning_cap.callbacks.cycle import Cycle
from lightning_cap.callbacks.run_files import RunFiles, unused_files
from lightning_cap.errors import CAPError, ConfigError, DataError
from lightning_cap.pruners import Pruner
from lightning_cap.sparsity.ends import PENDING, Ends
from lightning_cap.sparsity.masks import MaskSet, unpack_masks
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import Units
from lightning_cap.trainer.run_records import CycleRecord
from lightning_cap.utilities.arguments import is_real, is_whole, shown

_VERSION = 3  # of the fields; a state of another version is refused, but for the one before


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        done: Epochs of the events that were run.
        collection_index: Collections of gradients that were made.
        cycle: The cycle that it is in.
        history: Lines of the final table.
        folder: Of its files.
        suffix: Of their names; see `RunFiles`.
        metric: Name of the metric in the table.
    """

    done: list[int] = field(default_factory=list)
    collection_index: int = 0
    cycle: Cycle | None = None
    history: list[CycleRecord] = field(default_factory=list)
    folder: str = ""
    suffix: str = ""
    metric: str | None = None


@dataclass
class Restored:
    """What a checkpoint holds besides.

    Attributes:
        masks: Of the targets, packed; None if there were none yet.
        pruner: State of the pruner.
        settings: See `describe_settings`.
        rng: Random states of all ranks; emptied when they are in force.
        ends: First and last layers; None if ``include`` named the targets, or they were not known yet.
        units: What is pruned together; None for a pruner of weights, or if they were not known yet.
    """

    masks: dict[str, Any] | None
    pruner: dict[str, Any]
    settings: dict[str, str]
    rng: list[Any]
    ends: dict[str, Any] | None
    units: dict[str, Any] | None


def encode_state(state: RunState, restored: Restored) -> dict[str, Any]:
    """The state of the callback in a checkpoint."""
    return {
        "version": _VERSION,
        **{f.name: getattr(state, f.name) for f in fields(state)},
        "done": list(state.done),
        "cycle": None if state.cycle is None else asdict(state.cycle),
        "history": [record.to_json() for record in state.history],
        **{f.name: getattr(restored, f.name) for f in fields(restored)},
    }


def decode_state(held: Any) -> tuple[RunState, Restored]:
    """What `encode_state` was given.

    Raises:
        DataError: The state is damaged, or of another version of this package.
    """
    if not isinstance(held, Mapping):
        raise _damaged(f"it is a {type(held).__name__}")
    held = _upgraded(held) if held.get("version") == 2 else held
    if held.get("version") != _VERSION:
        raise _damaged(f"it has version {held.get('version', 1)!r}, and this lightning-cap reads version {_VERSION}")
    kinds: dict[str, Any] = {
        "done": list, "collection_index": int, "cycle": (dict, type(None)), "history": list, "folder": str, "suffix": str,
        "metric": (str, type(None)), "masks": (dict, type(None)), "pruner": dict, "settings": dict, "rng": list,
        "ends": (dict, type(None)), "units": (dict, type(None)),
    }  # fmt: skip
    for name, kind in kinds.items():
        if name not in held:
            raise _damaged(f"it has no {name!r}")
        if not isinstance(held[name], kind):
            raise _damaged(f"its {name!r} is a {type(held[name]).__name__}")
    values = {name: held[name] for name in kinds}
    for name, sound in (
        ("collection_index", held["collection_index"] >= 0),
        ("done", all(is_whole(epoch) for epoch in held["done"])),
        ("rng", all(isinstance(state, dict) for state in held["rng"])),
        ("cycle", held["cycle"] is None or is_real(held["cycle"].get("goal"))),
    ):
        if not sound:
            raise _damaged(f"its {name!r} is {shown(held[name])}")
    try:
        values["cycle"] = None if held["cycle"] is None else Cycle(**held["cycle"])
        values["history"] = [CycleRecord.from_json(line) for line in held["history"]]
    except (TypeError, CAPError) as error:
        raise _damaged(str(error)) from error
    values["done"] = list(held["done"])
    own = {f.name for f in fields(RunState)}
    state = RunState(**{name: value for name, value in values.items() if name in own})
    return state, Restored(**{name: value for name, value in values.items() if name not in own})


def _upgraded(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state of version 2, which knew no units."""
    lines = held.get("history")
    history = [{**line, "version": 3, "saving": None} for line in lines] if _are_lines(lines) else lines
    return {**held, "version": _VERSION, "history": history, "units": None}


def _are_lines(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and all(isinstance(line, Mapping) and line.get("version") == 2 for line in value)


def choose_files(state: RunState, folder: Path, goals: Iterable[float], goal_name: str) -> RunFiles:
    """The files of a run that goes on, else such as no other run has written; ``state`` remembers them.

    Call it on every rank.
    """
    if state.folder != str(folder):
        state.folder, state.suffix = str(folder), unused_files(folder, goals, goal_name).suffix
    return RunFiles(folder, state.suffix, goal_name)


def load_masks(masks: MaskSet, packed: Mapping[str, Any]) -> None:
    """Put the masks of a checkpoint in force.

    Raises:
        ConfigError: They are not of these targets.
        DataError: They are damaged.
    """
    with _reading("masks", ConfigError):
        masks.load_state_dict(packed)


def first_masks(targets: Targets, packed: Mapping[str, Any] | None, existing_zeros: bool) -> MaskSet:
    """The masks that a run begins with.

    Args:
        targets: What is pruned; while this is not chosen yet, nothing is masked.
        packed: Masks of a checkpoint or of an earlier fit, if there are any.
        existing_zeros: Whether, without them, weights that are zero are masked.

    Raises:
        ConfigError: The packed masks are not of these targets.
        DataError: They are damaged.
    """
    masks = MaskSet(targets)
    if targets.ends is PENDING:
        return masks
    if packed is not None:
        load_masks(masks, packed)
    elif existing_zeros:
        masks.mask_zeros()
    return masks


def load_ends(restored: Restored) -> Ends | None:
    """First and last layers of a checkpoint, None if it holds none.

    Raises:
        DataError: They are damaged.
    """
    with _reading("ends"):
        return None if restored.ends is None else Ends.from_state(restored.ends)


def load_units(restored: Restored) -> Units | None:
    """Units of a checkpoint, None if it holds none.

    Raises:
        DataError: They are damaged.
    """
    with _reading("units"):
        return None if restored.units is None else Units.from_state(restored.units)


def pruned_units(states: Any) -> tuple[Units, dict[str, Tensor]] | None:
    """The units of a run, and its masks, of the states of all callbacks in a checkpoint: ``checkpoint["callbacks"]``.

    Returns:
        Units, by names in the LightningModule, and ``{target: bool (*shape)}`` on the CPU; None if no units were pruned.

    Raises:
        DataError: They are damaged.
    """
    for held in states.values() if isinstance(states, Mapping) else ():
        if isinstance(held, Mapping) and isinstance(held.get("units"), Mapping) and "collection_index" in held:
            _, restored = decode_state(held)
            units = load_units(restored)
            with _reading("masks"):
                masks = unpack_masks(restored.masks)
            return None if units is None else (units, masks)
    return None


def load_pruner(pruner: Pruner, restored: Restored) -> None:
    """Give a pruner its state back, if it is of the same class.

    Raises:
        DataError: The state is damaged.
    """
    if restored.settings.get("pruner") == type(pruner).__qualname__:
        with _reading("pruner"):
            pruner.load_state_dict(restored.pruner)


@contextmanager
def _reading(name: str, *passed_on: type[CAPError]) -> Iterator[None]:
    try:
        yield
    except passed_on:
        raise
    except (CAPError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(f"its {name!r} cannot be read ({type(error).__name__}: {shown(str(error))})") from error


def _damaged(reason: str) -> DataError:
    return DataError(
        f"ckpt_path: the state of CAPPruningCallback in the checkpoint cannot be used: {reason}. To prune on from its weights, "
        "load its 'state_dict' into the model and start anew; weights that are zero stay pruned."
    )
