"""A comparison takes up rows of an earlier run only where nothing has changed that they depend on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_cap.cli import CAPCLI
from lightning_cap.comparison import compare, fingerprint
from lightning_cap.comparison.fingerprint import canonicalize
from lightning_cap.comparison.variants import make_variants
from lightning_cap.pruners import Magnitude, Pruner
from tests.support.comparing import paths
from tests.support.processes import on_ranks
from tests.support.toy import Toy, ToyData, cap, trainer


class Own(Toy):
    """Brings its own data and settings."""

    def __init__(
        self, smoothing: float = 0.0, noise: float = 0.1, size: int = 64, place: Path = Path("a"), sizes: Any = (1, 2)
    ) -> None:
        super().__init__(scheduler=False)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.place, self.sizes = place, {"sizes": list(sizes)}
        self._noise, self._size = noise, size

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.criterion(self(batch[0]), batch[1])
        return loss

    def train_dataloader(self) -> Any:
        return DataLoader(ToyData(self._size, self._noise), batch_size=16)

    def val_dataloader(self) -> Any:
        return DataLoader(ToyData(32, noise=0.0), batch_size=16)


class WithHparams(Own):
    def __init__(self, config: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Data(pl.LightningDataModule):
    def __init__(self, classes: Any = ("a",), root: Path = Path("x")) -> None:
        super().__init__()
        self.classes, self.root = list(classes), root

    def train_dataloader(self) -> Any:
        return DataLoader(ToyData(), batch_size=16)

    def val_dataloader(self) -> Any:
        return DataLoader(ToyData(32, noise=0.0), batch_size=16)


def run(
    folder: Path, kind: type[Own] = Own, data: Any = None, pruners: Pruner | dict[str, Pruner] | None = None, **kw: Any
) -> Any:
    pl.seed_everything(0, verbose=False)
    return compare(trainer(folder), kind(**kw), pruners or cap(), [0.5], datamodule=data, folder=folder,
                   loss_samples=16)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"smoothing": 0.1},
        {"size": 80},
        {"noise": 0.2},  # private: seen in the first calibration batch alone
        {"place": Path("b")},
        {"sizes": (1, 3)},
        {"kind": WithHparams, "config": {"mixup": [0.1]}},
    ],
)
def test_what_the_module_is_set_to_makes_other_records(
    tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dict.fromkeys(("kind",), change["kind"]) if "kind" in change else {}
    run(tmp_path, **first)
    solved = paths(monkeypatch)
    run(tmp_path, **first)
    assert solved == []
    run(tmp_path, **change)
    assert solved == ["CAP/0"]


@pytest.mark.parametrize("change", [{"classes": ("a", "b")}, {"root": Path("y")}])
def test_so_does_what_the_datamodule_is_set_to(
    tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, data=Data(), pruners=Magnitude())
    solved = paths(monkeypatch)
    run(tmp_path, data=Data(), pruners=Magnitude())
    assert solved == []
    run(tmp_path, data=Data(**change), pruners=Magnitude())
    assert solved == ["Magnitude/0"]


def test_so_does_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, pruners=Magnitude())
    solved = paths(monkeypatch)
    monkeypatch.setattr(fingerprint, "__version__", "0.0.0")
    run(tmp_path, pruners=Magnitude())
    assert solved == ["Magnitude/0"]


def test_the_same_model_is_the_same_in_a_second_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Own(), Data()
    solved = paths(monkeypatch)
    for _ in range(2):
        compare(trainer(tmp_path), model, cap(), [0.5], datamodule=data, folder=tmp_path, loss_samples=16)
    assert solved == ["CAP/0"]


class Stateful(Data):
    """Keeps what it sets up in attributes, as many do."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train, self.mean = ToyData(), 0.5
        else:
            self.val = ToyData(32, noise=0.0)


