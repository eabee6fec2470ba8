from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_cap import prune
from lightning_cap.comparison import LossSurface, compare, runner
from lightning_cap.comparison.records import (
    ComparisonRecord,
    GridPoint,
    SurfaceRecord,
    intersection_over_union,
    load_masks,
    save_masks,
)
from lightning_cap.comparison.results import digest
from lightning_cap.comparison.variants import make_variants
from lightning_cap.errors import ConfigError, DataError, GradientError, PatternError, TargetError
from lightning_cap.export.records import ExportRecord
from lightning_cap.pruners import LayerwiseOBS, Magnitude, Pruner
from lightning_cap.report import report
from lightning_cap.sparsity.allocation import Global, PerTarget, Uniform
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.utilities.records import read_record, read_records
from tests.support import ROOT
from tests.support.pruners import METHODS
from tests.support.toy import Toy, ToyData, cap, trainer


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(ToyData(), batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(ToyData(32, noise=0.0), batch_size=16)


def module() -> Toy:
    pl.seed_everything(0, verbose=False)
    return Toy(scheduler=False)


def run(folder: Path | None, pruners: Any = None, sparsities: Sequence[float] = (0.5, 0.75), **kwargs: Any) -> Any:
    pruners = pruners or {"CAP": cap(), "few": cap(num_gradients=20), "GM": Magnitude()}
    t = trainer(folder or ".")
    records = compare(t, kwargs.pop("module", None) or module(), pruners, sparsities, datamodule=Data(), folder=folder,
                   **{"loss_samples": 32, **kwargs})  # fmt: skip
    assert not any("Compare" in type(callback).__name__ for callback in t.callbacks)  # type: ignore[attr-defined]
    return records


def collections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of gradients at every collection."""
    from lightning_cap.calibration.gradients import GradientCollector

    counts: list[int] = []
    read = GradientCollector.__iter__
    monkeypatch.setattr(GradientCollector, "__iter__", lambda self: counts.append(self._num_gradients) or read(self))
    return counts


def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the label at every solution."""
    labels: list[str] = []
    for name in ("_from_one_path", "_in_steps"):
        real = getattr(runner.ComparisonRunner, name)
        monkeypatch.setattr(
            runner.ComparisonRunner,
            name,
            lambda self, v, *a, real=real: labels.append(f"{v.label}/{v.seed}") or real(self, v, *a),
        )
    return labels


def results(folder: Path) -> list[ComparisonRecord]:
    return read_records(folder / "results.jsonl", ComparisonRecord)


def comparable(records: Any) -> Any:
    return [replace(record, seconds={}) for record in records]


def test_gradients_are_collected_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = collections(monkeypatch)
    model = module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = run(tmp_path, module=model, seeds=(0, 1))
    assert counts == [48, 48]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(record.pruner, record.seed, record.goal) for record in records] == [
        ("dense", None, 0.0),
        *((name, seed, s) for name in ("CAP", "few", "GM") for seed in (0, 1) for s in (0.5, 0.75)),
    ]
    assert results(tmp_path) == records
    assert not (tmp_path / ".work").exists()
    alone = run(None, {"CAP": cap()})  # streams its own gradients
    assert counts == [48, 48, 48]
    for one, other in zip(alone, records, strict=False):
        assert one.solution == other.solution
        assert one.predicted_loss == other.predicted_loss
        assert one.metrics == other.metrics


def test_records_are_those_of_prune_and_of_the_trainers_own_validation(tmp_path: Path) -> None:
    (dense, half, more) = run(tmp_path, Magnitude(), [0.75, 0.5])
    net = module()
    (logged,) = trainer(tmp_path).validate(net, datamodule=Data(), verbose=False)
    assert dense.metrics == pytest.approx(logged)
    prune(net.net, [], lambda m, b: torch.zeros(()), 0.5, Magnitude(), progress=False)
    (pruned,) = trainer(tmp_path).validate(net, datamodule=Data(), verbose=False)
    assert half.metrics == pytest.approx(pruned)
    assert half.loss_increase["validation"] == pytest.approx(pruned["val_loss"] - logged["val_loss"], abs=1e-6)
    assert half.loss_increase["calibration"] is None  # nothing reads the training data
    assert half.sparsities == {"net.4.weight": 0.5}
    assert torch.equal(load_file(tmp_path / half.weights)["4.weight"], net.net[4].weight)
    assert more.weights == "sparsity=0.75.safetensors"
    assert torch.equal(load_masks(tmp_path / half.masks)["net.4.weight"], net.net[4].weight != 0)


