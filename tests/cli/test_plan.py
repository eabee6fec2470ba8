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


@pytest.mark.parametrize("devices", ["4", "-1", "[0, 1]", "auto"])
def test_gpus_that_are_asked_for_need_not_be_here(capsys: pytest.CaptureFixture[str], devices: str) -> None:
    given = ["--trainer.accelerator=gpu", f"--trainer.devices={devices}", "--trainer.precision=16-mixed"]
    found = _planned(capsys, "digits_gradual.yaml", *given, "--trainer.callbacks.pruner.num_gradients=8")
    count = {"4": 4, "[0, 1]": 2}.get(devices, 1)
    assert (found["machine"]["device"], found["machine"]["processes"]) == ("cuda", count)  # type: ignore[index]
    assert "give --device_memory" in str(found["notes"])


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
        (["--host_memory=8MB", "--trainer.devices=8"], "GPUs that are not here, give --device_memory, such as 80GB."),
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


def test_a_run_on_the_cpu_is_not_told_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _planned(capsys, "digits_gradual.yaml", "--host_memory=8MB", "--trainer.accelerator=cpu")
    told = capsys.readouterr().err
    assert "the pruning event needs" in told
    assert "--device_memory" not in told
