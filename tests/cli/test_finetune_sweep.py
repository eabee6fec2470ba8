"""`lightning-cap finetune-sweep` on a small ViT and the digits."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_cap.cli import main
from lightning_cap.cli.finetune_sweep import finetune_sweep
from lightning_cap.trainer.run_records import FINETUNED, FinetunedRecord
from lightning_cap.utilities.records import read_records
from tests.support.stopping import CrashError, StopAfter
from tests.support.sweeping import prune, write_config

CONFIG: dict[str, Any] = {"max_epochs": 2}


@pytest.fixture(autouse=True)
def _as_from_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-cap"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(tmp_path_factory.mktemp("pruned"), save="both")


@pytest.fixture(scope="module")
def tuned(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[FinetunedRecord], str]:
    """Folder, records and output of a sweep."""
    folder = tmp_path_factory.mktemp("tuned")
    run = Path(shutil.copytree(original, folder / "run"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        records = finetune_sweep([str(run), "--config", str(write_config(folder / "finetune.yaml", **CONFIG))])
    return run, records, out.getvalue()


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "finetune.yaml", **CONFIG))


def weights(path: Path | str) -> dict[str, Any]:
    held: dict[str, Any] = torch.load(path, weights_only=True)["state_dict"]
    return held


def same(a: Path | str, b: Path | str) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def test_fine_tunes_each_checkpoint_and_prints_the_table(tuned: tuple[Path, list[FinetunedRecord], str]) -> None:
    run, records, out = tuned
    assert "1 of 2: sparsity 0.50 (sparsity=0.50-best.ckpt)\n" in out
    assert "2 of 2: sparsity 0.75 (sparsity=0.75-best.ckpt)\n" in out
    for text in ("Fine-tuned models", "sparsity (%)", "FLOPs", "val/acc (%)", "gain", "50.0", "75.0"):
        assert text in out
    assert records == read_records(run / "checkpoints" / FINETUNED, FinetunedRecord)
    assert [record.goal for record in records] == [0.5, 0.75]
    for record in records:
        assert record.sparsity == pytest.approx(record.goal, abs=1e-3)
        assert 0 < (record.flops_saved or 0) < record.goal
        assert (record.metric, record.epochs) == ("val/acc", 2)
        assert record.before is not None
        assert record.after is not None
        before, after = weights(record.source), weights(record.checkpoint)
        zeros = {name: value == 0 for name, value in before.items() if name.endswith(("qkv.weight", "fc1.weight"))}
        assert all(bool(mask.any()) and not after[name][mask].any() for name, mask in zeros.items())
        assert not same(record.source, record.checkpoint)
        assert Path(record.weights).exists()
        assert (Path(record.checkpoint).parent / "config.yaml").exists()
        assert len(list(Path(record.checkpoint).parent.glob("version_0/metrics.csv"))) == 1
    assert {path.name for path in (run / "finetuned").iterdir()} == {"sparsity=0.50-best", "sparsity=0.75-best"}


def test_what_is_done_is_skipped_and_told_again(
    tuned: tuple[Path, list[FinetunedRecord], str], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, first, out = tuned
    table = out.partition("Fine-tuned models")[2]
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")}
    assert finetune_sweep([str(run / "checkpoints"), "--config", config]) == first
    out = capsys.readouterr().out
    assert out.count("done before") == 2
    assert out.partition("Fine-tuned models")[2] == table
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")} == times


def test_a_stopped_sweep_goes_on_exactly(
    run: Path, tuned: tuple[Path, list[FinetunedRecord], str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = tuned
    fit = pl.Trainer.fit
    started: list[int] = []

    def stopping(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        started.append(1)
        if len(started) == 2:  # the second checkpoint, after its first epoch
            self.callbacks.append(StopAfter(1))  # type: ignore[attr-defined]
        fit(self, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", stopping)
    with pytest.raises(CrashError):
        finetune_sweep([str(run), "--config", config])
    assert (run / "finetuned/sparsity=0.75-best/last.ckpt").exists()
    assert len(read_records(run / "checkpoints" / FINETUNED, FinetunedRecord)) == 1
    resumed = finetune_sweep([str(run), "--config", config])
    for one, other in zip(whole, resumed, strict=True):
        assert same(one.checkpoint, other.checkpoint)
        assert (one.before, one.after, one.epochs) == (other.before, other.after, other.epochs)
    assert len(list((run / "finetuned/sparsity=0.75-best").glob("version_*/metrics.csv"))) == 2


def test_other_epochs_than_it_was_begun_with_are_refused(
    tuned: tuple[Path, list[FinetunedRecord], str], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = tuned
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        main(["finetune-sweep", str(run), "--config", config, "--trainer.max_epochs", "3"])
    assert end.value.code == 2
    assert "trainer.max_epochs=3" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["", "trainer:\n  max_steps: 1\n", "trainer: [", "- 1"])
def test_settings_that_were_cut_off_are_refused(
    tuned: tuple[Path, list[FinetunedRecord], str],
    config: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str,
) -> None:
    run = Path(shutil.copytree(tuned[0], tmp_path / "copy"))
    saved = run / "finetuned/sparsity=0.50-best/config.yaml"
    saved.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["finetune-sweep", str(run), "--config", config])
    assert end.value.code == 2
    assert f"{saved}: it cannot be read" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["Model of another width", "CAPPruningCallback", "ddp_spawn"])
def test_what_cannot_be_fine_tuned_is_refused(
    run: Path, config: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(run.rglob("*"))
    if name == "CAPPruningCallback":
        given, told = ["--trainer.callbacks=CAPPruningCallback", "--trainer.callbacks.schedule={0: 0.9}"], "prunes on"
    elif name == "ddp_spawn":
        given, told = ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "trainer.strategy"
    else:
        given, told = ["--model.init_args.model.init_args.embed_dim=16"], "it is of another model"
    with pytest.raises(SystemExit) as end:
        main(["finetune-sweep", str(run), "--config", config, *given])
    err = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert told in err
    assert set(run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_on_two_processes_and_after_a_kill(run: Path, config: str) -> None:
    """Lightning starts the second process itself. Killed in the second checkpoint, the sweep goes on."""
    options = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.num_sanity_val_steps=0"]
    command = [sys.executable, "-m", "lightning_cap.cli", "finetune-sweep", str(run), "--config", config, *options]
    last = run / "finetuned/sparsity=0.75-best/last.ckpt"
    with subprocess.Popen(command, start_new_session=True) as process:
        while process.poll() is None and not last.exists():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Fine-tuned models") == 1
    records = read_records(run / "checkpoints" / FINETUNED, FinetunedRecord)
    assert [(record.goal, record.epochs) for record in records] == [(0.5, 2), (0.75, 2)]
    for record in records:
        before, after = weights(record.source), weights(record.checkpoint)
        assert all(torch.equal(value == 0, after[name] == 0) for name, value in before.items() if "qkv.weight" in name)
