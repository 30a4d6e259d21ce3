"""`cgpt plan --count 1..64`: each row is the answer for that count, and what is said of the whole follows from them."""

import math

import pytest
from asking import answer, refused, text

from cgpt.errors import InputError
from cgpt.planning.flags import Plan
from cgpt.stream.hardware import CALL, NETWORKS, wire

SMALL = "--model", "111M", "--device", "rtx-4090", "--host-memory", "8GiB", "--tokens-per-step", 32768


@pytest.mark.parametrize(
    ("count", "wanted"),
    [("1..8", (1, 2, 4, 8)), ("3..20", (3, 4, 8, 16, 20)), ("4..4", (4,)), ("5..7", (5, 7)), ("8", None), (None, None)],
)
def test_a_range_is_its_powers_of_two_and_its_ends(count, wanted):
    assert Plan(count=count).counts == wanted


@pytest.mark.parametrize("count", ["8..1", "0..4", "..", "1..", "1..2..4", "a..b", "1.5..2"])
def test_no_range(count):
    with pytest.raises(InputError, match="--count: wanted a "):
        _ = Plan(count=count).counts


def test_what_each_device_receives_by_hand():
    near, far = NETWORKS["nvlink4"], NETWORKS["400g"]
    assert wire(1, 8, near, far) == (math.inf, 0.0)
    assert wire(8, 8, near, far) == pytest.approx((near.rate, CALL + 7 * near.hop))
    assert wire(2, 1, near, far) == pytest.approx((far.rate, CALL + far.hop))
    # of 15 equal pieces 8 cross the network, and the other 7 are there before them
    assert wire(16, 8, near, far) == pytest.approx((far.rate * 15 / 8, CALL + far.hop + 14 * near.hop))
    assert wire(1024, 1, near, far) == pytest.approx((far.rate, CALL + 1023 * far.hop))


def test_rows_are_single_answers_and_follow_from_each_other(capsys):
    found = answer(capsys, *SMALL, "--count", "1..16")
    rows = found["counts"]
    assert [row["count"] for row in rows] == [1, 2, 4, 8, 16]
    assert found["sequences_per_step"] == 16
    best = 0.0
    for row in rows:
        one = answer(capsys, *SMALL, "--count", row["count"])
        assert one["forecast"]["seconds"] == row["seconds"]
        assert one["forecast"]["mfu"] == row["mfu"]
        assert one["memory"]["device"]["bytes"] == row["bytes"]["device"] <= one["memory"]["device"]["budget"]
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(32768)
        assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
        best = max(best, row["tokens_per_second"] / row["count"])
        assert row["efficiency"] == pytest.approx(row["tokens_per_second"] / row["count"] / best)
        share = row["visits"] * row["micro_batches"] * row["micro_batch_tokens"] * row["count"]
        assert share >= 32768
    linear = [row["count"] for row in rows if row["efficiency"] >= 0.9]
    assert found["linear_until"] == linear[-1]
    bent = next(row for row in rows if row["count"] > linear[-1])
    assert found["bent"] == {name: bent[name] for name in ("count", "efficiency", "binding")}


def row(capsys, *argv):
    """The last of a range."""
    return answer(capsys, *SMALL, *argv)["counts"][-1]


def test_the_network_decides_where_it_bends_and_what_binds(capsys):
    fast, slow = (
        row(capsys, "--count", "8..8", "--network", "1000GB"),
        row(capsys, "--count", "8..8", "--network", "2GB"),
    )
    assert fast["binding"] in ("compute", "latency")
    assert slow["binding"] == "wire"
    assert slow["seconds"] > 2 * fast["seconds"]
    # faster than light, but a ring of 16 hops remains
    late = row(capsys, "--count", "16..16", "--network", "10000GB")
    assert late["binding"] == "latency"


def test_devices_that_go_idle_are_what_binds(capsys):
    """Nine sequences on eight devices take two turns."""
    found = row(capsys, "--tokens-per-step", 9 * 2048, "--count", "8..8", "--network", "1000GB")
    assert found["binding"] == "batch"
    assert found["costs"]["batch"] == pytest.approx(1 - 9 / 16)
    assert row(capsys, "--tokens-per-step", 9 * 2048, "--count", "1..1")["costs"]["batch"] == 0


