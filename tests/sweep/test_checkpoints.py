from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cap.sweep import find_checkpoints
from lightning_cap.sweep.checkpoints import describe
from tests.support.sweeping import checkpoint


def test_one_of_each_goal_and_the_best_one(tmp_path: Path) -> None:
    for name, goal in (("sparsity=0.75", 0.75), ("sparsity=0.50-best", 0.5), ("sparsity=0.50", 0.5)):
        checkpoint(tmp_path, f"{name}.ckpt", goal=goal)
    _, found = find_checkpoints(tmp_path)
    assert [(one.path.name, one.goal, one.best) for one in found] == [
        ("sparsity=0.50-best.ckpt", 0.5, True),
        ("sparsity=0.75.ckpt", 0.75, False),
    ]
    assert [describe(one) for one in found] == ["sparsity 0.50 (sparsity=0.50-best.ckpt)", "sparsity 0.75"]


def test_of_the_last_run_in_a_folder(tmp_path: Path) -> None:
    for suffix in ("", "-v1", "-v2", "-v10"):
        checkpoint(tmp_path, f"sparsity=0.50{suffix}.ckpt")
    checkpoint(tmp_path, "sparsity=0.50-best-v2.ckpt")
    _, found = find_checkpoints(str(tmp_path))
    assert [one.path.name for one in found] == ["sparsity=0.50-v10.ckpt"]


def test_units_and_weights_of_one_run(tmp_path: Path) -> None:
    for name in ("flops=0.50.ckpt", "sparsity=0.50.ckpt"):
        checkpoint(tmp_path, name)
    _, found = find_checkpoints(tmp_path)
    assert [(one.counted, one.path.name) for one in found] == [
        ("flops", "flops=0.50.ckpt"), ("sparsity", "sparsity=0.50.ckpt"),
    ]  # fmt: skip


@pytest.mark.parametrize("given", [".", "checkpoints"])
def test_the_folder_of_a_run_or_of_its_checkpoints(tmp_path: Path, given: str) -> None:
    path = checkpoint(tmp_path / "checkpoints")
    checkpoint(tmp_path / "checkpoints", "epoch=3-step=12.ckpt")
    folder, (found,) = find_checkpoints(tmp_path / given)
    assert found.path == path
    assert folder.checkpoints == tmp_path / "checkpoints"
    assert folder.of(found) == tmp_path / "finetuned/sparsity=0.50"
    assert folder.resumable(found) is None
    assert folder.record(found) is None


def test_a_monitored_value_in_a_name_is_no_goal(tmp_path: Path) -> None:
    """As `ModelCheckpoint(filename="{val_acc:.2f}")` names them in the same run."""
    checkpoint(tmp_path)
    (tmp_path / "val_acc=0.95.ckpt").write_bytes((tmp_path / "sparsity=0.50.ckpt").read_bytes())
    _, found = find_checkpoints(tmp_path)
    assert [one.path.name for one in found] == ["sparsity=0.50.ckpt"]
