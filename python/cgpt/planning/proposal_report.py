"""What `cgpt plan` prints and draws of a proposal: for programs, for people, and a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from cgpt.metrics import human
from cgpt.model.presets import GPT2_VOCAB
from cgpt.pictures import blank, check_plot, plain, write
from cgpt.planning.memory_report import sources as memory_sources
from cgpt.planning.proposal import Proposal, mup_settings
from cgpt.scaling.budget import HOUR
from cgpt.scaling.flops import PF_DAY
from cgpt.scaling.law_files import FittedLaw
from cgpt.scaling.laws import LAWS
from cgpt.scaling.planner import Point, interval, of_family
from cgpt.scaling.published import PUBLISHED
from cgpt.stream.limits import bytes_text
from cgpt.stream.placement import TIERS

DAY, YEAR = 24 * HOUR, 365.25 * 24 * HOUR
OFF = 0.03  # of what was wanted, from which on it is said
FITTED = {  # FLOPs of the runs behind a law
    "cerebras": (2.6e18, 2.3e22),
    "cerebras-mup": (2.6e18, 1.1e21),
    "chinchilla": (6e18, 3e21),
    "chinchilla-refit": (6e18, 3e21),
}
DRAWN = ("cerebras", "chinchilla", "chinchilla-refit", "kaplan")
DATA = {"cerebras": "the Pile", "chinchilla": "MassiveText", "chinchilla-refit": "MassiveText", "kaplan": "WebText2"}


def to_dict(found: Proposal) -> dict:
    """JSON values; `cgpt plan --json` prints them. tokens · flops_per_token = flops, exactly."""
    point, training, spent = found.point, found.training, found.cost
    low, high, basis = interval(point)
    params = found.shape.n_params
    return {
        "name": found.name,
        "wanted": {name: value for name, value in vars(found.wanted).items() if value is not None},
        "params": params,
        "tokens": training.tokens,
        "tokens_per_param": training.tokens / params,
        "flops": found.flops,
        "flops_per_token": found.flops_per_token,
        "flops_per_param_and_token": found.flops_per_token / params,
        "flops_6n": 6 * params * training.tokens,
        "pf_days": found.flops / PF_DAY,
        "loss": float(point.loss),
        "loss_interval": [float(low), float(high)],
        "law": {"name": point.law.name, "source": point.law.source, "interval": basis},
        "shape": found.shape.to_dict(),
        "seq_len": found.shape.seq_len,
        "batch_schedule": [list(pair) for pair in training.batch_schedule],
        "steps": training.steps,
        "lr": training.lr,
        "warmup_tokens": training.warmup_tokens,
        "decay": training.decay,
        "min_lr_ratio": training.min_lr_ratio,
        "adam_eps": training.adam_eps,
        "mup": mup_settings(found.shape),
        "device": found.device,
        "count": found.count,
        "utilisation": found.utilisation,
        "utilisation_source": found.reason,
        "time": {
            "seconds": spent.seconds,
            "hours": spent.seconds / HOUR,
            "days": spent.seconds / DAY,
            "device_hours": spent.device_seconds / HOUR,
        },
        "energy": {"kwh": spent.joules / 3.6e6, "watts_per_device": found.hardware.watts},
        "money": {"usd": spent.usd, "usd_per_device_hour": found.hardware.usd},
        "checkpoint": {"bytes": found.checkpoint_bytes, "export_bytes": found.export_bytes},
        "streams": _streams(found),
        "options": [{"name": name, **_option(found, option)} for name, option in found.options.items()],
        "inference": None if found.life is None else {"law": found.life[0].name, **found.life[1].to_dict()},
        "notes": notes(found),
        "sources": {
            **(memory_sources(found.found.problem) if found.found else {"device": found.hardware.source}),
            "cost": found.hardware.cost_source,
        },
    }


def notes(found: Proposal) -> list[str]:
    """What a reader should know before trusting the numbers."""
    said, params = [], found.shape.n_params
    off = params / found.best - 1
    if abs(off) > OFF:
        sought = "those asked for" if found.wanted.params is not None else f"the {_many(found.best)} looked for"
        more = "more" if off > 0 else "fewer"
        said.append(f"the nearest shape has {params:,} parameters, {100 * abs(off):.0f} % {more} than {sought}")
    least, most = FITTED.get(found.law.name, (0.0, math.inf))
    if not least / 2 < found.flops < 2 * most:
        said.append(f"{found.law.name} was fitted from {least:.2g} to {most:.2g} FLOPs: this is an extrapolation")
    if found.point.loss > math.log(found.shape.vocab_size):
        guess = math.log(found.shape.vocab_size)
        said.append(f"guessing among the vocabulary costs {guess:.2f} nats a token: the law does not reach down here")
    if found.shape.vocab_size != GPT2_VOCAB and not isinstance(found.law, FittedLaw):
        said.append(f"{found.law.name} tells the loss per token of its own data and vocabulary, not of another")
    if found.count > 1:
        said.append(_between(found))
    forecast = found.forecast_utilisation
    if forecast is not None and forecast < 0.9 * found.utilisation:
        years = _duration(found.cost.seconds * found.utilisation / forecast)
        said.append(f"the forecast for this shape and machine is {100 * forecast:.1f} % of the peak: {years}")
    said.append("energy is the devices' own at full load; hosts and cooling come on top")
    return said


def _between(found: Proposal) -> str:
    """What is lost between devices, by the forecast."""
    if found.found is None:
        return f"{found.count} devices are taken to be {found.count} times one, for there is no forecast"
    walk = found.found.forecast
    lost = f"waits for the others {100 * walk.stalls['wire'] / walk.seconds:.1f} % of a step"
    taken = "" if found.reason.startswith("forecast") else ", which the utilisation taken does not know"
    return f"by forecast each of {found.count} devices {lost}{taken}"


def show(found: Proposal) -> str:
    """For people: the answer first, then what else could be done, then what it rests on."""
    row = to_dict(found)
    shape, time = found.shape, row["time"]
    low, high = row["loss_interval"]
    batches = ", then ".join(
        f"{batch} sequence{'s' * (batch > 1)}" + (f" from {_many(start)} tokens on" if start else "")
        for start, batch in row["batch_schedule"]
    )
    one = f"{found.hardware.name}" if found.count == 1 else f"{found.count} x {found.hardware.name}"
    mup = row["mup"]
    params, law = row["params"], row["law"]
    lines = {
        "model": f"{_many(params)} parameters ({params:,}): {shape.n_layer} layers, width {shape.d_model}, "
        f"{shape.n_head} head{'s' * (shape.n_head > 1)} of {shape.d_head}, vocabulary {shape.vocab_size}",
        "tokens": f"{_many(row['tokens'])}, {row['tokens_per_param']:.3g} a parameter, in sequences of {shape.seq_len}",
        "loss": f"{row['loss']:.3f} nats a token, {low:.3f} to {high:.3f} ({law['name']}: {law['interval']})",
        "compute": f"{row['flops']:.3g} FLOPs, {row['pf_days']:.3g} PF-days; {row['flops_per_token']:.3g} a token by "
        f"the published convention, {6 * params:.3g} by 6 N",
        "time": f"{_duration(time['seconds'])} on {one} at {100 * found.utilisation:.1f} % of the peak "
        f"({found.reason}): {time['device_hours']:,.4g} device-hours",
        "cost": f"{row['energy']['kwh']:,.4g} kWh at {found.hardware.watts:g} W, {row['money']['usd']:,.4g} USD at "
        f"{found.hardware.usd:g} an hour",
        "memory": _memory(found),
        "disk": f"checkpoint {bytes_text(found.checkpoint_bytes)}, weights in fp32 {bytes_text(found.export_bytes)}",
        "batch": f"{batches}; {row['steps']:,} steps",
        "rate": f"lr {row['lr']:g} after {_many(row['warmup_tokens'])} tokens of warm-up, {row['decay']} to "
        f"{row['lr'] * row['min_lr_ratio']:g}; AdamW eps {row['adam_eps']:g} (on the published models' line)",
        "muP": f"lr {mup['lr']:g}, {mup['hidden_lr']:.3g} in the blocks; init {mup['embedding_init_std']:g} and "
        f"{mup['hidden_init_std']:.3g}; embeddings x {mup['embedding_scale']:g}, logits x {mup['logits_scale']:.3g} "
        "(cgpt train --parametrization mup)",
    }
    told = [f"{name:9} {text}" for name, text in lines.items()]
    told += ["", *_table(found, row)]
    told += ["", *(f"note: {note}" for note in row["notes"])]
    rates = [row["sources"][name] for name in ("device", "peers", "network", "cost") if name in row["sources"]]
    told.append("sources: " + "; ".join([row["law"]["source"], *rates]))
    return "\n".join(told)


def plot(found: Proposal, path: Path) -> Path:
    """Draws loss over training FLOPs into `path` (.png, .svg or .pdf): the laws' frontiers, the seven, the plan.

    Returns the path. Raises InputError for another ending, OSError naming the file.
    """
    check_plot(path)
    figure = blank(8, 5)
    axes = figure.add_subplot()
    ends = [PUBLISHED[0].flops, PUBLISHED[-1].flops, found.flops]
    budgets = np.geomspace(min(ends) / 5, max(ends) * 10, 60)
    for name, law in {**{name: LAWS[name] for name in DRAWN}, found.law.name: found.law}.items():
        counted = of_family(law, found.family)
        losses = [counted.loss_at_compute(flops) for flops in budgets]
        told = f"{name}, of {DATA[name]}" if name in DATA else name
        axes.plot(budgets, losses, linewidth=2.0 if law is found.law else 1.1, label=told)
    xs, ys = [row.flops for row in PUBLISHED], [row.loss for row in PUBLISHED]
    axes.scatter(xs, ys, s=22, color="0.25", zorder=3, label="published, 20 tokens a parameter")
    for row in PUBLISHED:
        axes.annotate(row.name, (row.flops, row.loss), xytext=(4, 5), textcoords="offset points", fontsize=8)
    loss = float(found.point.loss)
    low, high, _ = interval(found.point)
    told = f"{found.name} on {_many(found.training.tokens)} tokens: {loss:.3f}"
    error = [[loss - low], [high - loss]]
    axes.errorbar(
        [found.flops], [loss], error, fmt="*", markersize=13, color="tab:red", capsize=3, zorder=4, label=told
    )
    axes.set(
        xscale="log", xlabel="training FLOPs, published convention", ylabel="loss, nats per token of each law's data"
    )
    plain(axes)
    axes.legend(frameon=False, fontsize=9)
    return write(figure, path)


def _streams(found: Proposal) -> dict:
    if found.found is None:
        return {"fits": False, "why": found.refusal}
    place, parts, walk = found.found.placement, found.found.account, found.found.forecast
    return {
        "fits": True,
        "streamed": found.streams,
        "state": {tier: place.state.count(tier) for tier in TIERS},
        "weights": {tier: place.weights.count(tier) for tier in TIERS},
        "activations": place.activations,
        "bytes": {"device": parts.device, "host": parts.host, "disk": parts.disk},
        "tokens_per_visit": found.found.tokens_per_visit,
        "visits": found.found.setting.visits,
        "tokens_per_second": found.found.speed,
        "tokens_per_second_each": found.found.speed / found.count,
        "mfu": found.found.model_flops / found.hardware.peak,
        "binding": walk.binding,
    }


def _memory(found: Proposal) -> str:
    row = _streams(found)
    if not row["fits"]:
        each = "one device" if found.count == 1 else f"{found.count} devices"
        return f"does not fit {each}: {row['why']}"
    sizes = ", ".join(f"{tier} {bytes_text(row['bytes'][tier], up=True)}" for tier in TIERS if row["bytes"][tier])
    speed = f"{human(row['tokens_per_second_each'])} tokens/s each, {100 * row['mfu']:.1f} % MFU by forecast"
    if not row["streamed"]:
        return f"resident on each device: {sizes}; {speed}"
    state = ", ".join(f"{count} layers on the {tier}" for tier, count in row["state"].items() if count)
    return f"streams on each device: state of {state}; {sizes}; {speed}, bound by {row['binding']}"


def _option(found: Proposal, point: Point) -> dict:
    losses = {name: point.loss_by(of_family(law, found.family)) for name, law in found.laws.items()}
    if point is found.point:  # whose FLOPs per token are its shape's own
        losses[found.law.name] = float(point.loss)
    return {
        "params": point.params,
        "tokens": point.tokens,
        "tokens_per_param": point.tokens / point.params,
        "flops": point.flops,
        "loss": losses,
    }


def _table(found: Proposal, row: dict) -> list[str]:
    laws = list(found.laws)
    plan = {"name": "this plan", **_option(found, found.point)}
    rows = [plan, *row["options"]]
    if found.life is not None:
        law, life = found.life
        for name, of in (("cheapest over its life", life.best), ("the same at 20 a parameter", life.usual)):
            rows.append({"name": name, **_option(found, Point(of.params, of.tokens, law))})
    heads = "".join(f"{f'loss, {name}':>24}" for name in laws)
    lines = [f"{'':28}{'parameters':>12}{'tokens':>10}{'each':>9}{'FLOPs':>11}{heads}"]
    for each in rows:
        losses = "".join(
            f"{'-' if each['loss'][name] is None else format(each['loss'][name], '.3f'):>24}" for name in laws
        )
        lines.append(
            f"{each['name']:28}{_many(each['params']):>12}{_many(each['tokens']):>10}{each['tokens_per_param']:>9.3g}"
            f"{each['flops']:>11.3g}{losses}"
        )
    if found.life is None:
        return lines
    law, life = found.life
    share = life.best.flops / life.usual.flops
    return [
        *lines,
        f"over {_many(life.inference_tokens)} tokens of inference the cheapest of that quality ({law.name}) takes "
        f"{life.best.flops:.3g} FLOPs in all, {100 * share:.3g} % of what the one at 20 a parameter takes; "
        f"they break even at {_many(life.break_even)} tokens",
    ]


def _many(count: float) -> str:
    """Parameters and tokens as the field writes them: 12.9B."""
    return human(count).replace(" ", "").replace("G", "B")


def _duration(seconds: float) -> str:
    for length, name in ((YEAR, "years"), (DAY, "days"), (HOUR, "hours"), (60.0, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {name}"
    return f"{seconds:.3g} seconds"
