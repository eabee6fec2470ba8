from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.bits import pack_bits
from tests.support.masking import CNN_TARGETS, calls, half_masked, half_masks


@pytest.fixture
def targets(tiny_cnn: nn.Module) -> Targets:
    return Targets.from_model(tiny_cnn)


def test_starts_full_and_only_loses(targets: Targets) -> None:
    masks = MaskSet(targets)
    assert list(masks) == CNN_TARGETS
    assert len(masks) == 2
    assert masks.global_sparsity == 0
    assert all(mask.all() and mask.dtype == torch.bool for mask in masks.values())
    half = half_masks(targets)
    masks.update(half)
    zeros = {name: int((~mask).sum()) for name, mask in half.items()}
    assert masks.sparsity() == pytest.approx({name: zeros[name] / targets[name].numel() for name in CNN_TARGETS})
    assert masks.global_sparsity == pytest.approx(sum(zeros.values()) / targets.numel)
    masks.update({name: torch.ones_like(mask) for name, mask in half.items()})
    assert all(torch.equal(masks[name], half[name]) for name in CNN_TARGETS)
    half["2.weight"].fill_(False)
    assert masks["2.weight"].any(), "masks are copies"


def test_replacing_tells_what_came_back(targets: Targets) -> None:
    masks, half = MaskSet(targets), half_masks(targets)
    masks.update(half)
    turned = {"2.weight": ~half["2.weight"], "6.weight": half["6.weight"].clone()}
    grown = masks.replace(turned)
    assert list(grown) == ["2.weight"]
    assert torch.equal(grown["2.weight"], turned["2.weight"])
    assert torch.equal(masks["2.weight"], turned["2.weight"])
    assert torch.equal(masks["6.weight"], half["6.weight"])
    masks.apply_to_weights()
    assert torch.equal(targets["2.weight"] != 0, turned["2.weight"])
    turned["6.weight"].fill_(True)
    assert not masks["6.weight"].all(), "masks are copies"
    before = dict(masks)
    grown = masks.unmask_all()
    assert all(torch.equal(grown[name], ~before[name]) for name in CNN_TARGETS)
    assert masks.global_sparsity == 0
    assert calls(masks.apply_to_weights) == {}, "nothing is left to do in a step"
    assert masks.unmask_all() == {}


def test_zeros_of_the_model_become_masks(targets: Targets) -> None:
    with torch.no_grad():
        targets["2.weight"][0] = 0.0
        targets["2.weight"][1, 0] = -0.0
    masks = MaskSet(targets)
    masks.mask_zeros()
    assert torch.equal(masks["2.weight"], targets["2.weight"] != 0)
    assert masks["6.weight"].all()
    with torch.no_grad():
        targets["6.weight"].zero_()
    with pytest.warns(UserWarning, match=r"first '6\.weight', are all zero.*not as pruned"):
        masks.mask_zeros()
    assert masks["6.weight"].all()


def test_state_travels_through_a_weights_only_checkpoint(targets: Targets) -> None:
    masks, half = MaskSet(targets), half_masks(targets)
    masks.update(half)
    stream = io.BytesIO()
    torch.save(masks.state_dict(), stream)
    assert sum(entry["bits"].numel() for entry in masks.state_dict().values()) <= targets.numel / 8 + 2
    stream.seek(0)
    other = MaskSet(targets)
    other.update({"6.weight": torch.zeros(16, 12, dtype=torch.bool)})
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert all(torch.equal(other[name], half[name]) for name in CNN_TARGETS)


def test_state_of_other_targets_is_refused_and_nothing_changes(targets: Targets) -> None:
    masks = MaskSet(targets)
    state = masks.state_dict()
    zeros = pack_bits(torch.zeros(12 * 16, dtype=torch.bool))
    for wrong in (
        {"2.weight": state["2.weight"]},
        {**state, "7.weight": state["6.weight"]},
        {**state, "6.weight": {"shape": [12, 16], "bits": zeros}},
        {"2.weight": state["2.weight"], "6.weights": {"shape": [16, 12], "bits": zeros}},
    ):
        with pytest.raises(ConfigError, match=r"checkpoint: its masks do not fit.*differ, first .*include/exclude"):
            masks.load_state_dict(wrong)
    assert masks.global_sparsity == 0


