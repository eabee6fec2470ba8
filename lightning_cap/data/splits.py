"""Where a split is, and whether its folders or its archive are whole: timm's readers leave out silently what they cannot use."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from timm.data.readers.img_extensions import get_img_extensions

from lightning_cap.errors import DataError

_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))
_LARGEST_PADDING = (
    2**23
)  # bytes of zeros at the end of an archive: tar fills up its last record, 10 kB unless told otherwise


def image_extensions() -> tuple[str, ...]:
    """Return the file name endings that timm takes for images."""
    return tuple(get_img_extensions())  # type: ignore[no-untyped-call]


def find_split(root: str | None, split: str) -> Path:
    """Return the folder or .tar of a split: `root/split`, `root/split.tar`, or those of a synonym (val, validation).

    Raises:
        DataError: `root` does not exist, or nothing in it is that split; the message says what was found.
    """
    base = Path(root or ".").expanduser()
    if not base.exists():
        raise DataError(f"root={root!r} does not exist: give the folder that holds the splits.")
    if not base.is_dir():
        raise DataError(
            f"root={root!r} is a file: give the folder that holds {base.name} and name the splits in it, "
            f"as in train_split='{base.name}'."
        )
    names = next((group for group in _SYNONYMS if split in group), (split,))
    for candidate in (split, *(name for name in names if name != split)):
        folder, tar = base / candidate, base / f"{candidate}.tar"
        if folder.is_dir() or (folder.is_file() and folder.suffix == ".tar"):
            return folder
        if tar.is_file():
            return tar
    found = ", ".join(sorted(entry.name for entry in base.iterdir())[:12]) or "nothing"
    raise DataError(
        f"split {split!r} is missing in root={str(base)!r}: looked for {', '.join(names)} as a folder or .tar, found "
        f"{found}. Set train_split / val_split to the folder or .tar to use."
    )


def check_folder(root: Path) -> None:
    """Refuse class folders that timm's reader would misread, or never finish to read.

    Raises:
        DataError: a class without images, images outside of any class, a link to a folder that it lies in, an image that
            is a pipe or a device, or a folder that may not be read.
    """
    extensions = set(image_extensions())
    empty: list[str] = []
    for folder, subfolders, files in _walk(root):
        has_image = any(os.path.splitext(name)[1].lower() in extensions for name in files)
        if has_image and folder == root:
            raise DataError(
                f"{str(root)!r} holds images outside of class folders: sort them into one folder per class."
            )
        if not has_image and not subfolders and not folder.name.startswith(".") and folder != root:
            empty.append(os.path.relpath(folder, root))
    _refuse_empty(root, empty)


def _walk(root: Path) -> Iterator[tuple[Path, list[Path], list[str]]]:
    """Each folder below a root, links followed, with its folders and the names of its files."""
    above = {_identity(folder) for folder in root.resolve().parents}
    waiting = [(root, above)]
    while waiting:
        folder, above = waiting.pop()
        try:
            inside = above | {_identity(folder)}
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{str(folder)!r} cannot be read ({error.strerror}): correct it or take it out.") from error
        subfolders = [Path(entry.path) for entry in entries if entry.is_dir()]
        for entry in entries:
            if entry.is_dir() and entry.is_symlink() and _identity(entry) in inside:
                raise DataError(
                    f"{entry.path!r} is a link to {os.path.realpath(entry)!r}, a folder that it lies in itself: remove the link, "
                    "there is no end to reading it."
                )
            _refuse_special(entry)
        yield folder, subfolders, [entry.name for entry in entries if not entry.is_dir()]
        waiting += [(subfolder, inside) for subfolder in subfolders]


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _refuse_special(entry: os.DirEntry[str]) -> None:
    """Refuse a pipe, a socket or a device named like an image: to read it takes forever."""
    named = os.path.splitext(entry.name)[1].lower() in image_extensions()
    if named and not entry.is_dir() and not entry.is_file() and os.path.exists(entry.path):
        raise DataError(f"{entry.path!r} is no regular file: remove it or put an image in its place.")


@dataclass
class _Archive:
    """What is found in a tar, and in the tars in it."""

    path: Path
    folders: set[PurePosixPath] = field(default_factory=set)
    filled: set[PurePosixPath] = field(default_factory=set)  # folders, and tars in it, that hold images
    images: int = 0


def check_tar(path: Path) -> int:
    """Refuse a damaged archive, class folders without images in it, and images outside of any class.

    Args:
        path: of the archive: images in class folders, or a tar of images for each class.

    Returns:
        How many images it holds.

    Raises:
        DataError: names the archive and what is wrong.
    """
    found = _Archive(path)
    try:
        with open(path, "rb") as file:
            _read_archive(found, file, str(path))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{str(path)!r} is no complete .tar archive ({error}): write or copy it again.") from error
    if not found.images:
        raise DataError(f"{str(path)!r} holds no image ({', '.join(image_extensions())}): is it the right archive?")
    hidden = {folder for folder in found.folders if any(part.startswith(".") for part in folder.parts)}
    parents = {parent for folder in found.folders for parent in folder.parents}
    _refuse_empty(path, sorted(str(folder) for folder in found.folders - found.filled - hidden - parents))
    return found.images


def _read_archive(found: _Archive, file: IO[bytes], name: str, inner: bool = False) -> None:
    """Count the images of an archive; ``inner`` is one in another, which is a class."""
    extensions = set(image_extensions())
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            entry = PurePosixPath(member.name)
            suffix = entry.suffix.lower()
            if member.isdir() and not inner:
                found.folders.add(entry)
            elif member.isfile() and suffix in extensions:
                found.images += 1
                if not inner:
                    found.filled.update((entry, *entry.parents))
                if not inner and entry.parent == PurePosixPath("."):
                    raise DataError(f"{name!r} holds {entry} outside of a class folder: one folder per class.")
            elif member.isfile() and suffix == ".tar" and not inner:
                content, before = archive.extractfile(member), found.images
                assert content is not None  # it is a file
                _read_archive(found, content, f"{name}/{entry}", inner=True)
                found.folders.add(entry)
                found.filled.update((entry, *entry.parents) if found.images > before else ())
        _check_end(file, archive.offset, name)


def _check_end(file: IO[bytes], offset: int, name: str) -> None:
    """Refuse an archive that goes on, or breaks off, where tarfile found its end: a damaged header looks like one.

    Args:
        file: of the archive.
        offset: of the first block, in bytes, that is no member.
        name: for the message.
    """
    wrong = f"{name!r} is no complete .tar archive, write or copy it again"
    file.seek(offset)
    rest = file.read(_LARGEST_PADDING + 1)
    if rest.strip(b"\0"):
        raise DataError(f"{wrong}: the header at byte {offset} is damaged, more follows it.")
    if len(rest) < 2 * tarfile.BLOCKSIZE:
        raise DataError(f"{wrong}: it breaks off at byte {offset}, without the two empty blocks at the end.")
    if len(rest) > _LARGEST_PADDING:
        raise DataError(f"{wrong}: from byte {offset} on it is empty, as if it had been reserved and never written.")


def _refuse_empty(path: Path, empty: Sequence[str]) -> None:
    if empty:
        raise DataError(
            f"{str(path)!r} has class folders without an image: {some(empty)}. Remove them or add images "
            f"({', '.join(image_extensions())})."
        )


def some(names: Sequence[str], limit: int = 8) -> str:
    """Return the first few names for a message, and how many more there are."""
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
