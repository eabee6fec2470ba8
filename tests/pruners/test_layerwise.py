"""Layer-wise OBS against the textbook on ``2 X X^T / n``."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap import prune
from lightning_cap.calibration.layer_inputs import InputCollector, LayerGrams
from lightning_cap.errors import ConfigError, GradientError, TargetError
from lightning_cap.pruners import LayerwiseOBS, Magnitude
from lightning_cap.sparsity.allocation import Global
from lightning_cap.sparsity.patterns import BlockOf, NofM, check_pattern
from lightning_cap.sparsity.targets import Targets
from tests.references.obs import best_weights, obs_block
from tests.references.sparsegpt import sparsegpt
from tests.support.layers import collector, layer_of, output_energy, total
from tests.support.toy import FEATURES, Toy, ToyData, callback, loaders, trainer, zeros

pytestmark = pytest.mark.usefixtures("seeded")


def _hessian(gram: Tensor, count: int, damp: float) -> np.ndarray:
    H: np.ndarray = 2 * gram.double().numpy() / count
    return H + damp * np.mean(np.diagonal(H, axis1=-2, axis2=-1)) * np.eye(H.shape[-1])


def _check_rows(
    path: Any, result: Any, weight: Tensor, hessians: np.ndarray, nm: tuple[int, int] | None = None
) -> None:
    """The order in every block, the losses, and the weights of every row: the best of all under its mask."""
    rank, losses, first = path.elimination.rank.numpy(), path.elimination.losses.numpy(), 0
    B = rank.shape[1]
    per_row = -(-hessians.shape[-1] // B)
    w = weight.detach().double().flatten(1).numpy()
    kept, moved = (np.asarray(part.flatten(1)) for part in (result.masks["weight"], result.weights["weight"]))
    for o, row in enumerate(w):
        H = hessians[o * len(hessians) // len(w)]
        for b in range(per_row):
            part = slice(b * B, min((b + 1) * B, len(row)))
            reference = obs_block(H[part, part], row[part], np.ones(part.stop - part.start, dtype=bool), 0.0, nm)
            size = len(reference.order)
            assert np.argsort(rank[first], kind="stable")[:size].tolist() == reference.order
            np.testing.assert_allclose(losses[first][:size], reference.losses, rtol=2e-3, atol=1e-6)
            first += 1
        expected = best_weights(H, row, kept[o], 0.0)
        np.testing.assert_allclose(moved[o], expected, rtol=2e-3, atol=2e-4)
    assert first == len(rank)


@pytest.mark.parametrize("block_size", [1, 5, 8, 100])
@pytest.mark.parametrize("damp", [1e-2, 1e-6])
def test_a_linear_layer_is_pruned_row_by_row(block_size: int, damp: float) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(12, 7)
    mix = torch.eye(12) + torch.randn(12, 12, generator=generator) / 2
    inputs = [torch.randn(25, 12, generator=generator) @ mix for _ in range(3)]
    source = collector(layer, inputs)
    targets = Targets({"weight": layer.weight})
    path = LayerwiseOBS(block_size=block_size, num_inputs=75, damp=damp).path(targets, source)
    result = path.at(0.6)
    assert int((~result.masks["weight"]).sum()) == round(0.6 * 84)
    _check_rows(path, result, layer.weight, _hessian(total(source), 75, damp))


@pytest.mark.parametrize("kind", ["stride", "groups", "conv1d", "same"])
def test_convolutions_are_pruned_row_by_row(kind: str) -> None:
    layer, shape = layer_of(kind)
    inputs = [torch.randn(30, *shape, generator=torch.Generator().manual_seed(2))]
    source = collector(layer, inputs)
    path = LayerwiseOBS(block_size=100, num_inputs=30, damp=1e-3).path(Targets({"weight": layer.weight}), source)
    _check_rows(path, path.at(0.5), layer.weight, _hessian(total(source), 30, 1e-3))


def test_the_saliency_is_the_change_of_the_output() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(20, 4, 6, 6, generator=torch.Generator().manual_seed(3)) + 0.5
    path = LayerwiseOBS(block_size=64, num_inputs=20, damp=1e-7).path(
        Targets({"weight": layer.weight}), collector(layer, [x])
    )
    before = layer(x).detach()
    dense, predicted = layer.weight.detach().clone(), []
    for sparsity in (0.3, 0.6, 0.9):
        result = path.at(sparsity)
        result.apply(Targets({"weight": layer.weight}))
        change = float((layer(x).detach() - before).square().sum()) / 20
        assert result.saliency == pytest.approx(change, rel=1e-3)
        predicted.append(change)
        with torch.no_grad():
            layer.weight.copy_(dense)
    magnitude = Magnitude().path(Targets({"weight": layer.weight})).at(0.6)
    magnitude.apply(Targets({"weight": layer.weight}))
    assert predicted[1] < 0.9 * float((layer(x).detach() - before).square().sum()) / 20


@pytest.mark.parametrize("kind", ["conv", "groups"])
def test_n_of_m_groups_lie_along_the_channels(kind: str) -> None:
    layer = nn.Conv2d(4, 6, (2, 3)) if kind == "conv" else nn.Conv2d(8, 6, (2, 3), groups=2)
    x = torch.randn(40, layer.in_channels, 4, 5, generator=torch.Generator().manual_seed(4))
    source = collector(layer, [x])
    targets = Targets({"weight": layer.weight})
    result = LayerwiseOBS(block_size=100, num_inputs=40, damp=1e-3, pattern=NofM(2, 4)).path(targets, source).at(0.5)
    check_pattern(targets, NofM(2, 4), result.masks)
    order = np.arange(24).reshape(4, 2, 3).transpose(1, 2, 0).ravel()  # (I, kH, kW) -> channels last
    H = _hessian(total(source), 40, 1e-3)
    for o, row in enumerate(layer.weight.detach().double().flatten(1).numpy()):
        own = H[o * len(H) // 6][np.ix_(order, order)]
        reference = obs_block(own, row[order], np.ones(24, dtype=bool), 0.0, (2, 4))
        np.testing.assert_array_equal(np.flatnonzero(~result.masks["weight"][o].flatten().numpy()[order]),
                                      np.sort(reference.order))  # fmt: skip
        np.testing.assert_allclose(result.weights["weight"][o].flatten().numpy()[order], reference.weights[-1],
                                   rtol=2e-3, atol=2e-4)  # fmt: skip


@pytest.mark.parametrize("pattern", [None, NofM(2, 4)])
@pytest.mark.parametrize(
    ("inputs", "rows", "backend"),
    [
        (256, 16, "auto"),
        (256, 16, "torch"),
        pytest.param(1536, 64, "auto", marks=pytest.mark.slow),
    ],
)
def test_changes_outputs_less_than_sparsegpt(inputs: int, rows: int, backend: Any, pattern: Any) -> None:
    """With rows longer than a block, too, of which SparseGPT knows those to the left."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.arange(1, inputs + 1).rsqrt().unsqueeze(-1)
    x = torch.randn(2 * inputs, inputs, generator=generator) @ mix
    layer = nn.Linear(inputs, rows, bias=False)
    source = collector(layer, [x])
    pruner = LayerwiseOBS(block_size=64, num_inputs=len(x), pattern=pattern, backend=backend)
    ours = pruner.path(Targets({"weight": layer.weight}), source).at(0.5).weights["weight"]
    dense, gram = layer.weight.detach().double(), total(source).squeeze(0)
    theirs = sparsegpt(dense, gram, 0.5, pattern and (2, 4))
    assert int((theirs == 0).sum()) == int((ours == 0).sum()) == layer.weight.numel() // 2

    def error(weight: Tensor) -> float:
        change = weight - dense
        return float(((change @ gram) * change).sum() / ((dense @ gram) * dense).sum())

    assert error(ours) < 0.9 * error(theirs)


