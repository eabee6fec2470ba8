"""The toy as a student, with an auxiliary head that is registered first and a teacher that is registered last."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.support.toy import CLASSES, FEATURES, TARGET, Toy

#: All that is pruned by default; the order of registration makes it the student's classifier and a layer of the teacher too.
STUDENT_TARGETS = [TARGET]


class Student(Toy):
    def __init__(self, scheduler: bool = True) -> None:
        super().__init__(scheduler=scheduler)
        net = self._modules.pop("net")
        self.aux = nn.Linear(16, CLASSES)
        self.net = net
        self.teacher = nn.Sequential(nn.Linear(FEATURES, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES))
        self.teacher.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        early = self.net[:3](x)
        out = self.net[3:](early)
        loss = nn.functional.cross_entropy(out, y) + 0.3 * nn.functional.cross_entropy(self.aux(early), y)
        loss = loss + nn.functional.mse_loss(out, self.teacher(x))
        self.log("train_loss", loss)
        return loss
