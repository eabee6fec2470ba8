from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models.segmentation.fcn import FCN, FCNHead

from lightning_cap.errors import TargetError
from lightning_cap.sparsity.ends import Ends, ends_of, find_ends
from lightning_cap.sparsity.layer_graph import trace
from lightning_cap.sparsity.layers import registered_ends
from lightning_cap.sparsity.targets import Targets

X = torch.randn(3, 6)


def mlp(*widths: int) -> nn.Sequential:
    layers = [[nn.Linear(a, b), nn.ReLU(inplace=True)] for a, b in pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def check(model: nn.Module, loss: Callable[[], Any], first: str, last: str, unreached: str = "") -> Ends:
    """Names of layers, without ``.weight``, one after the other."""
    ends = find_ends(model, loss)
    found = [{name.removesuffix(".weight") for name in names} for names in (ends.first, ends.last, ends.unreached)]
    assert found == [set(first.split()), set(last.split()), set(unreached.split())]
    assert not ends.by_order
    return ends


class Student(nn.Module):
    """Distils a teacher that is registered after it."""

    def __init__(self, no_grad: bool) -> None:
        super().__init__()
        self.net, self.teacher, self.no_grad = mlp(6, 8, 8, 4), mlp(6, 8, 8, 4), no_grad

    def loss(self) -> Tensor:
        with torch.set_grad_enabled(not self.no_grad):
            wanted = self.teacher(X)
        return F.mse_loss(self.net(X), wanted)


def test_a_frozen_teacher_beside_the_student() -> None:
    model = Student(no_grad=False)
    model.teacher.requires_grad_(False)
    ends = check(model, model.loss, "net.0 teacher.0", "net.4 teacher.4")
    assert [list(Targets.from_model(model, exclude=e, ends=ends)) for e in (None, ["teacher.*"])] == [
        ["net.2.weight"]
    ] * 2
    assert "net.4.weight" in Targets.from_model(model)  # what the order of registration makes of it


def test_a_teacher_under_no_grad_is_no_target() -> None:
    model = Student(no_grad=True)
    ends = check(model, model.loss, "net.0", "net.4", "teacher.0 teacher.2 teacher.4")
    targets = Targets.from_model(model, ends=ends)
    assert list(targets) == ["net.2.weight"]
    assert targets.summary == (
        "1 target, 19.5 % of 328 weights; dense: net.0 (first), net.4 (last), teacher.0 (no gradient), "
        "teacher.2 (no gradient), teacher.4 (no gradient)"
    )


def test_a_trained_teacher_that_is_excluded() -> None:
    model = Student(no_grad=False)
    ends = find_ends(model, model.loss)
    assert list(Targets.from_model(model, exclude=["teacher.*"], ends=ends)) == ["net.2.weight"]
    assert list(Targets.from_model(model, ends=ends)) == ["net.2.weight", "teacher.2.weight"]


def test_what_is_excluded_or_frozen_stays_an_end() -> None:
    model = mlp(6, 8, 8, 8, 4)
    for dense in ("0.weight", "6.weight"):
        assert len(Targets.from_model(model, exclude=[dense], ends=find_ends(model, lambda: model(X)))) == 2
    model[0].requires_grad_(False)
    model[6].requires_grad_(False)
    ends = check(model, lambda: model(X), "0", "6")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True, False, False]
    assert list(Targets.from_model(model, ends=ends)) == ["2.weight", "4.weight"]


def test_what_feeds_a_frozen_network_is_a_head() -> None:
    model = nn.ModuleDict({"net": mlp(6, 8, 8, 6), "perceptual": mlp(6, 8, 8)})
    loss = lambda: F.mse_loss(model["perceptual"](model["net"](X)), model["perceptual"](X))  # noqa: E731
    check(model, loss, "net.0", "perceptual.2")
    model["perceptual"].requires_grad_(False)
    ends = check(model, loss, "net.0", "net.4 perceptual.2")
    assert list(Targets.from_model(model, ends=ends)) == ["net.2.weight"]


