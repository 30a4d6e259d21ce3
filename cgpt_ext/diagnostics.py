"""What a report of a problem should say: versions, machine, whether the native module loads, what serves each op, why.

Each part is asked for on its own; one that fails says so in its place, and the rest is still there. Names of people,
of the machine and of their folders are taken out, so that the whole can be pasted in public.
"""

import getpass
import importlib
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cgpt_ext import machine
from cgpt_ext.machine import usable

HERE = Path(__file__).parent
# pyproject's own dependencies, and what is found at work beside us.
NEEDED = ("torch", "numpy", "tiktoken", "safetensors", "tyro", "tqdm", "scipy", "matplotlib")
OPTIONAL = (
    *("triton", "transformers", "tokenizers", "kernels", "liger-kernel", "flash-attn", "lightning", "lightning-fabric"),
    *("accelerate", "litgpt", "torchtitan", "datasets", "datatrove", "pyarrow", "zstandard", "lm_eval"),
    *("tensorboard", "wandb", "trackio"),
)
ENVIRONMENT = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING"),
    *("TRITON_INTERPRET", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_LOGS", "LD_PRELOAD"),
)
REBUILD = "build it anew: pip install --force-reinstall --no-deps . in the source tree"
# What the loader's words about _native mean for its user.
ADVICE = (
    (r"GLIBC(XX)?_[\d.]+' not found|CXXABI", f"it was built on a newer system; {REBUILD}"),
    (r"undefined symbol|symbol not found", f"it is of another version or of another Python; {REBUILD}"),
    (
        r"wrong ELF class|ELF header|file too short|Exec format",
        f"its file is broken or another machine's; {REBUILD}",
    ),
    (r"cannot open shared object file", "install the library that it names"),
    (r"No module named '(?!cgpt_ext)", "install the package that it names"),
)


def report() -> dict:
    """Everything, as JSON takes it. A part that could not be found out is {"failed": why}."""
    parts = {
        "versions": versions,
        "system": machine.system,
        "processor": machine.processor,
        "cores": machine.cores,
        "memory": machine.memory,
        "native": native,
        "cuda": cuda,
        "optional": lambda: {name: _version(name) for name in OPTIONAL},
        "environment": environment,
        "table": _table,
    }
    found = {name: _asked(part) for name, part in parts.items()}
    table = found.pop("table")
    return without_names(found | ({"cpu": table, "ops": table} if "failed" in table else table))


def check(found: dict) -> Iterator[dict]:
    """selfcheck.check()'s rows, which found["check"] collects; a single one where the native module does not load."""
    found["check"] = []
    if found["native"].get("error") or "failed" in found["native"]:
        row = {"op": "all", "place": "everywhere", **dict.fromkeys(("dtype", "implementation", "error", "bar"))}
        rows = [row | {"result": "FAILED: the native module does not load"}]
    else:
        from cgpt_ext import selfcheck

        rows = selfcheck.check()
    for row in rows:
        found["check"].append(without_names(row))
        yield found["check"][-1]


def sound(found: dict) -> bool:
    """Whether the native module loads and nothing failed that was checked."""
    loads = found["native"].get("loads", False) and not found["native"]["error"]
    return loads and all(row["result"] == "ok" for row in found.get("check", ()))


def versions() -> dict[str, str | None]:
    """Of this package, Python, and what is always installed with it; None for what is not."""
    free_threaded = " without GIL" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    python = f"{platform.python_version()} {platform.python_implementation()}{free_threaded}"
    return {"cgpt-ext": _version("cgpt-ext"), "python": python} | {name: _version(name) for name in NEEDED}


def native() -> dict:
    """Whether the compiled module loads; if not, the loader's own words and what to do; else what built it."""
    try:
        module = importlib.import_module("cgpt_ext._native")
    except Exception as error:  # a module that raises on import can raise anything
        return {"loads": False, "error": _words(error), "advice": advice(_words(error))}
    built = {"cuda_kernels": module.has_cuda_kernels, **module.built_with}
    try:
        importlib.import_module("cgpt_ext.ops")
        importlib.import_module("cgpt_ext.nn")
    except Exception as error:  # torch, most likely
        return {
            "loads": True,
            "error": _words(error),
            "advice": "mend that: the native module is sound",
            **built,
        }
    return {"loads": True, "error": None, "advice": None, **built}


def advice(error: str, folder: Path = HERE) -> str:
    """What to do about a native module that does not load."""
    if "No module named 'cgpt_ext._native'" in error:
        files = sorted(path.name for path in folder.glob("_native*"))
        if files:
            return f"{', '.join(files)} is not for {sys.implementation.cache_tag}: install it by this Python's pip"
        return "it is not built: pip install . (or python setup.py build_ext --inplace in the source tree)"
    return next((what for words, what in ADVICE if re.search(words, error)), REBUILD)


