"""The single authority on parameters: every layer's working weights, master weights and AdamW moments.

A layer owns one flat buffer of each kind, parameters side by side: those with weight decay first, then the biases
and LayerNorm's (Cerebras-GPT section 2.2 leaves them undecayed), so that the optimizer sees two stretches a layer.

    precision  working weights       master                              bytes a parameter
    bf16       bf16, the high half   int16, the low half: split master   2 + 2 + 8 = 12
    fp16       fp16, rounded         fp32                                2 + 4 + 8 = 14
    fp32       fp32, the master      none                                4 + 8     = 12

exp_avg and exp_avg_sq are fp32. The modules' parameters are views of the working buffer, never copies. A parameter
that two layers read (the tied wte: embedding and head) belongs to the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.stream.placement import Placement
from cgpt_ext import join_master, split_master

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("exp_avg", "exp_avg_sq")

ALIGNMENT = 32  # elements: every parameter starts on a cache line in each buffer, int16 ones included


@dataclass(frozen=True)
class Layer:
    """One stop of the walk.

    module: what runs. The first layer takes token ids (B, T) to activations, the last (activations, targets) to a
        scalar loss, those between activations to activations.
    parameters: every parameter the module reads, by its full name; of two layers that read one, the first owns it.
    """

    name: str
    module: Callable
    parameters: dict[str, nn.Parameter]


def layers_of(model: GPT) -> list[Layer]:
    """embed, h.0, ..., head: the stops of a GPT, with its parameters under Hugging Face GPT-2's names."""

    def reads(*prefixes: str) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)}

    blocks = [Layer(f"h.{i}", block, reads(f"h.{i}.")) for i, block in enumerate(model.h)]
    head = Layer("head", model.head, reads("ln_f.") | reads("wte."))
    return [Layer("embed", model.embed, reads("wte.", "wpe.")), *blocks, head]


def check_device(device: str) -> None:
    """Raises InputError where torch finds no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: wanted cuda, got a machine where torch {torch.__version__} finds no CUDA device")


def build(shape: GPTConfig, precision: str, device: str, *, training: bool = True) -> tuple[GPT, Store]:
    """A GPT with its parameters in a store, all zero. Raises InputError where there is no such device."""
    check_device(device)
    with torch.device("meta"):
        model = GPT(shape)
    return model, Store(layers_of(model), precision, device, training=training)


@dataclass
class Group:
    """What AdamW is given at once: one layer's decayed or undecayed parameters, as parallel lists of views."""

    decayed: bool
    names: list[str] = field(default_factory=list)
    working: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] | None = None
    masters: list[Tensor] | None = None
    exp_avg: list[Tensor] = field(default_factory=list)
    exp_avg_sq: list[Tensor] = field(default_factory=list)


