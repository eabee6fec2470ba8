from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_cap.classifier import VisionClassifier
from lightning_cap.classifier.agreement import check_images, normalization_of
from lightning_cap.data import DigitsDataModule, ImageNetDataModule
from lightning_cap.errors import ConfigError
from tests.support.classifying import loader, trainer, vit
from tests.support.images import SIDE, image_data, small_images, write_folder

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CPU = torch.device("cpu")


def small(**changes: Any) -> VisionClassifier:
    """Of three classes, of images of the size and number of channels that the small images have."""
    kwargs = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    return VisionClassifier("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 3, model_kwargs={**kwargs, **changes})


def splits(folder: Path) -> Path:
    for name in ("train", "val"):
        write_folder(folder / name, small_images())
    return folder


def test_normalization_is_the_models(tmp_path: Path) -> None:
    module, data = small(), image_data(splits(tmp_path))
    assert data.normalization == IMAGENET
    before = data.validation_set()[0][0]
    assert module.normalization == HALF
    trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert data.normalization == HALF
    pixels = before * torch.tensor(IMAGENET[1])[:, None, None] + torch.tensor(IMAGENET[0])[:, None, None]
    torch.testing.assert_close(data.validation_set()[0][0], (pixels - 0.5) / 0.5)
    given = image_data(tmp_path, mean=(0.1, 0.2, 0.3))
    given.trainer = data.trainer
    assert given.normalization == ((0.1, 0.2, 0.3), HALF[1])


def test_normalization_is_imagenets_where_the_model_tells_none(tmp_path: Path) -> None:
    data = image_data(splits(tmp_path))
    trainer(tmp_path).validate(
        VisionClassifier(vit(num_classes=3, img_size=SIDE, in_chans=3)), datamodule=data, verbose=False
    )
    assert data.normalization == IMAGENET
    assert normalization_of(nn.Linear(2, 2)) is None
    one_channel = timm.create_model("resnet18", num_classes=3)
    one_channel.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    assert normalization_of(one_channel) is None


def test_other_normalization_than_of_the_pretrained_weights_is_told(tmp_path: Path) -> None:
    module, data = small(), image_data(splits(tmp_path), mean=IMAGENET[0], std=IMAGENET[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mean=")
        trainer(tmp_path).validate(module, datamodule=data, verbose=False)  # random weights take any
    module.pretrained = True
    with pytest.warns(UserWarning, match=r"mean=\(0.485.* are not those that the pretrained.*mean=\(0.5"):
        trainer(tmp_path).validate(module, datamodule=data, verbose=False)


def test_images_of_another_size(tmp_path: Path) -> None:
    data = image_data(splits(tmp_path), img_size=24)
    with pytest.raises(ConfigError, match=r"gives images \(3, 24, 24\).*does not take .*Input height.*img_size of 24"):
        trainer(tmp_path).fit(small(), datamodule=data)
    trainer(tmp_path).validate(VisionClassifier("resnet18", 3), datamodule=data, verbose=False)  # takes any


def test_another_number_of_classes(tmp_path: Path) -> None:
    data = image_data(splits(tmp_path))
    with pytest.raises(ConfigError, match=r"num_classes=10 of the model, but the data has 3 classes"):
        trainer(tmp_path).fit(VisionClassifier(vit(img_size=SIDE, in_chans=3)), datamodule=data)


def test_more_than_one_vector_for_an_image() -> None:
    with pytest.raises(ConfigError, match=r"makes \(1, 8, 10\) and not logits \(1, 10\)"):
        check_images(nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 10)), 10, DigitsDataModule(), CPU)


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check_images(model, 10, DigitsDataModule(), CPU)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_model_is_tried_where_the_run_will_be() -> None:
    """Of a device other than that of the weights, the model sees copies."""
    model, there = vit(), torch.device("meta")
    check_images(model, 10, DigitsDataModule(), there)
    assert {tensor.device for tensor in model.state_dict().values()} == {CPU}
    with pytest.raises(ConfigError, match="which the model does not take"):
        check_images(vit(in_chans=3), 10, DigitsDataModule(), there)


def test_models_without_weights_yet_are_not_tried() -> None:
    check_images(nn.LazyConv2d(4, 3), 10, DigitsDataModule(), CPU)
    check_images(nn.Linear(3, 10, device="meta"), 10, DigitsDataModule(), CPU)


def test_data_that_tells_nothing_is_taken(tmp_path: Path) -> None:
    class Plain(LightningDataModule):
        def val_dataloader(self) -> DataLoader[Any]:
            return loader()

    trainer(tmp_path).validate(VisionClassifier(vit()), datamodule=Plain(), verbose=False)
    trainer(tmp_path).validate(VisionClassifier(vit()), loader(), verbose=False)


def test_every_data_module_tells_what_is_compared() -> None:
    assert ImageNetDataModule(img_size=96).image_shape == (3, 96, 96)
    assert (DigitsDataModule().image_shape, DigitsDataModule().num_classes) == ((1, 8, 8), 10)