def test_the_calibration_loss_is_of_the_first_samples(tmp_path: Path) -> None:
    class Still(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(ToyData(48, noise=0.0), batch_size=16)

    model = module()
    records = compare(trainer(tmp_path), model, cap(num_gradients=16), [0.75], datamodule=Still(), loss_samples=48,
                   folder=tmp_path)  # fmt: skip
    data = ToyData(48, noise=0.0)
    model.eval()

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(model(data.x), data.y).detach())

    dense = loss()
    model.net.load_state_dict(load_file(tmp_path / records[1].weights))
    assert records[1].loss_increase["calibration"] == pytest.approx(loss() - dense, rel=1e-3)


def test_the_records_do_not_depend_on_where_gradients_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, memory in (("memory", None), ("file", 1)):
        (tmp_path / name).mkdir()
        found.append(comparable(run(tmp_path / name, max_rows_memory=memory)))
    assert found[0] == found[1]
    counts = collections(monkeypatch)
    again = comparable(run(None, max_rows_memory=1))  # room for neither: every pruner collects its own
    assert counts == [48, 20]
    assert_close(again, found[0])


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = comparable(run(tmp_path / "whole", max_rows_memory=1))
    evaluate, left = runner.Measure.metrics, [5]

    def failing(self: Any, solution: str) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return evaluate(self, solution)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Measure, "metrics", failing)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "part", max_rows_memory=1)
    assert len(results(tmp_path / "part")) == 5
    assert list(tmp_path.glob("part/.work/*/*.bin"))  # the gradient rows wait for the next run
    counts, solved = collections(monkeypatch), paths(monkeypatch)
    assert comparable(run(tmp_path / "part", max_rows_memory=1)) == whole
    assert counts == []
    assert solved == ["few/0"]
    assert not (tmp_path / "part/.work").exists()


def test_only_what_changed_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    solved = paths(monkeypatch)
    assert run(tmp_path) == first
    assert solved == []
    changed = run(tmp_path, {"CAP": cap(), "few": cap(num_gradients=24), "GM": Magnitude()}, [0.5, 0.75, 0.9])
    assert solved == ["GM/0", "CAP/0", "few/0"]  # 0.9 is new for all
    old = {record.fingerprint for record in first}
    assert [(record.pruner, record.goal) for record in changed if record.fingerprint not in old] == [
        ("CAP", 0.9), ("few", 0.5), ("few", 0.75), ("few", 0.9), ("GM", 0.9),
    ]  # fmt: skip
    solved.clear()
    (tmp_path / changed[1].masks).unlink()
    run(tmp_path, {"CAP": cap(), "few": cap(num_gradients=24), "GM": Magnitude()}, [0.5, 0.75, 0.9])
    assert solved == ["CAP/0"]
    solved.clear()
    other = module()
    with torch.no_grad():
        other.net[6].bias.add_(1e-3)
    run(tmp_path, module=other)
    assert len(solved) == 3  # another model: nothing can be kept
    (tmp_path / "results.jsonl").write_text('{"record": "compar')
    solved.clear()
    run(tmp_path)
    assert len(solved) == 3


@pytest.mark.parametrize("text", ["5\n", "null\n", "[{\n", '{"record": "event", "version": 1}\n'])
@pytest.mark.parametrize("name", ["results.jsonl", "exports.jsonl"])
def test_foreign_files_are_refused_before_anything_runs(
    tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = paths(monkeypatch)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}, line 1: "):
        run(tmp_path, Magnitude())
    assert solved == []
    assert (tmp_path / name).read_text() == text


