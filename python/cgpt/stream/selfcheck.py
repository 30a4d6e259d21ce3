"""The proof at the start of a run that what is streamed is what is computed with, and what is updated.

    two steps of a few layers, streamed as the run's placement says      ==      the same two steps in memory

bit for bit: losses, norms, masters and moments, which must have moved. Of several ranks each has a micro-batch of the
former and its part of what comes of all, and does the latter by itself, with all micro-batches. The layers are the
first, the first block and the first of each further kind of place, and the last; the second step computes with what the
first one updated. A copy that does nothing, a stale copy, an update that is lost or a shard that went astray stops the
run here instead of letting it learn nothing.

Both runs have memory of their own, one after the other, and the store's modules, whose parameters then get back what
they had; the store is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.init import init_parameter
from cgpt.stream.build import layers_of
from cgpt.stream.executor import Batch, Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.record import Part
from cgpt.stream.store import Layer, Store
from cgpt.world import World

STEPS, LR = 2, 1e-3
SAMPLE = 16  # tokens

Outcome = tuple[list, dict[str, tuple[Part, Tensor]]]  # losses and norms; masters and moments, and which part they are


def check(store: Store, batch: Batch) -> None:
    """Raises InputError where a few of `store`'s layers, streamed, do not learn what they learn in memory.

    batch: one micro-batch, no larger than those of the run; a single sample is enough. Not within a step.
    """
    place, picked = store.placement, picked_layers(store.placement)
    layers = [store.layers[i] for i in picked]
    disk = f"{store.disk.path}.check" if store.disk is not None else None
    streamed = _picked(place, picked)
    before = [(p, p.data) for layer in layers for p in layer.parameters.values()]
    try:

        def initial(name: str, tensor: Tensor) -> None:
            tensor.copy_(store.read(name))

        kind = store.format, str(store.device), layers
        got = _train(*kind, streamed, [batch], disk, initial)
        want = _train(*kind, Placement.resident(len(layers)), [batch], None, initial)
    finally:
        for parameter, data in before:
            parameter.data = data
    _compare(got, want, {name: store.read(name) for layer in layers for name in layer.parameters})


def check_machine(
    format: Format, device: str, placement: Placement, disk: str | None, world: World | None = None
) -> None:
    """`check` before anything large is allocated: of a small GPT whose layers live as those of `placement`, on this
    machine's lanes, memory and disk, and what joins it to the other ranks of `world`, which all call it. Milliseconds,
    and no memory to speak of."""
    picked = picked_layers(placement)
    shape = GPTConfig(
        n_layer=len(picked) - 2, n_head=2, d_model=64, d_head=32, d_ff=256, vocab_size=256, seq_len=SAMPLE
    )
    with torch.device("meta"):
        layers = layers_of(GPT(shape))
    between = -(-SAMPLE * shape.d_model * 4 // 128) * 128
    streamed = replace(_picked(placement, picked), boundary=between, micro_batches=1, visits=1)
    rows = [torch.arange(i, SAMPLE + 1 + i).unsqueeze(0).to(device) % 256 for i in range(placement.ranks)]
    batches = [(ids[:, :-1], ids[:, 1:]) for ids in rows]

    def initial(name: str, tensor: Tensor) -> None:
        init_parameter(name, tensor, shape, 0)

    start = {}
    for layer in layers:
        for name, parameter in layer.parameters.items():
            start[name] = torch.empty(parameter.shape)
            initial(name, start[name])
    got = _train(format, device, layers, streamed, batches, disk, initial, world)
    want = _train(format, device, layers, Placement.resident(len(layers)), batches, None, initial)
    _compare(got, want, start, "streaming" if placement.ranks == 1 else f"{placement.ranks} ranks")


def picked_layers(placement: Placement) -> list[int]:
    """The first layer, the first block, one of each further kind of place but at least two, and the last layer."""
    blocks = range(1, len(placement.state) - 1)
    kinds = [(placement.weights[i], placement.state[i], placement.recompute[i]) for i in blocks]
    first = [i for i, kind in zip(blocks, kinds, strict=True) if kind not in kinds[: i - 1]]
    chosen = sorted({*first, *blocks[:2]})
    return [0, *chosen, len(placement.state) - 1]


def _picked(place: Placement, picked: list[int]) -> Placement:
    """The places of some layers."""
    return replace(
        place,
        weights=tuple(place.weights[i] for i in picked),
        state=tuple(place.state[i] for i in picked),
        recompute=tuple(place.recompute[i] for i in picked),
        aside=None,
    )


def _train(
    format: Format,
    device: str,
    layers: Sequence[Layer],
    placement: Placement,
    batches: list[Batch],
    disk: str | None,
    initial: Callable[[str, Tensor], None],
    world: World | None = None,
) -> Outcome:
    """What comes of STEPS steps from `initial` masters and moments of zero, each of all `batches`."""
    twin, world = None, world or World()
    mine, samples = batches[world.rank :: world.count], sum(len(ids) for ids, _ in batches)
    try:
        twin = Store(layers, format, device, placement=placement, disk=disk, world=world)
        twin.initialise(initial)
        executor, optimizer = Executor(twin, seed=0), AdamW(twin)
        optimizer.loss_scale = 1.0  # what overflows is skipped, and would prove nothing
        rows = []
        for _ in range(STEPS):
            found = executor.gradients([mine], optimizer.loss_scale, micro_batches=len(batches), samples=samples)
            rows.append((found.loss, found.norm, optimizer.step(found, LR)))
        twin.settle()
        values = {}
        for index in range(len(layers)):
            with twin.record(index) as record:
                for name, part in record.parts.items():
                    values[name] = part, record.master(name)
                    for kind in ("exp_avg", "exp_avg_sq"):
                        values[f"{kind} of {name}"] = part, record.view(kind, name).to("cpu", torch.float32, copy=True)
        return rows, values
    finally:
        if twin is not None:
            twin.lanes.close()
            if twin.disk is not None:
                twin.disk.close()


def _compare(got: Outcome, want: Outcome, start: dict[str, Tensor], what: str = "streaming") -> None:
    """start: masters as they were. `want` is of whole parameters."""
    fault = None
    for i, (here, there) in enumerate(zip(got[0], want[0], strict=True)):
        if not there[2] or here != there:
            fault = fault or f"step {i + 1}: loss and gradient norm {here[:2]}, in memory {there[:2]}"
    for name, (part, value) in got[1].items():
        if not torch.equal(value, part.cut(want[1][name][1])):
            fault = fault or f"{name} differs"
    if all(torch.equal(value, want[1][name][1]) for name, value in start.items()):
        fault = fault or "no weight has moved"
    if fault:
        raise InputError(f"self-check: wanted {what} to give the bits of a model in memory, got {fault}")
