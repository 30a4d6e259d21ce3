"""A step's gradients as they are produced: summed, rounded once, measured, and sent to where AdamW will want them.

    part    of one reader and parameter: its micro-batches' contributions in their order, in fp32 where there are
            several; the embedding and the head each have a part of the tied wte
    sum     the readers' parts from the head down, rounded to the working dtype
    norm    of a layer's sums, as soon as they are there: the global norm is known when backward ends

So the bits depend neither on how micro-batches are grouped into visits nor on where a layer lives. Between visits the
parts of a layer whose home is not on the device wait on the host and come down again with the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.stream.devices import Event
from cgpt.stream.record import parameter_view
from cgpt.stream.store import Store
from cgpt_ext import grad_norm

STRETCH = 1 << 22  # elements
IN_FLIGHT = 2  # layers whose gradients may be on their way up while the next are computed


@dataclass
class Gradients:
    """One step's gradients, times the loss scale it was asked with.

    loss: mean over all samples in nats per token, not scaled.
    by_name: parameter name -> gradient in the working dtype, on the device or the host, as its layer's home is; None
        where it waits on the disk, behind the layer's record.
    ready: layer -> the event behind which its gradients are there, for those on the host.
    norm: global L2 norm: the layers' norms, squared and summed in layer order in double.
    """

    loss: float
    by_name: dict[str, Tensor | None]
    ready: dict[int, Event]
    norm: float


class Sums:
    """Gradients of a step of `contributions` micro-batches."""

    def __init__(self, store: Store, contributions: int):
        self.by_name: dict[str, Tensor | None] = {}
        self.ready: dict[int, Event] = {}
        self._store, self._lanes = store, store.lanes
        self._several = contributions > 1
        self._norms: dict[int, Tensor] = {}
        self._parts: dict[tuple[int, str], Tensor] = {}
        self._parked: dict[int, tuple[list[str], Event]] = {}
        self._sent: list[Event] = []

    def after(self) -> list[Event]:
        """What a layer's backward must stand behind, so that gradients on their way up do not pile up."""
        return self._sent[-IN_FLIGHT:][:1] if len(self._sent) >= IN_FLIGHT else []

    def add(self, index: int, x: Tensor, y: Tensor, dy: Tensor) -> Tensor | None:
        """Differentiates one micro-batch through layer `index`; returns the gradient of x, None for token ids."""
        parameters = self._store.layers[index].parameters
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad(y, [*inputs, *parameters.values()], dy, allow_unused=True)
        for name, gradient in zip(parameters, found[len(inputs) :], strict=True):
            key = index, name
            if gradient is None:
                continue
            if key in self._parts:
                self._parts[key].add_(gradient)
            elif self._several:
                self._parts[key] = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            else:
                self._parts[key] = gradient.contiguous()
        return found[0] if inputs else None

    def fetch(self, index: int) -> list[Event]:
        """Starts bringing the parts of layer `index` that wait on the host; returns what to stand behind."""
        if index not in self._parked:
            return []
        names, sent = self._parked.pop(index)
        there = self._parts_on_host(index)
        here, event = self._lanes.compute(
            f"{self._name(index)} sums",
            lambda: {n: torch.empty(there[n].shape, device=self._store.device) for n in names},
        )
        self._parts |= {(index, name): part for name, part in here.items()}

        def work() -> None:
            for name, part in here.items():
                self._lanes.copy(part, there[name])

        nbytes = sum(part.nbytes for part in here.values())
        return [self._lanes.submit("down", f"{self._name(index)} sums", work, [event, sent], nbytes)]

    def park(self, index: int, event: Event) -> None:
        """Sends the parts of layer `index` up until its next visit, where its home is not on the device."""
        if self._store.placement.state[index] == "device":
            return
        names = [name for reader, name in self._parts if reader == index]
        parts = {name: self._parts.pop((index, name)) for name in names}
        there = self._parts_on_host(index)

        def work() -> None:
            for name in names:
                self._lanes.copy(there[name], parts.pop(name))

        self._parked[index] = names, self._send(index, work, event, sum(part.nbytes for part in parts.values()))

    def finish(self, index: int) -> None:
        """What layer `index` owns is complete: its readers lie above it and have had their turn."""
        store, layout = self._store, self._store.plans[index].owned
        mine, event = self._lanes.compute(f"{self._name(index)} norm", lambda: self._complete(index))
        if store.placement.state[index] == "device" or not mine:
            self.by_name |= mine
            return
        places = {name: i for i, name in enumerate(layout.names) if name in mine}
        nbytes = sum(gradient.nbytes for gradient in mine.values())

        def work(flat: Tensor) -> None:
            for name, i in places.items():
                self._lanes.copy(parameter_view(flat, layout, i), mine.pop(name))

        if store.gradients[index] is None:
            self.by_name |= dict.fromkeys(places)
            self.ready[index] = store.send_gradients(index, work, [event])
            self._sent.append(self.ready[index])
            return
        flat = store.gradients[index][: layout.size * store.dtype.itemsize].view(store.dtype)
        self.by_name |= {name: parameter_view(flat, layout, i) for name, i in places.items()}
        self.ready[index] = self._send(index, lambda: work(flat), event, nbytes)

    def norm(self) -> float:
        """The global norm, once every layer is finished."""
        norms = [self._norms[index] for index in sorted(self._norms)]
        return self._lanes.number(torch.stack(norms).double().square().sum().sqrt()) if norms else 0.0

    def _complete(self, index: int) -> dict[str, Tensor]:
        """Sums of what layer `index` owns, rounded; notes their norm."""
        mine = {}
        for name in self._store.plans[index].owned.names:
            readers = [i for i in reversed(range(len(self._store.layers))) if (i, name) in self._parts]
            parts = [self._parts.pop((reader, name)) for reader in readers]
            if not parts:
                continue
            mine[name] = _rounded_sum(parts, self._store.dtype)
        if mine:
            self._norms[index] = grad_norm(list(mine.values()))
        return mine

    def _send(self, index: int, work, event: Event, nbytes: int) -> Event:
        what = f"{self._name(index)} gradients"
        sent = self._lanes.submit("up", what, work, [event, *self._store.spent(index)], nbytes)
        self._sent.append(sent)
        return sent

    def _parts_on_host(self, index: int) -> dict[str, Tensor]:
        layout, flat = self._store.plans[index].reads, self._store.gradients[index].view(torch.float32)
        return {name: parameter_view(flat, layout, i) for i, name in enumerate(layout.names)}

    def _name(self, index: int) -> str:
        return self._store.layers[index].name


def _rounded_sum(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of the first part, the second and so on in fp32, rounded once; stretch by stretch into the first where
    its dtype allows, for an embedding's parts are the largest tensors of a step."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    total = parts[0] if parts[0].dtype == dtype else parts[0].new_empty(parts[0].shape, dtype=dtype)
    flat = [part.reshape(-1).split(STRETCH) for part in parts]
    for there, first, *rest in zip(total.view(-1).split(STRETCH), *flat, strict=True):
        stretch = first.to(torch.float32)
        for part in rest:
            stretch = stretch + part
        there.copy_(stretch)
    return total
