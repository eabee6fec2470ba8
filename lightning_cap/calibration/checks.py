"""What collectors refuse."""

from __future__ import annotations

import math

from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.targets import require_targets
from lightning_cap.utilities.arguments import require_callable, require_counts, require_instance, require_iterable

#: Samples that one collection may draw: beyond, their order alone takes gigabytes.
MOST_SAMPLES = 2**24


def check_collector(
    model: object, targets: object, loss: object, batches: object, context: object, progress: object
) -> None:
    """Refuse arguments of a collector that are of the wrong kind.

    Raises:
        ConfigError: One is; it is named.
    """
    require_instance("model", model, nn.Module, "timm.create_model('resnet18')")
    require_targets(targets)
    require_callable("loss", loss, "lambda model, batch: cross_entropy(model(batch[0]), batch[1])")
    require_iterable("batches", batches, "a DataLoader")
    require_callable("context", context, "contextlib.nullcontext")
    require_callable("progress", progress, "lambda phase, done, total: None", optional=True)


def check_samples(**counts: int) -> None:
    """Refuse numbers that are not whole and positive, or that are too many samples when multiplied.

    Raises:
        ConfigError: They are; each is named.
    """
    require_counts(**counts)
    if math.prod(counts.values()) > MOST_SAMPLES:
        given = ", ".join(f"{name}={value}" for name, value in counts.items())
        raise ConfigError(
            f"{given}: a collection may draw {MOST_SAMPLES:,} samples, num_gradients times samples_per_gradient; these are "
            f"{math.prod(counts.values()):,}. Give fewer."
        )


def check_batch(samples_per_gradient: int, samples: int) -> None:
    """Refuse a first batch that is too small for one gradient sample.

    Raises:
        ConfigError: It is.
    """
    if 0 < samples < samples_per_gradient:
        raise ConfigError(
            f"samples_per_gradient={samples_per_gradient}: the first batch has {samples} samples, so no gradient could be the mean "
            f"of so many. Give larger batches, or samples_per_gradient={samples} or less."
        )
