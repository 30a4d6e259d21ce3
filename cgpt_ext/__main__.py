"""`python -m cgpt_ext`: what a report of a problem should hold; --check runs every op against its reference."""

import argparse
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Sequence

from cgpt_ext import diagnostics
from cgpt_ext.diagnostics_text import show, show_check


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where the native module does not load, or an op that was checked is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m cgpt_ext",
        description="Versions, machine, whether the native module loads, which implementation serves each op and why. "
        "Holds no names of people, machines or folders: paste it into a report.",
        epilog="Exit code: 0; 1 where the native module does not load or an op is wrong.",
    )
    parser.add_argument(
        "--check", action="store_true", help="run each op on a tiny problem against its reference, on every device"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")
    try:
        return run(options.check, options.json)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there at exit
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(check: bool, as_json: bool, **more) -> int:
    """Prints the report, the check's rows as they come, and `more`, which JSON alone carries; returns the exit code."""
    found = diagnostics.report() | more
    rows = diagnostics.check(found) if check else iter(())
    if as_json:
        list(rows)
        print(json.dumps(found, indent=1), flush=True)
    else:
        print(show(found), flush=True)
        if check:
            print("\nlargest error against the reference in fp64, as a share of the largest value:", flush=True)
        for line in show_check(rows):
            print(line, flush=True)
    return 0 if diagnostics.sound(found) else 1


if __name__ == "__main__":
    faulthandler.enable()  # a kernel that crashes should leave word of where
    sys.exit(main())
