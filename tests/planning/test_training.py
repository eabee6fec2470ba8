"""The plan of a training run against the run itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_cap import CAPPruningCallback
from lightning_cap.callbacks.checks import refuse_sharding_by
from lightning_cap.data import DigitsDataModule
from lightning_cap.errors import CAPError, ConfigError, ScheduleError, TargetError, UnsupportedError
from lightning_cap.planning import plan_fit
from lightning_cap.planning.machine import Settings
from lightning_cap.planning.run_plan import RunPlan
from lightning_cap.pruners import CAP, CAPUnits, DropAndGrow, Magnitude
from lightning_cap.schedules import PQAdaptive, RepeatedSchedule, SparsitySteps
from lightning_cap.sparsity import Flops
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.planned import QUICK, configured, planned, pruning, small_model


def test_the_plan_is_that_of_the_run(tmp_path: Path) -> None:
    plan = planned(pruning(dirpath=str(tmp_path)), settings=Settings(), default_root_dir=str(tmp_path))
    assert not list(tmp_path.iterdir()), "nothing is written"
    run = pruning(dirpath=str(tmp_path / "run"), evaluate=False)
    trainer = configured(run, default_root_dir=str(tmp_path), enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(small_model(), datamodule=DigitsDataModule(batch_size=64))
    (pruner,) = plan.pruning
    records = read_records(tmp_path / "run" / "events.jsonl", EventRecord)
    assert [(e.epoch, e.goal) for e in pruner.events] == [(r.epoch, r.goal) for r in records]
    assert {layer.name for layer in plan.choices[0].layers if not layer.dense} == set(records[0].sparsities)
    assert pruner.samples == records[0].samples
    assert pruner.memory.peak_bytes == pytest.approx(records[0].peak_bytes, rel=0.05)
    written = {file.name: file.bytes for file in plan.files}
    checkpoint, weights = (tmp_path / "run" / f"sparsity=0.50.{kind}" for kind in ("ckpt", "safetensors"))
    assert written["sparsity=*.safetensors"] == pytest.approx(weights.stat().st_size, rel=0.1)
    assert written["sparsity=*.ckpt"] == pytest.approx(checkpoint.stat().st_size, rel=0.5)
    assert [point.goal for point in plan.timeline.points] == [0, 0, 0.5, 0.5, 0.75, 0.75]  # type: ignore[union-attr]


def test_what_is_dense_is_told_with_its_reason() -> None:
    (choice,) = planned(pruning(exclude=["*.0.attn.qkv.weight"])).choices
    why = {layer.name: layer.dense for layer in choice.layers}
    assert why["model.patch_embed.proj.weight"] == "first"
    assert why["model.head.weight"] == "last"
    assert why["model.blocks.0.attn.qkv.weight"] == "excluded"
    assert why["model.blocks.1.attn.qkv.weight"] == ""
    assert choice.note == ""  # a forward pass has told the first and last
    sizes = [torch.Size(layer.shape).numel() for layer in choice.layers]
    assert sum(sizes) + choice.others == choice.total
    assert all(layer.flops for layer in choice.layers)


def test_several_processes_share_the_blocks_of_other_devices() -> None:
    alone = planned(settings=Settings(accelerator="gpu", device_memory="1GB", measure=False))
    shared = planned(
        settings=Settings(accelerator="gpu", device_memory="1GB", measure=False),
        devices=4,
        strategy="ddp",
        batch_size=32,
    )
    assert (alone.machine.device, alone.machine.processes) == ("cuda", 1)
    assert shared.machine.processes == 4
    assert shared.machine.device_bytes == 10**9 - shared.machine.model_bytes
    assert shared.pruning[0].memory.peak_bytes < alone.pruning[0].memory.peak_bytes
    assert shared.timeline.steps == 1437 // 4 // 32  # type: ignore[union-attr]
    unknown = planned(settings=Settings(accelerator="gpu", measure=False))
    assert unknown.machine.device_bytes is None
    assert any("--device_memory" in note for note in unknown.notes)


def test_little_memory_means_passes() -> None:
    def plan(**settings: str) -> RunPlan:
        pruner = CAP(block_size=64, num_gradients=64, damp=1e-5)
        return planned(pruning(pruner=pruner), settings=Settings(accelerator="gpu", measure=False, **settings))

    assert plan(device_memory="1GB").pruning[0].memory.passes == 1
    tight = plan(device_memory="2MB", host_memory="100kB").pruning[0].memory
    assert tight.passes > 1
    assert tight.limit is not None
    assert tight.peak_bytes <= tight.limit
    with pytest.raises(ConfigError, match="block_size: the pruning event needs"):
        plan(device_memory="700kB", host_memory="100kB")


def test_units_tell_what_their_goals_leave() -> None:
    pytest.importorskip("torch_pruning")
    plan = planned(pruning(pruner=CAPUnits(num_gradients=32), schedule={2: 0.5}, cost=Flops()))
    (pruner,) = plan.pruning
    assert pruner.counted == "flops"
    assert "FLOPs dense" in pruner.prices
    assert "at goal 0.5" in pruner.prices
    assert "heads" in plan.choices[0].units


def test_collections_of_events() -> None:
    plan = planned(pruning(num_recomputations=3))
    assert [(e.collections, e.cycle) for e in plan.pruning[0].events] == [(3, 2), (3, 2)]
    back = SparsitySteps({1: 0.75, 3: 0.5}, allow_decrease=True)
    own, grower = planned(pruning(schedule=back, pruner=Magnitude())).pruning
    assert [(e.epoch, e.collections) for e in own.events] == [(1, 1)]
    assert (grower.label, [e.epoch for e in grower.events]) == ("DropAndGrow", [3])
    lifted = SparsitySteps({1: 0.5, 3: 0.0}, allow_decrease=True)
    assert [e.collections for e in planned(pruning(schedule=lifted, pruner=Magnitude())).pruning[0].events] == [1, 0]
    every = RepeatedSchedule(0.5, frequency=2, end_epoch=4)
    assert len(planned(pruning(schedule=every, pruner=DropAndGrow(num_gradients=2))).pruning[0].events) == 3


def test_seconds_are_measured() -> None:
    plan = planned(settings=Settings())
    (pruner,) = plan.pruning
    assert pruner.seconds is not None
    assert set(pruner.seconds) == {"collect", "solve", "apply"}
    assert all(value > 0 for value in pruner.seconds.values())
    assert plan.seconds == pytest.approx(2 * sum(pruner.seconds.values()))
    assert planned().seconds is None


def test_a_run_without_pruning_has_a_timeline_alone() -> None:
    plan = plan_fit(configured(), small_model(), DigitsDataModule(batch_size=64), QUICK)
    assert plan.pruning == ()
    assert plan.timeline is not None
    assert any("no callback prunes" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("callback", "error", "told"),
    [
        ({"include": ["*.fc3.weight"]}, TargetError, "matches no parameter of the model. Near names"),
        ({"schedule": {9: 0.5}}, ScheduleError, "prunes at the start of epoch 9"),
        ({"save_sparsities": [0.6]}, ScheduleError, "not in the schedule"),
        ({"dirpath": "/proc/nowhere"}, ConfigError, "cannot be written to"),
    ],
)
def test_what_fit_refuses_is_refused(callback: dict[str, object], error: type[CAPError], told: str) -> None:
    with pytest.raises(error, match=told) as planning:
        planned(pruning(**callback))
    trainer = configured(pruning(**callback), enable_checkpointing=False, enable_model_summary=False)
    with pytest.raises(error) as running:
        trainer.fit(small_model(), datamodule=DigitsDataModule(batch_size=64))
    assert str(planning.value) == str(running.value)


def test_model_and_data_that_do_not_fit() -> None:
    trainer = configured(CAPPruningCallback({0: 0.5}, pruner=Magnitude()))
    model = small_model()
    model.model.head = nn.Linear(16, 7)
    with pytest.raises(ConfigError, match="DigitsDataModule"):
        plan_fit(trainer, model, DigitsDataModule(), QUICK)


def test_weights_are_not_to_be_sharded() -> None:
    with pytest.raises(UnsupportedError, match="strategy=FSDPStrategy: it shards"):
        refuse_sharding_by(FSDPStrategy)


@pytest.mark.parametrize("samples", [1, 4])
def test_memory_is_that_of_whole_batches(samples: int) -> None:
    """A few samples are tried, and the plan is of as many rows at once as the run computes."""
    pruner = CAP(block_size=16, num_gradients=64, samples_per_gradient=samples, damp=1e-5)
    small, large = (planned(pruning(pruner=pruner), batch_size=size).pruning[0].memory for size in (8, 64))
    rows = {1: (8, 64), 4: (1, 1)}[samples]
    assert (small.rows, large.rows) == rows
    assert (large.peak_bytes > small.peak_bytes) == (samples == 1)


def test_sparsities_that_are_found_later_are_told_as_the_highest() -> None:
    plan = planned(pruning(schedule=PQAdaptive(1, 3, max_sparsity=0.8), pruner=Magnitude()), settings=QUICK)
    assert [(event.epoch, event.goal) for event in plan.pruning[0].events] == [(1, 0.8), (2, 0.8), (3, 0.8)]
    assert {file.count for file in plan.files if file.name.startswith("sparsity=*")} == {3}
    assert any("those told are the highest" in note for note in plan.notes)
