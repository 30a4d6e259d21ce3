"""The one forward and the one backward: a walk over the layers that takes each layer's weights once a direction.

    up      embed, h.0, ..., h.(L-1)      the head's turn is forward and backward at once
    down    head, h.(L-1), ..., embed

Each turn brings its layer by `gather`, one layer ahead of the arithmetic, `get`s it and `release`s it; where the
weights come from is the store's business. A layer handles all micro-batches of a visit before the next layer's turn,
so a visit moves every weight twice however many they are. Between layers the activations are detached. A layer's
gradient is one torch.autograd.grad over its own graph: kept from the way up, or made again from the layer's input on
the way down (Chen et al. 2016, arXiv 1604.06174), which a layer whose weights do not stay on the device must do.

Losses are fp32, their mean double.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cgpt.model.cache import Past, Step
from cgpt.stream.activations import Boundaries
from cgpt.stream.devices import Event
from cgpt.stream.exchange import Exchange
from cgpt.stream.gradients import Gradients, Sums
from cgpt.stream.store import Store

Batch = tuple[Tensor, Tensor]  # one micro-batch: ids and targets, both (B, T) int64
Result = TypeVar("Result")


class Executor:
    """Walks the store's layers, for training and for evaluation."""

    def __init__(self, store: Store, seed: int | None = None):
        self.store, self.lanes, self.seed = store, store.lanes, seed
        self.step = 0  # calls of `gradients`, which random numbers are counted by
        away = store.format.training and store.placement.activations == "host"
        self._boundaries = Boundaries(store) if away else None
        self._exchange = Exchange(store) if store.world.count > 1 and store.format.training else None

    def loss(self, batches: Sequence[Batch]) -> float:
        """Mean loss over the samples of `batches`, forward only and without a graph."""
        return self.lanes.number(self._whole(lambda: sum(_Walk(self, batches, _shares([batches])[0]).up())))

    def losses(self, batches: Sequence[Batch | None]) -> list[float | None]:
        """Each batch's own mean loss, the bits that `loss` gives for it alone, in one walk over the layers.

        None: this rank has no batch where others have one; as many in all on every rank.
        """

        def work() -> list[float | None]:
            found = _Walk(self, batches, [1.0] * len(batches)).up()
            return [None if loss is None else self.lanes.number(loss) for loss in found]

        return self._whole(work)

    def logits(self, ids: Tensor, step: Step | None = None) -> Tensor:
        """(B, T) int64 -> (B, V) after the last position, by the head's `logits`; forward only.

        step: of a GPT's cache on the store's device; ids (1, T) are then what it says, and the logits (parts, V) those
        after each part.
        """
        pasts = None if step is None else [step, *step.layers]

        def head(x: Tensor) -> Tensor:
            x = x[:, -1] if step is None else x[0, step.last]
            return self.store.layers[-1].module.logits(x)

        return self._whole(lambda: _Walk(self, [(ids, ids)], [1.0], pasts=pasts).up(head)[0])

    def read(self, batches: Sequence[Tensor], head: Callable[[Callable, int, Tensor], Result]) -> list[Result]:
        """What head(the last layer's module, row, its input) makes of each of `batches`, (B, T) int64, in one walk over
        the layers; forward only. The input is (B, T, D) activations."""

        def work() -> list[Result]:
            rows = iter(range(len(batches)))  # the head takes its turns in order
            walk = _Walk(self, [(ids, ids) for ids in batches], [1.0] * len(batches))
            return walk.up(lambda x: head(self.store.layers[-1].module, next(rows), x))

        return self._whole(work)

    def gradients(
        self,
        visits: Sequence[Sequence[Batch | None]],
        loss_scale: float = 1.0,
        *,
        micro_batches: int | None = None,
        samples: int | None = None,
    ) -> Gradients:
        """Loss, gradients and their norm over all micro-batches of all visits; they may differ in size.

        A visit holds its micro-batches' activations between layers at once: several visits bound that memory, several
        micro-batches a visit save weight traffic.

        Of N ranks, rank r brings micro-batches r, r + N, r + 2N, ... of the step's `micro_batches`, which hold
        `samples` sequences in all; where that is one fewer than others bring, its last is None.
        """

        def work() -> Gradients:
            contributions, losses = micro_batches or sum(map(len, visits)), []
            sums = Sums(self.store, contributions, self._exchange)
            shares = _shares(visits, samples)
            for left, visit, share in zip(reversed(range(len(visits))), visits, shares, strict=True):
                losses += _Walk(self, visit, share, sums, loss_scale, left == 0, len(losses)).up_and_down()
            self.step += 1
            return sums.step_ended(losses)

        return self._whole(work)

    def _whole(self, work):
        """Runs a walk; one that an error ends leaves a store that can be walked again."""
        try:
            return work()
        except BaseException:
            self.store.abandon()
            if self._boundaries is not None:
                self._boundaries.abandon()
            raise


