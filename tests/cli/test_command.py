"""The `lightning-cap` command on the digits, shortened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cap import CAPPruningCallback
from lightning_cap.cli import CAPCLI, CAPTrainer, main
from lightning_cap.comparison import ComparisonRecord
from lightning_cap.healing import DistillHeal, Heal, LayerwiseHeal
from lightning_cap.utilities.records import read_records
from tests.support import ROOT
from tests.support.configs import whole
from tests.support.toy import Toy, loaders, trainer

GRADUAL = str(ROOT / "configs/digits_gradual.yaml")
SMALL = [  # a tiny model
    "--model.init_args.model.init_args.embed_dim=16",
    "--model.init_args.model.init_args.depth=2",
    "--model.init_args.model.init_args.num_heads=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def _as_from_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-cap"])  # not pytest's, which Lightning would warn about


def shortened(folder: Path) -> list[str]:
    """The gradual config with few epochs, gradients and batches."""
    config = whole(Path(GRADUAL))
    callback = config["trainer"]["callbacks"][-1]["init_args"]
    callback["schedule"]["init_args"]["steps"] = {1: 0.5, 2: 0.75, 3: 0.9}
    callback["pruner"]["init_args"].update(num_gradients=64, block_size=16)
    config["trainer"].update(max_epochs=4, limit_train_batches=2)
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder / "runs")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), *SMALL]


def test_fit_prunes_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *shortened(tmp_path)])
    out = capsys.readouterr().out
    for text in ("dense", "50.00 %", "75.00 %", "90 %", "sparsity=0.90.ckpt", "val/acc"):
        assert text in out
    folder = next((tmp_path / "runs").rglob("checkpoints"))
    assert (
        len(list(folder.glob("*.ckpt"))) == len(list(folder.glob("sparsity=*.safetensors"))) + 1
    )  # and Lightning's own
    saved = yaml.safe_load((folder.parent / "config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 4

    capsys.readouterr()
    checkpoint = str(folder / "sparsity=0.90.ckpt")
    main(["validate", *shortened(tmp_path), "--ckpt_path", checkpoint])
    assert "val/acc" in capsys.readouterr().out
    main(["test", *shortened(tmp_path), "--ckpt_path", checkpoint])
    assert "test/acc" in capsys.readouterr().out
    main(["predict", *shortened(tmp_path), "--ckpt_path", checkpoint])


def oneshot(folder: Path, **settings: Any) -> list[str]:
    """A config file for ``oneshot`` and the arguments for it."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    given: dict[str, Any] = {
        "model": config["model"],
        "data": config["data"],
        "trainer": {"logger": False, "default_root_dir": str(folder)},
        "sparsities": [0.6, 0.9],
        "output_dir": str(folder / "out"),
        "loss_samples": 64,
        **settings,
    }
    (folder / "oneshot.yaml").write_text(yaml.safe_dump(given))
    return ["oneshot", "--config", str(folder / "oneshot.yaml"), *SMALL]


def a_cap(**settings: Any) -> dict[str, Any]:
    return {"class_path": "CAP", "init_args": {"num_gradients": 64, "block_size": 16, "damp": 1e-6, **settings}}


def test_oneshot_with_one_pruner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *shortened(tmp_path)])
    checkpoint = next((tmp_path / "runs").rglob("sparsity=0.50.ckpt"))
    arguments = oneshot(tmp_path, pruner=a_cap(), ckpt_path=str(checkpoint))
    capsys.readouterr()
    main(arguments)
    out = capsys.readouterr().out
    assert "predicted loss" in out
    assert "0.90" in out
    records = read_records(tmp_path / "out/results.jsonl", ComparisonRecord)
    assert [record.goal for record in records] == [0.0, 0.6, 0.9]
    assert records[0].sparsity == 0.5  # the checkpoint was sparse already
    assert records[1].predicted_loss < records[2].predicted_loss
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "results.md", "accuracy.png", "layers.png", "losses.png", "masks", "sparsity=0.60.safetensors",
        "sparsity=0.90.safetensors", "exports.jsonl",
    }  # fmt: skip


