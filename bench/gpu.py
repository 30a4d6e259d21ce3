"""Everything there is to know on a machine with a GPU, in one command of at most eight minutes.

    python bench/gpu.py --out DIR                    builds, tests, and times every op against its rivals, and streaming
                                                     in the time that is left
    python bench/gpu.py --out DIR --only streaming   builds, and measures models that stream (gpu_streaming.py)
    python bench/gpu.py --out DIR --dry-run          the same script at tiny sizes on the CPU; also without a GPU

Writes DIR/gpu.json as it goes (what it ran on, the build, the tests marked `gpu`, every case's seconds), DIR/build.log,
DIR/tests.log and DIR/tests.xml, and prints a table last. It may be run again, and into the same DIR. A test that fails
stops nothing. Cases run in a process of their own: one that crashes or hangs costs the rest of its part.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# Seconds of the whole, and of its parts where there is time for all; cases get less where the build took more.
TOTAL = 450
BUILD, TESTS = 200, 130
PARTS = {
    "layer_norm": 30,
    "attention": 80,
    "adamw": 12,
    "cross_entropy": 25,
    "gelu_mlp": 55,
    "grad_norm": 8,
    "embedding": 12,
    "rotary": 10,
}
STREAMING = {"streaming checks": 50, "streaming 1.3B": 145, "streaming 6.7B": 85, "streaming 13B": 130}
START = 6  # seconds until a streaming part's process has begun
LEAST = 0.5  # of a streaming part's seconds; with less it is skipped
GRACE = 45  # past a part's time before its process is ended: a case under way may be compiling

WRONG = 0.05  # results further than this from the first rival's are not the same op

# group of cases -> the ratio to the best rival that is aimed at
AIMS = {
    "attention forward": 0.75,
    "attention backward": 0.75,
    "layer_norm backward": 1.3,
    "adamw": 1.2,
    "cross_entropy forward+backward": 1.0,
    "gelu_mlp forward": 1.0,
    "gelu_mlp backward": 1.0,
}


class Report:
    """DIR/gpu.json, whole after every change."""

    def __init__(self, folder: Path):
        self.path = folder / "gpu.json"
        self.content: dict = {"parts": {}}

    def set(self, **values) -> None:
        self.content.update(values)
        self.write()

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def build(out: Path, dry: bool) -> dict:
    """Compiles the native module for this GPU's architecture; in a dry run there is one already."""
    if dry:
        return {"skipped": "dry run"}
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major >= 9 else ''}"
    environment = {**os.environ, "CGPT_CUDA": "1", "CGPT_CUDA_ARCHS": arch}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return {"arch": arch, **logged(command, out / "build.log", BUILD, environment)}


def tests(out: Path, dry: bool) -> dict:
    """Runs the tests marked gpu; in a dry run, only finds them. What had no time to run is missing from the counts."""
    # Only files that have such tests: others may import what a bare machine lacks.
    marked = re.compile(r"\bmark\.gpu\b|\bimport .*\bGPU\b")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if marked.search(path.read_text())]
    options = ["--collect-only", "-q"] if dry else ["-v", f"--junitxml={out / 'tests.xml'}"]
    if find_spec("xdist") and not dry:  # most of a test's time is a compiler's
        options += ["-n", "6"]
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu"]  # whose plugins may be missing here
    command = [*pytest, "--tb=short", "--continue-on-collection-errors", *options, *files]
    log = out / "tests.log"
    done = logged(command, log, TESTS, child_environment(dry))
    return {**done, **read_results(log.read_text(errors="replace"))}


def read_results(text: str) -> dict:
    """What pytest said of each test, by -v, alone or through xdist, or of those it collected, by -q."""
    collected = re.findall(r"^\S+::.+", text, re.MULTILINE)
    found = dict(re.findall(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", text, re.MULTILINE))
    told = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|SKIPPED|ERROR) (\S+::.+)", text, re.MULTILINE)
    found |= {name.strip(): result for result, name in told}
    counts = {word.lower(): list(found.values()).count(word) for word in ("PASSED", "FAILED", "SKIPPED")}
    bad = {name for name, result in found.items() if result in ("FAILED", "ERROR")}
    bad |= set(re.findall(r"^ERROR (\S+)", text, re.MULTILINE))
    return {"found": len(found or collected), **counts, "bad": sorted(bad)}


def logged(command: list, log: Path, seconds: float, environment: dict) -> dict:
    began = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    return {"exit_code": code, "timed_out": code is None, "seconds": round(time.monotonic() - began, 1)}


def child_environment(dry: bool) -> dict:
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **changed, **({"OMP_NUM_THREADS": "1"} if dry else {})}


