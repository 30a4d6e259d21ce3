"""The instruction set amx of csrc/cpu on a machine without AMX: `with on_tiles():` bf16 attention runs it.

g++ compiles the kernels with setup.py's own flags for amx and intrinsics.h before them, which plays the tiles after
Intel's pseudo-code and raises a RuntimeError where a processor would fault. Needs AVX-512 with bf16. `gemm()` is
csrc/cpu/gemm.h by itself, as it is or with a mistake planted in it.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import ninja
import pybind11

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "tiles"

# gcc 12 takes its own AVX-512 headers for uninitialised reads (GCC bug 105593).
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wno-uninitialized"
AMX = (
    "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -mavx512bf16"
    f" -mamx-tile -mamx-bf16 -DCGPT_ISA=amx -include {HERE / 'intrinsics.h'}"
)

# Mistakes in csrc/cpu/amx.h: what is written there, and what instead.
DEFECTS = {
    "no configuration": ("_tile_loadconfig(&kTileShapes);", ""),
    "no release": ("_tile_release();", ""),
    "a wrong stride": (
        "_tile_loadd(7, columns + kTileSide * 4, line);",
        "_tile_loadd(7, columns + kTileSide * 4, row);",
    ),
    "a wrong tile": ("_tile_dpbf16ps(3, 5, 7);", "_tile_dpbf16ps(3, 4, 7);"),
    "factors exchanged": ("_tile_dpbf16ps(0, 4, 6);", "_tile_dpbf16ps(0, 6, 4);"),
    "a short tile": ("{16, 16, 16, 16, 16, 16, 16, 16}}", "{16, 16, 16, 16, 16, 16, 16, 15}}"),
    "half a step": ("columns += kTileSide * line;", "columns += kTileSide / 2 * line;"),
}


def _plant(name: str) -> Path:
    """A copy of csrc's headers with that defect; returns its folder."""
    folder = WORK / name.replace(" ", "_")
    right, wrong = DEFECTS[name]
    for header in [*CSRC.glob("*.h"), *(CSRC / "cpu").glob("*.h")]:
        text = header.read_text()
        if header.name == "amx.h":
            assert text.count(right) == 1, f"{right!r} must stand once in amx.h, got {text.count(right)} of it"
            text = text.replace(right, wrong)
        copy = folder / header.relative_to(CSRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    return folder


def _build(target: str, edges: list[tuple[str, Path, str]]) -> Path:
    """Compiles (object, source, flags) where they have changed and links them to `target`; returns its path."""
    WORK.mkdir(parents=True, exist_ok=True)
    name = f"{target}{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = os.environ.get("CXX", "g++")
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {compiler} {FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -ldl -o $out",
    ]
    for obj, source, flags in edges:
        lines += [f"build {target}/{obj}.o: cxx {source}", f"  flags = {flags}"]
    lines += [f"build {name}: link {' '.join(f'{target}/{obj}.o' for obj, *_ in edges)}", f"default {name}"]
    (WORK / f"{target}.ninja").write_text("\n".join(lines) + "\n")
    command = [Path(ninja.BIN_DIR) / "ninja", "-f", f"{target}.ninja"]
    done = subprocess.run(command, cwd=WORK, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the kernels did not compile for software's tiles:\n{done.stdout}{done.stderr}")
    return WORK / name


@cache
def gemm(defect: str | None = None) -> ctypes.CDLL:
    """gemm.cpp's functions, on amx.h as it is or with one of DEFECTS."""
    include = CSRC if defect is None else _plant(defect)
    target = "gemm" if defect is None else "gemm_" + re.sub(r"\W", "_", defect)
    edge = ("gemm", HERE / "gemm.cpp", f"{AMX} -I{include / 'cpu'}")
    library = ctypes.CDLL(str(_build(target, [edge])))
    number, place = ctypes.c_int64, ctypes.c_void_p
    library.product.argtypes = [number] * 4 + [place, number, place, number, ctypes.c_float, place, number]
    library.whole_tile.argtypes = [number, place, number, place, ctypes.c_int, place]
    library.product.restype = library.whole_tile.restype = ctypes.c_char_p
    library.constant.restype = number
    return library


@cache
def native():
    """What cgpt_ext._native would be on a machine with AMX, as far as it goes through tiles."""
    python = " ".join(f"-isystem {p}" for p in (pybind11.get_include(), sysconfig.get_path("include")))
    edges = [(p.stem, p, "") for p in (CSRC / f"{name}.cpp" for name in ("attention", "check"))]
    edges.append(("threads", CSRC / "cpu" / "threads.cpp", ""))
    on_tiles = ("attention_fwd", "attention_bwd", "matmul")
    edges += [(f"cpu_{name}", CSRC / "cpu" / f"{name}.cpp", AMX) for name in on_tiles]
    edges.append(("module", HERE / "module.cpp", f"{AMX} -I{CSRC} {python}"))
    loader = importlib.machinery.ExtensionFileLoader("_tiles", str(_build("_tiles", edges)))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_tiles", loader))
    loader.exec_module(module)
    return module


@contextmanager
def on_tiles():
    """cgpt_ext's attention runs the instruction set amx. Yields native()."""
    import cgpt_ext.ops.attention

    with mock.patch.object(sys.modules[cgpt_ext.ops.attention.__name__], "_native", native()):
        yield native()
