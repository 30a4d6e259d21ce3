"""The one forward and the one backward: a walk over the layers that takes each layer's weights once a direction.

    forward    embed, h.0, ..., h.(L-1)      the head's visit is forward and backward at once
    backward   head, h.(L-1), ..., embed

Every visit brings its layer by `gather`, one layer ahead of the arithmetic, `get`s it and `release`s it; where the
weights come from is the store's business. A layer handles all micro-batches of the step before the next layer's
turn, so a step of any number of them moves every weight twice. Between layers the activations are detached: each
layer's gradient is one torch.autograd.grad over its own graph.

Gradients: a single contribution is used as it comes; several (micro-batches, or the tied wte read by embedding and
head) are summed in fp32 in a fixed order, and sum to the gradient of the mean over all samples. Losses are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.stream.store import Layer, Store
from cgpt_ext import grad_norm

Batch = tuple[Tensor, Tensor]  # ids and targets, both (B, T) int64


@dataclass
class Gradients:
    """One step's gradients, times the loss scale it was asked with.

    loss: mean over all samples, not scaled.
    by_name: parameter name -> gradient, fp32 or the working dtype.
    norm: global L2 norm, the square root of the layers' squared norms summed in layer order in double.
    """

    loss: float
    by_name: dict[str, Tensor]
    norm: float


class Executor:
    """Walks the store's layers. One instance serves training and evaluation."""

    def __init__(self, store: Store):
        self.store = store

    def loss(self, batches: Sequence[Batch]) -> float:
        """Mean loss over `batches`, forward only and without a graph."""
        return self._walk(batches, None)[0]

    def gradients(self, batches: Sequence[Batch], loss_scale: float = 1.0) -> Gradients:
        """Loss, gradients and their norm over the micro-batches `batches`, which may differ in size."""
        loss, by_name, norms = self._walk(batches, loss_scale)
        norm = torch.stack(norms).double().square().sum().sqrt().item()
        return Gradients(loss, by_name, norm)

    def _walk(self, batches: Sequence[Batch], loss_scale: float | None):
        training = loss_scale is not None
        total = sum(len(ids) for ids, _ in batches)
        shares = [len(ids) / total for ids, _ in batches]
        head = len(self.store.layers) - 1
        visits = self._visits([*range(head + 1), *(reversed(range(head)) if training else ())])

        flow = [ids for ids, _ in batches]  # activations on the way up, their gradients on the way down
        tape: list[list[tuple[Tensor, Tensor]]] = []
        for index, layer in visits:
            if index == head:
                break
            tape.append([])
            for i, x in enumerate(flow):
                x, y = _forward(layer, x, training)
                flow[i] = y.detach()
                if training:
                    tape[index].append((x, y))

        losses, gradients, norms = [], _Sums(), []
        for i, (_, targets) in enumerate(batches):
            x, loss = _forward(layer, flow[i], training, targets)
            losses.append(loss.detach())
            if training:
                flow[i] = gradients.add(layer, x, loss, loss.new_tensor(shares[i] * loss_scale))
            del x, loss
        loss = sum(share * loss.double() for share, loss in zip(shares, losses, strict=True)).item()
        if not training:
            next(visits, None)
            return loss, {}, []
        norms.append(self._norm(head, gradients))
        for index, layer in visits:
            for i, (x, y) in enumerate(tape[index]):
                tape[index][i] = None
                flow[i] = gradients.add(layer, x, y, flow[i])
                del x, y
            norms.append(self._norm(index, gradients))
        return loss, gradients.by_name, norms[::-1]

    def _visits(self, order: list[int]) -> Iterator[tuple[int, Layer]]:
        self.store.gather(order[0])
        for here, ahead in zip(order, [*order[1:], None], strict=True):
            if ahead is not None:
                self.store.gather(ahead)
            yield here, self.store.get(here)
            self.store.release(here)

    def _norm(self, index: int, gradients: _Sums) -> Tensor:
        """L2 norm of what layer `index` owns, fp32 scalar; the layers that share it have been visited."""
        names = [name for name in self.store.owned[index] if name in gradients.by_name]
        if not names:
            return torch.zeros((), device=self.store.device)
        return grad_norm([gradients.by_name[name] for name in names])


def _forward(layer: Layer, x: Tensor, training: bool, *targets: Tensor) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(training):
        x = x.detach()
        if training and x.is_floating_point():
            x.requires_grad_()
        return x, layer.module(x, *targets)


class _Sums:
    """Gradients by parameter name, contributions added in the order they come."""

    def __init__(self):
        self.by_name: dict[str, Tensor] = {}
        self._summed: set[str] = set()

    def add(self, layer: Layer, x: Tensor, y: Tensor, dy: Tensor) -> Tensor | None:
        """Differentiates one micro-batch's `y`; returns the gradient of `x`, None for token ids."""
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad(y, [*inputs, *layer.parameters.values()], dy, allow_unused=True)
        for name, gradient in zip(layer.parameters, found[len(inputs) :], strict=True):
            if gradient is not None:
                self._contribute(name, gradient)
        return found[0] if inputs else None

    def _contribute(self, name: str, gradient: Tensor) -> None:
        if name not in self.by_name:
            self.by_name[name] = gradient.contiguous()
        elif name in self._summed:
            self.by_name[name].add_(gradient)
        else:
            self.by_name[name] = self.by_name[name].to(torch.float32, copy=True).add_(gradient)
            self._summed.add(name)
