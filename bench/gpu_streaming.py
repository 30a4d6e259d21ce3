"""What bench/gpu.py measures of weight streaming, each part in a process of its own.

    checks       the start-up self-check for every kind of place; a hunt for races; a checkpoint beside training
    1.3B         all state on the host against all on the device, recomputing alike: turns A B A B in one process
    6.7B, 13B    placed by the planner in the memory that is free: what was predicted beside what was measured

A part is a generator: a string says what comes next, a row what was found. It keeps to its seconds by itself, with
fewer rounds or less host memory where pinning is slow, and a row says what was left out.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from cgpt import checkpoint
from cgpt.errors import InputError
from cgpt.metrics import peak_memory_bytes
from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS
from cgpt.saving import Saving
from cgpt.stream.account import account
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.limits import bytes_text, limits
from cgpt.stream.placement import Placement
from cgpt.stream.planner import DoesNotFit, Setting
from cgpt.stream.selfcheck import check_machine
from cgpt.stream.snapshot import Snapshot
from gpu_training import (
    FORMAT,
    PLENTY,
    Bench,
    Row,
    Training,
    deepest,
    free,
    free_memory,
    placed,
    rates_of,
    speed,
    tiny_budgets,
    told,
)

AIM = 0.97  # of the resident model's speed
STEPS = 5  # timed, of the large models; the first of all is not
ROUNDS = {"one visit": 6, "a step of the preset's": 3}  # at most
HUNTS = 8  # seeds
TURN = 4  # timed steps of one visit
DEVICE_SHARES = 0.92, 0.8  # of the free device memory, for the planner; the second where the first was too much


def checks(bench: Bench) -> Iterator[str | Row]:
    """The self-check, a hunt for races, and a checkpoint beside training."""
    far, here = ("host",) * 6, ("device",) * 2
    again = (True,) * 6
    places = {
        "host": Placement(far, far, again),
        "host, activations too": Placement(far, far, again, activations="host"),
        "device and host": Placement(("device",) * 3 + far[3:], here + far[2:], (False,) * 2 + again[2:]),
        "disk": Placement(far[:3] + ("disk",) * 3, ("disk",) * 6, again),
    }
    mixed = Placement(
        ("device",) * 3 + ("host", "disk", "host"),
        (*here, "host", "host", "disk", "disk"),
        (False,) * 3 + again[3:],
        aside=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, placement in places.items():
            yield f"self-check, {name}"
            begin, row = time.monotonic(), {"case": f"self-check, {name}"}
            try:
                check_machine(FORMAT, bench.device, placement, folder)
                row["equal"] = True
            except InputError as error:
                row |= {"equal": False, "difference": str(error)}
            yield row | {"seconds": time.monotonic() - begin}
        yield "hunting for races"
        yield _hunt(bench, mixed, folder)
        yield "a checkpoint beside training"
        yield _checkpoint(bench, mixed, Path(folder))


def _small(bench: Bench) -> tuple[GPTConfig, Setting]:
    """Of four blocks, and a micro-batch a visit."""
    shape = replace(bench.shape("111M"), n_layer=4)
    return shape, Setting(FORMAT, bench.visit // 4, shape.d_model, beside=bench.beside)


def _hunt(bench: Bench, placement: Placement, folder: str) -> Row:
    """Steps with random delays in every lane and NaN in whatever memory is given back, against steps in memory."""
    shape, setting = _small(bench)
    begin, wanted, wrong = time.monotonic(), None, []
    for seed in (None, *range(2 if bench.tiny else HUNTS)):
        place = Placement.resident(len(placement.state)) if seed is None else replace(placement, aside=None)
        with Training(bench, shape, place, setting, folder, hunt=seed) as training:
            steps = [training.step(training.batches(1)) for _ in range(3)]
            training.store.settle()
            found = steps, {name: training.store.read(name) for name in training.store.names()}
        wanted = wanted or found
        if found[0] != wanted[0] or not all(torch.equal(value, wanted[1][name]) for name, value in found[1].items()):
            wrong.append(seed)
    row = {"case": f"hunting for races, {seed + 1} seeds", "equal": not wrong, "seconds": time.monotonic() - begin}
    return row | ({"difference": f"seeds {wrong}"} if wrong else {})


def _checkpoint(bench: Bench, placement: Placement, folder: Path) -> Row:
    """Saves after half of the steps, once with training at a standstill and once with training going on."""
    shape, setting = _small(bench)
    found, row = {}, {"case": "checkpoint beside training"}
    for beside in (False, True):
        saves = folder / f"saves {beside}"
        saves.mkdir()
        with Training(bench, shape, placement, setting, str(folder)) as training:
            steps = [training.step(training.batches(1)) for _ in range(3)]
            begin = time.monotonic()
            if beside:
                saving = Saving(saves, Snapshot(training.store), 3, {}, 1)
            else:
                path = checkpoint.save(saves, training.store, 3, {}, 1)
            steps += [training.step(training.batches(1)) for _ in range(3)]
            if beside:
                row["trained_on"] = not saving.done
                path = saving.wait()
                row["seconds"] = time.monotonic() - begin
            training.store.settle()
            files = checkpoint.verify(path)["files"]
            found[beside] = steps, files, {name: training.store.read(name) for name in training.store.names()}
    row["bytes"] = sum(file["bytes"] for file in files.values())
    (steps, files, masters), (others, other_files, other_masters) = found.values()
    equal = {
        "losses": steps == others,
        "files": files == other_files,
        "weights": all(torch.equal(value, other_masters[name]) for name, value in masters.items()),
    }
    wrong = [what for what, same in equal.items() if not same]
    return row | {"equal": not wrong} | ({"difference": f"{', '.join(wrong)} differ"} if wrong else {})


def against_resident(bench: Bench) -> Iterator[str | Row]:
    """1.3B, resident and streamed: one visit a step, and as many as the preset's own steps have."""
    preset, shape, plans = PRESETS["1.3B"], bench.shape("1.3B"), gpt_plans(bench.shape("1.3B"))
    most = 3 if bench.tiny else preset.batch_schedule[0][1] * shape.seq_len // bench.visit
    budgets = PLENTY if bench.tiny else free_memory(bench, DEVICE_SHARES[0])
    yield "1.3B: placing"
    try:
        setting, streamed = placed(bench, shape, budgets, most, activations="device", most_state=0, most_weights=0)
    except DoesNotFit as refusal:
        yield {"case": "1.3B", "refused": str(refusal)}
        return
    resident = Placement.resident(len(plans))
    resident = replace(resident, recompute=streamed.recompute, micro_batches=setting.micro_batches, visits=most)
    places = {"resident": resident, "streamed": streamed}
    needs = [
        account(plans, where, FORMAT, setting.micro_batch_tokens, shape.d_model, bench.beside).device
        for where in places.values()
    ]
    together = sum(needs) <= budgets.device
    if max(needs) > budgets.device:
        yield {"case": "1.3B", "skipped": f"resident takes {max(needs):,} bytes of the device's {budgets.device:,}"}
        return
    pair = Pair(list(places), together, most)
    for names in [list(places)] if together else [[name] for name in places]:
        yield f"1.3B: opening {' and '.join(names)}"
        begin = time.monotonic()
        trainings = {name: Training(bench, shape, places[name], setting) for name in names}
        opened = time.monotonic() - begin
        rates = rates_of(trainings["streamed"].store) if "streamed" in names else None
        deadline = bench.left * (0.5 if not together and names == ["resident"] else 0.0)
        for what in ("warm-up", *ROUNDS):
            yield f"1.3B: {what}"
            pair.go(what, trainings, bench, deadline)
            if "streamed" in names and what in ROUNDS:
                row = pair.row(what, bench, shape)
                if "skipped" not in row:
                    trace = "1.3B" if what == "one visit" else None
                    row["streamed"] |= told(bench, trainings["streamed"], rates, row["tokens"], trace)
                yield row | {"opened_seconds": opened}
        for training in trainings.values():
            training.store.close()
        del trainings, training
        free(bench)


