"""Bad input to the classifier: in its arguments, its checkpoint files, and data that is not for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from lightning_cap.classifier import DistillationLoss, VisionClassifier, load_weights
from lightning_cap.data import DigitsDataModule
from lightning_cap.errors import ConfigError
from tests.support.bad_input.table import Line, wrong
from tests.support.classifying import trainer, vit

NET = nn.Flatten()
NAN, INF = float("nan"), float("inf")


def classifier(argument: str, *values: Any, words: tuple[str, ...] = ()) -> list[Line]:
    return wrong(VisionClassifier, argument, *values, given={"model": NET}, words=words)


def distillation(argument: str, *values: Any) -> list[Line]:
    return wrong(DistillationLoss, argument, *values, given={"teacher": NET})


def named(name: str, run: Callable[[Path], Any], *words: str) -> Line:
    return Line(f"classifier: {name}", run, ConfigError, words)


def checkpoint(name: str, content: bytes, *words: str) -> Line:
    def run(folder: Path) -> None:
        path = folder / "weights.pt"
        path.write_bytes(content)
        try:
            load_weights(NET, path)
        finally:
            path.unlink()

    return Line(f"load_weights: {name}", run, ConfigError, ("checkpoint=", *words))


def with_digits(name: str, stage: str, *words: str, **changes: Any) -> Line:
    """A model that does not fit the digits."""

    def run(folder: Path) -> None:
        module = VisionClassifier(vit(**changes))
        getattr(trainer(folder), stage)(module, datamodule=DigitsDataModule())

    return Line(f"{stage} of digits by a model of {name}", run, ConfigError, words)


LINES = [
    *wrong(VisionClassifier, "model", None, 3, ["resnet18"], {"class_path": "a.B"}, True, nn.Linear, "resnet81", ""),
    *classifier("num_classes", "10", 10.0, True, 0, 1, -3, [10], NAN),
    *classifier("pretrained", None, "yes", 1, [True]),
    *classifier("checkpoint", "", 3, ["a.pt"], True),
    *classifier("model_kwargs", 3, "depth=3", [("depth", 3)]),
    *classifier("recipe", 3, "diet", ["deit"], {}, words=("deit, light1",)),
    *classifier("label_smoothing", "0.1", NAN, 1.0, -0.1, True, [0.1], {"a": 1}, object),
    *classifier("weight_decay", "0.05", NAN, INF, -1, True, [0.1]),
    *classifier("drop_path_rate", "0.1", NAN, 1.0, -0.1, True),
    *classifier("gradient_clip", "1", NAN, INF, -1, [1.0]),
    *classifier("optimizer", None, "AdamW", 3, {"lr": 0.1}),
    *classifier("lr_scheduler", "cosine", 3, [0.1], {"min_lr": 0.1}),
    *classifier("distillation", "soft", 0.5, nn.Linear, NET, {"teacher": NET}, True),
    *wrong(DistillationLoss, "teacher", None, 3, ["resnet18"], nn.Linear, "resnet81", "", True),
    *distillation("alpha", None, "0.5", NAN, 1.1, -0.1, True, [0.5]),
    *distillation("temperature", None, "1", NAN, INF, 0, -1, True),
    *distillation("kind", None, "softer", 3, ["soft"]),
    *distillation("layer", None, 3, "", ["norm"]),
    *distillation("pretrained", None, "yes", 1),
    *distillation("checkpoint", "", 3, ["a.pt"], True),
    *distillation("model_kwargs", 3, "depth=3", [("depth", 3)]),
    named("a layer that the teacher has not", lambda _: DistillationLoss(NET, kind="token"), "layer='norm'", "named_modules"),
    named("weights for a teacher that is made", lambda _: DistillationLoss(NET, checkpoint="a.pt"), "checkpoint='a.pt'"),
    *wrong(load_weights, "model", None, "resnet18", {}, nn.Linear, given={"path": "a.pt"}),
    named("no such checkpoint", lambda _: load_weights(NET, "nowhere.pt"), "checkpoint='nowhere.pt' is not a file"),
    named("a folder as checkpoint", lambda folder: load_weights(NET, folder), "checkpoint=", "is not a file"),
    named("None as checkpoint", lambda _: load_weights(NET, None), "checkpoint=None"),  # type: ignore[arg-type]
    named("a number as checkpoint", lambda _: load_weights(NET, 3), "checkpoint=3"),  # type: ignore[arg-type]
    named("both weights", lambda _: VisionClassifier("resnet18", pretrained=True, checkpoint="a.pt"), "keep one of them"),
    named("no number of classes", lambda _: VisionClassifier(NET), "num_classes=None"),
    named("kwargs of a module", lambda _: VisionClassifier(NET, 3, model_kwargs={"depth": 1}), "model_kwargs={'depth': 1}"),
    named("another number of classes", lambda _: VisionClassifier(vit(), 12), "num_classes=12, but the model has 10"),
    named("unknown kwargs", lambda _: VisionClassifier("resnet18", model_kwargs={"a": 1}), "'a': 1", "model_kwargs"),
    named("a learning rate below 0", lambda _: VisionClassifier(vit(), optimizer=lambda g: SGD(g, lr=-1)).configure_optimizers(),
          "optimizer cannot be made", "learning rate: -1"),
    named("an optimizer without its settings", lambda _: VisionClassifier(vit(), lr_scheduler=StepLR).configure_optimizers(),
          "lr_scheduler cannot be made", "step_size"),
    checkpoint("nothing", b"", "cannot be read"),
    checkpoint("text", b"no weights at all", "cannot be read"),
    checkpoint("zeros", bytes(1000), "cannot be read"),
    with_digits("12 classes", "fit", "num_classes=12", "10 classes", num_classes=12),
    with_digits("2 classes", "validate", "num_classes=2", "10 classes", num_classes=2),
    with_digits("three channels", "fit", "(1, 8, 8)", "in_chans=1", in_chans=3),
    with_digits("three channels", "test", "(1, 8, 8)", "in_chans=1", in_chans=3),
    with_digits("images of 16 pixels", "fit", "(1, 8, 8)", "img_size", "16", img_size=16),
    with_digits("images of 16 pixels", "predict", "(1, 8, 8)", "img_size", img_size=16),
]  # fmt: skip
