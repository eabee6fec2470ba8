"""Gradient rows of a model that `fully_shard` has shared out: one unit of weights at a time, each row cut up at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.calibration.batches import batch_size
from lightning_cap.calibration.checks import check_batch
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.calibration.rows import Loss, check_loss, refuse_independent_loss
from lightning_cap.calibration.sources import SourceMemory, Trial, peek
from lightning_cap.sparsity.shards import BlockShards
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_instance
from lightning_cap.utilities.peak_memory import measure_peak
from lightning_cap.utilities.sharded import is_sharded, units
from lightning_cap.utilities.stopping import poll

#: ``take(target name, gradient (*shape))``: float32; the gradient is freed afterwards.
Take = Callable[[str, Tensor], None]


class ShardedRowComputer:
    """Computes one gradient row at a time by the model's own forward and backward pass, and hands on each target's as it comes.

    So a process holds the weights of one unit and the gradient of one target at a time. Nothing is added up in ``.grad``, nor
    reduced over processes. All must compute rows equally often, since they lend each other their weights.

    Args:
        model: In eval mode, with units of `fully_shard`.
        targets: Its sharded weights.
        loss: Mean loss of a batch.
        context: Entered around every loss evaluation.
        scale: Factor on the loss before and off the gradient after.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        context: Callable[[], AbstractContextManager[Any]],
        scale: float,
    ) -> None:
        self._model, self._targets, self._loss, self._context, self._scale = model, targets, loss, context, scale
        paths = {name: path.rpartition(".") for name, path in targets.paths.items()}
        self._places = {name: (model.get_submodule(owner), attribute) for name, (owner, _, attribute) in paths.items()}

    def row(self, batch: Any, take: Take) -> bool:
        """The row of all samples of a batch together.

        Args:
            batch: Of this process.
            take: Called once for each target that the loss depends on, in the order of the backward pass: the same one everywhere.

        Returns:
            Whether it is finite.

        Raises:
            GradientError: The loss is not a scalar, has no gradient, or does not depend on any target.
        """
        met: dict[str, Tensor] = {}  # whole weights, as the units have them during the passes
        finite = torch.ones((), dtype=torch.bool, device=self._targets.device)
        with ExitStack() as hooks:

            def hand_on(name: str, gradient: Tensor) -> Tensor:
                nonlocal finite
                given = gradient.detach().float()
                given = given if self._scale == 1 else given / self._scale
                finite = finite & given.isfinite().all()
                take(name, given)
                return gradient.new_zeros(()).expand_as(gradient)  # what autograd keeps of it

            def meet(*_: Any) -> None:
                for name, (layer, attribute) in self._places.items():  # as the layer sees it
                    if name not in met and not is_sharded(weight := getattr(layer, attribute)):
                        met[name] = weight
                        hooks.callback(weight.register_hook(functools.partial(hand_on, name)).remove)

            for unit in units(self._model):  # after the unit's own hook, which makes its weights whole
                hooks.callback(unit.register_forward_pre_hook(meet).remove)
            with torch.inference_mode(False), torch.enable_grad(), self._context(), PlainNormalization():
                loss = check_loss(self._loss(self._model, batch))
                weights = list(met.values())
                grads = (
                    torch.autograd.grad(loss.reshape(()) * self._scale, weights, allow_unused=True) if weights else ()
                )
        refuse_independent_loss(grads, len(self._targets))
        return bool(finite)


