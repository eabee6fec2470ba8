from __future__ import annotations

import importlib.util
import inspect
import io
import pickle
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DistributedSampler, IterableDataset

from lightning_cap.data import ImageNetDataModule, imagenet
from lightning_cap.data.augment import MixupCollate
from lightning_cap.data.base import seed_worker
from lightning_cap.errors import ConfigError, DataError

SIDE = 16
CLASSES = ("cat", "dog", "emu")
PER_CLASS = 4


def _jpeg(level: int) -> bytes:
    pixels = np.random.default_rng(level).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG")
    return stream.getvalue()


def _images(classes: tuple[str, ...] = CLASSES) -> dict[str, bytes]:
    return {f"{name}/{i}.jpg": _jpeg(10 * k + i) for k, name in enumerate(classes) for i in range(PER_CLASS)}


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


def module(root: Path, **options: Any) -> ImageNetDataModule:
    defaults: dict[str, Any] = {"img_size": SIDE, "batch_size": 4, "num_workers": 0, "recipe": "light1"}
    return ImageNetDataModule(root=str(root), **(defaults | options))


@pytest.fixture(params=["folder", "tar"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        write_folder(tmp_path / "train", _images())
        write_folder(tmp_path / "val", _images())
    else:
        write_tar(tmp_path / "train.tar", _images())
        write_tar(tmp_path / "val.tar", _images(), folders=CLASSES)
    return tmp_path


def break_image(root: Path, name: str, content: bytes | None = None) -> None:
    images = _images()
    images[name] = images[name][:300] if content is None else content
    if (root / "train.tar").exists():
        write_tar(root / "train.tar", images)
    else:
        write_folder(root / "train", images)


# Reading and loaders


def test_folder_and_tar_give_every_image_once(root: Path) -> None:
    data = module(root, batch_size=5)
    data.setup("fit")
    assert data.num_classes == 3
    assert data.bad_images == 0
    batches = list(data.val_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [
        (5, 3, SIDE, SIDE),
        (5, 3, SIDE, SIDE),
        (2, 3, SIDE, SIDE),
    ]
    assert torch.cat([targets for _, targets in batches]).tolist() == sorted([0, 1, 2] * PER_CLASS)
    train = data.train_dataloader()
    assert [len(targets) for _, targets in train] == [5, 5]
    assert train.generator is None
    assert not train.persistent_workers
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert sum(len(targets) for _, targets in loader) == 12


def test_evaluation_is_resize_crop_and_normalisation(root: Path) -> None:
    data = module(root, test_crop_ratio=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    image, target = data.validation_set()[5]
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(_images()["dog/1.jpg"])))).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (pixels - 0.5) / 0.25)
    assert target == 1


def test_padded_crop_shifts_by_at_most_the_padding(root: Path) -> None:
    options: dict[str, Any] = {"crop": "pad", "crop_padding": 2, "rand_augment": "none", "hflip": 0.0}
    data = module(root, test_crop_ratio=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **options)
    plain = data.validation_set()[0][0]
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    windows = [padded[:, i : i + SIDE, j : j + SIDE] for i in range(5) for j in range(5)]
    crops = [data.training_set(augment=True)[0][0] for _ in range(30)]
    assert all(any(torch.allclose(crop, window) for window in windows) for crop in crops)
    assert any(not torch.equal(crop, plain) for crop in crops)
    flipped = module(root, **(options | {"crop_padding": 0, "hflip": 1.0})).training_set(augment=True)[0][0]
    torch.testing.assert_close(flipped, module(root, test_crop_ratio=1.0).validation_set()[0][0].flip(2))


def test_random_resized_crop_and_erasing_follow_the_recipe(root: Path) -> None:
    steps = [type(step).__name__ for step in module(root, recipe="deit").training_set(True).transform.transforms]
    expected = [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
    ]
    assert steps == [*expected, "RandomErasing"]
    steps = [type(step).__name__ for step in module(root, rand_augment="none").training_set(True).transform.transforms]
    assert steps == [name for name in expected if name != "RandAugment"]


def test_every_magnitude_of_randaugment_works(root: Path) -> None:
    data = module(root, rand_augment="rand-m10-n15-p1.0-inc1")  # the largest: posterize would keep no bit
    dataset = data.training_set(augment=True)
    assert all(dataset[index % 12][0].isfinite().all() for index in range(48))


