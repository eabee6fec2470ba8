from __future__ import annotations

import copy
import itertools
import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_cap.errors import ConfigError, DataError, UnsupportedError
from lightning_cap.sparsity import latency_timing
from lightning_cap.sparsity.cost import Cost
from lightning_cap.sparsity.latency import TABLE, Latency
from lightning_cap.sparsity.latency_table import LatencyTable
from lightning_cap.sparsity.shrinking import shrink_in_place
from lightning_cap.utilities import distributed
from lightning_cap.utilities.machine import Machine
from lightning_cap.utilities.records import read_record, write_records
from tests.support.clocks import CLOCK, SlowNet, slow_milliseconds, slow_units

EXAMPLE = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_timing, "_MOST", 4)


def latency(**given) -> Latency:
    """On the clock of the slow models."""
    cost = Latency(**given)
    cost._clock = CLOCK
    return cost


def table_of(cost: Latency) -> LatencyTable:
    assert cost._times is not None
    return cost._times


def test_the_prediction_is_what_the_shrunk_model_takes():
    model = SlowNet().eval()
    units = slow_units(model)
    cost = latency(batch_size=5)
    cost.prepare(model, units, EXAMPLE)
    prices = cost.unit_prices(units, {})
    assert prices.unit == "ms"
    assert prices.total == pytest.approx(slow_milliseconds(5, 6, [8] * 5))
    assert table_of(cost).milliseconds == pytest.approx(prices.total)
    for stream, widths in [(6, [8] * 5), (3, [8, 4, 2, 1, 8]), (1, [1] * 5), (5, [3, 7, 5, 5, 2])]:
        counts = [stream, *widths]
        smaller = copy.deepcopy(model)
        kept = {name: torch.arange(g.size) < count for (name, g), count in zip(units.items(), counts, strict=True)}
        shrink_in_place(smaller, units, kept)
        before = CLOCK.now
        smaller(torch.ones(5, 3))
        took = 1e3 * (CLOCK.now - before)
        assert took == pytest.approx(slow_milliseconds(5, stream, widths))
        assert prices.of(dict(zip(units, counts, strict=True))) == pytest.approx(took, rel=0.01)
    assert prices.summary([0.5]) == f"{prices.total:.4g} ms dense, {prices.total / 2:.4g} ms at goal 0.5"


def test_what_taking_times_takes_is_no_time_of_the_model(monkeypatch):
    model = SlowNet().eval()
    units = slow_units(model)
    plain, hindered = latency(), latency()
    plain.prepare(model, units, torch.ones(2, 3))
    mark = latency_timing.Stopwatch.mark

    def slow_mark(stopwatch):
        CLOCK.now += 3e-6  # a tenth of the whole in all
        return mark(stopwatch)

    monkeypatch.setattr(latency_timing.Stopwatch, "mark", slow_mark)
    hindered.prepare(model, units, torch.ones(2, 3))
    shapes = units.targets(model).shapes
    for counts in ({}, dict.fromkeys(units, 1)):  # the same of small parts as of large ones
        wanted = plain.unit_prices(units, shapes).of(counts)
        assert hindered.unit_prices(units, shapes).of(counts) == pytest.approx(wanted, rel=0.15)


def test_the_model_is_left_as_it_is():
    model = SlowNet().train()
    state, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    threads = torch.get_num_threads()
    latency(threads=threads + 1).prepare(model, slow_units(model), EXAMPLE)
    assert model.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_groups_may_have_other_names_later():
    model = SlowNet().eval()
    cost = latency()
    cost.prepare(model, slow_units(model), EXAMPLE)
    renamed = slow_units(model, "model.")
    prices = cost.unit_prices(renamed, {})
    assert prices.of({"model.first": 3}) == pytest.approx(slow_milliseconds(1, 3, [8] * 5))
    other = SlowNet(width=7)
    with pytest.raises(ConfigError, match="it has timed a model with other units"):
        cost.unit_prices(slow_units(other), {})


def test_named_and_several_inputs():
    class Sum(SlowNet):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x + y)

    model = Sum().eval()
    for example in ((EXAMPLE, EXAMPLE), {"y": EXAMPLE, "x": EXAMPLE}):
        cost = latency(batch_size=4)
        cost.prepare(model, slow_units(model), example)
        assert table_of(cost).milliseconds == pytest.approx(slow_milliseconds(4, 6, [8] * 5))