class Store:
    """Holds `layers`' parameters in `precision` on `device`, with masters and moments when `training`.

    The modules may have been built on the meta device: their parameters become views of the store's buffers, zero
    until `write` or a checkpoint fills them. Raises InputError for an unknown precision.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        precision: str = "bf16",
        device: str | torch.device = "cpu",
        *,
        training: bool = True,
        placement: Placement | None = None,
    ):
        if precision not in DTYPES:
            raise InputError(f"precision must be one of {', '.join(DTYPES)}, got {precision}")
        self.layers = list(layers)
        self.precision = precision
        self.device = torch.device(device)
        self.training = training
        self.placement = placement or Placement.resident(len(self.layers))
        self.owned: list[list[str]] = []  # layer -> names of its own parameters, decayed first
        self.groups: list[tuple[Group, Group]] = []  # layer -> (decayed, undecayed)
        self._slots: dict[str, tuple[Group, int]] = {}
        self._buffers: list[Tensor] = []
        for layer in self.layers:
            self._adopt(layer)

    def gather(self, index: int) -> None:
        """Starts bringing layer `index` to the device. Resident: it is there."""

    def get(self, index: int) -> Layer:
        """Layer `index`, ready to compute with, once `gather` has brought it."""
        return self.layers[index]

    def release(self, index: int) -> None:
        """Gives back the device memory that `gather` took. Resident: it took none."""

    def names(self) -> list[str]:
        """Every parameter's name, in layer order."""
        return [name for names in self.owned for name in names]

    def shape(self, name: str) -> torch.Size:
        group, i = self._slots[name]
        return group.working[i].shape

    @property
    def n_parameters(self) -> int:
        return sum(self.shape(name).numel() for name in self.names())

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers, alignment included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    def read(self, name: str) -> Tensor:
        """The exact fp32 master of a parameter, as a tensor of its own on the CPU."""
        group, i = self._slots[name]
        if group.lows is not None:
            return join_master(group.working[i], group.lows[i]).cpu()
        source = group.working[i] if group.masters is None else group.masters[i]
        return source.detach().to("cpu", torch.float32, copy=True)

    def write(self, name: str, value: Tensor) -> None:
        """Sets a parameter's master to `value` (fp32, its shape) and its working weights to the rounded value.

        bf16 rounds ties away from zero (the split master's high half), with and without masters, so that training,
        evaluation and generation compute with the same bits.
        """
        group, i = self._slots[name]
        if value.shape != group.working[i].shape or value.dtype != torch.float32:
            wanted = tuple(group.working[i].shape)
            raise InputError(f"{name}: wanted float32 {wanted}, got {value.dtype} {tuple(value.shape)}")
        with torch.no_grad():
            if self.precision == "bf16":
                high, low = split_master(value.contiguous())
                group.working[i].copy_(high)
                if group.lows is not None:
                    group.lows[i].copy_(low)
                return
            group.working[i].copy_(value)
            if group.masters is not None:
                group.masters[i].copy_(value)

    def initialise(self, initial: Callable[[str, Tensor], None]) -> None:
        """Sets every parameter to what `initial(name, tensor)` writes into an fp32 tensor of its shape."""
        for name in self.names():
            value = torch.empty(self.shape(name))
            initial(name, value)
            self.write(name, value)

    def moment(self, kind: str, name: str) -> Tensor:
        """The fp32 view of `exp_avg` or `exp_avg_sq` that belongs to a parameter."""
        group, i = self._slots[name]
        return getattr(group, kind)[i]

    def _adopt(self, layer: Layer) -> None:
        groups = Group(decayed=True), Group(decayed=False)
        new = {name: parameter for name, parameter in layer.parameters.items() if name not in self._slots}
        for name, parameter in new.items():
            groups[parameter.dim() < 2].names.append(name)
        names = groups[0].names + groups[1].names
        starts, size = {}, 0
        for name in names:
            starts[name] = size
            size += -(-new[name].numel() // ALIGNMENT) * ALIGNMENT

        def views(dtype: torch.dtype, group: Group) -> list[Tensor]:
            """One buffer a layer and kind: made for the first group, shared by the second."""
            if group.decayed:
                self._buffers.append(torch.zeros(size, dtype=dtype, device=self.device))
            flat = self._buffers[-1]
            return [flat[starts[n] : starts[n] + new[n].numel()].view(new[n].shape) for n in group.names]

        def fill(attribute: str, dtype: torch.dtype) -> None:
            for group in groups:
                setattr(group, attribute, views(dtype, group))

        fill("working", DTYPES[self.precision])
        if self.training:
            if self.precision == "bf16":
                fill("lows", torch.int16)
            if self.precision == "fp16":
                fill("masters", torch.float32)
            for kind in KINDS:
                fill(kind, torch.float32)
        for group in groups:
            for i, name in enumerate(group.names):
                self._slots[name] = group, i
                parameter = nn.Parameter(group.working[i], requires_grad=self.training)
                torch.utils.swap_tensors(new[name], parameter)  # keeps the object, so ties hold
                group.working[i] = new[name]
        self.owned.append(names)
        self.groups.append(groups)
