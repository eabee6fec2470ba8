"""`KeptTokenDistillation`: what is taught, of which tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lightning_cap import VisionClassifier
from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAP
from lightning_cap.tokens import DynamicViT, KeptTokenDistillation, TokenPruning
from tests.support.tokens import KINDS, batch, images, pruned, vit
from tests.support.toy import callback, trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_it_is_the_definition(kind: type[TokenPruning], training: bool) -> None:
    model, teacher = pruned(kind).train(training), vit(seed=3)
    inputs, labels = batch()
    torch.manual_seed(4)
    found = KeptTokenDistillation(teacher, alpha=0.4, temperature=2.0, token_weight=0.7)(
        model, inputs, lambda logits: F.cross_entropy(logits, labels)
    )
    torch.manual_seed(4)
    out = model(inputs, return_tokens=True)
    tokens = teacher.forward_features(inputs)
    p, q = (teacher(inputs) / 2).softmax(-1), (out.logits / 2).softmax(-1)
    soft = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    total, number = torch.tensor(0.0), 0.0
    for image, kept in enumerate(out.kept):
        for place in kept.nonzero().flatten().tolist() if training and kind is DynamicViT else kept.tolist():
            row = 1 + (place if kept.is_floating_point() else kept.tolist().index(place))
            total = total + (out.tokens[image, row] - tokens[image, 1 + place]).square().mean()
            number += 1
    wanted = 0.6 * F.cross_entropy(out.logits, labels) + 0.4 * (soft + 0.7 * total / number)
    torch.testing.assert_close(found, wanted)


def test_the_dense_model_has_nothing_to_teach_itself() -> None:
    model = pruned(DynamicViT, keep_ratio=1.0)
    inputs, labels = batch()
    loss = KeptTokenDistillation(copy.deepcopy(model.vit), alpha=1.0)(
        model, inputs, lambda x: F.cross_entropy(x, labels)
    )
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_a_run_of_all_three(tmp_path: Path) -> None:
    """Tokens, weights and a teacher at once: masks hold, the teacher is in no checkpoint and as it was."""
    teacher = vit()
    before = copy.deepcopy(teacher.state_dict())
    module = VisionClassifier(pruned(DynamicViT), distillation=KeptTokenDistillation(teacher)).train()
    samples = [(image, int(label)) for image, label in zip(*batch(16), strict=True)]
    cb = callback({0: 0.5}, pruner=CAP(block_size=16, num_gradients=8))
    run = trainer(tmp_path, max_epochs=1, callbacks=[cb])
    run.fit(module, DataLoader(samples, 8))  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(name.startswith(("model.vit.", "model.predictors.")) for name in module.state_dict())
    weights: dict[str, Any] = dict(module.named_parameters())
    assert cb.masks
    assert all(not weights[name].detach()[~mask].any() for name, mask in cb.masks.items())


def test_models_that_do_not_go_together() -> None:
    def run(model: Any, teacher: Any) -> None:
        KeptTokenDistillation(teacher)(model, images(), lambda logits: logits.sum())

    with pytest.raises(ConfigError, match="it leaves no tokens out"):
        run(vit(), vit())
    model = pruned(DynamicViT)
    with pytest.raises(ConfigError, match="it is the model itself"):
        run(model, model.vit)
    for changes in ({"num_classes": 7}, {"embed_dim": 48}, {"patch_size": 5}):
        with pytest.raises(ConfigError, match="Give the dense model of the same size and classes"):
            run(model, vit(**changes))
    with pytest.raises(ConfigError, match="teacher=Linear: it has no tokens"):
        run(model, torch.nn.Linear(3, 4))


def test_what_cannot_be_taught_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="VisionTransformer: it leaves no tokens out"):
        VisionClassifier(vit(), distillation=KeptTokenDistillation(vit()))
    for changes in ({"img_size": 24}, {"embed_dim": 48}):
        with pytest.raises(ConfigError, match=r"teacher: it has \d+ patches of \d+ channels, and the model 25 of 24"):
            VisionClassifier(pruned(DynamicViT), distillation=KeptTokenDistillation(vit(**changes)))
