"""Which implementation serves which op on which device: one literal table, and the measurement that chose it.

Implementations: `native` (csrc/, C++ on a CPU, CUDA on a GPU), `triton` (cgpt_ext/triton/) and `reference` (the
`<op>_ref` beside each op: plain torch, any device, only when asked for by name). Nothing falls back by itself.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch

from cgpt_ext import _native

# op -> device type, where it matters followed by a dtype -> (implementation, why)
TABLE: dict[str, dict[str, tuple[str, str]]] = {
    "adamw": {
        "cpu": ("native", "at memory speed, like torch's fused step: 0.9 to 1.1 times it on a Zen 4"),
        "cuda": ("native", "one launch for all parameters; not yet run on a GPU"),
    },
    "grad_norm": {
        "cpu": ("native", "double sums at memory speed; torch's fp32 sums lose four digits over 96M elements"),
        "cuda": ("reference", "plain torch in double: there is no CUDA kernel yet"),
    },
    "attention": {
        "cpu": ("native", "fp32 blocks in cache: 1.2 to 2.1 times SDPA on a Zen 4, both directions"),
        "cuda": ("native", "tensor cores, bf16 and fp16; not yet run on a GPU"),
        "cuda float32": ("triton", "products in full fp32; not yet run on a GPU"),
    },
    "embedding": {"cpu": ("native", "tokens and positions in one pass; gradients summed in fp32, in token order")},
    "gelu_mlp": {"cpu": ("native", "torch's matrix products with fused epilogues; level with torch, GEMM-bound")},
    "cross_entropy": {
        "cpu": (
            "native",
            "chunks of tokens, so logits are never whole; 1.1 to 1.3 times torch on a Zen 4, GEMM-bound",
        )
    },
    "layer_norm": {"cpu": ("native", "1.2 to 1.4 times torch in bf16 and level in fp32 on a Zen 4")},
}

# What can be asked for by name where it is more than the kernel of the table and the reference.
BESIDES: dict[str, tuple[str, ...]] = {"adamw": ("triton",), "attention": ("triton",)}

_chosen: ContextVar[dict[str, str] | None] = ContextVar("cgpt_ext_implementation", default=None)


def implementation(op: str, device: str, dtype: torch.dtype | None = None) -> str:
    """The implementation that serves `op` on tensors of this `torch.device.type` and, where it matters, dtype.

    Raises ValueError, naming the devices there are, where there is none.
    """
    row = TABLE[op]
    if device not in row:
        devices = " or ".join(key for key in row if " " not in key)
        raise ValueError(f"{op}: tensors must be on {devices}, got {device}")
    name = row.get(f"{device} {str(dtype).removeprefix('torch.')}", row[device])[0]
    chosen = _chosen.get()
    return name if chosen is None else chosen.get(op, name)


def reference_chosen(op: str) -> bool:
    """Whether `with use(op="reference")` is in force; compiled graphs keep what they were compiled with."""
    if torch.compiler.is_compiling():
        return False
    chosen = _chosen.get()
    return chosen is not None and chosen.get(op) == "reference"


@contextmanager
def use(**chosen: str):
    """`with use(adamw="triton"):` serves ops by the named implementation in this thread or task: tests and benches."""
    for op, name in chosen.items():
        if op not in TABLE:
            raise ValueError(f"dispatch: op must be one of {', '.join(TABLE)}, got {op}")
        known = ("native", *BESIDES.get(op, ()), "reference")
        if name not in known:
            raise ValueError(f"dispatch: {op} must be {' or '.join(known)}, got {name}")
    token = _chosen.set({**(_chosen.get() or {}), **chosen})
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def cpu_isa(name: str):
    """`with cpu_isa("avx2"):` runs the CPU kernels of that instruction set, in the whole process.

    Raises ValueError naming those this machine can run.
    """
    before = _native.cpu_isa()
    _native.set_cpu_isa(name)
    try:
        yield
    finally:
        _native.set_cpu_isa(before)


def report() -> dict:
    """What serves each op here and why, and what the native module found on this machine."""
    return {
        "cpu": {"isa": _native.cpu_isa(), "available": _native.cpu_isas(), "threads": _native.num_threads()},
        "ops": {
            op: {device: {"implementation": name, "why": why} for device, (name, why) in row.items()}
            for op, row in TABLE.items()
        },
    }
