"""Bad input to the choice of what is pruned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import TargetError
from lightning_cap.sparsity import Ends, Targets, find_ends
from tests.support.bad_input.table import Line, wrong

_NO_LISTS: tuple[Any, ...] = ("*", 3, 0.5, True, {"1.weight": 1}, {"1.weight"}, object, torch.ones(2), float("nan"))
_NO_LISTS_OF_NAMES: tuple[Any, ...] = ([3], [None], [["1.weight"]], [""], ("1.weight", 1.0), b"1.weight")
_NO_MODELS: tuple[Any, ...] = (None, "vit", 3, nn.Linear, [nn.Linear(2, 2)], {}, torch.ones(2), float("nan"))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def from_model(model: Any = None, **options: Any) -> Targets:
    return Targets.from_model(_net(), **options)


def from_no_model(model: Any) -> Targets:
    return Targets.from_model(model)


def ends_of_no_model(model: Any) -> Ends:
    return find_ends(model, lambda: torch.ones(2))


def ends_by(loss: Any) -> Ends:
    return find_ends(_net(), loss)


def _refused(name: str, words: tuple[str, ...], **options: Any) -> Line:
    return Line(f"targets: {name}", lambda _: from_model(**options), TargetError, words)


def _refused_model(name: str, words: tuple[str, ...], change: Any, **options: Any) -> Line:
    def run(_: Any) -> Any:
        net = _net()
        change(net)
        return Targets.from_model(net, **options)

    return Line(f"targets: {name}", run, TargetError, words)


def _tie(net: nn.Sequential) -> None:
    net.append(nn.Linear(3, 3))
    net[4].weight = net[1].weight


def _complex(net: nn.Sequential) -> None:
    net[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))


def _empty(net: nn.Sequential) -> None:
    net[1].weight = nn.Parameter(torch.ones(0, 3))


def _weight_norm(net: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(net[1])


def _loss_without_graph() -> Tensor:
    return torch.ones(())


LINES = [
    *wrong(from_no_model, "model", *_NO_MODELS, error=TargetError),
    *wrong(ends_of_no_model, "model", *_NO_MODELS, error=TargetError),
    *wrong(from_model, "include", *_NO_LISTS, *_NO_LISTS_OF_NAMES, error=TargetError, words=("list of names or globs",)),
    *wrong(from_model, "exclude", *_NO_LISTS, *_NO_LISTS_OF_NAMES, error=TargetError, words=("list of names or globs",)),
    *wrong(from_model, "ends", "first", 3, True, ["0.weight"], {"first": ["0.weight"]}, Ends, torch.ones(2), error=TargetError),
    *(line for name in ("first", "last", "unreached") for line in wrong(
        Ends, name, None, "head.weight", 3, True, {"head.weight": 1}, [3], [""], (None,), object, error=TargetError)),
    *wrong(Ends, "by_order", None, 3, True, ["x"], error=TargetError),
    *wrong(ends_by, "loss", None, "loss", 3, torch.ones(2), [1], float("nan"), error=TargetError, words=("lambda",)),
    *wrong(Targets, "weights", None, 3, "fc.weight", [torch.ones(2)], torch.ones(2), nn.Linear(2, 2), {1: torch.ones(2)},
           {"w": 3}, {"w": None}, {"w": [1.0]}, error=TargetError),
    *wrong(Targets, "paths", 3, "w", ["w"], {"v": "w"}, error=TargetError, given={"weights": {"w": torch.ones(2)}}),
    _refused("include=[]", ("include=[] selects nothing",), include=[]),
    _refused("include matches nothing", ("include", "'1.weigth' matches no parameter", "'1.weight'"), include=["1.weigth"]),
    _refused("include of another case", ("'*.WEIGHT' matches no parameter",), include=["*.WEIGHT"]),
    _refused("exclude matches nothing", ("exclude", "'teacher.*' matches no parameter"), exclude=["teacher.*"]),
    _refused("one pattern of two matches nothing", ("'9.weight'",), include=["1.weight", "9.weight"]),
    _refused("include of norms", ("matches only '2.weight', '2.bias'", "exact name"), include=["2.*"]),
    _refused("everything excluded", ("no prunable weight left", "3 (last)", "1 (excluded)"), exclude=["1.*"]),
    _refused("included and excluded", ("no prunable weight left", "1 (excluded)"), include=["1.weight"], exclude=["1.weight"]),
    _refused("no gradient for any", ("no prunable weight left", "1 (no gradient)"),
             ends=Ends(("0.weight",), ("3.weight",), ("1.weight",))),
    _refused_model("all frozen", ("no prunable weight left", "(frozen)"), lambda net: net.requires_grad_(False)),
    _refused_model("frozen and named", ("'1.weight' is frozen", "Unfreeze", "exclude"),
                   lambda net: net.requires_grad_(False), include=["1.weight"]),
    _refused_model("tied", ("'1.weight' is tied", "'4.weight'", "exclude"), _tie),
    _refused_model("complex", ("'1.weight' is of type torch.complex64",), _complex),
    _refused_model("empty", ("'1.weight' is empty",), _empty),
    _refused_model("weight norm", ("no parameters, 1 (parametrized by WeightNorm)", "remove_parametrizations"), _weight_norm,
                   include=["1.weight"]),
    Line("targets: nothing in the model", lambda _: from_no_model(nn.ReLU()), TargetError, ("no prunable weight", "none")),
    Line("targets: lazy", lambda _: Targets.from_model(nn.Sequential(nn.LazyLinear(2)), include=["*"]), TargetError,
         ("'0.weight' is not initialised yet",)),
    Line("targets: ends of a lazy model", lambda _: find_ends(nn.Sequential(nn.LazyLinear(2)), lambda: 0), TargetError,
         ("'0.weight' is not initialised yet",)),
    Line("targets: a loss without a graph", lambda _: ends_by(_loss_without_graph), TargetError, ("has a gradient",)),
    Line("targets: a loss that gives nothing", lambda _: ends_by(lambda: None), TargetError, ("has a gradient",)),
]  # fmt: skip