def test_new_masks_are_in_force_at_once(tiny_cnn: nn.Module) -> None:
    targets, masks, half = half_masked(tiny_cnn)
    average, first = copy.deepcopy(tiny_cnn), masks.state_dict()

    def check(expected: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for p in (*tiny_cnn.parameters(), *average.parameters()):
                p.fill_(1.0)
                p.grad = torch.ones_like(p)
        masks.apply_to_gradients()
        masks.apply_to_weights()
        masks.apply_to_copy(average)
        for name, w in targets.items():
            mask = expected[name].float()
            assert torch.equal(w, mask)
            assert torch.equal(w.grad, mask)
            assert torch.equal(average.get_parameter(name), mask)

    check(half)
    more = {name: torch.rand(w.shape) > 0.5 for name, w in targets.items()}
    masks.update(more)
    check({name: half[name] & more[name] for name in half})
    masks.load_state_dict(first)
    check(half)
    assert all(torch.equal(masks.state_dict()[name]["bits"], first[name]["bits"]) for name in half)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda masks: pickle.loads(pickle.dumps(masks))])
def test_copies_of_a_mask_set_keep_to_their_own_weights(tiny_cnn: nn.Module, clone: Any) -> None:
    targets, masks, half = half_masked(tiny_cnn)
    size = len(pickle.dumps(masks))
    masks.apply_to_weights()
    masks.apply_to_copy(copy.deepcopy(tiny_cnn))
    assert len(pickle.dumps(masks)) == size, "what is made from the masks does not travel"
    other = clone(masks)
    with torch.no_grad():
        for w in (*targets.values(), *other._targets.values()):
            w.fill_(1.0)
    other.apply_to_weights()
    assert all((w == 1).all() for w in targets.values())
    assert all(torch.equal(w, half[name].float()) for name, w in other._targets.items())
    other.update({name: torch.zeros_like(mask) for name, mask in half.items()})
    assert masks.global_sparsity < 1


def test_an_averaged_copy_is_looked_up_once_and_not_kept_alive(
    tiny_cnn: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, masks, half = half_masked(tiny_cnn)
    average = copy.deepcopy(tiny_cnn).double()
    real, looked_up = nn.Module.named_parameters, []
    monkeypatch.setattr(nn.Module, "named_parameters", lambda self, *a: looked_up.append(1) or real(self, *a))
    for _ in range(3):
        masks.apply_to_copy(average)
    assert len(looked_up) == 1
    assert torch.equal(average.get_parameter("6.weight") != 0, half["6.weight"])
    gone = weakref.ref(average)
    del average
    gc.collect()
    assert gone() is None


def test_a_copy_on_several_devices_or_without_some_weights(tiny_cnn: nn.Module) -> None:
    _, masks, half = half_masked(tiny_cnn)
    spread = copy.deepcopy(tiny_cnn)
    spread[2].to("meta")
    masks.apply_to_copy(spread)
    assert calls(lambda: masks.apply_to_copy(spread)) == {"_foreach_mul_": 2}
    assert torch.equal(spread[6].weight != 0, half["6.weight"])
    part = copy.deepcopy(tiny_cnn[:3])
    masks.apply_to_copy(part)
    assert torch.equal(part[2].weight != 0, half["2.weight"])


def test_reprs_are_short() -> None:
    targets = Targets({"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(4))})
    masks = MaskSet(targets)
    masks.update({"a": torch.tensor([[True, False, True], [False, True, True]])})
    assert repr(masks) == "MaskSet(2 targets, 20.00% of 10 weights masked)"
    assert repr(targets) == "Targets(2 of 10 weights, first 'a')"
