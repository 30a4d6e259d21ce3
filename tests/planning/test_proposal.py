"""`cgpt plan` for a budget as a user meets it: an answer whose numbers agree, or one line."""

import math
import re
import shlex
import subprocess
import sys

import pytest
from asking import answer, refused, text

from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS
from cgpt.scaling.flops import flops_per_token
from cgpt.schedule import tokens_after
from cgpt.stream.hardware import DEVICES

QUICK = ("--tokens-per-step", 8192)  # a small step to place: the recipe's own takes seconds


def agrees(found):
    """Every number that follows from others does."""
    shape = GPTConfig.from_dict(found["shape"])
    assert found["params"] == shape.n_params
    assert found["flops_per_token"] == flops_per_token(shape).total
    assert found["tokens"] * found["flops_per_token"] == pytest.approx(found["flops"], rel=1e-12)
    assert found["params"] * found["tokens"] * found["flops_per_param_and_token"] == pytest.approx(found["flops"])
    assert found["tokens_per_param"] == pytest.approx(found["tokens"] / found["params"])
    assert found["flops_6n"] == 6 * found["params"] * found["tokens"]
    assert found["tokens"] == tokens_after(found["steps"], found["batch_schedule"], found["seq_len"])
    low, high = found["loss_interval"]
    assert low <= found["loss"] <= high
    device, time = DEVICES[found["device"]], found["time"]
    rate = found["count"] * device.peak * found["utilisation"]
    assert time["seconds"] == pytest.approx(found["flops"] / rate)
    assert time["device_hours"] == pytest.approx(found["count"] * time["seconds"] / 3600)
    assert found["energy"]["kwh"] == pytest.approx(time["device_hours"] * device.watts / 1000)
    assert found["money"]["usd"] == pytest.approx(time["device_hours"] * device.usd)
    assert found["checkpoint"]["export_bytes"] == 4 * found["params"]
    return found


def test_2_3e22_flops_are_13b(capsys):
    found = agrees(answer(capsys, "--flops", "2.3e22", *QUICK))
    assert found["params"] == pytest.approx(13e9, rel=0.1)
    assert found["flops"] == pytest.approx(2.3e22, rel=1e-3)
    assert (found["shape"]["n_layer"], found["shape"]["d_model"], found["shape"]["n_head"]) == (40, 5120, 40)
    assert found["loss"] == pytest.approx(1.572, rel=0.01)  # what the published 13B reached
    assert found["loss_interval"][0] < 1.572 < found["loss_interval"][1]
    assert [batch for _, batch in found["batch_schedule"]] == [720, 1080]
    assert (found["lr"], found["adam_eps"]) == (1.2e-4, 1e-9)
    assert found["streams"]["fits"]
    assert found["streams"]["streamed"]
    assert found["streams"]["state"]["host"] > 0
    assert found["checkpoint"]["bytes"] == 12 * found["params"]


def test_a_million_a100_hours(capsys):
    """The question of Le Scao et al. 2022 (arXiv 2210.15424)."""
    argv = "--budget", "1e6 A100-hours", "--count", 384
    found = agrees(answer(capsys, *argv))
    assert found["device"] == "a100-80gb"
    assert found["flops"] == pytest.approx(1e6 * 3600 * 312e12 * 0.55, rel=1e-3)
    assert found["time"]["device_hours"] == pytest.approx(1e6, rel=1e-3)
    assert 60e9 < found["params"] < 80e9
    assert found["tokens_per_param"] == pytest.approx(20, rel=0.05)
    assert "assumed: the device's sustained share" in found["utilisation_source"]
    assert any("extrapolation" in note for note in found["notes"])
    assert any("each of 384 devices waits for the others" in note for note in found["notes"])
    assert "NVLink" not in "".join(found["sources"].values())  # a device a machine, unless --node says otherwise
    twice = answer(capsys, "--budget", "2000000 A100 hours", *QUICK, "--utilisation", 0.275)
    assert twice["params"] == found["params"]


