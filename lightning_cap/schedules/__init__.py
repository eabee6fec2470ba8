"""When to prune to which sparsity: pure functions of the epoch."""

from lightning_cap.schedules.base import SparsitySchedule, check_events
from lightning_cap.schedules.gradual import ExponentialSchedule, OneShot, PolynomialSchedule, SparsitySteps
from lightning_cap.schedules.recurrent import AlternatingSchedule, RepeatedSchedule

__all__ = [
    "AlternatingSchedule",
    "ExponentialSchedule",
    "OneShot",
    "PolynomialSchedule",
    "RepeatedSchedule",
    "SparsitySchedule",
    "SparsitySteps",
    "check_events",
]