class Heads(nn.Module):
    """A body with a head behind each of two of its layers; registered in a bad order."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 4)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 2)
        self.stem = nn.Linear(6, 8)
        self.body = mlp(8, 8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = self.body[0](self.stem(x).relu())
        return {"out": self.head(self.body[2](early.relu())), "aux": self.aux(early)}


def test_heads_wherever_they_are_registered() -> None:
    model = Heads()
    ends = check(model, lambda: model(X), "stem", "head aux", "unused")
    assert list(Targets.from_model(model, ends=ends)) == ["body.0.weight", "body.2.weight"]
    check(model, lambda: model(X)["out"].sum(), "stem", "head", "unused aux")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return {"aux": x, "out": self.body(x)}


def test_auxiliary_head_of_a_segmentation_model() -> None:
    model = FCN(Backbone(), FCNHead(8, 3), FCNHead(8, 3)).eval()  # as fcn_resnet50(aux_loss=True) is made
    check(model, lambda: model(torch.ones(1, 3, 12, 12)), "backbone.stem", "classifier.4 aux_classifier.4")


def test_two_heads_at_the_end() -> None:
    body, heads = mlp(6, 8, 8), nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])
    model = nn.ModuleDict({"body": body, "heads": heads})
    check(model, lambda: [head(body(X)) for head in heads], "body.0", "heads.0 heads.1")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def test_the_last_of_a_residual_stream_without_classifier() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Block(), Block(), nn.LayerNorm(8))
    check(model, lambda: model(X).square().mean(), "0", "2.fc2")


class Bert(nn.Module):
    """Embeddings first, encoder, pooler, and a head that is tied to the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(9, 8), nn.Embedding(5, 8), nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.pooler = nn.Linear(8, 8)
        self.tied, self.classifier = tied, nn.Identity() if tied else nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))
        x = self.pooler(self.encoder(x)).tanh()
        return F.linear(x, self.words.weight) if self.tied else self.classifier(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_come_first(tied: bool, frozen: bool) -> None:
    model = Bert(tied)
    model.words.requires_grad_(not frozen or tied)  # a frozen weight that is used by itself has no place in the graph
    model.places.requires_grad_(not frozen)
    tokens = torch.arange(10).view(2, 5) % 9
    check(model, lambda: model(tokens).sum(), "", "" if tied else "classifier")
    head = nn.Linear(4, 2)
    loss = lambda: head(nn.functional.embedding(tokens, model.words.weight)[..., :4])  # noqa: E731
    both = nn.ModuleDict({"bert": model, "head": head})
    if model.words.weight.requires_grad:
        assert "head.weight" not in find_ends(both, loss).first


def test_attention_is_entered_by_one_weight_and_left_by_another() -> None:
    model = nn.MultiheadAttention(6, 2)
    ends = find_ends(model, lambda: model(X, X, X)[0])
    assert (ends.first, ends.last) == (("in_proj_weight",), ("out_proj.weight",))
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0)
    check(layer, lambda: layer(X), "self_attn.in_proj_weight", "linear2")


def test_weights_that_are_used_without_their_layer() -> None:
    model = mlp(6, 8, 8, 4)
    normed = lambda x, layer: F.linear(x, F.normalize(layer.weight), layer.bias)  # noqa: E731

    def forward() -> Tensor:
        return normed(model[2](normed(X, model[0]).relu()).relu(), model[4])

    check(model, forward, "0", "4")
    model[2].weight.data, by_hand = torch.eye(8), model[2].weight

    def all_by_hand() -> Tensor:
        return F.linear(F.linear(F.linear(X, model[0].weight), by_hand), model[4].weight).sum()

    check(model, all_by_hand, "0", "4")


def test_scripted_compiled_and_recurrent_layers() -> None:
    scripted = nn.Sequential(torch.jit.script(mlp(6, 8, 8)), nn.Linear(8, 8), nn.Linear(8, 2))
    check(scripted, lambda: scripted(X), "", "2")
    compiled = mlp(6, 8, 8, 2)
    compiled[2] = torch.compile(compiled[2])  # type: ignore[assignment]
    with torch.compiler.set_stance("force_eager"):
        check(compiled, lambda: compiled(X), "0", "4")
    model = nn.ModuleDict({"inp": nn.Linear(6, 8), "rnn": nn.LSTM(8, 8), "out": nn.Linear(8, 2)})
    packed = lambda x: nn.utils.rnn.pack_sequence([x, x[:2]])  # noqa: E731
    check(model, lambda: model["out"](model["rnn"](packed(model["inp"](X)))[1][0]), "inp", "out")


