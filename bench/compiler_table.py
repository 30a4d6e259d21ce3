"""What nvcc made of every kernel, read from the built module: no GPU and no second compilation.

    python bench/compiler_table.py            prints the table
    python bench/compiler_table.py --check    compares it with bench/results/compiler/nvcc.json; 1 where they differ
    python bench/compiler_table.py --write    builds, compiles each .cu once more under a clock, writes that file

Per kernel and architecture: registers a thread, bytes of its stack frame, static shared memory (1,024 bytes on sm_90
are the driver's; what a launch asks for comes on top), and how often the machine code (SASS) holds each instruction of
INSTRUCTIONS. A spill is a stack frame with loads and stores of local memory, so none of these is none of it. Needs
cuobjdump, which Triton's package carries.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "bench" / "results" / "compiler" / "nvcc.json"

# name -> what counts as it: an opcode and the modifiers it must have
INSTRUCTIONS = {
    "HMMA": r"HMMA\.",  # mma.sync, the tensor cores' product
    "LDGSTS": r"LDGSTS\.",  # cp.async: global to shared memory past the registers
    "LDSM": r"LDSM\.",  # ldmatrix
    "LDG.128": r"LDG\.(?:\w+\.)*128",
    "STG.128": r"STG\.(?:\w+\.)*128",
    "LDL": r"LDL",  # local memory: spills, and arrays that no register can index
    "STL": r"STL",
}

# kernel (its name's beginning) -> what it is built on: a kernel without one of these is not the kernel that was meant
TENSOR_CORES = ("HMMA", "LDGSTS", "LDSM")
MUST_HAVE = {
    "attention_fwd_kernel": TENSOR_CORES,
    "attention_bwd_dkdv_kernel": TENSOR_CORES,
    "attention_bwd_dq_kernel": TENSOR_CORES,
    "attention_bwd_delta_kernel": ("LDG.128",),
    "gemm_kernel": TENSOR_CORES,
    "gelu_mlp_fwd_kernel": ("LDG.128", "STG.128"),
    "gelu_mlp_bwd_kernel": ("LDG.128", "STG.128"),
    "layer_norm_fwd_kernel": ("LDG.128", "STG.128"),
    "layer_norm_bwd_kernel": ("LDG.128", "STG.128"),
    "cross_entropy_rows_kernel": ("LDG.128", "STG.128"),
    "embedding_fwd_kernel": ("LDG.128", "STG.128"),
    "embedding_bwd_kernel": ("LDG.128", "STG.128"),
    "rotary_kernel": ("LDG.128", "STG.128"),
    "adamw_kernel": ("LDG.128", "STG.128"),
}

# kernel (its name's beginning) -> why its spills may stay, with numbers
SPILLS = {}


class Problem(Exception):
    """One line that says why there is no table."""


def cuobjdump() -> Path:
    """The disassembler: on PATH, in the CUDA toolkit, or in Triton's package."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found:
        return Path(found)
    spec = find_spec("triton")
    if spec is not None and spec.origin:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return path
    raise Problem("no cuobjdump on PATH, in /usr/local/cuda/bin or in Triton's package")


def built_module() -> Path:
    """cgpt_ext/_native's file. Raises Problem where it has no CUDA kernels."""
    from cgpt_ext import _native

    if not _native.has_cuda_kernels:
        raise Problem(f"{_native.__file__}: built without CUDA kernels")
    return Path(_native.__file__)


def nvcc_version() -> str:
    """The nvcc that compiled the module, by the module's own word: its cubins, which say so too, are packed."""
    from cgpt_ext import _native

    return _native.built_with["nvcc"]


def kernel_rows(module: Path) -> list[dict]:
    """One row a kernel and architecture, in the order of their names."""
    tool = cuobjdump()
    rows = parse_resources(run([tool, "-res-usage", module]))
    for key, counts in parse_sass(run([tool, "-sass", module])).items():
        rows[key]["instructions"] = counts
    names = short_names(sorted({mangled for _, mangled in rows}))
    listed = [{"kernel": names[mangled], "arch": arch, **row} for (arch, mangled), row in rows.items()]
    return sorted(listed, key=lambda row: (row["kernel"], row["arch"]))


