"""Bad input to `MaskSparsity` and `unit_penalty`. What depends on the Trainer is in `tests/callbacks/test_mask_sparsity.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lightning_cap import MaskSparsity
from lightning_cap.pruners import CAP, TaylorUnits
from lightning_cap.sparsity import unit_penalty
from tests.support.bad_input.table import NO_NUMBERS, Line, wrong
from tests.support.units import SmallNet, small_units

NO_NAMES: tuple[Any, ...] = ("blocks.*", 3, True, [3], [None], [""], {"a": 1}, object)
NO_EPOCHS: tuple[Any, ...] = (*NO_NUMBERS, 3.0, -1)
GIVEN: dict[str, Any] = {"weights": dict(SmallNet().named_parameters()), "units": small_units(), "kept": {}}

bad = partial(wrong, MaskSparsity, given={"goal": 0.5})
penalty = partial(wrong, unit_penalty, given=GIVEN)

LINES: list[Line] = [
    *wrong(MaskSparsity, "goal", *NO_NUMBERS, 0, 1.0, 50),
    *bad("pruner", CAP(), TaylorUnits, "TaylorUnits", 3, True, words=["TaylorUnits("]),
    *bad("strength", *NO_NUMBERS, 0, -0.1),
    *bad("epoch", *NO_EPOCHS),
    *bad("end_epoch", *(value for value in NO_EPOCHS if value is not None), 0),
    *bad("shifts", None, 1, "yes", []),
    *bad("include", *NO_NAMES),
    *bad("exclude", *NO_NAMES),
    *bad("seed", *NO_EPOCHS, 2**63),
    *penalty("weights", None, 3, [torch.ones(2)]),
    *wrong(
        unit_penalty, "weights", {}, given={**GIVEN, "kept": {"fc1": torch.zeros(12, dtype=torch.bool)}}, words=["fc1"]
    ),
    *penalty("units", None, 3, {}, ["fc1"]),
    *penalty(
        "kept", None, 3, {"fc9": torch.ones(2)}, {"fc1": None}, {"fc1": torch.ones(12)}, {"fc1": torch.ones(3) > 0}
    ),
    *penalty("shifts", None, 1, "yes"),
]
