"""What `cgpt plan --count 1..4096` prints and draws: for programs, for people, and a picture."""

from __future__ import annotations

from pathlib import Path

from cgpt.pictures import COLOURS, blank, check_plot, plain, write
from cgpt.planning.curve import LINEAR, Curve, Row
from cgpt.planning.memory_report import assumed, machines, sources
from cgpt.stream.placement import TIERS, Placement

REASONS = {  # in the order of the picture's colours
    "compute": "the arithmetic, as it should be",
    "wire": "the rate of the network between devices",
    "latency": "the latency of calls between devices",
    "batch": "micro-batches that do not divide evenly among devices",
    "memory": "the device's memory: activations are computed again to make room for larger micro-batches",
    "down": "the link to the device",
    "up": "the link from the device",
    "optimizer": "the host's memory, for AdamW",
    "read": "the disk, read",
    "write": "the disk, written",
}


def placed(placement: Placement) -> str:
    """Of the layers, in a few words."""
    count, streamed = len(placement.weights), sum(at != "device" for at in placement.weights)
    homes = [home for home in placement.state if home != "device"]
    tiers = " and ".join(tier for tier in TIERS if tier in homes)
    told = f"state of {len(homes)} of {count} on {tiers}" if homes else "resident"
    if streamed:
        told = f"streamed {streamed} of {count}"
    again = sum(placement.recompute)
    return f"{told}, {again} recomputed" if again else told


def to_dict(found: Curve) -> dict:
    """JSON values; `cgpt plan --count 1..64 --json` prints them."""
    asked, bent = found.problem, found.bent
    return {
        "model": asked.model,
        "parameters": asked.shape.n_params,
        "device": asked.hardware.name,
        "node": asked.node,
        "tokens_per_step": asked.tokens_per_step,
        "sequences_per_step": asked.sequences,
        "counts": [_row(row) for row in found.rows],
        "linear_until": found.linear_until.count,
        "bent": bent and {"count": bent.count, "efficiency": bent.efficiency, "binding": bent.binding},
        "sources": sources(asked),
    }


def _row(row: Row) -> dict:
    if row.found is None:
        return {"count": row.count, "fits": False, "why": row.why}
    found, rates = row.found, row.found.problem.rates
    setting, place, walk = found.setting, found.placement, found.forecast
    return {
        "count": row.count,
        "fits": True,
        "seconds": walk.seconds,
        "tokens_per_second": found.speed,
        "speed_up": row.speed_up,
        "efficiency": row.efficiency,
        "model_flops_per_second": found.model_flops,
        "mfu": found.model_flops / found.problem.hardware.peak,
        "binding": row.binding,
        "costs": row.costs,
        "lanes": walk.lanes,
        "stalls": walk.stalls,
        "placement": placed(place),
        "activations": place.activations,
        "recomputed": sum(place.recompute),
        "micro_batch_tokens": setting.micro_batch_tokens,
        "micro_batches": setting.micro_batches,
        "visits": setting.visits,
        "bytes": {"device": found.account.device, "host": found.account.host, "disk": found.account.disk},
        "wire": {
            "bytes_per_second": None if row.count == 1 else rates.wire,
            "seconds_per_call": rates.wire_latency,
            "hides_from_tokens": {k: v for k, v in found.hides_from.items() if k.startswith("wire")},
        },
    }


