"""Plan every configuration by the command itself, all in one process: each start of the command takes seconds.

python .ci/plan_configs.py [configs/digits_gradual.yaml ...]
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path

from lightning_cap.cli.command import main

# As on the machines that most of them are for. Seconds are not measured: that alone would take minutes.
OPTIONS = ["--json", "--no_measure", "--device_memory=80GB", "--host_memory=500GB"]


def plan(path: Path) -> None:
    """Print what the plan of a configuration tells, in one line; a configuration that cannot be planned ends everything."""
    started, out = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["plan", "--config", str(path), *OPTIONS])
    found = json.loads(out.getvalue())
    events = sum(len(pruner["events"]) for pruner in found["pruning"])
    print(
        f"{path}: {found['command']} of {found['model']}, {events} events, {time.perf_counter() - started:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or sorted(Path("configs").glob("*.yaml"))
    for path in paths:
        plan(path)
    print(f"{len(paths)} configurations")
