"""Bad input to the data modules, in their arguments and on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning_cap.data import DigitsDataModule, ImageNetDataModule, TrainingRecipe, get_training_recipe
from lightning_cap.data.augment import MixupCollate
from lightning_cap.data.recipes import DEIT
from lightning_cap.errors import CAPError, ConfigError, DataError
from tests.support.bad_input.table import NO_COUNTS, Line, wrong
from tests.support.images import image_data, small_images, write_folder, write_tar

NAN, INF = float("nan"), float("inf")
NO_SHARES: tuple[Any, ...] = (
    1.0,
    "0.5",
    (1, 0.5),
    (0, 1),
    (0.1, NAN),
    (0.5,),
    (0.1, 0.5, 1.0),
    (0.1, 2.0),
    (True, True),
)
NO_CHANNELS: tuple[Any, ...] = (
    0.5,
    "0.5",
    (0.5,),
    (0.5, 0.5),
    (0.5, NAN, 0.5),
    (0.5, INF, 0.5),
    ("a", "b", "c"),
    {"r": 1},
)


def on_disk(name: str, prepare: Callable[[Path], Any], words: tuple[str, ...], **options: Any) -> Line:
    """A split ``val`` that cannot be used."""

    def run(folder: Path) -> None:
        prepare(folder)
        before = sorted(folder.rglob("*"))
        try:
            image_data(folder, **options).setup("validate")
        finally:
            assert sorted(folder.rglob("*")) == before
            for path in reversed(before):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    return Line(f"val: {name}", run, DataError, words)


def _with_pipe(folder: Path) -> None:
    write_folder(folder / "val", small_images())
    os.mkfifo(folder / "val/cat/9.jpg")


def _with_loop(folder: Path) -> None:
    write_folder(folder / "val", small_images())
    for name in ("a", "b"):
        (folder / "val" / name).symlink_to("..")


def _cut(folder: Path) -> None:
    tar = write_tar(folder / "val.tar", small_images())
    tar.write_bytes(tar.read_bytes()[: -10 * 1024])


def _other_classes(kind: Callable[[Path, dict[str, bytes]], Path], ending: str, *classes: str) -> Callable[[Path], Any]:
    """A training split of other classes beside ``val``."""

    def prepare(folder: Path) -> None:
        kind(folder / f"train{ending}", small_images(("cat", "dog")))
        kind(folder / f"val{ending}", small_images(classes))

    return prepare


def _zeroed(folder: Path) -> None:
    tar = write_tar(folder / "val.tar", small_images())
    content = tar.read_bytes()
    place = content.index(b"dog/1.jpg")
    tar.write_bytes(content[:place] + bytes(512) + content[place + 512 :])


def recipes(argument: str, *values: Any) -> list[Line]:
    given = {name: getattr(DEIT, name) for name in DEIT.__dataclass_fields__}
    return wrong(TrainingRecipe, argument, *values, given=given)


def _setup(**options: Any) -> Callable[[Path], Any]:
    return lambda _: ImageNetDataModule(**options).setup("fit")


def named(name: str, run: Callable[[Path], Any], *words: str, error: type[CAPError] = DataError) -> Line:
    return Line(f"data: {name}", run, error, words)


def _recipe(name: Any, folder: Path) -> None:
    get_training_recipe(name)


LINES = [
    *wrong(ImageNetDataModule, "batch_size", *NO_COUNTS),
    *wrong(ImageNetDataModule, "num_workers", None, "4", -1, 2.0, True, 10**9),
    *wrong(ImageNetDataModule, "pin_memory", 1, "yes", [True]),
    *wrong(ImageNetDataModule, "seed", None, "0", -1, 0.0, 2**64),
    *wrong(ImageNetDataModule, "calibration_augmentation", None, 1, "no"),
    *wrong(ImageNetDataModule, "root", "", 3, True, ["a"], {"train": "a"}),
    *wrong(ImageNetDataModule, "name", None, 3, ["wds/a"], "imagenet", "torch/x"),
    *wrong(ImageNetDataModule, "train_split", None, "", 3, ["train"]),
    *wrong(ImageNetDataModule, "val_split", None, " ", 0),
    *wrong(ImageNetDataModule, "num_classes", "10", 0, 10.0, True, [10]),
    *wrong(ImageNetDataModule, "recipe", None, 3, "diet", ["deit"], {}),
    *wrong(ImageNetDataModule, "label_smoothing", "0.1", NAN, 1.0, -0.1, True),
    *wrong(ImageNetDataModule, "hflip", "x", NAN, 1.1, [0.5]),
    *wrong(ImageNetDataModule, "crop_scale", *NO_SHARES),
    *wrong(ImageNetDataModule, "rand_augment", "", 9, "augment9", "rand-q9", "rand-m", "rand-m9-mstdd", words=("rand",)),
    *wrong(ImageNetDataModule, "mixup", "0.8", NAN, INF, -1, True),
    *wrong(ImageNetDataModule, "cutmix", "1", NAN, -0.5),
    *wrong(ImageNetDataModule, "erasing_prob", NAN, 2, "0.1"),
    *wrong(ImageNetDataModule, "test_crop_ratio", 0, 1.5, NAN, "0.9"),
    *wrong(ImageNetDataModule, "crop", None, "rcc", 3),
    *wrong(ImageNetDataModule, "crop_padding", None, -1, 1.5, 10**9),
    *wrong(ImageNetDataModule, "img_size", *NO_COUNTS, 10**9),
    *wrong(ImageNetDataModule, "mean", *NO_CHANNELS),
    *wrong(ImageNetDataModule, "std", *NO_CHANNELS, (0.2, -0.2, 0.2), (0.0, 0.2, 0.2)),
    *wrong(ImageNetDataModule, "interpolation", None, "cubic", 3),
    *wrong(ImageNetDataModule, "on_bad_image", None, "ignore", True),
    *wrong(ImageNetDataModule, "verify_up_to", None, -1, 1e4, "all"),
    *wrong(DigitsDataModule, "batch_size", "128", 0, 128.0),
    *wrong(DigitsDataModule, "val_fraction", None, "0.2", 0, 1, NAN, 0.001),
    *wrong(DigitsDataModule, "noise", None, "0", -1, NAN, INF, True),
    *wrong(DigitsDataModule, "max_shift", None, 8, -1, 1.0),
    *wrong(MixupCollate, "mixup", None, "1", -1, NAN, given={"cutmix": 1.0, "label_smoothing": 0.1, "num_classes": 3}),
    *wrong(MixupCollate, "num_classes", None, 0, 3.0, given={"mixup": 1.0, "cutmix": 1.0, "label_smoothing": 0.1}),
    *[
        named(f"get_training_recipe({value!r})", partial(_recipe, value), f"recipe={value!r}", error=ConfigError)
        for value in (None, 3, "diet", ["deit"])
    ],
    *recipes("weight_decay", None, "0.05", -1, NAN),
    *recipes("gradient_clip", "1", -1, NAN),
    *recipes("drop_path_rate", None, 1.0, NAN),
    *recipes("crop_scale", None, (1, 0.5)),
    *recipes("erasing_count", None, 1.0, -1),
    named("no such root", _setup(root="nowhere"), "root='nowhere' does not exist"),
    named("no split in it", _setup(root="."), "split 'train' is missing", "found nothing"),
    on_disk("a pipe", _with_pipe, ("cat/9.jpg", "no regular file")),
    on_disk("links that go round", _with_loop, ("val/a' is a link to",)),
    on_disk("a class that training lacks", _other_classes(write_folder, "", "dog", "emu"), ("only in validation emu",)),
    on_disk("no class of training", _other_classes(write_tar, ".tar", "emu", "fox"), ("only in validation emu, fox",)),
    on_disk("more classes than num_classes", _other_classes(write_folder, "", "dog"), ("num_classes=1",), num_classes=1),
    on_disk("a tar cut off", _cut, ("val.tar", "no complete .tar archive")),
    on_disk("a tar with a zeroed header", _zeroed, ("val.tar", "damaged")),
    on_disk("an empty tar", lambda folder: (folder / "val.tar").touch(), ("val.tar", "no complete .tar archive")),
    on_disk("no tar at all", lambda folder: (folder / "val.tar").write_bytes(b"x" * 2000), ("val.tar",)),
    on_disk("text named as image", lambda folder: write_folder(folder / "val", {"a/0.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}),
            ("a/0.png", "cannot be decoded")),
    on_disk("nothing", lambda folder: (folder / "val").mkdir(), ("Found 0 images",)),
]  # fmt: skip