def test_same_seeds_give_the_same_sample(root: Path) -> None:
    dataset = module(root, recipe="deit").training_set(augment=True)

    def draw(seed: int) -> torch.Tensor:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return dataset[3][0]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_tar_opened_before_workers_fork_or_travel(root: Path) -> None:
    data = module(root, num_workers=2, batch_size=1)
    expected = [data.validation_set()[index][0] for index in range(12)]  # opens the tar in this process
    for (image, _), reference in zip(data.val_dataloader(), expected, strict=True):
        torch.testing.assert_close(image[0], reference)
    dataset = data.validation_set()
    _ = dataset[0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7][0], expected[7])


def test_splits_by_path(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "images.tar", _images())
    data = module(tmp_path, train_split="a/images.tar", val_split=str(tmp_path / "a" / "images.tar"))
    data.setup("fit")
    assert len(data.training_set(True)) == len(data.validation_set()) == 12


# Mixup


def test_mixup_makes_soft_targets_with_smoothing(root: Path) -> None:
    data = module(root, recipe="deit", label_smoothing=0.3)
    _, targets = next(iter(data.train_dataloader()))
    assert targets.shape == (4, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets.min() >= 0.3 / 3 - 1e-6
    assert next(iter(data.val_dataloader()))[1].dtype == torch.int64
    assert next(iter(module(root).train_dataloader()))[1].dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixup_of_any_batch_size_pairs_each_sample_with_its_mirror(size: int, mixup: float, cutmix: float) -> None:
    collate = pickle.loads(pickle.dumps(MixupCollate(mixup, cutmix, 0.0, size)))
    samples = [(torch.full((3, 8, 8), float(index)), index) for index in range(size)]
    np.random.seed(0)
    images, targets = collate(samples)
    assert images.shape == (size, 3, 8, 8)
    mean = images.mean(dim=(1, 2, 3))  # of constant images: the mixing shares, for cutmix those of the areas
    torch.testing.assert_close(mean, targets @ torch.arange(float(size)), atol=1e-5, rtol=0)
    for index, row in enumerate(targets):
        assert set(row.nonzero().flatten().tolist()) <= {index, size - 1 - index}


# Calibration


def test_calibration_before_setup_with_and_without_augmentation(root: Path) -> None:
    loader = module(root, recipe="deit").calibration_dataloader()
    assert isinstance(loader.collate_fn, MixupCollate)
    assert len(loader.dataset) == 12
    assert next(iter(loader))[1].shape == (4, 3)
    plain = module(root, recipe="deit", calibration_augmentation=False)
    loader = plain.calibration_dataloader()
    assert next(iter(loader))[1].dtype == torch.int64
    torch.testing.assert_close(loader.dataset[2][0], plain.validation_set()[2][0])


def test_calibration_does_not_disturb_training(root: Path) -> None:
    data = module(root, rand_augment="none", crop="pad", calibration_augmentation=False)
    torch.manual_seed(0)
    expected = [images for images, _ in data.train_dataloader()]
    torch.manual_seed(0)
    train = iter(data.train_dataloader())
    first = next(train)[0]
    assert len(list(data.calibration_dataloader())) == 3
    for reference, images in zip(expected, [first, *(images for images, _ in train)], strict=True):
        assert torch.equal(reference, images)


# Processes and seeds


@pytest.mark.parametrize("rank", [0, 1])
def test_distributed_samplers_share_out_the_images(root: Path, rank: int) -> None:
    data = module(root, batch_size=2)
    data.trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=0)  # type: ignore[assignment]
    train, val = data.train_dataloader(), data.val_dataloader()
    for loader, shuffle in ((train, True), (val, False)):
        assert isinstance(loader.sampler, DistributedSampler)
        assert (loader.sampler.rank, loader.sampler.num_replicas, loader.sampler.shuffle) == (rank, 2, shuffle)
    assert list(val.sampler) == list(range(rank, 12, 2))
    assert len(train) == 3
    assert not isinstance(data.predict_dataloader().sampler, DistributedSampler)  # Lightning does that one


