"""One AdamW step over lists of tensors, in place (Loshchilov & Hutter 2019, arXiv 1711.05101).

    g = grad * grad_scale
    m = fma(1 - beta1, g - m, m)
    v = fma(beta2, v, ((1 - beta2) * g) * g)
    d = m / (sqrt(v) + eps * c2)                                 c2 = sqrt(1 - beta2^t)
    p = fma(-(lr * c2 / (1 - beta1^t)), d, p * (1 - lr * weight_decay))

Every operation is IEEE 754 fp32 and rounds once; the coefficients are computed in double, beta^t by repeated
squaring, and rounded once. So the CPU kernels, the CUDA kernel, the Triton kernel and `adamw_ref` give the same bits,
and a parameter's state may move between them (csrc/adamw.h states the sequence and its reasons).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation
from cgpt_ext.ops._torch import direct, register

_32_BITS = 0xFFFFFFFF


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor | Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    masters: Sequence[Tensor] | None = None,
    lows: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    maximize: bool = False,
    stochastic_rounding_seed: int | Tensor | None = None,
    rounding_places: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Takes step number `step` (the first is 1) with every parameter, in place.

    All tensors of one parameter have its shape and its layout, which is dense in any order of the dimensions; no two
    share memory; all are on one device. Tensors given for `step`, `lr`, `grad_scale` and the seed are 0-d on that
    device and are read there, by the kernel.

    Args:
        params: fp32, bf16 or fp16. Without `masters` and `lows`, bf16 and fp16 are rounded to nearest every step.
        grads: fp32, bf16 or fp16, whatever the parameters are.
        exp_avgs, exp_avg_sqs: fp32; with a seed also bf16, all of them, whatever else keeps the weights.
        step: an int, an fp32 or int64 tensor, or one such tensor a parameter. A tensor below 1 skips the update.
        lr: a number, or an fp32 or fp64 tensor.
        masters: fp32 weights behind bf16 or fp16 `params`, which receive them rounded to nearest even.
        lows: int16 low halves of split masters whose high halves are the bf16 `params` (see `split_master`).
        grad_scale: fp32; multiplies every gradient: a clip coefficient, or one over a loss scale.
        maximize: ascends.
        stochastic_rounding_seed: an int64, or an int64 tensor. The bf16 `params`, without masters and lows, and bf16
            `exp_avgs` and `exp_avg_sqs` are rounded up or down at random instead of to nearest, so that steps below
            their last bit add up on average. The random bits are a function of the seed, the step, the parameter's
            place in `params` and the element's in memory, the same on every device (csrc/adamw.h states it): give
            lists that step together different seeds, or places that say which parameter is which. The Triton kernel
            takes no seed.
        rounding_places: (number, first) of each of `params`, for a seed: its random bits are those of the elements
            first, first + 1, ... of the parameter of that number. So pieces of a parameter step as the whole does.
            number: below 2^32; first: a multiple of 1024. Default: (its place in `params`, 0).

    Raises:
        ValueError: for a wrong shape, layout, device or number. TypeError: for a wrong dtype.
    """
    steps = [] if isinstance(step, int) else [step] if isinstance(step, Tensor) else _listed("step", step)
    lists = [_listed(*item) for item in (("params", params), ("grads", grads), ("exp_avgs", exp_avgs))]
    lists += [_listed("exp_avg_sqs", exp_avg_sqs), steps]
    masters, lows = _listed("masters", masters or []), _listed("lows", lows or [])
    if grad_scale is not None and not isinstance(grad_scale, Tensor):
        raise TypeError(f"adamw: grad_scale must be a torch.Tensor, got {type(grad_scale).__name__}")
    lr_tensor = lr if isinstance(lr, Tensor) else None
    scalars = (
        0 if steps else int(step) if isinstance(step, int) else 1,
        0.0 if lr_tensor is not None else float(lr),
        lr_tensor,
        float(beta1),
        float(beta2),
        float(eps),
        float(weight_decay),
    )
    seed = stochastic_rounding_seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, Tensor))):
        raise TypeError(f"adamw: stochastic_rounding_seed must be an int or a tensor, got {type(seed).__name__}")
    if isinstance(seed, int) and not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"adamw: stochastic_rounding_seed must fit 64 bits, got {seed}")
    seeds = (None, seed) if isinstance(seed, Tensor) else (seed, None)
    rest = (masters, lows, grad_scale, bool(maximize), *seeds, _flat(rounding_places))
    params = lists[0]
    _step(*lists, *scalars, *rest)
    if params and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)  # so that autograd notices a graph that saved the old values