def test_weights_are_exported_with_a_record(tmp_path: Path) -> None:
    records = run(tmp_path, {"GM": Magnitude()}, save_weights=True)
    exports = read_records(tmp_path / "GM" / "exports.jsonl", ExportRecord)
    assert [f"GM/{export.path}" for export in exports] == [record.weights for record in records[1:]]
    assert [(export.goal, export.sparsity, export.format) for export in exports] == [
        (0.5, 0.5, "safetensors"), (0.75, 0.75, "safetensors"),
    ]  # fmt: skip
    (tmp_path / records[1].masks).unlink()
    run(tmp_path, {"GM": Magnitude()}, save_weights=True)  # writes the one again: a record per file
    again = read_records(tmp_path / "GM" / "exports.jsonl", ExportRecord)
    assert again == exports[::-1]


def test_what_is_no_plain_value_can_be_a_grid(tmp_path: Path) -> None:
    records = run(tmp_path, {"GM": Magnitude()}, [0.5], grids={"allocation": [Uniform()]})
    assert results(tmp_path) == records
    assert records[2].grid == GridPoint("allocation", str(Uniform()))
    assert "grid-allocation.png" in report(records, tmp_path)


def assert_close(records: Any, others: Any) -> None:
    for one, other in zip(records, others, strict=True):
        assert (one.label, one.seed, one.sparsity) == (other.label, other.seed, other.sparsity)
        assert one.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-4)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4)


KILLED = """
import sys
from pathlib import Path
from tests.comparison.test_compare import run
run(Path(sys.argv[1]), sparsities=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8], seeds=range(40))
"""


def test_a_kill_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "results.jsonl").is_file() and len(results(tmp_path)) > 8):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = results(tmp_path)
    solved = paths(monkeypatch)
    records = run(tmp_path, sparsities=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8], seeds=(0,))
    mine = [record for record in kept if record.seed in (None, 0)]
    assert [record for record in records if record in mine] == mine  # kept to the last digit
    assert len(mine) > 1
    assert len(solved) < 3
    assert_close(records, run(None, sparsities=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8]))


def test_grids_change_one_setting_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = collections(monkeypatch)
    grids = {"damp": [1e-4, 1e-2], "num_gradients": [32, 64], "block_size": [8], "num_recomputations": [1, 2]}
    records = run(tmp_path, {"CAP": cap(), "GM": Magnitude()}, [0.75], grids=grids, loss_samples=0)
    by_label = {record.label: record for record in records}
    assert list(by_label) == [
        "dense", "CAP", "GM", "CAP damp=0.01", "CAP num_gradients=32", "CAP num_gradients=64", "CAP block_size=8",
        "CAP num_recomputations=2", "GM num_recomputations=2",
    ]  # fmt: skip
    assert sorted(counts) == [48, 64]  # one for all, and one at the model after the first of two steps
    assert by_label["CAP num_gradients=32"].parameters["num_gradients"] == 32
    assert by_label["CAP num_gradients=32"].parameters["damp"] == 1e-4
    assert by_label["CAP num_gradients=32"].grid == GridPoint("num_gradients", 32)
    assert len({record.solution for record in records if record.pruner == "CAP"}) == 6
    assert by_label["CAP damp=0.01"].loss_increase["calibration"] is None
    net = module().net
    steps = [(0.375, 0), (0.75, 1)]
    want = None
    for sparsity, _ in steps:
        want = prune(net, [], lambda m, b: torch.zeros(()), sparsity, Magnitude(), progress=False)
    assert want is not None
    assert by_label["GM num_recomputations=2"].solution == digest({"net.4.weight": want.weights["4.weight"]})


