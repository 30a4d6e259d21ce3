"""Builds cgpt_ext._native: one pybind11 module, no torch header, g++ (and nvcc when there) driven by ninja.

CGPT_CUDA=auto|0|1|pypi  add the CUDA kernels when nvcc is found (auto), never, or insist; pypi: with the nvcc of the
                         packages in .build/nvcc.txt, which pip installs for the build by itself
CGPT_CUDA_ARCHS=80;90a   the architectures to compile them for
CGPT_SANITIZE=address,undefined  or thread: the CPU code under the compiler's sanitizers, into folders of its own below
                         build/; for `python setup.py build_ext` alone, and .ci/sanitize runs the tests on it
CXX, NVCC                the compilers
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()

# gcc 12 takes its own AVX-512 headers for uninitialised reads (GCC bug 105593): those warnings are off.
# Contraction is off so that a*b+c means two roundings unless the kernel says fma: CPU and CUDA must agree bit for bit.
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
    " -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
).split()
# In place of CXXFLAGS' -O3, with which a report's lines and frames are hard to find in the source. A float that an
# integer cannot hold is undefined too, but gcc asks for that check by name.
SANITIZED = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all".split()
SANITIZERS = {"address": "address", "undefined": "undefined,float-cast-overflow", "thread": "thread"}
ISAS = {"scalar": []}
if platform.machine() == "x86_64":
    ISAS["avx2"] = "-mavx2 -mfma -mf16c".split()
    ISAS["avx512"] = [
        *ISAS["avx2"],
        *"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512".split(),
    ]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
    ISAS["amx"] = [*ISAS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]


def sanitizers():
    """The names in CGPT_SANITIZE, sorted; none where the build is an ordinary one."""
    wish = os.environ.get("CGPT_SANITIZE", "")
    names = sorted(set(wish.split(","))) if wish else []
    if not set(names) <= set(SANITIZERS) or ("thread" in names and len(names) > 1):
        sys.exit(f"CGPT_SANITIZE must be address, undefined, both with a comma, or thread, got {wish!r}")
    return names


def cuda_home():
    """The CUDA toolkit's root, or None where the build is to do without."""
    wish = os.environ.get("CGPT_CUDA", "auto")
    if wish not in ("auto", "0", "1", "pypi"):
        sys.exit(f"CGPT_CUDA must be auto, 0, 1 or pypi, got {wish!r}")
    if wish == "1" and sanitizers():
        sys.exit("CGPT_SANITIZE must go without CUDA, got CGPT_CUDA=1 beside it")
    if wish == "0" or sanitizers():
        return None
    if wish == "pypi":
        nvcc = packaged_nvcc()
    else:
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        if wish == "1":
            sys.exit(
                "CGPT_CUDA=1 but there is no nvcc on PATH, in NVCC or in /usr/local/cuda/bin; CGPT_CUDA=pypi brings one"
            )
        return None
    # nvcc may be a link or a wrapper script: it alone knows where it lives.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    if top is None:
        sys.exit(f"{nvcc} --dryrun does not say where the toolkit is: {dry.stderr.strip() or 'no output'}")
    return Path(top[1]).resolve()


def packaged_nvcc():
    """The nvcc of NVIDIA's packages, which share the namespace `nvidia` and come where the build's Python looks."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        if nvcc := shutil.which(Path(folder) / "cu13" / "bin" / "nvcc"):
            return nvcc
    sys.exit("CGPT_CUDA=pypi but nvcc's packages are not installed: pip install -r .build/nvcc.txt")


def nvcc_version(home):
    """The release, "13.0.88" for one; "" where nvcc does not say."""
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"V(\d+(?:\.\d+)*)", said)
    return release[1] if release else ""


def compression(version):
    """nvcc's flag for a quarter of the size; older drivers than those of CUDA 13 may not be able to unpack it."""
    return ["--compress-mode=size"] if int(version.split(".")[0] or 0) >= 13 else []


def cuda_archs():
    archs = os.environ.get("CGPT_CUDA_ARCHS", "80;90a")
    if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", archs):
        sys.exit(f"CGPT_CUDA_ARCHS must be architectures such as 80;90a, got {archs!r}")
    return archs.split(";")