def test_masks_zero_inputs_and_several_targets() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6))
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(5))
    x[:, 3] = 0.0  # a dead input: its weights cost nothing
    targets = Targets.from_model(model, include=["*"])
    masks = {n: torch.rand(w.shape, generator=torch.Generator().manual_seed(6)) > 0.2 for n, w in targets.items()}
    path = LayerwiseOBS(block_size=64, num_inputs=50).path(
        targets, InputCollector(model, targets, output_energy, [(x,)], 50), masks
    )
    result = path.at(0.5)
    assert [int((~m).sum()) for m in result.masks.values()] == [40, 24]  # uniform
    assert all(not (result.masks[n] & ~masks[n]).any() for n in targets)
    assert not result.masks["0.weight"][:, 3].any()
    flat = LayerwiseOBS(block_size=64, num_inputs=50, allocation=Global()).path(
        targets, InputCollector(model, targets, output_energy, [(x,)], 50)
    )
    assert sum(int((~m).sum()) for m in flat.at(0.5).masks.values()) == 64


def test_sources_and_settings_that_do_not_work() -> None:
    targets = Targets({"weight": nn.Parameter(torch.randn(4, 8))})
    with pytest.raises(GradientError, match=r"layer-wise pruning needs layer statistics \(LayerGrams\), got dict"):
        LayerwiseOBS().path(targets, [{"weight": torch.randn(3, 4, 8)}])
    with pytest.raises(GradientError, match="calibration batches are empty"):
        LayerwiseOBS().path(targets, [])
    broken = LayerGrams({"weight": torch.full((1, 8, 8), torch.nan)})
    broken.count = 3
    with pytest.raises(GradientError, match="layer inputs are not finite"):
        LayerwiseOBS().path(targets, [broken])
    with pytest.raises(ConfigError, match="num_inputs=0: give a whole number"):
        LayerwiseOBS(num_inputs=0)
    with pytest.raises(ConfigError, match="block_size=6 is not a multiple of the pattern's group of 4"):
        LayerwiseOBS(block_size=6, pattern=NofM(2, 4)).check(targets)
    LayerwiseOBS(block_size=192, pattern=BlockOf(4)).check(targets)