def test_pruners_that_read_nothing_are_known_again_without_those_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both: dict[str, Pruner] = {"CAP": cap(), "GM": Magnitude()}
    first = run(tmp_path, data=Stateful(), pruners=both)
    solved, data = paths(monkeypatch), Stateful()
    for pruners in ({"GM": Magnitude()}, both, {"GM": Magnitude()}):
        found = run(tmp_path, data=data, pruners=pruners)
        assert found == [record for record in first if record.pruner in ("unpruned", *pruners)]
    assert solved == []


class Power:
    """A setting of the user's own without a ``repr``."""

    def __init__(self, value: Any) -> None:
        self._value = value


class Powered(Magnitude):
    def __init__(self, power: Power) -> None:
        super().__init__()
        self.power = power


def test_objects_without_a_repr_are_told_apart_by_their_attributes() -> None:
    (one,), (same,), (other,) = (make_variants({"p": Powered(Power(v))}, [0], None, 1) for v in (1.0, 1.0, 2.0))
    assert one.key == same.key != other.key


@dataclass
class Config:
    values: list[int] = field(default_factory=list)
    held: Any = None


def test_plain_descriptions() -> None:
    assert canonicalize({"a": [1, (2.0, None)], "b": Path("c")}) == {"{}": [["a", [1, [2.0, None]]], ["b", "c"]]}
    assert canonicalize({3, 1, 2}) == [1, 2, 3]
    assert canonicalize({1: "x"}) != canonicalize({2: "x"})
    pairs: list[tuple[Any, Any]] = [
        (Config([1]), Config([2])),
        (Config(held=Power(1.0)), Config(held=Power(2.0))),
        (torch.ones(2), torch.zeros(2)),
        (np.arange(2000), np.arange(2000)[::-1]),
        (partial(max, 1), partial(max, 2)),
        (lambda w: w + 1, lambda w: w * w),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        (torch.float32, torch.float64),
        (ToyData(8), ToyData(16)),
        (int, float),
    ]
    for one, other in pairs:
        assert canonicalize(one) == canonicalize(one)
        assert canonicalize(one) != canonicalize(other)
    loop = Power(1.0)
    loop.loop = loop  # type: ignore[attr-defined]
    assert "0x" not in str(canonicalize([loop, object(), trainer(".")]))


_DESCRIBE = """
from functools import partial
from pathlib import Path
import torch
from lightning_cap.comparison.fingerprint import checksum, canonicalize
values = [{'b', 'a', 'c'}, {Path('x'): {1, 'y'}}, partial(torch.relu, 1), object(), torch.ones(3)]
found = checksum(canonicalize(values))
"""


@pytest.mark.slow
def test_descriptions_do_not_change_from_process_to_process() -> None:
    """Not even where strings have other hashes, and sets another order."""
    here: dict[str, Any] = {}
    exec(_DESCRIBE, here)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", _DESCRIBE + "print(found)"]
    there = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == str(here["found"])


def _rank_identity() -> Any:
    class Apart(Own):
        def __init__(self) -> None:
            super().__init__()
            self.rank = torch.distributed.get_rank()

    from lightning_cap.sparsity.targets import Targets

    seen: list[Any] = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            with torch.inference_mode(False):
                seen.append(fingerprint.basis_of(trainer, pl_module, Targets.from_model(pl_module), True))

    pl.seed_everything(0, verbose=False)
    trainer(".", Look()).validate(Apart(), verbose=False)
    return seen


@pytest.mark.xdist_group("processes")
def test_all_ranks_have_the_identity_of_the_first(tmp_path: Path) -> None:
    one, two = on_ranks(2, tmp_path, _rank_identity)
    assert one == two
    assert one[0].calibration


def test_what_the_command_line_says_otherwise_is_no_setting() -> None:
    """jsonargparse gives modules functions that hold the whole CLI, and with it the command."""
    first, second = (object.__new__(CAPCLI) for _ in range(2))
    first.config, second.config = {"output_dir": "a"}, {"output_dir": "b"}
    hold = lambda cli, lr: partial(torch.optim.SGD, lr=lr, instantiators=[Power(cli)])  # noqa: E731 - two arguments
    assert canonicalize(hold(first, 0.1)) == canonicalize(hold(second, 0.1)) != canonicalize(hold(first, 0.2))
