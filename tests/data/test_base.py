from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DistributedSampler, IterableDataset

from lightning_cap.data import ImageNetDataModule, imagenet
from lightning_cap.data.augment import MixupCollate
from lightning_cap.data.base import seed_worker
from lightning_cap.errors import ConfigError
from tests.support.images import SIDE, image_data


def test_calibration_before_setup_with_and_without_augmentation(root: Path) -> None:
    loader = image_data(root, recipe="deit").calibration_dataloader()
    assert isinstance(loader.collate_fn, MixupCollate)
    assert len(loader.dataset) == 12
    assert next(iter(loader))[1].shape == (4, 3)
    plain = image_data(root, recipe="deit", calibration_augmentation=False)
    loader = plain.calibration_dataloader()
    assert next(iter(loader))[1].dtype == torch.int64
    torch.testing.assert_close(loader.dataset[2][0], plain.validation_set()[2][0])


def test_calibration_does_not_disturb_training(root: Path) -> None:
    data = image_data(root, rand_augment="none", crop="pad", calibration_augmentation=False)
    torch.manual_seed(0)
    expected = [images for images, _ in data.train_dataloader()]
    torch.manual_seed(0)
    train = iter(data.train_dataloader())
    first = next(train)[0]
    assert len(list(data.calibration_dataloader())) == 3
    for reference, images in zip(expected, [first, *(images for images, _ in train)], strict=True):
        assert torch.equal(reference, images)


@pytest.mark.parametrize("rank", [0, 1])
def test_distributed_samplers_share_out_the_images(root: Path, rank: int) -> None:
    data = image_data(root, batch_size=2)
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
    data = image_data(root, batch_size=2)
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
        image_data(Path("shards"), **options).setup("fit")
    data = image_data(Path("shards"), num_classes=3, **options)
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