class Pair:
    """The turns of two contenders, step by step over the same data. most: visits a step, at most."""

    def __init__(self, names: Sequence[str], together: bool, most: int):
        self.names, self.together, self.most = names, together, most
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self.plan: dict[str, tuple[int, int]] = {}  # of what is done -> visits a step, rounds

    def go(self, what: str, trainings: dict[str, Training], bench: Bench, deadline: float) -> None:
        """Rounds of turns until `deadline` seconds of the part are left, or as many as the first contender had."""
        known, done = self.plan.get(what), 0
        visits = known[0] if known else self._visits(what, trainings, bench, deadline)
        rounds = known[1] if known else ROUNDS.get(what, 1) if visits else 0
        times = self.seconds.setdefault(what, {name: [] for name in self.names})
        while done < rounds:
            begin = time.monotonic()
            for name, training in trainings.items():
                seconds, found = training.turn(visits, TURN if what == "one visit" else 1)
                times[name].append(seconds)
                self.found[name] += found
            done += 1
            spent = time.monotonic() - begin
            if not known and bench.left - deadline < spent * (6 if what == "one visit" else 1):  # time for what follows
                break
        self.plan[what] = visits, done

    def _visits(self, what: str, trainings: dict[str, Training], bench: Bench, deadline: float) -> int:
        """As many as there is time for, in a step of each contender; 0 where that is hardly more than one."""
        if what not in ROUNDS or what == "one visit":
            return 1
        once = sum(statistics.median(self.seconds["one visit"][name]) for name in trainings)
        visits = min(self.most, int(0.9 * (bench.left - deadline) / once))
        return visits if visits >= min(self.most, 4) else 0

    def row(self, what: str, bench: Bench, shape: GPTConfig) -> Row:
        visits, rounds = self.plan[what]
        row = {"case": f"1.3B, {visits} visit{'s' * (visits > 1)} a step", "layers": shape.n_layer}
        if not rounds:
            return {"case": f"1.3B, {what}", "skipped": f"{bench.left:.0f} s left"}
        row |= {"tokens": visits * bench.visit, "tokens_a_visit": bench.visit, "interleaved": self.together}
        for name in self.names:
            times = self.seconds[what][name]
            row[name] = speed(bench, shape, row["tokens"], statistics.median(times)) | {"rounds": times}
        row |= {"ratio": row["resident"]["seconds"] / row["streamed"]["seconds"], "aim": AIM}
        return row | self._compared()

    def _compared(self) -> Row:
        same = [ours == theirs for ours, theirs in zip(*self.found.values(), strict=False)]  # the second may be behind
        row = {"equal": all(same), "steps_compared": len(same)}
        if not row["equal"]:
            at = same.index(False)
            row["difference"] = f"step {at + 1}: {', '.join(str(found[at]) for found in self.found.values())}"
        return row


