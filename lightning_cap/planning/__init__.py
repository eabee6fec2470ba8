"""What a run would do and cost, told before it begins: `plan_fit` and `plan_oneshot`."""

from __future__ import annotations

from lightning_cap.planning.oneshot import plan_oneshot
from lightning_cap.planning.run_plan import RunPlan
from lightning_cap.planning.text import print_plan
from lightning_cap.planning.training import plan_fit

__all__ = ["RunPlan", "plan_fit", "plan_oneshot", "print_plan"]
