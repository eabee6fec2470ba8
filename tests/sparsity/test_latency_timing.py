from __future__ import annotations

import pytest
import torch

from lightning_cap.sparsity.latency_parts import find_parts, shrunk
from lightning_cap.sparsity.latency_passes import plan_passes
from lightning_cap.sparsity.latency_timing import Stopwatch, Timed, measure
from tests.support.clocks import CLOCK, SlowNet, slow_units

CPU = torch.device("cpu")


def call(model):
    return model(torch.ones(2, 3))


def test_each_part_has_its_own_time_alone():
    model = SlowNet(blocks=2).eval()
    units = slow_units(model)
    parts = find_parts(model, units, call)
    times = dict(
        zip([part.module for part in parts], Timed(model, parts, Stopwatch(CPU, CLOCK)).times(call), strict=True)
    )
    block = (2 * 2 * 6 * 8 + 2) + 2 * 6
    assert {name: 1e3 * ms for name, ms in times.items()} == pytest.approx(
        {"": 0, "first": 2 * 18 + 1, "blocks": 0, "blocks.0": block, "blocks.1": block, "last": 2 * 12 + 1}, abs=1e-6
    )


def test_a_module_that_is_called_twice_takes_both_times():
    model = SlowNet(blocks=1).eval()
    parts = find_parts(model, slow_units(model), call)
    timed = Timed(model, parts, Stopwatch(CPU, CLOCK))
    once = timed.times(call)
    assert timed.times(lambda m: (call(m), call(m))) == pytest.approx([2 * own for own in once])


def test_parts_are_timed_at_all_widths_of_the_passes():
    model = SlowNet().eval()
    units = slow_units(model)
    parts = find_parts(model, units, call)
    passes = plan_passes(parts, list(units.sizes.values()))
    told = []
    found = measure(
        model, units, parts, passes, call, device=CPU, progress=lambda *args: told.append(args), clock=CLOCK
    )
    like = next(part.like for part in parts if part.module == "blocks.0")
    stream_first = next(part.groups[0] for part in parts if part.module == "blocks.0") == 0
    cells = {cell if stream_first else cell[::-1]: own for (other, cell), own in found.parts.items() if other == like}
    assert len(cells) == 25
    for (stream, width), own in cells.items():
        assert [1e3 * ms for ms in own] == pytest.approx([4 * stream * width + 2 + 2 * stream] * len(own))
    assert found.overhead == pytest.approx([0.0] * 40, abs=1e-9)  # rounds, without the first
    assert told[0] == ("timing layers", 0, 41)
    assert told[-1] == ("timing layers", 41, 41)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_slow_model_is_timed_in_few_rounds():
    model = SlowNet(blocks=1).eval()
    units = slow_units(model)

    def slow(smaller):
        CLOCK.now += 20.0
        return call(smaller)

    parts = find_parts(model, units, call)
    found = measure(model, units, parts, [(6, 8), (3, 4)], slow, device=CPU, progress=lambda *_: None, clock=CLOCK)
    assert len(found.overhead) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_on_a_gpu_take_the_time_of_its_work():
    device = torch.device("cuda", 0)
    stopwatch = Stopwatch(device, CLOCK)
    x = torch.ones(2048, 2048, device=device)
    before = stopwatch.mark()
    for _ in range(20):
        x = x @ x
    assert stopwatch.milliseconds(before, stopwatch.mark()) > 0
    model = SlowNet().eval().to(device)
    parts = find_parts(model, units := slow_units(model), lambda m: m(torch.ones(2, 3, device=device)))
    copy = shrunk(model, units, {0: 3})
    assert all(ms > 0 for ms in Timed(copy, parts, stopwatch).times(lambda m: m(torch.ones(2, 3, device=device))))