def test_all_pruners_share_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = collections(monkeypatch)
    few = {"block_size": 16, "num_gradients": 32, "num_inputs": 32, "damp": 1e-8, "seed": 0}
    pruners = {name: case.pruner(**few) for name, case in METHODS.items()}
    pruners |= {"more": cap(), "2:4": cap(pattern=NofM(2, 4))}
    records = run(tmp_path, pruners, [0.5], seeds=(0, 1), grids={"num_gradients": [16], "damp": [0.5]})
    assert counts == [48, 48]
    assert all(record.sparsity == 0.5 for record in records[1:])
    solutions = {name: [record.solution for record in records if record.label == name] for name in pruners}
    unseeded = [name for name, case in METHODS.items() if case.reads == "nothing" and not case.takes("seed")]
    assert [name for name, (one, other) in solutions.items() if one == other] == unseeded
    assert len({one for one, _ in solutions.values()}) == len(pruners)
    changed = {record.label for record in records if record.grid is not None and record.seed == 0}
    settings = [(name, case, text) for name, case in METHODS.items() for text in ("num_gradients=16", "damp=0.5")]
    own = {f"{name} {text}" for name, case, text in settings if case.takes(text.partition("=")[0])}
    assert own <= changed
    assert changed - own == {f"{name} {text}" for name in ("more", "2:4") for text in ("num_gradients=16", "damp=0.5")}


class Lots(Pruner):
    """Draws from the global generators, and by a seed of its own."""

    def __init__(self, seed: int = 3) -> None:
        self.seed = seed

    def path(self, targets: Any, gradients: Any, masks: Any = None, *, progress: Any = None) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        lots = {name: torch.rand(w.shape) + torch.rand(w.shape, generator=generator) for name, w in targets.items()}
        before = targets.copies()
        targets.restore(lots)
        path = Magnitude().path(targets, (), masks)
        targets.restore(before)
        return path


def test_each_seed_draws_other_lots_and_the_same_again() -> None:
    records = run(None, {"lots": Lots()}, [0.5], seeds=(0, 1))
    again = run(None, {"lots": Lots()}, [0.5], seeds=(1, 0))
    assert records[1].solution != records[2].solution
    assert {record.solution for record in records} == {record.solution for record in again}
    assert records[2].parameters["seed"] == 4


def test_the_corners_of_the_surface_are_the_three_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surface = LossSurface(("CAP", "GM"), 0.75, points=2, margin=0.0)
    records = run(tmp_path, surface=surface, fisher_block=16)
    found = read_record(tmp_path / "surface.json", SurfaceRecord)
    losses = {record.pruner: record.metrics["val_loss"] for record in records if record.goal in (0.0, 0.75)}
    assert found.axis == (0.0, 1.0)
    assert found.loss[0] == pytest.approx([losses["dense"], losses["CAP"]], rel=1e-5)
    assert found.loss[1][0] == pytest.approx(losses["GM"], rel=1e-5)
    assert found.corners == pytest.approx({name: losses[name] for name in ("dense", "CAP", "GM")}, rel=1e-5)
    block = load_file(tmp_path / "fisher_block.safetensors")["all"]
    assert block.shape == (16, 16)
    assert torch.equal(block, block.T)
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in ("surface.json", "fisher_block.safetensors")}
    solved = paths(monkeypatch)
    run(tmp_path, surface=surface, fisher_block=16)
    assert solved == []
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in stamps}
    run(tmp_path, surface=LossSurface(("CAP", "GM"), 0.75, points=3, batches=1), fisher_block=8)
    assert solved == ["GM/0", "CAP/0"]  # their weights were not kept
    assert len(read_record(tmp_path / "surface.json", SurfaceRecord).axis) == 3
    (tmp_path / "surface.json").write_text("5")
    run(tmp_path, surface=LossSurface(("CAP", "GM"), 0.75, points=2), fisher_block=8)
    assert len(read_record(tmp_path / "surface.json", SurfaceRecord).axis) == 2  # what is none is made anew
    assert load_file(tmp_path / "fisher_block.safetensors")["all"].shape == (8, 8)


def test_intersection_over_union_by_hand(tmp_path: Path) -> None:
    one = {"a": torch.tensor([1, 1, 0, 0]).bool(), "b": torch.tensor([[1], [0]]).bool()}
    two = {"a": torch.tensor([1, 0, 1, 0]).bool(), "b": torch.tensor([[1], [0]]).bool()}
    assert intersection_over_union(one, two) == 2 / 4
    assert intersection_over_union(one, one) == 1.0
    save_masks(tmp_path / "m.safetensors", one)
    assert all(torch.equal(mask, one[name]) for name, mask in load_masks(tmp_path / "m.safetensors").items())