@pytest.mark.parametrize(
    "line",
    [
        "--params 3e8",
        "--tokens 5e9",
        "--loss 2.4",
        "--loss 2.7 --law kaplan",
        "--loss 2.6 --inference-tokens 1e11",
        "--params 2e8 --tokens 4e10",
        "--params 2e8 --flops 1e20 --moments bf16",
        "--tokens 1e10 --flops 1e19 --law chinchilla",
        "--params 3e8 --loss 2.8 --law chinchilla-refit --precision fp32",
        "--params 2e5 --vocab-size 256 --seq-len 128 --device cpu",
    ],
)
def test_all_numbers_of_a_plan_agree(capsys, line):
    found = agrees(answer(capsys, *line.split(), *(QUICK if "seq-len" not in line else ())))
    given = dict(re.findall(r"--(params|tokens|flops|loss) (\S+)", line))
    for name, value in given.items():
        slack = {"params": 0.1, "loss": 2e-4, "tokens": 0.03 if "flops" in given else 1e-3}.get(name, 1e-3)
        assert found[name] == pytest.approx(float(value), rel=slack), name
        assert found["wanted"][name] == float(value)


@pytest.mark.parametrize(
    ("line", "spent"),
    [
        ("--budget '20 USD' --device rtx-4090 --count 4", lambda found: (found["money"]["usd"], 20)),
        ("--budget '3 kWh' --device cpu", lambda found: (found["energy"]["kwh"], 3)),
        ("--budget '2 hours' --precision fp32", lambda found: (found["time"]["hours"], 2)),
        ("--budget '0.01 PF-days'", lambda found: (found["pf_days"], 0.01)),
        ("--budget '5 A100-hours' --utilisation 0.3", lambda found: (found["time"]["device_hours"], 5)),
    ],
)
def test_a_budget_is_what_the_plan_costs(capsys, line, spent):
    found = agrees(answer(capsys, *shlex.split(line), *QUICK))
    cost, budget = spent(found)
    assert cost == pytest.approx(budget, rel=1e-3)


def test_time_on_another_device_than_the_budgets_is_forecast(capsys):
    found = agrees(answer(capsys, "--budget", "100 A100-hours", "--device", "h100", *QUICK))
    assert found["flops"] == pytest.approx(100 * 3600 * 312e12 * 0.55, rel=1e-3)
    assert found["utilisation_source"] == "forecast for this shape on one device"
    speed = found["streams"]["tokens_per_second"]
    assert found["time"]["seconds"] == pytest.approx(found["tokens"] / speed)
    assert found["time"]["device_hours"] < 50


def test_what_does_not_fit_is_still_a_plan(capsys):
    found = agrees(answer(capsys, "--params", "7e9", "--device", "rtx-4090", "--host-memory", "4GiB", *QUICK))
    assert not found["streams"]["fits"]
    assert found["streams"]["why"].startswith("--host-memory: the plan at")
    assert found["utilisation"] == DEVICES["rtx-4090"].sustained
    disk = answer(
        capsys, "--params", "7e9", "--device", "rtx-4090", "--host-memory", "64GiB", "--disk-space", "1TB", *QUICK
    )
    assert disk["streams"]["state"]["disk"] > 0


def test_where_shapes_are_far_apart_the_budget_holds(capsys):
    """With GPT-2's vocabulary a width of 8 more is 420,000 parameters: the ratio gives way, and is told."""
    found = agrees(answer(capsys, "--flops", "5.3e13"))
    assert found["flops"] == pytest.approx(5.3e13, rel=1e-3)
    assert 24 < found["tokens_per_param"] < 32
    assert found["notes"][0] == "the nearest shape has 420,200 parameters, 19 % fewer than the 522k looked for"