def test_micro_batches_as_large_as_a_slow_network_wants_cost_arithmetic(capsys):
    argv = "--tokens-per-step", 65536, "--count", "2..2", "--device-memory", "3GiB", "--network"
    fast, slow = row(capsys, *argv, "100GB"), row(capsys, *argv, "4GB")
    assert fast["micro_batch_tokens"] < slow["micro_batch_tokens"] == 32768
    assert fast["recomputed"] < slow["recomputed"]
    assert slow["binding"] == "memory"
    # of 6 products a token 2 more: a quarter of the arithmetic, but for layers that have none to repeat
    assert 0.12 < slow["costs"]["memory"] < 0.25


def test_more_devices_hold_more_of_the_state(capsys):
    argv = "--model", "1.3B", "--device", "rtx-4090", "--device-memory", "10GiB", "--host-memory", "64GiB"
    rows = answer(capsys, *argv, "--tokens-per-step", 65536, "--count", "1..16")["counts"]
    host = [row["bytes"]["host"] for row in rows]
    assert host == sorted(host, reverse=True)
    assert " of 26 on host" in rows[0]["placement"]
    assert rows[-1]["placement"].startswith("resident")


def test_devices_of_a_machine_share_its_memory(capsys):
    argv = "--model", "1.3B", "--device", "rtx-4090", "--device-memory", "8GiB", "--tokens-per-step", 16384
    alone = answer(capsys, *argv, "--host-memory", "64GiB", "--count", 2)
    shared = answer(capsys, *argv, "--host-memory", "64GiB", "--count", 2, "--node", 2)
    assert (alone["memory"]["host"]["budget"], shared["memory"]["host"]["budget"]) == (64 << 30, 32 << 30)
    assert shared["rates"]["memory"] == alone["rates"]["memory"] / 2
    assert "network" not in shared["sources"]
    assert "peers" in shared["sources"]
    assert "peers" not in alone["sources"]
    line = refused(capsys, *argv, "--host-memory", "8GiB", "--count", 2, "--node", 2)
    assert "on each of 2 devices: host memory: wanted at least" in line
    enough = line.split("nearest: ")[1].split()[:2]
    answer(capsys, *argv, *enough, "--count", 2, "--node", 2)


def test_no_more_devices_than_sequences(capsys):
    rows = answer(capsys, *SMALL, "--count", "8..40")["counts"]
    assert [row["fits"] for row in rows] == [True, True, False, False]
    assert rows[-1]["why"] == "more devices than the 16 sequences of a step"
    assert refused(capsys, *SMALL, "--count", 17) == "--count: wanted 1 to the 16 sequences of a step, got 17"
    assert "more devices than the 16 sequences" in refused(capsys, *SMALL, "--count", "17..32")


def test_for_people(capsys, tmp_path):
    told = text(capsys, *SMALL, "--count", "1..32", "--plot", tmp_path / "curve.svg")
    lines = told.splitlines()
    assert lines[0].startswith("111M, 111,050,496 parameters on NVIDIA GeForce RTX 4090s; 32,768 tokens a step")
    assert [line.split()[0] for line in lines[2:9]] == ["devices", "1", "2", "4", "8", "16", "32"]
    assert lines[8].strip() == "32 more devices than the 16 sequences of a step"
    assert "below 90% of the best speed each" in told
    drawn = (tmp_path / "curve.svg").read_text()
    for word in ("bound by compute", "bound by wire", "devices", "tokens/s of all devices"):
        assert f"<!-- {word} -->" in drawn, word


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("--count 8..1", "--count: wanted a range such as 1..64, got 8..1"),
        ("--count many", "--count: wanted a number above 0, or a range such as 1..64, got many"),
        ("--count 2 --node 0", "--node: wanted a number above 0, got 0"),
        ("--count 2 --network 0GB", "--network: wanted one of 400g, 200g, 100g, nvlink4, nvlink3, pcie, memory, or"),
        ("--count 1..4 --plot curve.txt", "--plot: wanted a file ending in"),
        ("--count 4 --tokens-per-visit 16384", "--tokens-per-visit: wanted at most the 8192 of a device's share"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, wanted):
    assert wanted in refused(capsys, *SMALL, *argv.split())
