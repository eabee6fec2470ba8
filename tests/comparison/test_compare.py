from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_cap import prune
from lightning_cap.comparison import LossSurface, compare
from lightning_cap.comparison.record_store import digest
from lightning_cap.comparison.records import GridPoint, SurfaceRecord, intersection_over_union, load_masks
from lightning_cap.errors import ConfigError, DataError, GradientError, PatternError, TargetError
from lightning_cap.export.records import ExportRecord
from lightning_cap.pruners import (
    CAPUnits,
    LayerwiseOBS,
    LayerwiseUnits,
    LRPUnits,
    Magnitude,
    MagnitudeUnits,
    Pruner,
    RandomUnits,
    TaylorUnits,
)
from lightning_cap.report import print_comparison, report
from lightning_cap.sparsity import Flops
from lightning_cap.sparsity.allocation import Global, PerTarget, Uniform
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.utilities.records import read_record, read_records
from tests.support.checkpoints import checkpoint
from tests.support.comparing import Data, assert_close, collections, comparable, paths, results, run, toy
from tests.support.distilling import STUDENT_TARGETS, Student
from tests.support.pruners import METHODS
from tests.support.toy import CLASSES, FEATURES, Toy, ToyData, cap, trainer


def test_gradients_are_collected_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = collections(monkeypatch)
    model = toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = run(tmp_path, module=model, seeds=(0, 1))
    assert counts == [48, 48]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(record.pruner, record.seed, record.goal) for record in records] == [
        ("unpruned", None, 0.0),
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
    net = toy()
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


def test_pruners_of_units_are_compared_with_the_others(tmp_path: Path) -> None:
    """All on the weights of the units, which are masked as a whole by those that take units."""
    pruners = {
        "CAPUnits": CAPUnits(num_gradients=32, num_inputs=32),
        "ZipLM": LayerwiseUnits(num_inputs=32),
        "Taylor": TaylorUnits(num_gradients=32),
        "LRP": LRPUnits(num_inputs=32),
        "magnitude": MagnitudeUnits(cost=Flops()),
        "random": RandomUnits(),
        "GM": Magnitude(),
    }
    records = run(tmp_path, pruners, [0.4])
    assert [record.pruner for record in records] == ["unpruned", *pruners]
    readers = {name: record.sparsities for name, record in zip(pruners, records[1:], strict=True)}
    assert len({tuple(sparsities) for sparsities in readers.values()}) == 1
    assert "net.4.bias" in readers["GM"]
    for record in records[1:]:
        masks = load_masks(tmp_path / record.masks)
        gone = ~masks["net.4.weight"].any(1)
        whole = torch.equal(~masks["net.6.weight"].any(0), gone) and torch.equal(~masks["net.4.bias"], gone)
        assert whole == (record.pruner != "GM")
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        assert zeros == 230 if record.pruner == "GM" else zeros > 100  # of 576; FLOPs are more in the first layers

    by_name = {record.pruner: record for record in records}
    counted = {name: by_name[name].counted for name in ("CAPUnits", "magnitude", "GM")}
    assert counted == {"CAPUnits": "parameters", "magnitude": "flops", "GM": "sparsity"}
    assert by_name["GM"].saving is None
    assert by_name["GM"].masks == "masks/GM-seed=0-sparsity=0.40.safetensors"
    assert by_name["magnitude"].masks == "masks/magnitude-seed=0-flops=0.40.safetensors"


def test_what_goals_count_names_the_files_and_is_kept_in_the_record(tmp_path: Path) -> None:
    pruner = MagnitudeUnits(cost=Flops())
    (dense, half) = run(tmp_path, pruner, [0.4])
    assert dense.saving is None
    assert half.weights == "flops=0.40.safetensors"
    assert half.masks == "masks/MagnitudeUnits-seed=0-flops=0.40.safetensors"
    assert [r.path for r in read_records(tmp_path / "exports.jsonl", ExportRecord)] == ["flops=0.40.safetensors"]
    net = toy()
    net.net.load_state_dict(load_file(tmp_path / half.weights))
    first, second = (int(net.net[i].weight.any(1).sum()) for i in (0, 4))
    assert half.saving is not None
    assert half.saving.price == 2 * (FEATURES * first + first * second + second * CLASSES)
    whole = 2 * (FEATURES * 16 + 16 * 16 + 16 * CLASSES)
    assert half.saving.share == half.reached == pytest.approx(1 - half.saving.price / whole)
    assert 0.4 <= half.reached < 0.45
    assert half.sparsity != half.reached
    assert results(tmp_path) == [dense, half]
    (_, other) = run(tmp_path, MagnitudeUnits(), [0.4])  # another cost of the same pruner takes its place
    assert other.weights == "parameters=0.40.safetensors"
    assert [path.name for path in (tmp_path / "masks").iterdir()] == [Path(other.masks).name]


def test_the_calibration_loss_is_of_the_first_samples(tmp_path: Path) -> None:
    class Still(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(ToyData(48, noise=0.0), batch_size=16)

    model = toy()
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


def test_grids_change_one_setting_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = collections(monkeypatch)
    grids = {"damp": [1e-4, 1e-2], "num_gradients": [32, 64], "block_size": [8], "num_recomputations": [1, 2]}
    records = run(tmp_path, {"CAP": cap(), "GM": Magnitude()}, [0.75], grids=grids, loss_samples=0)
    by_label = {record.label: record for record in records}
    assert list(by_label) == [
        "unpruned", "CAP", "GM", "CAP damp=0.01", "CAP num_gradients=32", "CAP num_gradients=64", "CAP block_size=8",
        "CAP num_recomputations=2", "GM num_recomputations=2",
    ]  # fmt: skip
    assert sorted(counts) == [48, 64]  # one for all, and one at the model after the first of two steps
    assert by_label["CAP num_gradients=32"].parameters["num_gradients"] == 32
    assert by_label["CAP num_gradients=32"].parameters["damp"] == 1e-4
    assert by_label["CAP num_gradients=32"].grid == GridPoint("num_gradients", 32)
    assert len({record.solution for record in records if record.pruner == "CAP"}) == 6
    assert by_label["CAP damp=0.01"].loss_increase["calibration"] is None
    net = toy().net
    steps = [(0.5, 0), (0.75, 1)]
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


FLOOR, MAP = Magnitude(allocation=Global(0.3)), Magnitude(allocation=PerTarget({"*": 0.5}))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ConfigError, r"pruners=\{\}", {"pruners": {"": None}}),
        (ConfigError, r"pruners\['CAP'\]='CAP': give a Pruner", {"pruners": {"CAP": "CAP"}}),
        (ConfigError, "files would be those of 'C AP'", {"pruners": {"C AP": cap(), "c-ap": cap()}}),
        (ConfigError, "cannot be used", {"pruners": {"masks": cap()}}),
        (ConfigError, r"sparsities=\[\]", {"sparsities": []}),
        (ConfigError, r"sparsities=\[0.5, 0.5\]", {"sparsities": [0.5, 0.5]}),
        (PatternError, "sparsities=1.0", {"sparsities": [0.5, 1.0]}),
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
        (ConfigError, "folder=None", {"folder": None, "surface": LossSurface(("CAP", "GM"), 0.5)}),
        (ConfigError, "fisher_block=16: none", {"pruners": {"GM": Magnitude()}, "fisher_block": 16}),
        (ConfigError, "fisher_block=300: give a whole number from 1 to 256", {"fisher_block": 300}),
        (ConfigError, "loss_samples=-1", {"loss_samples": -1}),
        (DataError, "ckpt_path='none.ckpt': it cannot be read", {"ckpt_path": "none.ckpt"}),
        (ConfigError, "ckpt_path='best'", {"ckpt_path": "best"}),
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
        compare(trainer(tmp_path), toy(), datamodule=Data(), **given)
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


def test_no_validation_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit_val_batches=0"):
        compare(trainer(tmp_path, limit_val_batches=0), toy(), Magnitude(), [0.5], datamodule=Data())


@pytest.mark.slow
def test_two_processes_give_the_records_of_one(tmp_path: Path) -> None:
    pruners = {"CAP": cap(), "few": cap(num_gradients=20), "GM": Magnitude()}
    surface = LossSurface(("CAP", "GM"), 0.75, points=3)

    def on(devices: int, **given: Any) -> Any:
        t = trainer(tmp_path, devices=devices, strategy="ddp_spawn" if devices > 1 else "auto")
        return compare(t, toy(), pruners, [0.5, 0.75], (0, 1), Data(), folder=tmp_path / str(devices), max_rows_memory=1,
                       surface=surface, fisher_block=16, save_weights=True, **given)  # fmt: skip

    found, other_losses = [], []
    for devices in (1, 2):
        records = on(devices, loss_samples=32, grids={"num_recomputations": [2]})
        assert records == results(tmp_path / str(devices))
        assert not (tmp_path / str(devices) / ".work").exists()
        found.append(records)
        again = on(devices, loss_samples=16)  # fewer records, and another loss of them
        assert [r.seconds for r in again] == [r.seconds for r in records if r.grid is None]  # nothing is solved again
        assert len(results(tmp_path / str(devices))) == len(records)
        other_losses.append([r.loss_increase["calibration"] for r in again[1:]])
        assert other_losses[-1] != [r.loss_increase["calibration"] for r in records[1:] if r.grid is None]
    assert other_losses[1] == pytest.approx(other_losses[0], rel=1e-3)
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
        compare(trainer(tmp_path, devices=2, strategy="ddp_spawn"), toy(), Magnitude(), [0.5], datamodule=Data())


def test_a_model_that_starts_sparse_is_not_called_dense(tmp_path: Path) -> None:
    model = toy()
    prune(model.net, [], lambda m, b: torch.zeros(()), 0.4, Magnitude(), progress=False)
    (start, *_) = run(tmp_path, {"GM": Magnitude()}, module=model)
    assert (start.pruner, start.label) == ("unpruned", "start (39.8 % sparse)")


def test_names_may_look_like_markup(tmp_path: Path) -> None:
    pruners = {"[/red]": Magnitude(), "_$x$": Magnitude(), "n" * 80: cap()}
    bar = RichProgressBar()
    run_trainer = trainer(tmp_path, bar, enable_progress_bar=True)
    long = PerTarget({f"net.[{'4' * 300}].weight": 0.5})
    records = compare(run_trainer, toy(), pruners, [0.5], datamodule=Data(), folder=tmp_path, grids={"allocation": [long]},
                      loss_samples=16)  # fmt: skip
    print_comparison(records)
    assert {"accuracy.png", "grid-allocation.png"} <= set(report(records, tmp_path))
    assert all((tmp_path / record.masks).is_file() for record in records[1:])
    assert max(len(file.name) for file in (tmp_path / "masks").iterdir()) < 240


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = paths(monkeypatch)
    torch.save(checkpoint(), tmp_path / "other.ckpt")
    with pytest.raises(DataError, match=r"^ckpt_path=.*another model.*\"net.0.weight\"") as caught:
        run(tmp_path / "out", ckpt_path=tmp_path / "other.ckpt")
    assert "\n" not in str(caught.value)
    assert solved == []
    assert not (tmp_path / "out").exists()


def test_what_is_no_plain_value_can_be_a_grid(tmp_path: Path) -> None:
    records = run(tmp_path, {"GM": Magnitude()}, [0.5], grids={"allocation": [Uniform()]})
    assert results(tmp_path) == records
    assert records[2].grid == GridPoint("allocation", str(Uniform()))
    assert "grid-allocation.png" in report(records, tmp_path)


def test_a_student_is_compared_without_its_teacher(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        records = run(None, {"GM": Magnitude()}, [0.5], module=Student(scheduler=False))
    assert list(records[1].sparsities) == STUDENT_TARGETS
    assert "Pruning 1 target, " in caplog.text
