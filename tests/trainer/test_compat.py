"""Names inside other packages: in one file, and an error with the versions where one is missing."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, StochasticWeightAveraging, TQDMProgressBar
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

import lightning_cap
from lightning_cap.calibration import LayerInputs
from lightning_cap.comparison import compare
from lightning_cap.errors import UnsupportedError
from lightning_cap.pruners import Magnitude
from lightning_cap.sparsity import Targets
from lightning_cap.trainer import compat
from tests.support import ROOT
from tests.support.toy import Toy, ToyData, callback, loaders, trainer

PACKAGE = Path(lightning_cap.__file__).parent
TORCHS = {  # private names of torch's and argparse's, which this is not about
    "_actions",
    "_backward_hooks",
    "_BatchNorm",
    "_ConvNd",
    "_ConvTransposeNd",
    "_NormBase",
    "_compiled_call_impl",
    "_foreach_mul_",
    "_foreach_zero_",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_input_metadata",
    "_last_lr",  # what get_last_lr of every scheduler gives
    "_modules",
    "_orig_mod",
    "_parameters",
    "_pytree",
    "_python_dispatch",
    "_replace",  # of named tuples
    "_reversed_padding_repeated_twice",
    "_saved_dim",
    "_saved_pad",
    "_saved_self_sym_sizes",
    "_step_supports_amp_scaling",  # of fused optimizers
    "_scaled_dot_product_flash_attention_for_cpu",
}
ALLOWED = {
    "sparsity/unit_graph.py": {"_helpers", "_HybridIndex"},  # what torch-pruning's index mappings take
    "tokens/vision_transformer.py": {"_pos_embed"},  # the only way to timm's tokens; looked up when a model is made
}

Break = Callable[[pl.Trainer, pytest.MonkeyPatch], None]


def without_method(name: str) -> Break:
    return lambda t, patch: patch.delattr(pl.LightningModule, name)


def without_loop(*path: str) -> Break:
    """Lightning's own loops without an attribute; the last of a path from the loop of ``fit``."""

    def remove(t: pl.Trainer, patch: pytest.MonkeyPatch) -> None:
        owner: Any = t.fit_loop
        for name in path[:-1]:
            owner = getattr(owner, name)
        patch.delattr(owner if path[-1] in vars(owner) else type(owner), path[-1])

    return remove


def without_constant(constant: str) -> Break:
    """A callback that sets its attributes anew, so that the name which is looked for is changed instead."""
    return lambda t, patch: patch.setattr(compat, constant, "_not_there")


def without_bar(kind: type[pl.Callback], name: str) -> Break:
    def remove(t: pl.Trainer, patch: pytest.MonkeyPatch) -> None:
        bar = kind()
        patch.setattr(type(t), "progress_bar_callback", bar)
        patch.delattr(bar if name in vars(bar) else kind, name)

    return remove


NEEDED = [
    ("_on_before_batch_transfer", without_method("_on_before_batch_transfer")),
    ("epoch_loop", without_loop("epoch_loop")),
    ("val_loop", without_loop("epoch_loop", "val_loop")),
    ("setup_data", without_loop("epoch_loop", "val_loop", "setup_data")),
    ("_signal_connector", lambda t, patch: patch.delattr(t, "_signal_connector")),
    ("epoch_progress", without_loop("epoch_progress")),
    ("batch_progress", without_loop("epoch_loop", "batch_progress")),
    ("scheduler_progress", without_loop("epoch_loop", "scheduler_progress")),
    ("optim_progress", without_loop("epoch_loop", "automatic_optimization", "optim_progress")),
    ("_not_there", without_constant("_AVERAGE")),
    ("progress", without_bar(RichProgressBar, "progress")),
    ("process_position", without_bar(TQDMProgressBar, "process_position")),
    ("BAR_FORMAT", without_bar(TQDMProgressBar, "BAR_FORMAT")),
]


def averaging() -> pl.Callback:
    return StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=3)


@pytest.mark.parametrize(("name", "remove"), NEEDED, ids=[name for name, _ in NEEDED])
def test_the_check_of_a_run_finds_each_missing_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remove: Break
) -> None:
    t = trainer(tmp_path, averaging())
    compat.check_run(t, Toy(), resumed=True)
    remove(t, monkeypatch)
    with pytest.raises(UnsupportedError, match=f"has no '{name}'"):
        compat.check_run(t, Toy(), resumed=False)


