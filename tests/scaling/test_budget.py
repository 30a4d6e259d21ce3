"""Budgets as people write them, against arithmetic by hand."""

import math

import pytest

from cgpt.errors import InputError
from cgpt.scaling.budget import Budget, cost, parse_budget
from cgpt.stream.hardware import DEVICES

H100, A100 = DEVICES["h100"], DEVICES["a100-80gb"]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("1e6 A100-hours", Budget(3.6e9, "time", "a100-80gb")),
        ("1,000,000 a100 hours", Budget(3.6e9, "time", "a100-80gb")),
        ("2 a100-80gb-days", Budget(2 * 86400, "time", "a100-80gb")),
        ("7 4090-hours", Budget(7 * 3600, "time", "rtx-4090")),
        ("1 h100-year", Budget(365.25 * 86400, "time", "h100")),
        ("3 GPU-hours", Budget(3 * 3600, "time")),
        ("12 hours", Budget(12 * 3600, "time")),
        ("100 PF-days", Budget(8.64e21, "flops")),
        ("0.5 PFLOP/s-day", Budget(4.32e19, "flops")),
        ("2.3e22 FLOPs", Budget(2.3e22, "flops")),
        ("5000 USD", Budget(5000, "money")),
        ("$5,000", Budget(5000, "money")),
        ("$5000 USD", Budget(5000, "money")),
        ("10 kWh", Budget(3.6e7, "energy")),
        ("1.5 MWh", Budget(5.4e9, "energy")),
    ],
)
def test_what_is_read(text, budget):
    found = parse_budget(text, DEVICES)
    assert found == Budget(pytest.approx(budget.amount), budget.kind, budget.device)


def test_a_million_hours_by_hand():
    budget = parse_budget("1e6 A100-hours", DEVICES)
    assert budget.flops(A100, 0.55) == pytest.approx(1e6 * 3600 * 312e12 * 0.55)


def test_money_and_energy_buy_hours_of_the_device():
    money, energy, hours = (parse_budget(text, DEVICES) for text in ("300 USD", "70 kWh", "100 H100-hours"))
    assert (H100.usd, H100.watts) == (3.0, 700)
    assert money.flops(H100, 0.4) == pytest.approx(hours.flops(H100, 0.4))
    assert energy.flops(H100, 0.4) == pytest.approx(hours.flops(H100, 0.4))
    assert parse_budget("1 PF-day", DEVICES).flops(A100, 0.1) == 8.64e19


@pytest.mark.parametrize("text", ["5000 USD", "20 kWh", "40 hours", "1 PF-day"])
@pytest.mark.parametrize("device", DEVICES)
def test_cost_is_the_way_back(text, device):
    budget, hardware = parse_budget(text, DEVICES), DEVICES[device]
    found = cost(budget.flops(hardware, 0.3), hardware, 8, 0.3)
    back = {"money": found.usd, "energy": found.joules, "time": found.device_seconds, "flops": budget.amount}
    assert back[budget.kind] == pytest.approx(budget.amount)
    assert found.seconds * 8 == pytest.approx(found.device_seconds)
    assert found.joules == pytest.approx(found.device_seconds * hardware.watts)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0 USD", "wanted an amount above 0, got '0 USD'"),
        ("-3 PF-days", "wanted an amount above 0, got '-3 PF-days'"),
        ("1e999 USD", "wanted an amount above 0"),
        ("lots", r'wanted "1e6 A100-hours", .*, got \'lots\''),
        ("", 'wanted "1e6 A100-hours"'),
        ("5000", 'wanted "1e6 A100-hours"'),
        ("5000 EUR", 'wanted "1e6 A100-hours"'),
        ("1.2.3 USD", 'wanted "1e6 A100-hours"'),
        ("1e6 B200-hours", "wanted hours of one of h100, h200, a100-80gb, rtx-4090, cpu, got '1e6 B200-hours'"),
        ("1e6 h-hours", "wanted hours of one of"),
    ],
)
def test_what_is_no_budget(text, line):
    with pytest.raises(InputError, match=f"^--budget: {line}"):
        parse_budget(text, DEVICES)


def test_more_than_numbers_hold():
    with pytest.raises(InputError, match="--budget: wanted a finite number of FLOPs, got inf"):
        parse_budget("1e300 USD", DEVICES).flops(H100, 0.5)


def test_every_device_says_where_its_costs_are_from():
    for hardware in DEVICES.values():
        assert hardware.watts > 0
        assert hardware.usd > 0
        assert math.isfinite(hardware.watts * hardware.usd)
        assert "watts" in hardware.cost_source
        assert "rent" in hardware.cost_source
