"""CGPT_SANITIZE, for .ci/sanitize: what setup.py takes, how it refuses the rest, and that a planted defect is reported.

Nothing of the module is compiled here but its parallel loop, csrc/cpu/threads.cpp.
"""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent


def setup(*command, **variables):
    """setup.py with nothing in the place of ninja, which then is all that it ran."""
    environment = {**os.environ, "CXX": "g++", "CGPT_CUDA": "auto", **variables}
    code = "import sys, subprocess, runpy; run = subprocess.run\nclass Done: returncode = 0\n"
    code += "subprocess.run = lambda *args, **kwargs: Done\nsys.argv[0] = 'setup.py'\nrunpy.run_path('setup.py')"
    command = [sys.executable, "-c", code, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("wish", ["adress", "address,thread", "undefined,thread", "address,", "memory"])
def test_an_unknown_sanitizer_is_refused(monkeypatch, wish):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("CGPT_SANITIZE", wish)
    wanted = f"CGPT_SANITIZE must be address, undefined, both with a comma, or thread, got {wish!r}"
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "setup.py"))["sanitizers"]()
    assert str(refused.value) == wanted


@pytest.mark.parametrize("command", [["build_ext", "--inplace"], ["bdist_wheel"], ["build"]])
def test_no_ordinary_build_is_sanitized(command):
    done = setup(*command, CGPT_SANITIZE="thread")
    assert done.returncode == 1
    wanted = "CGPT_SANITIZE is for `python setup.py build_ext` without --inplace, and for nothing else"
    assert done.stderr.splitlines()[-1] == wanted


def test_cuda_is_refused_beside_it(tmp_path):
    folders = ["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    done = setup("build_ext", *folders, CGPT_SANITIZE="thread", CGPT_CUDA="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "CGPT_SANITIZE must go without CUDA, got CGPT_CUDA=1 beside it"


# Without a defect it must be silent, though the second region reads what other tasks of the first wrote.
PLANTED = """
#include <cstdio>
#include <cstring>
#include "cpu/threads.cpp"

int main(int, char** words) {
    const auto is = [&](const char* word) { return !std::strcmp(words[1], word); };
    std::vector<int> one(8), other(8);
    int wide = is("overflow") ? 1 << 30 : 1, past = is("bounds") ? 1 : 0;
    cgpt::set_thread_count(2);
    for (int round = 0; round < 2; ++round) {
        cgpt::parallel_for(8, [&](int64_t i) {
            int twice = wide * 2;
            one.data()[i + past] = twice;
        });
        cgpt::parallel_for(8, [&](int64_t i) {
            other[i] = one[7 - i];
            if (is("race")) other[i ^ 1] = 0;
        });
        one[0] = other[7];
    }
    std::puts("ran");
}
"""
MARKS = {"bounds": "i + past", "overflow": "wide * 2", "race": "i ^ 1"}  # each is on its defect's line


@pytest.mark.parametrize(
    ("names", "flag", "reports"),
    [
        (
            "address,undefined",
            "-fsanitize=address,undefined,float-cast-overflow",
            {"bounds": "heap-buffer-overflow", "overflow": "signed integer overflow: 1073741824 * 2"},
        ),
        ("thread", "-fsanitize=thread", {"race": "data race"}),
    ],
    ids=["address", "thread"],
)
def test_a_planted_defect_is_reported_with_its_line(tmp_path, names, flag, reports):
    folders = ["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    done = setup("-q", "build_ext", *folders, CGPT_SANITIZE=names)
    assert done.returncode == 0, done.stderr
    own = names.replace(",", "-")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"lib-{own}", f"temp-{own}"]
    text = (tmp_path / f"temp-{own}" / "build.ninja").read_text()
    compiler, linker = (line for line in text.splitlines() if line.startswith("  command"))
    assert f" {flag} " in linker
    assert "CGPT_CUDA" not in text
    assert " -s " not in linker

    (tmp_path / "planted.cpp").write_text(PLANTED)
    command = shlex.split(compiler.removeprefix("  command = ").split(" $flags")[0])
    # OpenMP as torch brings it: found by name at run time, and not instrumented.
    rest = [f"-I{ROOT / 'csrc'}", "planted.cpp", "-o", "planted", "-Wl,--no-as-needed", "-lgomp", "-ldl", "-lpthread"]
    done = subprocess.run([*command, *rest], cwd=tmp_path, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr:
        pytest.skip(f"no sanitizer beside this compiler: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    for word in ("none", "bounds", "overflow", "race"):
        done = subprocess.run(["./planted", word], cwd=tmp_path, capture_output=True, text=True, check=False)
        if word in reports:
            line = 1 + next(i for i, text in enumerate(PLANTED.splitlines()) if MARKS[word] in text)
            assert reports[word] in done.stderr
            assert f"planted.cpp:{line}" in done.stderr
            assert done.returncode != 0
        else:
            assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")
