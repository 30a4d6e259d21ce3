"""What Triton makes of every kernel for sm_80 and sm_90, compiled without a GPU: registers, spills and shared memory.

    python bench/triton_table.py [NAME ...]            compiles and prints all rows, or those of a NAME
    python bench/triton_table.py --check [NAME ...]    compares them with results/compiler/triton.json
    python bench/triton_table.py --write               compiles every config of every kernel and writes that file

A row is {kernel, arch, registers, spills, shared}: registers a thread, bytes a thread of local memory (no kernel here
has any but what is spilled), bytes of shared memory a block. A kernel's name carries what it was specialised for.
The numbers, spills included, are one Triton release's, which .ci/run installs: another's are shown and not judged.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton

TABLE = Path(__file__).parent / "results" / "compiler" / "triton.json"
ARCHS = {"sm_80": 80, "sm_90": 90}


@dataclass(frozen=True)
class Case:
    """A kernel and what it is specialised for: `types` of its arguments by name, constants (None among them)."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict
    config: triton.Config
    archs: tuple[str, ...] = tuple(ARCHS)

    @property
    def label(self) -> str:
        tile = " ".join(f"{name.removeprefix('BLOCK_').lower()}{size}" for name, size in self.config.kwargs.items())
        return f"{self.name} {tile} w{self.config.num_warps} s{self.config.num_stages}"


def attention_cases() -> Iterator[Case]:
    """Causal alone, and with all there is besides: a window, ALiBi, packed sequences, grouped heads."""
    from cgpt_ext.triton import attention_bwd as bwd
    from cgpt_ext.triton import attention_fwd as fwd
    from cgpt_ext.triton.attention_tiles import HEAD_DIMS, choices, split_head_dim

    kernels = {
        "attention_fwd": (fwd.attention_fwd_kernel, fwd.CONFIGS),
        "attention_dkdv": (bwd.attention_dkdv_kernel, bwd.DKDV_CONFIGS),
        "attention_dq": (bwd.attention_dq_kernel, bwd.DQ_CONFIGS),
    }
    options = ("slopes_ptr", "cu_q_ptr", "cu_k_ptr")
    for dtype, D in [*(("bf16", D) for D in (64, 80, 96, 128, 192, 256)), *(("fp32", D) for D in (64, 128, 256))]:
        D0, D1 = split_head_dim(D)
        row = next(most for most in HEAD_DIMS if most >= D), 4 if dtype == "fp32" else 2
        head_dim = {"D": D, "D0": D0, "D1": D1}
        for name, (kernel, table) in kernels.items():
            types = _types(kernel, dtype, lse_ptr="*fp32", delta_ptr="*fp32", scale="fp32")
            types |= {"slopes_ptr": "*fp32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32"}
            causal = head_dim | {"LEFT": False, "RIGHT": True, "NEGATIVE": False, "GROUP": 1}
            for arch, number in ARCHS.items():
                for config in choices(table, *row, False, number):
                    constants = causal | dict.fromkeys(options)
                    yield Case(f"{name} {dtype} d{D} causal", kernel, types, constants, config, (arch,))
                for config in choices(table, *row, True, number):
                    constants = causal | {"LEFT": True, "GROUP": 4}
                    yield Case(f"{name} {dtype} d{D} all", kernel, types, constants, config, (arch,))
        kernel = bwd.attention_delta_kernel
        types = _types(kernel, dtype, delta_ptr="*fp32")
        config = triton.Config({"BLOCK_M": bwd.DELTA_ROWS})
        yield Case(f"attention_delta {dtype} d{D}", kernel, types, head_dim | {"cu_q_ptr": None}, config)


def gelu_mlp_cases() -> Iterator[Case]:
    from cgpt_ext.triton import gelu_mlp as m

    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for activation, number in m.ACTIVATIONS.items():
            constants = {"ACTIVATION": number, "EVEN_K": True, "stride_xd": 1, "stride_wd": 1, "stride_yd": 1}
            for config in m.CONFIGS[size, activation == "swiglu"]:
                kernel = m.gelu_mlp_fwd_kernel
                yield Case(f"gelu_mlp_fwd {dtype} {activation}", kernel, _types(kernel, dtype), constants, config)
            kernel = m.gelu_mlp_bwd_kernel
            types = _types(kernel, dtype, partial_ptr="*fp32")
            for config in m.BWD_CONFIGS[size, activation == "swiglu"]:
                tile = {"BLOCK_M": m.BWD_ROWS}
                yield Case(f"gelu_mlp_bwd {dtype} {activation}", kernel, types, constants | tile, config)
    types = _types(m.gelu_mlp_bias_kernel, "bf16", partial_ptr="*fp32")
    yield Case("gelu_mlp_bias bf16", m.gelu_mlp_bias_kernel, types, {}, triton.Config({"BLOCK_M": 8, "BLOCK_N": 64}))