def test_lightning_injects_no_second_sampler(root: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    data = module(root, batch_size=2)
    data.trainer = trainer
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    assert not trainer._data_connector._requires_distributed_sampler(loader)


def test_workers_of_different_ranks_have_different_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def draw(seed: int, rank: int) -> tuple[float, float, float]:
        monkeypatch.setattr(torch, "initial_seed", lambda: seed)
        seed_worker(0, rank)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    try:
        streams = [draw(seed, rank) for seed in (1, 2, -5) for rank in (0, 1)]
        assert draw(1, 0) == streams[0]
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
    for column in zip(*streams, strict=True):
        assert len(set(column)) == len(streams)


# Bad input


def test_missing_root_and_missing_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere' does not exist"):
        module(tmp_path / "nowhere").setup("fit")
    write_folder(tmp_path / "train", _images())
    write_folder(tmp_path / "other", _images())
    with pytest.raises(DataError, match=r"split 'validation' is missing.*found other, train"):
        module(tmp_path).setup("fit")
    tar = write_tar(tmp_path / "all.tar", _images())
    with pytest.raises(DataError, match=r"all.tar' is a file.*train_split='all.tar'"):
        module(tar).setup("fit")


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", _images())
    write_folder(tmp_path / "train", _images())
    write_folder(tmp_path / "train", {"zebra/readme.txt": b"no image"})
    (tmp_path / "train" / "yak").mkdir()
    with pytest.raises(DataError, match=r"class folders without an image: .*yak"):
        module(tmp_path).setup("fit")
    with pytest.raises(DataError, match="zebra"):
        module(tmp_path).setup("fit")


def test_empty_class_in_a_tar_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", _images())
    write_tar(tmp_path / "train.tar", _images(), folders=("./", *CLASSES, "yak/"))
    with pytest.raises(DataError, match=r"train.tar' has class folders without an image: yak\."):
        module(tmp_path).setup("fit")
    write_tar(tmp_path / "train.tar", {"cat/readme.txt": b"no image"})
    with pytest.raises(DataError, match="holds no image"):
        module(tmp_path).setup("fit")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_outside_of_class_folders(tmp_path: Path, kind: str) -> None:
    images = {"0.jpg": _jpeg(0), **_images()}
    write_folder(tmp_path / "val", images) if kind == "folder" else write_tar(tmp_path / "val.tar", images)
    with pytest.raises(DataError, match=r"outside of (a )?class folder"):
        module(tmp_path).setup("validate")


def test_truncated_archive(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "val.tar", _images())
    tar.write_bytes(tar.read_bytes()[: 512 * 8 + 100])
    with pytest.raises(DataError, match=r"val.tar' is no complete .tar archive"):
        module(tmp_path).setup("validate")


def test_different_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", _images())
    write_folder(tmp_path / "val", _images(("cat", "fox")))
    with pytest.raises(DataError, match="only in training dog, emu; only in validation fox"):
        module(tmp_path).setup("fit")


def test_wrong_number_of_classes(root: Path) -> None:
    with pytest.raises(DataError, match=r"num_classes=10, but val_split='validation' has 3 classes"):
        module(root, num_classes=10).setup("validate")


@pytest.mark.parametrize("content", [None, b"", b"not an image"], ids=["truncated", "empty", "text"])
def test_broken_image_stops_before_training(root: Path, content: bytes | None) -> None:
    break_image(root, "dog/2.jpg", content)
    with pytest.raises(DataError, match=r"1 of 12 images cannot be decoded: .*dog/2.jpg.*on_bad_image='skip'"):
        module(root).setup("fit")
    data = module(root, verify_up_to=0)
    data.setup("fit")
    with pytest.raises(DataError, match=r"image '.*dog/2.jpg' \(index 6\) cannot be decoded"):
        data.training_set(augment=True)[6]


def test_broken_image_is_skipped_and_counted_once(root: Path) -> None:
    break_image(root, "dog/2.jpg")
    data = module(root, on_bad_image="skip", verify_up_to=0, calibration_augmentation=False)
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
    data = module(root, on_bad_image="skip", verify_up_to=0, num_workers=2)
    assert sum(len(targets) for _, targets in data.train_dataloader()) == 12
    assert sum(len(targets) for _, targets in data.train_dataloader()) == 12
    assert data.bad_images == 1


def test_verification_with_skip_warns_and_leaves_the_random_state_alone(root: Path) -> None:
    break_image(root, "emu/3.jpg")
    data = module(root, on_bad_image="skip")
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"1 of 12 images cannot be decoded: .*emu/3.jpg"):
        data.setup("fit")
    assert torch.equal(state, torch.get_rng_state())
    assert data.bad_images == 1
    assert data.training_set(augment=False)[11][1] == 0  # the next readable index is the first


