"""What healing may leave behind."""

from __future__ import annotations

import threading


def waiting_threads() -> list[str]:
    """Threads of paused calls that are still there."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lockstep")]
