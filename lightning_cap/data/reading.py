"""The reader of a split, whether its images can be used, and a data set that never hides a broken one."""

from __future__ import annotations

import itertools
import os
import struct
import tarfile
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cap.data.augment import Transform
from lightning_cap.data.splits import check_folder, check_tar, find_split, some
from lightning_cap.errors import ConfigError, DataError
from lightning_cap.utilities.packages import require_package

OnBadImage = Literal["error", "skip"]

_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset"}
_STREAMS = ("hfids", "wds")

# Whatever a file is called; others are not images of pixels, and PIL hands PostScript to a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

# What PIL, tarfile and the file system raise on an image that is cut short, garbled, gone or a decompression bomb.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, tarfile.TarError, Image.DecompressionBombError)


def check_name(name: str) -> None:
    """Refuse a data set name that timm cannot serve here, and say which package a known one lacks.

    Raises:
        ConfigError: the name's prefix is not one that is supported.
        DataError: the package that reads such data sets is not installed.
    """
    prefix = _prefix(name)
    if not name:
        return
    if prefix not in _PACKAGES:
        raise ConfigError(
            f"name={name!r} is not a supported data set: leave it empty for a folder tree or a .tar under `root`, or "
            f"start it with one of {', '.join(f'{known}/' for known in _PACKAGES)}."
        )
    require_package(_PACKAGES[prefix], f"name={name!r}", error=DataError)


def is_stream(name: str) -> bool:
    """Tell whether the data set of that name is read as a stream, without random access (`wds/`, `hfids/`)."""
    return _prefix(name) in _STREAMS


def _prefix(name: str) -> str:
    head, slash, _ = name.partition("/")
    return head.lower() if slash else ""


def open_reader(name: str, root: str | None, split: str, classes: dict[str, int] | None = None) -> Any:
    """Return timm's reader (random access) of a split, after checking that every class has images.

    Args:
        name: "" for a folder tree or a tar of class folders, or an `hfds/` name, which is passed through.
        root: folder that holds the splits; for `hfds/` the cache folder.
        split: a split's name, or its folder or .tar, relative to `root` or absolute.
        classes: {class name: index}, of all its classes at least; None: its own, in order.

    Raises:
        DataError: the split cannot be found or opened, it is damaged, or a class folder holds no image.
    """
    path = root if name else str(find_split(root, split))
    images = None
    if path is not None and not name:
        if os.path.isfile(path):
            images = check_tar(Path(path))
        else:
            check_folder(Path(path))
    given: dict[str, Any] = {} if classes is None else {"class_map": classes}
    try:
        reader = create_dataset(name, root=path, split=split, search_split=False, **given).reader
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, UnpicklingError) as error:
        raise DataError(f"split {split!r} of {name or path!r} could not be opened: {error}") from error
    if images not in (None, len(reader)):  # of a large archive timm keeps a list beside it
        raise DataError(
            f"{path!r} holds {images} images, but timm found {len(reader)}: if there is a list of them beside it, named "
            "_..._tarinfos.pickle, it is of another archive; remove it."
        )
    return reader


def reader_classes(reader: Any) -> dict[str, int]:
    """Return {class name: index} of one of timm's readers, which spell the attribute in two ways."""
    names = getattr(reader, "class_to_idx", None)
    return dict(names if names is not None else reader.class_name_to_idx)


def has_class_folders(root: str | None, split: str, classes: Collection[str]) -> bool:
    """Tell whether a split is a folder of exactly these class folders, without reading what is in them."""
    path = find_split(root, split)
    return path.is_dir() and {entry.name for entry in path.iterdir() if entry.is_dir()} == set(classes)


def check_classes(train: Collection[str], val: Collection[str], subset: bool) -> None:
    """Refuse a validation set with classes that the training set lacks or, unless a subset will do, without some that it has.

    Raises:
        DataError: names the classes that only one of the two has.
    """
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if (only_train and not subset) or only_val:
        raise DataError(
            f"the classes of the splits differ: only in training {some(only_train)}; only in validation "
            f"{some(only_val)}. Validation may lack classes, but not have others: take these out."
        )


