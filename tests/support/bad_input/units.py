"""Bad input where the units of a model are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import CAPError, ConfigError, TargetError, UnsupportedError
from lightning_cap.sparsity import Units
from tests.support.bad_input.table import Line, wrong

ROW = torch.ones(1, 4)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


class Detached(nn.Module):
    """What it returns does not depend on its parameters, for autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).detach()


class Tied(nn.Module):
    """Attention whose queries and keys are made by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.v, self.proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.q, self.v))
        return self.proj((q @ k.mT @ v).transpose(1, 2).flatten(2))


def found(
    model: Callable[[], Any], *words: str, inputs: Any = ROW, error: type[CAPError] = UnsupportedError, **options: Any
) -> Line:
    name = f"Units.from_model({model.__name__}, {options}): {words[0]}"
    return Line(name, lambda _: Units.from_model(model(), inputs, **options), error, words)


def infinite() -> nn.Module:
    model = mlp()
    nn.init.constant_(model[0].weight, torch.inf)
    return model


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


def units_of(**options: Any) -> Units:
    return Units.from_model(**options)


GIVEN = {"model": mlp(), "example_input": ROW}

LINES = [
    *wrong(units_of, "model", None, "resnet18", nn.Linear, 3, [mlp()], given=GIVEN),
    *wrong(units_of, "example_input", None, "x", 3, True, 1.5, float("nan"), Tensor, given=GIVEN),
    *wrong(units_of, "example_input", {}, [], (), torch.tensor(1.0), torch.ones(0, 4), ["x"], given=GIVEN),
    *wrong(units_of, "include", "0", 3, True, float("nan"), {"0": 1}, [None], [""], given=GIVEN, error=TargetError),
    *wrong(units_of, "exclude", "0", 3, True, float("nan"), {"0": 1}, [None], [""], given=GIVEN, error=TargetError),
    found(mlp, "include=[]", error=TargetError, include=[]),
    found(mlp, "include: 'nothing' matches no group of units. Near names: '0'", error=TargetError, include=["nothing"]),
    found(mlp, "'2' has none that can be pruned: an output of the model", error=TargetError, include=["2"]),
    found(mlp, "exclude: 'nothing'", error=TargetError, exclude=["nothing"]),
    found(mlp, "no units that could be pruned", "0 (not chosen)", error=TargetError, exclude=["*"]),
    found(mlp, "the forward pass on example_input failed in '0'", inputs=torch.ones(1, 5)),
    found(mlp, "failed in '0'", "dtype", inputs=torch.ones(1, 4, dtype=torch.int64)),
    found(mlp, "failed in its own forward", inputs={"image": ROW}),
    found(mlp, "empty or not finite", inputs=torch.full((1, 4), torch.nan), error=ConfigError),
    found(infinite, "empty or not finite", error=ConfigError),
    found(Detached, "what it returns has no gradient", "'body'"),
    found(Tied, "2 layers (used twice: q, v)", error=TargetError, inputs=torch.ones(1, 3, 4)),
    found(frozen, "(frozen: 0, 2)", error=TargetError),
    found(lambda: nn.Linear(4, 2), "the model itself (an output of the model)", error=TargetError),
    found(lambda: nn.LazyLinear(4), "not initialised yet", error=TargetError),
    found(lambda: mlp().to("meta"), "device meta", error=TargetError),
    found(nn.Identity, "has no gradient"),
    *wrong(Units.from_model(**GIVEN).records, "model", "resnet18", 3, True, nn.Linear, error=TargetError),
    *wrong(Units.from_model(**GIVEN).table, "model", "resnet18", 3, True, nn.Linear, error=TargetError),
]
