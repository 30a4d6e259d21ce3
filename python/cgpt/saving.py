"""Checkpoints of a run in progress: one at a time is on its way to the disk while training goes on.

Every rank has a snapshot of its part and a thread that saves it; the threads keep to themselves what they exchange, and
come to one outcome, which the ranks take note of at the same step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cgpt import checkpoint
from cgpt.errors import InputError
from cgpt.stream.snapshot import Snapshot
from cgpt.stream.store import Store


class Saving:
    """A checkpoint on its way to the disk: checkpoint.save of a snapshot, on a thread of its own.

    The thread is no daemon: an interpreter that ends, for whatever reason, ends after it.
    """

    def __init__(self, folder: Path, snapshot: Snapshot, step: int, state: dict, keep: int):
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(folder, snapshot, step, state, keep), name="checkpoint")
        try:
            self._thread.start()
        except BaseException:
            snapshot.drop()
            raise

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """The checkpoint's path, once it is whole. Raises what saving raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._path

    def _run(self, folder: Path, snapshot: Snapshot, step: int, state: dict, keep: int) -> None:
        try:
            self._path = checkpoint.save(folder, snapshot, step, state, keep)
        except BaseException as error:  # whatever it is, training must not wait at the gate for ever
            self._error = error
        finally:
            snapshot.drop()


class Checkpoints:
    """Those of one run, in `folder`; all but the newest `keep` are removed. newest: the newest that is whole. saving:
    one on its way. OSErrors name file and reason, and the checkpoint that is left."""

    def __init__(self, folder: Path, store: Store, keep: int):
        self.folder, self.store, self.keep = folder, store, keep
        self.newest: Path | None = None
        self.saving: Saving | None = None

    def save(self, step: int, state: dict) -> None:
        """Begins a checkpoint of this moment, once the one before is whole. Training goes on meanwhile, where the
        placement has memory for that. Raises OSError."""
        self.finish()
        if self.store.placement.aside is not None:
            self.saving = Saving(self.folder, Snapshot(self.store), step, state, self.keep)
            return
        with self._naming_what_is_left():
            self.newest = checkpoint.save(self.folder, self.store, step, state, self.keep)

    def notice(self) -> None:
        """Takes note of one that has become whole meanwhile, on all ranks once rank 0 has. Raises OSError where it has
        not."""
        if self.saving is not None and self.store.world.from_first(self.saving.done):
            self.finish()

    def finish(self) -> None:
        """Waits for the one that is on its way, if one is. Raises OSError."""
        if self.saving is None:
            return
        with self._naming_what_is_left():
            try:
                self.newest = self.saving.wait()
            finally:
                if self.saving.done:  # not where Ctrl-C ended the waiting
                    self.saving = None

    @contextlib.contextmanager
    def to_the_end(self, say: Callable[[str], None]) -> Iterator[None]:
        """An error leaves only once the one that is on its way is whole; should that fail too, it is said."""
        try:
            yield
        except BaseException:
            try:
                self.finish()
            except (OSError, InputError, RuntimeError) as error:  # the last: another rank's, whatever it was there
                say(f"checkpoint not saved: {error}")
            raise

    @contextlib.contextmanager
    def _naming_what_is_left(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            left = f"last good checkpoint: {self.newest or 'none'}"
            if isinstance(error, ConnectionError):
                raise ConnectionError(f"{error}; {left}") from error
            raise OSError(error.errno, f"{error.strerror}; {left}", error.filename) from error