def test_layers_that_are_called_twice() -> None:
    model = nn.ModuleDict(
        {"inp": nn.Linear(6, 8), "cell": nn.Linear(8, 8), "body": mlp(8, 8, 8), "out": nn.Linear(8, 2)}
    )

    def loss() -> Tensor:
        state = torch.zeros(3, 8)
        for _ in range(3):
            state = (model["inp"](X) + model["cell"](state)).tanh()
        return model["out"](model["body"](state)) - model["out"](model["body"](state * 2))

    check(model, loss, "inp", "out")


def test_a_loss_on_derivatives() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss() -> Tensor:
        x = X.clone().requires_grad_()
        (force,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return force.square().sum()

    check(model, loss, "0", "4")


def test_parameters_after_the_head_are_no_layers() -> None:
    model = nn.Module()
    model.net, model.scale, model.bias = mlp(6, 8, 8, 4), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1, 4))
    check(model, lambda: F.layer_norm(model.net(X) * model.scale, (4,), model.bias[0]) + model.bias, "net.0", "net.4")


def test_reentrant_checkpoints_hide_their_layers() -> None:
    model = mlp(6, 8, 8, 4)
    loss = lambda reentrant: model[4](checkpoint(model[:4], X.clone().requires_grad_(), use_reentrant=reentrant))  # noqa: E731
    check(model, lambda: loss(False), "0", "4")
    with pytest.raises(TargetError, match=r"use_reentrant=True: checkpointed layers are not in the graph.*include"):
        find_ends(model, lambda: loss(True))


def test_a_loss_without_a_graph_is_refused() -> None:
    model = mlp(6, 8, 4)
    with pytest.raises(TargetError, match="nothing that the forward pass returned has a gradient"):
        find_ends(model, lambda: {"loss": model(X).detach(), "n": 3})
    with pytest.raises(TargetError, match=r"'0\.weight' is not initialised yet"):
        find_ends(nn.Sequential(nn.LazyLinear(4)), lambda: 0)


def test_nothing_is_left_behind() -> None:
    model = mlp(6, 8, 8, 4)
    model[2].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        ends = find_ends(model, lambda: model(X))
    assert ends.last == ("4.weight",)
    assert all(p.grad is None for p in model.parameters())
    assert not X.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_processes_that_saw_different_layers_decide_the_same() -> None:
    """As experts that only some batches are sent to."""
    model = nn.ModuleDict({"stem": nn.Linear(6, 8), "a": mlp(8, 8, 8), "b": mlp(8, 8, 8), "head": nn.Linear(8, 2)})
    flows = [trace(model, lambda e=expert: model["head"](model[e](model["stem"](X)))) for expert in ("a", "b")]
    assert ends_of(model, flows) == ends_of(model, reversed(flows)) == Ends(("stem.weight",), ("head.weight",))
    assert set(ends_of(model, flows[:1]).unreached) == {"b.0.weight", "b.2.weight"}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}, 32),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}, 32),
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}, 32),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 32),
        ("resnet18", {"layers": (1, 1, 1, 1)}, 32),
        ("mobilenetv3_small_050", {}, 32),
    ],
)
def test_timm_models_have_the_ends_that_they_name(name: str, options: dict[str, Any], size: int, frozen: bool) -> None:
    model = timm.create_model(name, **options).eval()
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "qkv" in path)  # which BEiT uses by itself
    first, last = registered_ends(model)
    check(
        model,
        lambda: model(torch.zeros(1, 3, size, size)),
        *(" ".join(n.removesuffix(".weight") for n in names) for names in (first, last)),
    )  # fmt: skip


def test_state_of_a_checkpoint() -> None:
    ends = Ends(("a.weight",), ("b.weight", "c.weight"), by_order="no forward pass was run")
    assert Ends.from_state(ends.to_state()) == ends
