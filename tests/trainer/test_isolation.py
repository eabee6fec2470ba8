from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lightning_cap.trainer.isolation import preserve_state
from tests.support.toy import Toy


def test_undisturbed_restores_flags_buffers_and_generators() -> None:
    module = Toy()
    module.net[3].eval()
    flags = [m.training for m in module.modules()]
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    def disturb() -> None:
        with preserve_state(module):
            assert not any(m.training for m in module.modules())
            module.train()
            module(torch.randn(8, 12))  # BatchNorm counts it
            torch.rand(3), random.random(), np.random.rand(3)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        disturb()
    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(b, buffers[name]) for name, b in module.named_buffers())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert (state[2] == np.random.get_state()[1]).all()
