"""Training with soft masks: what is computed with, what becomes hard, and that nothing else of the run is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cap import CAPPruningCallback, PDPCallback, QATCallback
from lightning_cap.errors import CAPError, ConfigError, UnsupportedError
from lightning_cap.pruners import PDP, Magnitude
from lightning_cap.pruners.pdp import soft_mask, soft_threshold
from lightning_cap.schedules import OneShot, PQAdaptive
from tests.support.processes import as_by_torchrun
from tests.support.stopping import StatefulLoader
from tests.support.toy import TARGET, Toy, callback, loaders, trainer, zeros

TAU = 0.01


class Watch(pl.Callback):
    """Keeps, before each epoch and batch, the weights of the target, and how many are soft."""

    def __init__(self) -> None:
        self.begun: dict[int, Tensor] = {}
        self.soft: dict[int, int] = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun[trainer.current_epoch] = pl_module.net[4].weight.detach().clone()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        cb = next(c for c in trainer.callbacks if isinstance(c, CAPPruningCallback))
        assert isinstance(cb.pruner, PDP)
        self.soft[trainer.current_epoch] = cb.pruner.softened.get(TARGET, 0)


def fit(
    tmp_path: Path,
    pdp: PDPCallback,
    *more: Any,
    first: bool = False,
    epochs: int = 5,
    event: int = 4,
    data: Any = None,
    **own: Any,
) -> tuple[Toy, CAPPruningCallback]:
    pl.seed_everything(0, verbose=False)
    module, cb = (
        Toy(),
        callback(
            OneShot(0.75, epoch=None) if event == epochs else {event: 0.75},
            pruner=PDP(),
            dirpath=str(tmp_path / "ckpt"),
            **own,
        ),
    )
    both = [pdp, cb] if first else [cb, pdp]
    trainer(tmp_path, *more, *both, max_epochs=epochs).fit(module, **(data or loaders()))
    return module, cb


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("epochs", [4, 5], ids=["event at the end", "event before"])
def test_the_event_prunes_what_is_below_the_soft_masks(tmp_path: Path, first: bool, epochs: int) -> None:
    watch, held = Watch(), {}

    class Last(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.current_epoch == 3:
                held["weight"] = pl_module.net[4].weight.detach().clone()

    module, cb = fit(tmp_path, PDPCallback(1, tau=TAU), watch, Last(), first=first, epochs=epochs)
    assert list(watch.soft.values())[:4] == [0, 80, 160, 192]  # of 192: a share of 1.25 / 3 more each epoch
    weight = held["weight"]
    assert int((weight == 0).sum()) == 0
    threshold = soft_threshold(weight, 192)
    assert torch.equal(cb.masks[TARGET], soft_mask(weight, threshold, TAU) > 0.5)
    assert torch.equal(zeros(module), ~cb.masks[TARGET])
    if epochs == 4:
        assert torch.equal(module.net[4].weight, weight * cb.masks[TARGET])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())
    assert list(module.state_dict()) == list(Toy().state_dict())


def test_training_computes_with_soft_weights(tmp_path: Path) -> None:
    """One step of plain gradient descent, by hand."""

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)).double()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0].double()), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module, seen = Plain(), {}

    class Step(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.update(
                x=batch[0].double(), y=batch[1], state={n: p.clone() for n, p in pl_module.state_dict().items()}
            )

    class After(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen["after"] = {n: p.clone() for n, p in pl_module.state_dict().items()}

    cb = CAPPruningCallback(OneShot(0.5, epoch=None), PDP(), include=["net.1.weight"], save="none", evaluate=False)
    trainer(tmp_path, Step(), cb, PDPCallback(0, tau=TAU), After(), max_epochs=1, limit_train_batches=1,
            limit_val_batches=0).fit(module, train_dataloaders=loaders()["train_dataloaders"])  # fmt: skip
    before = seen["state"]
    leaves = {name: value.clone().requires_grad_() for name, value in before.items()}
    w = leaves["net.1.weight"]
    flat = before["net.1.weight"].abs().flatten().sort().values
    t = (flat[31] + flat[32]) / 2
    pair = torch.stack([(t * t).expand_as(w), w * w]) / TAU
    hidden = F.linear(F.linear(seen["x"], leaves["net.0.weight"], leaves["net.0.bias"]), pair.softmax(0)[1] * w)
    loss = F.cross_entropy(F.linear(hidden, leaves["net.2.weight"], leaves["net.2.bias"]), seen["y"])
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for (name, value), grad in zip(before.items(), grads, strict=True):
        assert torch.allclose(seen["after"][name], value - 0.5 * grad, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("step", [6, 10, 14])
def test_resume_in_the_middle_of_an_epoch_is_the_same(tmp_path: Path, step: int) -> None:
    """In the first soft epoch, in the next, and right before the event."""

    def data() -> dict[str, Any]:
        return {"train_dataloaders": StatefulLoader()}

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    include = ["net.?.weight"]
    whole, cb = fit(tmp_path / "whole", PDPCallback(1, tau=TAU), Save(), data=data(), include=include)
    fixed = cb.pruner.state_dict()["zeros"]
    held = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    assert list(held["state_dict"]) == list(Toy().state_dict())
    pl.seed_everything(1, verbose=False)
    module, cb = Toy(), callback({4: 0.75}, pruner=PDP(), dirpath=str(tmp_path / "resumed" / "ckpt"), include=include)
    trainer(tmp_path / "resumed", cb, PDPCallback(1, tau=TAU), max_epochs=5).fit(
        module, **data(), ckpt_path=str(tmp_path / "mid.ckpt")
    )
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in module.state_dict().items())
    assert cb.pruner.state_dict()["zeros"] == fixed
    assert {name: int((~mask).sum()) for name, mask in cb.masks.items()} == fixed
    assert (
        len({count / mask.numel() for (name, count), mask in zip(fixed.items(), cb.masks.values(), strict=True)}) == 3
    )


def test_validation_computes_with_soft_weights_too(tmp_path: Path) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            layer = pl_module.net[4]
            if not trainer.sanity_checking:
                soft = layer(torch.eye(16)).T - layer.bias[:, None]
                seen.append((trainer.current_epoch, soft.detach(), layer.weight.detach().clone()))

    _, cb = fit(tmp_path, PDPCallback(1, tau=TAU), Look(), evaluate=False)
    for epoch, soft, weight in seen:
        count = {1: 80, 2: 160, 3: 192}.get(epoch)
        mask = torch.ones_like(weight) if count is None else soft_mask(weight, soft_threshold(weight, count), TAU)
        assert torch.allclose(soft, weight * mask, atol=1e-6), epoch
    assert [epoch for epoch, *_ in seen] == [0, 1, 2, 3, 4]
    assert float((seen[3][1].abs() < 1e-3).float().mean()) > float((seen[3][2].abs() < 1e-3).float().mean())
    assert cb.masks[TARGET].float().mean() == 0.25


def fit_on_ranks(tmp_path: Path) -> dict[str, Tensor]:
    pl.seed_everything(0, verbose=False)
    module, cb = Toy(), callback({2: 0.75}, pruner=PDP(), dirpath=str(tmp_path / "ckpt"))
    trainer(tmp_path, cb, PDPCallback(0, tau=TAU), max_epochs=3, strategy="ddp", devices=2).fit(module, **loaders())
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.xdist_group("processes")
def test_two_processes(tmp_path: Path) -> None:
    one, other = as_by_torchrun(2, tmp_path, fit_on_ranks, tmp_path)
    assert all(torch.equal(one[name], other[name]) for name, _ in Toy().named_parameters())
    assert (one[TARGET] == 0).float().mean() == 0.75


def test_layers_that_are_swapped_are_softened_on(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pdp, used = PDPCallback(1, tau=TAU), {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            used[trainer.current_epoch] = TARGET in pdp._used

    module, _ = fit(tmp_path, pdp, QATCallback(2), Look())
    assert used == {0: False, 1: True, 2: True, 3: True, 4: False}
    assert zeros(module).float().mean() == 0.75


class Attends(Toy):
    """Has attention that reads the weights of a child itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.net[0] = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[:4](x)[:, None]
        return self.net[4:](self.attention(h, h, h, need_weights=False)[0][:, 0])  # type: ignore[no-any-return]


