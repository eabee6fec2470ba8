"""What callers hand in to watch long work."""

from __future__ import annotations

from collections.abc import Callable

#: ``progress(phase, done, total)``, called now and then during long work.
Progress = Callable[[str, int, int], None]
