from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.errors import GradientError
from lightning_cap.sparsity.targets import Targets


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(n: int = 3, size: int = 8, shape: tuple[int, ...] = (5,), classes: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(n)
    ]


def rows(collector: GradientCollector) -> dict[str, torch.Tensor]:
    chunks = list(collector)
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def by_backward(model: nn.Module, targets: Targets, data: list[Any], m: int, n: int) -> dict[str, torch.Tensor]:
    """The plain way: one ``backward`` for each gradient sample."""
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    out: dict[str, list[torch.Tensor]] = {name: [] for name in targets}
    for i in range(n):
        model.zero_grad()
        loss(model, (x[i * m : (i + 1) * m], y[i * m : (i + 1) * m])).backward()
        for name, weight in targets.items():
            out[name].append(weight.grad.clone())
    model.zero_grad()
    return {name: torch.stack(grads) for name, grads in out.items()}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3, in_chans=1, zero_init_last=False)


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5,)), (vit, (1, 8, 8)), (cnn, (1, 32, 32))])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_rows_are_the_gradients_of_the_mean_loss(make: Any, shape: tuple[int, ...], m: int) -> None:
    model = make().eval()
    targets = Targets.from_model(model)
    data = batches(shape=shape)
    n = 24 // m - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap takes all of these
        got = rows(GradientCollector(model, targets, loss, data, n, m))
    expected = by_backward(model, targets, data, m, n)
    for name in targets:
        assert got[name].shape == (n, *targets[name].shape)
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_grad_attributes_and_weights_are_untouched() -> None:
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    list(GradientCollector(model, Targets.from_model(model), loss, batches(), 20))
    list(GradientCollector(model, Targets.from_model(model), loss, batches(), 5, 4))
    assert all(bool((p.grad == 2.0).all()) for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_source_is_re_iterable() -> None:
    model = mlp()
    collector = GradientCollector(model, Targets.from_model(model), loss, batches(), 24)
    first, second = rows(collector), rows(collector)
    assert torch.equal(first["2.weight"], second["2.weight"])
    assert collector.collected == 24


def test_modules_that_vmap_cannot_take_fall_back_with_a_warning() -> None:
    class Branchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) * (2.0 if float(x.sum()) > 0 else 1.0)  # data-dependent control flow

    model = Branchy()
    targets = Targets.from_model(model)
    with pytest.warns(UserWarning, match="vmap cannot take this model") as record:
        got = rows(GradientCollector(model, targets, loss, batches(), 24))
    assert sum("vmap" in str(w.message) for w in record) == 1
    expected = by_backward(model, targets, batches(), 1, 24)
    torch.testing.assert_close(got["net.2.weight"], expected["net.2.weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_modules_and_mixed_precision() -> None:
    for make, shape in ((vit, (1, 8, 8)), (cnn, (1, 32, 32))):
        model = make().eval()
        data = batches(shape=shape)
        full = rows(GradientCollector(model, Targets.from_model(model), loss, data, 24))
        compiled = torch.compile(model, backend="eager")
        targets = Targets.from_model(compiled)
        autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("error")
            half = rows(GradientCollector(compiled, targets, loss, data, 24, context=autocast))
        for name in targets:
            assert half[name].dtype == torch.float32
            assert float((half[name] - full[name]).norm() / full[name].norm()) < 0.2


def test_loss_scale_cancels() -> None:
    model = mlp()
    targets = Targets.from_model(model)
    for m in (1, 4):
        plain = rows(GradientCollector(model, targets, loss, batches(), 6, m))
        scaled = rows(GradientCollector(model, targets, loss, batches(), 6, m, scale=1024.0))
        torch.testing.assert_close(plain["2.weight"], scaled["2.weight"])


@pytest.mark.parametrize("m", [1, 2])
def test_non_finite_rows_are_skipped_and_counted(m: int) -> None:
    model = mlp()
    data = batches()
    data[1][0][0] = float("nan")
    collector = GradientCollector(model, Targets.from_model(model), loss, data, 24 // m, m)
    with pytest.warns(UserWarning, match=f"1 of {24 // m} gradient samples are not finite"):
        got = rows(collector)
    assert got["2.weight"].shape[0] == 24 // m - 1
    assert torch.isfinite(got["2.weight"]).all()
    assert (collector.skipped, collector.collected) == (1, 24 // m - 1)


def test_rows_whose_sum_alone_overflows_are_kept_and_infinities_that_cancel_are_not() -> None:
    """The gradient of the mean of a linear layer without bias is its input."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    x = torch.tensor([[3e38, 3e38], [1.0, 2.0], [float("inf"), -float("inf")], [-3e38, -3e38]])
    targets = Targets.from_model(model, include=["0.weight"])
    collector = GradientCollector(model, targets, lambda model, batch: model(batch[0]).mean(), [(x, x)], 4)
    with pytest.warns(UserWarning, match="1 of 4 gradient samples are not finite"):
        got = rows(collector)
    assert torch.equal(got["0.weight"], x[[0, 1, 3]].unsqueeze(1))


def test_too_many_non_finite_rows_fail() -> None:
    model = mlp()
    data = batches()
    for x, _ in data:
        x[:5] = float("inf")
    with pytest.raises(GradientError, match=r"15 of 24 gradient samples are not finite.*model was not changed"):
        list(GradientCollector(model, Targets.from_model(model), loss, data, 24))


def test_short_sources_warn_and_empty_ones_fail() -> None:
    model = mlp()
    targets = Targets.from_model(model)
    with pytest.warns(UserWarning, match="num_gradients=100: the batches gave only 24"):
        assert rows(GradientCollector(model, targets, loss, batches(), 100))["2.weight"].shape[0] == 24
    with pytest.raises(GradientError, match="calibration batches are empty"):
        list(GradientCollector(model, targets, loss, [], 4))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda m, b: loss(m, b).detach(), "has no gradient"),
        (lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"), "instead of a scalar"),
        (lambda m, b: None, "got a NoneType"),
        (lambda m, b: (m[0](b[0]) ** 2).mean(), "depends on none of the 1 targets"),
    ],
)
def test_bad_losses_are_refused(bad: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(GradientError, match=message):
        list(GradientCollector(model, Targets.from_model(model), bad, batches(), 4, 2))


def test_a_target_that_the_loss_does_not_use_gets_zero_rows() -> None:
    model = mlp()
    targets = Targets.from_model(model, include=["0.weight", "4.weight"])
    skip = lambda m, b: (m[0](b[0]) ** 2).mean()  # noqa: E731
    got = rows(GradientCollector(model, targets, skip, batches(), 4, 2))
    assert not got["4.weight"].any()
    assert got["0.weight"].any()


def test_batches_may_be_nested_and_hold_other_things() -> None:
    model = mlp()
    targets = Targets.from_model(model)
    nested = [{"x": {"image": x}, "y": [y], "name": "split", "scale": torch.tensor(1.0)} for x, y in batches()]
    unpack = lambda m, b: loss(m, (b["x"]["image"], b["y"][0])) * b["scale"]  # noqa: E731
    got = rows(GradientCollector(model, targets, unpack, nested, 24))
    assert torch.equal(got["2.weight"], rows(GradientCollector(model, targets, loss, batches(), 24))["2.weight"])
    always = lambda m, b: loss(m, batches()[0])  # noqa: E731
    with pytest.raises(GradientError, match="no tensor with a batch dimension"):
        list(GradientCollector(model, targets, always, ["text"], 4))


def test_works_inside_inference_mode() -> None:
    model = mlp()
    targets = Targets.from_model(model)
    data = batches()
    with torch.inference_mode():
        got = rows(GradientCollector(model, targets, loss, data, 24))
    assert torch.equal(got["2.weight"], rows(GradientCollector(model, targets, loss, data, 24))["2.weight"])


def test_out_of_memory_halves_the_samples_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp().eval()
    targets = Targets.from_model(model)
    data = batches()
    expected = rows(GradientCollector(model, targets, loss, data, 20))
    collector = GradientCollector(model, targets, loss, data, 20)
    compute, sizes = collector._computer.at_once, []

    def scarce(batch: Any) -> dict[str, torch.Tensor]:
        sizes.append(len(batch[0]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(batch)

    collector._computer.at_once = scarce  # type: ignore[method-assign]
    found = rows(collector)
    assert sizes[:8] == [1, 2, 8, 8, 8, 8, 4, 2]  # tries, then 64 at once, 32, 16, 8, 4, 2 of a batch of 8
    assert max(sizes[7:]) == 2
    for name in targets:
        torch.testing.assert_close(found[name], expected[name])
    assert "going on with 2 samples at once" in caplog.text
    collector._computer.at_once = lambda batch: scarce((torch.zeros(9), None))  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        list(collector)


def wrong_in_vmap(collector: GradientCollector, name: str) -> None:
    """Let vmap give another gradient of one target."""
    compute = collector._computer.at_once

    def wrong(batch: Any) -> dict[str, torch.Tensor]:
        found = compute(batch)
        return {**found, name: found[name] * 1.5}

    collector._computer.at_once = wrong  # type: ignore[method-assign]


def test_where_vmap_and_autograd_differ_the_loop_is_used_and_the_target_named() -> None:
    model = mlp().eval()
    targets = Targets.from_model(model)
    collector = GradientCollector(model, targets, loss, batches(), 24)
    wrong_in_vmap(collector, "2.weight")
    with pytest.warns(
        UserWarning, match=r"another gradient than autograd for '2\.weight' \(relative difference 0\.5\)"
    ):
        got = rows(collector)
    expected = by_backward(model, targets, batches(), 1, 24)
    torch.testing.assert_close(got["2.weight"], expected["2.weight"], rtol=1e-4, atol=1e-6)


def test_the_difference_shows_in_the_dry_run_already() -> None:
    model = mlp().eval()
    collector = GradientCollector(model, Targets.from_model(model), loss, batches(), 24)
    wrong_in_vmap(collector, "2.weight")
    with pytest.warns(UserWarning, match="another gradient"):
        collector.probe(batches()[0])


def test_random_losses_are_not_compared_and_trying_leaves_the_random_state() -> None:
    def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(model, (batch[0] + 5 * torch.randn_like(batch[0]), batch[1]))

    model = mlp().eval()
    collector = GradientCollector(model, Targets.from_model(model), noisy, batches(), 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        first = rows(collector)
        torch.manual_seed(0)
        second = rows(collector)  # not tried again
    assert torch.equal(first["2.weight"], second["2.weight"])


def test_what_reading_takes_is_measured_on_the_first_batch() -> None:
    model = mlp().eval()
    targets = Targets.from_model(model)
    one = GradientCollector(model, targets, loss, batches(), 24).memory()
    assert one.row == 4 * targets.numel
    assert one.per_row > one.row, "a row, and what its forward and backward pass hold"
    assert (one.most, one.batch) == (8, 8)
    whole = GradientCollector(model, targets, loss, batches(size=512), 24, 64).memory()
    assert (whole.per_row, whole.most, whole.batch) == (0, 1, 8)
    assert whole.fixed >= 64 * 4 * 7, "the loop's own batch"
    empty = GradientCollector(model, targets, loss, [], 24)
    assert empty.memory().row == one.row
    assert empty.trial is not None, "it is not to be asked again"


def test_a_batch_that_was_tried_is_not_lost_of_an_iterator() -> None:
    model = mlp().eval()
    targets = Targets.from_model(model)
    collector = GradientCollector(model, targets, loss, iter(batches()), 24)
    collector.memory()
    assert torch.equal(
        rows(collector)["2.weight"], rows(GradientCollector(model, targets, loss, batches(), 24))["2.weight"]
    )


def test_fewer_rows_at_once_give_the_same_rows() -> None:
    model = vit().eval()
    targets = Targets.from_model(model)
    data = batches(shape=(1, 8, 8))
    expected = rows(GradientCollector(model, targets, loss, data, 24))
    collector = GradientCollector(model, targets, loss, data, 24)
    collector.limit_rows(3)
    chunks = list(collector)
    assert [len(next(iter(chunk.values()))) for chunk in chunks] == [3, 3, 2] * 3
    for name in targets:
        torch.testing.assert_close(torch.cat([chunk[name] for chunk in chunks]), expected[name], rtol=1e-4, atol=1e-6)


def test_a_trial_is_made_once() -> None:
    model = mlp().eval()
    targets = Targets.from_model(model)
    first = GradientCollector(model, targets, loss, batches(), 24)
    wrong_in_vmap(first, "2.weight")
    with pytest.warns(UserWarning, match="another gradient"):
        first.memory()
    assert first.trial is not None
    second = GradientCollector(model, targets, loss, batches(), 24, trial=first.trial)
    second._computer.at_once = None  # type: ignore[assignment,method-assign]
    assert second.memory() == first.trial.memory
    assert len(rows(second)["2.weight"]) == 24


def test_only_one_chunk_of_rows_lives_at_a_time() -> None:
    model = mlp().eval()
    collector = GradientCollector(model, Targets.from_model(model), loss, batches(), 24)
    compute, alive = collector._computer.at_once, [0]

    def counted(batch: Any) -> dict[str, torch.Tensor]:
        assert alive == [0]
        found = compute(batch)
        for row in found.values():
            alive[0] += 1
            weakref.finalize(row.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - 1))
        return found

    collector.memory()
    collector._computer.at_once = counted  # type: ignore[method-assign]
    for chunk in collector:
        assert alive[0] == len(chunk)
        del chunk
    assert alive == [0]
