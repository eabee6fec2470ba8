"""What a schedule is: a function from the epochs of a run, and from the weights if it adapts, to sparsities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_cap.errors import ScheduleError
from lightning_cap.utilities.arguments import require_flag, require_real, require_whole, shown
from lightning_cap.utilities.decimals import plain_float

if TYPE_CHECKING:
    from torch import Tensor

_MOST_EVENTS = 10**6


class SparsitySchedule(ABC):
    """Says at the start of which epochs to prune, and to which sparsity.

    A sparsity is the fraction of zeros, those already there included, over all weights of the targets. A subclass of
    your own implements `events` and passes what it computed through `check_events`.
    """

    @property
    def regrows(self) -> bool:
        """Whether pruned weights come back at an event whose sparsity is below the one that is reached."""
        return False

    @property
    def adapts(self) -> bool:
        """Whether the sparsity of an event is found when it comes, by `adapted`; `events` then says the most that it may be."""
        return False

    def adapted(self, planned: float, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float | None:
        """The sparsity of an event that has come, of a schedule that adapts. The weights alone may decide, as runs are resumed.

        Args:
            planned: What `events` said.
            weights: ``{target: (*shape)}``, as they are now.
            masks: ``{target: bool (*shape)}``, True = kept.

        Returns:
            Sparsity to reach in ``[0, planned]``; None where nothing is to be pruned.
        """
        return planned

    @abstractmethod
    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The pruning events of a run.

        Args:
            max_epochs: The number of epochs of the run; ``None`` means unlimited.

        Returns:
            Sparsity to reach in ``[0, 1)`` by epoch, in order. An event takes place at the *start* of its epoch (counted
            from 0); the epoch ``max_epochs`` means the end of training.

        Raises:
            ScheduleError: If the schedule does not fit into ``max_epochs`` epochs.
        """


def check_events(
    events: Mapping[int, float], max_epochs: int | None, *, allow_decrease: bool = False
) -> dict[int, float]:
    """Check the events of a schedule and put them in order.

    Args:
        events: Sparsity to reach by epoch. Keys may be strings of digits; one that names an epoch again stands in its place, as
            ``--...steps.0=0.4`` on a command line does.
        max_epochs: The number of epochs of the run; ``None`` means unlimited.
        allow_decrease: Whether a later sparsity may be lower than an earlier one.

    Returns:
        The same events ordered by epoch, as plain ints and floats (`np.float32(0.3)` is 0.3).

    Raises:
        ScheduleError: There are none, an epoch or a sparsity is not one, the sparsity falls although
            ``allow_decrease`` is not set, or an event lies beyond the last epoch.
    """
    require_max_epochs(max_epochs)
    require_flag("allow_decrease", allow_decrease)
    if not isinstance(events, Mapping) or not events:
        raise ScheduleError(f"events={shown(events)}: give at least one {{epoch: sparsity}}, such as {{0: 0.5}}.")
    read: dict[int, float] = {}
    for key, sparsity in events.items():
        epoch = _key(key)
        require_epoch("epoch", epoch)
        require_sparsity(f"sparsity of epoch {epoch}", sparsity)
        if epoch in read and not isinstance(key, str):
            raise ScheduleError(f"epoch={epoch}: it is there twice, in {shown(list(events))}. Give each epoch once.")
        read[int(epoch)] = plain_float(sparsity)
    ordered = dict(sorted(read.items()))
    steps = list(ordered.items())
    if not allow_decrease:
        for (epoch, sparsity), (later, lower) in pairwise(steps):
            if lower < sparsity:
                raise ScheduleError(
                    f"the schedule decreases from sparsity {sparsity} at epoch {epoch} to {lower} at epoch {later}; "
                    f"pruned weights do not come back: raise the later one, or declare it with "
                    f"SparsitySteps(..., allow_decrease=True)"
                )
    last_event = steps[-1][0]
    if max_epochs is not None and last_event >= max_epochs:
        raise ScheduleError(
            f"the schedule prunes at the start of epoch {last_event}, but with max_epochs={max_epochs} the last epoch "
            f"is {max_epochs - 1}; prune earlier or raise the Trainer's max_epochs"
        )
    return ordered


def require_epoch(name: str, value: object, at_least: int = 0) -> None:
    """Refuse what is no epoch, or an earlier one than ``at_least``."""
    require_whole(name, value, at_least=at_least, example=max(20, at_least), error=ScheduleError)


def require_sparsity(name: str, value: object) -> None:
    """Refuse what is no fraction of zeros."""
    require_real(name, value, "[0, 1)", example=0.5, error=ScheduleError)


def require_max_epochs(value: object) -> None:
    """Refuse what is neither None nor a number of epochs."""
    if value is not None:
        require_whole("max_epochs", value, at_least=0, example=100, error=ScheduleError)


def every(frequency: int, start: int, end: int) -> range:
    """The epochs from ``start`` to before ``end``, ``frequency`` apart.

    Raises:
        ScheduleError: There are more than a million.
    """
    epochs = range(start, end, frequency)
    if (end - start) // frequency > _MOST_EVENTS:
        raise ScheduleError(
            f"end={end}: from epoch {start} on every {frequency} epochs, that is more than {_MOST_EVENTS} events. Give fewer."
        )
    return epochs


def _key(epoch: Any) -> Any:
    """The epoch of a mapping's key; strings of digits are taken, since JSON and YAML keys may be strings."""
    return int(epoch) if isinstance(epoch, str) and epoch.strip().isdecimal() else epoch
