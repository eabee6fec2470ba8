from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.images import CLASSES, small_images, write_folder, write_tar


@pytest.fixture(params=["folder", "tar"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of the two splits, in folders or in tar files."""
    if request.param == "folder":
        write_folder(tmp_path / "train", small_images())
        write_folder(tmp_path / "val", small_images())
    else:
        write_tar(tmp_path / "train.tar", small_images())
        write_tar(tmp_path / "val.tar", small_images(), folders=CLASSES)
    return tmp_path
