"""Drop-in optimizer: torch's constructor, state names and state_dict, this package's kernels inside."""

from collections import defaultdict
from itertools import chain

import torch
from torch import Tensor

from cgpt_ext.ops.adamw import adamw_, join_master, split_master

MASTERS = ("fp32", "split", None)
# Keys of parameter groups that torch's have not. Where they are what they are by default a group is without them, as
# who loads a file of torch's by the group's keys (torch.distributed.checkpoint, torchtitan) would miss them in it.
OWN = {"master": "fp32", "stochastic_rounding_seed": None}


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
    optimizer state, or starts a new optimizer. A master that torch.optim.AdamW carried along in its state while it
    trained the weights is known by its dtype, which torch changes, and made anew.

    `foreach` and `capturable` are accepted and change nothing: a step is always fused, reads `step` on the device and
    waits for nothing. `fused` says, as in torch, who serves GradScaler: with True the step itself unscales and, on the
    device, leaves out an overflow; else GradScaler unscales first, waits for its finding and leaves out the step. Only
    so do Lightning's mixed precisions clip.

    DTensor parameters (FSDP2, tensor parallel) step on their local shards, and their state is sharded as they are. Of a
    split master save the sharded state: gloo and NCCL gather no int16, so there is no `full_state_dict`.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch's. `lr` may be a tensor, read at every step.
        amsgrad, differentiable: not served.
        master: see above; also a key of parameter groups, which leave it out where it is "fp32" for all.
        stochastic_rounding_seed: an int, for `master=None` alone; also a key of parameter groups. The random bits are a
            function of it, the step and the element (`cgpt_ext.adamw_`), so a resumed run repeats them.

    Raises:
        ValueError: for amsgrad, differentiable, an unknown master, a split master of fp16, a seed beside a master, a
            number out of range.
        TypeError: for parameters or gradients in another dtype than fp32, bf16, fp16.
    """

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
        self._set_amp_scaling()
        for group in self.param_groups:
            _check_group(group, self.defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if "master" in self.defaults:  # torch's constructor adds the first groups before that
            try:
                _check_group(self.param_groups[-1], self.defaults)
            except ValueError:
                self.param_groups.pop()
                raise

    def __setstate__(self, state):
        super().__setstate__(state)
        self._set_amp_scaling()
        for group in self.param_groups:
            _check_group(group, self.defaults)

    def _set_amp_scaling(self):
        # Where true, GradScaler hands over grad_scale and found_inf instead of unscaling first.
        self._step_supports_amp_scaling = bool(self.defaults.get("fused"))

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
                if not isinstance(value, Tensor):
                    continue
                dtype = torch.int16 if key == "low" else torch.float32
                if key in ("master", "low") and value.dtype != dtype:
                    del self.state[param][key]  # torch cast it to the parameter's dtype and then trained without it
                else:
                    self.state[param][key] = value.to(param.device, dtype)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step with every parameter that has a gradient; returns what `closure` returns, if given."""
        if hasattr(self, "_accelerator_graph_capture_health_check"):
            self._accelerator_graph_capture_health_check()
        else:  # its name before it served other accelerators too
            self._cuda_graph_capture_health_check()
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
            kept = self._prepare(param, _own(group, "master"))
            if not kept and param.dtype == torch.bfloat16 and _own(group, "stochastic_rounding_seed") is not None:
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
            fp32 = param.detach().float() if low is None else join_master(_local(param), _local(low))
            state["master"] = _sharded(fp32, param)
        if kept == "low" and "low" not in state:
            fp32 = state.pop("master", None)
            if fp32 is None:
                state["low"] = torch.zeros_like(param, dtype=torch.int16)
            else:
                high, low = split_master(_local(fp32))
                state["low"] = _sharded(low, param)
                _local(param).copy_(high)
        if not kept:  # one of an earlier setting would be stale by the time it is asked for again
            state.pop("master", None)
            state.pop("low", None)
        return kept

    def _step_group(self, group, params, kept, grad_scale, found_inf, place):
        states = [self.state[param] for param in params]
        shards = [_local(param) for param in params]
        layout = [_layout(shard) for shard in shards]
        weights = [_like(shard, to) for shard, to in zip(shards, layout, strict=True)]
        parts = {}
        for key in ("exp_avg", "exp_avg_sq", *([kept] if kept in ("master", "low") else [])):
            parts[key] = [_local(state[key]) for state in states]
            for i, (part, to) in enumerate(zip(parts[key], layout, strict=True)):
                parts[key][i] = _like(part, to)  # a loaded state may be laid out otherwise
                if parts[key][i] is not part:
                    states[i][key] = _sharded(parts[key][i], params[i])
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
            [_like(_local_grad(param), to) for param, to in zip(params, layout, strict=True)],
            parts["exp_avg"],
            parts["exp_avg_sq"],
            counted,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            masters=parts.get("master"),
            lows=parts.get("low"),
            grad_scale=grad_scale,
            maximize=group["maximize"],
            # Groups step in calls of their own, and calls of one seed would share their random bits.
            stochastic_rounding_seed=group["stochastic_rounding_seed"] + place if kept == "stochastic" else None,
        )
        for shard, weight in zip(shards, weights, strict=True):
            if weight is not shard:
                shard.copy_(weight)


def _own(group, key):
    return group.get(key, OWN[key])


def _check_group(group, defaults):
    for key, default in OWN.items():
        if group.setdefault(key, defaults.get(key, default)) == defaults.get(key, default) == default:
            del group[key]
    master, seed = _own(group, "master"), _own(group, "stochastic_rounding_seed")
    if master not in MASTERS:
        raise ValueError(f"AdamW: master must be 'fp32', 'split' or None, got {master!r}")
    if seed is not None and master is not None:
        raise ValueError(f"AdamW: stochastic_rounding_seed must be None with master {master!r}, got {seed}")
    for name in ("amsgrad", "differentiable"):
        if group[name]:
            raise ValueError(f"AdamW: {name} must be False, got {group[name]}")


def _local(x: Tensor) -> Tensor:
    """The shard of a DTensor that this process has, in the DTensor's own memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def _local_grad(param: Tensor) -> Tensor:
    grad = param.grad
    if hasattr(param, "to_local") and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return _local(grad)


def _sharded(x: Tensor, param: Tensor) -> Tensor:
    """`x`, a state of this process's shard of `param`, as a DTensor beside it where `param` is one."""
    if hasattr(x, "to_local") or not hasattr(param, "to_local"):
        return x
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def _layout(param: Tensor) -> tuple[int, ...]:
    """The strides to compute in: the parameter's own where it is dense, else those it has without its gaps."""
    return param.stride() if param.is_contiguous() else torch.empty_like(param, device="meta").stride()


def _like(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` itself where it has these strides, else a copy that has."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
