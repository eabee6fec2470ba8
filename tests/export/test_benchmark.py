from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.export.batches import call, head, num_rows
from lightning_cap.export.benchmark import benchmark, print_benchmark, save_benchmark
from lightning_cap.export.records import BENCHMARKS, BenchmarkRecord
from lightning_cap.utilities.flops import count_flops
from lightning_cap.utilities.records import read_records
from tests.support.anything import INPUTS, made
from tests.support.clocks import FakeClock

EXAMPLE = torch.ones(2, 4)
MACS = {"dense": 1000, "other": 1000}


def measured(dense: tuple[float, ...], other: tuple[float, ...], **given) -> BenchmarkRecord:
    """The other one at batch 1, with calls that take so many milliseconds."""
    clock = FakeClock()
    models = {"dense": clock.call(*dense), "other": clock.call(*other)}
    records = benchmark(models, EXAMPLE, clock=clock, **{"flops": MACS, "batch_sizes": [1], **given})
    assert [record.model for record in records] == ["dense", "other"]
    assert records[0].remark == ""
    return records[1]


def printed(*records: BenchmarkRecord) -> str:
    text = io.StringIO()
    print_benchmark(records, Console(file=text, width=100))
    return text.getvalue()


def test_the_speed_up_is_the_median_of_pairs_with_its_quartiles():
    clock = FakeClock()

    def work(milliseconds: float):
        def call(batch: torch.Tensor) -> None:
            clock.now += milliseconds * len(batch) / 1e3

        return call

    models = {"dense": work(6.0), "other": work(2.0)}
    records = benchmark(models, EXAMPLE, batch_sizes=[1, 32], clock=clock, threads=1)
    assert [(r.model, r.batch_size) for r in records] == [("dense", 1), ("other", 1), ("dense", 32), ("other", 32)]
    assert [r.milliseconds for r in records] == pytest.approx([6.0, 2.0, 192.0, 64.0])
    assert [r.speedup for r in records] == pytest.approx([1.0, 3.0, 1.0, 3.0])
    assert {(r.threads, r.device, r.dense, r.remark) for r in records} == {(1, "cpu", "dense", "")}

    uneven = measured((12.0,), (2.0, 3.0, 4.0))
    assert (uneven.speedup_low, uneven.speedup, uneven.speedup_high) == pytest.approx((3.0, 4.0, 6.0))


def test_a_machine_that_slows_down_meets_both_alike():
    clock = FakeClock()

    def work(milliseconds: float):
        def call(batch: torch.Tensor) -> None:
            clock.now += milliseconds / 1e3 * (1 + clock.now // 0.1)  # ever slower

        return call

    record = benchmark({"dense": work(3.0), "other": work(1.5)}, EXAMPLE, batch_sizes=[1], clock=clock)[1]
    assert record.speedup == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("dense", "other", "given", "words"),
    [
        ((10.0,), (10.0,), {}, ["computes as much (100% of the FLOPs)", "multiplied like other numbers"]),
        ((10.0,), (12.0,), {"sparse_kernels": ["other"]}, ["kernels skip zeros", "gains nothing"]),
        ((10.0,), (9.8,), {"flops": {"dense": 1000, "other": 500}}, ["computes 50% of the FLOPs", "GFLOP/s", "memory"]),
        ((9.0, 10.0, 11.0), (8.0, 10.0, 13.0), {"flops": {"dense": 1000, "other": 500}}, ["times vary too much"]),
        ((10.0,), (10.0,), {"flops": None}, ["not known"]),
    ],
)  # fmt: skip
def test_no_speed_up_is_said_with_its_reason(dense, other, given, words):
    record = measured(dense, other, **given)
    assert record.remark.startswith("no speed-up here: ")
    for word in words:
        assert word in record.remark
    assert f"other at batch 1: {record.remark}" in printed(record)


def test_a_speed_up_that_is_lost_in_the_spread_is_said_to_be():
    record = measured((10.0,), (8.0, 8.0, 14.0), flops={"dense": 1000, "other": 500})
    assert record.speedup == pytest.approx(1.25)
    assert record.remark.startswith("times vary too much to tell (quartiles 0.71x to 1.25x)")


def test_flops_of_torch_modules_are_counted():
    dense, small = nn.Linear(4, 6, bias=False).eval(), nn.Linear(4, 3, bias=False).eval()
    clock = FakeClock()
    dense.register_forward_hook(lambda *_: clock.call(4)())
    small.register_forward_hook(lambda *_: clock.call(2)())
    records = benchmark({"dense": dense, "small": small}, EXAMPLE, clock=clock, batch_sizes=[3])
    assert [record.flops for record in records] == [2 * 4 * 6, 2 * 4 * 3]
    assert records[1].speedup == pytest.approx(2.0)


@pytest.mark.parametrize("name", INPUTS)
def test_models_that_take_or_give_more_than_one_tensor(name):
    """A module gets the arguments, and a function, such as what runs a file, the batch itself."""
    model, example, sizes = made(name), INPUTS[name](2), []

    def other(batch):
        sizes.append(num_rows(batch))
        return call(model, batch)

    records = benchmark({"dense": model, "other": other}, example, batch_sizes=[5], clock=FakeClock(), seconds=0.01)
    assert set(sizes) == {5}
    assert [record.flops for record in records] == [count_flops(call, model, head(example, 1)), None]
    assert records[0].flops > 0


def test_the_table_tells_times_files_threads_and_the_machine(tmp_path):
    (tmp_path / "small.onnx").write_bytes(bytes(1_230_000))
    record = measured((45.2,), (20.7,), files={"other": tmp_path / "small.onnx"}, threads=1)
    text = printed(replace(record, model="dense", milliseconds=45.2, bytes=None), record)
    assert re.search(r"dense +│ +1 │ +45.2 │ +- │ +- │ +- ", text)
    assert re.search(r"other +│ +1 │ +20.7 │ +2.18x │ 2.18 to 2.18 │ 1.23 MB", text)
    assert (
        f"Measured on {record.machine.name}: {record.machine.processor}, cpu, 1 thread, torch {torch.__version__}."
        in text
    )


def test_a_record_takes_the_place_of_an_earlier_one(tmp_path):
    first, second = measured((4.0,), (2.0,)), measured((4.0,), (1.0,))
    other = replace(first, batch_size=32)
    save_benchmark([first, other], tmp_path)
    save_benchmark([second], tmp_path)
    assert read_records(tmp_path / BENCHMARKS, BenchmarkRecord) == [other, second]


def test_a_model_that_cannot_take_the_batch_is_refused():
    def fixed(batch: torch.Tensor) -> None:
        raise ValueError("expected 1,\ngot 32")

    with pytest.raises(
        ConfigError, match=r"batch_sizes: 'other' cannot take a batch of 32 \(ValueError: expected 1, got 32\)"
    ):
        benchmark({"dense": FakeClock().call(1), "other": fixed}, EXAMPLE, batch_sizes=[32])


def test_progress_is_told_of_each_batch_size():
    told = []
    measured((1.0,), (1.0,), batch_sizes=[1], progress=lambda *args: told.append(args))
    assert told == [("measuring batch 1", 0, 1)]
