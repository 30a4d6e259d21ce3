"""What `cgpt plan` prints: for programs, and for people."""

from __future__ import annotations

from dataclasses import asdict

from cgpt.planning.memory import Found, Problem
from cgpt.stream.forecast import exposed_optimizer
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.hardware import DRIVE, NETWORKS
from cgpt.stream.limits import bytes_text
from cgpt.stream.placement import TIERS


def to_dict(found: Found) -> dict:
    """JSON values; `cgpt plan --json` prints them."""
    problem, setting, place, walk = found.problem, found.setting, found.placement, found.forecast
    budgets, parts = problem.budgets, found.account
    plans = gpt_plans(problem.shape)
    return {
        "model": problem.model,
        "parameters": problem.shape.n_params,
        "device": problem.hardware.name,
        "count": problem.count,
        "node": problem.node,
        "precision": problem.format.precision,
        "moments": problem.format.moments,
        "tokens_per_step": problem.tokens_per_step,
        "visits": setting.visits,
        "tokens_per_visit": found.tokens_per_visit,
        "micro_batch_tokens": setting.micro_batch_tokens,
        "layers": [
            {"name": plan.name, "weights": weights, "state": state, "recompute": again}
            for plan, weights, state, again in zip(plans, place.weights, place.state, place.recompute, strict=True)
        ],
        "activations": place.activations,
        "memory": {
            "device": {"bytes": parts.device, "budget": budgets.device, "parts": parts.device_parts},
            "host": {"bytes": parts.host, "budget": budgets.host, "parts": parts.host_parts},
            "disk": {"bytes": parts.disk, "budget": budgets.disk},
        },
        "forecast": {
            "seconds": walk.seconds,
            "tokens_per_second": found.speed,
            "model_flops_per_second": found.model_flops,
            "mfu": found.model_flops / problem.hardware.peak,
            "binding": walk.binding,
            "bound": walk.bound,
            "lanes": walk.lanes,
            "stalls": walk.stalls,
            "fill": walk.fill,
            "exposed_optimizer": exposed_optimizer(plans, place, problem.rates, found.work),
            "hides_from_tokens": found.hides_from,
        },
        "disk": {
            "read_bytes": walk.disk_read,
            "written_bytes": walk.disk_written,
            "drive_days": found.drive_days,
        },
        "rates": asdict(problem.rates) | ({"wire": None} if problem.count == 1 else {}),
        "sources": sources(problem),
    }


def sources(problem: Problem) -> dict[str, str]:
    """Where the assumed rates come from."""
    found = {"device": problem.hardware.source, "link": problem.link.source, "disk": DRIVE.source}
    if problem.count > 1:
        if problem.sharing > 1:
            found["peers"] = NETWORKS[problem.hardware.peers].source
        if problem.count > problem.node:
            found["network"] = problem.network.source
    return found


def show(found: Found) -> str:
    """For people: the answer first, then what it rests on."""
    row = to_dict(found)
    problem, setting, walk = found.problem, found.setting, row["forecast"]
    each = "" if problem.count == 1 else " a device"
    lines = {
        "model": f"{row['model']}, {row['parameters']:,} parameters in {row['precision']}, moments in "
        f"{row['moments']}, on {machines(problem)}",
        "step": f"{walk['seconds']:.4g} s for {row['tokens_per_step']:,} tokens: {walk['tokens_per_second']:,.0f} "
        f"tokens/s, {walk['model_flops_per_second'] / 1e12:.4g} model TFLOP/s{each}, {100 * walk['mfu']:.1f} % of "
        "the peak",
        "bound by": _binding(found),
        "visit": f"{row['tokens_per_visit']:,} tokens{each} in {setting.micro_batches} micro-batches, {row['visits']} "
        f"visit{'s' * (row['visits'] > 1)} a step; activations on the {row['activations']}, "
        f"{sum(layer['recompute'] for layer in row['layers'])} of {len(row['layers'])} layers recomputed",
        "state": _tiers([layer["state"] for layer in row["layers"]]),
        "weights": _tiers([layer["weights"] for layer in row["layers"]]),
    }
    for tier, memory in row["memory"].items():
        if memory["bytes"]:
            parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in memory.get("parts", {}).items())
            of = f"{bytes_text(memory['bytes'], up=True)} of {bytes_text(memory['budget'])}"
            lines[tier] = of + (f": {parts}" if parts else "")
    lines["lanes"] = ", ".join(f"{lane} {seconds:.4g} s" for lane, seconds in walk["lanes"].items() if seconds)
    lines["exposed"] = f"optimizer {walk['exposed_optimizer']:.3g} s, before the first block {walk['fill']:.3g} s"
    if row["disk"]["drive_days"]:
        lines["wear"] = (
            f"{row['disk']['written_bytes'] / 1e12:.3g} TB written a step; {row['disk']['drive_days']:,.0f} days of a "
            f"drive's rated life"
        )
    lines["assumed"] = assumed(problem)
    lines["sources"] = "; ".join(source for name, source in row["sources"].items() if name != "disk")
    return "\n".join(f"{name:9} {text}" for name, text in lines.items())


def machines(problem: Problem) -> str:
    """What a step is done on, such as 16 x NVIDIA H100 SXM, 8 a machine."""
    if problem.count == 1:
        return problem.hardware.name
    together = f", {problem.sharing} a machine" if problem.sharing > 1 else ""
    return f"{problem.count} x {problem.hardware.name}{together}"


def assumed(problem: Problem) -> str:
    """A device's rates."""
    rates = problem.rates
    told = (
        f"{rates.flops / 1e12:.4g} TFLOP/s sustained of {problem.hardware.peak / 1e12:.4g}, link "
        f"{rates.down / 1e9:.3g} GB/s each way, host memory {rates.memory / 1e9:.3g} GB/s"
    )
    if problem.count > 1:
        told += f", {rates.wire / 1e9:.3g} GB/s from the other devices and {1e3 * rates.wire_latency:.3g} ms a call"
        if problem.sharing > 1:
            told += f"; the {problem.sharing} devices of a machine share its host memory and disk"
    return told


def _binding(found: Found) -> str:
    walk = found.forecast
    if walk.binding == "compute":
        return "compute: everything else hides behind it"
    text = f"{walk.binding}: the arithmetic waits {walk.stalls[walk.binding]:.3g} s for it"
    known = {lane: tokens for lane, tokens in found.hides_from.items() if lane.startswith(walk.binding)}
    if max(known.values(), default=0) <= found.tokens_per_visit:  # it hides but at the ends of visits
        return text
    lane = max(known, key=known.get)
    return f"{text}; {lane} hides from {known[lane]:,.0f} tokens a visit"


def _tiers(words: list[str]) -> str:
    counts = {tier: words.count(tier) for tier in TIERS if tier in words}
    return ", ".join(f"{count} layers on the {tier}" for tier, count in counts.items())
