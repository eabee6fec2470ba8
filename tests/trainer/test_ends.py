from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_cap.sparsity.ends import Ends
from lightning_cap.sparsity.layer_graph import Flow, trace
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.ends import agree_on_ends, find_module_ends
from lightning_cap.utilities import distributed
from tests.support.distilling import STUDENT_TARGETS, Student
from tests.support.toy import Toy, loaders, trainer
from tests.support.watch import generators


class Look(pl.Callback):
    """Asks for the ends when training starts, and notes what they are and what the asking changed."""

    def __init__(self) -> None:
        self.ends: Ends | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        before = generators()
        self.ends = find_module_ends(trainer, pl_module, 0)
        assert generators() == before
        assert all(torch.equal(value, state[name]) for name, value in pl_module.state_dict().items())
        assert all(p.grad is None for p in pl_module.parameters())
        assert pl_module.training
        assert pl_module.batches == []


def ends_of(path: Path, module: Toy, **kwargs: Any) -> Ends:
    look = Look()
    trainer(path, look, max_epochs=1, limit_train_batches=1, **kwargs).fit(module, **loaders())
    assert look.ends is not None
    return look.ends


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_student_in_a_trainer(tmp_path: Path, precision: Any) -> None:
    ends = ends_of(tmp_path, Student(), precision=precision)
    assert set(ends.first) == {"net.0.weight", "teacher.0.weight"}
    assert set(ends.last) == {"net.6.weight", "aux.weight", "teacher.2.weight"}
    assert list(Targets.from_model(Student(), ends=ends)) == STUDENT_TARGETS


def test_only_a_few_samples_are_read(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Counting(Toy):
        def calibration_step(self, batch: Any, batch_idx: int) -> Any:
            sizes.append(len(batch[0]))
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    assert ends_of(tmp_path, Counting()).last == ("net.6.weight",)
    assert sizes == [8]


def test_a_loss_that_is_there_in_training_mode_alone(tmp_path: Path) -> None:
    """As that of a detector; here with two heads that are registered first."""

    class Detector(Toy):
        def __init__(self) -> None:
            super().__init__()
            net = self._modules.pop("net")
            self.box, self.kind = nn.Linear(16, 4), nn.Linear(16, 4)
            self.net = net[:-1]

        def forward(self, x: Any) -> Any:
            return self.kind(self.net(x))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            hidden = self.net(batch[0])
            losses = {"box": self.box(hidden).square().mean(), "kind": self.kind(hidden).square().mean()}
            return sum((losses if self.net.training else {}).values()) or losses["none"]

    ends = ends_of(tmp_path, Detector())
    assert (ends.first, ends.last, ends.by_order) == (("net.0.weight",), ("box.weight", "kind.weight"), "")


def test_order_decides_where_there_is_no_loss(tmp_path: Path) -> None:
    class Broken(Student):
        def calibration_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("not\nhere")

    class Manual(Student):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    ends = ends_of(tmp_path, Broken())
    assert (ends.first, ends.last) == (("aux.weight",), ("teacher.2.weight",))
    assert ends.by_order == "the forward pass failed (ValueError: not here)"
    assert "automatic_optimization=False" in ends_of(tmp_path, Manual()).by_order


def test_all_processes_decide_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    flow = trace(model, lambda: model(torch.ones(1, 2)))
    others: list[Any] = [(None, "")]
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, *others])
    assert agree_on_ends(model, lambda: flow) == Ends(("0.weight",), ("2.weight",))
    others[:] = [(Flow({"0": set(), "1": {"2"}}, {"0", "1"}), "")]  # they ran in another order there
    assert agree_on_ends(model, lambda: flow) == Ends(("0.weight",), ())
    others[:] = [(None, "ValueError: away")]
    assert agree_on_ends(model, lambda: flow).by_order == "the forward pass failed (ValueError: away)"
    others[:] = [(None, "")]
    assert agree_on_ends(model, lambda: None).by_order == "there is no batch for a forward pass"
