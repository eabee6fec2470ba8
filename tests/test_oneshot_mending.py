"""`prune` with healing and new statistics of batch norm."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cap import prune
from lightning_cap.errors import ConfigError
from lightning_cap.healing import DistillHeal, LayerwiseHeal
from lightning_cap.healing.batchnorm import estimate_statistics
from lightning_cap.pruners import CAP, CAPUnits, DropAndGrow, Magnitude, Pruner
from lightning_cap.utilities import distributed
from tests.support.mending import Shift, normalized_net
from tests.support.processes import on_ranks
from tests.support.toy import CLASSES, FEATURES, loss, plain_net

TARGET = "4.weight"


def data(count: int = 4) -> list[Any]:
    torch.manual_seed(5)
    return [(torch.randn(16, FEATURES), torch.randint(CLASSES, (16,))) for _ in range(count)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def test_healing_follows_every_step_and_is_told_of_the_dense_model() -> None:
    net, heal = normalized_net(), Shift()
    before = state(net)
    result = prune(net, data(), loss, 0.75, Magnitude(), num_recomputations=2, heal=heal, progress=False)
    assert [float((~call["masks"][TARGET]).float().mean()) for call in heal.calls] == [0.5, 0.75]
    for call in heal.calls:
        assert torch.equal(call["dense"][TARGET], before[TARGET])
        assert torch.equal(call["dense"]["4.bias"], before["4.bias"])
        assert call["training"] is False
    assert net.training
    assert changed(net, before) == {TARGET, "4.bias"}
    torch.testing.assert_close(net[4].bias, before["4.bias"] + 0.02)
    assert torch.equal(result.weights[TARGET], net[4].weight)
    assert bool((net[4].weight[~result.masks[TARGET]] == 0).all())


def test_a_model_that_is_sparser_already_is_not_healed() -> None:
    net, heal = normalized_net(), Shift()
    prune(net, data(), loss, 0.75, Magnitude(), progress=False)
    before = state(net)
    with pytest.warns(UserWarning, match=r"the model is already at 0\.75"):
        prune(net, data(), loss, 0.5, Magnitude(), heal=heal, progress=False)
    assert heal.calls == []
    assert changed(net, before) == set()


@pytest.mark.parametrize("given", ["pruner", "argument"])
def test_a_heal_is_given_with_the_pruner_or_beside_it(given: str) -> None:
    net, heal = plain_net(), Shift()
    own = heal if given == "pruner" else Shift(fails_at=0)
    prune(net, data(), loss, 0.5, Magnitude(heal=own), heal=None if given == "pruner" else heal, progress=False)
    assert len(heal.calls) == 1


def test_healing_by_layers_brings_outputs_nearer() -> None:
    want = plain_net()(data()[0][0]).detach()
    apart = []
    for heal in (None, LayerwiseHeal(num_inputs=64)):
        net = plain_net()
        prune(net, data(), loss, 0.6, Magnitude(), heal=heal, progress=False)
        apart.append(float((net(data()[0][0]).detach() - want).square().mean()))
    assert apart[1] < 0.7 * apart[0]


def test_what_healing_tells_is_with_the_result(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, CLASSES))

    def attending(model: Any, batch: Any) -> Tensor:
        x = model[0](batch[0])
        return nn.functional.cross_entropy(model[2](model[1](x, x, x)[0]), batch[1])

    include = ["0.weight", "1.in_proj_weight"]
    heal = LayerwiseHeal(num_inputs=64)
    with caplog.at_level(logging.INFO):
        result = prune(net, data(), attending, 0.5, Magnitude(), include, heal=heal, progress=False)
    assert result.stats["heal_output_error_after"] < result.stats["heal_output_error_before"]
    assert "heal: 1.in_proj_weight is left as it was pruned" in caplog.text


@pytest.mark.parametrize("readable", [True, False])
def test_the_better_of_two_rankings_is_taken(readable: bool) -> None:
    losses = {}
    for ranking in ("marginal", "cumulative", "auto"):
        net = plain_net()
        pruner = CAP(block_size=16, num_gradients=64, damp=1e-5, ranking=ranking)
        batches = data() if readable else iter(data())
        prune(net, batches, loss, 0.7, pruner, progress=False)
        losses[ranking] = float(sum(loss(net, batch).detach() for batch in data()))
    assert losses["marginal"] != losses["cumulative"]
    assert losses["auto"] == (min(losses.values()) if readable else losses["marginal"])


def test_recalibration_estimates_the_statistics_of_the_pruned_model() -> None:
    net = normalized_net()
    before = state(net)
    prune(net, data(), loss, 0.75, Magnitude(), recalibrate=True, progress=False)
    assert changed(net, before) == {TARGET, *(f"{n}.running_{kind}" for n in (2, 5) for kind in ("mean", "var"))}
    assert net.training
    found = estimate_statistics(net.eval(), data(), loss)
    assert torch.equal(net[5].running_mean, found.mean["5"].float())


def test_failures_put_everything_back() -> None:
    late = iter(range(100))

    def fails(model: nn.Module, batch: Any) -> Tensor:
        if next(late) > 5:
            raise RuntimeError("recalibration failed")
        return loss(model, batch)

    for kwargs, message in (
        ({"heal": Shift(fails_at=1), "num_recomputations": 2, "loss_fn": loss}, "healing failed"),
        ({"heal": Shift(), "recalibrate": True, "loss_fn": fails}, "recalibration failed"),
    ):
        net = normalized_net()
        before = state(net)
        with pytest.raises(RuntimeError, match=message):
            prune(net, data(8), sparsity=0.75, pruner=Magnitude(), progress=False, **kwargs)  # type: ignore[arg-type]
        assert not changed(net, before)
        assert net.training


def test_a_failure_puts_back_all_that_distillation_moves() -> None:
    seen = iter(range(100))

    def fails(model: nn.Module, batch: Any) -> Tensor:
        if next(seen) > 20:
            raise RuntimeError("too late")
        return loss(model, batch)

    heal = DistillHeal(num_inputs=32, steps=30, batch_size=16, lr=1e-2)
    for given in (fails, loss):
        net = normalized_net()
        before = state(net)
        arguments: dict[str, Any] = {"sparsity": 0.75, "pruner": Magnitude(), "heal": heal, "progress": False}
        if given is fails:
            with pytest.raises(RuntimeError, match="too late"):
                prune(net, data(), fails, **arguments)
            assert not changed(net, before)
        else:
            prune(net, data(), loss, **arguments)
            assert changed(net, before) == set(dict(net.named_parameters()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heal": "layerwise", "batches": iter(data())}, "heal=LayerwiseHeal.* can be read only once"),
        ({"recalibrate": True, "batches": iter(data())}, "recalibrate=True: .* can be read only once"),
        ({"heal": "layerwise", "pruner": CAPUnits()}, "heal=LayerwiseHeal.*: CAPUnits prunes units"),
        ({"heal": "layerwise", "pruner": DropAndGrow()}, "heal=LayerwiseHeal.*: DropAndGrow brings weights back"),
    ],
    ids=["iterator", "iterator for batch norm", "units", "regrowing"],
)
def test_what_cannot_be_healed_is_refused(kwargs: Any, message: str) -> None:
    given = {"model": plain_net(), "batches": data(), "loss_fn": loss, "sparsity": 0.5, "pruner": Magnitude(), **kwargs}
    with pytest.raises(ConfigError, match=message):
        prune(**given, progress=False)


def test_a_pruner_knows_its_heal_by_name() -> None:
    assert CAP(heal="layerwise").heal == LayerwiseHeal()
    assert CAP(heal="distill").heal == DistillHeal()
    with pytest.raises(
        ConfigError, match=r"heal='rows': give 'layerwise', 'distill', a Heal, such as LayerwiseHeal\(ridge=0.1\)"
    ):
        CAP(heal="rows")  # type: ignore[arg-type]


def mended(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state of a model of which each process has its own batches."""
    net = make()
    batches = data()[distributed.rank() :: distributed.world_size()]
    pruner: Pruner = Magnitude(heal=LayerwiseHeal(num_inputs=64))
    prune(net, batches, loss, 0.75, pruner, recalibrate=True, progress=False)
    return state(net)


def test_two_processes_heal_and_recalibrate_as_one(tmp_path: Path) -> None:
    one, other = on_ranks(2, tmp_path, mended, normalized_net)
    alone = mended(normalized_net)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)
