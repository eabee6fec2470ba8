from __future__ import annotations

from collections import UserDict, namedtuple

import torch
from torch import nn

from lightning_cap.export.batches import (
    by_name,
    checked_inputs,
    concatenated,
    head,
    input_names,
    moved,
    num_rows,
    output_names,
    repeated,
)

IDS = torch.arange(6).view(3, 2)


def test_rows_are_those_of_the_first_tensor() -> None:
    inputs = {"flag": True, "ids": IDS, "places": torch.arange(2).view(1, 2), "more": [IDS.float(), None]}
    assert num_rows(inputs) == 3
    first = head(inputs, 1)
    assert (first["ids"].tolist(), first["places"].shape, first["flag"]) == ([[0, 1]], (1, 2), True)
    many = repeated(inputs, 4)
    assert many["ids"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert many["more"][0].shape == (4, 2)
    assert many["more"][1] is None
    assert torch.equal(many["places"], inputs["places"])


def test_batches_are_joined() -> None:
    joined = concatenated([(IDS, torch.ones(1)), (IDS + 6, torch.ones(1))])
    assert (joined[0].flatten().tolist(), len(joined[1])) == (list(range(12)), 1)


def test_integers_keep_their_type() -> None:
    ids, floats = moved((IDS, IDS.float()), "cpu", torch.float16)
    assert (ids.dtype, floats.dtype) == (torch.int64, torch.float16)


def test_what_a_tokenizer_gives_is_a_dict() -> None:
    assert type(checked_inputs("x", UserDict(input_ids=IDS))) is dict
    assert type(checked_inputs("x", [IDS, IDS > 2])) is tuple


class _Model(nn.Module):
    def forward(self, x, *others, flag=False):
        return x


def test_names() -> None:
    pair = namedtuple("pair", ["boxes", "labels"])
    assert input_names(_Model(), IDS) == ["input"]
    assert input_names(_Model(), (IDS, IDS, IDS)) == ["x", "others_0", "others_1"]
    assert input_names(_Model(), {"x": [IDS, IDS], "flag": True}) == ["x_0", "x_1"]
    assert output_names(IDS, []) == ["output"]
    assert output_names([{"a": IDS}, IDS, None], []) == ["output_0_a", "output_1"]
    assert output_names(pair(IDS, IDS), []) == ["boxes", "labels"]
    assert output_names({"a_0": IDS, "a": [IDS], "x": IDS}, ["x"]) == ["a_0", "a_0_out", "x_out"]


def test_tensors_for_the_inputs_of_a_file() -> None:
    other = IDS + 1
    assert by_name((IDS, 3, other), ["a", "b"]) == {"a": IDS, "b": other}
    assert by_name({"b": other, "a": IDS, "unused": IDS}, ["a", "b"]) == {"b": other, "a": IDS}
    assert by_name(IDS, ["input"]) == {"input": IDS}