def test_attention_is_softened_too(tmp_path: Path) -> None:
    module, cb = Attends(), callback({1: 0.5}, pruner=PDP(), dirpath=str(tmp_path))
    watch, seen = PDPCallback(0, tau=TAU), {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen[trainer.current_epoch] = {*watch._used}

    trainer(tmp_path, cb, watch, Look(), max_epochs=2).fit(module, **loaders())
    assert {"attention.in_proj_weight", "attention.out_proj.weight", TARGET} <= seen[0]
    assert all(isinstance(p, nn.Parameter) for p in module.attention.parameters())


def test_another_fit_fixes_its_zeros_anew(tmp_path: Path) -> None:
    pruner = PDP()
    pruner.load_state_dict({"zeros": {TARGET: 3}})
    cb = callback({1: 0.75}, pruner=pruner, dirpath=str(tmp_path))
    trainer(tmp_path, cb, PDPCallback(), max_epochs=2).fit(Toy(), **loaders())
    assert cb.pruner.state_dict() == {"zeros": {TARGET: 192}}
    assert int((~cb.masks[TARGET]).sum()) == 192


def test_nothing_stays_on_a_module_whose_run_fails(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise RuntimeError("broken on purpose")

    pl.seed_everything(0, verbose=False)
    module = Toy()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(tmp_path, callback({1: 0.5}, pruner=PDP()), PDPCallback(0), Fail(), max_epochs=2).fit(
            module, **loaders()
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("pdp", "given", "words"),
    [
        (PDPCallback(), {"pruner": Magnitude()}, ("PDPCallback", "there are 0")),
        (PDPCallback(), {"schedule": {1: 0.5, 2: 0.7}}, ("schedule=SparsitySteps", "one goal")),
        (PDPCallback(), {"schedule": PQAdaptive(2, 2)}, ("schedule=PQAdaptive", "known before")),
        (PDPCallback(), {"num_recomputations": 2}, ("num_recomputations=2", "in one step")),
        (PDPCallback(2), {}, ("epoch=2", "Give an earlier one")),
        (PDPCallback(0, rate=0.1), {}, ("rate=0.1", "0.2 of the goal", "give 0.5 or more")),
    ],
    ids=["no PDP", "two goals", "an adapted goal", "two steps", "too late", "too slow"],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, pdp: PDPCallback, given: Any, words: Any) -> None:
    settings = {"schedule": {2: 0.5}, "pruner": PDP(), **given}
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, callback(**settings), pdp, max_epochs=3).fit(Toy(), **loaders())
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("what", ["a layer", "in place", "the module"])
def test_a_compiled_model_is_refused_before_training(tmp_path: Path, what: str) -> None:
    module: Any = Toy()
    if what == "a layer":
        module.net[4] = torch.compile(module.net[4], backend="eager")
    elif what == "in place":
        module.net.compile(backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    t = trainer(tmp_path, callback({2: 0.5}, pruner=PDP()), PDPCallback(1), max_epochs=3)
    with pytest.raises(UnsupportedError, match=r"is compiled.*without torch\.compile"):
        t.fit(module, **loaders())
    assert t.global_step == 0


def test_a_dry_run_passes_and_validate_needs_no_partner(tmp_path: Path) -> None:
    t = trainer(tmp_path, callback({20: 0.5}, pruner=PDP()), PDPCallback(10), max_epochs=30, fast_dev_run=True)
    t.fit(Toy(), **loaders())
    assert t.global_step == 1
    assert trainer(tmp_path, PDPCallback()).validate(Toy(), loaders()["val_dataloaders"], verbose=False)


def test_errors_are_ours() -> None:
    with pytest.raises(CAPError, match="tau=0"):
        PDPCallback(tau=0)
