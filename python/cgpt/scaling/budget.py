"""Budgets as people write them, in FLOPs: "1e6 A100-hours", "100 PF-days", "5000 USD", "10 MWh", "2.3e22 FLOPs".

    FLOPs = device-seconds x peak FLOP/s x utilisation        1 PF-day = 8.64e19 FLOPs
    device-seconds = USD / (USD an hour) x 3600 = joules / watts

A view of one number, and the way back: time, energy and money of a plan come out of the same line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cgpt.errors import InputError
from cgpt.scaling.flops import PF_DAY

HOUR = 3600.0
KWH = 3.6e6  # joules
FLOPS = {"flop": 1.0, "pf-day": PF_DAY, "pflop/s-day": PF_DAY}
DEVICE_SECONDS = {"hour": HOUR, "day": 24 * HOUR, "year": 365.25 * 24 * HOUR}
MONEY = {"usd": 1.0, "$": 1.0, "dollar": 1.0}
ENERGY = {"kwh": KWH, "mwh": 1e3 * KWH}  # joules
ANY_DEVICE = ("device", "gpu", "")
EXAMPLES = '"1e6 A100-hours", "100 PF-days", "5000 USD", "10 MWh" or "2.3e22 FLOPs"'


class Device(Protocol):
    """The numbers needed; rows of `cgpt.stream.hardware.DEVICES` have them. peak: FLOP/s. usd: of an hour."""

    peak: float
    watts: float
    usd: float


@dataclass(frozen=True)
class Budget:
    """amount: FLOPs, seconds of one device, USD or joules, as `kind` says: "flops", "time", "money" or "energy".

    device: the name of the one whose time it is; None where the text names none.
    """

    amount: float
    kind: str
    device: str | None = None

    def flops(self, device: Device, utilisation: float) -> float:
        """In FLOPs on `device` at a share `utilisation` of its peak. Raises InputError where that is no number."""
        per_second = device.peak * utilisation
        found = {
            "flops": self.amount,
            "time": self.amount * per_second,
            "money": self.amount / device.usd * HOUR * per_second,
            "energy": self.amount / device.watts * per_second,
        }[self.kind]
        if not math.isfinite(found):
            raise InputError(f"--budget: wanted a finite number of FLOPs, got {found:g}")
        return found


@dataclass(frozen=True)
class Cost:
    """What FLOPs take on `count` devices side by side: seconds, device_seconds, joules, usd. Nothing is lost between
    devices: the count divides the time alone."""

    seconds: float
    device_seconds: float
    joules: float
    usd: float


def cost(flops: float, device: Device, count: int, utilisation: float) -> Cost:
    """Of `flops` FLOPs at a share `utilisation` of the devices' peak."""
    each = flops / (device.peak * utilisation)
    return Cost(each / count, each, each * device.watts, each / HOUR * device.usd)


def parse_budget(text: str, devices: Mapping[str, Device]) -> Budget:
    """Reads a number, with commas or in powers of ten, and a unit. A device may be written short: A100, 4090.

    Raises InputError, naming --budget, for anything else, and for an amount that is not above 0.
    """
    match = re.fullmatch(r"\s*(\$?)\s*([+-]?[\d.,]+(?:e[+-]?\d+)?)\s*(.*?)\s*", text, re.IGNORECASE)
    try:
        amount = float(match[2].replace(",", ""))
    except (TypeError, ValueError):
        raise InputError(f"--budget: wanted {EXAMPLES}, got {text!r}") from None
    if not 0 < amount < math.inf:
        raise InputError(f"--budget: wanted an amount above 0, got {text!r}")
    unit = "$" if match[1] and not match[3] else match[3].lower()
    if len(unit) > 1:
        unit = unit.removesuffix("s")
    for kind, units in (("flops", FLOPS), ("money", MONEY), ("energy", ENERGY)):
        if unit in units:
            return Budget(amount * units[unit], kind)
    name, _, length = re.sub(r"[\s-]+", "-", unit).rpartition("-")
    if length not in DEVICE_SECONDS:
        raise InputError(f"--budget: wanted {EXAMPLES}, got {text!r}")
    return Budget(amount * DEVICE_SECONDS[length], "time", _device(name, devices, text))


def _device(name: str, devices: Mapping[str, Device], text: str) -> str | None:
    if name in ANY_DEVICE:
        return None
    found = [known for known in devices if name == known or name in known.split("-")]
    if len(found) != 1:
        raise InputError(f"--budget: wanted hours of one of {', '.join(devices)}, got {text!r}")
    return found[0]
