"""The CUDA kernels of csrc/cuda, run on a CPU: `with emulated():` the ops of cgpt_ext work on CPU tensors by them.

g++ compiles the .cu files as C++ against the headers in include/, with every load and store reported to runtime/, which
plays the device: blocks one after another, each CUDA thread a fibre, in an order drawn from a seed. A race, an
uninitialised read of shared memory, an access outside a tensor, a misaligned vector, a divergent warp, a deadlock, a
signed overflow ends the launch with a RuntimeError that names file, line, block and thread.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import ninja
import pybind11

from cgpt_ext import _native

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "emulator"

# What stands in for which of csrc's files; all others are compiled as they are.
REPLACED = {
    "cuda/ptx.cuh": "include/ptx.cuh",
    "cuda/launch.cuh": "include/launch.cuh",
    "tensor.cpp": "include/tensor.cpp",
    "cpu/isa.h": "include/isa.h",
}
# -O1 keeps one instruction from standing for lines far apart, and leaves loops as loops: no memcpy that nobody sees.
FLAGS = (
    "-std=c++17 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -U_FORTIFY_SOURCE -Wall -Wno-attributes"
    """ -DCGPT_CUDA -DCGPT_NVCC='""' -DCGPT_CUDA_ARCHS='""'"""  # no nvcc compiled these
)
KERNEL_FLAGS = (
    "-O1 -x c++ -fsanitize=thread --param tsan-instrument-func-entry-exit=0"
    " -fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift -Wno-unknown-pragmas"
)


def _farm() -> Path:
    """A copy of csrc in links, with the replacements in their places: a quoted #include looks beside its file first."""
    farm = WORK / "csrc"
    wanted = {
        p.relative_to(ROOT / "csrc"): p
        for p in (ROOT / "csrc").rglob("*.*")
        if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    wanted |= {Path(name): HERE / ours for name, ours in REPLACED.items()}
    for link in farm.rglob("*"):
        if link.is_symlink() and (link.relative_to(farm) not in wanted or not link.exists()):
            link.unlink()
    for name, target in wanted.items():
        link = farm / name
        if link.is_symlink() and link.readlink() == target:
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return farm


def _ninja(name: str, sources: list[Path], kernels: list[Path]) -> Path:
    """Builds one shared library of the runtime, `sources` and the instrumented `kernels`; returns its path."""
    farm = _farm()
    includes = [HERE / "include", HERE / "runtime", farm, pybind11.get_include(), sysconfig.get_path("include")]
    flags = f"{FLAGS} {' '.join(f'-I{p}' for p in includes)}"
    compiler = os.environ.get("CXX", "g++")
    lines = ["ninja_required_version = 1.5"]
    for rule, extra in (("cxx", "-O2"), ("kernel", KERNEL_FLAGS)):
        lines += [f"rule {rule}", f"  command = {compiler} {flags} {extra} -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", f"  command = {compiler} -shared -Wl,-Bsymbolic $in -ldl -o $out"]
    objects = []
    edges = [("cxx", p) for p in sorted((HERE / "runtime").glob("*.cpp")) + sources] + [("kernel", p) for p in kernels]
    for rule, source in edges:
        objects.append(f"{name}/{source.parent.name}_{source.stem}_{source.suffix[1:]}.o")
        lines.append(f"build {objects[-1]}: {rule} {source}")
    library = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines += [f"build {library}: link {' '.join(objects)}", f"default {library}"]
    (WORK / f"{name}.ninja").write_text("\n".join(lines) + "\n")
    command = [Path(ninja.BIN_DIR) / "ninja", "-f", f"{name}.ninja"]
    done = subprocess.run(command, cwd=WORK, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels did not compile:\n{done.stdout}{done.stderr}")
    return WORK / library


class Device:
    """A library of kernels and the device it carries."""

    def __init__(self, path: Path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for name in ("emulator_writer", "emulator_conflict"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.emulator_writer.argtypes = [ctypes.c_void_p]
        self.library.emulator_add_tensor.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.library.emulator_launched.argtypes = [ctypes.POINTER(ctypes.c_uint32), ctypes.c_size_t]
        self.library.emulator_launched.restype = ctypes.c_size_t
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]

    def seed(self, value: int) -> None:
        """Chooses the order of blocks and threads in the launches to come, and starts counting afresh."""
        self.library.emulator_seed(value)

    def counters(self) -> dict[str, int]:
        """What the launches since the seed executed: warp-wide instructions, copies of 16 bytes, barriers.

        `bank_conflicts` are the extra passes over the banks that its ldmatrix took; `conflict()` names one's place.
        """
        numbers = (ctypes.c_uint64 * 5)()
        self.library.emulator_counters(numbers)
        return dict(zip(("mma", "ldmatrix", "bank_conflicts", "copies", "barriers"), numbers, strict=True))

    def conflict(self) -> str:
        """Where an ldmatrix found banks busy, or ''."""
        return self.library.emulator_conflict().decode()

    def kernels(self) -> dict[str, bool]:
        """Every kernel that the library holds, template arguments and all, and whether it has run to its end."""
        table = subprocess.run(["nm", "-C", str(self.path)], capture_output=True, text=True, check=True).stdout
        offsets = (ctypes.c_uint32 * 4096)()
        ran = set(offsets[: self.library.emulator_launched(offsets, len(offsets))])
        found = {}
        for line in table.splitlines():  # lambdas and pieces that the compiler split off are no kernels
            line = re.sub(r"\(anonymous namespace\)::|cgpt::|cuda::", "", line)
            if (kernel := re.match(r"(\w+) t (?:void )?(\w+_kernel(?:<.*?>)?)\([^)]*\)$", line)) is not None:
                found[kernel[2]] = int(kernel[1], 16) in ran
        return found

    def writer(self, tensor, *index: int) -> str:
        """Who wrote this element in the latest launches: file, line, block and thread; '' where nobody did."""
        element = tensor[index]
        return self.library.emulator_writer(element.data_ptr()).decode()

    def blame(self, got, want) -> str:
        """Who wrote the element of `got` that is furthest from `want`."""
        distance = (got.double() - want.double()).abs().nan_to_num(float("inf"))
        worst = int(distance.argmax())
        index = []
        for size in reversed(got.shape):
            index.insert(0, worst % size)
            worst //= size
        return f"element {tuple(index)}: {self.writer(got, *index)}"


@cache
def device() -> Device:
    """cgpt_ext's own kernels, compiled where a source has changed since the last time."""
    WORK.mkdir(parents=True, exist_ok=True)
    farm = _farm()
    sources = [p for folder in (farm, farm / "cuda", farm / "host") for p in sorted(folder.glob("*.cpp"))]
    return Device(_ninja("_native", sources, sorted((farm / "cuda").glob("*.cu"))))


@cache
def defects() -> Device:
    """The kernels of defects/, each with one mistake planted."""
    WORK.mkdir(parents=True, exist_ok=True)
    _farm()
    return Device(_ninja("defects", [], sorted((HERE / "defects").glob("*.cu"))))


@cache
def native():
    """The module that cgpt_ext._native would be on this device."""
    path = str(device().path)
    loader = importlib.machinery.ExtensionFileLoader("_native", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_native", path, loader=loader))
    loader.exec_module(module)
    for name in ("split_master", "join_master"):  # for host memory only: a GPU's tensors go another way
        setattr(module, name, getattr(_native, name))
    return module


@contextmanager
def emulated(seed: int = 0):
    """Every op of cgpt_ext runs its CUDA kernels, on CPU tensors. Yields the Device."""
    module = native()
    device().seed(seed)
    instead = {"_native": module, "on_gpu": lambda x: True}
    with ExitStack() as stack:
        stack.enter_context(mock.patch("cgpt_ext._native", module))
        for name in [name for name in sys.modules if name.startswith("cgpt_ext.ops.")]:
            for what in instead.keys() & vars(sys.modules[name]).keys():
                stack.enter_context(mock.patch.object(sys.modules[name], what, instead[what]))
        yield device()