class _Walk:
    """One visit of all layers by `batches`; sums: where gradients go, None for a forward alone. pasts: what each layer
    below the head is told of the tokens before these."""

    def __init__(
        self,
        executor: Executor,
        batches: Sequence[Batch | None],
        shares: list[float],
        sums: Sums | None = None,
        loss_scale: float = 1.0,
        last: bool = True,
        first: int = 0,
        pasts: Sequence[Step | Past] | None = None,
    ):
        self.store, self.lanes, self.boundaries = executor.store, executor.lanes, executor._boundaries
        self.batches, self.shares, self.sums, self.loss_scale, self.last = batches, shares, sums, loss_scale, last
        self.pasts = pasts
        self.draws = None if executor.seed is None else (executor.seed, executor.step)
        self.first = first  # the number of this rank's first micro-batch here, of those of the step
        self.head = len(self.store.layers) - 1
        self.rows = [row for row, batch in enumerate(batches) if batch is not None]
        self.flow = [batch and batch[0] for batch in batches]  # activations on the way up, their gradients down
        self.made: list[Event | None] = [None] * len(self.flow)  # ends what made each
        self.tape: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}  # (layer, row) -> input, and output if kept
        self.event: Event | None = None  # ends the turn's last arithmetic

    def up(self, head: Callable[[Tensor], Tensor] | None = None) -> list[Tensor | None]:
        """Each micro-batch's loss times its share of the step's samples, double; or what `head` makes of it."""
        turns = self._turns(list(range(self.head + 1)))
        self._climb(turns)
        index, after = next(turns)
        results = self._top(index, after) if head is None else self._end(index, after, head)
        next(turns, None)  # gives the head back
        return results

    def up_and_down(self) -> list[Tensor | None]:
        """The same, and the gradients."""
        turns = self._turns([*range(self.head + 1), *reversed(range(self.head))])
        self._climb(turns)
        losses = self._top(*next(turns))
        for index, after in turns:
            self._descend(index, after)
        self.sums.settle()
        return losses

    def _turns(self, order: list[int]) -> Iterator[tuple[int, list[Event]]]:
        """Each layer's turn, the next one's weights, activations and sums on their way; ends with its release."""
        fetched = self._gather(order, 0)
        for place, here in enumerate(order):
            ahead = self._gather(order, place + 1)
            _, after = self.store.get(here)
            self.event, after = None, [*after, *fetched]
            yield here, after
            if self.event is None:  # a rank without a micro-batch; others have one
                _, self.event = self.lanes.compute(f"{self.store.layers[here].name} idle", lambda: None, after)
            self.store.release(here, self.event)
            fetched = ahead

    def _gather(self, order: list[int], place: int) -> list[Event]:
        if place == len(order):
            return []
        index = order[place]
        self.store.gather(index)
        if self.sums is None or place < self.head:
            return []
        if self.boundaries is not None:
            self.boundaries.bring(index)
        return self.sums.fetch(index)

    def _climb(self, turns: Iterator[tuple[int, list[Event]]]) -> None:
        """Forward to the head's door."""
        for index, after in turns:
            keep = self.sums is not None and not self.store.placement.recompute[index]
            for row in self.rows:
                x = self.flow[row]
                if self.sums is not None and not keep:
                    self._keep_input(index, row, x)

                def work(index=index, row=row, x=x, keep=keep) -> tuple[Tensor, Tensor]:
                    return self._run(index, row, x, keep)

                x, y = self._compute(index, "forward", row, 2, after, work)
                self.flow[row], self.made[row] = y.detach(), self.event
                if keep:
                    self.tape[index, row] = x, y
            if index == self.head - 1:
                return

    def _keep_input(self, index: int, row: int, x: Tensor) -> None:
        if self.boundaries is not None and index:
            self.boundaries.keep(index, row, x, self.made[row])
        else:
            self.tape[index, row] = x, None

    def _top(self, index: int, after: list[Event]) -> list[Tensor | None]:
        """The head's turn: losses, and the first gradients."""
        losses: list[Tensor | None] = [None] * len(self.batches)
        for row in range(len(self.batches)):

            def work(row=row) -> Tensor:
                _, targets = self.batches[row]
                x, loss = self._run(index, row, self.flow[row], self.sums is not None, targets)
                if self.sums is not None:
                    dloss = torch.full_like(loss, self.shares[row] * self.loss_scale)
                    self.flow[row] = self.sums.add(index, x, loss, dloss)
                return loss.detach().double() * self.shares[row]

            if row in self.rows:
                losses[row] = self._compute(index, "head", row, 2 if self.sums is None else 6, after, work)
            self._exchange(index, row)
        self._end_of_backward(index)
        return losses

    def _end(self, index: int, after: list[Event], head: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.no_grad():
            work = [lambda x=x: head(x) for x in self.flow]
            return [self._compute(index, "logits", row, 2, after, work[row]) for row in range(len(work))]

    def _descend(self, index: int, after: list[Event]) -> None:
        """One layer's backward."""
        again = self.store.placement.recompute[index]
        for row in range(len(self.flow)):
            if row not in self.rows:
                self._exchange(index, row)
                continue
            away = (index, row) not in self.tape
            x, y = self.tape.pop((index, row), (None, None))  # frees the layer's saved activations
            ready = [*after, *self.sums.after()]
            if away:
                x, event = self.boundaries.take(index, row)
                ready.append(event)

            def work(row=row, x=x, y=y) -> None:
                if y is None:
                    x, y = self._run(index, row, x, True)
                self.flow[row] = self.sums.add(index, x, y, self.flow[row])

            self._compute(index, "backward", row, 6 if again else 4, ready, work)
            del x, y, work
            if away:
                self.boundaries.give_back(index, row, self.event)
            self._exchange(index, row)
        self._end_of_backward(index)

    def _exchange(self, index: int, row: int) -> None:
        if self.sums is not None:
            self.sums.exchange(index, self.first + row, self.event if row in self.rows else None)

    def _end_of_backward(self, index: int) -> None:
        if self.sums is None:
            return
        if self.last:
            self.sums.finish(index)
        else:
            self.sums.park(index, self.event)

    def _run(self, index: int, row: int, x: Tensor, training: bool, *targets: Tensor) -> tuple[Tensor, Tensor]:
        """(layer `index`'s input as a leaf, its output), with a graph where training."""
        beside = targets if self.pasts is None else (self.pasts[index],)
        with torch.set_grad_enabled(training), self._drawing(index, row):
            x = x.detach()
            if training and x.is_floating_point():
                x.requires_grad_()
            return x, self.store.layers[index].module(x, *beside)

    @contextlib.contextmanager
    def _drawing(self, index: int, row: int) -> Iterator[None]:
        """Random numbers that modules draw in here depend on seed, step, micro-batch and layer alone."""
        if self.draws is None:
            yield
            return
        (seed, step), world = self.draws, self.store.world
        device, number = self.store.device, (self.first + row) * world.count + world.rank
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            key = np.random.SeedSequence((seed, step, number, index)).generate_state(1, np.uint64)
            torch.manual_seed(int(key[0]))
            yield

    def _compute(self, index: int, what: str, row: int, passes: int, after: list[Event], work):
        """`passes` times the layer's parameters times the tokens is its arithmetic; a lookup does none."""
        multiplied = self.store.plans[index].reads.parameters if index else 0
        flops = passes * multiplied * self.batches[row][0].numel()
        result, self.event = self.lanes.compute(f"{self.store.layers[index].name} {what}", work, after, flops)
        return result


def _shares(visits: Sequence[Sequence[Batch | None]], samples: int | None = None) -> list[list[float]]:
    """Each micro-batch's share of all samples: means of means weighted so that every sample counts the same."""
    sizes = [[0 if batch is None else len(batch[0]) for batch in visit] for visit in visits]
    total = samples or sum(map(sum, sizes))
    return [[size / total for size in visit] for visit in sizes]
