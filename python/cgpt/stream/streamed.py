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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cgpt import checkpoint
from cgpt.errors import InputError
from cgpt.stream.devices import Device
from cgpt.stream.executor import Batch, Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.selfcheck import check
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
            device start at zero until `load`. Every parameter is trained; modules stay in train or eval mode as they
            are, and must not keep statistics from one forward to the next.
        precision: "bf16", "fp16" or "fp32", of weights and activations. moments: AdamW's, "fp32", or "bf16" rounded at
            random: 4 bytes a parameter less.
        device: "cpu", "cuda", or a Device. placement: where everything lives (default: all on the device). disk: the
            file for what lives on the disk.
        beta1, beta2, eps, weight_decay, clip: AdamW's; vectors are not decayed; a clip of 0 is none.
        seed: of the random numbers that modules draw, and of the rounding of bf16 moments.
        sample: token ids as large as the largest micro-batch, values aside; asked for where activations wait on the
            host and placement.boundary is 0, for the embedding is tried on it to find that size.
        selfcheck: whether the first step, where anything is streamed, first proves on a few layers that streaming
            gives the bits of a model in memory (selfcheck.py).

    Raises InputError for memory that is not there and for parts that cannot be streamed, by name.
    """

    def __init__(
        self,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        *,
        precision: str = "bf16",
        moments: str = "fp32",
        device: str | Device = "cpu",
        placement: Placement | None = None,
        disk: str | None = None,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        seed: int = 0,
        sample: Tensor | None = None,
        selfcheck: bool = True,
    ):
        format = Format(precision, moments)
        layers = split_layers(embed, blocks, head)
        placement = placement or Placement.resident(len(layers))
        if len(placement.state) != len(layers):
            raise InputError(f"Streamed: wanted a placement of {len(layers)} layers, got one of {len(placement.state)}")
        if placement.activations == "host" and not placement.boundary:
            placement = replace(placement, boundary=_boundary(embed, sample, format))
        given = {name: p.detach() for layer in layers for name, p in layer.parameters.items() if not p.is_meta}
        self.store = Store(layers, format, device, placement=placement, disk=disk)
        for index, names in enumerate(self.store.owned):
            with self.store.record(index, writing=True) as record:
                for name in names:
                    if name in given:
                        record.set_master(name, given.pop(name).to("cpu", torch.float32))
        for layer in layers:
            _move_buffers(layer.module, self.store.device)
        self._unchecked = selfcheck and placement != Placement.resident(len(layers))
        self.executor = Executor(self.store, seed=seed)
        self.optimizer = AdamW(
            self.store, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, clip=clip, seed=seed
        )

    def step(self, batches: Sequence[Batch], lr: float) -> Step:
        """One optimizer step over micro-batches of (ids, targets), as many to a visit as the placement has room for."""
        batches = self._on_device("step", batches)
        place = self.store.placement
        visits = [batches[start : start + place.micro_batches] for start in range(0, len(batches), place.micro_batches)]
        if len(visits) > place.visits and any(home != "device" for home in place.state):
            raise InputError(
                f"Streamed.step: wanted at most {place.micro_batches * place.visits} micro-batches "
                f"(the placement's micro_batches times visits), got {len(batches)}"
            )
        if self._unchecked:
            ids, targets = batches[0]
            check(self.store, (ids[:1], targets[:1]))
            self._unchecked = False
        scale = self.optimizer.loss_scale
        found = self.executor.gradients(visits, scale)
        applied = self.optimizer.step(found, lr)
        return Step(found.loss, found.norm / scale, applied)

    def loss(self, batches: Sequence[Batch]) -> float:
        """Mean loss over the samples, without gradients."""
        return self.executor.loss(self._on_device("loss", batches))

    def save(self, folder: str | Path, keep: int = 2) -> Path:
        """Writes `folder`/step-N, whole or not at all, and removes all but the newest `keep`; returns its path."""
        state = {"optimizer": self.optimizer.state(), "draws": [self.executor.seed, self.executor.step]}
        return checkpoint.save(Path(folder), self.store, self.executor.step, state, keep)

    def resume(self, folder: str | Path) -> int:
        """Goes on bit for bit from the newest whole checkpoint in `folder`; returns the steps taken until then.

        Raises InputError where there is none, or one of another model.
        """
        path, manifest, _ = checkpoint.newest(Path(folder))
        wanted = {f"{layer.name}.safetensors" for layer in self.store.layers}
        if set(manifest["files"]) != wanted or "draws" not in manifest:
            raise InputError(f"{path}: wanted a checkpoint of these {len(wanted)} layers, got another model's")
        checkpoint.load(path, self.store, manifest)
        self.optimizer.load_state(manifest["optimizer"])
        self.executor.seed, self.executor.step = manifest["draws"]
        return self.executor.step

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> exact fp32 master, on the CPU."""
        return {name: self.store.read(name) for name in self.store.names()}

    def load(self, values: Callable[[str], Tensor]) -> None:
        """Sets every parameter to `values(name)`, fp32 in its shape, one at a time; moments become zero."""
        self.store.initialise(lambda name, tensor: tensor.copy_(values(name)))

    def close(self) -> None:
        """Ends what is on its way, and the lanes' threads."""
        self.store.lanes.close()

    def _on_device(self, call: str, batches: Sequence[Batch]) -> list[Batch]:
        """The batches where the arithmetic is, once they are what they must be."""
        if not batches:
            raise InputError(f"Streamed.{call}: wanted at least one micro-batch, got none")
        for i, batch in enumerate(batches):
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            if not pair or not all(isinstance(tensor, Tensor) for tensor in batch):
                raise InputError(f"Streamed.{call}: batches[{i}] must be a pair of tensors (ids, targets)")
            if batch[0].dim() == 0 or not batch[0].numel() or len(batch[0]) != len(batch[1]):
                shapes = [tuple(tensor.shape) for tensor in batch]
                raise InputError(f"Streamed.{call}: batches[{i}] must have as many ids as targets, got shapes {shapes}")
        return [(ids.to(self.store.device), targets.to(self.store.device)) for ids, targets in batches]

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
        for key, module in part.named_modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                raise InputError(f"Streamed: {name}.{key} keeps running statistics, which a second forward would spoil")
        for key, buffer in part.named_buffers():
            if buffer.is_meta:
                raise InputError(f"Streamed: {name}.{key} must have its values, got a buffer on the meta device")
        own = {}
        for key, parameter in part.named_parameters():
            if not parameter.requires_grad:
                raise InputError(f"Streamed: {name}.{key} must require a gradient, got a frozen parameter")
            own[names.setdefault(id(parameter), f"{name}.{key}")] = parameter
        layers.append(Layer(name, part, own))
    return layers


def _boundary(embed: nn.Module, sample: Tensor | None, format: Format) -> int:
    """Bytes of a micro-batch between two layers, from a trial of the embedding."""
    if sample is None:
        raise InputError("Streamed: activations on the host want placement.boundary, or a sample of token ids")
    where = next((parameter.device for parameter in embed.parameters()), sample.device)
    with torch.no_grad(), torch.random.fork_rng([where] if where.type == "cuda" else []):
        nbytes = embed(sample.to(where)).numel() * format.working
    return -(-nbytes // 128) * 128


def _move_buffers(part: nn.Module, device: torch.device) -> None:
    """Buffers stay on the device for good, in their own dtype."""
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
