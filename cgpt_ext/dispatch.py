"""Which implementation serves which op on which device: one literal table, and the measurement that chose it.

Implementations: `native` (csrc/, C++ on a CPU, CUDA on a GPU), `triton` (cgpt_ext/triton/) and `reference` (the
`<op>_ref` beside each op: plain torch, any device, only when asked for by name). Nothing falls back by itself.
gelu_mlp on a GPU has `cublas` and `cublaslt` besides, NVIDIA's products with our epilogues or with theirs; linear there
is `torch`, whose product it is.

Another one for a test, a bench or a single call is asked for around it, and serves its backward pass too where that is
run inside the block:

    with cgpt_ext.dispatch.use(layer_norm="triton"):
        y = layer_norm(x, weight, bias)
"""

from contextlib import contextmanager
from functools import cache

import torch

from cgpt_ext import _native

# op -> "cpu" or "cuda", and where they matter "cuda float32" for a dtype, "cuda sm_90" for an architecture of GPUs
#    -> (implementation, why). A dtype's row stands before an architecture's, that before the device's.
TABLE: dict[str, dict[str, tuple[str, str]]] = {
    "adamw": {
        "cpu": ("native", "at memory speed, like torch's fused step: 0.9 to 1.1 times it on a Zen 4"),
        "cuda": ("native", "one launch for all parameters; not yet run on a GPU"),
    },
    "grad_norm": {
        "cpu": ("native", "double sums at memory speed; torch's fp32 sums lose four digits over 96M elements"),
        "cuda": ("native", "two launches for all gradients, the CPU's bits; not yet run on a GPU"),
    },
    "attention": {
        "cpu": ("native", "blocks in cache: 2.2 to 3 times SDPA in bf16 on a Zen 4, both directions"),
        "cuda": ("native", "tensor cores, bf16 and fp16; not yet run on a GPU"),
        "cuda float32": ("triton", "products in full fp32; not yet run on a GPU"),
    },
    "embedding": {
        "cpu": ("native", "tokens and positions in one pass; gradients summed in fp32, in token order"),
        "cuda": ("native", "one pass; gradients from sorted ids, without atomics; not yet run on a GPU"),
    },
    "gelu_mlp": {
        "cpu": ("native", "our matrix products with GELU and its gradient in their epilogues"),
        "cuda": ("cublas", "torch's matrix products with fused epilogues between, until our GEMM has run on a GPU"),
    },
    "cross_entropy": {
        "cpu": (
            "native",
            "chunks of tokens, so logits are never whole, around linear's products; GEMM-bound",
        ),
        "cuda": ("native", "torch's matrix products, loss and gradient in one visit between; not yet run on a GPU"),
    },
    "layer_norm": {
        "cpu": ("native", "1.6 times torch in bf16 and 1.2 in fp32 on a Zen 4"),
        "cuda": ("native", "one read of each row, both directions; not yet run on a GPU"),
    },
    "linear": {
        "cpu": ("native", "packed tiles: ahead of torch's products in every dtype, most where those are not oneDNN's"),
        "cuda": ("torch", "its matrix products, cuBLAS's; without a kernel of ours"),
    },
    "rotary": {
        "cpu": ("native", "one pass over strided heads, in fp32"),
        "cuda": ("native", "one pass over strided heads, in fp32; not yet run on a GPU"),
    },
}

# What can be asked for by name where it is more than the kernel of the table and the reference.
BESIDES: dict[str, tuple[str, ...]] = {
    "adamw": ("triton",),
    "attention": ("triton",),
    "cross_entropy": ("triton",),
    "gelu_mlp": ("cublas", "cublaslt", "triton"),
    "layer_norm": ("triton",),
}

# What `use` has in force. It is the process's, not the thread's or task's: autograd runs the backward pass of CUDA
# tensors on a thread of its own, which would see no context variable and take the table's implementation in silence.
_chosen: dict[str, str] = {}


def implementation(op: str, device: str, dtype: torch.dtype | None = None) -> str:
    """The implementation that serves `op` on tensors of this `torch.device.type` and, where it matters, dtype.

    Raises ValueError, naming the devices there are, where there is none.
    """
    row = TABLE[op]
    if device not in row:
        raise ValueError(f"{op}: tensors must be on {' or '.join(devices(op))}, got {device}")
    if op in _chosen:
        return _chosen[op]
    if device != "cuda":
        return row[device][0]
    name = row.get(f"cuda {architecture()}", row["cuda"])[0]
    return name if dtype is None else row.get(f"cuda {str(dtype).removeprefix('torch.')}", (name,))[0]


def devices(op: str) -> list[str]:
    """The device types that `op` runs on."""
    return [key for key in TABLE[op] if " " not in key]


def implementations(op: str, device: str) -> list[str]:
    """What can serve `op` on a device, the table's choice first, the reference left out unless it is that."""
    first = implementation(op, device)
    besides = ("native", *BESIDES.get(op, ())) if device == "cuda" and first != "torch" else ()
    return list(dict.fromkeys([first, *besides]))


@cache
def architecture() -> str | None:
    """The current GPU's, "sm_90" for one; None without a GPU."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def reference_chosen(op: str) -> bool:
    """Whether `with use(op="reference")` is in force; compiled graphs keep what they were compiled with."""
    if torch.compiler.is_compiling():
        return False
    return _chosen.get(op) == "reference"


@contextmanager
def use(**chosen: str):
    """`with use(adamw="triton"):` serves ops by the named implementation in the whole process: tests and benches.

    Raises ValueError naming the ops there are, or the implementations of an op.
    """
    global _chosen
    for op, name in chosen.items():
        if op not in TABLE:
            raise ValueError(f"dispatch: op must be one of {', '.join(TABLE)}, got {op}")
        known = ("native", *BESIDES.get(op, ()), "reference")
        if name not in known:
            raise ValueError(f"dispatch: {op} must be {' or '.join(known)}, got {name}")
    before, _chosen = _chosen, {**_chosen, **chosen}
    try:
        yield
    finally:
        _chosen = before


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
