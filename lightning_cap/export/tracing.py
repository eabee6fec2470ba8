"""A model as a program of `torch.export`, with names for what it takes and gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cap.errors import ExportError
from lightning_cap.export.batches import (
    Inputs,
    arguments,
    batched_tensors,
    input_names,
    output_names,
    output_tensors,
)


class Program(NamedTuple):
    """A model as `torch.export` has traced it.

    Attributes:
        traced: Its outputs are one tensor, or a list of all its tensors.
        inputs: Names of the tensors that it takes.
        outputs: Names of those that it gives.
    """

    traced: torch.export.ExportedProgram
    inputs: list[str]
    outputs: list[str]


def dynamic_batch(model: nn.Module, inputs: Inputs, largest: int | None = None) -> Program:
    """The program of a model that takes any number of rows.

    Args:
        model: In evaluation mode.
        inputs: With 2 rows or more.
        largest: Number of rows, None for no limit.

    Raises:
        ExportError: The model takes the number of rows for a constant.
    """
    batch = torch.export.Dim("batch", min=1, max=largest)
    shapes = torch.export.ShapesCollection()
    for tensor in batched_tensors(inputs):
        shapes[tensor] = {0: batch}
    given, made = input_names(model, inputs), list[str]()

    def as_list(_: nn.Module, __: Any, outputs: Any) -> Any:
        made[:] = output_names(outputs, {*given, *model.state_dict()})
        return (
            None if isinstance(outputs, Tensor) else output_tensors(outputs)
        )  # no class of another package is in the file

    with model.register_forward_hook(as_list), _telling_constants():
        traced = torch.export.export(model, *arguments(inputs), dynamic_shapes=shapes, strict=False)
    return Program(traced, given, made)


@contextmanager
def _telling_constants() -> Iterator[None]:
    """What to do about a model that takes the number of rows for a constant."""
    try:
        yield
    except Exception as error:
        if "specialized it to be a constant" not in str(error):
            raise
        raise ExportError(
            "model: its forward method takes the number of rows for a constant, so a file would take no other. Write x.shape[0] "
            "in place of len(x), and no `if` that depends on it."
        ) from error
