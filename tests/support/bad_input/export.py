"""Bad input to the writing of plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError
from lightning_cap.export.safetensors import goal_stem, plain_model, save_plain_weights, save_weights
from lightning_cap.sparsity import Targets
from tests.support.bad_input.table import NO_NUMBERS, Line, wrong

MODEL = nn.Linear(2, 2)
TARGETS = Targets({"weight": MODEL.weight})


def save(path: Any = "w.safetensors", state: Any = None, metadata: Any = None) -> None:
    """Named as `save_plain_weights`, with a state dict."""
    save_plain_weights(path, {"w": torch.ones(2)} if state is None else state, {} if metadata is None else metadata)


def weights(module: Any = MODEL, targets: Any = TARGETS, path: Any = "w.safetensors", **given: Any) -> None:
    """Named as `save_weights`, with a model."""
    save_weights(module, targets, path, **{"sparsity": 0.5, "goal": 0.5, **given})


def into_a_folder(folder: Path) -> None:
    save_plain_weights(folder, {"w": torch.ones(2)}, {})


def entry(
    name: str, word: str, state: Mapping[Any, Any] | None = None, metadata: Mapping[Any, Any] | None = None
) -> Line:
    return Line(f"save_plain_weights: {name}", lambda _: save(state=state, metadata=metadata), ConfigError, (word,))


def meta() -> dict[str, Tensor]:
    return {"w": torch.ones(2, device="meta")}


LINES = [
    *wrong(goal_stem, "goal", *NO_NUMBERS, -0.1, 1.5, given={"name": "flops"}),
    *wrong(goal_stem, "name", None, 3, True, "", given={"goal": 0.5}),
    *wrong(save, "path", 3, True, ["w"], "", " ", object, 1.5),
    *wrong(save, "state", 3, "w", [torch.ones(2)], torch.ones(2), MODEL),
    *wrong(save, "metadata", 3, "w", [("a", "b")]),
    Line("save_plain_weights: a folder", into_a_folder, ConfigError, ("path=", "this is a folder")),
    entry("a list", "state: 'w' is [1.0]", {"w": [1.0]}),
    entry("None", "state: 'w' is None", {"w": None}),
    entry("a number for a name", "state: 3 is", {3: torch.ones(2)}),
    entry("a sparse tensor", "state: 'w' is", {"w": torch.ones(2, 2).to_sparse()}),
    entry("a tensor without data", "state: 'w' is", meta()),
    entry("a number in the header", "metadata: 'a' is 3", metadata={"a": 3}),
    entry("None in the header", "metadata: 'a' is None", metadata={"a": None}),
    entry("a number for a name in the header", "metadata: 3 is 'a'", metadata={3: "a"}),
    *wrong(weights, "module", None, "model", {"w": torch.ones(2)}, nn.Linear),
    *wrong(weights, "targets", None, MODEL, "weight", ["weight"], Targets),
    *wrong(weights, "path", None, 3, "", True, ["w"]),
    *wrong(weights, "sparsity", "0.5", None, True, 1.5, float("nan"), torch.tensor(0.5)),
    *wrong(weights, "goal", "0.5", None, True, -0.1, float("inf")),
    *wrong(plain_model, "module", None, "model", nn.Linear, given={"target_names": []}),
    *wrong(plain_model, "target_names", None, "weight", 3, {"weight": 1}, given={"module": MODEL}),
]