@pytest.mark.parametrize("pattern", [None, NofM(2, 4), BlockOf(2)])
def test_prune_a_cnn(tiny_cnn: nn.Module, pattern: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 3, 8, 8, generator=generator),) for _ in range(3)]
    before = [layer.weight.detach().clone() for layer in (tiny_cnn[2], tiny_cnn[6])]
    dense = torch.cat([tiny_cnn(x).detach() for (x,) in batches])
    steps = 1 if pattern == NofM(2, 4) else 2
    pruner = LayerwiseOBS(block_size=64, num_inputs=48, pattern=pattern)
    result = prune(tiny_cnn, batches, output_energy, 0.5, pruner, num_recomputations=steps, progress=False)
    assert list(result.weights) == ["2.weight", "6.weight"]
    assert [int((layer.weight == 0).sum()) for layer in (tiny_cnn[2], tiny_cnn[6])] == [432, 96]
    check_pattern(Targets.from_model(tiny_cnn), LayerwiseOBS(pattern=pattern).pattern)
    ours = (torch.cat([tiny_cnn(x).detach() for (x,) in batches]) - dense).square().sum()
    with torch.no_grad():
        for layer, weight in zip((tiny_cnn[2], tiny_cnn[6]), before, strict=True):
            layer.weight.copy_(weight)
    prune(tiny_cnn, batches, output_energy, 0.5, Magnitude(pattern=pattern), progress=False)
    theirs = (torch.cat([tiny_cnn(x).detach() for (x,) in batches]) - dense).square().sum()
    assert ours < theirs


def test_in_the_callback(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = Toy()
    hook = callback({1: 0.5, 2: 0.75}, pruner=LayerwiseOBS(block_size=16, num_inputs=40), dirpath=str(tmp_path))
    with caplog.at_level("INFO"):
        trainer(tmp_path, hook, max_epochs=3).fit(module, **loaders())
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["unit"], e["samples"], e["skipped"]) for e in events] == [("inputs", 40, 0)] * 2
    assert "pruned to 50.00% (40 inputs, " in caplog.text
    assert int(zeros(module).sum()) == 192
    assert all(not layer._forward_pre_hooks for layer in module.modules())
    assert math.isfinite(float(module.net[4].weight.detach().sum()))


def test_the_callback_refuses_before_training(tmp_path: Any) -> None:
    class Convs(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(),
                nn.Linear(18, 4),
            )  # fmt: skip

    module = Convs()
    hook = callback({1: 0.5}, pruner=LayerwiseOBS(block_size=16, num_inputs=40), include=["net.2.weight"])
    with pytest.raises(TargetError, match=r"'net\.2\.weight' belongs to a ConvTranspose2d"):
        trainer(tmp_path, hook).fit(module, train_dataloaders=DataLoader(ToyData(), batch_size=16))
    assert module.batches == []
