"""`python -m cgpt_ext` and `cgpt info`: what they say where all is well and where it is not; nothing may crash them."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cgpt_ext
from cgpt import cli
from cgpt_ext import __main__ as command
from cgpt_ext import diagnostics, dispatch, machine, selfcheck
from cgpt_ext.diagnostics_text import show, show_check

ROOT = Path(__file__).parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture(scope="module")
def found():
    return diagnostics.report()


def test_every_part_is_found_and_shown(found):
    assert json.loads(json.dumps(found)) == found
    assert not [name for name, part in found.items() if "failed" in part]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["native"]["loads"]
    assert found["native"]["error"] is None
    assert re.match(r"(gcc|clang) \d+", found["native"]["compiler"])
    assert bool(found["native"]["nvcc"]) == bool(found["native"]["archs"]) == found["native"]["cuda_kernels"]
    assert found["cuda"]["available"] == torch.cuda.is_available()
    text = show(found)
    for words in (torch.__version__, "glibc", "GiB", found["cpu"]["isa"], found["native"]["compiler"], *dispatch.TABLE):
        assert words in text, words
    assert diagnostics.sound(found)


def test_what_is_listed_as_needed_is_what_is_installed():
    lines = re.search(r"\ndependencies = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    assert tuple(re.findall(r'^ *"([\w-]+)', lines, re.MULTILINE)) == diagnostics.NEEDED
    assert len({*diagnostics.NEEDED, *diagnostics.OPTIONAL}) == len(diagnostics.NEEDED + diagnostics.OPTIONAL)


def test_a_part_that_fails_says_so_and_leaves_the_rest(monkeypatch):
    def broken(*_):
        raise PermissionError(13, "Permission denied", "/proc/cpuinfo")

    for name in ("processor", "memory", "cores", "driver", "system"):
        monkeypatch.setattr(machine, name, broken)
    monkeypatch.setattr(dispatch, "report", broken)
    monkeypatch.setattr(diagnostics, "versions", broken)
    monkeypatch.setattr(diagnostics, "environment", broken)
    found = diagnostics.report()
    assert found["processor"] == {"failed": "PermissionError: [Errno 13] Permission denied: '/proc/cpuinfo'"}
    text = show(found)
    assert text.count("could not be found out: PermissionError") == 8
    assert "loads; built by" in text


# The native module and torch, missing and broken


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its native module, in the home of a user with a name; and no torch: 2 s less.

    An editable install's finder, which would bring the native module of the tree, is taken away.
    """
    home = tmp_path / "home" / "ada-lovelace"
    home.mkdir(parents=True)
    (home / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [x for x in sys.meta_path if not getattr(x, '__module__', '').startswith('__editable__')]\n"
    )
    (home / "torch.py").write_text('raise OSError("libcudart.so.13: cannot open shared object file")\n')
    shutil.copytree(ROOT / "cgpt_ext", home / "cgpt_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return home / "cgpt_ext"


def python(package, *arguments):
    home = package.parent
    environment = os.environ | {"PYTHONPATH": str(home), "HOME": str(home), "LOGNAME": "ada-lovelace"}
    return subprocess.run([sys.executable, *arguments], cwd=home, env=environment, capture_output=True, text=True)


def unsound(package, *arguments):
    done = python(package, "-m", "cgpt_ext", *arguments)
    assert (done.returncode, done.stderr) == (1, ""), done.stderr
    assert "ada-lovelace" not in done.stdout
    return done.stdout


def test_a_native_module_that_is_missing(package):
    text = unsound(package, "--check")
    assert (
        "DOES NOT LOAD: ModuleNotFoundError: No module named 'cgpt_ext._native'; it is not built: pip install" in text
    )
    assert "FAILED: the native module does not load" in text
    assert "glibc" in text
    (package / "_native.cpython-39-x86_64-linux-gnu.so").touch()
    assert "_native.cpython-39-x86_64-linux-gnu.so is not for" in unsound(package)


def test_a_native_module_that_is_damaged(package):
    (package / f"_native{SUFFIX}").write_bytes(b"\x7fELF" + bytes(100))
    found = json.loads(unsound(package, "--json", "--check"))
    assert found["native"]["loads"] is False
    assert found["native"]["error"].startswith("ImportError: ")
    assert found["native"]["advice"].startswith("its file is broken")
    assert [row["result"] for row in found["check"]] == ["FAILED: the native module does not load"]
    for line in ("from cgpt_ext import layer_norm", "from cgpt_ext import _native", "import cgpt_ext; cgpt_ext.rotary"):
        done = python(package, "-c", line)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: cgpt_ext does not load: ImportError: "), last
        assert last.endswith("`python -m cgpt_ext` says what to do")


def test_the_trainer_says_in_one_line_that_nothing_loads(monkeypatch, capsys):
    def raising(words):
        def train(config):
            raise ImportError(words)

        monkeypatch.setattr("cgpt.train.train", train)

    raising("cgpt_ext does not load: ModuleNotFoundError: No module named 'cgpt_ext._native'")
    assert cli.main(["train"]) == 2
    wanted = "cgpt: cgpt_ext does not load: ModuleNotFoundError: No module named 'cgpt_ext._native'\n"
    assert capsys.readouterr().err == wanted
    raising("No module named 'wandb'")
    with pytest.raises(ImportError, match="wandb"):
        cli.main(["train"])


def test_a_native_module_that_lacks_a_symbol(package):
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    source = "void of_a_newer_version(void); void *PyInit__native(void) { of_a_newer_version(); return 0; }"
    library = package / f"_native{SUFFIX}"
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-Wl,-z,now", "-", "-o", library], input=source, text=True
    )
    assert made.returncode == 0
    text = unsound(package)
    assert "undefined symbol: of_a_newer_version; it is of another version" in text
    assert f"~/cgpt_ext/_native{SUFFIX}" in text or f"<packages>/cgpt_ext/_native{SUFFIX}" in text


