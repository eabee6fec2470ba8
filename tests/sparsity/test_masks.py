from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.bits import pack_bits

NAMES = ["2.weight", "6.weight"]


@pytest.fixture
def targets(tiny_cnn: nn.Module) -> Targets:
    return Targets.from_model(tiny_cnn)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls(action: Callable[[], object]) -> dict[str, int]:
    """The torch operators that ``action`` calls."""
    with Calls() as seen:
        action()
    return dict(seen.names)


def _half(targets: Targets) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(w.shape, generator=generator) > 0.5 for name, w in targets.items()}


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


def test_replacing_tells_what_came_back(targets: Targets) -> None:
    masks, half = MaskSet(targets), _half(targets)
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
    assert all(torch.equal(grown[name], ~before[name]) for name in NAMES)
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


ONE_CALL = {"_foreach_mul_": 1}


def _masked(model: nn.Module) -> tuple[Targets, MaskSet, dict[str, torch.Tensor]]:
    targets = Targets.from_model(model)
    masks, half = MaskSet(targets), _half(targets)
    masks.update(half)
    return targets, masks, half


@pytest.mark.parametrize("depth", [3, 40])
def test_one_operator_a_call_whatever_the_number_of_targets(depth: int) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)))
    average = copy.deepcopy(model)
    targets, masks, half = _masked(model)
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
    masks.update({"6.weight": _half(targets)["6.weight"]})
    made = calls(everything)
    assert made["_foreach_mul_"] == 3
    assert made["empty_like"] == 1, "multipliers for the one target that has masked weights"
    masks.load_state_dict(MaskSet(targets).state_dict())
    assert calls(everything) == {}


def test_what_the_fused_kernel_asks_for(tiny_cnn: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_cnn.to(torch.bfloat16, memory_format=torch.channels_last)
    tiny_cnn[6].weight = nn.Parameter(torch.randn(12, 16, dtype=torch.bfloat16).t())
    targets, masks, half = _masked(tiny_cnn)
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
    targets, masks, half = _masked(tiny_vit)
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
    _, masks, _ = _masked(tiny_cnn)
    masks.apply_to_weights()
    assert calls(masks.apply_to_gradients) == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_diverged_shows(tiny_cnn: nn.Module, bad: float) -> None:
    targets, masks, half = _masked(tiny_cnn)
    weight, kept = targets["6.weight"], half["6.weight"]
    weight.grad = torch.full_like(weight, bad)
    masks.apply_to_gradients()
    assert weight.grad[~kept].isnan().all()
    expected = torch.full_like(weight, bad)[kept]
    assert torch.equal(weight.grad[kept].nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_targets_of_two_types_and_a_type_that_changes(tiny_cnn: nn.Module) -> None:
    tiny_cnn[6].double()
    targets, masks, half = _masked(tiny_cnn)
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
    targets, masks, half = _masked(tiny_cnn)
    masks.apply_to_weights()
    nn.utils.vector_to_parameters(torch.ones(sum(p.numel() for p in tiny_cnn.parameters())), tiny_cnn.parameters())
    masks.apply_to_weights()
    assert all(torch.equal(w, half[name].float()) for name, w in targets.items())


def test_new_masks_are_in_force_at_once(tiny_cnn: nn.Module) -> None:
    targets, masks, half = _masked(tiny_cnn)
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
    targets, masks, half = _masked(tiny_cnn)
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
    _, masks, half = _masked(tiny_cnn)
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
    _, masks, half = _masked(tiny_cnn)
    spread = copy.deepcopy(tiny_cnn)
    spread[2].to("meta")
    masks.apply_to_copy(spread)
    assert calls(lambda: masks.apply_to_copy(spread)) == {"_foreach_mul_": 2}
    assert torch.equal(spread[6].weight != 0, half["6.weight"])
    part = copy.deepcopy(tiny_cnn[:3])
    masks.apply_to_copy(part)
    assert torch.equal(part[2].weight != 0, half["2.weight"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_nothing_waits_and_one_kernel_does_it(tiny_vit: nn.Module) -> None:
    average = copy.deepcopy(tiny_vit)  # stays on the CPU
    tiny_vit.cuda()
    targets, masks, half = _masked(tiny_vit)
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
