"""Ends a process that hangs, and says what it was at: so that torchrun brings the job back, and somebody can mend it.

    with Watchdog(device, patience(config.hang_timeout, world.count), folder, world.rank) as watchdog:
        ...                          # the lanes' and the arithmetic's work is what counts as moving
        watchdog.moved()             # so does this
        with watchdog.paused(): ...  # within, nothing is expected to

A collective that one rank never comes to has no end, whatever the reason: a lost link, a disk that answers no more, a
fault of ours. It is every rank's lanes that tell which one it was. A hang that lets no Python run, as of a page of a
file whose server is gone, is seen by a thread of the interpreter's own after twice the time, which can show the stacks
alone, and ends with 1.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cgpt.stream.devices import Device

HUNG = 75  # exit code: EX_TEMPFAIL of sysexits.h, try again
PATIENCE = 1800.0  # seconds, where there are several ranks
LONGEST_TICK = 5.0  # seconds between looks
LONGEST_REPORT = 10.0  # seconds: it may hang too, as the disk does
STDERR = 2  # by number: the thread that hangs may hold the lock of sys.stderr


def patience(asked: float | None, ranks: int) -> float:
    """Seconds of --hang-timeout: what was asked for, or PATIENCE where there are several ranks; 0 watches nothing."""
    return asked if asked is not None else PATIENCE if ranks > 1 else 0.0


class Watchdog:
    """Ends the process with HUNG once nothing has moved for `seconds` within its block.

    What the lanes and all threads are at goes to stderr and, where there is a folder, to hang-rank<rank>.txt in it.
    """

    def __init__(self, lanes: Device, seconds: float, folder: Path | None = None, rank: int = 0):
        self._lanes, self._seconds, self._folder, self._rank = lanes, seconds, folder, rank
        self._moves = self._pauses = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cgpt watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._seconds:
            self._over.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def moved(self) -> None:
        """Something has been finished that no lane knows of."""
        self._moves += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count; on the caller's thread alone."""
        self._pauses += 1
        try:
            yield
        finally:
            self._moves += 1
            self._pauses -= 1

    def _watch(self) -> None:
        tick = min(self._seconds / 8, LONGEST_TICK)
        seen, since = None, time.monotonic()
        while True:
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True, file=STDERR)
            if self._over.wait(tick):
                return
            now, found = time.monotonic(), (self._lanes.progress, self._moves)
            if found != seen or self._pauses:
                seen, since = found, now
            elif now - since >= self._seconds:
                self._end(now - since, tick)

    def _end(self, idle: float, tick: float) -> None:
        begun = time.monotonic()
        report = threading.Thread(target=self._report, args=(idle,), name="cgpt report", daemon=True)
        report.start()
        report.join(LONGEST_REPORT)
        # The other ranks are about to see it too, and should say so before their links to this one break.
        time.sleep(max(0.0, begun + 2 * tick - time.monotonic()))
        os._exit(HUNG)

    def _report(self, idle: float) -> None:
        when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        who = f"rank {self._rank}, process {os.getpid()} on {platform.node()}, {when}"
        head = f"cgpt: {who}: nothing has been finished for {idle:.1f} s"
        text = "".join(f"{line}\n" for line in (head, *self._lanes.state())).encode()
        with contextlib.suppress(OSError):  # a terminal that has gone
            os.write(STDERR, text)
        faulthandler.dump_traceback(STDERR)
        if self._folder is not None:
            with (self._folder / f"hang-rank{self._rank}.txt").open("wb", buffering=0) as file:
                file.write(text)
                faulthandler.dump_traceback(file)
