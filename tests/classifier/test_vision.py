from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lightning_cap.classifier import VisionClassifier, load_weights
from lightning_cap.errors import ConfigError
from lightning_cap.schedules.learning_rate import CyclicLinearLR
from tests.support.classifying import NAME, SMALL, batch, same_weights, vit

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter", "ignore:You defined a `validation_step`"
)


def test_model_by_name() -> None:
    module = VisionClassifier(NAME, num_classes=7, model_kwargs=SMALL, drop_path_rate=0.2)
    assert module.num_classes == 7
    assert module(batch()[0]).shape == (4, 7)
    assert module.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert VisionClassifier("resnet18", num_classes=3).model.fc.out_features == 3


def test_given_module_needs_its_number_of_classes() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert VisionClassifier(net, num_classes=10)(batch()[0]).shape == (4, 10)
    assert VisionClassifier(vit()).num_classes == 10
    with pytest.raises(ConfigError, match=r"num_classes=None.*give num_classes"):
        VisionClassifier(net)
    with pytest.raises(ConfigError, match="num_classes=0"):
        VisionClassifier(vit(num_classes=0))
    with pytest.raises(ConfigError, match="num_classes=5, but the model has 10"):
        VisionClassifier(vit(), num_classes=5)


def test_unknown_name_gives_near_names() -> None:
    with pytest.raises(ConfigError, match=r"model='resnet81' is not a timm model; near names: .*resnet18"):
        VisionClassifier("resnet81")
    with pytest.raises(ConfigError, match="model=3: give a"):
        VisionClassifier(3)  # type: ignore[arg-type]


def test_arguments_that_the_model_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"'resnet18' could not be created.*nonsense.*model_kwargs"):
        VisionClassifier("resnet18", model_kwargs={"nonsense": 1})


def test_pretrained_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> nn.Module:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"pretrained=True.*no route to host.*checkpoint=") as caught:
        VisionClassifier("resnet18", pretrained=True)
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pretrained": True}, "pretrained=True.*need a timm name"),
        ({"pretrained": True, "checkpoint": "a.pt"}, "both given; keep one"),
        ({"model_kwargs": {"depth": 3}}, "model_kwargs=.*need a timm name"),
        ({"drop_path_rate": 0.1}, r"drop_path_rate=0\.1 needs a timm name"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0: give a number"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1: give a number"),
        ({"gradient_clip": math.nan}, "gradient_clip=nan: give a number"),
        ({"recipe": "deut"}, "recipe='deut'"),
    ],
)
def test_refuses_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        VisionClassifier(vit(), **arguments)


def test_recipe_fills_in_and_explicit_values_win() -> None:
    plain = VisionClassifier(vit())
    assert (plain.label_smoothing, plain.weight_decay, plain.gradient_clip) == (0.0, 0.05, None)
    light = VisionClassifier(vit(), recipe="light1")
    assert (light.label_smoothing, light.weight_decay, light.gradient_clip) == (0.1, 0.03, 1.0)
    own = VisionClassifier(vit(), recipe="light1", label_smoothing=0.0, weight_decay=0.2, gradient_clip=0.0)
    assert (own.label_smoothing, own.weight_decay, own.gradient_clip) == (0.0, 0.2, 0.0)
    deit = VisionClassifier(NAME, 10, model_kwargs=SMALL, recipe="deit")
    assert deit.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    none = VisionClassifier(NAME, 10, model_kwargs=SMALL, recipe="deit", drop_path_rate=0.0)
    assert isinstance(none.model.blocks[-1].drop_path1, nn.Identity)


def test_warns_where_a_recipe_cannot_reach(recwarn: pytest.WarningsRecorder) -> None:
    VisionClassifier(vit(drop_path_rate=0.1), recipe="deit")
    VisionClassifier(vit(), recipe="deit", drop_path_rate=0.0)
    assert not [w for w in recwarn if "drop_path_rate" in str(w.message)]
    with pytest.warns(UserWarning, match=r"drop_path_rate=0\.1 is not applied"):
        VisionClassifier(vit(), recipe="deit")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model._orig_mod."])
def test_checkpoint_is_loaded(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source = vit()
    state: dict[str, Any] = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "a.pth")
    module = VisionClassifier(vit(), checkpoint=str(tmp_path / "a.pth"))
    assert same_weights(module.model, source)


def test_checkpoint_safetensors_and_names(tmp_path: Path) -> None:
    source = timm.create_model("resnet18", num_classes=3)
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "a.safetensors")  # without BatchNorm's counters, as old files are
    module = VisionClassifier("resnet18", num_classes=3, checkpoint=str(tmp_path / "a.safetensors"))
    assert same_weights(module.model, source)


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    raw, averaged = vit(), vit()
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "a.pt")
    model = vit()
    load_weights(model, tmp_path / "a.pt")
    assert same_weights(model, averaged)


