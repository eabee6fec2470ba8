"""What all models with fewer tokens do alike: keep so many, and go through pruning, shrinking and exporting."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap import VisionClassifier, prune
from lightning_cap.cli import main
from lightning_cap.errors import ConfigError
from lightning_cap.export import ONNX, ExportRecord, shrink
from lightning_cap.pruners import CAP, Magnitude, MagnitudeUnits
from lightning_cap.sparsity import Flops, Units
from lightning_cap.tokens import DynamicViT, TokenPruning, ZeroTPrune
from lightning_cap.tokens.base import gather, highest
from lightning_cap.utilities.flops import count_flops
from lightning_cap.utilities.records import read_records
from tests.support.checkpoints import checkpoint
from tests.support.tokens import BLOCKS, KEPT, KINDS, PATCHES, SIZES, batch, images, pruned, vit
from tests.support.toy import callback, trainer

every_kind = pytest.mark.parametrize("kind", KINDS)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Widths:
    """How many tokens each block of a model gets."""

    def __init__(self, model: TokenPruning) -> None:
        self.seen: list[int] = []
        for block in model.vit.blocks:
            block.register_forward_pre_hook(lambda _, args: self.seen.append(args[0].shape[1]))


@every_kind
@pytest.mark.parametrize("registers", [0, 3])
def test_each_stage_keeps_so_many_and_the_class_token(kind: type[TokenPruning], registers: int) -> None:
    model = pruned(kind, vit={"reg_tokens": registers})
    widths = Widths(model)
    prefix = 1 + registers
    out = model(images(), return_tokens=True)
    assert model.num_kept(PATCHES) == KEPT
    assert widths.seen == [prefix + PATCHES, *(prefix + k for k in KEPT)]
    assert out.tokens.shape == (3, prefix + KEPT[-1], SIZES["embed_dim"])
    assert out.kept.shape == (3, KEPT[-1])
    for positions in out.kept.tolist():  # rising, each once, patches alone
        assert positions == sorted(set(positions))
        assert positions[0] >= 0
        assert positions[-1] < PATCHES
    assert len({tuple(positions) for positions in out.kept.tolist()}) > 1  # by the image
    torch.testing.assert_close(out.logits, model.vit.head(out.tokens[:, 0]))
    assert torch.equal(out.logits, model(images()))


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_at_keep_ratio_1_it_is_the_model_itself(kind: type[TokenPruning], training: bool) -> None:
    model = pruned(kind, keep_ratio=1.0).train(training)
    assert torch.equal(model(images()), model.vit(images()))
    assert model(images(), return_tokens=True).kept is None
    assert len(list(model.parameters())) == len(list(model.vit.parameters()))  # nothing that has no gradient


@every_kind
def test_ratios_of_its_own_for_each_stage(kind: type[TokenPruning]) -> None:
    model = pruned(kind, keep_ratio=[1.0, 0.5, 0.9])
    widths = Widths(model)
    model(images())
    assert widths.seen == [26, 26, 14, 12]  # floor(12.5 + 0.5), floor(11.25 + 0.5)
    assert model.num_kept(1) == (1, 1, 1)


@every_kind
def test_it_computes_less(kind: type[TokenPruning]) -> None:
    model = pruned(kind)
    dense = count_flops(model.vit, images(1))
    assert 0.6 < count_flops(model, images(1)) / dense < 0.9


def test_gathering() -> None:
    tokens = torch.arange(2 * 6 * 2.0).reshape(2, 6, 2)
    chosen = torch.tensor([[0, 3], [1, 2]])
    for prefix in (1, 2):
        places = [[*range(prefix), *(place + prefix for place in row)] for row in chosen.tolist()]
        expected = torch.stack([rows[place] for rows, place in zip(tokens, places, strict=True)])
        assert torch.equal(gather(tokens, chosen, prefix), expected)
    assert highest(torch.tensor([[3.0, 9.0, 1.0, 4.0]]), 2).tolist() == [[1, 3]]


@every_kind
def test_the_model_given_computes_as_before(kind: type[TokenPruning]) -> None:
    model = vit()
    before, state = model(images()), {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = kind(model, blocks=BLOCKS).eval()
    wrapped(images())
    assert torch.equal(model(images()), before)
    assert dict(wrapped.vit.state_dict().items()).keys() == state.keys()
    assert all(block.attn.fused_attn == vit().blocks[0].attn.fused_attn for block in model.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_kind
def test_it_is_made_of_a_name_and_a_checkpoint(kind: type[TokenPruning], tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "dense.pt")
    kwargs = dict(SIZES)
    model = kind("vit_tiny_patch16_224", BLOCKS, checkpoint=str(tmp_path / "dense.pt"), model_kwargs=kwargs)
    assert torch.equal(model.vit.eval()(images()), vit()(images()))
    assert (model.num_classes, model.no_weight_decay()) == (4, {f"vit.{n}" for n in vit().no_weight_decay()})
    cfg = model.pretrained_cfg
    assert "architecture" not in cfg
    assert cfg["mean"] == vit().pretrained_cfg["mean"]
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear)


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_and_a_pickle_in_the_middle_of_a_step(kind: type[TokenPruning], training: bool) -> None:
    model = pruned(kind).train(training)
    model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(images()), model.eval()(images()))
        model.train(training)


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_recomputed_activations_give_the_same_gradient(kind: type[TokenPruning], training: bool) -> None:
    gradients = []
    for recomputing in (False, True):
        model = pruned(kind)
        model.vit.set_grad_checkpointing(recomputing)
        model.train(training)
        torch.manual_seed(5)
        loss(model, batch()).backward()
        gradients.append(model.vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_distilled_deit_keeps_both_its_tokens() -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_heads"}
    for kind in KINDS:
        torch.manual_seed(0)
        dense = timm.create_model("deit_tiny_distilled_patch16_224", num_heads=3, **sizes).eval()
        out = kind(dense, BLOCKS).eval()(images(), return_tokens=True)
        assert out.tokens.shape[1] == 2 + KEPT[-1]


@every_kind
def test_cap_prunes_it_and_its_masks_hold(kind: type[TokenPruning], tmp_path: Path) -> None:
    """In a run whose token decisions are drawn; predictors are left dense by the default targets."""
    module = VisionClassifier(pruned(kind)).train()
    samples = [(image, int(label)) for image, label in zip(*batch(16), strict=True)]
    cb = callback({0: 0.3, 1: 0.5}, pruner=CAP(block_size=16, num_gradients=16))
    trainer(tmp_path, max_epochs=2, callbacks=[cb]).fit(module, DataLoader(samples, 8))  # type: ignore[arg-type]
    weights = dict(module.named_parameters())
    assert {name for name in weights if name.endswith("attn.qkv.weight")} <= set(cb.masks)
    assert not any("predictors" in name or "head" in name or "patch_embed" in name for name in cb.masks)
    zeros = sum(int((~mask).sum()) for mask in cb.masks.values())
    assert zeros == int(0.5 * sum(mask.numel() for mask in cb.masks.values()) + 0.5)
    for name, mask in cb.masks.items():
        assert not weights[name].detach()[~mask].any()


def test_predictors_are_pruned_when_asked() -> None:
    model = pruned(DynamicViT)
    result = prune(model, [batch()], loss, 0.5, pruner=Magnitude(), include=["predictors.*.hidden?.weight"])
    assert len(result.masks) == 2 * len(BLOCKS)
    assert all(int((mask == 0).sum()) > 0 for mask in result.masks.values())


@every_kind
def test_its_units_are_those_of_the_transformer_and_it_shrinks(kind: type[TokenPruning]) -> None:
    model = pruned(kind)
    assert {name.removeprefix("vit."): g.size for name, g in Units.from_model(model, images()).items()} == {
        name: g.size for name, g in Units.from_model(vit(), images()).items()
    }
    result = prune(model, [batch()], loss, 0.3, pruner=MagnitudeUnits(cost=Flops()))
    small = shrink(model, result.masks, example_input=images())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert isinstance(small, kind)
    torch.testing.assert_close(small(images()), model(images()), rtol=1e-4, atol=1e-5)


@every_kind
def test_onnx_gives_the_same(kind: type[TokenPruning], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = pruned(kind)
    prune(model, [batch()], loss, 0.5, pruner=CAP(block_size=16, num_gradients=6))
    record = ONNX().export(model, tmp_path / "m.onnx", images(5))
    assert record.zeros_equal == record.weights > 0
    run = ONNX().runner(tmp_path / "m.onnx")
    for number in (1, 7):  # other numbers of images than it was traced with
        torch.testing.assert_close(run(images(number, seed=9)), model(images(number, seed=9)), rtol=1e-3, atol=1e-4)


@every_kind
def test_torch_export_gives_the_same(kind: type[TokenPruning]) -> None:
    model = pruned(kind)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert torch.equal(program.module()(images(6, seed=9)), model(images(6, seed=9)))


@every_kind
def test_the_export_command_finds_it_by_its_class_path(kind: type[TokenPruning], tmp_path: Path) -> None:
    """As ``fit`` leaves it: YAML with the class path as the model of `VisionClassifier`."""
    pytest.importorskip("onnxruntime")
    inner = {
        "class_path": f"lightning_cap.tokens.{kind.__name__}",
        "init_args": {"model": "vit_tiny_patch16_224", "blocks": list(BLOCKS), "model_kwargs": SIZES},
    }
    model = {"class_path": "lightning_cap.VisionClassifier", "init_args": {"model": inner}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    module = VisionClassifier(pruned(kind))
    torch.save(checkpoint(state_dict=module.state_dict(), hyper_parameters=dict(module.hparams)), tmp_path / "a.ckpt")
    torch.save(images(), tmp_path / "x.pt")
    main(["export", str(tmp_path / "a.ckpt"), "--to=onnx", f"--input={tmp_path}/x.pt"])
    assert read_records(tmp_path / "export/exports.jsonl", ExportRecord)[0].format == "onnx"
    run = ONNX().runner(tmp_path / "export/a.onnx")
    torch.testing.assert_close(run(images()), module.model.eval()(images()), rtol=1e-3, atol=1e-4)


def test_a_number_of_patches_that_is_none() -> None:
    with pytest.raises(ConfigError, match="num_patches=0"):
        pruned(ZeroTPrune).num_kept(0)