def bench(report: Report, device: str, budgets: dict[str, float]) -> None:
    """Runs the parts in a child process, which is started again for the parts after one that it did not survive."""
    out = str(report.path.parent.resolve())
    left = list(budgets)
    while left:
        told = {name: budgets[name] for name in left}
        command = [sys.executable, __file__, "--child", json.dumps({"device": device, "parts": told, "out": out})]
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(device == "cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors: list[str] = []
        reader = threading.Thread(target=lambda c=child, e=errors: e.extend(c.stderr), daemon=True)
        reader.start()
        here, case, timer = left[0], None, kill_after(child, GRACE)
        for line in child.stdout:
            event = json.loads(line) if line.startswith('{"event"') else {}
            if event.get("event") == "part":
                here, case = event["part"], None
                report.content["parts"][here] = {"rows": []}
                timer.cancel()
                timer = kill_after(child, budgets[here] + GRACE)
            elif event.get("event") == "case":
                case = event["case"]
            elif event.get("event") == "row":
                report.content["parts"][here]["rows"].append(event["row"])
            elif event.get("event") == "set":
                report.content.update(event["values"])
            elif event.get("event") == "end":
                report.content["parts"][here].update(event["values"])
            report.write()
        code = child.wait()
        timer.cancel()
        reader.join()
        if code == 0:
            return
        last = next((line.strip() for line in reversed(errors) if line.strip()), "no message")
        part = report.content["parts"].setdefault(here, {"rows": []})
        part["died"] = f"exit code {code} at {case or 'its start'}: {last[:300]}"
        report.write()
        left = left[left.index(here) + 1 :]


def kill_after(child: subprocess.Popen, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, child.kill)
    timer.daemon = True
    timer.start()
    return timer


def streaming(report: Report, device: str, until: float) -> None:
    """Runs the streaming parts, each in a process of its own, for none may find another's memory still taken; from the
    last on they are left out where the time does not suffice."""
    names = list(STREAMING)
    while names:
        left = until - time.monotonic() - START * len(names)
        share = min(1.0, left / sum(STREAMING[name] for name in names))
        if share < LEAST:
            report.content["parts"][names.pop()] = {"rows": [], "state": f"skipped: {max(0, left):.0f} s left"}
            report.write()
            continue
        bench(report, device, {names[0]: share * STREAMING[names[0]]})
        names.pop(0)


def child(device: str, parts: dict[str, float], out: str) -> int:
    """Does the parts, each within its seconds; one JSON object a line on stdout."""
    from gpu_timing import Clock, DeviceLost, ceilings

    torch.manual_seed(0)
    clock = None
    for part, seconds in parts.items():
        if part in PARTS and clock is None:
            clock = Clock(device)
            tell(event="set", values={"ceilings": ceilings(clock)})
        tell(event="part", part=part)
        began = time.monotonic()
        try:
            state = time_op(part, clock, seconds) if part in PARTS else stream(part, device, Path(out), seconds)
        except DeviceLost as error:
            print(error, file=sys.stderr)
            return 1
        tell(event="end", values={"state": state, "seconds": round(time.monotonic() - began, 1)})
    return 0


def time_op(part: str, clock, seconds: float) -> str:
    """One op's cases; returns whether that was all."""
    import gpu_cases
    from gpu_timing import measure

    began, tiny = time.monotonic(), clock.device == "cpu"
    for case in gpu_cases.PARTS[part](clock.device, tiny):
        if time.monotonic() - began > seconds:
            return f"out of time before {case.group} {case.name}"
        tell(event="case", case=f"{case.group} {case.name}")
        found = measure(case.contenders, clock, 0.05 if tiny else 0.5)
        row = {"group": case.group, "case": case.name, "flops": case.flops, "bytes": case.bytes}
        tell(event="row", row={**row, "contenders": found})
        case.contenders.clear()
        if not tiny:
            torch.cuda.empty_cache()
    return "complete"


def stream(part: str, device: str, out: Path, seconds: float) -> str:
    """One part of gpu_streaming.py, which keeps to its time."""
    import gpu_streaming

    for found in gpu_streaming.PARTS[part](gpu_streaming.Bench(device, out, seconds)):
        tell(**({"event": "case", "case": found} if isinstance(found, str) else {"event": "row", "row": found}))
    return "complete"


def tell(**event) -> None:
    print(json.dumps(event), flush=True)


def summary(content: dict) -> str:
    """The short table: a line a case, then how the groups stand to their aims."""
    from gpu_cases import OURS
    from gpu_streaming import describe as describe_streaming

    best, lines = content.get("ceilings", {}), []
    ratios: dict[str, list[float]] = {}
    streamed: list[str] = []
    head = f"{'case':52} {'ours':10} {'ms':>9} {'rate':>24}  {'best rival':18} {'ms':>9}  {'cold':>5}  {'hot':>5}"
    for name, part in content["parts"].items():
        if name in STREAMING:
            streamed += map(describe_streaming, part["rows"])
        for row in part["rows"] if name in PARTS else ():
            ran = {who: found for who, found in row["contenders"].items() if "cold" in found}
            mine = {who: found for who, found in ran.items() if who.startswith(OURS)}
            rivals = {who: found for who, found in ran.items() if who not in mine}
            where = f"{row['group']} {row['case']}"
            for who, found in row["contenders"].items():
                if who.startswith(OURS) and "error" in found:
                    lines.append(f"{where:52} {who.removeprefix(OURS):10} failed: {found['error'][:90]}")
                elif who in mine and wrong(found):
                    lines.append(f"{where:52} {who.removeprefix(OURS):10} WRONG: differs by {found['difference']:.2g}")
            mine = {who: found for who, found in mine.items() if not wrong(found)}
            if not mine or not rivals:
                continue
            who, rival = (min(group, key=lambda one: group[one]["cold"]) for group in (mine, rivals))
            cold, hot = (
                min(one[key] for one in rivals.values()) / min(one[key] for one in mine.values())
                for key in ("cold", "hot")
            )
            ratios.setdefault(row["group"], []).append(cold)
            own, other = mine[who], rivals[rival]
            lines.append(
                f"{where:52} {who.removeprefix(OURS):10} {own['cold'] * 1e3:9.3f} {rate(row, own, best):>24}  "
                f"{rival:18} {other['cold'] * 1e3:9.3f}  {cold:5.2f}  {hot:5.2f}"
            )
        state = part.get("died") or part.get("state", "not finished")
        if state != "complete":
            (streamed if name in STREAMING else lines).append(f"{name}: {state}")
    if content["dry_run"]:
        return "\n".join([head, *lines, "", *streamed, "", "a dry run on the CPU: these times mean nothing"])
    groups = []
    for group, values in ratios.items():
        aim = f", aim {AIMS[group]:.2f}" if group in AIMS else ""
        groups.append(f"{group}: {min(values):.2f} to {max(values):.2f} times the best rival, cold{aim}")
    return "\n".join([head, *lines, "", *groups, "", *streamed])


def wrong(found: dict) -> bool:
    return found["difference"] is not None and not found["difference"] <= WRONG


def rate(row: dict, found: dict, best: dict) -> str:
    """Arithmetic as a share of the measured product's, traffic as a share of the measured copy's."""
    if row["flops"]:
        value, peak, unit = row["flops"] / found["cold"], best.get("gemm_flops_per_second"), "TFLOP/s"
    else:
        value, peak, unit = row["bytes"] / found["cold"], best.get("copy_bytes_per_second"), "TB/s"
    return f"{value / 1e12:.4g} {unit}" + (f" {100 * value / peak:3.0f} %" if peak else "")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="of the ops, those to time (default: all)")
    parser.add_argument("--only", choices=("tests", "ops", "streaming"), help="leave out the others")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of the whole (default: %(default)s)")
    parser.add_argument("--commit", help="what is measured, where the copy at hand has no history to ask")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return child(**json.loads(options.child))
    names = [name for name in options.parts.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if options.out is None or unknown:
        parser.error(f"--parts: wanted some of {', '.join(PARTS)}, got {unknown[0]}" if unknown else "--out is missing")

    began = time.monotonic()
    dry = options.dry_run or not torch.cuda.is_available()
    device = "cpu" if dry else "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    report.set(dry_run=dry, torch=torch.__version__, build=build(options.out, dry))
    if report.content["build"].get("exit_code", 0) != 0:
        print((options.out / "build.log").read_text()[-4000:])
        print(f"gpu: the build failed; {options.out / 'build.log'} has the rest", file=sys.stderr)
        return 1
    report.set(environment=describe(device) | ({"commit": options.commit} if options.commit else {}))
    say(began, f"built: {report.content['build']}")
    if options.only in (None, "tests"):
        report.set(tests=tests(options.out, dry))
        say(began, f"tests: {report.content['tests']}")
    left = options.seconds - (time.monotonic() - began)
    share = max(0.1, min(1.0, left / sum(PARTS[name] for name in names))) if names else 0
    ops = {name: share * PARTS[name] for name in names} if options.only in (None, "ops") else {}
    streams = options.only in (None, "streaming")
    bench(report, device, ops | (STREAMING if dry and streams else {}))
    if streams and not dry:
        streaming(report, device, began + options.seconds)
    report.set(seconds=round(time.monotonic() - began, 1))
    say(began, f"wrote {report.path}\n")
    print(summary(report.content))
    return 1 if failed(report.content) else 0


def failed(content: dict) -> bool:
    """Whether a test failed, a part died, or streaming computed something else."""
    parts = content["parts"].values()
    wrong = any(row.get("equal") is False or "error" in row for part in parts for row in part["rows"])
    return wrong or any("died" in part for part in parts) or bool(content.get("tests", {}).get("bad"))


def describe(device: str) -> dict:
    """What it ran on and with, by a process that can see the module just built."""
    code = "import json, record; print(json.dumps(record.environment()))"
    environment = child_environment(dry=False)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench"), environment["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:5.1f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "python"))
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