def test_nothing_readable(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", {"cat/0.jpg": b"", "dog/0.jpg": b"x"})
    data = module(tmp_path, on_bad_image="skip", verify_up_to=0)
    with pytest.raises(DataError, match="none of the 2 images"), pytest.warns(UserWarning, match="skipped"):
        data.validation_set()[1]


def test_error_is_raised_in_trainer_before_any_step(root: Path) -> None:
    class Model(LightningModule):
        steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.steps += 1

        def configure_optimizers(self) -> None:
            return None

    break_image(root, "cat/0.jpg")
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    model = Model()
    with pytest.raises(DataError, match=r"cat/0.jpg"):
        trainer.fit(model, datamodule=module(root))
    assert model.steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "diet"}, "did you mean 'deit'"),
        ({"crop": "rcc"}, "crop='rcc'"),
        ({"on_bad_image": "ignore"}, "on_bad_image='ignore'"),
        ({"interpolation": "cubic"}, "interpolation='cubic'"),
        ({"rand_augment": "augment9"}, "rand_augment='augment9'"),
        ({"rand_augment": "rand-q9"}, "rand_augment='rand-q9'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"img_size": 0}, "img_size=0"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"erasing_prob": 1.5}, "erasing_prob=1.5"),
        ({"test_crop_ratio": 0.0}, "test_crop_ratio=0.0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module(tmp_path, **options)


# Named data sets


@pytest.mark.parametrize(("name", "package"), [("hfds/org/set", "datasets"), ("wds/set", "webdataset")])
def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda key: None if key == package else found(key))
    with pytest.raises(DataError, match=f"pip install {package}"):
        ImageNetDataModule(name=name).setup("fit")


def test_unknown_name_prefix() -> None:
    with pytest.raises(ConfigError, match="name='imagenet' is not a supported data set"):
        ImageNetDataModule(name="imagenet").setup("fit")


class _Stream(IterableDataset[Any]):
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.epochs: list[int] = []

    def set_loader_cfg(self, num_workers: int) -> None:
        self.options["num_workers"] = num_workers

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Any:
        image = Image.new("RGB", (SIDE, SIDE))
        return iter([(self.options["transform"](image), index % 3) for index in range(8)])


def test_streams_pass_through_and_learn_their_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda key: object())
    monkeypatch.setattr(imagenet, "create_dataset", lambda name, **options: _Stream(name=name, **options))
    options: dict[str, Any] = {"name": "wds/set", "train_split": "x-{0..3}.tar|8", "on_bad_image": "skip"}
    with pytest.raises(ConfigError, match="num_classes is needed with name='wds/set'"):
        module(Path("shards"), **options).setup("fit")
    data = module(Path("shards"), num_classes=3, **options)
    data.setup("fit")
    train = data.train_dataloader()
    assert [[len(targets) for _, targets in train] for _ in range(2)] == [[4, 4], [4, 4]]
    stream: Any = train.dataset
    assert stream.epochs == [0, 1]
    expected = {"name": "wds/set", "root": "shards", "split": "x-{0..3}.tar|8", "is_training": True, "batch_size": 4}
    assert {key: stream.options[key] for key in expected} == expected
    assert len(list(data.calibration_dataloader())) == len(list(data.val_dataloader())) == 2


def test_stream_warns_that_broken_images_cannot_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda key: object())
    with pytest.warns(UserWarning, match="has no effect on the stream name='wds/set'"):
        ImageNetDataModule(name="wds/set", num_classes=3).setup("fit")


# Configuration


def test_every_argument_is_documented() -> None:
    text = inspect.getdoc(ImageNetDataModule) or ""
    for name in inspect.signature(ImageNetDataModule).parameters:
        assert f"\n    {name}: " in text