def large(model: str):
    """The part of a model that is placed by the planner."""

    def part(bench: Bench) -> Iterator[str | Row]:
        for share in DEVICE_SHARES:
            yield f"{model}: placing"
            try:
                yield from _large(bench, model, share)
                return
            except torch.OutOfMemoryError as error:
                row = {"case": model, "error": " ".join(str(error).split())[:240], "share_of_free_memory": share}
            free(bench)
            yield row
            if bench.left < bench.seconds / 2:
                yield {"case": model, "skipped": f"{bench.left:.0f} s left"}
                return

    return part


def _large(bench: Bench, model: str, share: float) -> Iterator[str | Row]:
    shape, row = bench.shape(model), {"case": model, "layers_of_model": bench.shape(model).n_layer}
    budgets = tiny_budgets(bench, shape, fewer=2 if model == "13B" else 0) if bench.tiny else free_memory(bench, share)
    row["budgets"] = {"device": budgets.device, "host": budgets.host, "host_free": limits().host}
    try:
        setting, placement = placed(bench, shape, budgets)
    except DoesNotFit as refusal:
        row["refused"] = str(refusal)
        shape = deepest(bench, shape, budgets)
        if shape is None:
            yield row
            return
        setting, placement = placed(bench, shape, budgets)
    row["layers"] = shape.n_layer
    yield f"{model}: opening {shape.n_layer} layers"
    before, begin = peak_memory_bytes(), time.monotonic()
    with Training(bench, shape, placement, setting) as training:
        row["opened_seconds"] = time.monotonic() - begin
        rates, ends, found = rates_of(training.store), [], []
        data = [training.batches(1) for _ in range(STEPS + 1)]
        for number in range(STEPS + 1):
            if number > 2 and bench.left < 1.5 * (ends[-1] - ends[-2]):
                row["skipped"] = f"{STEPS + 1 - number} of {STEPS} steps: {bench.left:.0f} s left"
                break
            yield f"{model}: step {number + 1}"
            found.append(training.step(data[number]))
            ends.append(time.perf_counter())
        training.store.settle()
        seconds = [end - begin for begin, end in pairwise(ends)]
        row |= speed(bench, shape, bench.visit, statistics.median(seconds[1:] or seconds)) | {"steps": seconds}
        row |= {"losses": [loss for loss, _ in found], "micro_batch_tokens": setting.micro_batch_tokens}
        row["placement"] = {
            tier: {"weights": placement.weights.count(tier), "state": placement.state.count(tier)}
            for tier in ("device", "host")
        } | {"recomputed": sum(placement.recompute), "activations": placement.activations}
        row |= told(bench, training, rates, bench.visit, model)
        planned, host = training.account, training.store.host
        row["device_bytes"] = {
            "planned": planned.device,
            "arena": planned.needs.device,  # of torch's own memory, and in the peak
            "peak": None if bench.tiny else torch.cuda.max_memory_allocated(),
            "reserved": None if bench.tiny else torch.cuda.max_memory_reserved(),
        }
        row["host_bytes"] = {"planned": planned.host, "peak": peak_memory_bytes(), "before": before}
        row["why_not_pinned"] = "no GPU" if bench.tiny else host.why_not_pinned
        row["pinned"] = row["why_not_pinned"] is None
    yield row


