"""The matrix products of one training step, done by torch.mm alone: the time that no step can go under.

    y = x W,  dx = dy W^T,  dW = x^T dy      of every linear layer of every block, W (in, out) as GPT-2 keeps it
    y = x E^T,  dx = dy E,  dE = dy^T x      of the head, E (V, D) the embedding

torch.mm is oneDNN's product in bf16 and, where torch was built with it, MKL's in fp32. Attention's products do not
count. A step's blocks share their operands here, so less is read than a real step must read.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.model.config import GPTConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Product:
    """a (m, k) b (k, n) -> out (m, n), `count` times a step."""

    name: str
    count: int
    a: Tensor
    b: Tensor
    out: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """m, k, n"""
        return (*self.a.shape, self.b.shape[1])

    @property
    def flops(self) -> int:
        """Of one."""
        m, k, n = self.size
        return 2 * m * k * n


class Floor:
    """The products of a step of so many tokens, in the order in which a step does them."""

    def __init__(self, config: GPTConfig, precision: str, tokens: int):
        d, layers, dtype = config.d_model, config.n_layer, DTYPES[precision]
        widths = {"qkv": (d, 3 * d), "out": (d, d), "fc": (d, config.d_fc), "proj": (config.d_ff, d)}
        up, down = [], []
        for name, (width, wide) in widths.items():
            x, w, dy = (_random(shape, dtype) for shape in ((tokens, width), (width, wide), (tokens, wide)))
            up.append(Product(f"{name} y", layers, x, w, torch.empty_like(dy)))
            down.append(Product(f"{name} dx", layers, dy, w.t(), torch.empty_like(x)))
            down.append(Product(f"{name} dw", layers, x.t(), dy, torch.empty_like(w)))
        x, table = _random((tokens, d), dtype), _random((config.vocab_size, d), dtype)
        logits = torch.empty(tokens, config.vocab_size, dtype=dtype)
        head = [
            Product("head y", 1, x, table.t(), logits),
            Product("head dx", 1, logits, table, torch.empty_like(x)),
            Product("head dw", 1, logits.t(), x, torch.empty_like(table)),
        ]
        self.products = [*up, *head, *down]
        self.order = [*up * layers, *head, *down[::-1] * layers]
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def step(self, *_) -> None:
        """Does all of them once, and notes what each took."""
        for product in self.order:
            begin = time.perf_counter()
            torch.mm(product.a, product.b, out=product.out)
            self.seconds[product.name].append(time.perf_counter() - begin)

    def rest(self) -> None:
        """Between two turns: operands are all that it holds."""

    def details(self, blocks: float = 1.0) -> dict:
        """What each product took, in the median of all that were done, and their sum; blocks: how many times what was
        done in the blocks the sum is to be of."""
        found, total, flops = [], 0.0, 0.0
        for product in self.products:
            seconds = statistics.median(self.seconds[product.name])
            count = product.count * (1 if product.name.startswith("head") else blocks)
            total, flops = total + count * seconds, flops + count * product.flops
            row = {"name": product.name, "size": product.size, "count": count, "seconds": seconds}
            found.append(row | {"flops_per_second": product.flops / seconds})
        return {"seconds": total, "flops": flops, "products": found}


def _random(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype)