def test_the_table_is_kept_beside_the_run_and_used_again(tmp_path, caplog):
    model = SlowNet().eval()
    first, again = latency(), latency()
    first.prepare(model, slow_units(model), EXAMPLE, tmp_path / "run")
    table = read_record(tmp_path / "run" / TABLE, LatencyTable)
    assert table == table_of(first)
    assert table.conditions.machine.name
    now = CLOCK.now
    with caplog.at_level(logging.INFO, "lightning_cap"):
        again.prepare(model, slow_units(model), EXAMPLE, tmp_path / "run")
    assert CLOCK.now == now
    assert table_of(again) == table
    assert not caplog.messages

    elsewhere = latency(table=tmp_path / "mine.json")
    elsewhere.prepare(model, slow_units(model), EXAMPLE, tmp_path / "run")
    assert (tmp_path / "mine.json").exists()


def test_the_table_of_another_machine_is_made_anew(tmp_path, caplog):
    model = SlowNet().eval()
    cost = latency(table=tmp_path / TABLE)
    cost.prepare(model, slow_units(model), EXAMPLE)
    here = table_of(cost)
    there = replace(here.conditions, machine=Machine("there", "its chip", "", torch.__version__))
    write_records(tmp_path / TABLE, [replace(here, conditions=there, milliseconds=99.0)])
    with caplog.at_level(logging.INFO, "lightning_cap"):
        cost.prepare(model, slow_units(model), EXAMPLE)
    assert caplog.messages[0].startswith(f"{tmp_path / TABLE} was made on machine there, its chip, not ")
    assert caplog.messages[0].endswith(": timing the layers anew.")
    assert caplog.messages[1].startswith("Timed 9 parts of SlowNet, 5 of them unlike, in copies of 6 sizes")
    assert read_record(tmp_path / TABLE, LatencyTable) == table_of(cost)
    assert table_of(cost).milliseconds == pytest.approx(here.milliseconds)


def test_a_torn_table_of_the_run_is_made_anew_but_a_given_one_is_left(tmp_path, caplog):
    model, path = SlowNet().eval(), tmp_path / TABLE
    torn = '{"record": "late'
    path.write_text(torn)
    with caplog.at_level(logging.INFO, "lightning_cap"):
        with pytest.raises(DataError, match=rf"^{path}: it is torn, as after a kill or on a full disk: move the file"):
            latency(table=path).prepare(model, slow_units(model), EXAMPLE)
        assert path.read_text() == torn
        assert not caplog.messages
        cost = latency()
        cost.prepare(model, slow_units(model), EXAMPLE, tmp_path)
    assert caplog.messages[0] == f"{path}: it is torn, as after a kill or on a full disk: timing the layers anew."
    assert caplog.messages[1].startswith("Timed 9 parts")
    assert read_record(path, LatencyTable) == table_of(cost)


def test_all_ranks_have_the_table_of_the_first(monkeypatch):
    model = SlowNet().eval()
    first, second = latency(), latency()
    first.prepare(model, slow_units(model), EXAMPLE)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "raise_on_all_ranks", lambda _: nullcontext())
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [table_of(first).to_json(), value])
    now = CLOCK.now
    second.prepare(model, slow_units(model), EXAMPLE)
    assert CLOCK.now == now
    assert table_of(second) == table_of(first)


def test_prices_are_asked_for_after_the_timing():
    with pytest.raises(ConfigError, match=r"cost=Latency\(device='cpu', batch_size=1, .*: nothing is timed yet"):
        Latency().unit_prices(slow_units(SlowNet()), {})


def test_a_batch_size_that_the_model_does_not_take_is_refused():
    class Single(SlowNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise ValueError("one by one")
            return super().forward(x)

    model = Single().eval()
    with pytest.raises(
        UnsupportedError, match=r"batch_size=32: the model does not run with it \(ValueError: 'one by one'\)"
    ):
        latency(batch_size=32).prepare(model, slow_units(model), EXAMPLE)


def test_a_model_that_cannot_be_copied_is_refused():
    model = SlowNet().eval()
    model.handle = itertools.count()
    model.blocks.generator = (i for i in range(3))
    with pytest.raises(UnsupportedError, match="it is timed on copies, but cannot be copied to cpu"):
        latency().prepare(model, slow_units(model), EXAMPLE)


def test_weights_alone_have_no_latency():
    with pytest.raises(UnsupportedError, match="Latency: single zeros inside a weight save none of it"):
        Latency().prices({"w": (2, 2)})


def test_yaml_gives_what_the_constructor_takes():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--cost", type=Cost)
    given = {"device": "cpu", "batch_size": 32, "table": "runs/latency.json", "threads": 2}
    config = parser.parse_object({"cost": {"class_path": "lightning_cap.sparsity.Latency", "init_args": given}})
    cost = parser.instantiate(config).cost
    assert isinstance(cost, Latency)
    assert repr(cost) == "Latency(device='cpu', batch_size=32, table='runs/latency.json', threads=2)"