@pytest.mark.parametrize("name", ["restarted_mid_epoch", "_data_fetcher"])
def test_the_check_of_a_resumed_run_finds_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    t = trainer(tmp_path)
    without_loop(name)(t, monkeypatch)
    compat.check_run(t, Toy(), resumed=False)
    with pytest.raises(UnsupportedError, match=f"FitLoop has no '{name}'"):
        compat.check_run(t, Toy(), resumed=True)


@pytest.mark.parametrize("remove", [without_method("_on_before_batch_transfer"), without_constant("_AVERAGE")])
def test_a_run_without_a_name_that_it_needs_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: Break
) -> None:
    module, t = Toy(), trainer(tmp_path, callback({3: 0.5}, pruner=Magnitude()), averaging())
    remove(t, monkeypatch)
    with pytest.raises(UnsupportedError):
        t.fit(module, **loaders())
    assert module.batches == []


def test_a_resumed_run_without_a_name_that_it_needs_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new(*more: pl.Callback) -> pl.Trainer:
        prunes = callback({2: 0.5}, pruner=Magnitude())
        return trainer(tmp_path, prunes, *more, max_epochs=3, enable_checkpointing=bool(more))

    new(ModelCheckpoint(dirpath=tmp_path, filename="first")).fit(Toy(), **loaders())
    module, t = Toy(), new()
    without_loop("restarted_mid_epoch")(t, monkeypatch)
    with pytest.raises(UnsupportedError, match="FitLoop has no 'restarted_mid_epoch'"):
        t.fit(module, **loaders(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert module.batches == []


def test_what_a_run_does_not_need_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path, callback({1: 0.5}, pruner=Magnitude()), max_epochs=2)
    without_loop("_data_fetcher")(t, monkeypatch)
    monkeypatch.delattr("lightning.pytorch.strategies.launchers._MultiProcessingLauncher")
    module = Toy()
    t.fit(module, **loaders())
    assert len(module.batches) == 8
    assert not compat.spawns_processes(t)


def test_the_line_in_a_bar_needs_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("lightning.pytorch.callbacks.progress.tqdm_progress.Tqdm")
    with pytest.raises(UnsupportedError, match=r"tqdm_progress has no 'Tqdm'"):
        compat.tqdm_line(TQDMProgressBar(), "CAP")


def test_a_comparison_needs_the_launcher_only_of_a_strategy_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawning = trainer(tmp_path, devices=2, strategy="ddp_spawn")
    assert compat.spawns_processes(spawning)
    monkeypatch.delattr("lightning.pytorch.strategies.launchers._MultiProcessingLauncher")
    data = pl.LightningDataModule.from_datasets(ToyData(), ToyData(), batch_size=8)
    with pytest.raises(UnsupportedError, match=r"launchers has no '_MultiProcessingLauncher'"):
        compare(spawning, Toy(), Magnitude(), [0.5], folder=tmp_path, datamodule=data)


def test_the_error_says_all_that_a_report_needs() -> None:
    with pytest.raises(UnsupportedError) as caught:
        compat._look_up(object(), "_gone")
    message = str(caught.value)
    for part in (f"lightning {pl.__version__}", f"torch {torch.__version__}", "object has no '_gone'", *compat.TESTED):
        assert part in message
    assert "pip install 'lightning>=2.5.0,<=2.6.6,!=2.6.2,!=2.6.3'" in message


def test_the_tested_versions_are_those_that_are_installed() -> None:
    dependency = re.search(r'"lightning(>=.*?)"', (ROOT / "pyproject.toml").read_text())
    assert dependency is not None
    oldest, newest = (tuple(map(int, version.split("."))) for version in compat.TESTED)
    assert dependency[1] == f">={oldest[0]}.{oldest[1]},!=2.6.2,!=2.6.3,<{newest[0]}.{newest[1] + 1}"
    assert oldest[2] == 0


# Averages


class Mine(pl.Callback):
    """Another callback that averages, under Lightning's name for it."""

    def __init__(self, model: nn.Module | None) -> None:
        self._average_model = model


def test_averages_are_found_with_and_without_lightnings_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average = nn.Linear(2, 2)
    t = trainer(tmp_path, Mine(None), Mine(average), pl.Callback())
    assert compat.averaged_models(t) == [average]
    monkeypatch.delattr("lightning.pytorch.callbacks.WeightAveraging", raising=False)  # as in Lightning 2.5
    assert compat.averaged_models(t) == [average]
    assert compat.averaged_models(trainer(tmp_path)) == []


# Samplers


def by_hand(sampler: Any) -> DataLoader[Any]:
    return DataLoader(ToyData(16, noise=0.0), batch_size=4, sampler=sampler)


def by_batches(sampler: Any) -> DataLoader[Any]:
    return DataLoader(ToyData(16, noise=0.0), batch_sampler=BatchSampler(sampler, 4, drop_last=False))


@pytest.mark.parametrize("load", [by_hand, by_batches])
def test_a_sampler_draws_the_same_inside_lightnings_own(load: Callable[[Any], DataLoader[Any]]) -> None:
    def drawn(sampler: Any) -> torch.Tensor:
        loader = load(sampler)
        batches = LayerInputs(16).batches(
            loader, Targets(dict(Toy().net.named_parameters())), (0, 0), compat.inner_sampler(loader)
        )
        return torch.cat([y for _, y in batches])

    sampler = WeightedRandomSampler([1.0, 0.0, 2.0, 0.0] * 4, 16)
    wrapped = UnrepeatedDistributedSamplerWrapper(sampler, num_replicas=2, rank=1)
    assert compat.inner_sampler(load(wrapped)) is sampler
    assert torch.equal(drawn(wrapped), drawn(sampler))
    assert set(drawn(wrapped).tolist()) == {0, 2}
    plain = RandomSampler(range(16))
    assert compat.inner_sampler(load(plain)) is None
    assert sorted(drawn(plain).tolist()) == sorted([0, 1, 2, 3] * 4)


def test_a_sampler_inside_another_attribute_is_not_passed_over() -> None:
    wrapped = UnrepeatedDistributedSamplerWrapper(RandomSampler(range(8)), num_replicas=2, rank=0)
    del wrapped.dataset._sampler
    with pytest.raises(UnsupportedError, match="has no '_sampler'"):
        compat.inner_sampler(by_hand(wrapped))


# One place


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def used(tree: ast.AST) -> set[str]:
    """Private names that a source takes from other things than ``self``: attributes, imports, and strings, as for ``getattr``."""
    names: list[str] = []
    texts = [part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names += [node.attr] if ast.unparse(node.value) not in ("self", "cls") else []
        elif isinstance(node, ast.ImportFrom):
            names += [part for part in str(node.module).split(".") if node.level == 0]
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            names += [node.value]
    return {name for name in names if is_private(name)}


def defined(tree: ast.AST) -> set[str]:
    """Names that a source gives to functions, classes, variables, and attributes of ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) == "self" else set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
OWN = set().union(*(defined(tree) for tree in TREES.values()))
LIGHTNINGS = used(TREES["trainer/compat.py"])


@pytest.mark.parametrize("name", sorted(TREES.keys() - {"trainer/compat.py"}))
def test_private_names_of_other_packages_are_in_one_place(name: str) -> None:
    files = {"_version", *(path.stem for path in PACKAGE.rglob("_*.py"))}
    assert used(TREES[name]) - OWN - TORCHS - ALLOWED.get(name, set()) - files == set()
    functions = {node.name for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)}
    assert (used(TREES[name]) | functions) & LIGHTNINGS == set()


def test_classes_of_ours_take_no_private_name_of_their_bases() -> None:
    for info in pkgutil.walk_packages(lightning_cap.__path__, "lightning_cap."):
        if info.name == "lightning_cap.kernels.triton":
            continue
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            bases = [b for b in kind.__mro__ if b.__module__.split(".")[0] in ("lightning", "timm", "torchmetrics")]
            if kind.__module__ == info.name and bases:
                taken = {name for name in vars(kind) if is_private(name) and any(name in vars(b) for b in bases)}
                assert taken - {"_abc_impl"} == set(), f"{kind.__qualname__}: {taken}"


def test_an_asynchronous_plugin_that_tears_files_is_refused() -> None:
    class Old:  # Lightning before 2.5.4
        pass

    with pytest.raises(UnsupportedError, match=r"AsyncCheckpointIO.*lightning >= 2\.5\.4"):
        compat.refuse_unsafe_async_io(Old())  # type: ignore[arg-type]


def test_the_reader_of_names_sees_all_forms() -> None:
    source = """
import timm._version
from lightning.pytorch.strategies.launchers import _Launcher
self._own = trainer._private
getattr(trainer, "_quoted", None)
"a text with _words in it", f"{self._own}_end"
"""
    assert used(ast.parse(source)) == {"_version", "_Launcher", "_private", "_quoted"}
    assert defined(ast.parse(source)) == {"_own"}
    assert {"_on_before_batch_transfer", "_data_fetcher", "_sampler", "_MultiProcessingLauncher"} <= LIGHTNINGS
