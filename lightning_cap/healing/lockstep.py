"""Functions that run in turn, each up to where it pauses: forward passes that wait for each other at every layer."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch

from lightning_cap.utilities import rng

_own = threading.local()


class _Ended(BaseException):
    """Ends a paused function that is not to go on. No ``except Exception`` on its way takes it for an error."""


class PausedCall:
    """A function in a thread of its own, which runs only while `resume` waits for it.

    So never two run at once, and what they do is in the order in which they are resumed. It goes on with the random state, the
    context variables and the CUDA stream that it had. What torch keeps per thread (grad mode, autocast, function modes) it must
    enter itself.

    Args:
        function: Calls `pause` wherever it is to wait.
        device: Whose current stream it is to use.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = self._done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._random: dict[str, Any] | None = None
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        context = contextvars.copy_context()
        run = self._run, function, stream
        self._thread = threading.Thread(target=context.run, args=run, name="lockstep", daemon=True)

    def resume(self) -> Any:
        """Let it go on.

        Returns:
            What it pauses with; None at its end.

        Raises:
            BaseException: What it raised.
        """
        if self._done:
            return None
        if self._random is not None:
            rng.restore(self._random)
        self._switch()
        self._random = None if self._done else rng.capture()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._value

    def close(self) -> None:
        """End it where it is, and wait for that."""
        self._stopped = True
        if self._thread.ident is not None:
            self._turn.release()
            self._thread.join()

    def _switch(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._back.acquire()

    def _run(self, function: Callable[[], None], stream: Any) -> None:
        _own.call = self
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                function()
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._value, self._done = None, True
            self._back.release()

    def _pause(self, value: Any) -> None:
        self._value = value
        self._back.release()
        self._turn.acquire()
        if self._stopped:
            raise _Ended


def in_paused_call() -> bool:
    """Whether this thread is that of a `PausedCall`."""
    return getattr(_own, "call", None) is not None


def pause(value: Any) -> None:
    """Inside a `PausedCall`: hand ``value`` to the caller, and wait until that resumes it."""
    call: PausedCall = _own.call
    call._pause(value)


class Lockstep:
    """Calls that go on together from pause to pause, one after the other. Those that still wait are ended with the block.

    Args:
        device: See `PausedCall`.

    Attributes:
        waiting: What each call has paused with, in the order in which they were started; None for those at their end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls: list[PausedCall] = []
        self.waiting: list[Any] = []

    def start(self, function: Callable[[], None]) -> None:
        """Run one more, up to its first pause.

        Raises:
            BaseException: What it raised.
        """
        self._calls.append(PausedCall(function, self._device))
        self.waiting.append(self._calls[-1].resume())

    def advance(self) -> None:
        """Run all of them up to their next pause.

        Raises:
            BaseException: What one raised.
        """
        for i, call in enumerate(self._calls):
            self.waiting[i] = call.resume()

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for call in self._calls:
            call.close()