def parse_resources(text: str) -> dict[tuple[str, str], dict]:
    """(architecture, mangled name) -> registers, stack and shared memory, from `cuobjdump -res-usage`."""
    rows, arch, name = {}, None, None
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) ", line):
            registers, stack, shared = map(int, found.groups())
            rows[arch, name] = {"registers": registers, "stack": stack, "shared": shared}
    return rows


def parse_sass(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled name) -> how often each of INSTRUCTIONS occurs, from `cuobjdump -sass`."""
    counts, arch, here = {}, None, None
    opcode = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    for line in text.splitlines():
        if found := opcode.match(line):
            for name, pattern in INSTRUCTIONS.items():
                if re.match(pattern, found[1]):
                    here[name] += 1
        elif found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\w+)", line):
            here = counts[arch, found[1]] = dict.fromkeys(INSTRUCTIONS, 0)
    return counts


def short_names(mangled: list[str]) -> dict[str, str]:
    """Mangled -> as the source has it: no return type, namespaces or parameters, template arguments kept."""
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    if demangler is None:
        raise Problem("no c++filt, which comes with the C++ compiler, to read kernels' names")
    full = run([demangler], input="\n".join(mangled)).splitlines()
    names = {name: shorten(text) for name, text in zip(mangled, full, strict=True)}
    taken = Counter(names.values())
    return {name: short if taken[short] == 1 else f"{source_of(name)}: {short}" for name, short in names.items()}


def source_of(mangled: str) -> str:
    """The .cu file of a kernel in an unnamed namespace, whose mangled name nvcc makes unique by it."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", mangled)
    return f"{found[1]}.cu" if found else mangled


def shorten(name: str) -> str:
    """`void cgpt::(anonymous namespace)::f<cgpt::cuda::bf16, (cgpt::Kind)1>(int)` -> `f<bf16, (Kind)1>`."""
    name = re.sub(r"(?:\(anonymous namespace\)|\bcgpt|\bcuda)::", "", name).replace(" >", ">")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        if letter == "(" and depth == 0:
            end = i  # where the parameters begin
            break
        depth += (letter == "<") - (letter == ">")
    return name[:end].removeprefix("void ")


def problems(rows: list[dict]) -> list[str]:
    """Spills without a reason, instructions that are missing, static shared memory, and rules that no kernel meets."""
    found = []
    for row in rows:
        where, counts = f"{row['arch']} {row['kernel']}", row["instructions"]
        if (row["stack"] or counts["LDL"] or counts["STL"]) and not matching(SPILLS, row):
            local = f"{counts['STL']} stores and {counts['LDL']} loads of local memory"
            found.append(f"{where}: spills {row['stack']} bytes, {local}")
        for rule in matching(MUST_HAVE, row):
            missing = [name for name in MUST_HAVE[rule] if not counts[name]]
            if missing:
                found.append(f"{where}: has no {' and no '.join(missing)}")
    for rules in (MUST_HAVE, SPILLS):
        for rule in rules:
            if not any(matching({rule: ()}, row) for row in rows):
                found.append(f"{rule}: a rule for a kernel that there is not")
    return found


def matching(rules: dict, row: dict) -> list[str]:
    name = row["kernel"].split(".cu: ")[-1]
    return [rule for rule in rules if name.startswith(rule)]


def differences(committed: list[dict], built: list[dict]) -> list[str]:
    """What changed between two tables, a line each; architectures that only the committed one has are left out."""
    archs = {row["arch"] for row in built}
    before, after = (
        {(row["arch"], row["kernel"]): flat(row) for row in rows if row["arch"] in archs} for rows in (committed, built)
    )
    lines = [f"{arch} {kernel}: gone" for arch, kernel in sorted(before.keys() - after.keys())]
    lines += [f"{arch} {kernel}: new" for arch, kernel in sorted(after.keys() - before.keys())]
    for key in sorted(before.keys() & after.keys()):
        old, new = before[key], after[key]
        moved = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
        if moved:
            lines.append(f"{key[0]} {key[1]}: {', '.join(moved)}")
    return lines


