"""Relevance of units against plain loops and against zennit itself, and that nothing is left behind in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cap.calibration.relevance import UnitRelevance, start_of
from lightning_cap.errors import GradientError, TargetError, UnsupportedError
from lightning_cap.sparsity import Units
from tests.references.relevance import relevance_of_small_net
from tests.support.units import SmallNet, cross_entropy, small_net, small_units

zennit = pytest.importorskip("zennit")


def samples(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 5, 5, generator=generator).to(dtype), torch.arange(n) % 3


def rows_of(
    model: nn.Module, units: Units, batch: Any, n: int, loss: Any = cross_entropy, **own: Any
) -> dict[str, Tensor]:
    collector = UnitRelevance(n, **own).collector(model, units.targets(model), loss, [batch])
    (chunk,) = list(collector)
    return chunk


def bits(model: nn.Module) -> list[tuple[str, int, int, bytes]]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(name, id(t), t.data_ptr(), t.detach().numpy().tobytes()) for name, t in tensors]


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_relevance_is_that_of_plain_loops(epsilon: float) -> None:
    model, (x, y) = small_net(torch.float64), samples(2)
    rows = rows_of(model, small_units(), (x, y), 2, epsilon=epsilon)
    for i in range(2):
        wanted = relevance_of_small_net(model, x[i], int(y[i]), epsilon)
        for name, relevance in wanted.items():
            assert (rows[name][i] - relevance).norm() < 1e-5 * relevance.norm(), name


class Sequence(nn.Module):
    """Convolutions with batch norms in a row, so that zennit's own composite knows all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 8, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.pool, self.flat, self.fc = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.flat(self.pool(self.relu2(self.bn2(self.conv2(x))))))  # type: ignore[no-any-return]


