"""What is built and what goes into it: the backend's hooks, the sources that a build needs, the packages of the wheel.

.ci/wheels builds the wheels themselves, installs them and runs them.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"}
TEXT = (ROOT / "pyproject.toml").read_text()
WITHOUT_CUDA = {name: value for name, value in os.environ.items() if name not in ("CGPT_CUDA", "NVCC")}


@pytest.fixture
def backend(monkeypatch):
    """The build backend, with setuptools' own answers in place of a run of setup.py."""
    monkeypatch.delenv("CGPT_CUDA", raising=False)
    spec = importlib.util.spec_from_file_location("backend", ROOT / ".build" / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kind in ("wheel", "editable"):
        monkeypatch.setattr(module.build_meta, f"get_requires_for_build_{kind}", lambda settings: ["setuptools' own"])
        monkeypatch.setattr(module.build_meta, f"build_{kind}", lambda *given: (os.environ["CGPT_CUDA"], *given))
    return module


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_nvcc_is_brought_on_request_alone(backend, monkeypatch, kind):
    requires = getattr(backend, f"get_requires_for_build_{kind}")
    for wish in ("auto", "0", "1"):
        assert requires({"cuda": wish}) == ["setuptools' own"]
    assert requires() == requires(None) == requires({}) == ["setuptools' own"]
    own, *added = requires({"cuda": "pypi"})
    assert own == "setuptools' own"
    assert {re.fullmatch(r"([a-z-]+)==[\d.]+", line)[1] for line in added} == NVCC  # each pinned
    monkeypatch.setenv("CGPT_CUDA", "pypi")
    assert requires() == [own, *added]
    assert requires({"cuda": "auto"}) == [own]  # a setting stands before the environment


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_setup_is_told_and_the_environment_left_as_it_was(backend, monkeypatch, kind):
    build = getattr(backend, f"build_{kind}")
    settings = {"cuda": "0"}
    assert build("folder", settings, "metadata") == ("0", "folder", settings, "metadata")
    assert build("folder")[0] == "auto"
    assert "CGPT_CUDA" not in os.environ
    monkeypatch.setenv("CGPT_CUDA", "1")
    assert build("folder")[0] == "1"
    assert build("folder", settings)[0] == "0"
    assert os.environ["CGPT_CUDA"] == "1"


@pytest.mark.parametrize("wish", ["yes", "", "PyPI", ["0", "1"]])
def test_a_setting_that_means_nothing_ends_the_build(backend, wish):
    with pytest.raises(SystemExit, match=re.escape(f"cuda must be one of auto, 0, 1, pypi, got {wish!r}")):
        backend.get_requires_for_build_wheel({"cuda": wish})


def setup(*code, **environment):
    """setup.py's names in a process of its own, without running setup(): what `code` prints or exits with."""
    pytest.importorskip("pybind11")
    script = "import setuptools; setuptools.setup = lambda **_: None; import setup; " + "; ".join(code)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=WITHOUT_CUDA | environment, capture_output=True, text=True
    )
    return (done.stdout or done.stderr).strip()


def test_the_toolkit_that_setup_finds(tmp_path):
    toolkit = tmp_path / "site" / "nvidia" / "cu13"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo V13.7.1 || echo "#$ TOP={toolkit}/bin/.." >&2\n')
    nvcc.chmod(0o755)
    found = "print(setup.cuda_home())"
    packages = str(tmp_path / "site")
    assert setup(found, CGPT_CUDA="pypi", PYTHONPATH=packages) == str(toolkit)
    assert setup(found, CGPT_CUDA="1", NVCC=str(nvcc)) == str(toolkit)
    assert setup(found, CGPT_CUDA="0", NVCC=str(nvcc), PYTHONPATH=packages) == "None"
    assert setup("print(setup.nvcc_version(setup.cuda_home()))", NVCC=str(nvcc)) == "13.7.1"
    assert setup(found, CGPT_CUDA="2") == "CGPT_CUDA must be auto, 0, 1 or pypi, got '2'"
    nvcc.chmod(0o644)
    assert "pip install -r .build/nvcc.txt" in setup(found, CGPT_CUDA="pypi", PYTHONPATH=packages)
    assert (ROOT / ".build" / "nvcc.txt").is_file()


def test_architectures_are_read_or_refused():
    flags = "print(setup.gencode(setup.cuda_archs()))"
    assert "code=sm_90a" in setup(flags)
    assert "90a" not in setup(flags, CGPT_CUDA_ARCHS="86")
    for wrong in ("8.6", "sm_80", "80,90", "80;", ""):
        assert (
            setup(flags, CGPT_CUDA_ARCHS=wrong)
            == f"CGPT_CUDA_ARCHS must be architectures such as 80;90a, got {wrong!r}"
        )


def test_kernels_are_packed_where_every_driver_can_unpack_them():
    packed = "; ".join(f"print(setup.compression({version!r}))" for version in ("13.0.88", "14.1", "12.9.1", ""))
    assert setup(packed).splitlines() == ["['--compress-mode=size']"] * 2 + ["[]"] * 2


def test_the_sdist_holds_what_a_build_needs_and_nothing_else(tmp_path):
    """From a copy of the tree, so that what an earlier build left beside it can neither help nor harm."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    for folder in (".build", "csrc", "cgpt_ext", "python/cgpt"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tree / "tests").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "tests/test_packaging.py"):
        shutil.copy(ROOT / name, tree / name)
    script = "import sys; sys.path.insert(0, '.build'); import backend; print(backend.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tree / "dist" / done.stdout.splitlines()[-1]) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    for folder in (".build", "csrc", "cgpt_ext", "python/cgpt"):
        files = [path.relative_to(tree) for path in (tree / folder).rglob("*") if path.is_file()]
        wanted |= {str(path) for path in files if "__pycache__" not in path.parts}  # of the backend, just imported
    generated = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("cgpt_ext.egg-info/")}
    assert names - generated == wanted


def test_the_wheel_holds_every_package_and_every_file_beside_them():
    tables = (tomllib() or pytest.skip("no tomllib before Python 3.11")).loads(TEXT)["tool"]["setuptools"]
    files = [
        path.relative_to(top).as_posix()
        for top, name in ((ROOT, "cgpt_ext"), (ROOT / "python", "cgpt"))
        for path in (top / name).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    ]
    code = {Path(name).parent.as_posix().replace("/", ".") for name in files if name.endswith(".py")}
    assert code == set(tables["packages"])
    for name in (name for name in files if not name.endswith(".py")):
        held = [
            Path(name).match(f"{package.replace('.', '/')}/{pattern}")
            for package, patterns in tables["package-data"].items()
            for pattern in patterns
        ]
        assert any(held), f"{name} is in no package-data"


def tomllib():
    return importlib.import_module("tomllib") if sys.version_info >= (3, 11) else None