def test_a_model_whose_own_names_have_the_prefix(tmp_path: Path) -> None:
    class Outer(nn.Module):
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.model = vit()

    source, target = Outer(), Outer()
    torch.save(source.state_dict(), tmp_path / "a.pt")
    load_weights(target, tmp_path / "a.pt")
    assert same_weights(source, target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("cls_token"), "missing: cls_token"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected: extra"),
        (
            lambda s: s.update({"head.weight": torch.ones(3, 16)}),
            r"head.weight is \(3, 16\) in the file and \(10, 16\)",
        ),
        (lambda s: [s.pop(k) for k in list(s)[:6]], "missing: .* and 3 more"),
        (lambda s: s.update(note="text"), "no state dict of tensors"),
    ],
)
def test_checkpoint_that_does_not_fit_loads_nothing(tmp_path: Path, change: Any, words: str) -> None:
    state: dict[str, Any] = dict(vit().state_dict())
    change(state)
    torch.save(state, tmp_path / "a.pt")
    model = vit()
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match=words):
        VisionClassifier(model, checkpoint=str(tmp_path / "a.pt"))
    assert same_weights(model, before)


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pt' is not a file"):
        VisionClassifier(vit(), checkpoint=str(tmp_path / "none.pt"))
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    torch.save(vit(), tmp_path / "module.pt")  # a pickled module: arbitrary code
    torch.save([1], tmp_path / "list.pt")
    for name, words in (
        ("a.safetensors", "cannot be read"),
        ("module.pt", "cannot be read"),
        ("list.pt", "no state dict"),
    ):
        with pytest.raises(ConfigError, match=words):
            VisionClassifier(vit(), checkpoint=str(tmp_path / name))


def test_loss_of_indices_and_of_soft_targets() -> None:
    module = VisionClassifier(vit(), label_smoothing=0.1)
    images, targets = batch()
    logp = module(images).log_softmax(-1)
    smooth = 0.9 * F.one_hot(targets, 10) + 0.01
    expected = -(smooth * logp).sum(-1).mean()
    torch.testing.assert_close(module.calibration_step((images, targets), 0), expected)
    soft = torch.rand(4, 10).softmax(-1).double()  # its own smoothing; another dtype
    torch.testing.assert_close(module.calibration_step((images, soft), 0), -(soft.float() * logp).sum(-1).mean())


def test_predictions_are_probabilities() -> None:
    module = VisionClassifier(vit()).eval()
    images, targets = batch()
    probabilities = module.predict_step((images, targets), 0)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))
    assert torch.equal(module.predict_step(images, 0), probabilities)


def decayed_names(module: VisionClassifier) -> set[str]:
    configured: Any = module.configure_optimizers()
    names = {id(p): n for n, p in module.named_parameters()}
    groups = configured["optimizer"].param_groups
    assert {g["weight_decay"] for g in groups} == {0.0, module.weight_decay}
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())  # each once
    return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}


def test_weight_decay_spares_biases_norms_and_what_the_model_says() -> None:
    module = VisionClassifier(vit())
    decayed = decayed_names(module)
    assert "model.blocks.0.attn.qkv.weight" in decayed
    assert decayed.isdisjoint({"model.pos_embed", "model.cls_token", "model.head.bias", "model.fc_norm.weight"})
    compiled = VisionClassifier(torch.compile(module.model), num_classes=10)  # type: ignore[arg-type]
    assert {n.replace("_orig_mod.", "") for n in decayed_names(compiled)} == decayed


def test_default_optimizer_and_scheduler() -> None:
    configured: Any = VisionClassifier(vit()).configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.AdamW)
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    assert isinstance(scheduler, CyclicLinearLR)
    assert (scheduler.min_lr, scheduler.period, scheduler.get_last_lr()) == (1e-5, None, [5e-4, 5e-4])
    constant = VisionClassifier(vit(), lr_scheduler=None).configure_optimizers()
    assert isinstance(constant, torch.optim.AdamW)


def test_weight_decay_of_the_optimizer_is_overridden() -> None:
    module = VisionClassifier(vit(), weight_decay=0.3, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.7))
    assert decayed_names(module)


def test_top5_needs_more_than_five_classes(tmp_path: Path) -> None:
    module = VisionClassifier(vit(num_classes=5))
    assert list(module.val_metrics) == ["val/acc"]


def test_top1_and_top5_stay_apart_when_the_first_batch_is_all_right() -> None:
    metrics = VisionClassifier(vit()).val_metrics
    right, second = torch.eye(10)[:3] * 2, torch.eye(10)[:3] * 2 + torch.eye(10).roll(1, 1)[:3] * 3
    metrics.update(right, torch.arange(3))
    metrics.update(second, torch.arange(3))
    assert metrics.compute() == {"val/acc": torch.tensor(0.5), "val/acc5": torch.tensor(1.0)}


def test_hyperparameters_hold_plain_values_only() -> None:
    module = VisionClassifier(NAME, 10, model_kwargs={**SMALL, "act_layer": nn.ReLU})
    assert "model_kwargs" not in module.hparams
    assert "model" not in VisionClassifier(vit()).hparams
