"""The ways in which Lightning and torchrun start processes. All other tests on several processes take a faster way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ddp_run import assert_pruned_alike, ddp_run
from tests.support.processes import in_fresh_process

pytestmark = pytest.mark.xdist_group("processes")

_SCRIPT = """
import sys
from pathlib import Path
from tests.support.ddp_run import ddp_run
if __name__ == "__main__":
    ddp_run(Path(sys.argv[1]), 2, options={"strategy": "ddp"}, num_gradients=20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]], ids=str)
def test_a_script(tmp_path: Path, start: list[str]) -> None:
    """By itself, which starts a second process, or in two that torchrun has started."""
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, *start, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_pruned_alike(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork(tmp_path: Path) -> None:
    in_fresh_process(tmp_path, ddp_run, tmp_path, 2, options={"strategy": "ddp_fork"}, num_gradients=20)
    assert_pruned_alike(tmp_path)


@pytest.mark.slow
def test_spawn(tmp_path: Path) -> None:
    ddp_run(tmp_path, 2, options={"strategy": "ddp_spawn"}, num_gradients=20)
    assert_pruned_alike(tmp_path)