def show(found: Curve) -> str:
    """For people: the table, where it bends and why, and what that rests on."""
    asked = found.problem
    head = f"{'devices':>7} {'step s':>9} {'tokens/s':>12} {'speed-up':>8} {'efficiency':>10} {'TFLOP/s each':>12}"
    head += f" {'of peak':>7}  {'bound by':9}  {'step of each':12}  placement"
    lines = [
        f"{asked.model}, {asked.shape.n_params:,} parameters on {asked.hardware.name}s; {asked.tokens_per_step:,} "
        f"tokens a step, {asked.sequences:,} sequences; each device's in visits x micro-batches x sequences",
        "",
        head,
    ]
    for row in found.rows:
        if row.found is None:
            lines.append(f"{row.count:7,} {row.why.partition('; nearest')[0]}")
            continue
        setting, flops = row.found.setting, row.found.model_flops
        step = f"{setting.visits} x {setting.micro_batches} x {setting.micro_batch_tokens // asked.shape.seq_len}"
        lines.append(
            f"{row.count:7,} {row.found.forecast.seconds:9.4g} {row.found.speed:12,.0f} {row.speed_up:8.4g} "
            f"{row.efficiency:10.1%} {flops / 1e12:12.4g} {flops / asked.hardware.peak:7.1%}  {row.binding:9}  "
            f"{step:12}  {placed(row.found.placement)}"
        )
    return "\n".join(
        [*lines, "", *verdict(found), f"assumed   {assumed(asked)}, at {machines(asked)}", _sources(found)]
    )


def verdict(found: Curve) -> list[str]:
    """Where it stops being linear, for want of what; and what else binds on the way."""
    last, bent = found.linear_until, found.bent
    if bent is None:
        told = [f"linear    to {last.count:,} devices, as far as asked: {last.efficiency:.1%} of the best speed each"]
    else:
        told = [
            f"linear    to {last.count:,} devices; from {bent.count:,} on below {LINEAR:.0%} of the best speed each "
            f"({bent.efficiency:.1%}), held by {bent.binding}: {REASONS[bent.binding]}"
        ]
    bound = dict.fromkeys(row.binding for row in found.fitting)
    told += [f"{name:9} {REASONS[name]}" for name in bound if name != "compute"]
    return told


def _sources(found: Curve) -> str:
    return "sources   " + "; ".join(source for name, source in sources(found.problem).items() if name != "disk")


def plot(found: Curve, path: Path) -> Path:
    """Draws tokens/s of all devices and each one's share of the best into `path` (.png, .svg or .pdf), coloured by what
    binds. Returns the path. Raises InputError for another ending, OSError naming the file."""
    check_plot(path)
    figure = blank(10, 4.5)
    speed, share = figure.subplots(1, 2)
    rows = found.fitting
    counts = [row.count for row in rows]
    best = max(row.found.speed / row.count for row in rows)
    speed.plot(counts, [best * count for count in counts], color="0.6", linestyle="--", label="linear")
    speed.plot(counts, [row.found.speed for row in rows], color="0.3", linewidth=1.0)
    share.plot(counts, [100 * row.efficiency for row in rows], color="0.3", linewidth=1.0)
    share.axhline(100 * LINEAR, color="0.6", linestyle="--")
    for colour, name in zip((*COLOURS, "0.75", "tab:brown"), REASONS, strict=True):
        mine = [row for row in rows if row.binding == name]
        if not mine:
            continue
        xs, style = [row.count for row in mine], {"s": 36, "color": colour, "zorder": 3}
        speed.scatter(xs, [row.found.speed for row in mine], label=f"bound by {name}", **style)
        share.scatter(xs, [100 * row.efficiency for row in mine], **style)
    if found.bent is not None:
        share.annotate(
            f"below {LINEAR:.0%} from {found.bent.count:,} on: {found.bent.binding}",
            (found.bent.count, 100 * found.bent.efficiency),
            xytext=(0.05, 0.08),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "->", "color": "0.4"},
        )
    speed.set(xscale="log", yscale="log", ylabel="tokens/s of all devices")
    share.set(xscale="log", ylim=(0, 105), ylabel="% of the best speed a device")
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("devices")
        plain(axes)
    speed.legend(frameon=False, fontsize=9)
    asked = found.problem
    figure.suptitle(f"{asked.model} on {asked.hardware.name}s, {asked.tokens_per_step:,} tokens a step", fontsize=11)
    return write(figure, path)
