"""When to prune to which sparsity: functions of the epoch, and one of the weights too."""

from lightning_cap.schedules.adaptive import PQAdaptive, pq_index
from lightning_cap.schedules.base import SparsitySchedule, check_events
from lightning_cap.schedules.gradual import ExponentialSchedule, OneShot, PolynomialSchedule, SparsitySteps
from lightning_cap.schedules.recurrent import AlternatingSchedule, RepeatedSchedule

__all__ = [
    "AlternatingSchedule",
    "ExponentialSchedule",
    "OneShot",
    "PQAdaptive",
    "PolynomialSchedule",
    "RepeatedSchedule",
    "SparsitySchedule",
    "SparsitySteps",
    "check_events",
    "pq_index",
]
