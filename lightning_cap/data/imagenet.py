"""ImageNet-like data over timm: folder trees, tars, `hfds/` and `wds/`, augmented by the paper's recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.data.dataset_factory import create_dataset
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cap.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Channels,
    Crop,
    Interpolation,
    MixupCollate,
    Transform,
    eval_transform,
    require_channels,
    train_transform,
)
from lightning_cap.data.base import ClassificationDataModule, Collate
from lightning_cap.data.reading import (
    OnBadImage,
    ReadableImages,
    check_classes,
    check_name,
    has_class_folders,
    is_stream,
    open_reader,
    reader_classes,
    verify,
)
from lightning_cap.data.recipes import get_training_recipe
from lightning_cap.errors import ConfigError, DataError
from lightning_cap.utilities.arguments import (
    require_choice,
    require_instance,
    require_path,
    require_text,
    require_whole,
)


class ImageNetDataModule(ClassificationDataModule):
    """Images in class folders (a tree or a tar), or a named `hfds/` or `wds/` set, with a training recipe.

    Batches are (images (batch_size, 3, img_size, img_size), labels): labels are class indices (batch_size,), or soft
    (batch_size, num_classes) in training with mixup or cutmix, then with the label smoothing already in them.

    Args:
        root: folder with the splits: `train/` or `train.tar`, and `val/`, `validation/` or `val.tar`. For `wds/` the
            folder or address of the shards, for `hfds/` the cache folder.
        name: "" for a folder tree or a tar; else a name for `timm.data.create_dataset` starting with `hfds/`, `hfids/`
            or `wds/`.
        train_split: name of the training split, or its folder or .tar, relative to `root` or absolute.
        val_split: the same of the validation split, on which testing and prediction run, too. It may lack classes that the
            training split has: class indices are those of training, where there is a training split.
        num_classes: number of classes; None: that of the class folders. Needed for streams (`wds/`, `hfids/`).
        recipe: `deit` or `light1` (paper, Table 5); each of the next eight arguments takes the recipe's if None.
        label_smoothing: of the soft labels; without mixup and cutmix the loss has to do it.
        hflip: probability of a horizontal flip.
        crop_scale: smallest and largest share of the area taken by a random resized crop.
        rand_augment: timm's RandAugment string, "none" for none.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        erasing_prob: probability of random erasing.
        test_crop_ratio: side of the evaluation's centre crop over the side of the resized image; 1.0 for images that
            are of `img_size` already.
        crop: "rrc", random resized crops, or "pad", zero padding and a random crop, for images of CIFAR's size.
        crop_padding: pixels of padding on every side for `crop="pad"`.
        img_size: height and width in pixels.
        mean: of the normalisation, per channel; None: that of the model in the Trainer (`VisionClassifier` takes it from
            timm's `pretrained_cfg`), or ImageNet's if it tells none.
        std: the same, positive.
        interpolation: of every resize.
        batch_size: images per step and process.
        num_workers: worker processes a loader.
        pin_memory: page-locked batches; None: when CUDA is available.
        seed: of the shuffling across processes, of the calibration loader and of streams.
        on_bad_image: "error" stops at an image that cannot be decoded; "skip" takes the next readable index, counts it
            in `bad_images` and warns once. Streams always skip: timm's reader does it, and logs.
        verify_up_to: a split of at most so many images is decoded once before training, so that a broken image is
            found at the start; in larger ones it is found when its turn comes. 0 never looks.
        calibration_augmentation: whether `calibration_dataloader` augments as in training or transforms as in
            evaluation (paper, appendix O).

    Raises:
        ConfigError: an argument is unknown or out of range.
        DataError: a package for `name` is missing; in `setup`: a path or split is missing, an archive is damaged, a class
            is empty, validation has classes that training lacks, or an image cannot be decoded.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        name: str = "",
        train_split: str = "train",
        val_split: str = "validation",
        num_classes: int | None = None,
        recipe: str = "deit",
        label_smoothing: float | None = None,
        hflip: float | None = None,
        crop_scale: tuple[float, float] | None = None,
        rand_augment: str | None = None,
        mixup: float | None = None,
        cutmix: float | None = None,
        erasing_prob: float | None = None,
        test_crop_ratio: float | None = None,
        crop: Crop = "rrc",
        crop_padding: int = 4,
        img_size: int = 224,
        mean: Channels | None = None,
        std: Channels | None = None,
        interpolation: Interpolation = "bicubic",
        batch_size: int = 128,
        num_workers: int = 4,
        pin_memory: bool | None = None,
        seed: int = 0,
        on_bad_image: OnBadImage = "error",
        verify_up_to: int = 20_000,
        calibration_augmentation: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed, calibration_augmentation)
        require_path("root", root, "/data/imagenet", optional=True)
        require_instance("name", name, str, "'' for class folders")
        check_name(name)
        require_text("train_split", train_split, "train")
        require_text("val_split", val_split, "val")
        if num_classes is not None:
            require_whole("num_classes", num_classes)
        require_whole("verify_up_to", verify_up_to, 0)
        require_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
        require_choice("crop", crop, get_args(Crop))
        require_choice("interpolation", interpolation, get_args(Interpolation))
        require_whole("img_size", img_size, 1, 8192, example=224)
        require_whole("crop_padding", crop_padding, 0, img_size, example=4)
        if mean is not None:
            require_channels("mean", mean, positive=False)
        if std is not None:
            require_channels("std", std, positive=True)
        self.root = None if root is None else os.fspath(root)
        self.dataset_name = name
        self.splits = {"train_split": train_split, "val_split": val_split}
        self.on_bad_image = on_bad_image
        self.verify_up_to = verify_up_to
        self.recipe = get_training_recipe(recipe).override(
            label_smoothing=label_smoothing,
            hflip=hflip,
            crop_scale=tuple(crop_scale) if isinstance(crop_scale, list) else crop_scale,
            rand_augment=rand_augment,
            mixup=mixup,
            cutmix=cutmix,
            erasing_prob=erasing_prob,
            test_crop_ratio=test_crop_ratio,
        )
        self.img_size, self.interpolation = img_size, interpolation
        self._given = {"mean": mean, "std": std}
        self._crop, self._crop_padding = crop, crop_padding
        self._transform(augment=True)  # a wrong RandAugment string is found here
        self._num_classes = num_classes
        self._opened: dict[str, Any] = {}
        self._readers: dict[str, Any] = {}
        self._bad: dict[str, Tensor] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes: the argument, or what the class folders say (read when first asked)."""
        if self._num_classes is not None:
            return self._num_classes
        self._require_num_classes()
        known = self._readers.get("train_split") or self._readers.get("val_split") or self._reader("train_split")
        return len(reader_classes(known))

    @property
    def known_classes(self) -> int | None:
        """The argument ``num_classes``."""
        return self._num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image in a batch: (3, img_size, img_size)."""
        return 3, self.img_size, self.img_size

    @property
    def normalization(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation: as given, else those of the Trainer's model if it tells them, else ImageNet's."""
        module = getattr(self.trainer, "lightning_module", None)
        of_model = getattr(module, "normalization", None) or (IMAGENET_MEAN, IMAGENET_STD)
        mean, std = self._given["mean"], self._given["std"]
        return of_model[0] if mean is None else mean, of_model[1] if std is None else std

    @property
    def bad_images(self) -> int:
        """How many images could not be decoded and were skipped so far, each counted once, over all workers."""
        return sum(int(marks.sum()) for marks in self._bad.values())

    def setup(self, stage: str) -> None:
        """Open the splits that the stage needs and check them, on every process alike."""
        if is_stream(self.dataset_name):
            self._require_num_classes()
            if self.on_bad_image == "error":
                rank_zero_warn(
                    f"on_bad_image='error' has no effect on the stream name={self.dataset_name!r}: timm's reader skips "
                    "what it cannot decode and logs it. Set on_bad_image='skip' to accept that."
                )
            return
        train = self._reader("train_split") if stage == "fit" else None
        val = self._reader("val_split")
        if train is not None:
            check_classes(reader_classes(train), reader_classes(val), subset=False)
        for split, reader in self._readers.items():
            found = len(reader_classes(reader))
            if found != self.num_classes:
                raise DataError(
                    f"num_classes={self.num_classes}, but {split}={self.splits[split]!r} has {found} classes: leave "
                    "num_classes out or correct it."
                )

    def training_set(self, augment: bool) -> Dataset[Any]:
        """Return the training images, opening the split if `setup` has not."""
        return self._images("train_split", self._transform(augment), training=True)

    def validation_set(self) -> Dataset[Any]:
        """Return the validation images, opening the split if `setup` has not."""
        return self._images("val_split", self._transform(augment=False), training=False)

    def training_collate(self) -> Collate:
        """Return timm's mixup/cutmix as a collate function if the recipe has either."""
        recipe = self.recipe
        if recipe.mixup == 0 and recipe.cutmix == 0:
            return super().training_collate()
        return MixupCollate(recipe.mixup, recipe.cutmix, recipe.label_smoothing, self.num_classes)

    def _transform(self, augment: bool) -> Transform:
        mean, std = self.normalization
        if augment:
            return train_transform(
                self.recipe, self.img_size, mean, std, self.interpolation, self._crop, self._crop_padding
            )
        return eval_transform(self.recipe, self.img_size, mean, std, self.interpolation)

    def _images(self, split: str, transform: Transform, training: bool) -> Dataset[Any]:
        if is_stream(self.dataset_name):
            return self._stream(split, transform, training)
        reader = self._reader(split)
        return ReadableImages(reader, transform, self.on_bad_image, self._bad[split])

    def _reader(self, split: str) -> Any:
        """Return timm's reader of a split; opened, and if it is small verified, once."""
        if split not in self._readers:
            reader = self._open(split)
            bad: Tensor = torch.zeros(len(reader), dtype=torch.bool).share_memory_()
            if len(reader) <= self.verify_up_to:
                verify(ReadableImages(reader, None, self.on_bad_image, bad), self.num_workers)
            self._readers[split], self._bad[split] = reader, bad
        return self._readers[split]

    def _open(self, split: str) -> Any:
        """Return timm's reader of a split; the validation split with the class indices of the training split."""
        if split not in self._opened:
            reader = open_reader(self.dataset_name, self.root, self.splits[split])
            if split == "val_split" and not self.dataset_name:
                reader = self._with_training_classes(reader)
            self._opened[split] = reader
        return self._opened[split]

    def _with_training_classes(self, val: Any) -> Any:
        """Return the reader of the validation split, opened anew if it has a subset of the training classes."""
        own, split = reader_classes(val), self.splits["train_split"]
        if "train_split" not in self._opened:
            try:
                same = has_class_folders(self.root, split, own)
            except DataError:  # there is no training split
                return val
            if same:  # known without reading millions of names
                return val
        classes = reader_classes(self._open("train_split"))
        check_classes(classes, own, subset=True)
        if len(own) == len(classes):
            return val
        rank_zero_info(
            f"val_split={self.splits['val_split']!r} has {len(own)} of the {len(classes)} training classes; class indices are "
            "those of training."
        )
        return open_reader(self.dataset_name, self.root, self.splits["val_split"], classes)

    def _stream(self, split: str, transform: Transform, training: bool) -> Dataset[Any]:
        """Return timm's iterable data set, which shares its shards out over processes and workers."""
        try:
            stream: Any = create_dataset(
                self.dataset_name,
                root=self.root,
                split=self.splits[split],
                is_training=training,
                batch_size=self.batch_size,
                seed=self.seed,
                transform=transform,
            )
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise DataError(
                f"{split}={self.splits[split]!r} of {self.dataset_name!r} could not be opened: {error}"
            ) from error
        stream.set_loader_cfg(num_workers=self.num_workers)
        dataset: Dataset[Any] = stream
        return dataset

    def _require_num_classes(self) -> None:
        if is_stream(self.dataset_name) and self._num_classes is None:
            raise ConfigError(
                f"num_classes is needed with name={self.dataset_name!r}: a stream does not say how many it has."
            )
