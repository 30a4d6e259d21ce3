"""`cgpt plan` as a user meets it: an answer, or one line that says what would be one."""

import re
import subprocess
import sys

import pytest
from asking import answer, refused

from cgpt import cli
from cgpt.model.presets import PRESETS
from cgpt.stream.limits import parse_bytes

SMALL = "--model", "111M", "--device", "rtx-4090", "--host-memory", "8GiB", "--tokens-per-step", 16384
LARGE = "--model", "13B", "--device", "h100", "--host-memory", "128GiB"


def test_the_schema(capsys):
    found = answer(capsys, *SMALL)
    assert set(found) == {
        "model", "parameters", "device", "count", "node", "precision", "moments", "tokens_per_step", "visits",
        "tokens_per_visit", "micro_batch_tokens", "layers", "activations", "memory", "forecast", "disk", "rates",
        "sources",
    }  # fmt: skip
    assert (found["model"], found["parameters"]) == ("111M", PRESETS["111M"].config.n_params)
    assert found["visits"] * found["tokens_per_visit"] >= found["tokens_per_step"] == 16384
    assert [layer["name"] for layer in found["layers"]] == ["embed", *(f"h.{i}" for i in range(10)), "head"]
    assert set(found["layers"][0]) == {"name", "weights", "state", "recompute"}
    for tier in ("device", "host", "disk"):
        memory = found["memory"][tier]
        assert 0 <= memory["bytes"] <= memory["budget"]
        assert sum(memory.get("parts", {}).values()) == (memory["bytes"] if tier != "disk" else 0)
    walk = found["forecast"]
    assert set(walk) == {
        "seconds", "tokens_per_second", "model_flops_per_second", "mfu", "binding", "bound", "lanes", "stalls", "fill",
        "exposed_optimizer", "hides_from_tokens",
    }  # fmt: skip
    lanes = {"compute", "down", "up", "wire", "optimizer", "read", "write"}
    assert walk["lanes"].keys() == walk["stalls"].keys() == lanes
    assert walk["tokens_per_second"] == pytest.approx(16384 / walk["seconds"])
    assert walk["mfu"] == pytest.approx(walk["model_flops_per_second"] / 165.2e12)
    assert 0 < walk["bound"] <= walk["seconds"]
    assert found["disk"] == {"read_bytes": 0, "written_bytes": 0, "drive_days": None}
    assert set(found["rates"]) == lanes - {"compute", "optimizer"} | {
        "flops", "memory", "latency", "half_duplex", "wire_latency",
    }  # fmt: skip
    assert found["rates"]["wire"] is None  # no other device: JSON has no infinity
    assert set(found["sources"]) == {"device", "link", "disk"}


def test_a_model_that_fits_is_resident_and_bound_by_arithmetic(capsys):
    found = answer(capsys, *SMALL)
    assert {layer["state"] for layer in found["layers"]} == {"device"}
    assert found["forecast"]["binding"] == "compute"
    assert found["memory"]["host"]["bytes"] == 0
    assert found["forecast"]["mfu"] == pytest.approx(0.7, rel=0.03)  # the share sustained: AdamW takes the rest


def test_bf16_moments_take_four_bytes_a_parameter_less_and_make_13b_faster(capsys):
    wide, narrow = (answer(capsys, *LARGE, "--moments", moments) for moments in ("fp32", "bf16"))
    assert [found["moments"] for found in (wide, narrow)] == ["fp32", "bf16"]
    state = [
        sum(found["memory"][tier]["parts"].get("state", 0) for tier in ("device", "host")) for found in (wide, narrow)
    ]
    assert state[0] / state[1] == pytest.approx(12 / 8)
    assert narrow["forecast"]["seconds"] < wide["forecast"]["seconds"]


def test_13b_on_one_h100_with_128_gib_reaches_400_teraflops(capsys):
    """Where a step is one visit, gradients are bf16 and all 13B parameters fit into 80 GB and 128 GiB."""
    found = answer(capsys, *LARGE, "--tokens-per-step", 65536)
    assert (found["visits"], found["tokens_per_visit"]) == (1, 65536)
    assert found["forecast"]["model_flops_per_second"] >= 400e12
    assert found["forecast"]["binding"] == "compute"
    assert found["forecast"]["exposed_optimizer"] < 0.01 * found["forecast"]["seconds"]
    slower = answer(capsys, *LARGE, "--tokens-per-step", 65536, "--sustained", 0.5)
    assert slower["forecast"]["model_flops_per_second"] < found["forecast"]["model_flops_per_second"]


def test_13b_with_its_published_batch_is_held_by_the_link_and_says_from_where_it_would_hide(capsys):
    """Partial sums in fp32 leave room for so few tokens a visit that backward cannot hide them."""
    found = answer(capsys, *LARGE)
    walk = found["forecast"]
    assert found["tokens_per_step"] == 1080 * 2048
    assert walk["binding"] == "down"
    assert walk["hides_from_tokens"]["down in backward"] > found["tokens_per_visit"]
    assert 300e12 < walk["model_flops_per_second"] < 400e12