FLOOR, MAP = Magnitude(allocation=Global(0.3)), Magnitude(allocation=PerTarget({"*": 0.5}))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ConfigError, r"pruners=\{\}", {"pruners": {"": None}}),
        (ConfigError, "not a Pruner", {"pruners": {"CAP": "CAP"}}),
        (ConfigError, "files would be those of 'C AP'", {"pruners": {"C AP": cap(), "c-ap": cap()}}),
        (ConfigError, "cannot be used", {"pruners": {"masks": cap()}}),
        (ConfigError, r"sparsities=\[\]", {"sparsities": []}),
        (ConfigError, r"sparsities=\[0.5, 0.5\]", {"sparsities": [0.5, 0.5]}),
        (PatternError, "pruner 'CAP'", {"sparsities": [0.5, 1.0]}),
        (PatternError, "pruner 'nm'", {"pruners": {"nm": cap(pattern=NofM(2, 4))}, "sparsities": [0.75]}),
        (ConfigError, r"seeds=\[\]", {"seeds": []}),
        (ConfigError, r"seeds=\[-1\]", {"seeds": [-1]}),
        (ConfigError, "has a setting 'dam'", {"grids": {"dam": [1.0]}}),
        (ConfigError, r"damp=\[\]", {"grids": {"damp": []}}),
        (ConfigError, "block_size=0", {"grids": {"block_size": [0]}}),
        (ConfigError, "two would be called 'CAP damp=2", {"pruners": {"CAP": cap(), "CAP damp=2": cap()},
                                                          "grids": {"damp": [2.0]}}),
        (ConfigError, "num_recomputations=0", {"num_recomputations": 0}),
        (ConfigError, r"num_recomputations=2: NofM", {"pruners": {"nm": cap(pattern=NofM(2, 4))}, "sparsities": [0.5],
                                                    "num_recomputations": 2}),
        (ConfigError, "surface.pruners", {"surface": LossSurface(("CAP", "WF"), 0.5)}),
        (ConfigError, "surface.sparsity=0.6", {"surface": LossSurface(("CAP", "GM"), 0.6)}),
        (ConfigError, "points=1", {"surface": LossSurface(("CAP", "GM"), 0.5, points=1)}),
        (ConfigError, "folder=None", {"folder": None, "surface": LossSurface(("CAP", "GM"), 0.5)}),
        (ConfigError, "fisher_block=16: none", {"pruners": {"GM": Magnitude()}, "fisher_block": 16}),
        (ConfigError, "loss_samples=-1", {"loss_samples": -1}),
        (ConfigError, "max_rows_memory='x'", {"max_rows_memory": "x"}),
        (TargetError, "pruner 'nm': target 'net.0.weight'", {"include": ["net.0.weight"], "sparsities": [0.6],
                                                             "pruners": {"nm": cap(block_size=15, pattern=NofM(2, 5))}}),
        (ConfigError, "pruner 'floor': sparsity=0.9: min_density=0.3", {"pruners": {"floor": FLOOR},
                                                          "sparsities": [0.5, 0.9]}),
        (ConfigError, "pruner 'map': sparsity=.*: sparsities: the named", {"pruners": {"map": MAP},
                                                              "sparsities": [0.5, 0.6]}),
        (ConfigError, "pruner 'map': sparsity=.*: sparsities: the named", {"pruners": {"map": MAP},
                                                              "num_recomputations": 2}),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, error: type[Exception], message: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved, counts = paths(monkeypatch), collections(monkeypatch)
    given = {"pruners": {"CAP": cap(), "GM": Magnitude()}, "sparsities": [0.5], "folder": tmp_path, **change}
    given["pruners"] = {name: pruner for name, pruner in given["pruners"].items() if name}
    with pytest.raises(error, match=message):
        compare(trainer(tmp_path), module(), datamodule=Data(), **given)
    assert solved == counts == list(tmp_path.rglob("*.json*"))


