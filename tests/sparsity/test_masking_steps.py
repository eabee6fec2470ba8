"""What masks do in each training step, and with how few calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from tests.support.masking import CNN_TARGETS, ONE_CALL, calls, half_masked, half_masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_to_weights_and_gradients(tiny_cnn: nn.Module, dtype: torch.dtype) -> None:
    tiny_cnn.to(dtype)
    targets = Targets.from_model(tiny_cnn)
    masks, half = MaskSet(targets), half_masks(targets)
    masks.update(half)
    before = {name: p.detach().clone() for name, p in tiny_cnn.named_parameters()}
    for name, p in tiny_cnn.named_parameters():
        p.grad = torch.full_like(p, 3.0) if name != "6.weight" else None
    masks.apply_to_gradients()
    assert torch.equal(targets["2.weight"].grad, 3.0 * half["2.weight"].to(dtype))
    assert targets["6.weight"].grad is None
    assert all((p.grad == 3).all() for name, p in tiny_cnn.named_parameters() if name not in CNN_TARGETS)
    masks.apply_to_weights()
    for name, p in tiny_cnn.named_parameters():
        expected = torch.where(half[name], before[name], 0.0) if name in CNN_TARGETS else before[name]
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
    masks, half = MaskSet(targets), half_masks(targets)
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
            if name in CNN_TARGETS and key in keys:
                assert torch.equal(value, torch.where(half[name], old, 0.0))
                assert value.any()
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, old)
    assert all(keys <= optimizer.state[targets[name]].keys() for name in CNN_TARGETS)


def test_apply_to_a_copy(tiny_cnn: nn.Module) -> None:
    targets = Targets.from_model(tiny_cnn)
    masks, half = MaskSet(targets), half_masks(targets)
    masks.update(half)
    average = copy.deepcopy(tiny_cnn)
    masks.apply_to_copy(average)
    for (name, p), (_, q) in zip(tiny_cnn.named_parameters(), average.named_parameters(), strict=True):
        assert torch.equal(q, torch.where(half[name], p, 0.0) if name in CNN_TARGETS else p)


@pytest.mark.parametrize("depth", [3, 40])
def test_one_operator_a_call_whatever_the_number_of_targets(depth: int) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)))
    average = copy.deepcopy(model)
    targets, masks, half = half_masked(model)
    assert len(targets) == depth - 2
    masks.apply_to_weights()
    assert calls(lambda: masks.apply_to_copy(average)) == ONE_CALL, "weights and average share the multipliers"
    for _ in range(2):
        model(torch.randn(2, 6)).sum().backward()
        before = {name: w.grad.clone() for name, w in targets.items()}
        assert calls(masks.apply_to_weights) == ONE_CALL
        assert calls(masks.apply_to_gradients) == ONE_CALL
        assert calls(lambda: masks.apply_to_copy(average)) == ONE_CALL
        assert all(torch.equal(w.grad, torch.where(half[name], before[name], 0.0)) for name, w in targets.items())
        model.zero_grad()


def test_nothing_is_called_where_nothing_is_masked(tiny_cnn: nn.Module) -> None:
    targets = Targets.from_model(tiny_cnn)
    masks = MaskSet(targets)
    tiny_cnn(torch.randn(2, 3, 8, 8)).sum().backward()

    def everything() -> None:
        masks.apply_to_weights()
        masks.apply_to_gradients()
        masks.apply_to_copy(tiny_cnn)

    assert calls(everything) == {}
    masks.update({name: torch.ones_like(w, dtype=torch.bool) for name, w in targets.items()})
    assert calls(everything) == {}
    masks.update({"6.weight": half_masks(targets)["6.weight"]})
    made = calls(everything)
    assert made["_foreach_mul_"] == 3
    assert made["empty_like"] == 1, "multipliers for the one target that has masked weights"
    masks.load_state_dict(MaskSet(targets).state_dict())
    assert calls(everything) == {}


def test_what_the_fused_kernel_asks_for(tiny_cnn: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_cnn.to(torch.bfloat16, memory_format=torch.channels_last)
    tiny_cnn[6].weight = nn.Parameter(torch.randn(12, 16, dtype=torch.bfloat16).t())
    targets, masks, half = half_masked(tiny_cnn)
    masks.load_state_dict(masks.state_dict())  # brings contiguous masks
    assert not any(w.is_contiguous() for w in targets.values())
    tiny_cnn(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).sum().backward()
    real, seen = torch._foreach_mul_, []

    def multiply(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> None:
        seen.extend(zip(tensors, others, strict=True))
        real(tensors, others)

    monkeypatch.setattr(torch, "_foreach_mul_", multiply)
    masks.apply_to_gradients()
    masks.apply_to_weights()
    assert len(seen) == 4
    assert all((t.dtype, t.device, t.stride()) == (m.dtype, m.device, m.stride()) for t, m in seen)
    for name, w in targets.items():
        assert torch.equal(w != 0, half[name])
        assert not w.grad[~half[name]].any()


def test_gradients_of_every_kind(tiny_vit: nn.Module) -> None:
    targets, masks, half = half_masked(tiny_vit)
    names = list(targets)
    full = {name: torch.rand(w.shape) + 1 for name, w in targets.items()}
    for name, w in targets.items():
        w.grad = full[name].clone()
    targets[names[0]].grad = None
    targets[names[1]].grad = full[names[1]].t().contiguous().t()
    targets[names[2]].grad = full[names[2]].to_sparse()
    targets[names[3]].data = targets[names[3]].data.double()
    assert targets[names[3]].grad.dtype == torch.float32
    targets[names[4]].grad = full[names[4]].repeat(1, 2)[:, ::2].copy_(full[names[4]])
    assert not targets[names[4]].grad.is_contiguous()
    masks.apply_to_gradients()
    assert targets[names[0]].grad is None
    for name in names[1:]:
        grad = targets[name].grad
        assert grad.dtype == torch.float32
        assert torch.equal(grad.to_dense(), torch.where(half[name], full[name], 0.0))


def test_all_gradients_may_be_missing(tiny_cnn: nn.Module) -> None:
    _, masks, _ = half_masked(tiny_cnn)
    masks.apply_to_weights()
    assert calls(masks.apply_to_gradients) == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_diverged_shows(tiny_cnn: nn.Module, bad: float) -> None:
    targets, masks, half = half_masked(tiny_cnn)
    weight, kept = targets["6.weight"], half["6.weight"]
    weight.grad = torch.full_like(weight, bad)
    masks.apply_to_gradients()
    assert weight.grad[~kept].isnan().all()
    expected = torch.full_like(weight, bad)[kept]
    assert torch.equal(weight.grad[kept].nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_targets_of_two_types_and_a_type_that_changes(tiny_cnn: nn.Module) -> None:
    tiny_cnn[6].double()
    targets, masks, half = half_masked(tiny_cnn)
    masks.apply_to_weights()
    assert calls(masks.apply_to_weights) == {"_foreach_mul_": 2}
    tiny_cnn.half()
    with torch.no_grad():
        for w in targets.values():
            w.fill_(2.0)
    masks.apply_to_weights()
    assert all(torch.equal(w, 2.0 * half[name].half()) for name, w in targets.items())
    assert calls(masks.apply_to_weights) == ONE_CALL


def test_weights_may_move_in_memory(tiny_cnn: nn.Module) -> None:
    targets, masks, half = half_masked(tiny_cnn)
    masks.apply_to_weights()
    nn.utils.vector_to_parameters(torch.ones(sum(p.numel() for p in tiny_cnn.parameters())), tiny_cnn.parameters())
    masks.apply_to_weights()
    assert all(torch.equal(w, half[name].float()) for name, w in targets.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_nothing_waits_and_one_kernel_does_it(tiny_vit: nn.Module) -> None:
    average = copy.deepcopy(tiny_vit)  # stays on the CPU
    tiny_vit.cuda()
    targets, masks, half = half_masked(tiny_vit)
    masks.apply_to_copy(average)
    assert all(torch.equal(average.get_parameter(name) != 0, mask) for name, mask in half.items())
    masks.apply_to_weights()
    tiny_vit(torch.randn(2, 3, 16, 16, device="cuda")).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks.apply_to_gradients()
        masks.apply_to_weights()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        masks.apply_to_weights()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "multi_tensor" in e.name]
    assert len(kernels) == 1
    for name, w in targets.items():
        assert torch.equal((w != 0).cpu(), half[name])
        assert not w.grad[~masks[name]].any()