def test_a_torch_that_does_not_load(package):
    native = next((ROOT / "cgpt_ext").glob(f"_native{SUFFIX}"))
    shutil.copy(native, package)
    text = unsound(package)
    assert "OPS DO NOT LOAD" in text
    assert "libcudart.so.13: cannot open shared object file" in text
    done = python(package, "-c", "from cgpt_ext import adamw_")
    assert "cgpt_ext does not load: OSError: libcudart.so.13" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("ImportError: /lib/libc.so.6: version `GLIBC_2.38' not found", "built on a newer system"),
        ("ImportError: version `GLIBCXX_3.4.32' not found", "built on a newer system"),
        ("ImportError: libstdc++.so.6: cannot open shared object file: No such file", "the library that it names"),
        ("ImportError: _native.so: wrong ELF class: ELFCLASS32", "another machine's"),
        ("ImportError: something new", "in the source tree"),
    ],
)
def test_advice(words, wanted):
    assert wanted in diagnostics.advice(words)


# GPUs


@pytest.mark.parametrize(
    ("capability", "archs", "wanted"),
    [
        ((8, 0), "80;90a", "machine code of 80"),
        ((8, 9), "80;90a", "machine code of 80"),
        ((8, 9), "80;86;89", "machine code of 89"),
        ((9, 0), "80;90a", "machine code of 90a"),
        ((10, 0), "80;90a", "PTX of 80, which the driver compiles at first use"),
        ((12, 0), "80;120f", "machine code of 120f"),
        ((7, 5), "80;90a", "none: this build is for 80;90a"),
        ((10, 0), "90a", "none: this build is for 90a"),
        ((8, 0), "86", "none: this build is for 86"),
        ((9, 0), "", "none: this build has no CUDA kernels"),
    ],
)
def test_the_code_that_a_gpu_runs(capability, archs, wanted):
    assert diagnostics.code_for(*capability, archs) == wanted


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H100, a build for it and a driver of CUDA 13."""
    hopper = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30)
    built = {"loads": True, "error": None, "cuda_kernels": True}
    built |= {"compiler": "gcc 12.2.0", "nvcc": "13.0.88", "archs": "80;90a"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: hopper)
    monkeypatch.setattr(diagnostics, "native", lambda: built)
    driver = {"version": "580.95.05", "cuda": "13.0", "gpus": ["NVIDIA H100 80GB HBM3"]}
    monkeypatch.setattr(machine, "driver", lambda: driver)
    return SimpleNamespace(built=built, driver=driver)


def test_a_gpu_is_named_with_the_code_it_runs(gpu, monkeypatch):
    found = diagnostics.report()
    assert found["cuda"]["problem"] is None
    text = show(found)
    assert "at work; torch's CUDA is 13.0; driver 580.95.05, of CUDA 13.0, for NVIDIA H100 80GB HBM3" in text
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0, 80.0 GiB; machine code of 90a" in text
    gpu.driver["cuda"] = "12.8"
    assert diagnostics.cuda()["problem"].startswith(
        "the driver runs CUDA up to 12.8, and the kernels were built with 13"
    )
    gpu.driver |= {"cuda": None, "version": None, "gpus": []}
    assert diagnostics.cuda()["problem"] is None
    gpu.built |= {"cuda_kernels": False, "nvcc": "", "archs": ""}
    assert "--config-settings cuda=pypi" in diagnostics.cuda()["problem"]
    assert diagnostics.cuda()["gpus"][0]["code"] == "none: this build has no CUDA kernels"
    monkeypatch.setattr(diagnostics, "native", lambda: {"loads": False, "error": "why", "advice": "what"})
    assert diagnostics.cuda()["problem"] == "the native module does not load"
    assert diagnostics.cuda()["gpus"][0]["code"] == "unknown"


def test_why_a_gpu_is_of_no_use_is_said(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("The driver\nis too old", stacklevel=1))
    assert diagnostics.cuda()["problem"] == "The driver is too old"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert diagnostics.cuda()["problem"] == "torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert (
        diagnostics.cuda()["problem"] == "torch is a build for CPUs; there is a GPU: install torch's CUDA build for it"
    )
    gpu.driver |= {"cuda": None, "version": None, "gpus": []}
    assert diagnostics.cuda()["problem"] == "torch is a build for CPUs"


# The machine's files


def tree(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_processors(tmp_path):
    zen = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx2 fma avx512f sse9\n\nprocessor\t: 1\n"
    assert machine.processor(tree(tmp_path / "a", proc__cpuinfo=zen)) == {
        "name": "AMD EPYC 9B14",
        "instructions": "fma avx2 avx512f",
    }
    arm = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
    found = machine.processor(tree(tmp_path / "b", proc__cpuinfo=arm))
    assert found["instructions"] == "asimd sve"
    assert "implementer 0x41, part 0xd4f" in found["name"]


def test_memory_and_cores_of_control_groups(tmp_path):
    meminfo = "MemTotal:       16 kB\nMemFree: 1 kB\nMemAvailable:    8 kB\nHugePages_Total:       0\n"
    bare = tree(tmp_path / "bare", proc__meminfo=meminfo)
    assert machine.memory(bare) == {"total": 16384, "free": 8192, "limit": None}
    assert machine.cores(bare)["quota"] is None
    assert machine.cores(bare)["allowed"] == len(os.sched_getaffinity(0))
    second = tree(
        tmp_path / "second",
        proc__meminfo=meminfo,
        proc__self__cgroup="0::/pod/job\n",
        sys__fs__cgroup__pod__job__cpu="",
    )
    groups = second / "sys/fs/cgroup/pod"
    (groups / "job/cpu.max").write_text("max 100000\n")
    (groups / "cpu.max").write_text("150000 100000\n")
    (groups / "job/memory.max").write_text("12288\n")
    (groups / "memory.max").write_text("max\n")
    assert machine.memory(second)["limit"] == 12288
    assert machine.cores(second)["quota"] == 1.5
    first = tree(tmp_path / "first", proc__meminfo=meminfo, proc__self__cgroup="3:cpu,cpuacct:/job\n2:memory:/job\n")
    for name, text in (
        ("cpu,cpuacct/job/cpu.cfs_quota_us", "50000"),
        ("cpu,cpuacct/job/cpu.cfs_period_us", "100000"),
        ("cpu,cpuacct/cpu.cfs_quota_us", "-1"),
        ("cpu,cpuacct/cpu.cfs_period_us", "100000"),
        ("memory/job/memory.limit_in_bytes", str(4096)),
        ("memory/memory.limit_in_bytes", str((1 << 63) - 4096)),
    ):
        path = first / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.memory(first)["limit"] == 4096
    assert machine.cores(first)["quota"] == 0.5


def test_more_threads_than_cores(monkeypatch):
    assert diagnostics.threads_problem(2, 64, 2, None) is None
    assert diagnostics.threads_problem(2, 64, 64, 1.5) is None
    assert diagnostics.threads_problem(64, 64, 64, 1.5) == (
        "more than this process carries, which is paid 1.5 cores by its groups: "
        "set OMP_NUM_THREADS=2 or torch.set_num_threads(2)"
    )
    assert "which may run on 8 of 64 cores: set OMP_NUM_THREADS=8 " in diagnostics.threads_problem(64, 64, 8, 9.0)
    monkeypatch.setattr(machine, "cores", lambda: {"machine": 64, "allowed": 64, "quota": 0.5})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        text = show(diagnostics.report())
    finally:
        torch.set_num_threads(before)
    assert re.search(r"^cpu  .*; 3 threads; more than .* set OMP_NUM_THREADS=1 or ", text, re.MULTILINE)


def test_the_driver_without_torch(tmp_path):
    root = tree(tmp_path, sys__module__nvidia__version="580.95.05\n")
    card = root / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    card.parent.mkdir(parents=True)
    card.write_text("Model: \t\t NVIDIA L4\nIRQ:   \t\t 16\nGPU UUID: \t GPU-1f2e3d4c-aaaa-bbbb-cccc-123456789abc\n")
    wanted = {"version": "580.95.05", "cuda": None, "gpus": ["NVIDIA L4"]}
    assert machine.driver(root, library="libcuda-of-nobody.so.1") == wanted
    nothing = {"version": None, "cuda": None, "gpus": []}
    assert machine.driver(tmp_path / "none", library="libcuda-of-nobody.so.1") == nothing


def test_names_are_taken_out(monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f2e3d4c-aaaa-bbbb-cccc-123456789abc")
    monkeypatch.setenv("LD_PRELOAD", "/opt/secret/libjemalloc.so.2:/opt/secret/other.so")
    text = json.dumps(
        diagnostics.without_names({"a": ["/home/grace/lib/x.so", ("/scratch/ada/y.so", 3)], "b": "ada.so"})
    )
    assert json.loads(text) == {"a": ["~/lib/x.so", ["/scratch/<user>/y.so", 3]], "b": "ada.so"}
    found = diagnostics.report()["environment"]
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-..."
    monkeypatch.setattr(diagnostics, "ENVIRONMENT", ())
    assert "environment    nothing set" in show(diagnostics.report())
    assert found["LD_PRELOAD"] == "libjemalloc.so.2 other.so"
    here = diagnostics.without_names(f"{sys.prefix}/lib/a.so and {diagnostics.HERE}/_native.so and {Path.home()}/b")
    assert here == "<python>/lib/a.so and <packages>/cgpt_ext/_native.so and ~/b"
    assert diagnostics.without_names(f"{sys.prefix}-other/a") == f"{sys.prefix}-other/a"


# Every op against its reference


def test_every_op_is_checked_everywhere():
    rows = list(selfcheck.check())
    assert {(row["op"], row["place"]) for row in rows} == {(op, p) for op in dispatch.TABLE for p in selfcheck.places()}
    assert [row for row in rows if row["result"] != "ok"] == []
    assert all(0 <= row["error"] <= row["bar"] for row in rows)
    assert any(row["error"] > 0 for row in rows)
    lines = list(show_check(iter(rows)))
    assert len(lines) == len(rows) / len(selfcheck.BARS)
    assert all(" ok " in line for line in lines)


def results(op):
    rows = [row for row in selfcheck.check(["cpu scalar"]) if row["op"] == op]
    return {row["dtype"]: row["result"] for row in rows}, rows


def test_what_is_wrong_is_seen(monkeypatch, capsys):
    ours = {op: getattr(cgpt_ext, op) for op in ("layer_norm", "attention", "rotary", "embedding", "adamw_")}
    monkeypatch.setattr(cgpt_ext, "layer_norm", lambda *x: ours["layer_norm"](*x) * 1.0001)
    monkeypatch.setattr(cgpt_ext, "attention", lambda *x, causal: ours["attention"](*x))  # the mask left out
    monkeypatch.setattr(cgpt_ext, "rotary", lambda *x: ours["rotary"](*x) * float("nan"))
    monkeypatch.setattr(cgpt_ext, "embedding", lambda ids, *x: ours["embedding"](ids, *(w.detach() for w in x)))
    monkeypatch.setattr(cgpt_ext, "adamw_", lambda *x, **options: None)
    assert results("layer_norm")[0] == {"float32": "WRONG", "bfloat16": "ok", "float16": "ok"}
    assert set(results("attention")[0].values()) == {"WRONG"}
    assert set(results("adamw")[0].values()) == {"WRONG"}
    assert set(results("embedding")[0].values()) == {"FAILED ValueError: zip() argument 2 is longer than argument 1"}
    wrong, rows = results("rotary")
    assert set(wrong.values()) == {"WRONG"}
    assert [row["error"] for row in rows] == [None] * 3
    capsys.readouterr()
    assert command.main(["--check", "--json"]) == 1
    checked = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["check"]
    assert {row["op"] for row in checked if row["result"] != "ok"} == {
        *("layer_norm", "attention", "rotary", "embedding", "adamw"),
    }
    assert cli.main(["info", "--check"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {(line[0], line[2], line[3]) for line in lines if line[1:2] == ["cpu"] and line[2] == "scalar"}
    assert ("layer_norm", "scalar", "WRONG") in verdicts
    assert ("embedding", "scalar", "FAILED") in verdicts
    assert ("gelu_mlp", "scalar", "ok") in verdicts


def test_an_op_that_raises_does_not_end_the_check(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: no kernel image\nis available")

    monkeypatch.setattr(cgpt_ext, "rotary", broken)
    found, _ = results("rotary")
    assert set(found.values()) == {"FAILED RuntimeError: CUDA error: no kernel image is available"}
    assert set(results("layer_norm")[0].values()) == {"ok"}
    monkeypatch.setitem(dispatch.TABLE, "softmax", {"cpu": ("native", "why")})
    assert set(results("softmax")[0].values()) == {"FAILED ValueError: selfcheck: there is no problem for softmax"}


# The commands


def test_the_check_leaves_torchs_random_state_and_instruction_set_alone():
    before, isa = torch.random.get_rng_state(), dispatch.report()["cpu"]["isa"]
    list(selfcheck.check(["cpu scalar"]))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert dispatch.report()["cpu"]["isa"] == isa


def test_cgpt_info_shares_the_report(capsys, found):
    assert cli.main(["info", "--json"]) == 0
    shared = json.loads(capsys.readouterr().out)
    assert {"111M", "13B"} <= set(shared.pop("presets"))
    assert set(shared) == set(found)
    assert shared["native"] == found["native"]


def test_a_reader_that_leaves_is_no_error(package):
    """Nothing but the exit code, which is 1 here anyhow."""
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cgpt_ext"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1
    assert errors == ""


def test_help_teaches_and_mistakes_are_refused(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    text = capsys.readouterr().out
    for words in ("--check", "--json", "Exit code"):
        assert words in text
    with pytest.raises(SystemExit, match="2"):
        command.main(["--chekc"])
