"""What a model gives for a batch, where only a loss that calls it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.calibration.rows import Loss
from lightning_cap.errors import TargetError


class ModelOutputs:
    """Gives the outputs of a model for a batch, with those of a loss that calls it.

    Args:
        model: In eval mode.
        loss: Calls it, or modules of it.
        context: Entered around it.
    """

    def __init__(self, model: nn.Module, loss: Loss, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._model, self._loss, self._context = model, loss, context
        self._depth, self._found = 0, None

    def __call__(self, batch: Any) -> Tensor:
        """Those of the outermost module with parameters to train that the loss calls last.

        Raises:
            TargetError: It calls none, or that gives no tensor.
        """
        self._depth, self._found = 0, None
        with self._hooked(), self._context(), PlainNormalization():
            self._loss(self._model, batch)
        outputs, self._found = _tensor(self._found), None
        if outputs is None:
            raise TargetError("model: the loss calls no module that gives a tensor, so its outputs are not known. Let it call the "
                              "model, or a module of it.")  # fmt: skip
        return outputs

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._model.modules():
                if any(p.requires_grad for p in module.parameters()):
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._found = output


def _tensor(output: Any) -> Tensor | None:
    """The outputs in what a module returns: itself, or its ``logits``, or the first of several."""
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    elif isinstance(output, (tuple, list)):
        output = next(iter(output), None)
    return output if isinstance(output, Tensor) and output.dim() > 0 else None
