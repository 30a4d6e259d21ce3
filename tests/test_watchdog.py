"""A process that hangs is ended, and says where; one that is slow, or pauses, is left alone."""

import os
import subprocess
import sys
import threading
import time

import pytest

from cgpt.stream.devices import CpuDevice
from cgpt.watchdog import HUNG, PATIENCE, Watchdog, patience

BEGIN = """
import sys, threading, time
from pathlib import Path
from cgpt.stream.devices import CpuDevice
from cgpt.watchdog import Watchdog
folder, device, forever = Path(sys.argv[1]), CpuDevice(0, optimizer_threads=1), threading.Event()
def a_gradient_that_never_comes():
    forever.wait()
"""
A_LANE = """
with Watchdog(device, 0.4, folder, rank=3):
    device.compute("h.0 forward", lambda: None)
    stuck = device.submit("wire", "h.1 gradients", a_gradient_that_never_comes)
    device.submit("optimizer", "h.1 AdamW", lambda: None, [stuck])
    device.submit("optimizer", "h.0 AdamW", lambda: None)
    device.settle()
"""
THE_ARITHMETIC = """
with Watchdog(device, 0.4, folder / "gone"):
    hold = device.submit("down", "h.7 weights", a_gradient_that_never_comes)
    device.compute("h.7 forward", lambda: None, [hold])
"""
NO_PYTHON = """
import ctypes
with Watchdog(device, 0.4, folder):
    ctypes.PyDLL(None).sleep(60)  # which keeps the interpreter's lock
"""


def hang(tmp_path, how):
    """What a process that hangs says until it ends, and its exit code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", BEGIN + how, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
    return done.stderr, done.returncode


def test_a_lane_that_hangs_is_named_and_the_process_ends(tmp_path):
    said, code = hang(tmp_path, A_LANE)
    assert code == HUNG == 75
    first, *lines = said.splitlines()
    assert first.startswith("cgpt: rank 3, process ")
    assert ": nothing has been finished for 0." in first
    lanes = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[:7]}
    assert list(lanes) == ["compute", "down", "up", "wire", "optimizer", "read", "write"]
    assert lanes["compute"] == lanes["down"] == "idle; 0 queued"
    assert lanes["wire"].startswith("h.1 gradients, for 0.")
    assert lanes["wire"].endswith(" s; 0 queued")
    assert lanes["optimizer"].startswith("h.1 AdamW, for 0.")
    assert lanes["optimizer"].endswith(" s, behind wire h.1 gradients; 1 queued")
    assert "in a_gradient_that_never_comes" in said
    assert "in settle" in said  # where the main thread is
    kept = (tmp_path / "hang-rank3.txt").read_text()
    assert kept.splitlines()[:8] == [first, *lines[:7]]
    assert "in a_gradient_that_never_comes" in kept


def test_arithmetic_that_waits_is_named_though_there_is_no_folder_to_write_to(tmp_path):
    said, code = hang(tmp_path, THE_ARITHMETIC)
    assert code == HUNG
    assert "\ncompute   h.7 forward, for 0." in said
    assert " s, behind down h.7 weights; 0 queued\n" in said


def test_a_hang_that_lets_no_python_run_ends_too(tmp_path):
    said, code = hang(tmp_path, NO_PYTHON)
    assert code == 1
    assert said.startswith("Timeout (0:00:00.800000)!\n")
    assert 'File "<string>"' in said


@pytest.fixture
def bark(monkeypatch):
    """Set where a watchdog of this process would have ended it."""
    barked = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda *_: barked.set())
    return barked


@pytest.fixture
def device():
    device = CpuDevice(0, optimizer_threads=1)
    yield device
    device.close()


def test_slow_but_moving(bark, device):
    with Watchdog(device, 0.4):
        for turn in range(4):
            device.submit("read", str(turn), lambda: time.sleep(0.2))
        device.settle()
        for _ in range(4):
            device.compute("slow", lambda: time.sleep(0.2))
        for turn in range(4):
            device.submit("down", str(turn), lambda: time.sleep(0.2)).wait()
    assert not bark.is_set()


def test_pauses_and_what_is_told_count_as_moving(bark, device):
    with Watchdog(device, 0.3) as watchdog:
        with watchdog.paused():
            time.sleep(0.8)
        for _ in range(4):
            time.sleep(0.2)
            watchdog.moved()
        assert not bark.is_set()
        assert bark.wait(5)  # after them it does count


def test_nothing_is_watched_before_and_after_its_block(bark, device):
    threads = threading.active_count()
    with Watchdog(device, 0.2):
        pass
    with Watchdog(device, 0.0):
        time.sleep(0.5)
    assert not bark.is_set()
    assert threading.active_count() == threads


def test_patience():
    assert (patience(None, 1), patience(None, 2)) == (0.0, PATIENCE)
    assert [patience(asked, ranks) for asked in (0.0, 5.0) for ranks in (1, 4)] == [0.0, 0.0, 5.0, 5.0]
