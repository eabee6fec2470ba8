"""Typed records with a version, one line of JSON each: what an event, a comparison and an export leave behind."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from typing_extensions import Self

from lightning_cap.errors import DataError
from lightning_cap.utilities.files import atomic

_log = logging.getLogger(__name__)

#: What a setting may be, in a record.
Plain = bool | int | float | str | None

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RecordError(DataError):
    """A file, or a line of it, is not what was wanted.

    Attributes:
        reason: What it is instead.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Record:
    """Base of the records: a subclass is a frozen dataclass that says its ``kind`` and ``version``.

    A line is ``{"record": kind, "version": version, ...}`` with the fields by name. Fields are plain values, and mappings, tuples
    (``tuple[float, ...]``) and dataclasses of such. ``null`` says that a value is not known. A float that is not finite is
    the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, so that every reader of JSON takes the line, and is that float again
    when it is read.

    Any change of the fields, or of what one means, is a new version. A line of another version is refused, whatever it holds.

    Attributes:
        kind: What a record is of, such as ``"event"``.
        version: Of the fields, from 1.
    """

    kind: ClassVar[str]
    version: ClassVar[int]

    def to_json(self) -> dict[str, Any]:
        """The line, as plain Python values."""
        return {"record": self.kind, "version": self.version, **_encode_fields(self)}

    @classmethod
    def from_json(cls, line: Any) -> Self:
        """The record of a line.

        Args:
            line: What ``json.loads`` gave.

        Raises:
            DataError: The line is of another kind or version, or its fields are not those of this kind.
        """
        if not isinstance(line, Mapping) or "record" not in line:
            raise RecordError(f"{_shown(line)} is not a record. Here belong records of kind {cls.kind!r}", _REMEDY)
        if line["record"] != cls.kind:
            raise RecordError(
                f"a record of kind {_shown(line['record'])}, but here belong those of kind {cls.kind!r}",
                "give the file of those.",
            )
        version = line.get("version")
        if version != cls.version or isinstance(version, bool):
            newer = isinstance(version, int) and version > cls.version
            remedy = "it is of a newer lightning-cap: install that one, or move the file away." if newer else _REMEDY
            raise RecordError(
                f"version {_shown(version)} of a record of kind {cls.kind!r}, of which this lightning-cap reads version "
                f"{cls.version}",
                remedy,
            )
        try:
            record: Self = _decode_fields(cls, {k: v for k, v in line.items() if k not in ("record", "version")}, "")
        except _MismatchError as error:
            raise RecordError(f"a record of kind {cls.kind!r} with {error}", _REMEDY) from None
        return record


R = TypeVar("R", bound=Record)

_REMEDY = "remove that line, or move the file away."


class _MismatchError(ValueError):
    """A value is not of the type that its field declares."""


def read_records(path: Path | str, kind: type[R]) -> list[R]:
    """The records of a file of JSON lines. A last line that is torn, as after a kill, is left out and logged.

    Args:
        path: Such as ``results.jsonl``.
        kind: The class of the records, such as `lightning_cap.comparison.ComparisonRecord`.

    Raises:
        DataError: There is no such file, or a line is no record of this kind and version; the message names the line.
    """
    records, torn = read_up_to_tear(path, kind)
    if torn:
        _log.warning("%s: the last line is torn, as after a kill or on a full disk; it is left out.", path)
    return records


def read_up_to_tear(path: Path | str, kind: type[R]) -> tuple[list[R], bool]:
    """The records of a file as `read_records` gives them, and whether its last line is torn; that is not logged."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(
            f"{path}: it cannot be read ({error})", f"give a file of records of kind {kind.kind!r}."
        ) from error
    records: list[R] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            if number == len(lines):  # a whole line ends with a line feed
                return records, True
            raise RecordError(f"{path}, line {number}: {_shown(line)} is not JSON", _REMEDY) from None
        try:
            records.append(kind.from_json(value))
        except RecordError as error:
            raise RecordError(f"{path}, line {number}: {error.reason}", error.remedy) from None
    return records, False


def known_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a file as `read_records` gives them; none if there is no file yet."""
    return read_records(path, kind) if path.exists() else []


def read_record(path: Path | str, kind: type[R]) -> R:
    """The record of a file that holds a single one; see `read_records`.

    Raises:
        DataError: It does not.
    """
    found, torn = read_up_to_tear(path, kind)
    if torn:
        raise RecordError(f"{path}: it is torn, as after a kill or on a full disk", "move the file away.")
    if len(found) != 1:
        raise RecordError(
            f"{path}: it holds {len(found)} records of kind {kind.kind!r} instead of one", "move the file away."
        )
    return found[0]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file of JSON lines, in one piece.

    Raises:
        TypeError: A field holds what is no plain value. What was at ``path`` before is still there.
    """
    text = "".join(json.dumps(record.to_json(), allow_nan=False) + "\n" for record in records)
    with atomic(path) as temporary:
        temporary.write_text(text)


def append_record(path: Path, record: R, superseded: Callable[[R], bool]) -> None:
    """Add a record to a file of JSON lines, which is whole before and after.

    Args:
        path: The file; made if it is not there.
        record: What to add, at the end.
        superseded: Says of a record in the file whether the new one takes its place.

    Raises:
        DataError: The file holds something else; see `read_records`.
    """
    kept = [old for old in known_records(path, type(record)) if not superseded(old)]
    write_records(path, [*kept, record])


def _encode_fields(value: Any) -> dict[str, Any]:
    return {field.name: _encode(getattr(value, field.name)) for field in fields(value)}


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _encode(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(entry) for entry in value]
    return _encode_fields(value) if is_dataclass(value) else value


def _decode_fields(kind: type[Any], entries: Any, where: str) -> Any:
    """A dataclass from its fields by name."""
    if not isinstance(entries, Mapping):
        raise _MismatchError(f"{where}={_shown(entries)}, which is not of the type {kind.__name__}")
    prefix = f"{where}." if where else ""
    hints, known = get_type_hints(kind), [field.name for field in fields(kind)]
    for name in entries:
        if name not in known:
            raise _MismatchError(f"a field {prefix}{name}, which it does not have")
    for name in known:
        if name not in entries:
            raise _MismatchError(f"no field {prefix}{name}")
    return kind(**{name: _decode(entry, hints[name], f"{prefix}{name}") for name, entry in entries.items()})


def _decode(value: Any, kind: Any, where: str) -> Any:
    """What JSON gave for a value of the type ``kind``."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in args:
            with suppress(_MismatchError):
                return _decode(value, one, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(entry, args[0], f"{where}[{i}]") for i, entry in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {name: _decode(entry, args[1], f"{where}.{name}") for name, entry in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    takes = (int, float) if kind is float else kind
    if origin is None and isinstance(value, takes) and (kind is bool or not isinstance(value, bool)):
        return value
    name = kind.__name__ if isinstance(kind, type) else kind
    raise _MismatchError(f"{where}={_shown(value)}, which is not of the type {name}")


def _shown(value: Any) -> str:
    """At most so much of it that a message stays readable."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
