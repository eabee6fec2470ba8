from __future__ import annotations

import time
from typing import Any

import pytest
import rich
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_cap import prune
from lightning_cap.errors import ConfigError, GradientError, PatternError, TargetError
from lightning_cap.pruners import Magnitude
from lightning_cap.sparsity.allocation import Global, PerTarget
from lightning_cap.sparsity.patterns import NofM
from tests.support.toy import Toy, ToyData, cap


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data() -> DataLoader[Any]:
    return DataLoader(ToyData(), batch_size=16)


def test_prune_is_in_place_and_exact() -> None:
    net = Toy().net
    dense = net[4].weight.detach().clone()
    net.train()
    result = prune(net, data(), loss, 0.75, cap(), progress=False)
    assert net.training
    assert torch.equal(net[4].weight, result.weights["4.weight"])
    assert (net[4].weight == 0).sum() == 192
    assert torch.equal(net[4].weight != 0, result.masks["4.weight"])
    assert result.sparsity == 0.75
    assert result.predicted_loss > 0
    kept = result.masks["4.weight"]
    assert not torch.equal(net[4].weight[kept], dense[kept])  # the kept weights compensate


def test_existing_zeros_stay() -> None:
    net = Toy().net
    with torch.no_grad():
        net[4].weight[:, :4] = 0.0
    prune(net, data(), loss, 0.5, cap(), progress=False)
    assert (net[4].weight == 0).sum() == 128
    assert not net[4].weight[:, :4].any()


def test_recomputations_and_one_shot_iterators() -> None:
    one, many = Toy().net, Toy().net
    many.load_state_dict(one.state_dict())
    a = prune(one, data(), loss, 0.75, cap(), progress=False)
    b = prune(many, data(), loss, 0.75, cap(), num_recomputations=4, progress=False)
    assert a.sparsity == b.sparsity == 0.75
    assert not torch.equal(a.masks["4.weight"], b.masks["4.weight"])
    with pytest.raises(ConfigError, match="can be read only once"):
        prune(one, iter(data()), loss, 0.8, cap(), num_recomputations=2, progress=False)
    prune(Toy().net, iter(data()), loss, 0.8, cap(), progress=False)


def test_zeros_that_cannot_be_placed_are_refused_before_gradients() -> None:
    seen: list[Any] = []

    def once(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch)  # for the first and last layers, and for nothing else
        return loss(model, batch)

    for allocation, steps, goal in ((Global(min_density=0.3), 1, "0.9"), (PerTarget({"4.weight": 0.9}), 3, "0.535841")):
        pruner = cap(allocation=allocation)
        with pytest.raises(ConfigError, match=f"^sparsity={goal}: "):
            prune(Toy().net, data(), once, 0.9, pruner, num_recomputations=steps, progress=False)


def test_a_pattern_of_one_sparsity_is_not_split() -> None:
    def never(model: nn.Module, batch: Any) -> torch.Tensor:
        raise AssertionError("gradients were collected")

    net, pruner = Toy().net, cap(pattern=NofM(2, 4))
    with pytest.raises(ConfigError, match=r"num_recomputations=2: NofM\(n=2, m=4\) has only one sparsity"):
        prune(net, data(), never, 0.5, pruner, num_recomputations=2, progress=False)
    assert prune(net, data(), loss, 0.5, pruner, progress=False).sparsity == 0.5


def test_what_is_no_loss_is_not_called_one() -> None:
    result = prune(Toy().net, data(), loss, 0.5, Magnitude(), num_recomputations=2, progress=False)
    assert result.predicted_loss is None
    assert result.saliency > 0


def test_model_is_unchanged_on_failure() -> None:
    net = Toy().net
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = lambda m, b: loss(m, b) * float("nan")  # noqa: E731
    for error, call in (
        (GradientError, lambda: prune(net, data(), bad, 0.5, cap(), progress=False)),
        (PatternError, lambda: prune(net, data(), loss, 1.0, cap(), progress=False)),
        (PatternError, lambda: prune(net, data(), loss, -0.1, cap(), progress=False)),
        (TargetError, lambda: prune(net, data(), loss, 0.5, cap(), include=["nope"], progress=False)),
        (ConfigError, lambda: prune(net, data(), loss, 0.5, cap(), num_recomputations=0, progress=False)),
    ):
        with pytest.raises(error):
            call()
    weights = dict(net.named_parameters())  # those of the model itself, not what stands for them in a gradient

    def late(model: nn.Module, batch: Any) -> torch.Tensor:
        changed = any(not torch.equal(weight, before[name]) for name, weight in weights.items())
        return loss(model, batch) * (float("nan") if changed else 1.0)

    with pytest.raises(GradientError):  # in the second recomputation, when the first is applied already
        prune(net, data(), late, 0.5, cap(), num_recomputations=2, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_progress_bar_shows_the_phases(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Slow(list):  # type: ignore[type-arg]
        """Reads the terminal between two batches."""

        def __iter__(self) -> Any:
            for batch in data():
                yield batch
                time.sleep(0.15)  # the bar redraws ten times a second
                shown.append(capsys.readouterr().out)

    with monkeypatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("TTY_COMPATIBLE", "1")
        patch.setenv("TTY_INTERACTIVE", "1")
        rich.reconfigure()
        prune(Toy().net, Slow(), loss, 0.5, cap())
    rich.reconfigure()
    assert "CAP: collect" in "".join(shown)


def test_magnitude_needs_no_gradients() -> None:
    net = Toy().net
    prune(net, [], loss, 0.5, Magnitude(), progress=False)
    assert (net[4].weight == 0).float().mean() == 0.5


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])
        self.body = Toy().net[:-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.heads[0](x) + self.heads[1](x)


def test_heads_are_found_by_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    net, batches = TwoHeads(), list(data())
    masked = [prune(net, b, loss, 0.5, cap(), progress=False).masks for b in (batches, iter(batches))]
    assert [list(masks) for masks in masked] == [["body.4.weight"]] * 2
    assert (
        "Pruning 1 target, 39.5 % of 648 weights; dense: body.0 (first), heads.0 (last), heads.1 (last)" in caplog.text
    )
    caplog.clear()
    prune(net, [], loss, 0.5, Magnitude(), progress=False)
    assert "by order of registration: there is no batch for a forward pass" in caplog.text


class TiedHead(nn.Module):
    """Its head is registered first and shares the memory of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5, bias=False)
        self.words, self.body = nn.Embedding(5, 8), nn.Linear(8, 8)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.words(tokens)))


def test_a_tied_head_stays_dense() -> None:
    tokens = torch.arange(5)
    result = prune(TiedHead(), [(tokens, tokens.flip(0))], loss, 0.5, Magnitude(), progress=False)
    assert list(result.masks) == ["body.weight"]


def test_the_first_batch_is_not_lost() -> None:
    read = []
    for batches in (list(data()), iter(list(data()))):
        seen: list[int] = []
        prune(
            Toy().net,
            batches,
            lambda m, b, seen=seen: seen.append(len(b[0])) or loss(m, b),  # type: ignore[misc]
            0.5,
            cap(num_gradients=4, samples_per_gradient=16),
            progress=False,
        )
        read.append(seen)
    assert read == [[16] * 6] * 2  # one for the ends, one to try a gradient, four rows
