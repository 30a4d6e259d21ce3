"""bench/compiler_table.py: what it reads, what it refuses, and the built kernels against the committed table."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import compiler_table
from compiler_table import Problem, differences, parse_resources, parse_sass, problems, shorten

RESOURCES = """
Fatbin ptx code:
================
arch = sm_80
compressed

Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:50 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:35536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
Fatbin elf code:
================
arch = sm_80

	code for sm_80
		Function : _Z1fv
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;        /* 0x00000a00ff017624 */
                                                                                  /* 0x000fe400078e00ff */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;               /* 0x000000020000780c */
        /*0020*/               @P1 STG.E [R2.64], R4 ;                            /* 0x000000020000780c */
        /*0030*/             @!UP1 STG.E.128 [R2.64], R4 ;                        /* 0x000000020000780c */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;          /* 0x000000020000780c */
        /*0050*/                   LDGSTS.E.BYPASS.128 [R0], [R2.64] ;            /* 0x000000020000780c */
        /*1060*/                   LDSM.16.MT88.4 R4, [R0] ;                      /* 0x000000020000780c */
        /*1070*/                   STL [R1], R0 ;                                 /* 0x000000020000780c */
        /*1080*/                   LDL.64 R0, [R1] ;                              /* 0x000000020000780c */
"""

GOOD = {name: 1 for name in compiler_table.INSTRUCTIONS} | {"LDL": 0, "STL": 0}


def row(**changes):
    counts = GOOD | changes.pop("instructions", {})
    given = {"kernel": "adamw_kernel<float>", "arch": "sm_80", "registers": 40, "stack": 0, "shared": 0, **changes}
    return given | {"instructions": counts}


@pytest.fixture(autouse=True)
def one_rule(monkeypatch):
    monkeypatch.setattr(compiler_table, "MUST_HAVE", {"adamw_kernel": ("LDG.128",)})
    monkeypatch.setattr(compiler_table, "SPILLS", {})


def test_reads_cuobjdump():
    assert parse_resources(RESOURCES) == {("sm_80", "_Z1fv"): {"registers": 50, "stack": 16, "shared": 1024}}
    wanted = {"HMMA": 1, "LDGSTS": 1, "LDSM": 1, "LDG.128": 1, "STG.128": 1, "LDL": 1, "STL": 1}
    assert parse_sass(SASS) == {("sm_80", "_Z1fv"): wanted}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "void cgpt::(anonymous namespace)::f_kernel<cgpt::(anonymous namespace)::Plain<cgpt::cuda::bf16>, 64>"
            "(cgpt::Args)",
            "f_kernel<Plain<bf16>, 64>",
        ),
        ("void cgpt::cuda::f<(cgpt::Kind)1, true>(int, float*)", "f<(Kind)1, true>"),
        ("cgpt::g(int)", "g"),
    ],
)
def test_names_are_the_sources(name, wanted):
    assert shorten(name) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"stack": 8}, "sm_80 adamw_kernel<float>: spills 8 bytes, 0 stores and 0 loads of local memory"),
        (
            {"instructions": {"STL": 3}},
            "sm_80 adamw_kernel<float>: spills 0 bytes, 3 stores and 0 loads of local memory",
        ),
        ({"instructions": {"LDG.128": 0}}, "sm_80 adamw_kernel<float>: has no LDG.128"),
        ({"kernel": "other_kernel"}, "adamw_kernel: a rule for a kernel that there is not"),
    ],
)
def test_what_is_wrong_is_named(changes, wanted):
    assert problems([row()]) == []
    assert problems([row(**changes)]) == [wanted]


def test_a_reason_lets_a_spill_stay(monkeypatch):
    monkeypatch.setattr(compiler_table, "SPILLS", {"adamw_kernel<float>": "8 bytes, once a block"})
    assert problems([row(stack=8)]) == []


def test_differences_are_named():
    sm_90 = row(arch="sm_90a")
    assert differences([row(), sm_90], [row()]) == []  # a build for one architecture
    assert differences([row()], [row(registers=41, instructions={"STG.128": 2})]) == [
        "sm_80 adamw_kernel<float>: registers 40 -> 41, STG.128 1 -> 2"
    ]
    assert differences([row()], [row(kernel="b")]) == ["sm_80 adamw_kernel<float>: gone", "sm_80 b: new"]


def test_another_nvccs_numbers_are_not_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compiler_table, "TABLE", tmp_path / "nvcc.json")
    compiler_table.write_table("1.2.3", [row()], [])
    assert compiler_table.check("1.2.3", [row(registers=41)]) == ["sm_80 adamw_kernel<float>: registers 40 -> 41"]
    assert compiler_table.check("4.5.6", [row(registers=41)]) == []
    assert "4.5.6" in capsys.readouterr().out
    assert compiler_table.check("4.5.6", [row(stack=8)]) != []  # what is wrong by any compiler


def test_the_committed_table_is_within_the_budget():
    committed = compiler_table.read_table()
    assert {row["arch"] for row in committed["kernels"]} >= {"sm_80", "sm_90a"}
    assert sum(row["seconds"] for row in committed["compiling"]) / 2 < 360, "the build on two cores, in seconds"
    assert all(row["peak_megabytes"] < 2048 for row in committed["compiling"])
    assert json.loads(compiler_table.TABLE.read_text()) == committed


def test_the_built_kernels_are_the_committed_table(monkeypatch):
    monkeypatch.undo()  # the real rules
    try:
        module = compiler_table.built_module()
        nvcc, rows = compiler_table.nvcc_version(), compiler_table.kernel_rows(module)
    except Problem as problem:
        if os.environ.get("CGPT_CUDA") == "1":  # as CI insists on the kernels
            raise
        pytest.skip(str(problem))
    assert compiler_table.check(nvcc, rows) == []