def cuda() -> dict:
    """The driver, torch's CUDA, and each GPU with the code that this build has for it."""
    found = {"driver": _asked(machine.driver), "torch": None, "available": False, "problem": None, "gpus": []}
    import torch

    found["torch"] = torch.version.cuda or (f"HIP {torch.version.hip}" if torch.version.hip else None)
    with warnings.catch_warnings(record=True) as said:  # torch says in a warning why a GPU that is there is no use
        warnings.simplefilter("always")
        found["available"] = torch.cuda.is_available()
        count = torch.cuda.device_count() if found["available"] else 0
    built = native()
    found["problem"] = _cuda_problem(found, " ".join(" ".join(str(w.message) for w in said).split()), built)
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        row = {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory}
        code = code_for(gpu.major, gpu.minor, built["archs"]) if built["loads"] else "unknown"
        found["gpus"].append(row | {"code": code})
    return found


def environment() -> dict[str, str]:
    """The variables that change how ops run; of libraries put before all others, the names alone."""
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if "LD_PRELOAD" in found:
        found["LD_PRELOAD"] = " ".join(Path(word).name for word in re.split(r"[ :]+", found["LD_PRELOAD"]))
    return found


def _cuda_problem(found: dict, said: str, built: dict) -> str | None:
    """Why no GPU is of use here; None where one is, or might be."""
    driver = found["driver"]
    if not found["available"]:
        if found["torch"] is not None:
            return said or "torch finds no CUDA device"
        there = driver.get("version") or driver.get("cuda") or driver.get("gpus")
        advice = "; there is a GPU: install torch's CUDA build for it" if there else ""
        return f"torch is a build for CPUs{advice}"
    if not built["loads"]:
        return "the native module does not load"
    if not built["cuda_kernels"]:
        return "this build has no CUDA kernels: pip install . --config-settings cuda=pypi in the source tree"
    newest, nvcc = driver.get("cuda"), built["nvcc"]
    if newest and nvcc and int(newest.split(".")[0]) < int(nvcc.split(".")[0]):
        return f"the driver runs CUDA up to {newest}, and the kernels were built with {nvcc}: a newer driver is needed"
    return None


def code_for(major: int, minor: int, archs: str) -> str:
    """Which of the build's `archs`, "80;90a" for one, a GPU of this compute capability runs.

    Machine code runs on its own major version from its minor version on, that of an "a" architecture on itself alone;
    PTX, which setup.py keeps of the first, on all later ones (CUDA C++ Programming Guide, compute capabilities).
    """
    parsed = [re.fullmatch(r"(\d+)(\d)([af]?)", arch) for arch in archs.split(";") if arch]
    if not parsed:
        return "none: this build has no CUDA kernels"
    own = []
    for match in parsed:
        their_major, their_minor = int(match[1]), int(match[2])
        if their_major == major and (their_minor == minor or (their_minor < minor and match[3] != "a")):
            own.append((their_minor, match[0]))
    if own:
        return f"machine code of {max(own)[1]}"
    first = parsed[0]
    if (int(first[1]), int(first[2])) <= (major, minor) and not first[3]:
        return f"PTX of {first[0]}, which the driver compiles at first use"
    return f"none: this build is for {archs}"


def _table() -> dict:
    from cgpt_ext import dispatch

    found, cores = dispatch.report(), _asked(machine.cores)
    found["cpu"]["problem"] = None if "failed" in cores else threads_problem(found["cpu"]["threads"], **cores)
    return found


def threads_problem(threads: int, machine: int, allowed: int, quota: float | None) -> str | None:
    """Why so many threads would wait for each other, and what to do about it; None where each has a core."""
    most = usable(allowed, quota)
    if threads <= most:
        return None
    why = f"may run on {allowed} of {machine} cores" if most == allowed else f"is paid {quota:g} cores by its groups"
    return f"more than this process carries, which {why}: set OMP_NUM_THREADS={most} or torch.set_num_threads({most})"


def without_names(value, replacements: tuple[tuple[str, str], ...] | None = None):
    """`value` with folders, the user and the machine taken out of every string in it."""
    if replacements is None:
        replacements = tuple(_names())
    if isinstance(value, dict):
        return {key: without_names(item, replacements) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_names(item, replacements) for item in value]
    if isinstance(value, str):
        for pattern, word in replacements:
            value = re.sub(pattern, word, value)
    return value


def _names() -> Iterator[tuple[str, str]]:
    """(pattern, what stands in its place), the longest folders first."""
    folders = {sys.base_prefix: "<python>", sys.prefix: "<python>", str(HERE.parent): "<packages>"}
    folders |= {os.path.realpath(folder): word for folder, word in folders.items()}
    folders[os.path.expanduser("~")] = "~"
    for folder in sorted(folders, key=len, reverse=True):
        if folder.startswith("/") and folder not in ("/", "/usr"):
            yield re.escape(folder) + r"(?![\w.-])", folders[folder]
    yield r"/(home|Users)/[^/\s:'\"]+", "~"
    yield r"\b(GPU|MIG)-[0-9a-fA-F-]{8,}", r"\1-..."
    for name, word in ((_user(), "<user>"), (platform.node(), "<machine>")):
        if name:
            yield rf"(?<=/){re.escape(name)}(?=/)", word


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        return None


def _asked(part: Callable):
    try:
        return part()
    except Exception as error:  # a report of problems must survive them
        return {"failed": _words(error)}


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
    except Exception as error:  # broken metadata is worth a report too
        return _words(error)