PARTS = {
    "streaming checks": checks,
    "streaming 1.3B": against_resident,
    "streaming 6.7B": large("6.7B"),
    "streaming 13B": large("13B"),
}


def describe(row: Row) -> str:
    """A row in a line of the table."""
    where = f"{row['case']:44} "
    for what in ("skipped", "error"):
        if what in row and "seconds" not in row:
            return f"{where}{what}: {row[what]}"
    if "ratio" in row:
        both = ", ".join(f"{name} {_speed(row[name])}" for name in ("resident", "streamed"))
        bits = f"bits equal over {row['steps_compared']} steps" if row["equal"] else f"BITS DIFFER: {row['difference']}"
        predicted = row["streamed"]["predicted_seconds"]
        return f"{where}{both} (predicted {predicted:.3g} s), ratio {row['ratio']:.3f}, aim {row['aim']}; {bits}"
    if "equal" in row:
        return f"{where}{'equal' if row['equal'] else 'WRONG: ' + row['difference']}, {row['seconds']:.1f} s"
    if "layers" not in row:
        return f"{where}refused: {row['refused']}"
    lanes = ", ".join(f"{lane} {at['predicted']:.3g} / {at['measured']:.3g}" for lane, at in row["lanes"].items())
    device, host = ({k: bytes_text(v or 0) for k, v in row[tier].items()} for tier in ("device_bytes", "host_bytes"))
    pinned = "pinned" if row["pinned"] else f"not pinned: {row['why_not_pinned']}"
    return (
        f"{where}{row['layers']} of {row['layers_of_model']} layers, {_speed(row)} (predicted "
        f"{row['predicted_seconds']:.3g} s); seconds predicted / measured: {lanes}; device {device['peak']} of "
        f"{device['planned']} planned, host {host['peak']} of {host['planned']}, {pinned}"
        + (f"; whole model refused: {row['refused']}" if "refused" in row else "")
        + (f"; skipped {row['skipped']}" if "skipped" in row else "")
    )


def _speed(found: Row) -> str:
    share = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
    return (
        f"{found['seconds']:.3g} s {found['tokens_per_second']:.0f} tokens/s "
        f"{found['model_flops_per_second'] / 1e12:.3g} TFLOP/s{share}"
    )
