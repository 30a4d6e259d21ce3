"""The one forward and the one backward: a walk over the layers that takes each layer's weights once a direction.

    up      embed, h.0, ..., h.(L-1)      the head's turn is forward and backward at once
    down    head, h.(L-1), ..., embed

Each turn brings its layer by `gather`, one layer ahead of the arithmetic, `get`s it and `release`s it; where the
weights come from is the store's business. A layer handles all micro-batches of a visit before the next layer's turn,
so a visit moves every weight twice however many they are. Between layers the activations are detached: a layer's
gradient is one torch.autograd.grad over its own graph, kept from the way up.

Gradients: a single contribution is used as it comes; several (micro-batches, or the tied wte read by embedding and
head) are summed in fp32, each reader's in the order of the micro-batches, then the readers' from the head down. So
the bits do not depend on how micro-batches are grouped into visits. Losses are fp32, their mean double.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.stream.store import Layer, Store
from cgpt_ext import grad_norm

Batch = tuple[Tensor, Tensor]  # one micro-batch: ids and targets, both (B, T) int64


@dataclass
class Gradients:
    """One step's gradients, times the loss scale it was asked with.

    loss: mean over all samples in nats per token, not scaled.
    by_name: parameter name -> gradient, fp32 or the working dtype.
    norm: global L2 norm: the layers' norms, squared and summed in layer order in double.
    """

    loss: float
    by_name: dict[str, Tensor]
    norm: float


class Executor:
    """Walks the store's layers, for training and for evaluation."""

    def __init__(self, store: Store):
        self.store = store

    def loss(self, batches: Sequence[Batch]) -> float:
        """Mean loss over the samples of `batches`, forward only and without a graph."""
        return sum(self._walk(batches, _shares([batches])[0])).item()

    def gradients(self, visits: Sequence[Sequence[Batch]], loss_scale: float = 1.0) -> Gradients:
        """Loss, gradients and their norm over all micro-batches of all visits; they may differ in size.

        A visit holds the activations of its micro-batches at once: several visits bound that memory, several
        micro-batches a visit save weight traffic.
        """
        sums, losses = _Sums(self.store), []
        for left, visit, shares in zip(reversed(range(len(visits))), visits, _shares(visits), strict=True):
            losses += self._walk(visit, shares, sums, loss_scale, last=left == 0)
        norm = torch.stack(sums.norms[::-1]).double().square().sum().sqrt()
        return Gradients(sum(losses).item(), sums.by_name, norm.item())

    def _walk(
        self,
        batches: Sequence[Batch],
        shares: list[float],
        sums: _Sums | None = None,
        loss_scale: float = 1.0,
        last: bool = True,
    ) -> list[Tensor]:
        """One visit; returns each micro-batch's loss times its share of the step's samples, double."""
        head = len(self.store.layers) - 1
        turns = self._turns([*range(head + 1), *(reversed(range(head)) if sums else ())])
        flow = [ids for ids, _ in batches]  # activations on the way up, their gradients on the way down
        tape: list[list] = [[] for _ in range(head)]
        losses = []
        for index, layer in turns:
            if index == head:
                break
            for i, x in enumerate(flow):
                x, y = _forward(layer, x, sums is not None)
                flow[i] = y.detach()
                if sums:
                    tape[index].append((x, y))
        for i, (_, targets) in enumerate(batches):
            x, loss = _forward(layer, flow[i], sums is not None, targets)
            losses.append(loss.detach().double() * shares[i])
            if sums:
                flow[i] = sums.add(head, x, loss, torch.full_like(loss, shares[i] * loss_scale))
        if sums and last:
            sums.finish(head)
        for index, _ in turns:
            for i in range(len(flow)):
                flow[i] = sums.add(index, *tape[index][i], flow[i])
                tape[index][i] = None  # frees the layer's saved activations
            if last:
                sums.finish(index)
        return losses

    def _turns(self, order: list[int]) -> Iterator[tuple[int, Layer]]:
        self.store.gather(order[0])
        for here, ahead in zip(order, [*order[1:], None], strict=True):
            if ahead is not None:
                self.store.gather(ahead)
            yield here, self.store.get(here)
            self.store.release(here)


class _Sums:
    """Gradients as they are produced: by reader and parameter while micro-batches come, by parameter when done."""

    def __init__(self, store: Store):
        self.by_name: dict[str, Tensor] = {}
        self.norms: list[Tensor] = []
        self._store = store
        self._parts: dict[tuple[int, str], Tensor] = {}
        self._summed: set[tuple[int, str]] = set()

    def add(self, index: int, x: Tensor, y: Tensor, dy: Tensor) -> Tensor | None:
        """Differentiates one micro-batch through layer `index`; returns the gradient of x, None for token ids."""
        parameters = self._store.layers[index].parameters
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad(y, [*inputs, *parameters.values()], dy, allow_unused=True)
        for name, gradient in zip(parameters, found[len(inputs) :], strict=True):
            key = index, name
            if gradient is None:
                continue
            if key not in self._parts:
                self._parts[key] = gradient.contiguous()
            elif key in self._summed:
                self._parts[key].add_(gradient)
            else:
                self._parts[key] = self._parts[key].to(torch.float32, copy=True).add_(gradient)
                self._summed.add(key)
        return found[0] if inputs else None

    def finish(self, index: int) -> None:
        """What layer `index` owns is complete: its readers lie above it and have had their turn."""
        mine = []
        for name in self._store.owned[index]:
            readers = [i for i in reversed(range(len(self._store.layers))) if (i, name) in self._parts]
            parts = [self._parts.pop((reader, name)) for reader in readers]
            if len(parts) > 1:
                parts[0] = parts[0].to(torch.float32)
            for part in parts[1:]:
                parts[0] = parts[0].add_(part)
            if parts:
                self.by_name[name] = parts[0]
                mine.append(parts[0])
        self.norms.append(grad_norm(mine) if mine else torch.zeros((), device=self._store.device))


def _forward(layer: Layer, x: Tensor, training: bool, *targets: Tensor) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(training):
        x = x.detach()
        if training and x.is_floating_point():
            x.requires_grad_()
        return x, layer.module(x, *targets)


def _shares(visits: Sequence[Sequence[Batch]]) -> list[list[float]]:
    """Each micro-batch's share of all samples: means of means weighted so that every sample counts the same."""
    total = sum(len(ids) for visit in visits for ids, _ in visit)
    return [[len(ids) / total for ids, _ in visit] for visit in visits]