class Attention(Toy):
    """Has a weight that is used without its layer being called."""

    def __init__(self) -> None:
        super().__init__(scheduler=False)
        self.attention = torch.nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unsqueeze(1)
        return self.net(self.attention(x, x, x, need_weights=False)[0].squeeze(1))  # type: ignore[no-any-return]


class Lossless(Toy):
    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.zeros(())


@pytest.mark.parametrize(
    ("error", "message", "model", "pruner"),
    [
        (
            TargetError,
            "pruner 'two': .*attention.out_proj.weight",
            Attention,
            LayerwiseOBS(block_size=16, num_inputs=32),
        ),
        (GradientError, "pruner 'two': loss: it has no gradient", Lossless, cap()),
    ],
)
def test_sources_are_rehearsed_before_anything_runs(
    tmp_path: Path, error: type[Exception], message: str, model: type[Toy], pruner: Pruner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    solved = paths(monkeypatch)
    include = ["attention.out_proj.weight", "net.4.weight"] if model is Attention else None
    with pytest.raises(error, match=message):
        run(tmp_path, {"GM": Magnitude(), "two": pruner}, module=model(), include=include)
    assert solved == list(tmp_path.rglob("*.json*"))


def test_a_pruner_of_the_users_own_needs_no_more_than_the_interface(tmp_path: Path) -> None:
    class Halved(Magnitude):
        """Keeps its argument under another name, so it is copied for a grid."""

        def __init__(self, strength: float = 1.0) -> None:
            super().__init__()
            self.power = strength

    records = run(None, {"mine": Halved()}, [0.5], grids={"power": [2.0]})
    assert [record.parameters.get("power") for record in records[1:]] == [1.0, 2.0]


def test_modules_may_keep_more_than_tensors_in_their_state(tmp_path: Path) -> None:
    class Extra(Toy):
        def get_extra_state(self) -> Any:
            return {"note": "mine"}

        def set_extra_state(self, state: Any) -> None:
            pass

    assert len(run(tmp_path, Magnitude(), [0.5], module=Extra())) == 2


def test_labels_tell_values_apart() -> None:
    variants = make_variants({"CAP": cap()}, [0], {"damp": [0.1, 0.1000001, 1e-8], "block_size": [8]}, 1)
    assert [v.label for v in variants] == [
        "CAP", "CAP damp=0.1", "CAP damp=0.1000001", "CAP damp=1e-08", "CAP block_size=8",
    ]  # fmt: skip
    assert len({v.slug for v in variants}) == 5


def test_no_validation_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit_val_batches=0"):
        compare(trainer(tmp_path, limit_val_batches=0), module(), Magnitude(), [0.5], datamodule=Data())


@pytest.mark.slow
def test_two_processes_give_the_records_of_one(tmp_path: Path) -> None:
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        t = trainer(tmp_path, devices=devices, strategy="ddp_spawn" if devices > 1 else "auto")
        pruners = {"CAP": cap(), "few": cap(num_gradients=20), "GM": Magnitude()}
        surface = LossSurface(("CAP", "GM"), 0.75, points=3)
        records = compare(t, module(), pruners, [0.5, 0.75], (0, 1), Data(), folder=folder, max_rows_memory=1, surface=surface,
                       fisher_block=16, loss_samples=32, grids={"num_recomputations": [2]}, save_weights=True)  # fmt: skip
        assert records == results(folder)
        assert not (folder / ".work").exists()
        found.append(records)
    assert_close(*found)
    one, two = (tmp_path / str(devices) for devices in (1, 2))
    for record in found[0][1:]:
        assert intersection_over_union(load_masks(one / record.masks), load_masks(two / record.masks)) == 1.0
    surfaces = [read_record(folder / "surface.json", SurfaceRecord).loss for folder in (one, two)]
    torch.testing.assert_close(*map(torch.tensor, surfaces), rtol=1e-4, atol=1e-6)
    blocks = [load_file(folder / "fisher_block.safetensors")["all"] for folder in (one, two)]
    torch.testing.assert_close(*blocks)


def test_spawned_processes_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"folder=None.*spawn"):
        compare(trainer(tmp_path, devices=2, strategy="ddp_spawn"), module(), Magnitude(), [0.5], datamodule=Data())