class ReadableImages(Dataset[tuple[Any, int]]):
    """Images of one of timm's readers, read without timm's own retry, which would hide broken files.

    Args:
        reader: timm's reader with random access; may be shared by several of these.
        transform: PIL image -> tensor.
        on_bad_image: "error" raises on an image that cannot be decoded; "skip" takes the next readable index.
        bad: bool tensor (length of the reader,) in shared memory, in which every process marks what it had to skip.
    """

    def __init__(self, reader: Any, transform: Transform | None, on_bad_image: OnBadImage, bad: Tensor) -> None:
        self.reader = reader
        self.transform = transform
        self.on_bad_image = on_bad_image
        self.bad = bad
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, class index) of the sample, or of the next readable one.

        Raises:
            DataError: the image cannot be decoded and may not be skipped, or no image at all can be.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            position = (index + offset) % len(self)
            try:
                image, label = self.read(position)
            except _UNREADABLE as error:
                self._refuse_or_skip(position, error)
                continue
            return (image if self.transform is None else self.transform(image)), label
        raise DataError(f"none of the {len(self)} images can be decoded, the first is {self.filename(0)!r}.")

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return (decoded RGB image, class index), or raise whatever is wrong with the file."""
        if self._pid != os.getpid():  # forked: a tar opened before shares its file offset with the parent
            _close_tars(self.reader)
            self._pid = os.getpid()
        stream, label = self.reader[index]
        with stream, Image.open(stream, formats=_FORMATS) as image:
            return image.convert("RGB"), int(label)

    def _refuse_or_skip(self, index: int, error: BaseException) -> None:
        if self.on_bad_image == "error":
            raise DataError(
                f"image {self.filename(index)!r} (index {index}) cannot be decoded: {error}. Replace it, or set "
                "on_bad_image='skip' to take the next one instead."
            ) from error
        first = not bool(self.bad.any())
        self.bad[index] = True
        if first:
            warnings.warn(
                f"image {self.filename(index)!r} (index {index}) cannot be decoded ({error}) and is skipped; further "
                "ones are only counted, see `bad_images` of the data module.",
                stacklevel=2,
            )

    def filename(self, index: int) -> str:
        """Return the name of an image's file, relative to the split."""
        return str(self.reader.filename(index))

    def __getstate__(self) -> dict[str, Any]:
        _close_tars(self.reader)  # open files do not travel to a spawned worker
        return self.__dict__


def _close_tars(reader: Any) -> None:
    """Make timm's tar reader open its file anew at the next read."""
    state = getattr(reader, "tar_state", None)
    if state is not None:
        for part in (state, *state.children.values()):
            part.reset()


class _Verdicts(Dataset[str]):
    """What is wrong with each image, "" if nothing is."""

    def __init__(self, images: ReadableImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images.read(index)
        except _UNREADABLE as error:
            return str(error) or type(error).__name__
        return ""


def verify(images: ReadableImages, num_workers: int) -> None:
    """Decode every image once, so that broken ones are found now; leaves the global random state alone.

    Raises:
        DataError: images cannot be decoded and `on_bad_image` is "error"; the message lists them.
    """
    generator = torch.Generator().manual_seed(0)
    loader: Iterable[list[str]] = DataLoader(
        _Verdicts(images), batch_size=256, num_workers=num_workers, collate_fn=list, generator=generator
    )
    verdicts = itertools.chain.from_iterable(loader)
    broken = {index: verdict for index, verdict in enumerate(verdicts) if verdict}
    if not broken:
        return
    listed = some([f"{images.filename(index)} ({verdict})" for index, verdict in broken.items()])
    message = f"{len(broken)} of {len(images)} images cannot be decoded: {listed}"
    if images.on_bad_image == "error":
        raise DataError(f"{message}. Replace them, or set on_bad_image='skip' to take the next readable ones instead.")
    images.bad[list(broken)] = True
    warnings.warn(f"{message}; they are skipped.", stacklevel=2)
