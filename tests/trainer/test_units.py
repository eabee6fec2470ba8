from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.sparsity import Cost, Units
from lightning_cap.trainer.units import feed, find_module_units, inner_model, prepare_cost, renamed
from lightning_cap.utilities import distributed
from tests.support.distilling import Student
from tests.support.toy import Toy, loaders, trainer
from tests.support.units import small_units
from tests.support.watch import generators


class Look(pl.Callback):
    """Asks for something when training starts, and looks that the asking has left no trace."""

    def __init__(self, ask: Any) -> None:
        self.ask, self.found = ask, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        before = generators()
        self.found = self.ask(trainer, pl_module)
        assert generators() == before
        assert all(torch.equal(value, state[name]) for name, value in pl_module.state_dict().items())
        assert all(p.grad is None for p in pl_module.parameters())
        assert pl_module.training
        assert not any(m._forward_pre_hooks for m in pl_module.modules())


def asked(path: Path, module: Toy, ask: Any, **kwargs: Any) -> Any:
    look = Look(ask)
    trainer(path, look, max_epochs=1, limit_train_batches=1, **kwargs).fit(module, **loaders())
    return look.found


def units_of(path: Path, module: Toy, *globs: Any, **kwargs: Any) -> Units:
    found: Units = asked(path, module, lambda t, m: find_module_units(t, m, *(globs or (None, None)), 0), **kwargs)
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_names_are_those_in_the_module(tmp_path: Path, precision: Any) -> None:
    units = units_of(tmp_path, Toy(), precision=precision)
    assert units.sizes == {"net.0": 16, "net.4": 16}
    assert {part.name for part in units["net.0"].slices} == {
        "net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.4.weight",
    }  # fmt: skip
    assert {part.name for part in units["net.0"].buffers} == {"net.1.running_mean", "net.1.running_var"}
    assert [layer.name for layer in units.layers] == ["net.0", "net.4", "net.6"]
    assert set(units.targets(Toy())) < {name for name, _ in Toy().named_parameters()}


@pytest.mark.parametrize(("include", "exclude"), [(["net.4"], None), (["4"], None), (None, ["net.0"]), (["*"], ["0"])])
def test_globs_with_and_without_the_name_of_the_model(tmp_path: Path, include: Any, exclude: Any) -> None:
    assert list(units_of(tmp_path, Toy(), include, exclude)) == ["net.4"]


class Distilled(Toy):
    """A teacher that does not train, and a model that takes some arguments by name."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, x: Any, scale: float, shift: Any = None) -> Any:
            return self.b(self.a(x).relu() * scale) + (0 if shift is None else shift)

    def __init__(self) -> None:
        super().__init__()
        self.teacher = self.net.requires_grad_(False)
        del self.net
        self.student = self.Net()

    def forward(self, x: Any) -> Any:
        return self.student(x, 2.0, shift=self.teacher(x))


def test_the_model_that_trains_and_what_it_gets(tmp_path: Path) -> None:
    fed = asked(tmp_path, Distilled(), lambda t, m: feed(t, m, 0))
    assert fed.prefix == "student."
    assert {name: getattr(value, "shape", value) for name, value in fed.inputs.items()} == {
        "x": (8, 12), "scale": 2.0, "shift": (8, 4),
    }  # fmt: skip
    assert not fed.inputs["shift"].requires_grad
    assert units_of(tmp_path, Distilled()).sizes == {"student.a": 8}


def test_where_no_part_has_all_weights_the_module_is_the_model(tmp_path: Path) -> None:
    module = Student()
    assert inner_model(module) == ("", module)

    class Two(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.head(self.net(x).relu())

    assert sum(units_of(tmp_path, Two()).sizes.values()) == 16 + 16 + 4


def test_compiled_models_are_looked_into() -> None:
    module = Toy()
    net = module.net
    module.net = torch.compile(net)  # type: ignore[assignment]
    assert inner_model(module) == ("net", net)


def test_other_names_and_back() -> None:
    units = small_units()
    there = renamed(units, lambda name: f"net.{name}")
    assert list(there) == [f"net.{name}" for name in units]
    assert {group for layer in there.layers for width in layer.widths for group in width.per_unit} <= set(there)
    back = renamed(there, lambda name: name.removeprefix("net."))
    assert str(back.state_dict()) == str(units.state_dict())


def test_a_rank_without_a_batch_takes_what_rank_0_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Units.from_model(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 2)).state_dict()
    monkeypatch.setattr("lightning_cap.trainer.units.follow_a_batch", lambda *_: None)
    with pytest.raises(ConfigError, match=r"model=Toy\.net: there is no calibration batch"):
        units_of(tmp_path, Toy())
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [own, mine])
    monkeypatch.setattr(distributed, "raise_on_all_ranks", lambda what: nullcontext())
    module = Toy()
    assert find_module_units(trainer(tmp_path), module, None, None, 0).sizes == {"0": 3}


def test_what_cannot_be_found_out_is_refused(tmp_path: Path) -> None:
    class Parts(Toy):
        def forward(self, x: Any) -> Any:
            return self.net[3:](self.net[:3](x))

    class Mixed(Distilled):
        def forward(self, x: Any) -> Any:
            return self.student(x, 2.0)

        class Net(Distilled.Net):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

    with pytest.raises(UnsupportedError, match=r"model=Parts\.net: the training step calls parts"):
        units_of(tmp_path, Parts())
    Mixed.forward = Distilled.forward  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=r"model=Net: it is called with 2 arguments by place and others by name"):
        units_of(tmp_path, Mixed())
    with pytest.raises(ConfigError, match="include"):
        units_of(tmp_path, Toy(), ["nothing"], None)


class Measured(Cost):
    """Remembers what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def prices(self, shapes: Any) -> Any:
        raise NotImplementedError

    def prepare(self, model: nn.Module, units: Units, example_input: Any, folder: Path | None = None) -> None:
        self.given.append((model, list(units), [value.shape for value in example_input], folder))


def test_a_cost_measures_the_model_that_is_fed(tmp_path: Path) -> None:
    cost, module = Measured(), Toy()
    units = units_of(tmp_path, Toy())
    asked(tmp_path, module, lambda t, m: prepare_cost(t, m, cost, units, 0, tmp_path))
    assert cost.given == [(module.net, ["0", "4"], [(8, 12)], tmp_path)]
