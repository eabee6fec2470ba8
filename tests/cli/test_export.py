from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lightning_cap import VisionClassifier
from lightning_cap.cli import main
from lightning_cap.cli.export import export
from lightning_cap.errors import ConfigError
from lightning_cap.export import ExportRecord, Safetensors, load, load_compressed, shrink
from lightning_cap.export.safetensors import save_plain_weights
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities.records import read_records
from tests.support.checkpoints import checkpoint
from tests.support.images import small_images, write_folder, write_tar
from tests.support.toy import FEATURES, Toy, loaders, trainer
from tests.support.unit_runs import units

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def classifier(**kwargs: Any) -> VisionClassifier:
    """A tiny one, half of whose weights are zero."""
    torch.manual_seed(0)
    module = VisionClassifier("vit_tiny_patch16_224", num_classes=3, model_kwargs=VIT, **kwargs)
    halve(module)
    return module


def halve(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(torch.rand_like(parameter) < 0.5)


def saved(folder: Path, module: pl.LightningModule, **more: Any) -> str:
    path = folder / "checkpoints" / "sparsity=0.50.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint(state_dict=module.state_dict(), hyper_parameters=dict(module.hparams), **more), path)
    return str(path)


def record_of(folder: Path) -> ExportRecord:
    return read_records(folder / "exports.jsonl", ExportRecord)[0]


def test_a_checkpoint_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = classifier()
    images = torch.randn(40, 3, 16, 16)
    torch.save(images, tmp_path / "x.pt")
    main(["export", saved(tmp_path, module), "--to", "compressed", "--input", str(tmp_path / "x.pt")])
    folder = tmp_path / "checkpoints/export"
    assert {path.name for path in folder.iterdir()} == {"sparsity=0.50.compressed.safetensors", "exports.jsonl"}
    state = load_compressed(folder / "sparsity=0.50.compressed.safetensors")
    assert all(torch.equal(value, module.model.state_dict()[name]) for name, value in state.items())
    record = record_of(folder)
    assert (record.inputs, record.architecture, record.zeros_equal) == (32, "vit_tiny_patch16_224", record.weights)
    told = capsys.readouterr().out
    for words in (
        "kB on disk (dense: ",
        "tolerance 0.0001, on 32 inputs (inputs of ",
        f"in all {record.weights} weights",
    ):
        assert words in told.replace("\n", " ")


def test_settings_of_the_exporter_and_the_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 16, 16), dtype=np.float64))
    options = ["--to.tolerance=0.5", f"--output={tmp_path}/out", f"--input={tmp_path}/x.npy"]
    main(["export", saved(tmp_path, classifier()), "--to=safetensors", *options])
    assert record_of(tmp_path / "out").tolerance == 0.5
    main(["export", saved(tmp_path, classifier()), f"--to={__name__}.Mine", *options[1:]])
    assert [record.format for record in read_records(tmp_path / "out/exports.jsonl", ExportRecord)][1] == "mine"


class Mine(Safetensors):
    """A user's own."""

    format, suffix = "mine", ".mine.safetensors"


def test_without_data_it_is_noise_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "lightning_cap.data.ImageNetDataModule"}})
    )
    main(["export", saved(tmp_path, classifier()), "--to=safetensors"])
    told = capsys.readouterr().out
    assert "noise, as no data is known (" in told
    assert "validation" in told  # what is missing


@pytest.mark.parametrize("kind", ["splits", "split", "tar"])
def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    data = tmp_path / ("data.tar" if kind == "tar" else "data")
    if kind == "tar":
        write_tar(data, small_images())
    else:
        write_folder(data / "val" if kind == "splits" else data, small_images())
    main(["export", saved(tmp_path, classifier()), "--to=safetensors", f"--data={data}"])
    assert record_of(tmp_path / "checkpoints/export").inputs == 12
    assert f"images of {data}" in capsys.readouterr().out


