"""Bad input to `prune`; the model is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap import prune
from lightning_cap.errors import CAPError, ConfigError, GradientError, PatternError, TargetError, UnsupportedError
from lightning_cap.pruners import CAP, DropAndGrow, Magnitude, Pruner, Taylor
from lightning_cap.sparsity import NofM
from tests.support.bad_input.table import NO_COUNTS, NO_HEALS, NO_NUMBERS, Line, wrong

BATCH = (torch.ones(8, 6), torch.arange(8) % 3)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def loss(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def without_arguments() -> Tensor:
    return torch.zeros(())


def of_batches(batch: Any) -> Tensor:
    return torch.zeros(())


def pruned(**given: Any) -> Any:
    """Named as `prune`; raises `AssertionError` where the model is not left as it was."""
    net = given.setdefault("model", model())
    before = {n: v.clone() for n, v in net.state_dict().items()} if isinstance(net, nn.Module) else {}
    training = getattr(net, "training", None)
    usual = {"batches": [BATCH], "loss_fn": loss, "sparsity": 0.5, "pruner": CAP(num_gradients=8), "progress": False}
    try:
        return prune(**{**usual, **given})
    except CAPError:
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
        assert getattr(net, "training", None) is training
        raise


def of_loss(name: str, function: Callable[..., Any], *words: str, pruner: Pruner | None = None) -> Line:
    def run(_: Path) -> None:
        pruned(loss_fn=function, include=["2.weight"], **({} if pruner is None else {"pruner": pruner}))

    return Line(f"prune: a loss that is {name}", run, GradientError, words)


LINES = [
    *wrong(pruned, "model", None, "model", 3, nn.Linear, [nn.Linear(2, 2)], {"a": torch.ones(2)}),
    *wrong(pruned, "batches", None, 3, "data", True, torch.ones(8, 6), {"x": torch.ones(8, 6)}, object, torch.ones(())),
    *wrong(pruned, "loss_fn", None, "loss", 3, [loss], torch.ones(2), without_arguments, of_batches, int, CAP, nn.Linear(2, 2)),
    *wrong(pruned, "sparsity", *NO_NUMBERS, 1.0, -0.1, 50, torch.tensor(0.5), error=PatternError),
    *wrong(pruned, "pruner", CAP, "CAP", 3, [CAP()], True, NofM()),
    *wrong(pruned, "include", "2.weight", 3, True, {"2.weight": 1}, [3], [None], error=TargetError),
    *wrong(pruned, "exclude", "2.weight", 3, True, [3], [""], error=TargetError),
    *wrong(pruned, "num_recomputations", *NO_COUNTS, 10**12),
    *wrong(pruned, "heal", *NO_HEALS),
    *wrong(pruned, "recalibrate", None, 1, "yes", []),
    *wrong(pruned, "recomputation_path", None, True, "cubic", ["linear"], 2),
    *wrong(pruned, "progress", "yes", 1, None, []),
    Line("prune: an iterator for two steps", lambda _: pruned(batches=iter([BATCH]), num_recomputations=2), ConfigError,
         ("num_recomputations=2", "iterator")),
    Line("prune: no batches", lambda _: pruned(batches=[]), GradientError, ("batches",)),
    Line("prune: no batches for named targets", lambda _: pruned(batches=[], include=["2.weight"]), GradientError,
         ("batches",)),
    Line("prune: regrowth", lambda _: pruned(pruner=DropAndGrow()), UnsupportedError, ("pruner=DropAndGrow",)),
    Line("prune: 2:4 in two steps", lambda _: pruned(pruner=CAP(pattern=NofM()), num_recomputations=2), ConfigError,
         ("num_recomputations=2",)),
    Line("prune: include of nothing", lambda _: pruned(include=["nope"]), TargetError, ("include: 'nope'",)),
    Line("prune: not the sparsity of the pattern", lambda _: pruned(pruner=Magnitude(pattern=NofM(1, 3)), sparsity=0.5),
         PatternError, ("sparsity=0.5",)),
    of_loss("None", lambda net, batch: None, "loss: got a NoneType"),
    of_loss("a number", lambda net, batch: 0.5, "loss: got a float"),
    of_loss("a vector", lambda net, batch: net(batch[0]).sum(-1), "loss: got a tensor of shape (4,)",
            pruner=CAP(num_gradients=2, samples_per_gradient=4)),
    of_loss("detached", lambda net, batch: loss(net, batch).detach(), "no gradient"),
    of_loss("of no target", lambda net, batch: net[4].weight.sum(), "depends on none"),
    of_loss("zero", lambda net, batch: 0 * loss(net, batch), "all 8 are zero"),
    of_loss("zero, for Taylor", lambda net, batch: 0 * loss(net, batch), "all 8 are zero", pruner=Taylor(num_gradients=8)),
    of_loss("not a number", lambda net, batch: loss(net, batch) * float("nan"), "finite"),
]  # fmt: skip
