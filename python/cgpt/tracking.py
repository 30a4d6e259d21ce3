"""Rows of metrics to tensorboard, wandb and trackio, as they come. metrics.jsonl is written in any case (metrics.py).

    training --(queue)--> a thread a tracker --> its files or its server

A tracker never holds a run up and never ends one. Each has a thread of its own, so one that hangs fills its queue and
is left out, and one that raises is left out; either is said once. What trackers want of the environment (WANDB_MODE,
TRACKIO_DIR, logins) is theirs to read.

`tracking.json` in the run's folder names the tracker's run. A resumed run goes on with it, and steps that it repeats
are not sent again, so steps never fall: tensorboard is told to drop what it had past the checkpoint instead.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cgpt.errors import InputError
from cgpt.files import write_atomically

FILE = "tracking.json"
PROJECT = "cgpt"
BEHIND = 10_000  # rows that a tracker may be behind
CLOSE_SECONDS = 20.0  # to send what is left, all trackers together: less than the 30 that clusters give after SIGTERM


class Tracker(Protocol):
    """Opened with what it is told of the run; used on one thread."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tracked:
    """Which trackers a run has, and what it is called there. sent: the last step that each has been handed."""

    names: tuple[str, ...] = ()
    project: str = PROJECT
    id: str = ""
    sent: dict[str, int] = field(default_factory=dict)


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, folder: Path, tracked: Tracked, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Events of a session that was cut off past the checkpoint are dropped by whoever reads the files.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=10)
        if not step:
            self._writer.add_text("config", "```\n" + json.dumps(config, indent=1) + "\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, its files in the run's folder."""

    def __init__(self, folder: Path, tracked: Tracked, config: dict, step: int):
        import wandb

        self._run = wandb.init(
            project=tracked.project,
            id=tracked.id,
            name=folder.resolve().name,
            resume="allow",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its local database unless its environment names a server."""

    def __init__(self, folder: Path, tracked: Tracked, config: dict, step: int):
        import trackio

        self._run = trackio.init(
            project=tracked.project,
            name=f"{folder.resolve().name}-{tracked.id}",
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def tracked(names: Sequence[str], project: str | None, folder: Path | None = None) -> Tracked:
    """What is asked for, of the run in `folder` if one is resumed: its own trackers where none are named.

    Raises InputError where a tracker is unknown or its package missing, and for a project that is not the run's.
    """
    saved = _read(folder / FILE) if folder is not None else Tracked()
    wanted = tuple(dict.fromkeys(names)) or saved.names
    for name in wanted:
        if name not in TRACKERS:
            raise InputError(f"--track: wanted one of {', '.join(TRACKERS)}, got {name}")
        if not _installed(name):
            raise InputError(f"--track: wanted the {name} package, got none: pip install {name}")
    if project is not None and not wanted:
        raise InputError("--project: wanted --track with it, got none")
    if project is not None and not project.strip():
        raise InputError("--project: wanted a name, got an empty one")
    if saved.names and project not in (None, saved.project):
        raise InputError(f"--project: the run in {folder} is tracked in {saved.project}, got {project}")
    return Tracked(wanted, project or saved.project, saved.id or secrets.token_hex(4), saved.sent)


class Tracking:
    """The trackers of a run that goes on from `step`.

    config: of the run, JSON values. furthest: the last step that an earlier session of it came to. say: takes a line
    for people where a tracker is left out. Raises OSError where tracking.json cannot be written.
    """

    def __init__(self, run: Tracked, folder: Path, config: dict, step: int, furthest: int, say: Callable[[str], None]):
        self._say = say
        if not run.names:
            self._lines: list[_Line] = []
            return
        sent = {name: max(run.sent[name], furthest) if name in run.sent else 0 for name in run.names}
        content = {"trackers": sent, "project": run.project, "id": run.id}
        write_atomically(folder / FILE, json.dumps(content, indent=1).encode() + b"\n")
        if "wandb" in run.names and sys.stdin is not None and sys.stdin.isatty():
            _log_in()
        sent["tensorboard"] = step
        self._lines = [
            _Line(name, lambda name=name: TRACKERS[name](folder, run, config, step), sent[name]) for name in run.names
        ]

    def log(self, row: dict[str, Any]) -> None:
        """Hands one row of the metrics to every tracker, without its values that are None. Never waits or raises."""
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for line in self._lines:
            line.put(row["step"], values)
        self._drop_lost()

    def close(self) -> None:
        """Lets the trackers send what is left, for CLOSE_SECONDS in all."""
        for line in self._lines:
            line.put_end()
        for line in self._lines:
            line.join(CLOSE_SECONDS / len(self._lines))
        self._drop_lost()
        self._lines = []

    def _drop_lost(self) -> None:
        for line in [line for line in self._lines if line.lost is not None]:
            self._say(f"tracking {line.name} is left out, and the run goes on: {line.lost}")
            self._lines.remove(line)


class _Line:
    """A queue and the thread that empties it into one tracker. lost: why there is no more of it, None if there is."""

    def __init__(self, name: str, opened: Callable[[], Tracker], sent: int):
        self.name, self.lost, self._sent = name, None, sent
        self._rows: queue.Queue = queue.Queue(BEHIND)
        # A daemon: a tracker that hangs must not keep the process.
        self._thread = threading.Thread(target=self._empty, args=(opened,), name=f"track-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        if self.lost is None and step > self._sent:
            self._put((step, values))

    def put_end(self) -> None:
        if self.lost is None:
            self._put(None)

    def join(self, seconds: float) -> None:
        if self.lost is None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self.lost = f"wanted its end within {seconds:g} s, got none"

    def _put(self, item) -> None:
        try:
            self._rows.put_nowait(item)
        except queue.Full:
            self.lost = f"wanted it to keep up, got {BEHIND} rows behind"

    def _empty(self, opened: Callable[[], Tracker]) -> None:
        at = "opening it"
        try:
            tracker = opened()
            while self.lost is None and (item := self._rows.get()) is not None:
                at = f"step {item[0]}"
                tracker.log(*item)
            at = "closing it"
            tracker.close()
        except BaseException as error:  # whatever it is, SystemExit too, it is the tracker's and not the run's
            self.lost = self.lost or f"at {at}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _installed(name: str) -> bool:
    """A folder of that name, as wandb leaves one in many a working folder, is no package: it has no origin."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _log_in() -> None:
    """Lets wandb ask for its key here, where somebody can answer, and not from a thread."""
    import wandb

    try:
        wandb.login()
    except Exception as error:
        raise InputError(f"--track: wanted a login of wandb, got {type(error).__name__}: {error}") from error


def _read(path: Path) -> Tracked:
    """What tracking.json says; no trackers where there is none. Raises InputError where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
        sent = {str(name): int(step) for name, step in content["trackers"].items()}
        return Tracked(tuple(sent), str(content["project"]), str(content["id"]), sent)
    except FileNotFoundError:
        return Tracked()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: wanted what names the trackers' run, got a damaged file ({error!r})") from error