def test_oneshot_compares_pruners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shortened(tmp_path)
    pruners = {"CAP": a_cap(), "magnitude": {"class_path": "Magnitude"}}
    arguments = oneshot(
        tmp_path,
        pruners=pruners,
        seeds=[0, 1],
        grids={"damp": [1e-4]},
        surface={"pruners": ["CAP", "magnitude"], "sparsity": 0.9, "points": 2},
        fisher_block=16,
    )
    main(arguments)
    out = capsys.readouterr().out
    for text in ("val/acc at each sparsity", "CAP damp=0.0001", "magnitude", "unpruned", "90 %"):
        assert text in out
    records = read_records(tmp_path / "out/results.jsonl", ComparisonRecord)
    rising = any((record.loss_increase.get("calibration") or 0) > 0 for record in records[1:5])  # CAP's as given
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "results.md", "accuracy.png", "layers.png", "iou.json", "iou.png", "grid-damp.png",
        "surface.json", "surface.png", "fisher_block.safetensors", "fisher_block.png", "masks",
    } | ({"losses.png"} if rising else set())  # fmt: skip  # the loss of a model that was not trained may fall
    assert len(records) == 1 + 3 * 2 * 2
    before = (tmp_path / "out/results.md").read_text()
    main(
        [*arguments, "--pruners.CAP.num_gradients=32", "--save_weights=true"]
    )  # one value of one pruner, from the shell
    assert (tmp_path / "out/CAP/seed=1/sparsity=0.60.safetensors").is_file()
    assert "num_gradients=32" in (tmp_path / "out/results.md").read_text() != before
    again = {record.fingerprint for record in read_records(tmp_path / "out/results.jsonl", ComparisonRecord)}
    assert {r.pruner for r in records if r.fingerprint in again} == {
        "unpruned",
        "magnitude",
    }  # whatever else the command says
    assert {r.pruner for r in records if r.fingerprint not in again} == {"CAP"}


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("neither given", {}),
        ("both given", {"pruner": a_cap(), "pruners": {"CAP": a_cap()}}),
        ("Option 'block' is not accepted; did you mean 'block_size'?", {"pruners": {"CAP": a_cap(block=3)}}),
        ("nowhere", {"pruners": {"CAP": {"class_path": "nowhere.CAP"}}}),
        ("damp=-1.0", {"pruners": {"CAP": a_cap(damp=-1.0)}}),
        ("surface.pruners", {"pruners": {"CAP": a_cap()}, "surface": {"pruners": ["CAP", "x"], "sparsity": 0.9}}),
        ("sparsities=1.5", {"pruners": {"CAP": a_cap()}, "sparsities": [1.5]}),
        ("grids", {"pruners": {"CAP": a_cap()}, "grids": {"dampp": [1e-3]}}),
    ],
)
def test_wrong_comparisons_are_explained(
    tmp_path: Path, message: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shortened(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(oneshot(tmp_path, **settings))
    assert message in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_our_errors_end_the_command_with_one_line(tmp_path: Path) -> None:
    arguments = [*shortened(tmp_path), "--trainer.max_epochs=2"]
    with pytest.raises(SystemExit, match=r"lightning-cap: error: .*max_epochs=2"):
        main(["fit", *arguments])
    assert not (tmp_path / "runs").exists()


def test_refusal_leaves_the_logs_of_other_runs(tmp_path: Path) -> None:
    arguments = [*shortened(tmp_path), "--trainer.max_epochs=2"]
    other = tmp_path / "runs/digits_gradual/version_0/metrics.csv"
    other.parent.mkdir(parents=True)
    other.touch()
    with pytest.raises(SystemExit, match="max_epochs=2"):
        main(["fit", *arguments])
    assert list((tmp_path / "runs").rglob("*.*")) == [other]
    assert [path.name for path in (tmp_path / "runs/digits_gradual").iterdir()] == ["version_0"]


def test_settings_find_their_callback(tmp_path: Path) -> None:
    """jsonargparse gives them to the last of the list."""
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    config = whole(Path(GRADUAL))
    listed = [stopping, *config["trainer"]["callbacks"], "RichProgressBar"]
    if hasattr(pl.callbacks, "EMAWeightAveraging"):  # it takes any setting, but others name theirs
        listed.append("EMAWeightAveraging")
    config["trainer"]["callbacks"] = listed
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    given = [
        "pruner.num_gradients=512",
        "patience=7",
        "init_args.min_delta=0.5",
        "schedule.steps={2: 0.5}",
        "pruner=FastCAP",
    ]
    options = [f"--trainer.callbacks.{setting}" for setting in given]
    cli = CAPCLI(trainer_class=CAPTrainer, run=False, args=["--config", str(tmp_path / "config.yaml"), *options])
    early, _, pruning, bar = cli.config["trainer"]["callbacks"][:4]
    assert (early["init_args"]["patience"], early["init_args"]["min_delta"]) == (7, 0.5)
    assert bar["class_path"].endswith("RichProgressBar")
    assert pruning["init_args"]["schedule"]["init_args"]["steps"] == {2: 0.5}
    assert pruning["init_args"]["pruner"]["class_path"].endswith("FastCAP")
    assert pruning["init_args"]["pruner"]["init_args"]["num_gradients"] == 512


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_model_is_told_in_one_line(tmp_path: Path, command: str) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="toy")
    trainer(tmp_path, saver, enable_checkpointing=True, max_epochs=1).fit(Toy(), **loaders())
    with pytest.raises(
        SystemExit, match=r"lightning-cap: error: ckpt_path='.*toy\.ckpt': it is of another model"
    ) as end:
        main([command, *shortened(tmp_path), f"--ckpt_path={tmp_path / 'toy.ckpt'}"])
    assert "\n" not in str(end.value)
    assert not (tmp_path / "runs").exists()


def test_what_lightning_refuses_in_a_run_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"lightning-cap: error: `val_check_interval` \(99\) must be"):
        main(["fit", *shortened(tmp_path), "--trainer.val_check_interval=99"])
    assert not (tmp_path / "runs").exists()


