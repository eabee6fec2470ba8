from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

from lightning_cap.data import ImageNetDataModule
from lightning_cap.errors import ConfigError, DataError
from tests.support.images import CLASSES, break_image, image_data, jpeg, small_images, write_folder, write_tar


def test_tar_opened_before_workers_fork_or_travel(root: Path) -> None:
    data = image_data(root, num_workers=2, batch_size=1)
    expected = [data.validation_set()[index][0] for index in range(12)]  # opens the tar in this process
    for (image, _), reference in zip(data.val_dataloader(), expected, strict=True):
        torch.testing.assert_close(image[0], reference)
    dataset = data.validation_set()
    _ = dataset[0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7][0], expected[7])


def test_missing_root_and_missing_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere' does not exist"):
        image_data(tmp_path / "nowhere").setup("fit")
    write_folder(tmp_path / "train", small_images())
    write_folder(tmp_path / "other", small_images())
    with pytest.raises(DataError, match=r"split 'validation' is missing.*found other, train"):
        image_data(tmp_path).setup("fit")
    tar = write_tar(tmp_path / "all.tar", small_images())
    with pytest.raises(DataError, match=r"all.tar' is a file.*train_split='all.tar'"):
        image_data(tar).setup("fit")


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", small_images())
    write_folder(tmp_path / "train", small_images())
    write_folder(tmp_path / "train", {"zebra/readme.txt": b"no image"})
    (tmp_path / "train" / "yak").mkdir()
    with pytest.raises(DataError, match=r"class folders without an image: .*yak"):
        image_data(tmp_path).setup("fit")
    with pytest.raises(DataError, match="zebra"):
        image_data(tmp_path).setup("fit")


def test_empty_class_in_a_tar_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", small_images())
    write_tar(tmp_path / "train.tar", small_images(), folders=("./", *CLASSES, "yak/"))
    with pytest.raises(DataError, match=r"train.tar' has class folders without an image: yak\."):
        image_data(tmp_path).setup("fit")
    write_tar(tmp_path / "train.tar", {"cat/readme.txt": b"no image"})
    with pytest.raises(DataError, match="holds no image"):
        image_data(tmp_path).setup("fit")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_outside_of_class_folders(tmp_path: Path, kind: str) -> None:
    images = {"0.jpg": jpeg(0), **small_images()}
    write_folder(tmp_path / "val", images) if kind == "folder" else write_tar(tmp_path / "val.tar", images)
    with pytest.raises(DataError, match=r"outside of (a )?class folder"):
        image_data(tmp_path).setup("validate")


def test_truncated_archive(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "val.tar", small_images())
    tar.write_bytes(tar.read_bytes()[: 512 * 8 + 100])
    with pytest.raises(DataError, match=r"val.tar' is no complete .tar archive"):
        image_data(tmp_path).setup("validate")


def test_different_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", small_images())
    write_folder(tmp_path / "val", small_images(("cat", "fox")))
    with pytest.raises(DataError, match="only in training dog, emu; only in validation fox"):
        image_data(tmp_path).setup("fit")


@pytest.mark.parametrize("content", [None, b"", b"not an image"], ids=["truncated", "empty", "text"])
def test_broken_image_stops_before_training(root: Path, content: bytes | None) -> None:
    break_image(root, "dog/2.jpg", content)
    with pytest.raises(DataError, match=r"1 of 12 images cannot be decoded: .*dog/2.jpg.*on_bad_image='skip'"):
        image_data(root).setup("fit")
    data = image_data(root, verify_up_to=0)
    data.setup("fit")
    with pytest.raises(DataError, match=r"image '.*dog/2.jpg' \(index 6\) cannot be decoded"):
        data.training_set(augment=True)[6]


def test_broken_image_is_skipped_and_counted_once(root: Path) -> None:
    break_image(root, "dog/2.jpg")
    data = image_data(root, on_bad_image="skip", verify_up_to=0, calibration_augmentation=False)
    data.setup("fit")
    dataset = data.training_set(augment=False)
    with pytest.warns(UserWarning, match=r"dog/2.jpg' \(index 6\).*skipped") as caught:
        (image, target), _ = dataset[6], dataset[6]
    assert len(caught) == 1
    assert target == 1
    assert torch.equal(image, dataset[7][0])
    assert data.bad_images == 1


@pytest.mark.filterwarnings("ignore:image .*cannot be decoded")
def test_broken_images_are_counted_over_workers(root: Path) -> None:
    break_image(root, "dog/2.jpg")
    data = image_data(root, on_bad_image="skip", verify_up_to=0, num_workers=2)
    assert sum(len(targets) for _, targets in data.train_dataloader()) == 12
    assert sum(len(targets) for _, targets in data.train_dataloader()) == 12
    assert data.bad_images == 1


def test_verification_with_skip_warns_and_leaves_the_random_state_alone(root: Path) -> None:
    break_image(root, "emu/3.jpg")
    data = image_data(root, on_bad_image="skip")
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"1 of 12 images cannot be decoded: .*emu/3.jpg"):
        data.setup("fit")
    assert torch.equal(state, torch.get_rng_state())
    assert data.bad_images == 1
    assert data.training_set(augment=False)[11][1] == 0  # the next readable index is the first


def test_nothing_readable(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", {"cat/0.jpg": b"", "dog/0.jpg": b"x"})
    data = image_data(tmp_path, on_bad_image="skip", verify_up_to=0)
    with pytest.raises(DataError, match="none of the 2 images"), pytest.warns(UserWarning, match="skipped"):
        data.validation_set()[1]


@pytest.mark.parametrize(("name", "package"), [("hfds/org/set", "datasets"), ("wds/set", "webdataset")])
def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda key: None if key == package else found(key))
    with pytest.raises(DataError, match=f"pip install {package}"):
        ImageNetDataModule(name=name).setup("fit")


def test_unknown_name_prefix() -> None:
    with pytest.raises(ConfigError, match="name='imagenet' is not a supported data set"):
        ImageNetDataModule(name="imagenet").setup("fit")
