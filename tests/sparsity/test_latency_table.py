from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from torch import nn

from lightning_cap.errors import DataError
from lightning_cap.sparsity.latency_table import (
    Conditions,
    LatencyTable,
    PartTimes,
    TableTerm,
    fingerprint,
    grid_times,
    linear_times,
    read_table,
)
from lightning_cap.utilities.machine import Machine
from lightning_cap.utilities.records import write_records
from tests.support.clocks import SlowNet, slow_units

HERE = Conditions(
    machine=Machine("here", "chip", "", "2.9"), device="cpu", threads=2, batch_size=1, dtype="float32", model="Net", fingerprint="f"
)  # fmt: skip
TABLE = LatencyTable(conditions=HERE, milliseconds=3.0, parts=(PartTimes(("a",), ((0,),), ((1, 4),), (1.0, 3.0)),))


def test_a_term_interpolates_between_widths():
    rng = np.random.default_rng(0)
    widths = ((1, 3, 5, 8), (1, 2, 7))
    grid = rng.random((4, 3))
    oracle = RegularGridInterpolator(widths, grid)
    term = TableTerm(["a", "b"], (8, 7), PartTimes(("m",), ((0, 1),), widths, tuple(grid.flatten().tolist())))
    for one, two in itertools.product(range(1, 9), range(1, 8)):
        assert term.price({"a": 8 - one, "b": 7 - two}) == pytest.approx(float(oracle((one, two))))
    assert term.price({"a": 3}) == pytest.approx(float(oracle((5, 7))))  # others have all
    assert term.groups == ("a", "b")
    line = TableTerm(["a"], (8,), PartTimes(("m",), ((0,),), (widths[0],), (1.0, 2.0, 4.0, 8.0)))
    assert [line.price({"a": 8 - kept}) for kept in (1, 2, 3, 4, 8)] == pytest.approx([1.0, 1.5, 2.0, 3.0, 8.0])


@pytest.mark.parametrize("seed", range(5))
def test_fewer_units_never_take_longer(seed):
    rng = np.random.default_rng(seed)
    widths = [(1, 3, 5, 8), (1, 2, 7)]
    cells = {cell: float(rng.random()) for cell in itertools.product(*widths)}
    cells[8, 7] = 1.0
    times = grid_times(["m"], [(0, 1)], widths, cells)
    grid = np.array(times.milliseconds).reshape(4, 3)
    for dim in (0, 1):
        assert (np.diff(grid, axis=dim) > -1e-12).all()
    assert grid[-1, -1] == pytest.approx(1.0)  # all units take what they took


def test_what_rises_already_stays_but_for_a_little_tilt():
    cells = {(1,): 1.0, (3,): 2.0, (5,): 2.0, (7,): 4.0}
    times = grid_times(["m"], [(0,)], [(1, 3, 5, 7)], cells)
    assert times.milliseconds == pytest.approx((1.0, 2.0, 2.0, 4.0), rel=0.02)
    assert times.milliseconds[2] > times.milliseconds[1]  # each unit saves something


def test_linear_times_are_a_constant_and_what_grows_with_each_group():
    rng = np.random.default_rng(0)
    sizes = (10, 20, 4)
    cells = {}
    for _ in range(9):
        cell = tuple(int(rng.integers(1, size + 1)) for size in sizes)
        cells[cell] = 0.5 + 0.2 * cell[0] + 0.01 * cell[1]
    constant, first, second = linear_times(["m", "n"], [(0, 1, 2), (3, 1, 2)], sizes, cells)
    assert (constant.widths, constant.groups) == ((), ((), ()))
    assert constant.milliseconds == pytest.approx((0.5,))
    assert (first.widths, first.groups) == (((1, 10),), ((0,), (3,)))
    assert first.milliseconds == pytest.approx((0.2, 2.0))
    assert second.milliseconds == pytest.approx((0.01, 0.2))
    assert linear_times(["m"], [()], (), {(): 0.7}) == [PartTimes(("m",), ((),), (), (0.7,))]


def test_a_table_is_used_again_under_the_same_conditions(tmp_path, caplog):
    path = tmp_path / "latency.json"
    assert read_table(path, HERE, given=True) is None
    write_records(path, [TABLE])
    with caplog.at_level(logging.WARNING):
        assert read_table(path, HERE, given=True) == TABLE
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": Machine("there", "chip", "", "2.9")}, "machine there, not here"),
        ({"machine": Machine("there", "other chip", "", "2.9")}, "machine there, other chip, not here, chip"),
        ({"machine": Machine("here", "chip", "", "2.6")}, "machine 2.6, not 2.9"),
        ({"threads": 8}, "threads 8, not 2"),
        ({"batch_size": 32}, "batch_size 32, not 1"),
        ({"device": "cuda:0"}, "device cuda:0, not cpu"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, not float32"),
        ({"fingerprint": "g"}, "fingerprint g, not f"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_table_of_other_conditions_is_not_used_and_why_is_said(tmp_path, caplog, change, words, given):
    path = tmp_path / "latency.json"
    write_records(path, [replace(TABLE, conditions=replace(HERE, **change))])
    with caplog.at_level(logging.WARNING):
        assert read_table(path, HERE, given) is None
    assert caplog.messages == [f"{path} was made on {words}: timing the layers anew."]


NO_TIMES = replace(TABLE, parts=(PartTimes(("a",), ((0,),), ((1, 4),), (1.0,)),))
DAMAGED = {
    "torn": (json.dumps(TABLE.to_json())[:-9], ": it is torn, as after a kill or on a full disk"),
    "empty": ("", ": it holds 0 records of kind 'latency' instead of one"),
    "no record": ("[1]\n", ", line 1: [1] is not a record. Here belong records of kind 'latency'"),
    "no JSON": ("times\n", ", line 1: times is not JSON"),
    "bytes": ("\x00\x01\n", ", line 1: \x00\x01 is not JSON"),
    "another kind": ('{"record": "export", "version": 1}\n', "'export', but here belong those of kind 'latency'"),
    "another version": ('{"record": "latency", "version": 99}\n', "of which this lightning-cap reads version 1"),
    "times missing": (json.dumps(NO_TIMES.to_json()) + "\n", ": times of ('a',) are missing in this table"),
}


@pytest.mark.parametrize(("content", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_refused_where_it_was_given_and_else_made_anew(tmp_path, caplog, content, words):
    path = tmp_path / "latency.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(DataError) as caught:
            read_table(path, HERE, given=True)
        assert not caplog.messages
        assert read_table(path, HERE, given=False) is None
    error, (line,) = str(caught.value), caplog.messages
    assert error.startswith(str(path))
    assert f"{words}: " in error
    assert line.startswith(str(path))
    assert line.endswith(f"{words}: timing the layers anew.")
    assert "\n" not in error + line


def test_the_fingerprint_tells_models_apart_but_no_names():
    model = SlowNet()
    known = fingerprint(model, slow_units(model), [(3,)])
    assert known == fingerprint(SlowNet(), slow_units(model), [(3,)])
    assert known == fingerprint(SlowNet(), slow_units(model, "net."), [(3,)])
    others = [
        fingerprint(SlowNet(blocks=2), slow_units(SlowNet(blocks=2)), [(3,)]),
        fingerprint(model, slow_units(model, stream=False), [(3,)]),
        fingerprint(model, slow_units(model), [(4,)]),
        fingerprint(SlowNet(width=9), slow_units(SlowNet(width=9)), [(3,)]),
        fingerprint(nn.Sequential(model), slow_units(model), [(3,)]),
    ]
    assert len({known, *others}) == 6