def flat(row: dict) -> dict[str, int]:
    return {"registers": row["registers"], "stack": row["stack"], "shared": row["shared"], **row["instructions"]}


def table(rows: list[dict]) -> str:
    """The rows as text."""
    columns = ["registers", "stack", "shared", *INSTRUCTIONS]
    widths = [max(len(name), 6) for name in columns]
    width = max(len(row["kernel"]) for row in rows)
    head = "  ".join(name.rjust(w) for name, w in zip(columns, widths, strict=True))
    lines = [f"{'arch':8} {'kernel':{width}}  {head}"]
    for row in rows:
        values = flat(row)
        cells = "  ".join(str(values[name]).rjust(w) for name, w in zip(columns, widths, strict=True))
        lines.append(f"{row['arch']:8} {row['kernel']:{width}}  {cells}")
    return "\n".join(lines)


def compile_times() -> list[dict]:
    """Seconds and peak memory of each .cu's compiler, all architectures together, one file at a time."""
    run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT)
    builds = sorted((ROOT / "build").glob("temp.*/build.ninja"), key=lambda path: path.stat().st_mtime)
    work = builds[-1].parent
    ninja = [sys.executable, "-m", "ninja", "-t", "commands"]
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = run([*ninja, f"cuda_{source.stem}.o"], cwd=work).strip()
        began = time.monotonic()
        child = subprocess.Popen(command, shell=True, cwd=work)
        _, status, usage = os.wait4(child.pid, 0)  # its memory: the largest process that it started or is
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise Problem(f"{source}: nvcc failed")
        (work / f"cuda_{source.stem}.o.d").unlink(missing_ok=True)  # ninja keeps its own copy of it
        seconds, megabytes = time.monotonic() - began, usage.ru_maxrss / 1024
        rows.append({"file": source.name, "seconds": round(seconds, 1), "peak_megabytes": round(megabytes)})
        print(f"{source.name:28} {seconds:6.1f} s {megabytes:6.0f} MB", flush=True)
    return rows


def read_table() -> dict:
    return json.loads(TABLE.read_text())


def write_table(nvcc: str, rows: list[dict], times: list[dict]) -> None:
    """One row a line, so that a diff shows kernels."""
    parts = {"kernels": rows, "compiling": times}
    lists = [f'"{name}": [\n' + ",\n".join(map(json.dumps, part)) + "\n]" for name, part in parts.items()]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("{\n" + ",\n".join([f'"nvcc": {json.dumps(nvcc)}', *lists]) + "\n}\n")


def run(command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise Problem(f"{Path(str(command[0])).name}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def check(nvcc: str, rows: list[dict]) -> list[str]:
    """Everything that is wrong with the built kernels. Numbers of another nvcc are not comparable, so not compared."""
    found = problems(rows)
    committed = read_table()
    if committed["nvcc"] == nvcc:
        found += differences(committed["kernels"], rows)
    else:
        print(f"built with nvcc {nvcc}, the committed table with {committed['nvcc']}: numbers not compared")
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--write", action="store_true", help="build, measure and write the table")
    options = parser.parse_args(argv)
    try:
        times = compile_times() if options.write else []
        module = built_module()
        nvcc, rows = nvcc_version(), kernel_rows(module)
        if options.write:
            write_table(nvcc, rows, times)
            print(f"wrote {TABLE.relative_to(ROOT)}")
        if not options.check:
            print(table(rows))
        found = check(nvcc, rows) if options.check else problems(rows)
    except Problem as problem:
        print(f"compiler_table: {problem}", file=sys.stderr)
        return 2
    for line in found:
        print(line)
    if not found:
        print(f"{len(rows)} kernels, {len({row['arch'] for row in rows})} architectures: as wanted")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
