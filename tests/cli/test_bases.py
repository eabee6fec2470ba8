from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_cap.cli import main
from lightning_cap.cli.bases import config_files, setting_names, with_bases, without_base
from lightning_cap.cli.run_config import RunConfig
from lightning_cap.data import DigitsDataModule
from lightning_cap.errors import ConfigError

WRONG = [
    ("base: 3\n", r"a.yaml': base=3: give a list of YAML files, such as base: \[parts/imagenet.yaml\]"),
    ("base: {a: b}\n", "base={'a': 'b'}: give a list"),
    ("base: []\n", r"base=\[\]: give a list"),
    ("base:\n", "base=None: give a list"),
    ("base: [1]\n", r"base=\[1\]: 1 is no file"),
    ("base: ['']\n", "'' is no file"),
    ("base: [[b.yaml]]\n", r"\['b.yaml'\] is no file"),
    ("base: [nowhere.yaml]\n", "a.yaml': base '.*nowhere.yaml': there is no such file"),
    ("base: [..]\n", "is a folder"),
    ("base: [a.yaml]\n", "a.yaml -> a.yaml is a circle"),
    ("base: [circle.yaml]\n", "a.yaml -> circle.yaml -> a.yaml is a circle"),
    ("base: [list.yaml]\n", "list.yaml' holds no settings"),
    ("base: [twice.yaml]\n", "'x' is given twice"),
    ("config: b.yaml\n", "a.yaml': 'config' in a file is not read. Name the files to build on by base"),
    ("base: [config.yaml]\n", "config.yaml': 'config' in a file is not read"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that build on each other: own.yaml on parts/middle.yaml and parts/second.yaml, both on parts/first.yaml."""
    (tmp_path / "parts").mkdir()
    files = {
        "own.yaml": "base: [parts/middle.yaml, parts/second.yaml]\nseed_everything: 4\n",
        "parts/middle.yaml": "base: first.yaml\nseed_everything: 2\ntrainer: {max_epochs: 2}\n",
        "parts/second.yaml": "base: [first.yaml]\ntrainer: {min_epochs: 1}\n",
        "parts/first.yaml": "seed_everything: 1\ndata: {class_path: DigitsDataModule, init_args: {batch_size: 8}}\n",
        "circle.yaml": "base: [a.yaml]\n",
        "list.yaml": "- 1\n",
        "twice.yaml": "x: 1\nx: 2\n",
        "config.yaml": "config: [x.yaml]\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def _names(args: list[str], folder: Path) -> list[str]:
    return [argument.replace(f"{folder}/", "") for argument in args]


def test_bases_come_first_and_once(folder: Path) -> None:
    names = ["parts/first.yaml", "parts/middle.yaml", "parts/second.yaml", "own.yaml"]
    assert config_files(folder / "own.yaml") == [folder / name for name in names]
    expected = ["fit", *(f"--config={name}" for name in names), "--x=1"]
    own = str(folder / "own.yaml")
    for given in (["--config", own], [f"--config={own}"], ["-c", own], [f"-c={own}"], [f"-c{own}"]):
        assert _names(with_bases(["fit", *given, "--x=1"]), folder) == expected
    again = with_bases(["fit", "--config", own, "--config", str(folder / "parts/second.yaml"), "--config", own])
    assert _names(again, folder)[1:] == [f"--config={name}" for name in (*names, "parts/second.yaml", "own.yaml")]
    assert with_bases(with_bases(["--config", own])) == with_bases(["--config", own])


def test_other_arguments_stay() -> None:
    args = ["fit", "--config={trainer: {max_epochs: 1}}", "--trainer.callbacks=a", "--ckpt_path", "c.ckpt", "--config"]
    assert with_bases(args) == args
    assert with_bases(["--config", "{" + "a: 1, " * 100 + "b: 2}"])[0].startswith("--config={a: 1")


def test_setting_names(folder: Path) -> None:
    assert setting_names(folder / "own.yaml") == {"seed_everything", "data", "trainer"}


def test_without_base_leaves_the_rest_as_it_is() -> None:
    text = "base: [a]\nlr: 1e-4\nquoted: '1e-4'\nsteps: &s {0: 0.4, 20: 0.50}\nmore: {<<: *s, 40: null}\nbase_x: on\n"
    kept = without_base(text)
    assert "base:" not in kept
    assert yaml.compose(kept, Loader=yaml.SafeLoader).value[0][1].value == "1e-4"
    assert yaml.safe_load(kept) == {k: v for k, v in yaml.safe_load(text).items() if k != "base"}
    assert yaml.safe_load(without_base('{"base": ["a"], "x": 1}')) == {"x": 1}
    for same in ("x: 1 # base\n", "model: {base: 1}\n", "base", "- base\n"):
        assert without_base(same) == same


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_wrong_bases(folder: Path, text: str, words: str) -> None:
    (folder / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        with_bases(["fit", "--config", str(folder / "a.yaml")])


@pytest.mark.parametrize(("text", "words"), [("base: [a.yaml]", "'base' is for files"), ("config: x", "'config'")])
def test_wrong_keys_in_no_file(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--config: {words}"):
        with_bases(["fit", f"--config={{{text}}}"])


def test_a_run_is_configured_by_all_of_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Later files win; callbacks of several files come together by ``callbacks+``; what is saved has no ``base``."""
    callback = (
        "- class_path: lightning.pytorch.callbacks.LearningRateMonitor\n      init_args: {logging_interval: %s}\n"
    )
    (folder / "parts/second.yaml").write_text(
        f"base: [first.yaml]\ntrainer:\n  callbacks:\n    {callback % 'epoch'}  min_epochs: 1\n"
    )
    (folder / "own.yaml").write_text(
        f"base: [parts/middle.yaml, parts/second.yaml]\nmodel: {{class_path: VisionClassifier, init_args: "
        f"{{model: deit_tiny_patch16_224}}}}\ntrainer:\n  callbacks+:\n    {callback % 'step'}"
    )
    with pytest.raises(SystemExit):
        main(["fit", f"--config={folder / 'own.yaml'}", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert not {"base", "config"} & printed.keys()
    assert printed["seed_everything"] == 2
    assert (printed["trainer"]["max_epochs"], printed["trainer"]["min_epochs"]) == (2, 1)
    assert printed["data"]["init_args"]["batch_size"] == 8
    assert [c["init_args"]["logging_interval"] for c in printed["trainer"]["callbacks"]] == ["epoch", "step"]


def test_the_configuration_of_an_export_has_bases_too(folder: Path) -> None:
    (folder / "own.yaml").write_text("base: [parts/second.yaml]\ndata: {init_args: {num_workers: 0, seed: 3}}\n")
    config = RunConfig(folder / "own.yaml")
    data = config.make_data()
    assert (config.has_data, config.has_model) == (True, False)
    assert isinstance(data, DigitsDataModule)
    assert (data.batch_size, data.seed) == (8, 3)