class ShardedCollector(GradientCollector):
    """A source of gradient rows of sharded targets: after `hand_to_owners` it gives each process the part of all rows, of its own
    samples and of the others', that its blocks cover: ``{target: (n, k)}``. Arguments and order: see `GradientCollector`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        loss: Loss,
        batches: Any,
        num_gradients: int,
        samples_per_gradient: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(model, targets, loss, batches, num_gradients, samples_per_gradient, **settings)
        context, scale = settings.get("context", self._computer._context), settings.get("scale", 1.0)
        self._one = ShardedRowComputer(model, targets, loss, context, scale)
        self._shards: BlockShards | None = None

    def hand_to_owners(self, shards: BlockShards) -> None:
        """Give rows in the parts that the processes own.

        Raises:
            ConfigError: ``shards`` are something else.
        """
        require_instance("shards", shards, BlockShards, "BlockShards(targets, targets.blocks(192))")
        self._shards = shards

    def _rounds(self) -> Iterator[tuple[dict[str, Tensor], int, int]]:
        own, left = iter(self._batches), self._num_gradients
        spare: Any = None
        for number in itertools.count():
            pieces, counts = self._together(lambda: self._next_pieces(own))
            ends = [min(left, end) for end in itertools.accumulate(counts)]
            most = [end - first for first, end in zip([0, *ends], ends, strict=False)]
            left -= sum(most)
            if not sum(most):
                return
            pieces = pieces[: most[distributed.rank()]]
            spare = pieces[0] if pieces else spare
            if number == 0 and min(most) == 0:
                spare = self._lend(spare)
            yield self._rows_of_all(pieces, spare, most)
            if left <= 0:
                return

    def _next_pieces(self, own: Iterator[Any]) -> tuple[list[Any], int]:
        """This process's next batch, a piece for each row. Of what goes wrong here all processes learn; none waits for weights."""
        poll()
        batch, count = self._next(own)
        pieces = list(itertools.islice(self._computer.split(batch, count), count)) if count else []
        return pieces, len(pieces)

    _chunks = _rounds

    def _rows_of_all(self, pieces: list[Any], spare: Any, counts: list[int]) -> tuple[dict[str, Tensor], int, int]:
        """The rows of ``counts`` batches of the processes, in order of rank; how many, and how many of them are finite."""
        assert self._shards is not None
        shards, device, rank = self._shards, self._targets.device, distributed.rank()
        rows = {name: torch.zeros(sum(counts), *shape, device=device) for name, shape in shards.own.shapes.items()}
        finite = torch.zeros(sum(counts), dtype=torch.bool, device=device)
        for i in range(max(counts)):
            here = [int(i < count) for count in counts]
            places = [sum(counts[:r]) + i for r, given in enumerate(here) if given]

            def take(name: str, gradient: Tensor, here: list[int] = here, places: list[int] = places) -> None:
                rows[name][places] = shards.exchange(name, gradient.unsqueeze(0)[: here[rank]], here)

            good = self._one.row(
                pieces[i] if here[rank] else spare, take
            )  # the spare one for the other processes' sake
            told = distributed.gather_counts(int(good), device)
            finite[places] = torch.tensor(
                [bool(one) for one, given in zip(told, here, strict=True) if given], device=device
            )
        kept = int(finite.sum())
        return rows if kept == len(finite) else {name: some[finite] for name, some in rows.items()}, len(finite), kept

    def _lend(self, batch: Any) -> Any:
        """A batch for the processes that have none, to lend their weights by: that of the first one that has."""
        told = distributed.gather_objects(pytree.tree_map(_on_cpu, batch))
        first = next((other for other in told if other is not None), None)
        device = self._targets.device
        return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, first)

    def _try_first(self) -> None:
        with distributed.raise_on_all_ranks("The first batch"):
            batch, self._batches = peek(self._batches)
        self.probe(batch)  # which communicates

    def probe(self, batch: Any) -> None:
        """See `GradientCollector.probe`. Every process must call it."""
        if batch is not None:
            check_batch(self._samples, batch_size(batch, default=0))
        piece = None if batch is None else next(iter(self._computer.split(batch, 1)))
        if min(distributed.gather_counts(int(piece is not None), self._targets.device)) == 0:
            piece = self._lend(piece)
        peak = 0
        if piece is not None:
            with rng.preserved():
                _, peak = measure_peak(lambda: self._one.row(piece, lambda *_: None), self._targets.device)
        rows = 1 if batch is None else max(1, batch_size(batch, default=1) // self._samples)
        own = 4 * -(-self._targets.numel // distributed.world_size())
        held = own * rows * distributed.world_size()  # of each process's rows what this one's blocks cover
        self.trial = Trial(SourceMemory(peak, held, held, 1, 1), False)


def _on_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
