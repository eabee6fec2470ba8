"""`DropAndGrow` against a plain re-implementation of one update, and on two processes. In a run: `test_regrowth.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.comparison import compare
from lightning_cap.errors import ConfigError, GradientError, PatternError, UnsupportedError
from lightning_cap.oneshot import prune
from lightning_cap.pruners import DropAndGrow, Pruner, PruneResult
from lightning_cap.sparsity.allocation import Global, Uniform
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.comparing import Data
from tests.support.problems import Rows, gradient_rows, random_masks, random_targets
from tests.support.processes import on_ranks
from tests.support.toy import Toy, ToyData, loss, trainer


@pytest.fixture
def targets() -> Targets:
    return random_targets()


@pytest.fixture
def rows(targets: Targets) -> Rows:
    return gradient_rows(targets, 40)


def oracle(
    weights: np.ndarray, gradients: np.ndarray, alive: np.ndarray, zeros: int, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """One update of one budget in float64: new weights and mask, all flat; ``gradients`` (n, d)."""
    d, masked = len(weights), int((~alive).sum())
    exchanged = math.floor(Fraction(str(fraction)) * (d - zeros)) if masked else 0
    mask, weights = alive.copy(), np.where(alive, weights, 0.0)
    for i in np.argsort(np.abs(weights), kind="stable"):  # drop
        if (~mask).sum() >= zeros + exchanged:
            break
        if alive[i]:
            mask[i] = False
    for i in np.argsort(-np.abs(gradients.mean(0)), kind="stable"):  # grow
        if (~mask).sum() <= zeros:
            break
        mask[i] = True
    return np.where(mask, weights, 0.0), mask


def flat(tensors: dict[str, Tensor], names: list[str]) -> np.ndarray:
    return np.concatenate([tensors[n].detach().numpy().reshape(-1) for n in names])


def flat_rows(rows: Rows, names: list[str]) -> np.ndarray:
    whole = [np.concatenate([chunk[n].flatten(1).numpy() for n in names], axis=1) for chunk in rows]
    return np.concatenate(whole).astype(np.float64)


def check(
    result: PruneResult, targets: Targets, rows: Rows, masks: dict[str, Tensor], groups: Any, fraction: float
) -> None:
    for names, zeros in groups:
        weights, kept = oracle(
            flat(targets.weights(), names), flat_rows(rows, names), flat(masks, names), zeros, fraction
        )
        assert np.array_equal(flat(dict(result.masks), names), kept)
        assert np.array_equal(flat(dict(result.weights), names), weights.astype(np.float32))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.95])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
def test_an_update_is_the_oracles(targets: Targets, rows: Rows, share: float, sparsity: float, fraction: float) -> None:
    masks = random_masks(targets, share)
    zeros = math.floor(sparsity * targets.numel + 0.5)
    path = DropAndGrow(drop_fraction=fraction).path(targets, rows, masks)
    result = path.at(sparsity)
    check(result, targets, rows, masks, [(list(targets), zeros)], fraction)
    assert sum(int((~mask).sum()) for mask in result.masks.values()) == zeros
    assert result.sparsity == pytest.approx(zeros / targets.numel)
    assert path.curve([sparsity]) == [result.saliency]
    grown = sum(int((result.masks[n] & ~masks[n]).sum()) for n in targets)
    assert result.stats["grown"] == grown
    assert grown > 0 or fraction == 0 or share == 0 or sparsity == 0.9


def test_weights_are_exchanged_within_the_budgets(targets: Targets, rows: Rows) -> None:
    masks = random_masks(targets, 0.5)
    result = DropAndGrow(drop_fraction=0.4, allocation=Uniform()).path(targets, rows, masks).at(0.5)
    groups = [([name], weight.numel() // 2) for name, weight in targets.items()]
    check(result, targets, rows, masks, groups, 0.4)


def test_the_first_event_drops_by_magnitude_and_reads_no_gradient(targets: Targets) -> None:
    def unread() -> Iterator[dict[str, Tensor]]:
        raise AssertionError("gradients were read")
        yield

    result = DropAndGrow(drop_fraction=0.5).path(targets, unread()).at(0.5)
    values = flat(targets.weights(), list(targets))
    kept = np.zeros(len(values), dtype=bool)
    kept[np.argsort(-np.abs(values))[: len(values) // 2]] = True
    assert np.array_equal(flat(dict(result.masks), list(targets)), kept)


def test_a_weight_that_was_dropped_a_moment_before_stays_as_it_was() -> None:
    targets = Targets({"w": nn.Parameter(torch.tensor([[0.1, 2.0, 3.0, 0.0]]))})
    masks = {"w": torch.tensor([[True, True, True, False]])}
    for gradient, weights, grown in (([9.0, 0, 0, 1], [0.1, 2, 3, 0], 0), ([1.0, 9, 9, 9], [0, 2, 3, 0], 1)):
        result = DropAndGrow(drop_fraction=0.5).path(targets, [{"w": torch.tensor([[gradient]])}], masks).at(0.25)
        assert result.weights["w"].tolist() == [pytest.approx(weights)]
        assert result.masks["w"].tolist() == [[not grown, True, True, bool(grown)]]
        assert result.stats == {"dropped": grown, "grown": grown}


def test_ties_go_to_the_earlier_weight() -> None:
    targets = Targets({"w": nn.Parameter(torch.zeros(1, 6))})
    masks = {"w": torch.zeros(1, 6, dtype=torch.bool)}
    result = DropAndGrow(drop_fraction=0.5).path(targets, [{"w": torch.ones(1, 1, 6)}], masks).at(0.5)
    assert result.masks["w"].tolist() == [[True] * 3 + [False] * 3]


def test_the_sign_of_the_mean_gradient_does_not_matter_but_the_mean_does() -> None:
    targets = Targets({"w": nn.Parameter(torch.zeros(1, 3))})
    masks = {"w": torch.zeros(1, 3, dtype=torch.bool)}
    rows = [{"w": torch.tensor([[[9.0, -1, 0.5]], [[-9.0, -1, 0.5]]])}]
    assert DropAndGrow(drop_fraction=0).path(targets, rows, masks).at(2 / 3).masks["w"].tolist() == [
        [False, True, False]
    ]


def test_fraction_falls_by_a_cosine() -> None:
    pruner = DropAndGrow(drop_fraction=0.4)
    fractions = []
    for done in (0.0, 0.25, 0.5, 1.0):
        pruner.begin_event(done)
        fractions.append(pruner.fraction)
    assert fractions == pytest.approx([0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.0])
    assert pruner.regrows
    assert not Pruner.regrows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"drop_fraction": 1.0}, r"drop_fraction=1\.0"),
        ({"drop_fraction": -0.1}, r"drop_fraction=-0\.1"),
        ({"num_gradients": 0}, "num_gradients=0"),
        ({"samples_per_gradient": 0}, "samples_per_gradient=0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DropAndGrow(**arguments)


def test_gradients_that_say_nothing_are_refused(targets: Targets, rows: Rows) -> None:
    masks = random_masks(targets, 0.5)
    with pytest.raises(GradientError, match="gave no gradient row"):
        DropAndGrow().path(targets, (), masks)
    rows[1]["conv"][0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(GradientError, match="'conv' are not finite"):
        DropAndGrow().path(targets, rows, masks)
    with pytest.raises(PatternError, match=r"sparsity=1\.5"):
        DropAndGrow().path(targets, rows[:1], masks).at(1.5)


def test_one_shot_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"pruner=DropAndGrow.*does not train"):
        prune(nn.Linear(4, 4), [], loss, 0.5, DropAndGrow(), include=["weight"])
    with pytest.raises(UnsupportedError, match="pruner=DropAndGrow"):
        compare(trainer(tmp_path), Toy(), DropAndGrow(), [0.5], datamodule=Data())


def test_instantiates_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pruner", type=Pruner)
    allocation = {"class_path": "lightning_cap.sparsity.Uniform"}
    given = {
        "class_path": "lightning_cap.pruners.DropAndGrow",
        "init_args": {"drop_fraction": 0.2, "allocation": allocation},
    }
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
    pruner = instantiate(parser.parse_object({"pruner": given})).pruner
    assert isinstance(pruner, DropAndGrow)
    assert (pruner.drop_fraction, pruner.allocation) == (0.2, Uniform())
    assert DropAndGrow().allocation == Global()


def update_on_this_rank(samples: int) -> tuple[PruneResult, int]:
    """One update of a small network with this rank's share of the batches, and how many chunks it had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    targets = Targets.from_model(model)
    masks = random_masks(targets, 0.5)
    targets.restore({name: weight * masks[name] for name, weight in targets.weights().items()})
    pruner = DropAndGrow(drop_fraction=0.3, num_gradients=13, samples_per_gradient=samples)
    batches = CalibrationBatches(DataLoader(ToyData(), batch_size=8), 13 * samples, samples, 0, 0)
    chunks = 0

    class Counted:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            nonlocal chunks
            for chunk in GradientCollector(model, targets, loss, batches, 13, samples):
                chunks += 1
                yield chunk

    result = pruner.path(targets, Counted(), masks).at(0.6)
    distributed.check_equal_on_all_ranks({"the weights": result.weights, "the masks": result.masks})
    return result, chunks


def both_updates() -> list[tuple[PruneResult, int]]:
    return [update_on_this_rank(samples) for samples in (1, 8)]


@pytest.mark.xdist_group("processes")
def test_two_processes_choose_what_one_does(tmp_path: Path) -> None:
    alone = both_updates()
    ranks = on_ranks(2, tmp_path, both_updates)
    for (one, _), *both in zip(alone, *ranks, strict=True):
        assert one.stats["grown"] > 10
        assert len({chunks for _, chunks in both}) == 1, "every rank gives as many chunks, some of them empty"
        for result, _ in both:
            for name, mask in one.masks.items():
                assert torch.equal(result.masks[name], mask)
                assert torch.equal(result.weights[name], one.weights[name])