def test_the_disk_takes_what_the_host_cannot_and_its_life_is_told(capsys):
    argv = "--model", "13B", "--host-memory", "64GiB", "--disk-space", "1TB", "--tokens-per-visit", 16384
    found = answer(capsys, *argv, "--tokens-per-step", 16384 * 16)
    on_disk = [layer for layer in found["layers"] if layer["state"] == "disk"]
    assert on_disk
    assert found["tokens_per_visit"] == 16384
    disk = found["disk"]
    assert disk["written_bytes"] == pytest.approx(found["memory"]["disk"]["bytes"] - 4096)
    days = 600 * 1e12 / disk["written_bytes"] * found["forecast"]["seconds"] / 86400
    assert disk["drive_days"] == pytest.approx(days)


@pytest.mark.parametrize("flag", ["--host-memory", "--disk-space", "--tokens-per-step"])
def test_a_refusal_names_the_limit_both_numbers_and_settings_that_do(capsys, flag):
    argv = ["--model", "6.7B", "--device", "h100", "--device-memory", "40GB", "--host-memory", "60GiB"]
    line = refused(capsys, *argv)
    pattern = r"--host-memory: 6\.7B at \d+ tokens a visit, \d+ visits? a step: host memory: wanted at least (\S+ GiB) "
    wanted = re.match(pattern + r"\(state .*, gradients .*\), got 60\.00 GiB; nearest: ", line)
    assert wanted, line
    assert parse_bytes(wanted[1]) > 60 << 30
    nearest = dict(re.findall(r"(--[\w-]+) (\S+)", line.split("nearest: ")[1]))
    assert set(nearest) == {"--host-memory", "--disk-space", "--tokens-per-step"}
    if flag == "--host-memory":
        argv = argv[:-2]
    answer(capsys, *argv, flag, nearest[flag])


@pytest.mark.parametrize("flag", ["--host-memory", "--tokens-per-visit", "--tokens-per-step"])
def test_too_many_tokens_a_visit(capsys, flag):
    argv = {"--tokens-per-step": "65536", "--tokens-per-visit": "32768", "--host-memory": "128GiB"}
    line = refused(capsys, *(word for pair in argv.items() for word in pair))
    nearest = dict(re.findall(r"(--[\w-]+) (\S+)", line.split("nearest: ")[1]))
    assert set(nearest) == {"--host-memory", "--disk-space", "--tokens-per-visit", "--tokens-per-step"}
    assert nearest["--tokens-per-step"] == "32768"  # all in one visit
    answer(capsys, *(word for pair in (argv | {flag: nearest[flag]}).items() for word in pair))


def test_a_device_that_is_too_small(capsys):
    line = refused(capsys, "--model", "1.3B", "--device-memory", "1GiB", "--host-memory", "64GiB")
    assert line.startswith("--device-memory: 1.3B at 2048 tokens a visit")
    assert "got 1.00 GiB" in line
    nearest = line.split("nearest: ")[1].split()
    assert nearest[0] == "--device-memory"
    answer(capsys, "--model", "1.3B", "--host-memory", "64GiB", *nearest)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("--model 7B", "--model: wanted one of tiny, mini, 111M"),
        ("--device tpu", "--device: wanted one of h100, h200, a100-80gb, rtx-4090, cpu, got tpu"),
        ("--host-memory lots", "--host-memory: wanted a size such as 4GiB or 80GB, got 'lots'"),
        ("--device-memory -1", "--device-memory"),
        ("--disk-space 1X", "--disk-space: wanted a size"),
        ("--host-bandwidth 0GB", "--host-bandwidth: wanted more than nothing, got 0GB"),
        ("--sustained 1.5", "--sustained: wanted a share of the peak up to 1, got 1.5"),
        ("--sustained nan", "--sustained: wanted a share of the peak up to 1, got nan"),
        ("--tokens-per-step 1000", "--tokens-per-step: wanted a multiple of 13B's sequences of 2048 tokens, got 1000"),
        ("--tokens-per-visit 0", "--tokens-per-visit: wanted a multiple of 13B's sequences of 2048 tokens, got 0"),
        ("--tokens-per-visit 8192 --tokens-per-step 4096", "--tokens-per-visit: wanted at most the 4096 of a step"),
        ("--link gen6", "--link"),
        ("--precision int8", "invalid choice 'int8' for argument '--precision'"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, wanted):
    assert wanted in refused(capsys, *argv.split())


def test_for_people(capsys):
    assert cli.main(["plan", *map(str, SMALL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model     111M, 111,050,496 parameters in bf16, moments in fp32, on NVIDIA GeForce RTX 4090"
    assert re.match(
        r"step      [\d.]+ s for 16,384 tokens: [\d,]+ tokens/s, [\d.]+ model TFLOP/s, 68\.\d % of", lines[1]
    )
    assert lines[2] == "bound by  compute: everything else hides behind it"
    assert [line.split()[0] for line in lines[3:]] == [
        "visit", "state", "weights", "device", "lanes", "exposed", "assumed", "sources",
    ]  # fmt: skip


def test_it_needs_no_torch():
    code = "import sys; from cgpt import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    argv = [sys.executable, "-c", code, "plan", *map(str, SMALL)]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout.startswith("model     111M")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["plan", "--help"])
    assert not done.value.code
    text = capsys.readouterr().out
    assert "What cannot fit is refused with the nearest setting that can" in " ".join(text.split())
    assert "--tokens-per-visit" in text
