"""Drop-in optimizer: torch's constructor, state names and state_dict, this package's kernels inside."""

from collections import defaultdict
from itertools import chain

import torch
from torch import Tensor

from cgpt_ext.ops.adamw import adamw_, join_master, split_master

MASTERS = ("fp32", "split", None)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019, arXiv 1711.05101) on the `adamw` kernels.

    The state of a parameter is `step` (fp32, 0-d, on its device), `exp_avg` and `exp_avg_sq` (fp32, laid out as the
    parameter), so state_dicts go to and from `torch.optim.AdamW`. A bf16 or fp16 parameter also has the fp32 weight
    that small steps add up in, by `master`:

    - `"fp32"`: state `master`, an fp32 copy; the parameter is the copy rounded to nearest even.
    - `"split"`: state `low`, the int16 half that together with the bf16 parameter is the fp32 weight (see
      `cgpt_ext.split_master`): 2 bytes less a parameter. bf16 only.
    - `None`: nothing, as torch: steps below half the weight's last bit are lost, unless `stochastic_rounding_seed` is
      given: bf16 parameters are then rounded up or down at random, so that such steps add up on average.

    A master is made from its parameter at the first step. Whoever overwrites the weights later also loads a fitting
    optimizer state, or starts a new optimizer.

    `fused`, `foreach` and `capturable` are accepted and change nothing: a step is always fused, reads `step` and the
    loss scale on the device and waits for nothing. GradScaler is served as by torch's fused step: an overflow
    leaves parameters and state as they are.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch's. `lr` may be a tensor, read at every step.
        amsgrad, differentiable: not served.
        master: see above; also a key of parameter groups.
        stochastic_rounding_seed: an int, for `master=None` alone; also a key of parameter groups. The random bits are a
            function of it, the step and the element (`cgpt_ext.adamw_`), so a resumed run repeats them.

    Raises:
        ValueError: for amsgrad, differentiable, an unknown master, a split master of fp16, a seed beside a master, a
            number out of range.
        TypeError: for parameters or gradients in another dtype than fp32, bf16, fp16.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of unscaling first

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master: str | None = "fp32",
        stochastic_rounding_seed: int | None = None,
    ):
        for name, value in (("amsgrad", amsgrad), ("differentiable", differentiable)):
            if value:
                raise ValueError(f"AdamW: {name} must be False, got {value}")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self.defaults.update(master=master, stochastic_rounding_seed=stochastic_rounding_seed)
        for group in self.param_groups:
            _check_group(group, self.defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if "master" in self.defaults:  # torch's constructor adds the first groups before that
            _check_group(self.param_groups[-1], self.defaults)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            _check_group(group, self.defaults)

    def load_state_dict(self, state_dict):
        """Loads a state_dict, of torch.optim.AdamW too; each state keeps its own dtype, where torch would cast it."""
        taken = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, given: taken.update(given))  # the last to see it
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        names = chain.from_iterable(group["params"] for group in taken["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, param in zip(names, params, strict=True):
            for key, value in taken["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    dtype = value.dtype if key == "low" else torch.float32
                    self.state[param][key] = value.to(param.device, dtype)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step with every parameter that has a gradient; returns what `closure` returns, if given."""
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for place, group in enumerate(self.param_groups):
            for (device, kept), params in self._by_kernel(group).items():
                scale = None if grad_scale is None else grad_scale.to(device).double().reciprocal().float().reshape(())
                self._step_group(group, params, kept, scale, found_inf, place)
        return loss

    def _by_kernel(self, group) -> dict[tuple[torch.device, str], list[Tensor]]:
        """The parameters that have gradients, by device and by what keeps small steps: a state, "stochastic" or ""."""
        found = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise ValueError("AdamW: gradients must be dense, got a sparse one")
            kept = self._prepare(param, group["master"])
            if not kept and param.dtype == torch.bfloat16 and group["stochastic_rounding_seed"] is not None:
                kept = "stochastic"
            found[param.device, kept].append(param)
        return found

    def _prepare(self, param, master) -> str:
        state = self.state[param]
        low_precision = param.dtype in (torch.bfloat16, torch.float16)
        kept = "" if not low_precision or master is None else "low" if master == "split" else "master"
        if kept == "low" and param.dtype != torch.bfloat16:
            raise ValueError("AdamW: master must be 'fp32' or None for float16 parameters, got 'split'")
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        if state["step"].device != param.device:
            state["step"] = state["step"].to(param.device)
        if kept == "master" and "master" not in state:
            low = state.pop("low", None)
            state["master"] = param.detach().float() if low is None else join_master(param, low)
        if kept == "low" and "low" not in state:
            fp32 = state.pop("master", None)
            if fp32 is None:
                state["low"] = torch.zeros_like(param, dtype=torch.int16)
            else:
                high, state["low"] = split_master(fp32)
                param.copy_(high)
        return kept

    def _step_group(self, group, params, kept, grad_scale, found_inf, place):
        states = [self.state[param] for param in params]
        layout = [_layout(param) for param in params]
        weights = [_like(param, to) for param, to in zip(params, layout, strict=True)]
        for key in ("exp_avg", "exp_avg_sq", *([kept] if kept in ("master", "low") else [])):
            for state, to in zip(states, layout, strict=True):
                state[key] = _like(state[key], to)  # a loaded state may be laid out otherwise
        steps = [state["step"] for state in states]
        if found_inf is None:
            torch._foreach_add_(steps, 1)
            counted = steps
        else:
            go = (found_inf.to(steps[0].device) == 0).float().reshape(())
            torch._foreach_add_(steps, go)
            counted = torch._foreach_mul(steps, go)  # the kernel leaves parameters at step 0 alone
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(()) if lr.device == params[0].device else float(lr)
        adamw_(
            weights,
            [_like(param.grad, to) for param, to in zip(params, layout, strict=True)],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            counted,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            masters=[state["master"] for state in states] if kept == "master" else None,
            lows=[state["low"] for state in states] if kept == "low" else None,
            grad_scale=grad_scale,
            maximize=group["maximize"],
            # Groups step in calls of their own, and calls of one seed would share their random bits.
            stochastic_rounding_seed=group["stochastic_rounding_seed"] + place if kept == "stochastic" else None,
        )
        for param, weight in zip(params, weights, strict=True):
            if weight is not param:
                param.copy_(weight)


def _check_group(group, defaults):
    if group.setdefault("master", defaults.get("master", "fp32")) not in MASTERS:
        raise ValueError(f"AdamW: master must be 'fp32', 'split' or None, got {group['master']!r}")
    seed = group.setdefault("stochastic_rounding_seed", defaults.get("stochastic_rounding_seed"))
    if seed is not None and group["master"] is not None:
        raise ValueError(f"AdamW: stochastic_rounding_seed must be None with master {group['master']!r}, got {seed}")
    for name in ("amsgrad", "differentiable"):
        if group[name]:
            raise ValueError(f"AdamW: {name} must be False, got {group[name]}")


def _layout(param: Tensor) -> tuple[int, ...]:
    """The strides to compute in: the parameter's own where it is dense, else those it has without its gaps."""
    return param.stride() if param.is_contiguous() else torch.empty_like(param, device="meta").stride()


def _like(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` itself where it has these strides, else a copy that has."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
