from __future__ import annotations

import fnmatch
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import nn

from lightning_cap.errors import TargetError
from lightning_cap.sparsity.ends import Ends, find_ends
from lightning_cap.sparsity.targets import Targets, plain_name

VIT = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}


def _dense(model: nn.Module) -> set[str]:
    """Matrices and kernels that are no default target."""
    targets = Targets.from_model(model)
    assert all(p.data_ptr() == targets[n].data_ptr() for n, p in model.named_parameters() if n in targets)
    return {name for name, p in model.named_parameters() if p.ndim > 1 and name not in targets}


@pytest.mark.parametrize(
    ("name", "options", "dense"),
    [
        ("vit_tiny_patch16_224", VIT, {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"}),
        (
            "deit_tiny_distilled_patch16_224",
            VIT,
            {"cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "head.weight", "head_dist.weight"},
        ),
        ("resnet18", {"layers": (1, 1, 1, 1)}, {"conv1.weight", "fc.weight"}),
        (
            "convnext_atto",
            {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
            {"stem.0.weight", "head.fc.weight", *(f"stages.{i}.blocks.0.conv_dw.weight" for i in range(4))},
        ),
    ],
)
def test_default_targets_of_timm_models(name: str, options: dict[str, object], dense: set[str]) -> None:
    model = timm.create_model(name, **options)
    assert _dense(model) == dense
    assert _dense(nn.ModuleDict({"net": model})) == {f"net.{d}" for d in dense}


def test_own_head_on_a_headless_timm_model(tiny_vit: nn.Module) -> None:
    tiny_vit.reset_classifier(0)
    model = nn.Sequential(tiny_vit, nn.Linear(16, 16), nn.Linear(16, 3))
    assert _dense(model) == {"0.cls_token", "0.pos_embed", "0.patch_embed.proj.weight", "2.weight"}


def test_default_targets_of_plain_models(tiny_cnn: nn.Module) -> None:
    assert list(Targets.from_model(tiny_cnn)) == ["2.weight", "6.weight"]
    with pytest.raises(TargetError, match=r"no prunable weight left; dense: 0 \(first\), 1 \(last\)"):
        Targets.from_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(TargetError, match="no prunable weight"):
        Targets.from_model(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    with pytest.raises(TargetError, match="no prunable weight"):
        Targets.from_model(nn.ReLU())


def test_depthwise_is_dense_but_grouped_is_not() -> None:
    convs = [nn.Conv2d(4, 4, 3, groups=g) for g in (1, 2, 4)] + [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(1, 4, 3)]
    model = nn.Sequential(nn.Linear(2, 2), *convs, nn.ConvTranspose2d(4, 2, 3), nn.Linear(2, 2))
    assert list(Targets.from_model(model)) == ["1.weight", "2.weight", "5.weight", "6.weight"]
    assert "3.weight" in Targets.from_model(model, include=["*"])


def test_multihead_attention() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 8)
            self.same = nn.MultiheadAttention(8, 2)
            self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
            self.head = nn.Linear(8, 2)

    assert set(Targets.from_model(Net())) == {
        "same.in_proj_weight",
        "same.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
    }
    encoder = nn.TransformerEncoderLayer(8, 2, 12)
    assert "self_attn.in_proj_weight" in Targets.from_model(encoder, include=["*"])


def test_include_and_exclude(tiny_vit: nn.Module) -> None:
    def names(**options: object) -> list[str]:
        return list(Targets.from_model(tiny_vit, **options))  # type: ignore[arg-type]

    assert names(include=["*.attn.qkv.weight", "*.mlp.fc?.weight"]) == [
        f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")
    ]  # in the model's order, whatever the order of the patterns
    assert names(include=["*.mlp.fc?.weight", "*.attn.qkv.weight"]) == names(
        include=["*.attn.qkv.weight", "*.mlp.fc?.weight"]
    )
    assert names(include=("head.weight", "pos_embed", "*head*")) == ["pos_embed", "head.weight"]
    assert names(exclude=["*.fc[12].weight", "head.weight"]) == [
        f"blocks.{i}.attn.{layer}.weight" for i in range(2) for layer in ("qkv", "proj")
    ]
    assert len(names(include=["*"])) == 10
    assert "blocks.0.norm1.weight" in names(include=["blocks.0.norm1.weight", "*.qkv.weight"])


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_that_select_nothing(tiny_vit: nn.Module, argument: str) -> None:
    def select(patterns: object) -> Targets:
        return Targets.from_model(tiny_vit, **{argument: patterns})  # type: ignore[arg-type]

    with pytest.raises(
        TargetError, match=rf"{argument}: '\*\.mlp\.fc3\.weigth' matches no.*'blocks\.\d\.mlp\.fc\d\.weight'"
    ):
        select(["*.mlp.fc3.weigth"])
    with pytest.raises(TargetError, match=r"matches no parameter"):
        select(["*.QKV.weight"])
    with pytest.raises(TargetError, match=rf"{argument}='\*': give a list of names or globs"):
        select("*")


def test_patterns_for_vectors(tiny_vit: nn.Module) -> None:
    with pytest.raises(
        TargetError, match=r"matches only 'blocks\.0\.norm1\.weight'.*not weights of a Linear.*exact name"
    ):
        Targets.from_model(tiny_vit, include=["*.norm?.weight"])
    assert len(Targets.from_model(tiny_vit, exclude=["*.fc1.weight"])) == 6
    with pytest.raises(TargetError, match=r"include=\[\]"):
        Targets.from_model(tiny_vit, include=[])
    with pytest.raises(TargetError, match="no prunable weight left"):
        Targets.from_model(tiny_vit, include=["head.weight"], exclude=["head.weight"])


def test_frozen_layers_are_dense_unless_they_are_named(tiny_cnn: nn.Module) -> None:
    tiny_cnn[2].weight.requires_grad_(False)
    targets = Targets.from_model(tiny_cnn)
    assert list(targets) == ["6.weight"]
    assert "2 (frozen)" in targets.summary
    with pytest.raises(TargetError, match=r"'2\.weight' is frozen.*exclude=\['2\.weight'\]"):
        Targets.from_model(tiny_cnn, include=["2.weight", "6.weight"])
    tiny_cnn.requires_grad_(False)
    with pytest.raises(TargetError, match=r"no prunable weight left; dense: 0 \(frozen\), 2 \(frozen\), .*unfreeze"):
        Targets.from_model(tiny_cnn)


def test_what_is_pruned_is_summed_up(tiny_vit: nn.Module, tiny_cnn: nn.Module) -> None:
    total = sum(p.numel() for p in tiny_vit.parameters())
    share = f"{100 * 6144 / total:.1f} % of {total / 1000:.1f} k weights"
    assert Targets.from_model(tiny_vit).summary == (
        f"8 targets, {share}; dense: patch_embed.proj (first), head (last); first and last by order of registration: "
        "no forward pass was run"
    )
    ends = Ends(("patch_embed.proj.weight",), ("head.weight",))
    assert Targets.from_model(tiny_vit, exclude=["*.fc?.weight", "*.0.attn.*"], ends=ends).summary == (
        f"2 targets, {100 * 1024 / total:.1f} % of {total / 1000:.1f} k weights; dense: patch_embed.proj (first), head (last), "
        "6 excluded (blocks.0.attn.qkv, blocks.0.attn.proj, blocks.0.mlp.fc1, blocks.0.mlp.fc2, ...)"
    )
    chosen = Targets.from_model(tiny_cnn, include=["2.weight", "6.weight"])
    assert chosen.summary.endswith("; dense: 0 (not in include), 7 (not in include)")
    assert chosen.ends is None
    assert Targets({"w": torch.ones(2)}).summary == ""


def test_every_dense_layer_has_a_reason(tiny_vit: nn.Module) -> None:
    ends = Ends(("patch_embed.proj.weight",), ("head.weight",))
    assert Targets.from_model(tiny_vit, exclude=["blocks.0.attn.*"], ends=ends).dense == {
        "patch_embed.proj.weight": "first",
        "blocks.0.attn.qkv.weight": "excluded",
        "blocks.0.attn.proj.weight": "excluded",
        "head.weight": "last",
    }
    named = Targets.from_model(tiny_vit, include=["*.fc1.weight"])
    assert set(named.dense.values()) == {"not in include"}
    assert not set(named.dense) & set(named)
    assert Targets({"w": torch.ones(2)}).dense == {}


def _spectral(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


def _pruned(layer: nn.Module) -> nn.Module:
    return nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.parametrize(
    ("change", "by"),
    [
        (nn.utils.weight_norm, "weight_norm"),
        (_spectral, "spectral_norm"),
        (_pruned, "torch.nn.utils.prune"),
        (nn.utils.parametrizations.weight_norm, "parametrized by WeightNorm"),
        (nn.utils.parametrizations.orthogonal, "parametrized by Orthogonal"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_no_parameters_are_named(
    tiny_cnn: nn.Module, change: Callable[[nn.Module], nn.Module], by: str
) -> None:
    tiny_cnn[6] = change(tiny_cnn[6])
    x = torch.zeros(1, 3, 8, 8)
    ends = find_ends(tiny_cnn.eval(), lambda: tiny_cnn(x))
    assert ends == Ends(("0.weight",), ("7.weight",))  # it is a layer like any other
    for options in ({}, {"ends": ends}, {"include": ["*"]}, {"exclude": ["0.weight"]}):
        targets = Targets.from_model(tiny_cnn, **options)  # type: ignore[arg-type]
        assert "6.weight" not in targets
        assert f"6 ({by})" in targets.summary
    assert "6 (excluded)" in Targets.from_model(tiny_cnn, exclude=["6.weight"]).summary
    with pytest.raises(
        TargetError, match=rf"'6\.weight' matches only weights that are no parameters, 6 \({by}\). Take that off"
    ):
        Targets.from_model(tiny_cnn, include=["6.weight"])


def _net_with(a: nn.Parameter, b: nn.Parameter, c: nn.Parameter | None = None) -> nn.Module:
    net = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "c")})
    net["a"].weight, net["b"].weight = a, b
    if c is not None:
        net["c"].weight = c
    return net


def test_tied_targets_are_refused() -> None:
    one = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(TargetError, match=r"'a\.weight' is tied: it shares its memory with 'b\.weight'"):
        Targets.from_model(_net_with(one, one), include=["*"])
    assert list(Targets.from_model(_net_with(one, one), include=["c.weight"])) == ["c.weight"]
    with pytest.raises(TargetError, match="tied"):  # a tie to what is no target is a tie
        Targets.from_model(_net_with(one, one), include=["b.weight"])
    shared = nn.ModuleDict({"a": nn.Linear(4, 4)})
    shared["b"] = shared["a"]
    with pytest.raises(TargetError, match="tied"):
        Targets.from_model(shared, include=["*"])


def test_views_of_one_storage() -> None:
    flat = torch.randn(40)
    views = [nn.Parameter(flat[i : i + 16].view(4, 4)) for i in (0, 16, 24)]
    with pytest.raises(TargetError, match=r"'b\.weight' is tied: it shares its memory with 'c\.weight'\."):
        Targets.from_model(_net_with(*views), include=["*"])
    assert len(Targets.from_model(_net_with(*views), include=["a.weight"])) == 1
    with pytest.raises(TargetError, match="tied"):
        Targets.from_model(_net_with(views[0], nn.Parameter(flat[:16].view(4, 4).t())), include=["*"])
    strided = nn.Parameter(flat[:32].view(4, 8)[:, :4])  # reaches to 28, though it has 16 elements
    with pytest.raises(TargetError, match="tied"):
        Targets.from_model(_net_with(strided, views[2]), include=["*"])


def test_compiled_modules_keep_plain_names(tiny_vit: nn.Module) -> None:
    plain = list(Targets.from_model(tiny_vit))
    tiny_vit.blocks[1] = torch.compile(tiny_vit.blocks[1])
    targets = Targets.from_model(tiny_vit)
    assert list(targets) == plain
    parameters = dict(tiny_vit.named_parameters())
    assert all(parameters[path] is targets[name] for name, path in targets.paths.items())
    assert any("_orig_mod." in path for path in targets.paths.values())
    whole = Targets.from_model(torch.compile(tiny_vit), include=["blocks.1.mlp.fc1.weight"])
    assert list(whole) == ["blocks.1.mlp.fc1.weight"]
    assert plain_name("_orig_mod.a._orig_mod.weight") == "a.weight"


def test_tensors_that_cannot_be_targets() -> None:
    with pytest.raises(TargetError, match=r"'0\.weight' is not initialised yet. Run one forward pass"):
        Targets.from_model(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), include=["*"])
    with pytest.raises(TargetError, match="no weight to prune"):
        Targets({})
    with pytest.raises(TargetError, match="'w' is empty"):
        Targets({"w": torch.empty(0, 3)})
    with pytest.raises(TargetError, match=r"'w' is of type torch\.int64"):
        Targets({"w": torch.ones(3, dtype=torch.int64)})


def test_targets_follow_their_model(tiny_cnn: nn.Module) -> None:
    targets = Targets.from_model(tiny_cnn)
    with torch.no_grad():
        tiny_cnn[6].weight.fill_(7.0)
    assert (targets.weights()["6.weight"] == 7).all()
    assert not targets.weights()["6.weight"].requires_grad
    assert targets.numel == 12 * 8 * 9 + 12 * 16


def test_every_near_name_exists(tiny_vit: nn.Module) -> None:
    with pytest.raises(TargetError) as error:
        Targets.from_model(tiny_vit, include=["zzz"])
    names = [name for name, _ in tiny_vit.named_parameters() if f"'{name}'" in str(error.value)]
    assert len(names) == 3
    assert all(fnmatch.fnmatchcase(name, "*.weight") for name in names)