def layer_norm_cases() -> Iterator[Case]:
    from cgpt_ext.triton import layer_norm as m

    fp32 = dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32") | {"eps": "fp32"}
    kernels = [
        ("layer_norm_fwd", m.layer_norm_fwd_kernel, m.CONFIGS),
        ("layer_norm_bwd", m.layer_norm_bwd_kernel, m.BWD_CONFIGS),
    ]
    for name, kernel, table in kernels:
        for dtype in ("bf16", "fp32"):
            for D, configs in table.items():
                for config in configs:
                    types = _types(kernel, dtype, **fp32)
                    yield Case(f"{name} {dtype} D{D}", kernel, types, {"BLOCK_D": D}, config)
    wide = triton.Config({"BLOCK_D": m.WIDE_TILE}, num_warps=8)
    for kernel in (m.layer_norm_fwd_wide_kernel, m.layer_norm_dx_wide_kernel, m.layer_norm_partial_wide_kernel):
        yield Case(f"{kernel.__name__.removesuffix('_kernel')} bf16", kernel, _types(kernel, "bf16", **fp32), {}, wide)
    kernel = m.layer_norm_sum_kernel
    config = triton.Config({"BLOCK_P": 8, "BLOCK_D": 64})
    yield Case("layer_norm_sum bf16", kernel, _types(kernel, "bf16", **fp32), {}, config)


def cross_entropy_cases() -> Iterator[Case]:
    from cgpt_ext.triton import cross_entropy as m

    others = {"target_ptr": "*i64", "dout_ptr": "*fp32", "loss_ptr": "*fp32", "z_loss": "fp32"}
    for dtype in ("bf16", "fp32"):
        for config in m.CONFIGS:
            kernel = m.cross_entropy_kernel
            yield Case(f"cross_entropy {dtype}", kernel, _types(kernel, dtype, **others), {}, config)


def adamw_cases() -> Iterator[Case]:
    from cgpt_ext.triton import adamw as m

    kernel = m.adamw_kernel
    types = _types(kernel, "fp32", param_ptr="*bf16", grad_ptr="*bf16", low_ptr="*i16")
    types |= dict.fromkeys(("step", "lr", "beta1", "beta2", "eps", "weight_decay"), "i64")
    constants = {"master_ptr": None, "lr_ptr": None, "MAXIMIZE": False}
    yield Case("adamw bf16 split", kernel, types, constants, triton.Config({"BLOCK": m.BLOCK}))


def cases() -> Iterator[Case]:
    yield from attention_cases()
    yield from gelu_mlp_cases()
    yield from layer_norm_cases()
    yield from cross_entropy_cases()
    yield from adamw_cases()


def _types(kernel, dtype: str, **others: str) -> dict[str, str]:
    """Pointers to `dtype`, everything else i32, but for `others`."""
    known = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    return known | {name: given for name, given in others.items() if name in known}


def measure(case: Case, arch: str) -> dict:
    """The row of one kernel for one architecture."""
    names = case.kernel.arg_names
    given = case.constants | case.config.kwargs
    constants = {name: value for name, value in given.items() if name in names}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(case.kernel.params)
        if signature[parameter.name] not in ("constexpr", "fp32", "fp64") and not parameter.do_not_specialize
    }
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", ARCHS[arch], 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": case.label,
        "arch": arch,
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": built.metadata.shared,
    }


def listed() -> list[tuple[Case, str]]:
    """Every case and architecture, in the order of the table."""
    return [(case, arch) for case in cases() for arch in case.archs]


def differences(committed: list[dict], measured: list[dict]) -> list[str]:
    """What the committed table has otherwise, a line each."""
    before = {(row["kernel"], row["arch"]): row for row in committed}
    lines = []
    for row in measured:
        old = before.get((row["kernel"], row["arch"]))
        if old is None:
            lines.append(f"{row['arch']} {row['kernel']}: not in the committed table")
        elif old != row:
            moved = [f"{name} {old[name]} -> {row[name]}" for name in row if old[name] != row[name]]
            lines.append(f"{row['arch']} {row['kernel']}: {', '.join(moved)}")
    return lines


def problems(rows: list[dict]) -> list[str]:
    return [f"{row['arch']} {row['kernel']}: spills {row['spills']} bytes" for row in rows if row["spills"]]


def not_covered(committed: list[dict]) -> list[str]:
    """Kernels that the committed table lacks or has too many; nothing is compiled for this."""
    want = {(case.label, arch) for case, arch in listed()}
    have = {(row["kernel"], row["arch"]) for row in committed}
    lines = [f"{arch} {kernel}: not in the committed table" for kernel, arch in sorted(want - have)]
    return lines + [f"{arch} {kernel}: in the table, but no such config" for kernel, arch in sorted(have - want)]


def read_table() -> dict:
    return json.loads(TABLE.read_text())


def write_table(rows: list[dict]) -> None:
    """One row a line, so that a diff shows kernels."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(map(json.dumps, rows))
    TABLE.write_text(f'{{\n"triton": {json.dumps(triton.__version__)},\n"kernels": [\n{lines}\n]\n}}\n')


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--write", action="store_true", help="compile everything and write the table")
    parser.add_argument("names", nargs="*", help="parts of kernels' names; all without any")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    if options.write and options.names:
        parser.error("--write takes every kernel")
    rows = []
    for case, arch in listed():
        if not options.names or any(name in case.label for name in options.names):
            rows.append(measure(case, arch))
            print(
                "{kernel}  {arch}  {registers} registers, {spills} spilled, {shared} shared".format(**rows[-1]),
                flush=True,
            )
    if options.write:
        write_table(rows)
        print(f"wrote {TABLE}")
    found = problems(rows)
    if options.check:
        committed = read_table()
        if committed["triton"] == triton.__version__:
            found += differences(committed["kernels"], rows)
        else:
            print(f"Triton is {triton.__version__}, the committed table's {committed['triton']}: numbers not judged")
            found = []
        found += not_covered(committed["kernels"])
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
