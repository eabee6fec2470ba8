"""Small images on disk, in class folders and in tar files of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_cap.data import ImageNetDataModule

SIDE = 16
CLASSES = ("cat", "dog", "emu")
PER_CLASS = 4


def jpeg(seed: int, side: int = SIDE) -> bytes:
    """Noise, ``(side, side, 3)``."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG")
    return stream.getvalue()


def small_images(
    classes: Sequence[str] = CLASSES, each: int = PER_CLASS, side: int = SIDE, seed: int = 0
) -> dict[str, bytes]:
    """``{class/number.jpg: content}``."""
    return {f"{n}/{i}.jpg": jpeg(seed + 10 * k + i, side) for k, n in enumerate(classes) for i in range(each)}


def write_folder(root: Path, images: dict[str, bytes]) -> Path:
    for name, content in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, images: dict[str, bytes], folders: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for folder in folders:
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, content in images.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def image_data(root: Path, **options: Any) -> ImageNetDataModule:
    defaults: dict[str, Any] = {"img_size": SIDE, "batch_size": 4, "num_workers": 0, "recipe": "light1"}
    return ImageNetDataModule(root=str(root), **(defaults | options))


def break_image(root: Path, name: str, content: bytes | None = None) -> None:
    """Cut an image of the training split short, or put something else in its place."""
    images = small_images()
    images[name] = images[name][:300] if content is None else content
    if (root / "train.tar").exists():
        write_tar(root / "train.tar", images)
    else:
        write_folder(root / "train", images)
