"""Flags of info. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

from cgpt.train_flags import Switch


@dataclass(frozen=True)
class Info:
    """Presets with their exact sizes; versions, machine, and which implementation serves each op here, and why.

    Holds no names of people, machines or folders: paste it into a report. Exits with 1 where the native module does
    not load or an op is wrong.
    """

    check: Switch = False
    """Run every op on a tiny problem against its reference, on each device."""
    json: Switch = False
    """Print JSON."""
