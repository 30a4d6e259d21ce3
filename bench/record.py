"""Where measurements go: bench/results/<device>/<name>.json, each with what it was measured on and with."""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from cgpt_ext import _native

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The processor or GPU in a few words, as a folder name."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*: (.+)", info)
        vectors = [isa for isa in _native.cpu_isas() if isa not in ("avx512bf16", "amx")]  # those are told below
        name = f"{found[1] if found else platform.processor()} {vectors[-1]}"
        if "amx_bf16" in info:
            name += " amx"
        elif "avx512_bf16" in info:
            name += " bf16"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|@.*?hz|cpu|processor", "", name.lower())).strip("-")


def environment() -> dict:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save(name: str, measured: dict, folder: Path | None = None) -> Path:
    """Writes one file of results; a later run of the same bench on the same device replaces it. folder: for results
    that are not to be kept."""
    path = (folder or RESULTS / device_name()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **measured}, indent=1) + "\n")
    return path
