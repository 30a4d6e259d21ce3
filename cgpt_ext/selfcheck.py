"""Every op on a tiny problem against its reference in fp64: values and gradients, on every device, in every dtype.

For a machine that nobody has tested on. A wrong build, driver or instruction set shows here as numbers far off; the
tests hold each op to a finer bar.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

import cgpt_ext
from cgpt_ext import _native, dispatch

# Of the reference's largest value: a few roundings of the dtype, since half-precision gradients pass through several.
BARS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

Problem = tuple[Callable, Callable, list[Tensor]]  # ours, the reference, and the inputs of both


def places() -> list[str]:
    """Where the ops are checked: each instruction set of the CPU, and each GPU that the build has kernels for."""
    gpus = torch.cuda.device_count() if _native.has_cuda_kernels and torch.cuda.is_available() else 0
    return [*(f"cpu {isa}" for isa in _native.cpu_isas()), *(f"cuda:{i}" for i in range(gpus))]


def check(only: list[str] | None = None) -> Iterator[dict]:
    """Yields a row for each op, place and dtype: those three, `implementation`, `error` and `bar`, as shares of the
    reference's largest value, and `result`: "ok", "WRONG", or "FAILED" and what was raised. error: None where it is
    not finite or unknown.

    only: places; all where None.
    """
    for place in places() if only is None else only:
        device, _, isa = place.partition(" ")
        for op in dispatch.TABLE:
            for dtype, bar in BARS.items():
                row = {"op": op, "place": place, "dtype": str(dtype).removeprefix("torch.")}
                row |= {"implementation": None, "error": None, "bar": bar}
                try:
                    row["implementation"] = dispatch.implementation(op, torch.device(device).type, dtype)
                    with dispatch.cpu_isa(isa) if isa else nullcontext():
                        error = worst_error(*problem(op, device, dtype))
                    row["error"] = error if math.isfinite(error) else None  # JSON has no word for infinity
                    row["result"] = "ok" if error <= bar else "WRONG"
                except Exception as error:  # whatever it is, the other rows are wanted too
                    row["result"] = " ".join(f"FAILED {type(error).__name__}: {error}".split())
                yield row


def problem(op: str, device: str, dtype: torch.dtype) -> Problem:
    """A few blocks of the op's kernels, of odd sizes where it takes them; the same numbers on every call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def ids(most, *shape):
        return torch.randint(most, shape, generator=generator).to(device)

    if op == "adamw":
        weights = [normal(37, 5), normal(37, 5)]
        return _adamw(cgpt_ext.adamw_), _adamw(cgpt_ext.adamw_ref), [*weights, *_moments(normal)]
    if op == "grad_norm":
        return _norm(cgpt_ext.grad_norm), _norm(cgpt_ext.grad_norm_ref), [normal(19), normal(37, 5)]
    if op == "attention":
        return *_both("attention", causal=True), [normal(2, t, 2, 40) for t in (67, 70, 70)]
    if op == "embedding":
        return *_both("embedding"), [ids(50, 2, 33), normal(50, 24), normal(40, 24)]
    if op == "gelu_mlp":
        scaled = [normal(48, 32) / 32**0.5, normal(48), normal(32, 48) / 48**0.5, normal(32)]
        return *_both("gelu_mlp"), [normal(67, 32), *scaled]
    if op == "cross_entropy":
        return *_both("cross_entropy"), [normal(33, 32), normal(101, 32) / 32**0.5, ids(101, 33)]
    if op == "layer_norm":
        return *_both("layer_norm"), [normal(33, 72), normal(72), normal(72)]
    if op == "linear":
        return *_both("linear", scale=0.5), [normal(67, 72), normal(101, 72) / 72**0.5, normal(101)]
    if op == "rotary":
        angles = torch.outer(torch.arange(33.0), 100.0 ** -torch.linspace(0, 1, 8)).to(device)
        ours, reference = _both("rotary")
        turned = (angles.cos(), angles.sin())
        return lambda x: ours(x, *turned), lambda x: reference(x, *turned), [normal(2, 33, 2, 24)]
    raise ValueError(f"selfcheck: there is no problem for {op}")


def _both(op: str, **options) -> tuple[Callable, Callable]:
    ours, reference = getattr(cgpt_ext, op), getattr(cgpt_ext, f"{op}_ref")
    return lambda *x: ours(*x, **options), lambda *x: reference(*x, **options)


def _norm(norm: Callable) -> Callable:
    """`norm` as a function of single tensors, without the gradients that only the reference has."""
    return lambda *grads: norm([grad.detach() for grad in grads])


def _adamw(step: Callable) -> Callable:
    """`step` as a function of one parameter's four tensors, which it leaves as they are."""

    def stepped(*tensors):
        param, grad, exp_avg, exp_avg_sq = (x.detach().clone() for x in tensors)
        step([param], [grad], [exp_avg], [exp_avg_sq], 3, **ADAMW)
        return param, exp_avg, exp_avg_sq

    return stepped


def _moments(normal: Callable) -> list[Tensor]:
    return [normal(37, 5, dtype=torch.float32), normal(37, 5, dtype=torch.float32).square()]


def worst_error(ours: Callable, reference: Callable, inputs: list[Tensor]) -> float:
    """The largest error of an output or a gradient, as a share of that tensor's largest value; inf for a NaN."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    worst = 0.0
    for got, want in zip(_run(ours, inputs), _run(reference, wide), strict=True):
        if got.shape != want.shape:
            raise ValueError(f"shape must be {tuple(want.shape)}, got {tuple(got.shape)}")
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
    return worst


def _run(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the inputs' gradients where there are any, on the CPU."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.enable_grad():
        outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    for out in outs:
        if out.requires_grad:
            out.backward(torch.linspace(1, 2, out.numel()).view(out.shape).to(out))
    return [x.detach().cpu() for x in [*outs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]]