def test_the_configuration_of_the_run_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``fit`` leaves it: the model is a class path, which checkpoints do not hold, and classes are defaults."""
    settings = {**VIT, "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    block = {"mlp_layer": "timm.layers.Mlp", "embed_layer": "timm.layers.PatchEmbed"}
    inner = {"class_path": "timm.models.vision_transformer.VisionTransformer", "init_args": {**settings, **block}}
    model = {"class_path": "lightning_cap.VisionClassifier", "init_args": {"model": inner, "pretrained": False}}
    data = {"class_path": "lightning_cap.data.DigitsDataModule", "init_args": {"batch_size": 64}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {}}))
    from timm.models.vision_transformer import VisionTransformer

    module = VisionClassifier(VisionTransformer(**settings))
    halve(module)
    path = saved(tmp_path, module)
    main(["export", path, "--to=safetensors"])
    assert "validation data of" in capsys.readouterr().out
    assert record_of(tmp_path / "checkpoints/export").zeros_equal > 0
    (tmp_path / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    main(["export", path, "--to=compressed", f"--config={tmp_path}/elsewhere.yaml"])
    with pytest.raises(SystemExit, match=r"it does not tell its model. Give --config FILE"):
        main(["export", path, "--to=safetensors"])


def test_a_module_of_the_users_own(tmp_path: Path) -> None:
    module = Toy()
    halve(module)
    torch.save(torch.randn(5, FEATURES), tmp_path / "x.pt")
    given = [f"--input={tmp_path}/x.pt", "--module=tests.support.toy.Toy"]
    main(["export", saved(tmp_path, module), "--to=safetensors", *given])
    assert record_of(tmp_path / "checkpoints/export").zeros_equal == 3


def test_plain_weights_that_name_a_model_of_timm(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("resnet10t", num_classes=4)
    halve(model)
    torch.save(torch.randn(2, 3, 32, 32), tmp_path / "x.pt")
    save_plain_weights(tmp_path / "w.safetensors", model.state_dict(), {"architecture": "resnet10t"})
    main(["export", str(tmp_path / "w.safetensors"), "--to=compressed", f"--input={tmp_path}/x.pt"])
    assert record_of(tmp_path / "export").architecture == "resnet10t"


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    hyper_parameters = {"model": "resnet10t", "num_classes": 3}
    path = tmp_path / "other.ckpt"
    torch.save(checkpoint(state_dict=classifier().state_dict(), hyper_parameters=hyper_parameters), path)
    with pytest.raises(SystemExit, match=r"other.ckpt'?: it is of another model. Missing key"):
        main(["export", str(path), "--to=safetensors"])
    assert [file.name for file in tmp_path.iterdir()] == ["other.ckpt"]


def test_it_is_measured_beside_the_dense_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_cap.cli import export as command
    from lightning_cap.export.benchmark import benchmark
    from lightning_cap.export.records import BenchmarkRecord

    monkeypatch.setattr(command, "benchmark", lambda *args, **given: benchmark(*args, **given, seconds=0.01))
    main(["export", saved(tmp_path, classifier()), "--to=compressed", "--benchmark", "--threads=1"])
    assert "Measured in turns" in capsys.readouterr().out
    measured = read_records(tmp_path / "checkpoints/export/benchmarks.jsonl", BenchmarkRecord)
    file = "sparsity=0.50.compressed.safetensors"
    assert [(r.model, r.batch_size) for r in measured] == [
        ("dense, compressed", 1), (file, 1), ("dense, compressed", 32), (file, 32),
    ]  # fmt: skip
    assert {r.dense for r in measured} == {"dense, compressed"}


def test_a_folder_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from lightning_cap.cli import export as command
    from lightning_cap.export.benchmark import benchmark
    from lightning_cap.export.records import BenchmarkRecord

    monkeypatch.setattr(command, "benchmark", lambda *args, **given: benchmark(*args, **given, seconds=0.01))
    main(["export", saved(tmp_path, classifier()), "--to=openvino", "--benchmark", "--threads=1"])
    assert len(read_records(tmp_path / "checkpoints/export/benchmarks.jsonl", BenchmarkRecord)) == 4


def test_text_in_place_of_a_tensor(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("hello")  # as a pickle: KeyError
    with pytest.raises(SystemExit, match=r"--input=.*x\.pt.*it is no tensor that torch or numpy has saved"):
        main(["export", saved(tmp_path, classifier()), "--to=safetensors", f"--input={tmp_path}/x.pt"])


def test_help_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "export" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    told = capsys.readouterr().out
    for name in (
        "safetensors",
        "pt2",
        "onnx",
        "openvino",
        "coreml",
        "semi_structured",
        "compressed",
        "--shrink",
        "--benchmark",
    ):
        assert name in told


def test_without_its_pruned_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cb = units({1: 0.5}, dirpath=str(tmp_path))
    module = Toy()
    trainer(tmp_path, cb, max_epochs=2).fit(module, **loaders())
    torch.save(torch.randn(5, FEATURES), tmp_path / "x.pt")
    given = [f"--input={tmp_path}/x.pt", "--module=tests.support.toy.Toy", "--shrink"]
    main(["export", str(tmp_path / "flops=0.50.ckpt"), "--to=safetensors", *given])
    folder = tmp_path / "export"
    assert {path.name for path in folder.iterdir()} == {
        "flops=0.50-shrunk.safetensors", "flops=0.50-shrunk.json", "exports.jsonl",
    }  # fmt: skip
    record = record_of(folder)
    assert record.shrunk
    assert record.dense_bytes is not None
    assert record.bytes < record.dense_bytes  # though it has a header
    small = load(folder / "flops=0.50-shrunk.safetensors", Toy().net)
    x = torch.randn(3, FEATURES)
    torch.testing.assert_close(small(x), module.eval()(x))


def test_a_shrunk_model_of_timm_is_made_again(tmp_path: Path) -> None:
    module = classifier()
    x = torch.randn(4, 3, 16, 16)
    torch.save(x, tmp_path / "x.pt")
    found = Units.from_model(module.model, x[:2])
    kept = {name: torch.arange(group.size) < max(1, group.size // 2) for name, group in found.items()}
    small = shrink(
        module.model, found.masks({n: tuple(p.shape) for n, p in module.model.named_parameters()}, kept), found, x
    )
    args = {"num_classes": 3, **VIT}
    Safetensors().export(small.eval(), tmp_path / "w.safetensors", x, metadata={"model_args": json.dumps(args)})
    torch.testing.assert_close(load(tmp_path / "w.safetensors")(x), small(x))
    assert len(list(tmp_path.iterdir())) == 4


def test_shrinking_needs_pruned_units(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--shrink: CKPT=.* is of no run that pruned units"):
        main(["export", saved(tmp_path, classifier()), "--to=safetensors", "--shrink"])
    assert not (tmp_path / "checkpoints/export").exists()


@pytest.mark.parametrize("error", [ConfigError("example_input=3: no."), KeyboardInterrupt()])
def test_a_failure_leaves_no_empty_folder_and_names_what_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: Safetensors, path: Path, *_: object, **__: object) -> None:
        (tmp_path / "a/b").mkdir(parents=True)
        raise error

    monkeypatch.setattr(Safetensors, "export", fail)
    with pytest.raises(BaseException, match="--input=3: no" if isinstance(error, ConfigError) else None):
        main(["export", saved(tmp_path, classifier()), "--to=safetensors", f"--output={tmp_path}/a/b"])
    assert not (tmp_path / "a").exists()


def test_a_damaged_state_is_told_without_words_of_training(tmp_path: Path) -> None:
    path = saved(tmp_path, classifier(), callbacks={"CAP": {"units": {}, "collection_index": 0, "version": 1}})
    with pytest.raises(
        SystemExit, match=r"CKPT=.* it has version 1.*Give another checkpoint, or leave --shrink out"
    ) as e:
        main(["export", path, "--to=safetensors", "--shrink"])
    assert "anew" not in str(e.value)
    assert "ckpt_path" not in str(e.value)


@pytest.mark.parametrize("to", ["torchao", "qdq"])
def test_the_integers_of_a_quantized_run(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    module = classifier()
    torch.save(torch.randn(4, 3, 16, 16), tmp_path / "x.pt")
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    state = {"QATCallback": {"version": 1, "quantized": layers}}
    checkpoint = saved(tmp_path, module, callbacks=state)
    main(["export", checkpoint, "--to", to, "--input", str(tmp_path / "x.pt")])
    record = record_of(tmp_path / "checkpoints/export")
    assert (record.format, record.zeros_equal, record.tolerance) == (to, record.weights, 0.05)
    if to == "qdq":
        main(["export", checkpoint, "--to=qdq", "--to.static=true", "--input", str(tmp_path / "x.pt")])
        assert record_of(tmp_path / "checkpoints/export").difference != record.difference
    capsys.readouterr()
    main(["export", checkpoint, "--to", "safetensors", "--input", str(tmp_path / "x.pt")])
    assert "trained with int8 weights; they are in float" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"to='{to}': no layer of the model was trained with int8 weights"):
        export(["--to", to, saved(tmp_path, module), "--input", str(tmp_path / "x.pt")])
