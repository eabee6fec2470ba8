from __future__ import annotations

import io
import random
from contextlib import suppress

import numpy as np
import torch

from lightning_cap.utilities import rng


def _draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.standard_normal()), float(torch.rand(())), random.gauss(0, 1)


def test_restore_brings_every_generator_back() -> None:
    rng.seed_by(1)
    np.random.standard_normal()  # leaves a cached second normal
    random.gauss(0, 1)
    state = rng.capture()
    first = [_draw() for _ in range(3)]
    rng.seed_by(2)
    assert [_draw() for _ in range(3)] != first
    rng.restore(state)
    assert [_draw() for _ in range(3)] == first


def test_state_survives_a_weights_only_checkpoint() -> None:
    stream = io.BytesIO()
    torch.save(rng.capture(), stream)
    expected = _draw()
    stream.seek(0)
    rng.restore(torch.load(stream, weights_only=True))
    assert _draw() == expected


def test_preserved_also_after_an_error() -> None:
    rng.seed_by(3)
    state = rng.capture()
    expected = _draw()
    rng.restore(state)
    with suppress(KeyError), rng.preserved():
        rng.seed_by(9)
        _draw()
        raise KeyError
    assert _draw() == expected


def test_keys_seed_independently() -> None:
    drawn = set()
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**32 - 1, 3, 7), (5, 3, 7)]
    for key in keys:
        rng.seed_by(*key)
        first = _draw()
        rng.seed_by(*key)
        assert _draw() == first
        drawn |= {(kind, value) for kind, value in enumerate(first)}
    assert len(drawn) == 4 * len(keys)