def test_unexpected_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: CAPTrainer, *args: Any, **named: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(CAPTrainer, "fit", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fit", *shortened(tmp_path)])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:4", "124 is what YAML makes of an unquoted 2:4"),
        ('"2:4"', "pattern=124"),
        ("{class_path: lightning_cap.sparsity.NofM, init_args: {n: 2:4}}", "unquoted 2:4"),
    ],
)  # fmt: skip
def test_n_of_m_written_wrongly_in_yaml_is_explained(
    tmp_path: Path, pattern: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shortened(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("num_gradients: 64", f"num_gradients: 64\n          pattern: {pattern}"))
    with pytest.raises(SystemExit) as caught:
        main(["fit", *arguments])
    assert message in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("heal", "want"),
    [
        ("layerwise", LayerwiseHeal()),
        ("distill", DistillHeal()),
        (
            "{class_path: lightning_cap.healing.LayerwiseHeal, init_args: {num_inputs: 64}}",
            LayerwiseHeal(num_inputs=64),
        ),
        ("null", None),
    ],
    ids=["name", "other name", "class", "none"],
)
def test_a_heal_is_named_or_written_as_a_class_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heal: str, want: Heal | None
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(CAPTrainer, "fit", lambda self, *_, **__: seen.extend(self.callbacks))
    arguments = shortened(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("num_gradients: 64", f"num_gradients: 64\n          heal: {heal}"))
    main(["fit", *arguments])
    (callback,) = (one for one in seen if isinstance(one, CAPPruningCallback))
    assert callback.pruner.heal == want


@pytest.mark.slow
def test_print_config_and_help() -> None:
    command = [sys.executable, "-m", "lightning_cap.cli"]
    shown = subprocess.run([*command, "fit", "--config", GRADUAL, "--print_config"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["trainer"]["max_epochs"] > 3
    usage = subprocess.run([*command, "oneshot", "--help"], capture_output=True, text=True)
    assert usage.returncode == 0, usage.stderr
    assert "--sparsities" in usage.stdout


def test_the_recipe_of_the_data_is_the_models_too() -> None:
    arguments = [
        "--model=VisionClassifier",
        "--model.model=vit_tiny_patch16_224",
        "--model.num_classes=3",
        "--data=ImageNetDataModule",
    ]
    for recipe, decay in (("deit", 0.05), ("light1", 0.03)):
        cli = CAPCLI(trainer_class=CAPTrainer, run=False, args=[*arguments, f"--data.recipe={recipe}"])
        assert cli.model.weight_decay == decay
        assert cli.datamodule.recipe.weight_decay == decay
    cli = CAPCLI(
        trainer_class=CAPTrainer, run=False, args=[*arguments, "--data.recipe=deit", "--model.weight_decay=0.2"]
    )
    assert cli.model.weight_decay == 0.2


def test_hyperparameters_in_a_checkpoint_do_not_change_the_configured_model(tmp_path: Path) -> None:
    arguments = shortened(tmp_path)
    kept = CAPCLI(trainer_class=CAPTrainer, run=False, args=arguments).model
    content = {
        "state_dict": {name: torch.full_like(value, 2) for name, value in kept.state_dict().items()},
        "hyper_parameters": {"weight_decay": 0.123, "label_smoothing": 0.456, "unknown": 7},
        "pytorch-lightning_version": pl.__version__,
        "callbacks": {},
    }
    torch.save(content, tmp_path / "last.ckpt")
    cli = CAPCLI(trainer_class=CAPTrainer, args=["validate", *arguments, f"--ckpt_path={tmp_path / 'last.ckpt'}"])
    assert (cli.model.weight_decay, cli.model.label_smoothing) == (kept.weight_decay, kept.label_smoothing)
    assert all((weight == 2).all() for weight in cli.model.parameters())
    assert cli.config["validate"]["ckpt_path"] == str(tmp_path / "last.ckpt")


@pytest.mark.slow
def test_class_paths_may_name_files_in_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning_cap.pruners import Magnitude\n\n\nclass MyPruner(Magnitude):\n    pass\n"
    )
    script = Path(sys.executable).parent / "lightning-cap"
    command = [str(script)] if script.exists() else [sys.executable, "-c", "from lightning_cap.cli import main; main()"]
    arguments = ["fit", *shortened(tmp_path), "--trainer.callbacks.pruner=mine.MyPruner", "--print_config"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    shown = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "mine.MyPruner" in shown.stdout


def test_without_a_logger_no_configuration_is_written_over_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = shortened(tmp_path)
    mine = (tmp_path / "config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    main(["fit", *arguments, "--trainer.logger=false", "--trainer.max_epochs=1", "--trainer.callbacks=null"])
    assert (tmp_path / "config.yaml").read_text() == mine
