"""What every exporter does: write a file in one piece, read it back, and compare it with torch before it gets its name."""

from __future__ import annotations

import copy
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_cap.errors import CAPError, ConfigError, ExportError
from lightning_cap.export.batches import (
    Inputs,
    call,
    checked_inputs,
    checked_outputs,
    head,
    moved,
    num_rows,
    one_or_list,
    output_tensors,
    repeated,
)
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.export.verification import check_outputs, check_zeros, share_of_zeros
from lightning_cap.utilities.arguments import (
    require_flag,
    require_instance,
    require_path,
    require_real,
    require_whole,
    shown,
)
from lightning_cap.utilities.compiled import plain_module
from lightning_cap.utilities.files import atomic, require_writable
from lightning_cap.utilities.packages import require_package
from lightning_cap.utilities.precision import full_float32
from lightning_cap.utilities.records import append_record, known_records

#: Takes inputs like those that were exported, with any number of rows, and gives what the file computes: one tensor where the model
#: gives one, in whatever structure, else a list of all its tensors.
Runner = Callable[[Inputs], Any]

#: In ``metadata``: what timm's `create_model` makes the dense model of, beside its name, as JSON.
MODEL_ARGS = "model_args"

_LONGEST = 300  # characters of what another package tells


class Exporter(ABC):
    """Writes a model into a file of one format and verifies it. A subclass says how to write, to run and to read the weights.

    Args:
        tolerance: Largest difference between an output of the file and of torch, as a share of torch's largest output.

    Raises:
        ConfigError: The tolerance is no number in (0, 1).
    """

    #: What ``lightning-cap export --to`` calls it.
    format: ClassVar[str]
    #: Of the file.
    suffix: ClassVar[str]
    #: Modules that it imports, beside torch and safetensors.
    packages: ClassVar[tuple[str, ...]] = ()
    #: The extra of lightning-cap that installs them.
    extra: ClassVar[str] = ""
    #: Suffix of a second file that may be written beside the first, of the same stem; empty for none.
    beside: ClassVar[str] = ""
    #: Whether it writes a folder of files.
    is_folder: ClassVar[bool] = False
    #: Whether it holds the integers of a model that `QATCallback` has trained; others hold its weights in float.
    integers: ClassVar[bool] = False
    #: Whether what runs it leaves out products with zeros inside a weight.
    skips_zeros: ClassVar[bool] = False

    def __init__(self, tolerance: float = 1e-4) -> None:
        require_real("tolerance", tolerance, "(0, 1)", example=1e-4)
        self.tolerance = tolerance

    @abstractmethod
    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Write the file.

        Args:
            model: In evaluation mode, a copy, as `prepare` gives it.
            path: A new file, or folder, with the suffix.
            inputs: As of `export`, with 2 rows or more; the file must take any number of rows.
            metadata: Strings that the file may hold besides.
        """

    @abstractmethod
    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """A function that runs the file.

        Args:
            path: What `export` has written.
            model: The model that was exported. Formats that hold weights alone put them into a copy of it; others need none.
            threads: Of a runtime that has threads of its own, None for its default. What torch runs has
                ``torch.get_num_threads()``.

        Returns:
            Takes inputs like those of `export`, on the CPU, with any number of rows. It gives one tensor where the model gives one,
            else a list of all its tensors, in the order of its tuple or dict.
        """

    @abstractmethod
    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The arrays in the file, read back, by their names there."""

    def prepare(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """The model and its inputs in the type and on the device that the format is made from and compared with."""
        return model, inputs

    def dense_runner(self, model: nn.Module, folder: Path, inputs: Inputs, threads: int | None = None) -> Runner:
        """What `runner` gives of a dense model in the same format, to compare times with; nothing is verified.

        Args:
            model: The dense one.
            folder: For a file that is not kept.
            inputs: As of `export`.
            threads: As of `runner`.
        """
        path = folder / f"dense{self.suffix}"
        model = copy.deepcopy(plain_module(model)).cpu().eval().requires_grad_(False)
        with full_float32(), torch.no_grad(), _telling(f"to={self.format!r}: the dense model cannot be written"):
            self.write(model, path, _two_or_more(inputs), {})
        return self.runner(path, model, threads)

    def check_stored(self, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """What else must be true of the arrays in the file, beside zeros.

        Raises:
            ExportError: It is not.
        """
        return

    def allowed(self, model: nn.Module, inputs: Inputs, expected: Sequence[Tensor]) -> float:
        """Largest difference of the file's outputs from ``expected``, those of the model for these inputs: the tolerance."""
        return self.tolerance

    def runs_here(self) -> bool:
        """Whether this machine can run the file."""
        return True

    def export(
        self,
        model: nn.Module,
        path: Path | str,
        example_input: Inputs,
        *,
        goal: float | None = None,
        dense_bytes: int | None = None,
        shrunk: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> ExportRecord:
        """Write a model, verify the file, and add a record to ``exports.jsonl`` beside it. Call it on rank 0 alone.

        The file gets its name when it was read back and run on all inputs, at once and one alone: each output within
        `tolerance`, and each zero of a weight zero in the file. What was at ``path`` before stays there until then.

        Args:
            model: Gives tensors with a row for each input: one, or several in tuples, dicts, or classes that torch takes apart like
                those. It is not changed.
            path: The file; its folder is made.
            example_input: Real inputs: a tensor ``(n, ...)``, a tuple of positional arguments, or a dict of named ones.
            goal: For the record: the sparsity that was asked for.
            dense_bytes: For the record: the size before the model was shrunk. Default: that of its weights now.
            shrunk: For the record.
            metadata: Strings for the header, in formats that have one.

        Returns:
            The record; it takes the place of an earlier one of the same file.

        Raises:
            ConfigError: An argument cannot be used, a package is missing, or the file cannot be written there.
            ExportError: The format cannot hold the model, or the file does not do what the model does. No file is left.
        """
        require_instance("model", model, nn.Module, "the pruned model")
        example = checked_inputs("example_input", example_input)
        self._check(goal, dense_bytes, shrunk, metadata)
        self.require_packages()
        path = self._file(path)
        known_records(path.with_name(EXPORTS), ExportRecord)
        own = copy.deepcopy(plain_module(model)).cpu().eval().requires_grad_(False)
        size = dense_bytes if dense_bytes is not None else num_bytes(own)
        given = {"architecture": architecture(own), **(metadata or {})}
        try:
            with atomic(path) as temporary, full_float32(), torch.no_grad():
                written = temporary.with_name(f"part{self.suffix}")
                verified = self._write_verified(own, written, moved(example, "cpu"), given)
                if self.beside and written.with_suffix(self.beside).exists():
                    with atomic(path.with_suffix(self.beside)) as second:
                        os.replace(written.with_suffix(self.beside), second)
                os.replace(written, temporary)
        except OSError as error:
            raise ConfigError(f"path={shown(str(path))}: it cannot be written ({error.strerror or error}).") from error
        sparsity = share_of_zeros(own)
        record = ExportRecord(
            format=self.format,
            path=path.name,
            goal=goal,
            sparsity=sparsity,
            architecture=given["architecture"],
            bytes=size_on_disk(path),
            dense_bytes=size,
            shrunk=shrunk,
            **verified,
        )
        append_record(path.with_name(EXPORTS), record, lambda old: old.path == record.path)
        return record

    def require_packages(self) -> None:
        """Refuse to go on without the packages of the format.

        Raises:
            ConfigError: Names the package and the extra that installs it.
        """
        for package in self.packages:
            require_package(package, f"to={self.format!r}", self.extra)

    def _write_verified(
        self, model: nn.Module, path: Path, example: Inputs, metadata: Mapping[str, str]
    ) -> dict[str, Any]:
        """Write, run and read back; what the record says of it."""
        model, inputs = self.prepare(model, example)
        expected = _run_torch(model, inputs)
        refused = f"to={self.format!r}: the model cannot be written in this format"
        with _telling(refused), _finding_full_disk(path, num_bytes(model)):
            self.write(model, path, _two_or_more(inputs), metadata)
        with _telling(f"to={self.format!r}: the file that was written cannot be read"):
            stored = self.stored(path)
            weights, equal = check_zeros(self.format, model, stored)
            self.check_stored(model, stored)
        verified: dict[str, Any] = {"weights": weights, "zeros_equal": equal}
        if self.runs_here():
            with _telling(f"to={self.format!r}: the file that was written cannot be run"):
                run = self.runner(path, model)
                outputs, alone = output_tensors(run(inputs)), output_tensors(run(head(inputs, 1)))
            allowed = self.allowed(model, inputs, expected)
            difference = max(
                check_outputs(self.format, outputs, expected, allowed),
                check_outputs(self.format, alone, [value[:1] for value in expected], allowed),
            )
            verified |= {"inputs": num_rows(inputs), "difference": difference, "tolerance": allowed}
        return verified

    def _check(self, goal: object, dense_bytes: object, shrunk: object, metadata: object) -> None:
        if goal is not None:
            require_real("goal", goal, "[0, 1]", example=0.5)
        if dense_bytes is not None:
            require_whole("dense_bytes", dense_bytes)
        require_flag("shrunk", shrunk)
        require_instance("metadata", metadata, Mapping, '{"sparsity": "0.5"}', optional=True)

    def _file(self, path: object) -> Path:
        require_path("path", path, f"model{self.suffix}")
        file = Path(cast("str | os.PathLike[str]", path))
        if not file.name.endswith(self.suffix) or file.name == self.suffix:
            raise ConfigError(f"path={shown(str(path))}: give a name that ends with {self.suffix}.")
        if file.is_dir() and not self.is_folder:
            raise ConfigError(f"path={shown(str(path))}: this is a folder. Give the name of a file in it.")
        require_writable("path", str(path), file.parent)
        return file


class WeightsExporter(Exporter):
    """Of a format that holds weights alone; it is run by the model that they were taken from."""

    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """A copy of the model with the weights of the file, run by torch."""
        require_instance("model", model, nn.Module, "the model that was exported")
        own = copy.deepcopy(cast(nn.Module, model)).eval()
        own.load_state_dict(self.stored(path))
        return torch_runner(own)


def torch_runner(module: Callable[..., Any]) -> Runner:
    """A module as a `Runner`, without gradients."""

    def run(inputs: Inputs) -> Any:
        with torch.no_grad():
            return one_or_list(output_tensors(call(module, inputs)))

    return run


def architecture(model: nn.Module) -> str:
    """timm's name of a model, empty for others."""
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file())


def num_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, each value stored, tied ones once."""
    tensors = {id(value): value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)}
    return sum(value.nbytes for value in tensors.values())


def _run_torch(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Outputs of the model itself, to compare with."""
    with _telling("example_input: the model cannot be run on it"):
        outputs = call(model, inputs)
    return checked_outputs(outputs, num_rows(inputs))


def _two_or_more(inputs: Inputs) -> Inputs:
    """Twice the row where there is only one: torch.export takes 1 for a number that never changes."""
    return inputs if num_rows(inputs) > 1 else repeated(inputs, 2)


@contextmanager
def _finding_full_disk(path: Path, size: int) -> Iterator[None]:
    """Writers in C++ do not tell why they fail: where one does after it has begun, try whether the system refuses as much space."""
    try:
        yield
    except (CAPError, OSError):
        raise
    except Exception:
        if path.exists():
            with path.with_name("space").open("wb") as file:
                file.write(bytes(size))
                os.fsync(file.fileno())
        raise


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Whatever another package raises, as one line of ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters of torch, to their developers
            yield
    except (CAPError, OSError, MemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        told = told if len(told) <= _LONGEST else f"{told[:_LONGEST]} ..."
        raise ExportError(f"{what} ({type(error).__name__}: {told}).") from error