def trained(model: nn.Module, x: Tensor) -> Any:
    """In eval mode, with statistics and affine values that matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.abs_()
                module.momentum = 1.0
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize(
    ("rule", "composite"), [("epsilon_plus", "EpsilonPlus"), ("alpha1_beta0", ""), ("epsilon", "")]
)
def test_relevance_is_that_of_zennit_with_merged_batch_norms(rule: str, composite: str) -> None:
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlus, LayerMapComposite, layer_map_base
    from zennit.rules import AlphaBeta, Epsilon
    from zennit.types import Linear

    x, y = samples(6)
    model = trained(Sequence().double(), x)
    units = Units.from_model(model, x[:1])
    rows = rows_of(model, units, (x, y), 6, rule=rule)

    own = AlphaBeta(1, 0) if rule == "alpha1_beta0" else Epsilon()
    canonizers = [SequentialMergeBatchNorm()]
    theirs = EpsilonPlus(canonizers=canonizers) if composite else LayerMapComposite(
        [*layer_map_base(), (Linear, own)], canonizers=canonizers
    )  # fmt: skip
    with theirs.context(model):
        seen: dict[str, Tensor] = {}
        for name in ("relu1", "relu2"):

            def keep(_: Any, args: Any, out: Tensor, name: str = name) -> None:
                seen[name] = out
                out.retain_grad()

            model.get_submodule(name).register_forward_hook(keep)
        logits = model(x.clone().requires_grad_())
        (logits * logits.detach() * F.one_hot(y, 3)).sum().backward()
    groups = {"conv1": "relu1", "conv2": "relu2"}
    assert set(groups) == set(units)
    for group, layer in groups.items():
        grad = seen[layer].grad
        assert grad is not None
        wanted = grad.flatten(2).sum(2)
        assert wanted.norm() > 0
        assert (rows[group] - wanted).norm() < 1e-4 * wanted.norm(), group


class Skip(nn.Module):
    """What the first convolution gives is taken by a batch norm and by a shortcut, so they cannot be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.conv, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.relu(self.bn2(self.conv(F.relu(self.bn1(x)))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_batch_norms_are_merged_only_where_the_model_stays_the_same() -> None:
    from lightning_cap.calibration.relevance_rules import batch_norms_to_merge

    x, _ = samples(6)
    model = trained(Skip().double(), x)
    before = bits(model)
    with torch.no_grad():
        assert batch_norms_to_merge(model, lambda: model(x)) == [("conv", "bn2")]
    assert bits(model) == before


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_lower_precision_gives_about_the_same(half: str) -> None:
    model, (x, y) = small_net(), samples(2, torch.float32)
    wanted = rows_of(model, small_units(), (x, y), 2)
    if half == "weights":
        model, x = model.bfloat16(), x.bfloat16()
    collector = UnitRelevance(2).collector(
        model,
        small_units().targets(model),
        cross_entropy,
        [(x, y)],
        context=lambda: torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"),
    )
    (rows,) = list(collector)
    for name in ("fc1", "attn"):
        assert rows[name].dtype == torch.float32
        assert (rows[name] - wanted[name]).norm() < 0.1 * wanted[name].norm(), name


def test_the_forward_pass_is_the_same_inside() -> None:
    from lightning_cap.calibration.relevance_rules import relevance_rules

    x, _ = samples(4)
    model = trained(nn.Sequential(Sequence(), nn.LayerNorm(3), nn.GELU(), nn.SiLU(inplace=True)).double(), x)
    wanted = model(x)
    with relevance_rules(model, "epsilon_plus", 1e-6, [("0.conv1", "0.bn1"), ("0.conv2", "0.bn2")]):
        assert torch.allclose(model(x), wanted, rtol=1e-9)


@pytest.mark.parametrize("place", ["forward", "backward", "merging"])
def test_weights_are_the_same_bits_afterwards(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_cap.calibration import relevance_rules

    x, y = samples(6, torch.float32)
    model = trained(Sequence(), x)
    units = Units.from_model(model, x[:1])
    before, hooks = bits(model), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rows_of(model, units, (x, y), 6)
    assert bits(model) == before
    assert model.conv1.bias is None

    def fail(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    if place == "merging":
        norm = relevance_rules.NamedMergeBatchNorm
        monkeypatch.setattr(
            norm, "merge_batch_norm", staticmethod(lambda linears, _: (linears[0].weight.data.mul_(1), fail()))
        )
    elif place == "backward":
        monkeypatch.setattr(relevance_rules, "ZPlus", lambda: relevance_rules.Epsilon(fail))
    else:
        model.fc.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        rows_of(model, units, (x, y), 6)
    assert bits(model) == before
    assert model.conv1.bias is None
    model.fc._forward_hooks.clear()
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_relevance_starts_at_labels_probabilities_or_what_is_predicted() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.0, -1.0]])
    x, soft = torch.zeros(2, 1), torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]])
    assert start_of((x, torch.tensor([2, 0])), logits, "labels").tolist() == [[0, 0, 1], [1, 0, 0]]
    assert start_of({"image": x, "labels": torch.tensor([2, 0])}, logits, "labels").tolist() == [[0, 0, 1], [1, 0, 0]]
    assert torch.equal(start_of([x, soft], logits, "labels"), soft)
    assert start_of(x, logits, "predicted").tolist() == [[0, 1, 0], [1, 0, 0]]
    for batch in (x, (x,), {"image": x}, (x, torch.tensor([3, 0])), (x, torch.tensor([-1, 0])), (x, torch.rand(2))):
        with pytest.raises(GradientError, match="classes='predicted'"):
            start_of(batch, logits, "labels")


def test_what_has_no_logits_or_no_place_for_gates_is_refused() -> None:
    model, (x, y) = small_net(), samples(2, torch.float32)
    flat = lambda m, batch: m(batch[0]).square().mean()  # noqa: E731
    wrapped = type("Deep", (SmallNet,), {"forward": lambda self, x: SmallNet.forward(self, x).unsqueeze(2)})().eval()
    with pytest.raises(TargetError, match=r"its outputs have shape \(1, 3, 1\)"):
        rows_of(wrapped, small_units(), (x, y), 2, flat)
    compiled = torch.compile(model.fc2, backend="eager")
    model.fc2 = compiled  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="'fc1'"):
        rows_of(model, small_units(), (x, y), 2)