def test_more_devices_divide_the_time_alone(capsys):
    one, eight = (answer(capsys, "--flops", "1e20", "--count", count, "--utilisation", 0.5) for count in (1, 8))
    assert one["time"]["seconds"] == pytest.approx(8 * eight["time"]["seconds"])
    assert one["money"] == eight["money"]
    assert one["params"] == eight["params"]


def test_more_devices_are_forecast_with_what_is_lost_between_them(capsys):
    one, eight, slow = (
        answer(capsys, "--flops", "1e20", *more) for more in ((), ("--count", 8), ("--count", 8, "--network", "2GB"))
    )
    assert eight["utilisation_source"] == slow["utilisation_source"] == "forecast for this shape on 8 devices"
    assert 0.9 * one["utilisation"] < eight["utilisation"] < one["utilisation"]
    assert slow["utilisation"] < 0.8 * eight["utilisation"]
    assert slow["time"]["seconds"] > eight["time"]["seconds"]
    assert slow["streams"]["binding"] == "wire"
    speed = eight["streams"]["tokens_per_second"]
    assert eight["time"]["seconds"] == pytest.approx(eight["tokens"] / speed)


def test_options_stand_side_by_side(capsys):
    found = answer(capsys, "--flops", "1e22", "--law", "chinchilla", "--inference-tokens", "1e13", *QUICK)
    names = [option["name"] for option in found["options"]]
    assert names == ["20 tokens a parameter", "optimum of chinchilla", "optimum of chinchilla-refit"]
    for option in found["options"]:
        assert option["flops"] == pytest.approx(found["flops"])
        assert option["loss"]["chinchilla"] >= 0.9999 * found["loss"]  # the plan is that law's best, but for its shape
    life = found["inference"]
    assert life["best"]["flops"] < life["usual"]["flops"]
    assert life["loss"] == pytest.approx(found["loss"], rel=1e-3)
    assert 0 < life["break_even"] < 1e13


def test_mup_is_the_published_base_at_the_plans_width(capsys):
    found = answer(capsys, "--params", "12853386240", *QUICK)
    mup = found["mup"]
    assert found["shape"]["d_model"] / mup["base_width"] == mup["width_ratio"] == 20
    assert mup["hidden_lr"] == pytest.approx(6e-3 / 20)
    assert mup["hidden_init_std"] == pytest.approx(0.08 / math.sqrt(20))
    assert mup["residual_init_std"] == pytest.approx(0.08 / math.sqrt(2 * 20 * 40))
    assert (mup["lr"], mup["embedding_init_std"], mup["embedding_scale"]) == (6e-3, 0.08, 10)
    assert (mup["softmax_scale"], mup["logits_scale"]) == pytest.approx((1 / 128, 1 / 20))


