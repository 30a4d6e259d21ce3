"""lm_eval's tasks: opened by name, YAML file or folder of YAML files; answered; as rows of numbers.

A name may be a task's, a group's or a tag's of lm_eval's own, or a pattern such as arc_*. A YAML file is what lm_eval's
documentation calls a task's configuration; `dataset_path: json` with `data_files` in it needs no network. YAML may name
Python functions beside it, which run.

Importing this file imports lm_eval (0.4.13), which takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import io
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lm_eval.tasks
import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from cgpt.errors import InputError
from cgpt.evaluate.harness import RunLM

PYTHON_SEED, NUMPY_SEED, EXAMPLES_SEED = 0, 1234, 1234  # lm_eval's own, so that its questions are everybody's
RESAMPLES = 1000  # behind a standard error that has no formula
NETWORK = ("aiohttp", "httpx", "huggingface_hub", "requests", "urllib3")  # whose errors are of the network
LONGEST_REASON = 240  # characters


@dataclass
class Tasks:
    """As lm_eval's TaskManager gives them. origin: which word of --tasks a task came by."""

    tasks: dict = field(default_factory=dict)
    groups: dict = field(default_factory=dict)
    group_map: dict = field(default_factory=dict)
    origin: dict = field(default_factory=dict)

    @property
    def generate(self) -> bool:
        """Whether one of them wants text, which takes a cache of keys and values."""
        return any(task.get_config("output_type") == "generate_until" for task in self.tasks.values())

    def add(self, spec: str, found: dict) -> None:
        for name in found["tasks"]:
            if self.origin.setdefault(name, spec) != spec:
                raise InputError(f"--tasks: wanted each task once, got {name} by {self.origin[name]} and by {spec}")
        self.tasks |= found["tasks"]
        self.groups |= found.get("groups", {})
        self.group_map |= found.get("group_map", {})


def open_tasks(specs: Sequence[str], shots: int | None = None, *, progress: bool = False) -> Tasks:
    """The tasks with their data and `shots` examples before each question (None: as many as the task says, or 0; a task
    that says 0 keeps to it). Raises InputError, naming the word, for what is no task or cannot be had."""
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    found = Tasks()
    with _quiet(progress):
        for spec in specs:
            manager, names = _find(spec)
            try:
                found.add(spec, manager.load(names))
            except InputError:
                raise
            except Exception as error:  # of the task's YAML, its functions, its data or the network
                raise InputError(_why_not(spec, error)) from error
    for task in found.tasks.values():
        default = task.get_config("num_fewshot")
        if default is None or (shots is not None and default != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=EXAMPLES_SEED)
    return found


def evaluate_tasks(lm: RunLM, tasks: Tasks, limit: int | None = None) -> list[dict]:
    """A row of JSON values for each task and group, in the order of --tasks.

    {"task", "version", "shots", "documents", "metrics": {name: value}, "stderr": {name: value}}; values are None where
    they are no finite numbers. limit: questions of each task, at most. Raises InputError for a task that breaks.
    """
    task_dict = {"tasks": tasks.tasks, "groups": tasks.groups, "group_map": tasks.group_map}
    try:
        with _quiet(lm.progress):
            found = evaluate(lm, task_dict, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
    except InputError:
        raise
    except Exception as error:
        if lm.failed:
            raise
        if isinstance(error, OverflowError):
            raise InputError("--tasks: wanted a perplexity under 1e308, got more: is the model trained?") from error
        raise InputError(f"--tasks: wanted tasks that run, got {_reason(error)}") from error
    return [_row(name, values, found) for name, values in found["results"].items()]


def _row(name: str, values: dict, found: dict) -> dict:
    metrics, errors = {}, {}
    for key, value in values.items():
        metric, comma, filter = key.partition(",")
        if not comma:
            continue  # alias, sample_len: no metric
        place = errors if metric.endswith("_stderr") else metrics
        known = metric.removesuffix("_stderr") + ("" if filter == "none" else f",{filter}")
        place[known] = float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    return {
        "task": name,
        "version": found["versions"].get(name),
        "shots": found["n-shot"].get(name),
        "documents": found["n-samples"].get(name, {}).get("effective"),
        "metrics": metrics,
        "stderr": {key: value for key, value in errors.items() if value is not None},
    }


def _find(spec: str) -> tuple[TaskManager, list[str]]:
    """Who knows what `spec` means, and the names that it means."""
    path = Path(spec).expanduser()
    if path.suffix in (".yaml", ".yml") or os.sep in spec:
        return _at(path, spec)
    own = Path(lm_eval.tasks.__file__).parent
    words = spec.split("_")
    for folder in (own / "_".join(words[:count]) for count in range(len(words), 0, -1)):
        if folder.is_dir():  # lm_eval's whole index takes ten seconds and more; most tasks are where one would look
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            if spec in manager.all_subtasks:
                return manager, [spec]
    if path.is_dir():
        return _at(path, spec)
    manager = TaskManager()
    names = [spec] if spec in manager.all_tasks else fnmatch.filter(manager.all_subtasks, spec)
    if not names:
        near = ", ".join(difflib.get_close_matches(spec, manager.all_tasks, n=3)) or "none like it"
        raise InputError(f"--tasks: wanted a task of lm_eval or a YAML file, got {spec} (there is {near})")
    return manager, names


def _at(path: Path, spec: str) -> tuple[TaskManager, list[str]]:
    if path.is_dir():
        manager = TaskManager(include_path=str(path), include_defaults=False)
        if not manager.all_subtasks:
            raise InputError(f"--tasks: wanted a folder with tasks in YAML files, got {spec}")
        known = {entry.yaml_path for entry in manager.task_index.values()}
        for file in sorted(
            path.rglob("*.yaml")
        ):  # lm_eval passes over what it cannot read and over names that are taken
            if file not in known and re.search(r"^task:", file.read_text(encoding="utf-8", errors="replace"), re.M):
                raise InputError(
                    f"--tasks: {file}: wanted a task, got YAML that cannot be read or a name that is taken"
                )
        return manager, manager.all_subtasks
    if not path.is_file():
        raise InputError(f"--tasks: {spec}: no such file")
    return TaskManager(include_defaults=False), [str(path)]


def _why_not(spec: str, error: Exception) -> str:
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in NETWORK:
        instead = "a YAML file of yours with dataset_path: json needs no network"
        return f"--tasks: {spec}: wanted its data, got no way to fetch it ({_reason(error)}); {instead}"
    return f"--tasks: {spec}: wanted a task that loads, got {_reason(error)}"


def _reason(error: Exception) -> str:
    """The error's kind and its first words, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:LONGEST_REASON]}{'...' * (len(text) > LONGEST_REASON)}"


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keeps lm_eval's log and prints, and its bars unless somebody watches, out of what is said here.

    Its bootstrap would fork a process for each core of the machine, one thousandth of the work for each.
    """
    log, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = log.level
    log.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not progress:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        log.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
