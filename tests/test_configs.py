from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_cap import CAPPruningCallback, CosineLR, CyclicLinearLR
from lightning_cap.cli import CAPCLI, CAPTrainer, main
from lightning_cap.cli.bases import read_settings, setting_names
from lightning_cap.pruners import CAP
from lightning_cap.schedules import AlternatingSchedule
from lightning_cap.sparsity.patterns import NofM
from tests.support import ROOT
from tests.support.configs import whole

CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")])
ONESHOT = [path for path in CONFIGS if "sparsities" in setting_names(path)]
FIT = [path for path in CONFIGS if path not in ONESHOT]
NO_DOWNLOAD = ["--model.pretrained=false", "--model.checkpoint=null"]


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns if it is given arguments while the process has some of its own, as pytest has."""
    monkeypatch.setattr("sys.argv", ["lightning-cap"])


def _instantiated(path: Path, *arguments: str) -> CAPCLI:
    config = whole(path)
    if "VisionClassifier" in config["model"]["class_path"]:
        arguments = (*NO_DOWNLOAD, *arguments)
    return CAPCLI(trainer_class=CAPTrainer, run=False, args=[f"--config={path}", *arguments], save_config_callback=None)


def _callback(cli: CAPCLI) -> CAPPruningCallback | None:
    return next((c for c in cli.trainer.callbacks if isinstance(c, CAPPruningCallback)), None)  # type: ignore[attr-defined]


def _some_slow(paths: list[Path]) -> list[Any]:
    """The files for ImageNet are much alike: most of them wait for the slow tests."""
    quick = {"imagenet_deit_tiny_gradual", "imagenet_deit_small_nm_oneshot"}
    slow = [path.stem.startswith("imagenet_") and path.stem not in quick for path in paths]
    return [pytest.param(p, marks=[pytest.mark.slow] if s else [], id=p.stem) for p, s in zip(paths, slow, strict=True)]


@pytest.mark.parametrize("path", _some_slow(CONFIGS))
def test_print_config(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "oneshot" if path in ONESHOT else "fit"
    with pytest.raises(SystemExit) as end:
        main([command, f"--config={path}", "--print_config"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "Unable to serialize" not in told
    printed = yaml.safe_load(told)
    given = whole(path)
    assert given.keys() <= printed.keys()
    assert printed["data"]["class_path"] == given["data"]["class_path"]


@pytest.mark.parametrize("path", _some_slow(FIT))
def test_classes_can_be_made_and_the_schedule_fits(path: Path, tmp_path: Path) -> None:
    cli = _instantiated(path, f"--trainer.default_root_dir={tmp_path}")
    callback = _callback(cli)
    if callback is None:
        return
    events = callback.schedule.events(cli.trainer.max_epochs)
    for sparsity in events.values():
        callback.pruner.check_sparsity(sparsity)
    assert set(callback.save_sparsities or ()) <= set(events.values())


@pytest.mark.parametrize("name", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
def test_imagenet_recipes_are_the_papers(name: str) -> None:
    """Tables 5 and 6, section 4.2 and appendix I."""
    cli = _instantiated(ROOT / "configs" / f"imagenet_deit_{name}_gradual.yaml", "--data.root=/data/imagenet")
    callback, pruner = _callback(cli), _callback(cli).pruner  # type: ignore[union-attr]
    assert callback is not None
    assert isinstance(pruner, CAP)
    assert (pruner.block_size, pruner.num_gradients, pruner.damp, pruner.ranking) == (192, 4096, 1e-8, "cumulative")
    events = callback.schedule.events(cli.trainer.max_epochs)
    assert cli.trainer.max_epochs == 300
    assert list(events) == list(range(0, 300, 20))
    assert (events[0], events[280]) == (0.4, 0.9)
    assert callback.save_sparsities == [0.5, 0.6, 0.75, 0.8, 0.9]
    assert cli.datamodule.batch_size * cli.trainer.num_devices == 1024
    assert cli.datamodule.root == "/data/imagenet"
    assert cli.datamodule.recipe.name == {"tiny": "light1", "small": "deit"}[name]
    assert cli.model.weight_decay == {"tiny": 0.03, "small": 0.05}[name]
    assert cli.model.gradient_clip == {"tiny": 1.0, "small": None}[name]
    assert _rates(cli) == (5e-4, CyclicLinearLR, 1e-5)


def _rates(cli: CAPCLI) -> tuple[float, type, float]:
    """Largest learning rate, scheduler, smallest learning rate."""
    optimization: Any = cli.model.configure_optimizers()
    scheduler = optimization["lr_scheduler"]["scheduler"]
    [largest] = {group["initial_lr"] for group in optimization["optimizer"].param_groups}
    return largest, type(scheduler), scheduler.min_lr


@pytest.mark.parametrize(
    ("name", "epochs", "rates"),
    [
        ("deit_tiny_finetuning", 100, (5e-5, CosineLR, 1e-5)),
        pytest.param("deit_small_oneshot_finetuning", 20, (1e-4, CyclicLinearLR, 1e-5), marks=pytest.mark.slow),
        pytest.param("deit_small_nm_10_epochs", 10, (1e-4, CyclicLinearLR, 1e-5), marks=pytest.mark.slow),
        pytest.param("deit_small_nm_50_epochs", 50, (1e-4, CyclicLinearLR, 1e-5), marks=pytest.mark.slow),
        pytest.param("deit_small_acdc", 600, (5e-4, CosineLR, 1e-6), marks=pytest.mark.slow),
        pytest.param("deit_small_rigl", 600, (5e-4, CosineLR, 1e-6), marks=pytest.mark.slow),
    ],
)
def test_epochs_and_learning_rates_of_recipes(name: str, epochs: int, rates: tuple[float, type, float]) -> None:
    """Section 4.1, appendices B, H.3 and L."""
    cli = _instantiated(ROOT / "configs" / f"imagenet_{name}.yaml", "--data.root=/data/imagenet")
    assert (cli.trainer.max_epochs, _rates(cli)) == (epochs, rates)
    assert cli.datamodule.batch_size * cli.trainer.num_devices == 1024


def test_acdc_has_the_papers_phases() -> None:
    [settings] = [
        c["init_args"] for c in whole(ROOT / "configs/imagenet_deit_small_acdc.yaml")["trainer"]["callbacks"][1:]
    ]
    events = AlternatingSchedule(**settings["schedule"]["init_args"]).events(600)
    starts = [*events, 600]
    assert [after - before for before, after in pairwise(starts)] == [25] * 13 + [50, 75]
    assert starts[0] == 150


def test_nm_is_2_of_4() -> None:
    callback = _callback(_instantiated(ROOT / "configs" / "digits_nm.yaml"))
    assert callback is not None
    assert callback.pruner.pattern == NofM(2, 4)


def test_oneshot_has_the_same_pruner_as_the_runs() -> None:
    parts = ROOT / "configs/parts"
    assert whole(parts / "imagenet_oneshot.yaml")["pruner"] == whole(parts / "cap.yaml")


def test_recipes_of_one_family_say_only_what_differs() -> None:
    configs = ROOT / "configs"
    for path in configs.glob("imagenet_convnextv2_*.yaml"):
        assert read_settings(path).keys() == {"output_dir", "model"}, path
    longer = read_settings(configs / "imagenet_deit_small_nm_50_epochs.yaml")
    assert longer["trainer"].keys() == {"max_epochs", "logger"}
    for name in ("deit_small_nm_oneshot", "convnext_large_clip_oneshot"):
        assert "class_path" not in read_settings(configs / f"imagenet_{name}.yaml")["pruner"], name


def test_digits_share_model_and_pruner() -> None:
    configs = {path.stem: whole(path) for path in CONFIGS if path.stem.startswith("digits_")}
    gradual = configs["digits_gradual"]
    for config in configs.values():
        assert config["model"]["init_args"]["model"] == gradual["model"]["init_args"]["model"]
        assert config["data"] == gradual["data"]
    pruner = gradual["trainer"]["callbacks"][-1]["init_args"]["pruner"]
    assert configs["digits_oneshot"]["pruner"] == pruner
    assert configs["digits_compare"]["pruners"]["CAP"] == pruner
    assert configs["digits_compare"]["ckpt_path"] == configs["digits_oneshot"]["ckpt_path"]


def test_every_run_logs_its_learning_rate() -> None:
    for path in FIT:
        if path.parent.name == "configs":
            monitor = whole(path)["trainer"]["callbacks"][0]
            assert monitor["class_path"] == "lightning.pytorch.callbacks.LearningRateMonitor", path
            assert monitor["init_args"] == {"logging_interval": "epoch"}


@pytest.mark.slow  # .ci/run does it from the shell
def test_dense_then_oneshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that the one file leaves is the one that the other prunes."""
    monkeypatch.chdir(tmp_path)
    limits = ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    dense = ["fit", f"--config={ROOT / 'configs' / 'digits_dense.yaml'}", "--trainer.max_epochs=1"]
    main([*dense, *limits, "--trainer.limit_train_batches=1"])
    assert (tmp_path / "runs/digits_dense/dense.ckpt").is_file()
    oneshot = ["oneshot", f"--config={ROOT / 'configs' / 'digits_oneshot.yaml'}", "--pruner.num_gradients=8"]
    main([*oneshot, *limits, "--sparsities=[0.5]"])
    written = {path.name for path in (tmp_path / "runs/digits_oneshot").iterdir()}
    assert {"results.jsonl", "results.md", "accuracy.png", "sparsity=0.50.safetensors"} <= written
    comparison = [
        "oneshot",
        f"--config={ROOT / 'configs' / 'digits_compare.yaml'}",
        "--seeds=[0]",
        "--sparsities=[0.5]",
    ]
    few = [f"--pruners.{name}.num_gradients=8" for name in ("FastCAP", "WoodFisher", "M-FAC", "OBD", "GrW", "Taylor")]
    few.append("--pruners.layerwise OBS.num_inputs=8")
    main([*comparison, *limits, *few, "--grids={num_gradients: [12]}", "--pruners.CAP.num_gradients=16", "--loss_samples=32",
          "--surface.sparsity=0.5", "--surface.points=2"])  # fmt: skip
    written = {path.name for path in (tmp_path / "runs/digits_compare").iterdir()}
    assert {"results.md", "layers.png", "losses.png", "iou.png", "grid-num_gradients.png"} <= written
    assert {"surface.png", "fisher_block.png"} <= written
