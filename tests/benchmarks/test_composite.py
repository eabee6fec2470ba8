"""The script that combines pruning with int8 and with fewer tokens, with tiny models trained for a step or two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from tests.support.images import small_images, write_tar

CLASSES = [f"n{k:08d}" for k in range(3)]


@pytest.fixture
def script(benchmarks: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torchao")
    script = benchmarks("composite")
    few = {"before": 1, "epochs": 4, "events": {0: 0.5, 1: 0.75}, "int8_from": 2, "batches": 1}
    for name, value in {**few, "pruner": {"block_size": 16, "num_gradients": 8}}.items():
        monkeypatch.setattr(script.PARTS["digits"], name, value)
    return script


def command(tmp_path: Path, *more: str) -> list[str]:
    return ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.json"), "--limit", "20", *more]


def row(seeds: dict[str, float], **more: Any) -> dict[str, Any]:
    held = {seed: {"top1": top1, "int8": {"points": -0.5, "error": 0.3}} for seed, top1 in seeds.items()}
    return {
        "seeds": held,
        "zeros": 0.5,
        "flops": 50,
        "effective": 25.0,
        "files": {"qdq": 10**6},
        **more,
    }


def test_rows_that_are_known_are_not_run_again(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = {
        **row({"0": 90.0}),
        "seeds": {"0": {"top1": 90.0}},
        "flops": 100,
        "files": {"onnx": 10**6, "compressed": 4},
    }
    time = {"speed_up": 2.0, "low": 1.5, "high": 2.5}
    rows = {"dense": dense, "75 % + int8": row({"0": 88.0, "1": 89.0}, times={"32": time})}
    (tmp_path / "out.json").write_text(json.dumps({"parts": {"digits": {"rows": rows}}}))
    monkeypatch.setattr(script.PARTS["digits"], "make", lambda *_: pytest.fail("a row is run again"))
    script.main(command(tmp_path, "--parts", "digits", "--rows", *rows, "--seconds", "0"))
    table = capsys.readouterr().out
    assert "| dense | 90.00 |  | 50.0 % | 1.000 | 0.250 | 1.00 | 0.00 | - |" in table
    assert (
        "| 75 % + int8 | 88.50 (88.00, 89.00) | -0.50 ± 0.21 | 50.0 % | 0.500 | 0.250 | 1.00 | - | 2.00 (1.50 to 2.50) |"
        in table
    )


def test_names_of_rows(script: Any) -> None:
    without = script.PARTS["digits_configs"].make.__globals__["without_int8"]
    assert [without(name) for name in ("int8", "75 % + int8, static", "tokens")] == ["dense", "75 %", "tokens"]
    assert script.PARTS["vit_tiny"].rows[:4] == ("dense", "int8", "tokens", "tokens + int8")
    with pytest.raises(SystemExit):
        script.parse(["--parts", "cifar10"])


def check_names(rows: dict[str, Any], names: list[str]) -> None:
    """The last has int8 and fewer tokens: its file with constant scales may keep others, and is refused then."""
    assert [name for name in rows if not name.endswith(", static")] == names
    assert (f"{names[-1]}, static" in rows) != ("static" in rows[names[-1]]["refused"])


@pytest.mark.slow
def test_digits_are_trained_exported_and_timed(script: Any, tmp_path: Path) -> None:
    names = ["dense", "75 % + tokens", "75 % + tokens + int8"]
    found = script.main(command(tmp_path, "--parts", "digits", "--rows", *names, "--seconds", "0.01"))
    assert json.loads((tmp_path / "out.json").read_text())["parts"] == found
    rows = found["digits"]["rows"]
    check_names(rows, names)
    assert [set(rows[name]["files"]) for name in names] == [*[{"onnx", "compressed"}] * 2, {"qdq", "torchao"}]
    assert rows["dense"]["zeros"] == 0
    assert rows["75 % + tokens"]["zeros"] == rows["75 % + tokens + int8"]["zeros"] > 0.6
    assert rows["75 % + tokens"]["effective"] < rows["75 % + tokens"]["flops"] < rows["dense"]["flops"]
    assert set(rows["75 % + tokens + int8"]["seeds"]["0"]) == {"top1", "int8", "seconds"}
    assert all(set(held["times"]) == {"1", "32"} for held in rows.values())
    assert (tmp_path / "work/digits/75 % + tokens, seed 0/epoch=1.ckpt").is_file()


def tiny(*_: Any, **__: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=224, patch_size=56, embed_dim=16, depth=3, num_heads=2, num_classes=3)


@pytest.mark.slow
def test_a_pretrained_model_is_pruned_once_for_all_rows(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, split in enumerate(("train", "val")):
        write_tar(tmp_path / f"data/imagenet1k-sample/{split}.tar", small_images(CLASSES, each=4, side=240, seed=seed))
    (tmp_path / "data/weights").mkdir()
    save_file(tiny().state_dict(), tmp_path / "data/weights/vit_tiny_patch16_224.safetensors")
    kind = script.PARTS["vit_tiny"]
    monkeypatch.setattr("timm.create_model", tiny)
    for name, value in (("block_size", 16), ("num_gradients", 8), ("tokens", {"blocks": [1], "keep_ratio": 0.5})):
        monkeypatch.setattr(kind, name, value)
    names = ["dense", "50 %", "50 % + tokens + int8"]
    data = ["--data", str(tmp_path / "data"), "--limit", "10"]
    given = command(tmp_path, "--parts", "vit_tiny", "--rows", *names, "--seconds", "0", *data)
    rows = script.main(given)["vit_tiny"]["rows"]
    check_names(rows, names)
    assert rows["50 %"]["zeros"] == rows["50 % + tokens + int8"]["zeros"] > 0.02
    assert list((tmp_path / "work/vit_tiny").glob("*.pt")) == [tmp_path / "work/vit_tiny/50 %, seed 0.pt"]
