"""Does every part of a model do as much when the model grows? Models of several widths or depths, trained a few steps.

All follow one base, that of the smallest size, by the rules of a parametrization, and take steps of the executor and of
AdamW on one batch of text. What is read at step t, before its update:

    embedding           mean |x| behind the embedding
    attention, mlp      mean |y| of what they make, before the residual factor, over blocks
    stream              mean |x| behind the last block
    logits              mean |logit|
    scores              sum of (s_t - s_0) (-g) / sum of |g| with g = dloss/ds at t = 0, over blocks: what training has
                        added to the attention scores, where and as much as the first gradient asked for it
    readout             mean (logit_t - logit_0) of the right token: what training has added to it

A quantity holds where its means over seeds are within LIMIT times of each other, over all sizes and at every t >= 1.
Mean |logit| is shown and not judged: the tied readout is not zero at first, so that under muP the logits begin as
m^-1/2 and only what is learnt has a size that does not know the width (Yang et al. 2022, arXiv 2203.03466, appendix
D.2), and that is `readout`. For the same reason `scores` is what is learnt: at first q k' / d_head falls as
d_head^-1/2. The check is theirs too, appendix D.1.

Tokens are numbered anew by those that occur in the batch: a vocabulary of hundreds, which width knows nothing of, in
place of GPT-2's makes a check take seconds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cgpt.data.loader import Loader, train_val_split
from cgpt.data.shards import TokenDataset
from cgpt.errors import Diverged, InputError
from cgpt.experiments.proxies import base_of
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.init import init_parameter
from cgpt.model.parametrization import Base, parametrize
from cgpt.stream.build import build
from cgpt.stream.executor import Batch, Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW

QUANTITIES = ("embedding", "attention", "mlp", "stream", "logits", "scores", "readout")
JUDGED = tuple(name for name in QUANTITIES if name != "logits")
LIMIT = 1.2
SEQ_LEN, SEQUENCES = 64, 8


@dataclass(frozen=True)
class Coordinates:
    """What was read. along: "width" or "depth", which `sizes` are of. values: (parametrizations, sizes, seeds, steps +
    1, QUANTITIES) float64."""

    base: Base
    along: str
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    values: np.ndarray

    @property
    def seeds(self) -> int:
        return self.values.shape[2]

    @property
    def steps(self) -> int:
        return self.values.shape[3] - 1

    def means(self, kind: str, quantity: str) -> np.ndarray:
        """(sizes, steps + 1): means over seeds."""
        return self.values[self.kinds.index(kind), ..., QUANTITIES.index(quantity)].mean(1)

    def ratio(self, kind: str, quantity: str) -> float:
        """Most over least among the sizes, at the step t >= 1 where that is largest; infinite where the least is not
        above 0."""
        found = self.means(kind, quantity)[:, 1:]
        least, most = found.min(0), found.max(0)
        return float((most / least).max()) if (least > 0).all() else math.inf

    def within(self, kind: str) -> bool:
        """Whether every one of JUDGED holds."""
        return all(self.ratio(kind, quantity) <= LIMIT for quantity in JUDGED)


def base_at(width: int, layers: int, heads: int, vocab_size: int, lr: float, init_std: float, scale: float) -> Base:
    """The model of the smallest size, where all parametrizations are one. Raises InputError where it is no model."""
    shape = GPTConfig(
        n_layer=layers,
        n_head=heads,
        d_model=width,
        d_head=width // heads,
        d_ff=4 * width,
        vocab_size=vocab_size,
        seq_len=SEQ_LEN,
    )
    return base_of(shape, lr, init_std, scale)


def wider(base: Base, width: int) -> GPTConfig:
    """The base's shape at another width: as many heads, each wider, so that the rules for heads show too."""
    return replace(base.config, d_model=width, d_head=width // base.config.n_head, d_ff=4 * width)


def deeper(base: Base, depth: int) -> GPTConfig:
    """The base's shape with another number of layers."""
    return replace(base.config, n_layer=depth)


def one_batch(dataset: TokenDataset, seed: int = 0) -> tuple[Batch, int]:
    """((ids, targets), vocabulary): SEQUENCES x SEQ_LEN tokens of text, numbered by those that occur among them."""
    train, _ = train_val_split(dataset, SEQ_LEN)
    arrays = Loader(train, SEQ_LEN, seed).batch(0, SEQUENCES)
    known, places = np.unique(np.stack(arrays), return_inverse=True)
    ids, targets = torch.from_numpy(places.reshape(2, SEQUENCES, SEQ_LEN)).long()
    return (ids, targets), len(known)


def check(
    base: Base,
    shapes: Sequence[GPTConfig],
    kinds: Sequence[str],
    batch: Batch,
    *,
    steps: int = 3,
    seeds: int = 3,
    precision: str = "fp32",
) -> Coordinates:
    """Trains every shape by every parametrization from every seed. shapes: of one width or of one depth, the base's
    among them. Raises InputError for an unknown parametrization, Diverged where one model does."""
    depths, widths = ({getattr(shape, name) for shape in shapes} for name in ("n_layer", "d_model"))
    if len(shapes) < 2 or len(depths) * len(widths) != len(shapes) or 1 not in (len(depths), len(widths)):
        raise InputError("coordinate check: wanted shapes that differ in width or in depth, two at least")
    along, name = ("depth", "n_layer") if len(widths) == 1 else ("width", "d_model")
    values = np.empty((len(kinds), len(shapes), seeds, steps + 1, len(QUANTITIES)))
    for i, j, seed in np.ndindex(values.shape[:3]):
        shape = parametrize(shapes[j], kinds[i], base)
        values[i, j, seed] = follow(shape, base.lr, batch, steps, seed, precision)
    if not np.isfinite(values).all():
        kind, size, *_ = (int(places[0]) for places in np.nonzero(~np.isfinite(values)))
        told = f"{kinds[kind]}, {along} {getattr(shapes[size], name)}"
        raise Diverged(f"{told}: wanted finite activations, got others at lr {base.lr:g}; try a lower --lr")
    return Coordinates(base, along, tuple(getattr(shape, name) for shape in shapes), tuple(kinds), values)


def follow(shape: GPTConfig, lr: float, batch: Batch, steps: int, seed: int, precision: str = "fp32") -> np.ndarray:
    """(steps + 1, QUANTITIES) float64: one model, read before each of its updates and after the last. A
    row of nan where an update was skipped, for its gradient was not finite."""
    model, store = build(shape, Format(precision), "cpu")
    with contextlib.closing(store):
        store.initialise(lambda name, tensor: init_parameter(name, tensor, shape, seed))
        executor, optimizer = Executor(store), AdamW(store, scales=shape)
        gradients, first = score_gradients(model, batch), _look(model, batch)
        wanted = -gradients / gradients.abs().sum()
        rows = [_row(first, first, wanted, batch, shape)]
        for _ in range(steps):
            applied = optimizer.step(executor.gradients([[batch]]), lr)
            now = _row(_look(model, batch), first, wanted, batch, shape)
            rows.append(now if applied else [math.nan] * len(QUANTITIES))
    return np.array(rows)


@dataclass
class _Seen:
    """What a forward showed. outputs: quantity -> a tensor or one a block. qkv: (B, T, 3 D), mixed: what of the values
    the scores let through, (B, T, D), both a block each. logits: (B, T, V)."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    qkv: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None

    def scores(self, shape: GPTConfig) -> Tensor:
        """(L, B, H, T, T) fp32, before the mask."""
        return torch.stack([_scores(*_heads(qkv, shape)[:2], shape) for qkv in self.qkv])


@contextlib.contextmanager
def watching(model: GPT) -> Iterator[_Seen]:
    seen, hooks = _Seen(), []

    def note(name: str):
        return lambda _module, _inputs, output: seen.outputs.setdefault(name, []).append(output)

    for block in model.h:
        hooks.append(block.attn.register_forward_hook(note("attention")))
        hooks.append(block.mlp.register_forward_hook(note("mlp")))
        hooks.append(block.attn.c_attn.register_forward_hook(lambda _module, _inputs, output: seen.qkv.append(output)))
        hooks.append(block.attn.c_proj.register_forward_pre_hook(lambda _module, inputs: seen.mixed.append(inputs[0])))
    hooks.append(model.h[0].register_forward_pre_hook(lambda _module, inputs: note("embedding")(None, (), inputs[0])))
    hooks.append(model.h[-1].register_forward_hook(note("stream")))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _look(model: GPT, batch: Batch) -> _Seen:
    with watching(model) as seen:
        seen.logits = model(batch[0]).float()
    return seen


def score_gradients(model: GPT, batch: Batch) -> Tensor:
    """dloss/dscores, (L, B, H, T, T) fp32, which attention's own backward does not leave: by its formula, from q, k, v
    and the gradient of what attention makes."""
    with torch.enable_grad(), watching(model) as seen:
        gradients = torch.autograd.grad(model(*batch), seen.mixed)
    found = []
    with torch.no_grad():
        for qkv, dmixed in zip(seen.qkv, gradients, strict=True):
            q, k, v = _heads(qkv, model.config)
            future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
            p = _scores(q, k, model.config).masked_fill(future, -torch.inf).softmax(-1)
            dp = torch.einsum("bthd,bshd->bhts", dmixed.float().view_as(v), v)
            found.append(p * (dp - (p * dp).sum(-1, keepdim=True)))
    return torch.stack(found)


def _heads(qkv: Tensor, shape: GPTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, T, H, K) fp32."""
    return qkv.float().view(*qkv.shape[:2], 3, shape.n_head, shape.d_head).unbind(2)


def _scores(q: Tensor, k: Tensor, shape: GPTConfig) -> Tensor:
    return torch.einsum("bthd,bshd->bhts", q, k) * shape.attention_scale


def _row(now: _Seen, first: _Seen, wanted: Tensor, batch: Batch, shape: GPTConfig) -> list[float]:
    sizes = {name: _size(tensors) for name, tensors in now.outputs.items()}
    sizes["attention"] /= shape.residual_scale  # which the model has folded into c_proj, unlike the MLP's
    sizes["logits"] = _size([now.logits])
    sizes["scores"] = float(((now.scores(shape) - first.scores(shape)) * wanted).sum())
    sizes["readout"] = float((now.logits - first.logits).gather(2, batch[1][..., None]).mean())
    return [sizes[name] for name in QUANTITIES]


def _size(tensors: list[Tensor]) -> float:
    return float(np.mean([float(tensor.float().abs().mean()) for tensor in tensors]))
