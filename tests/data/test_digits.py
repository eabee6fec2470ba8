from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

from lightning_cap.data import DigitsDataModule
from lightning_cap.errors import ConfigError, DataError


def _everything(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(targets)


def test_shapes_split_and_normalisation() -> None:
    data = DigitsDataModule()
    train, train_targets = _everything(data.training_set(augment=False))
    val, val_targets = _everything(data.validation_set())
    assert train.shape == (1437, 1, 8, 8)
    assert val.shape == (360, 1, 8, 8)
    assert train.dtype == torch.float32
    both = torch.cat([train, val])
    assert both.mean().abs() < 1e-3
    assert (both.std() - 1).abs() < 1e-3
    shares = torch.bincount(train_targets) / torch.bincount(torch.cat([train_targets, val_targets]))
    assert data.num_classes == len(shares) == 10
    assert ((shares - 0.8).abs() < 0.01).all()


def test_split_does_not_depend_on_seeds() -> None:
    torch.manual_seed(1)
    first = _everything(DigitsDataModule(seed=1).validation_set())
    torch.manual_seed(2)
    second = _everything(DigitsDataModule(seed=2).validation_set())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_augmentation_follows_the_global_generator_sample_by_sample() -> None:
    data = DigitsDataModule(noise=0.5, max_shift=1)
    noisy, plain = data.training_set(augment=True), data.training_set(augment=False)
    torch.manual_seed(3)
    first, target = noisy[7]
    torch.manual_seed(3)
    again, _ = noisy[7]
    other, _ = noisy[7]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert target == plain[7][1]
    assert torch.equal(plain[7][0], plain[7][0])


def test_noise_has_the_asked_for_strength() -> None:
    data = DigitsDataModule(noise=0.5)
    torch.manual_seed(0)
    noise = _everything(data.training_set(augment=True))[0] - _everything(data.training_set(augment=False))[0]
    assert abs(noise.std().item() - 0.5) < 0.01
    assert abs(noise.mean().item()) < 0.01


def test_shift_moves_the_image_and_fills_with_background() -> None:
    data = DigitsDataModule(noise=0.0, max_shift=1)
    plain = data.training_set(augment=False)[0][0]
    padded = torch.full((1, 10, 10), -4.884 / 6.017)
    padded[:, 1:9, 1:9] = plain
    allowed = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    torch.manual_seed(0)
    drawn = [data.training_set(augment=True)[0][0] for _ in range(99)]
    seen = {next(k for k, window in enumerate(allowed) if torch.allclose(window, image)) for image in drawn}
    assert len(seen) == 9


def test_loaders() -> None:
    data = DigitsDataModule(batch_size=128)
    train = data.train_dataloader()
    images, targets = next(iter(train))
    assert images.shape == (128, 1, 8, 8)
    assert targets.dtype == torch.int64
    assert (len(train), train.drop_last, train.generator) == (11, True, None)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
        assert sum(len(batch[1]) for batch in loader) == 360


def test_calibration_loader_leaves_the_training_order_alone() -> None:
    data = DigitsDataModule()
    torch.manual_seed(5)
    expected = [targets for _, targets in data.train_dataloader()]
    torch.manual_seed(5)
    train = data.train_dataloader()
    data.calibration_augmentation = False
    seen = sum(len(targets) for _, targets in data.calibration_dataloader())
    assert seen == 1437
    assert all(torch.equal(a, b) for a, (_, b) in zip(expected, train, strict=True))


@pytest.mark.parametrize("augmentation", [True, False])
def test_calibration_augmentation_can_be_turned_off(augmentation: bool) -> None:
    data = DigitsDataModule(noise=0.5, calibration_augmentation=augmentation)
    dataset = data.calibration_dataloader().dataset
    assert torch.equal(dataset[0][0], dataset[0][0]) is not augmentation


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("noise", -1.0),
        ("max_shift", 8),
        ("batch_size", 0),
        ("num_workers", -1),
    ],
)
def test_bad_arguments_are_named(argument: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{argument}={value}"):
        DigitsDataModule(**{argument: value})  # type: ignore[arg-type]


def test_a_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size=2000 leaves no complete training batch of 1437"):
        DigitsDataModule(batch_size=2000).train_dataloader()
