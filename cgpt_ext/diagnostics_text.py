"""diagnostics.report() for people: a line for each part, then a row for each op and device."""

from collections.abc import Iterator
from itertools import groupby


def show(found: dict) -> str:
    """report() as lines of text."""
    rows = {"cgpt-ext": _versions_text(found["versions"]), "system": _text(found["system"])}
    rows["processor"] = _text(found["processor"], "{name}; {instructions}")
    rows["cores"] = _text(found["cores"], "{machine}, {allowed} of them for this process; quota {quota}")
    rows["memory"] = _text(_sized(found["memory"]), "{total}, {free} free; limit {limit}")
    rows["native"] = _native_text(found["native"])
    problem = "; {problem}" if found["cpu"].get("problem") else ""
    rows["cpu"] = _text(found["cpu"], "{isa} of {available}; {threads} threads" + problem)
    rows["cuda"] = _cuda_text(found["cuda"])
    for i, gpu in enumerate(found["cuda"].get("gpus", ())):
        rows[f"gpu {i}"] = _text(_sized(gpu), "{name}, compute capability {capability}, {memory}; {code}")
    rows["optional"] = _packages_text(found["optional"])
    variables = " ".join(f"{name}={{{name}}}" for name in found["environment"])
    rows["environment"] = _text(found["environment"], variables) or "nothing set"
    lines = [f"{name:14} {text}" for name, text in rows.items()]
    if "failed" not in found["ops"]:
        lines.append("")
        for op, devices in found["ops"].items():
            lines += [f"{op:14} {device:12} {row['implementation']:10} {row['why']}" for device, row in devices.items()]
    return "\n".join(lines)


def show_check(rows: Iterator[dict]) -> Iterator[str]:
    """A line for each op and place, as soon as its last dtype is done: a crash shows after the last line."""
    for (op, place), group in groupby(rows, key=lambda row: (row["op"], row["place"])):
        group = list(group)
        words = [f"{row['dtype']} {row['error']:.1e}" for row in group if row["error"] is not None]
        bad = [row for row in group if row["result"] != "ok"]
        wrong = [f"{row['dtype']} past {row['bar']:.0e}" for row in bad if row["result"] == "WRONG"]
        failed = [f"{row['dtype'] or ''} {row['result']}".strip() for row in bad if row["result"] != "WRONG"]
        verdict = "WRONG" if wrong else "FAILED" if failed else "ok"
        yield f"{op:14} {place:12} {verdict:6} {', '.join([*words, *wrong, *failed])}"


def _text(part, form: str = "{}") -> str:
    """A part's line, or why there is none."""
    if isinstance(part, dict) and "failed" in part:
        return f"could not be found out: {part['failed']}"
    if not isinstance(part, dict):
        return form.format(part)
    words = {key: ", ".join(item) if isinstance(item, (list, tuple)) else item for key, item in part.items()}
    return form.format(**{key: "none" if item is None else item for key, item in words.items()})


def _sized(part: dict) -> dict:
    """A part whose integers are bytes, with GiB in their place."""
    return {key: f"{item / 2**30:.1f} GiB" if isinstance(item, int) else item for key, item in part.items()}


def _versions_text(part: dict) -> str:
    if "failed" in part:
        return _text(part)
    rest = {name: item for name, item in part.items() if name not in ("cgpt-ext", "python")}
    return f"{part['cgpt-ext'] or 'not installed'}, Python {part['python']}, {_packages_text(rest)}"


def _packages_text(part: dict) -> str:
    if "failed" in part:
        return _text(part)
    missing = ", ".join(name for name, item in part.items() if item is None)
    there = ", ".join(f"{name} {item}" for name, item in part.items() if item is not None)
    return "; ".join(words for words in (there, f"not installed: {missing}" if missing else "") if words)


def _native_text(part: dict) -> str:
    if "failed" in part:
        return _text(part)
    if not part["loads"]:
        return f"DOES NOT LOAD: {part['error']}; {part['advice']}"
    kernels = "CUDA kernels by nvcc {nvcc} for {archs}" if part["cuda_kernels"] else "no CUDA kernels"
    problem = "; but OPS DO NOT LOAD: {error}; {advice}" if part["error"] else ""
    return _text(part, "loads; built by {compiler}, " + kernels + problem)


def _cuda_text(part: dict) -> str:
    if "failed" in part:
        return _text(part)
    driver = part["driver"]
    if "failed" in driver:
        there = f"driver {_text(driver)}"
    elif any(driver.values()):
        gpus = f", for {', '.join(driver['gpus'])}" if driver["gpus"] else ""
        there = f"driver {driver['version'] or 'unknown'}, of CUDA {driver['cuda'] or 'unknown'}{gpus}"
    else:
        there = "no NVIDIA driver"
    return f"{part['problem'] or 'at work'}; torch's CUDA is {part['torch'] or 'none'}; {there}"
