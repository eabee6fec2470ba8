"""`DynamicViT`: masks in training that mean what leaving out means, a ratio that is reached, gradients that arrive."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cap import VisionClassifier
from lightning_cap.tokens import DynamicViT
from lightning_cap.tokens.dynamic import attention_mask
from tests.support.tokens import BLOCKS, KEPT, PATCHES, batch, images, pruned
from tests.support.toy import trainer


def masking_the_most_likely(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training decide as evaluation does: of those that are left, the most likely ones stay."""
    left: list[Tensor] = []

    def decide(scores: Tensor) -> Tensor:
        stay = scores[..., 1].masked_fill(left[-1] == 0, -torch.inf) if left else scores[..., 1]
        count = KEPT[len(left)]
        left.append(torch.zeros_like(stay).scatter(1, stay.topk(count).indices, 1.0))
        return left[-1]

    monkeypatch.setattr(model, "decide", decide)


@pytest.mark.parametrize("registers", [0, 2])
def test_masked_tokens_mean_what_tokens_left_out_mean(registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(DynamicViT, vit={"reg_tokens": registers}).double()
    expected = model(images().double(), return_tokens=True)
    model.train()
    masking_the_most_likely(model, monkeypatch)
    masked = model(images().double(), return_tokens=True)
    torch.testing.assert_close(masked.logits, expected.logits, rtol=1e-7, atol=1e-7)
    where = [row.nonzero().flatten().tolist() for row in masked.kept]
    assert where == expected.kept.tolist()
    prefix = 1 + registers
    for image, places in enumerate(where):
        tokens = masked.tokens[image, prefix:][places]
        torch.testing.assert_close(tokens, expected.tokens[image, prefix:], rtol=1e-7, atol=1e-7)


def test_the_mask_has_the_attention_of_the_paper_and_its_gradient() -> None:
    """Equations 9 and 10: each weight times the policy of its column, but for the diagonal, before rows are normalised."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    policy = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.float64, requires_grad=True)
    found = (scores + attention_mask(policy, 1)).softmax(-1)
    columns = F.pad(policy, (1, 0), value=1.0)[:, None, None, :].expand(2, 1, 5, 5)
    factor = torch.where(torch.eye(5, dtype=torch.bool), 1.0, columns)
    weights = scores.exp() * factor
    wanted = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    toward = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((out * toward).sum(), policy, retain_graph=True)[0] for out in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
    assert bool((gradients[0] != 0).all())  # of tokens that are out, too


@pytest.mark.parametrize("how", ["autocast", "half"])
def test_float16_has_the_gradient_of_decisions_too(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens that are out, about that of float32."""
    torch.manual_seed(0)
    drawn = (torch.rand(len(BLOCKS), 3, 25) < 0.7).float()

    def gradients(half: bool) -> list[torch.Tensor]:
        model, decisions = pruned(DynamicViT).train(), []

        def decide(scores: torch.Tensor) -> torch.Tensor:
            decisions.append(drawn[len(decisions)].clone().requires_grad_())
            return decisions[-1]

        monkeypatch.setattr(model, "decide", decide)
        if half and how == "half":
            loss = model.half()(images().half())[:, 1].float().sum()
        else:
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = model(images())[:, 1].float().sum()
        return list(torch.autograd.grad(loss, decisions))

    for found, wanted, kept in zip(gradients(True), gradients(False), drawn.cumprod(0), strict=True):
        out = (kept == 0) & (wanted.abs() > 0.02 * wanted.abs().max())
        assert bool(out.any())
        torch.testing.assert_close(found[out].float(), wanted[out], rtol=0.2, atol=0.02 * float(wanted.abs().max()))


def test_a_stage_that_keeps_all_has_no_predictor() -> None:
    model = pruned(DynamicViT, keep_ratio=[0.8, 1.0, 0.5])
    assert list(model.predictors) == [str(BLOCKS[0]), str(BLOCKS[2])]
    model.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_predictor_learns_from_the_labels_alone() -> None:
    model = pruned(DynamicViT).train()
    inputs, labels = batch()
    F.cross_entropy(model(inputs), labels).backward()
    assert len(model.predictors) == len(BLOCKS)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
    assert all(bool(parameter.grad.any()) for parameter in model.predictors.parameters())


def test_the_auxiliary_loss_is_its_definition() -> None:
    model = pruned(DynamicViT, ratio_weight=3.0).train()
    policies: list[Tensor] = []
    decide = model.decide
    model.decide = lambda scores: policies.append(decide(scores)) or policies[-1]
    model(images())
    left, wanted = torch.ones(3, PATCHES), 0.0
    for stage, policy in enumerate(policies):
        left = left * policy.detach()
        wanted += sum((float(row.mean()) - 0.8 ** (stage + 1)) ** 2 for row in left) / 3
    assert model.auxiliary_loss().item() == pytest.approx(3.0 * wanted / len(BLOCKS), rel=1e-5)
    assert model.auxiliary_loss() == 0.0  # once
    model(images())
    assert model.eval().auxiliary_loss() == 0.0


def test_the_auxiliary_loss_draws_the_kept_share_to_the_ratio() -> None:
    model = pruned(DynamicViT).train()
    inputs = images(16)
    with torch.no_grad():
        before = float(model(inputs, return_tokens=True).kept.mean())
    assert abs(before - 0.8**3) > 0.1  # of half of them in each stage are left
    optimizer = torch.optim.Adam(model.predictors.parameters(), 3e-3)
    for _ in range(60):
        model(inputs)
        optimizer.zero_grad()
        model.auxiliary_loss().backward()
        optimizer.step()
    with torch.no_grad():
        after = [float(model(inputs, return_tokens=True).kept.mean()) for _ in range(8)]
    assert sum(after) / len(after) == pytest.approx(0.8**3, abs=0.04)


def test_decisions_are_drawn_hard_and_by_their_probability() -> None:
    model = pruned(DynamicViT).train()
    scores = torch.tensor([0.3, 0.7]).log().expand(4000, 1, 2)
    torch.manual_seed(0)
    drawn = model.decide(scores)
    assert set(drawn.flatten().tolist()) <= {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.03)


def test_the_same_seed_draws_the_same() -> None:
    model = pruned(DynamicViT).train()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(images()))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_a_classifier_adds_the_auxiliary_loss(tmp_path: Path) -> None:
    module = VisionClassifier(pruned(DynamicViT, ratio_weight=5.0), weight_decay=0.0)
    alone = VisionClassifier(pruned(DynamicViT, ratio_weight=0.0))
    losses = []
    for classifier in (module, alone):
        classifier.train()
        torch.manual_seed(2)
        losses.append(classifier.calibration_step(batch(), 0))
    model = copy.deepcopy(module.model).train()
    torch.manual_seed(2)
    model(batch()[0])
    torch.testing.assert_close(losses[0] - losses[1], model.auxiliary_loss())
    samples = [(image, int(label)) for image, label in zip(*batch(16), strict=True)]
    before = copy.deepcopy(module.model.predictors)
    trainer(tmp_path, max_epochs=1).fit(module, DataLoader(samples, 8))  # type: ignore[arg-type]
    assert all(
        not torch.equal(a, b) for a, b in zip(before.parameters(), module.model.predictors.parameters(), strict=True)
    )


def test_autocast() -> None:
    model = pruned(DynamicViT).train()
    inputs, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(inputs), labels) + model.auxiliary_loss()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
