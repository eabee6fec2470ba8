"""Bad input to the count of FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity import ModelFlops, model_flops, zero_shares
from tests.support.bad_input.table import NO_COUNTS, Line, wrong

NET = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
FLOPS = ModelFlops({"0.weight": 32, "0.bias": 0}, 40)
NO_SHARES: tuple[Any, ...] = ("half", None, True, float("nan"), -0.1, 1.1, [0.5], 1j)


def run() -> Any:
    return NET(torch.ones(1, 4))


def counting(name: str, word: str, model: nn.Module, forward: Any) -> Line:
    return Line(f"model_flops: {name}", lambda _: model_flops(model, forward), ConfigError, (word,))


def given(sparsities: Any, *words: str) -> list[Line]:
    return [
        Line(
            f"ModelFlops.{method}({sparsities!r})",
            lambda _, m=method: getattr(FLOPS, m)(sparsities),
            ConfigError,
            words,
        )
        for method in ("effective", "saved", "effective_layers")
    ]


LINES: list[Line] = [
    *wrong(model_flops, "model", "vit", None, nn.Linear, 3, [NET], given={"run": run}),
    *wrong(model_flops, "run", "NET", None, 3, torch.ones(1, 4), [run], given={"model": NET}),
    *wrong(model_flops, "examples", *NO_COUNTS, given={"model": NET, "run": run}),
    *wrong(zero_shares, "weights", "all", None, 3, [torch.ones(2)], torch.ones(2)),
    Line("zero_shares of lists", lambda _: zero_shares({"a": [0.0]}), ConfigError, ("weights['a']=[0.0]",)),  # type: ignore[dict-item]
    counting("another width", "does not run on the example input; '0' failed", NET, lambda: NET(torch.ones(1, 5))),
    counting("no tensor", "does not run on the example input", NET, lambda: NET("image.png")),
    counting("outside of layers", "its own forward failed", NET, lambda: 1 / 0),
    counting("one that takes a batch", "give a function of 0 arguments", NET, lambda batch: NET(batch)),
    counting("nothing run", "no product or convolution to count", NET, lambda: None),
    counting("not initialised", "has no values yet", nn.LazyLinear(3), run),
    counting("on meta", "has no values yet", nn.Linear(2, 2, device="meta"), run),
    *given("half", "sparsities='half'"),
    *given(0.5, "sparsities=0.5"),
    *given(None, "sparsities=None"),
    *given({"1.weight": 0.5}, "'1.weight' is no parameter of the model"),
    *given({0: 0.5}, "0 is no parameter of the model"),
    *[line for share in NO_SHARES for line in given({"0.weight": share}, "sparsities['0.weight']=")],
]  # fmt: skip
