from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.masks import MaskSet, pack_bits, unpack_bits
from lightning_cap.targets import Targets

NAMES = ["2.weight", "6.weight"]


@pytest.fixture
def targets(tiny_cnn: nn.Module) -> Targets:
    return Targets.from_model(tiny_cnn)


def _half(targets: Targets) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(w.shape, generator=generator) > 0.5 for name, w in targets.items()}


@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=60, deadline=None)
def test_bits_round_trip(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-len(values) // 8),)
    assert torch.equal(unpack_bits(bits, len(values)), mask)
    assert [int(bits[i // 8]) >> i % 8 & 1 for i in range(len(values))] == [int(v) for v in values]


def test_bits_of_shaped_and_strided_masks() -> None:
    mask = torch.rand(5, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 45).view(5, 3, 3), mask)
    assert torch.equal(unpack_bits(pack_bits(mask.transpose(0, 2)), 45).view(3, 3, 5), mask.transpose(0, 2))


def test_starts_full_and_only_loses(targets: Targets) -> None:
    masks = MaskSet(targets)
    assert list(masks) == NAMES
    assert len(masks) == 2
    assert masks.global_sparsity == 0
    assert all(mask.all() and mask.dtype == torch.bool for mask in masks.values())
    half = _half(targets)
    masks.update(half)
    zeros = {name: int((~mask).sum()) for name, mask in half.items()}
    assert masks.sparsity() == pytest.approx({name: zeros[name] / targets[name].numel() for name in NAMES})
    assert masks.global_sparsity == pytest.approx(sum(zeros.values()) / targets.numel)
    masks.update({name: torch.ones_like(mask) for name, mask in half.items()})
    assert all(torch.equal(masks[name], half[name]) for name in NAMES)
    half["2.weight"].fill_(False)
    assert masks["2.weight"].any(), "masks are copies"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_to_weights_and_gradients(tiny_cnn: nn.Module, dtype: torch.dtype) -> None:
    tiny_cnn.to(dtype)
    targets = Targets.from_model(tiny_cnn)
    masks, half = MaskSet(targets), _half(targets)
    masks.update(half)
    before = {name: p.detach().clone() for name, p in tiny_cnn.named_parameters()}
    for name, p in tiny_cnn.named_parameters():
        p.grad = torch.full_like(p, 3.0) if name != "6.weight" else None
    masks.apply_to_gradients()
    assert torch.equal(targets["2.weight"].grad, 3.0 * half["2.weight"].to(dtype))
    assert targets["6.weight"].grad is None
    assert all((p.grad == 3).all() for name, p in tiny_cnn.named_parameters() if name not in NAMES)
    masks.apply_to_weights()
    for name, p in tiny_cnn.named_parameters():
        expected = torch.where(half[name], before[name], 0.0) if name in NAMES else before[name]
        assert torch.equal(p, expected)
        assert p.requires_grad


@pytest.mark.parametrize(
    ("optimizer_class", "options", "keys"),
    [
        (torch.optim.Adam, {}, {"exp_avg", "exp_avg_sq"}),
        (torch.optim.AdamW, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}, {"square_avg", "grad_avg", "momentum_buffer"}),
        (torch.optim.SGD, {}, set()),
    ],
)
def test_apply_to_optimizer(
    tiny_cnn: nn.Module, optimizer_class: type[torch.optim.Optimizer], options: dict[str, float], keys: set[str]
) -> None:
    targets = Targets.from_model(tiny_cnn)
    masks, half = MaskSet(targets), _half(targets)
    masks.update(half)
    optimizer = optimizer_class(tiny_cnn.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    masks.apply_to_optimizer(optimizer)  # before any step
    for _ in range(2):
        tiny_cnn(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    before = copy.deepcopy({id(p): dict(optimizer.state[p]) for p in tiny_cnn.parameters()})
    masks.apply_to_optimizer(optimizer)
    for name, p in tiny_cnn.named_parameters():
        for key, value in optimizer.state[p].items():
            old = before[id(p)][key]
            if name in NAMES and key in keys:
                assert torch.equal(value, torch.where(half[name], old, 0.0))
                assert value.any()
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, old)
    assert all(keys <= optimizer.state[targets[name]].keys() for name in NAMES)


def test_apply_to_a_copy(tiny_cnn: nn.Module) -> None:
    targets = Targets.from_model(tiny_cnn)
    masks, half = MaskSet(targets), _half(targets)
    masks.update(half)
    average = copy.deepcopy(tiny_cnn)
    masks.apply_to_copy(average)
    for (name, p), (_, q) in zip(tiny_cnn.named_parameters(), average.named_parameters(), strict=True):
        assert torch.equal(q, torch.where(half[name], p, 0.0) if name in NAMES else p)


def test_state_travels_through_a_weights_only_checkpoint(targets: Targets) -> None:
    masks, half = MaskSet(targets), _half(targets)
    masks.update(half)
    stream = io.BytesIO()
    torch.save(masks.state_dict(), stream)
    assert sum(entry["bits"].numel() for entry in masks.state_dict().values()) <= targets.numel / 8 + 2
    stream.seek(0)
    other = MaskSet(targets)
    other.update({"6.weight": torch.zeros(16, 12, dtype=torch.bool)})
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert all(torch.equal(other[name], half[name]) for name in NAMES)


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
