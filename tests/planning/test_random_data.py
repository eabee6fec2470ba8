from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cap import VisionClassifier
from lightning_cap.data import DigitsDataModule, ImageNetDataModule
from lightning_cap.errors import ConfigError
from lightning_cap.planning import plan_fit
from lightning_cap.planning.random_data import random_data
from tests.support.anything import Sentences, words
from tests.support.planned import QUICK, configured, pruning, small_model


def test_noise_is_as_large_as_the_data() -> None:
    data, known = random_data(small_model(), DigitsDataModule(batch_size=32), processes=2)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 8, 8)
    assert int(labels.max()) < 10
    real = DigitsDataModule()
    assert (known, data.images) == (True, len(real.training_set(augment=False)) // 2)  # type: ignore[arg-type]
    assert type(data).__name__ == "DigitsDataModule"  # as messages name it


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.33, 0.5, 0.99])
def test_digits_that_are_held_out_are_known(fraction: float) -> None:
    data = DigitsDataModule(val_fraction=fraction)
    assert data.known_images == len(data.training_set(augment=False))  # type: ignore[arg-type]


def test_no_file_is_opened() -> None:
    model = VisionClassifier("vit_tiny_patch16_224", num_classes=1000, model_kwargs={"depth": 1})
    data, known = random_data(model, ImageNetDataModule(root="/nowhere", img_size=96, batch_size=4), processes=8)
    assert (known, data.images, data.example.shape[1:], data.num_classes) == (False, 1281167 // 8, (3, 96, 96), None)
    assert random_data(model, ImageNetDataModule(num_classes=5), 1)[0].num_classes == 5
    assert random_data(model, None, 1)[0].example.shape[1:] == (3, 224, 224)
    assert random_data(model, ImageNetDataModule(batch_size=4), 2, train_images=100)[0].images == 50


def test_what_tells_no_shape_is_refused() -> None:
    model = VisionClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), num_classes=3)
    with pytest.raises(ConfigError, match="nothing tells the shape of its inputs"):
        random_data(model, None, 1)
    model.example_input_array = torch.zeros(2, 3, 2, 2)
    assert random_data(model, None, 1)[0].example.shape[1:] == (3, 2, 2)
    with pytest.raises(ConfigError, match="batch_size=32 leaves no complete training batch of 40 samples on 2"):
        random_data(model, None, 2, train_images=40)


def test_integers_are_those_of_the_example() -> None:
    """Of a type and range that an embedding takes."""
    model = Sentences()
    model.example_input_array = words(3)["input_ids"]
    ids, labels = next(iter(random_data(model, None, 1)[0].val_dataloader()))
    assert (ids.shape, ids.dtype, labels.shape) == ((32, 6), torch.int64, (32,))
    assert torch.equal(ids[:6], model.example_input_array.repeat(2, 1))


@pytest.mark.parametrize("has_labels", [False, True])
def test_named_inputs_make_mappings(has_labels: bool) -> None:
    model = Sentences()
    named = {name: value for name, value in words(3).items() if name != "scale"}
    model.example_input_array = {**named, "next_label": torch.ones(3)} if has_labels else named
    data, _ = random_data(model, None, 1)
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {*named, "next_label" if has_labels else "labels"}
    assert torch.equal(batch["input_ids"][:3], named["input_ids"])
    assert {name: value.shape for name, value in data.one(batch).items() if name in named} == dict.fromkeys(
        named, (1, 6)
    )
    model.example_input_array = {"input_ids": "text"}
    with pytest.raises(ConfigError, match=r"or a dict of those"):
        random_data(model, None, 1)


class _Trained(Sentences):
    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(self(**batch)["logits"], labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_model_of_named_inputs_is_planned() -> None:
    model = _Trained()
    model.example_input_array = {name: value for name, value in words(3).items() if name != "scale"}
    plan = plan_fit(configured(pruning(include=["*.first.weight"])), model, None, QUICK)
    flops = {layer.name: layer.flops for layer in plan.choices[0].layers}
    assert flops["net.first.weight"] == 2 * 16 * 16 * (6 + 1)
