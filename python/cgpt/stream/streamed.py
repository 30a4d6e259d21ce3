"""Anyone's model, trained by weight streaming: an embedding, a list of blocks and a head, as plain torch modules.

    embed(ids) -> x,    block(x) -> x for each of them,    head(x, targets) -> mean loss

    trainer = Streamed(embed, blocks, head, device="cuda", placement=...)
    for batches in data:
        result = trainer.step(batches, lr=3e-4)

It trains as cgpt's own trainer does: masters and moments in fp32, bf16 on the wire, the exact global-norm clip, AdamW
on the host just ahead of the next step. Layers are run by gather, get and release; activations are made again in
backward. Random numbers that a module draws (dropout) are a function of seed, step, micro-batch and layer, so the
second forward draws what the first drew, and a run that is resumed draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cgpt.errors import InputError
from cgpt.stream.devices import Device
from cgpt.stream.executor import Batch, Executor
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.store import Layer, Store


@dataclass(frozen=True)
class Step:
    """What a step came to.

    loss: mean over all samples, nats per token. grad_norm: before clipping. applied: False where it was not finite
    and the whole step was skipped.
    """

    loss: float
    grad_norm: float
    applied: bool


class Streamed:
    """A model whose weights stream through the device.

    Args:
        embed: token ids (B, T) to activations. blocks: activations to activations, of one shape. head: (activations,
            targets) to a scalar loss, the mean over the samples. A parameter that several of them hold (a tied
            embedding) is one parameter. Their parameters' values are taken over as they are; modules on the meta
            device start at zero until `load`.
        precision: "bf16", "fp16" or "fp32", of weights and activations.
        device: "cpu", "cuda", or a Device. placement: where everything lives (default: all on the device). disk: the
            file for what lives on the disk.
        beta1, beta2, eps, weight_decay, clip: AdamW's; vectors are not decayed; a clip of 0 is none.
        seed: of the random numbers that modules draw.

    Raises InputError for memory that is not there and for parts that are no modules.
    """

    def __init__(
        self,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        *,
        precision: str = "bf16",
        device: str | Device = "cpu",
        placement: Placement | None = None,
        disk: str | None = None,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        seed: int = 0,
    ):
        layers = split_layers(embed, blocks, head)
        given = {name: p.detach().float() for layer in layers for name, p in layer.parameters.items() if not p.is_meta}
        self.store = Store(layers, precision, device, placement=placement, disk=disk)
        for index, names in enumerate(self.store.owned):
            with self.store.record(index, writing=True) as record:
                for name in names:
                    if name in given:
                        record.set_master(name, given.pop(name).cpu())
        self.executor = Executor(self.store, seed=seed)
        self.optimizer = AdamW(self.store, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, clip=clip)

    def step(self, batches: Sequence[Batch], lr: float) -> Step:
        """One optimizer step over micro-batches of (ids, targets), as many to a visit as the placement has room for."""
        if not batches:
            raise InputError("Streamed.step: wanted at least one micro-batch, got none")
        size = self.store.placement.micro_batches
        visits = [batches[start : start + size] for start in range(0, len(batches), size)]
        scale = self.optimizer.loss_scale
        found = self.executor.gradients(visits, scale)
        applied = self.optimizer.step(found, lr)
        return Step(found.loss, found.norm / scale, applied)

    def loss(self, batches: Sequence[Batch]) -> float:
        """Mean loss over the samples, without gradients."""
        return self.executor.loss(batches)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> exact fp32 master, on the CPU."""
        return {name: self.store.read(name) for name in self.store.names()}

    def load(self, values: Callable[[str], Tensor]) -> None:
        """Sets every parameter to `values(name)`, fp32 in its shape, one at a time; moments become zero."""
        self.store.initialise(lambda name, tensor: tensor.copy_(values(name)))

    def close(self) -> None:
        """Ends what is on its way, and the lanes' threads."""
        self.store.lanes.close()

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def split_layers(embed: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> list[Layer]:
    """The stops of the walk: "embed", "blocks.0", ..., "head", parameters named by the first that holds them."""
    parts = [("embed", embed), *((f"blocks.{i}", block) for i, block in enumerate(blocks)), ("head", head)]
    names: dict[int, str] = {}
    layers = []
    for name, part in parts:
        if not isinstance(part, nn.Module):
            raise InputError(f"Streamed: {name} must be a torch.nn.Module, got {type(part).__name__}")
        own = {}
        for key, parameter in part.named_parameters():
            own[names.setdefault(id(parameter), f"{name}.{key}")] = parameter
        layers.append(Layer(name, part, own))
    return layers
