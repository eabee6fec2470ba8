"""``lightning-cap plan``: the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_cap.cli.command import main

CONFIGS = Path(__file__).parents[2] / "configs"


def _planned(capsys: pytest.CaptureFixture[str], name: str, *args: str) -> dict[str, object]:
    main(["plan", "--config", str(CONFIGS / name), "--json", "--no_measure", *args])
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1, "nothing else"
    assert isinstance(found, dict)
    return found


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_training_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = _planned(capsys, "digits_gradual.yaml", "--trainer.callbacks.pruner.num_gradients=128")
    assert (found["record"], found["version"], found["command"]) == ("plan", 1, "fit")
    (pruner,) = found["pruning"]  # type: ignore[misc]
    assert pruner["samples"] == 128  # type: ignore[has-type]
    assert [event["epoch"] for event in pruner["events"]] == [60, 80, 100]  # type: ignore[has-type]
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_comparison(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = _planned(capsys, "digits_oneshot.yaml", "--sparsities=[0.3]")
    assert found["command"] == "oneshot"
    assert [event["goal"] for event in found["pruning"][0]["events"]] == [0.3]  # type: ignore[index]
    assert "dense.ckpt' is not there (yet)" in str(found["notes"])
    assert not list(tmp_path.iterdir())


def test_a_machine_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight processes on GPUs, and weights that would be downloaded."""
    given = ["--device_memory", "16GB", "--model.model=vit_tiny_patch16_224", "--model.model_kwargs={depth: 1}"]
    found = _planned(capsys, "imagenet_deit_tiny_gradual.yaml", *given, "--trainer.callbacks.pruner.num_gradients=8")
    machine = found["machine"]
    assert (machine["device"], machine["processes"]) == ("cuda", 8)  # type: ignore[index]
    assert "nothing is downloaded" in str(found["notes"])
    assert found["timeline"]["steps"] == 1281167 // 8 // 128  # type: ignore[index]


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--no_measure", "--config", str(CONFIGS / "digits_dense.yaml")])
    assert "Note: no callback prunes" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    assert "--device_memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--trainer.strategy=fsdp", "--trainer.accelerator=gpu"], "strategy=FSDPStrategy: it shards parameters"),
        (["--trainer.accelerator=gpu", "--trainer.devices=none"], "trainer.devices="),
        (["--device_memory=much"], "device_memory='much': give bytes"),
        (["--train_images=few"], "--train_images='few'"),
        (["--json=yes"], "plan: argument --json"),
        (["--trainer.max_epochs=50"], "the schedule prunes at the start of epoch 100"),
        (["--trainer.max_epoch=50"], "max_epoch"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], args: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as ended:
        _planned(capsys, "digits_gradual.yaml", *args)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err.splitlines()[-1]
