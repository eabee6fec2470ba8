"""The command in surroundings that lack something, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

TINY = [
    "fit",
    f"--config={ROOT / 'configs/digits_gradual.yaml'}",
    "--model.model.embed_dim=16",
    "--model.model.depth=1",
    "--model.model.num_heads=1",
    "--trainer.callbacks.schedule.steps={0: 0.5}",
    "--trainer.callbacks.pruner=Magnitude",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
]


def pruned(folder: Path, package: Path, **environment: str) -> set[str]:
    """What a run of the command leaves in its folder."""
    around = {**os.environ, "PYTHONPATH": str(package), "MPLCONFIGDIR": "", **environment}
    command = [sys.executable, "-m", "lightning_cap.cli", *TINY]
    done = subprocess.run(command, cwd=folder, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sparsity=0.50.ckpt" in done.stdout
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_neither_a_home_nor_a_place_for_compiled_code(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lightning_cap", tmp_path / "lightning_cap", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [path.parent for path in tmp_path.rglob("__init__.py")]:
        (folder / "__pycache__").touch()  # no folder can be made here, not even by root
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "work").mkdir()
    assert pruned(tmp_path / "work", tmp_path, HOME="/dev/null", XDG_CACHE_HOME="/dev/null", NUMBA_CACHE_DIR="") == {
        "runs"
    }
    assert sorted(path for path in tmp_path.rglob("*") if tmp_path / "work" not in (path, *path.parents)) == before


@pytest.mark.slow
def test_threads_that_are_none(tmp_path: Path) -> None:
    assert pruned(tmp_path, ROOT, OMP_NUM_THREADS="0", MKL_NUM_THREADS="0") == {"runs"}