def test_published_sizes_are_planned_as_they_were_trained(capsys):
    for name in ("111M", "1.3B"):
        preset = PRESETS[name]
        found = answer(capsys, "--params", preset.config.n_params, "--tokens", preset.tokens, *QUICK)
        assert GPTConfig.from_dict(found["shape"]) == preset.config
        assert (found["steps"], found["lr"], found["tokens"]) == (preset.steps, preset.lr, preset.tokens)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--flops 0", "--flops: wanted a number above 0, got 0"),
        ("--budget '0 USD'", "--budget: wanted an amount above 0, got '0 USD'"),
        ("--budget '5 B200-hours'", "--budget: wanted hours of one of h100"),
        ("--budget '5 USD' --flops 1e20", "--budget: wanted it or --flops, got both"),
        ("--loss 0.5", "--loss: wanted more than 0.5066, its irreducible term in cerebras, got 0.5: unreachable"),
        ("--loss -1", "--loss: wanted a number above 0, got -1"),
        (
            "--params 1e9 --tokens 2e10 --flops 1e22",
            "--flops: wanted about 1.668e+20, what --params 1e+09",
        ),
        (
            "--budget '10 USD' --params 1e9 --tokens 2e10",
            "--budget, in FLOPs: wanted about 1.668e+20, what --params 1e+09 and --tokens 2e+10 come to, got 6.53e+18",
        ),
        ("--params 2e5", "parameters: wanted at least 420,200 with a vocabulary of 50257"),
        ("--params 1e8 --tokens 100", "tokens: wanted at least a sequence of 2048, got 100"),
        (
            "--params 1e8 --law moore",
            "--law: wanted one of cerebras, cerebras-mup, chinchilla,",
        ),
        ("--params 1e8 --law none.json", "--law: wanted the JSON of `cgpt fit`, got no file none.json"),
        ("--params 1e8 --device tpu", "--device: wanted one of h100, h200, a100-80gb, rtx-4090, cpu, got tpu"),
        ("--params 1e8 --count 0", "--count: wanted a number above 0, or a range such as 1..64, got 0"),
        ("--params 1e8 --count 1..8", "--count: wanted one number here, a range goes with --model, got 1..8"),
        ("--params 1e8 --network fast", "--network: wanted one of 400g, 200g, 100g,"),
        ("--params 1e8 --count 5000", "--count: wanted at most the 112 sequences of a step, got 5000"),
        ("--params 1e8 --utilisation 1.5", "--utilisation: wanted a share of the peak up to 1, got 1.5"),
        ("--params 1e8 --sustained 0", "--sustained: wanted a share of the peak up to 1, got 0"),
        ("--params 1e8 --seq-len 0", "--seq-len: wanted a number above 0, got 0"),
        ("--params 1e8 --tokens-per-step 1000", "--tokens-per-step: wanted a multiple of the plan's sequences of 2048"),
        ("--params 1e8 --write plan.toml", "--write: wanted a file ending in .json, got plan.toml"),
        ("--params 1e8 --write no/plan.json", "--write: wanted a file in a folder that is there, got no/plan.json"),
        ("--params 1e8 --plot plan.txt", "--plot: wanted a file ending in .png, .svg, .pdf, got plan.txt"),
        ("--model 13B --params 1e8", "--model: wanted it or --params, got both"),
        ("--plot plan.png", "--plot: wanted --count 1..64, or --flops, --budget, --params, --tokens or --loss with it"),
        ("--params many", "--params"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, line, wanted):
    monkeypatch.chdir(tmp_path)
    assert wanted in refused(capsys, *shlex.split(line))
    assert not list(tmp_path.iterdir())


def test_for_people(capsys):
    found = text(capsys, "--flops", "1e20", "--count", 2, "--inference-tokens", "1e12", *QUICK)
    assert "note: by forecast each of 2 devices waits for the others" in found
    lines = {line.split()[0]: line for line in found.splitlines() if line.strip()}
    assert list(lines)[:11] == [
        "model", "tokens", "loss", "compute", "time", "cost", "memory", "disk", "batch", "rate", "muP",
    ]  # fmt: skip
    assert re.match(
        r"model     7\d\dM parameters \(7\d\d,\d{3},\d{3}\): \d+ layers, width \d+, \d+ heads of 128,", found
    )
    assert "on 2 x NVIDIA H100 SXM at" in lines["time"]
    assert lines["memory"].startswith("memory    resident on each device: device")
    for row in ("this plan", "20 tokens a parameter", "optimum of chinchilla-refit", "cheapest over its life"):
        assert any(line.startswith(row) for line in found.splitlines()), row
    assert "they break even at" in found
    assert max(len(line) for line in found.splitlines()) < 600


def test_a_picture(capsys, tmp_path):
    text(capsys, "--flops", "1e20", "--plot", tmp_path / "plan.svg", *QUICK)
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.startswith("<?xml")
    for word in ("chinchilla-refit", "13B", "plan-"):
        assert f"<!-- {word}" in drawn, word


def test_it_needs_no_torch(tmp_path):
    code = "import sys; from cgpt import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    argv = [sys.executable, "-c", code, "plan", "--flops", "1e19", "--write", str(tmp_path / "plan.json")]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout.startswith("model     ")
    assert (tmp_path / "plan.json").is_file()