def adamw_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor | Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    masters: Sequence[Tensor] | None = None,
    lows: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    maximize: bool = False,
    stochastic_rounding_seed: int | Tensor | None = None,
    rounding_places: Sequence[tuple[int, int]] | None = None,
) -> None:
    """`adamw_` in plain torch, any device: the same bits in fp32, the truth where params and states are fp64."""
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        t = int(step[i] if isinstance(step, Sequence) else step)
        if t < 1:
            continue
        rate = float(lr)
        c2 = math.sqrt(1.0 - _power(beta2, t))
        step_size = rate * c2 / (1.0 - _power(beta1, t))
        place = rounding_places[i] if rounding_places else (i, 0)
        half_states = exp_avg.dtype == torch.bfloat16 and stochastic_rounding_seed is not None
        kind = torch.float32 if half_states else exp_avg.dtype
        one_minus_beta1, beta2_, one_minus_beta2, decay, minus_step_size, eps_ = torch.tensor(
            [1.0 - beta1, beta2, 1.0 - beta2, 1.0 - rate * weight_decay, -step_size, eps * c2], dtype=torch.float64
        ).to(param.device, kind)
        g = grad.detach().to(kind) * (1.0 if grad_scale is None else grad_scale.to(kind)) * (-1.0 if maximize else 1.0)
        p = masters[i] if masters else join_master(param, lows[i]) if lows else param.detach().to(kind)
        m, v = exp_avg.to(kind), exp_avg_sq.to(kind)
        m = _fma(one_minus_beta1, g - m, m)
        v = _fma(beta2_, v, one_minus_beta2 * g * g)
        root = v.double().sqrt().to(kind)  # torch's own fp32 sqrt on a CPU is not correctly rounded
        d = m / (root + eps_)
        p = _fma(minus_step_size, d, p * decay)
        if masters:
            masters[i].copy_(p)
        if lows:
            high, low = split_master(p)
            lows[i].copy_(low)
            p = high
        if half_states:
            random = _random(exp_avg, int(stochastic_rounding_seed), t, place, state=True)
            m, v = _rounded(m, random >> 16), _rounded(v, random & 0xFFFF)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        if stochastic_rounding_seed is not None and param.dtype == torch.bfloat16 and not (masters or lows):
            p = _stochastic(p, param, int(stochastic_rounding_seed), t, place)
        with torch.no_grad():
            param.copy_(p)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Splits fp32 weights into bf16 `high`, what a layer computes with, and the int16 `low` that is left, exactly.

    high = (bits + 0x8000) >> 16 rounds to nearest with ties away from zero, so it differs from
    `master.to(torch.bfloat16)` on exact ties only. A NaN becomes a quiet NaN in `high` and 0 in `low`.

    Args:
        master: fp32, any shape.

    Returns:
        (high, low), in master's shape and, where that is dense, its strides.

    Raises:
        TypeError: where master is not fp32.
    """
    if not isinstance(master, Tensor) or master.dtype != torch.float32:
        given = master.dtype if isinstance(master, Tensor) else type(master).__name__
        raise TypeError(f"split_master: master must be float32, got {str(given).removeprefix('torch.')}")
    if direct(master) and master.device.type == "cpu" and master.is_contiguous():
        high, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
        _native.split_master(master.detach(), high, low)
        return high, low
    bits = master.detach().view(torch.int32)
    nan = master.isnan()
    high = torch.where(nan, bits >> 16 | 0x40, bits.long() + 0x8000 >> 16)
    low = torch.where(nan, 0, bits)
    return _low_half(high).view(torch.bfloat16), _low_half(low)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 weights that `split_master` took apart.

    Args:
        high: bf16. low: int16, in high's shape.

    Raises:
        ValueError: where the shapes differ. TypeError: for other dtypes.
    """
    for name, value, dtype in (("high", high, torch.bfloat16), ("low", low, torch.int16)):
        if not isinstance(value, Tensor) or value.dtype != dtype:
            given = value.dtype if isinstance(value, Tensor) else type(value).__name__
            wanted = str(dtype).removeprefix("torch.")
            raise TypeError(f"join_master: {name} must be {wanted}, got {str(given).removeprefix('torch.')}")
    if high.shape != low.shape:
        raise ValueError(f"join_master: low must be {tuple(high.shape)}, got {tuple(low.shape)}")
    if direct(high) and high.device.type == "cpu" and high.is_contiguous() and low.is_contiguous():
        master = torch.empty_like(high, dtype=torch.float32)
        _native.join_master(high.detach(), low, master)
        return master
    return ((high.detach().view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def _low_half(x: Tensor) -> Tensor:
    """The low 16 bits of integers as int16, without leaning on what a narrowing conversion does out of range."""
    return ((x & 0xFFFF ^ 0x8000) - 0x8000).to(torch.int16)


def _stochastic(x: Tensor, like: Tensor, seed: int, step: int, place: tuple[int, int]) -> Tensor:
    """fp32 `x` rounded to bf16 at random; elements are counted as `like` lies."""
    return _rounded(x, _random(like, seed, step, place, device=x.device) >> 16)


def _random(like: Tensor, seed: int, step: int, place: tuple[int, int], state: bool = False, device=None) -> Tensor:
    """32 bits an element in int64, by the generator of csrc/adamw.h: a parameter's, or its moments'."""
    device = device or like.device
    number, first = place
    i = torch.full(like.shape, first, dtype=torch.int64, device=device)
    for d in range(like.dim()):
        along = torch.arange(like.shape[d], device=device) * like.stride(d)
        i = i + along.view(-1, *[1] * (like.dim() - d - 1))
    keys = []
    for key in (0, 1):
        for word in (seed, seed >> 32, step, step >> 32, number):
            key = _mix(key + (word & _32_BITS) + 0x9E3779B9 & _32_BITS)
        keys.append(_mix((i >> 32) + key + 0x9E3779B9 & _32_BITS))
    if state:
        keys = [_mix(key + 1 + 0x9E3779B9 & _32_BITS) for key in keys]
    return _mix(_mix(i & _32_BITS ^ keys[0]) ^ keys[1])


def _rounded(x: Tensor, random: Tensor) -> Tensor:
    """fp32 `x` rounded to bf16 by 16 random bits an element."""
    bits = x.view(torch.int32)
    rounded = torch.where(x.isnan(), bits >> 16 | 0x40, (bits.long() & _32_BITS) + random >> 16)
    return _low_half(rounded).view(torch.bfloat16)


def _mix(x):
    """lowbias32 of an int or an int64 tensor below 2^32; products that pass 2^63 wrap, and their low half is right."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & _32_BITS
    x = x ^ x >> 15
    x = x * 0x846CA68B & _32_BITS
    return x ^ x >> 16


def _power(x: float, n: int) -> float:
    y = 1.0
    while n > 0:
        if n & 1:
            y = y * x
        x = x * x
        n >>= 1
    return y


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 rounded once; in fp64, where it stands for the truth, rounded twice.

    The product of two fp32 is exact in fp64. The sum is rounded to odd there (Boldo & Melquiond 2008), with what the
    addition lost (Knuth's two-sum), so that the second rounding, to fp32, gives the sum correctly rounded.
    """
    if c.dtype == torch.float64:
        return a * b + c
    x, y = a.double() * b.double(), c.double()
    total = x + y
    virtual = total - x
    lost = (x - (total - virtual)) + (y - virtual)
    even = total.view(torch.int64) & 1 == 0
    towards = torch.where(lost > 0, math.inf, -math.inf).to(total)
    odd = torch.where((lost != 0) & even & lost.isfinite(), torch.nextafter(total, towards), total)
    return odd.float()


def _listed(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` as a list of tensors. Raises TypeError naming the first that is none."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"adamw: {name} must be a list of tensors, got {type(tensors).__name__}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"adamw: {name}[{i}] must be a torch.Tensor, got {type(tensor).__name__}")
    return list(tensors)


def _flat(places: Sequence[tuple[int, int]] | None) -> list[int] | None:
    """`rounding_places` as the op's schema has them; the border knows their bounds. Raises TypeError, ValueError."""
    if places is None:
        return None
    if not isinstance(places, Sequence):
        raise TypeError(f"adamw: rounding_places must be a list of pairs, got {type(places).__name__}")
    for i, place in enumerate(places):
        pair = isinstance(place, Sequence) and len(place) == 2
        if not pair or any(isinstance(x, bool) or not isinstance(x, int) for x in place):
            raise TypeError(f"adamw: rounding_places[{i}] must be two ints, got {place!r}")
        if not all(-(1 << 63) <= x < 1 << 63 for x in place):
            raise ValueError(f"adamw: rounding_places[{i}] must fit 64 bits, got {place!r}")
    return [x for place in places for x in place]


def _launch(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    step,
    lr,
    lr_tensor,
    beta1,
    beta2,
    eps,
    weight_decay,
    masters,
    lows,
    grad_scale,
    maximize,
    seed,
    seed_tensor,
    rounding_places,
):
    chosen = implementation("adamw", params[0].device.type) if params else "native"
    if chosen == "native":
        _native.adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            step,
            lr,
            lr_tensor,
            beta1,
            beta2,
            eps,
            weight_decay,
            masters,
            lows,
            grad_scale,
            maximize,
            seed,
            seed_tensor,
            rounding_places,
        )
        return
    stochastic = {} if seed is None and seed_tensor is None else {"stochastic_rounding_seed": seed}
    if chosen == "triton" and any(x.dtype != torch.float32 for x in (*exp_avgs, *exp_avg_sqs)):
        raise TypeError("adamw: exp_avgs and exp_avg_sqs must be float32 for the Triton kernel, got another dtype")
    if stochastic and chosen == "triton":
        raise ValueError("adamw: stochastic_rounding_seed must be None for the Triton kernel, got a seed")
    if seed_tensor is not None:
        stochastic["stochastic_rounding_seed"] = seed_tensor
    if stochastic and rounding_places:
        stochastic["rounding_places"] = list(zip(rounding_places[::2], rounding_places[1::2], strict=True))
    if chosen == "triton":
        from cgpt_ext.triton.adamw import adamw_triton as run
    else:
        run = adamw_ref
    run(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps[0] if len(steps) == 1 else steps or step,
        lr=lr if lr_tensor is None else lr_tensor,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        masters=masters or None,
        lows=lows or None,
        grad_scale=grad_scale,
        maximize=maximize,
        **stochastic,
    )


_step = register(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] steps,"
    " int step, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay,"
    " Tensor(d!)[] masters, Tensor(e!)[] lows, Tensor? grad_scale, bool maximize, int? seed,"
    " Tensor? seed_tensor, int[]? rounding_places) -> ()",
    _launch,
    lambda *args: None,
)