def gencode(archs):
    """nvcc's flags for each architecture: machine code for all, PTX of the first for those that come later."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]


class Ninja:
    """A build.ninja file: rules, one edge per object, one link."""

    def __init__(self):
        self.lines = ["ninja_required_version = 1.5"]
        self.objects = []

    def rule(self, name, command, depfile=True):
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule, source, name, flags=""):
        obj = f"{name}.o"
        self.lines += [f"build {obj}: {rule} {escape(source)}", f"  flags = {flags}"]
        self.objects.append(obj)

    def link(self, rule, target):
        self.lines += [
            f"build {escape(target)}: {rule} {' '.join(self.objects)}",
            f"default {escape(target)}",
        ]


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(path):
    return f"'{path}'".replace("$", "$$")


class NinjaBuildExt(build_ext):
    """One ninja run with both languages in it, so that every core is busy from the first file to the last."""

    def finalize_options(self):
        super().finalize_options()
        if names := sanitizers():
            # Never where a wheel or an import would take it for the ordinary module.
            if self.inplace or self.distribution.commands != ["build_ext"]:
                sys.exit("CGPT_SANITIZE is for `python setup.py build_ext` without --inplace, and for nothing else")
            self.build_temp, self.build_lib = (
                "-".join([folder, *names]) for folder in (self.build_temp, self.build_lib)
            )

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        csrc = ROOT / "csrc"
        home = cuda_home()
        includes = " ".join(f"-isystem {quote(p)}" for p in (pybind11.get_include(), sysconfig.get_path("include")))
        defines = "-DCGPT_CUDA" if home else ""
        version = nvcc_version(home) if home else ""
        words = {"CGPT_NVCC": version, "CGPT_CUDA_ARCHS": ";".join(cuda_archs())} if home else {}
        built_with = " ".join(f"-D{name}=" + quote(f'"{word}"') for name, word in words.items())
        cxx = os.environ.get("CXX", "g++")
        names = sanitizers()
        sanitize = ["-fsanitize=" + ",".join(SANITIZERS[name] for name in names)] if names else []
        cxxflags = [*CXXFLAGS, *SANITIZED, *sanitize] if names else CXXFLAGS
        file = Ninja()
        file.rule("cxx", f"{cxx} {' '.join(cxxflags)} {defines} {includes} $flags -MMD -MF $out.d -c $in -o $out")
        for source in sorted(csrc.glob("*.cpp")):
            file.compile("cxx", source, source.stem, built_with if source.stem == "module" else "")
        for source in sorted((csrc / "host").glob("*.cpp")):
            file.compile("cxx", source, f"host_{source.stem}")
        shared = [csrc / "cpu" / "isa.cpp", csrc / "cpu" / "threads.cpp"]
        for source in shared:
            file.compile("cxx", source, f"cpu_{source.stem}")
        # Lowest instruction set first: of an inline function that several objects carry (std::vector's, say) the linker
        # keeps the first copy, and that one must run on every machine.
        for isa, flags in ISAS.items():
            for source in sorted(set((csrc / "cpu").glob("*.cpp")) - set(shared)):
                file.compile("cxx", source, f"cpu_{source.stem}_{isa}", " ".join([f"-DCGPT_ISA={isa}", *flags]))
        libraries = "-ldl -lpthread"
        if home:
            host = "-fPIC,-fvisibility=hidden"
            file.rule(
                "nvcc",
                f"{quote(home / 'bin' / 'nvcc')} -std=c++17 -O3 -fmad=false -ccbin {cxx} -Xcompiler {host}"
                f" {' '.join(gencode(cuda_archs()) + compression(version))} $flags -MD -MF $out.d -c $in -o $out",
            )
            for source in sorted((csrc / "cuda").glob("*.cu")):
                file.compile("nvcc", source, f"cuda_{source.stem}")
            for source in sorted((csrc / "cuda").glob("*.cpp")):
                file.compile("cxx", source, f"cuda_{source.stem}", f"-isystem {quote(home / 'include')}")
            libraries = f"-L{quote(home / 'lib64')} -L{quote(home / 'lib')} -lcudart_static -lrt {libraries}"
        stripped = "" if names else "-s"  # a report names functions and lines
        flags = " ".join(["-shared -Wl,--exclude-libs,ALL", stripped, *sanitize])
        file.rule("link", f"{cxx} {flags} $in {libraries} -o $out", depfile=False)
        file.link("link", target)
        (work / "build.ninja").write_text("\n".join(file.lines) + "\n")

        executable = Path(ninja.BIN_DIR) / "ninja"
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([executable, *jobs], cwd=work, check=False).returncode:
            sys.exit("the native module did not compile; the compiler's own words are above")


class Sdist(sdist):
    """What a build needs and nothing else: setuptools would add tests/test*.py without what they import."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [name for name in files if Path(name).parts[0] != "tests"])


def sources(*patterns):
    """csrc's files, relative to here: what the sdist must carry (the edges above find theirs by themselves)."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").rglob(pattern))


native = Extension(
    "cgpt_ext._native",
    sources=sources("*.cpp", "*.cu"),
    depends=[*sources("*.h", "*.cuh"), ".build/backend.py", ".build/nvcc.txt"],
)
setup(ext_modules=[native], cmdclass={"build_ext": NinjaBuildExt, "sdist": Sdist})
