"""`cgpt eval`: what it measures, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable

from cgpt import heap
from cgpt.errors import InputError
from cgpt.evaluate import report
from cgpt.evaluate.eval_flags import Eval
from cgpt.evaluate.loss import evaluate_text, open_text
from cgpt.evaluate.reader import Reader, open_reader
from cgpt.files import write_atomically
from cgpt.model.cache import cache_bytes
from cgpt.recipe import read_config
from cgpt.stream.format import Format


def run_eval(command: Eval, bar: bool, say: Callable[[str], None]) -> None:
    """Everything that is asked for is opened before the first of it is measured. bar: whether progress is drawn; say:
    told where the layers live. Raises InputError."""
    command.check()
    recipe, _ = read_config(command.run)  # a run that is not there is said before lm_eval takes its seconds
    names = command.task_names
    tasks = _lm_eval().open_tasks(names, command.num_fewshot, progress=bar) if names else None
    cache = 0
    if tasks is not None and tasks.generate:
        width = Format(command.precision or recipe.precision).working
        cache = cache_bytes(recipe.shape, command.batch_size, recipe.seq_len, width)
    with open_reader(command.run, command.room(), command.batch_size, command.precision, say, cache) as reader:
        if not reader.store.placement.streams:  # what streams counts on freed memory being free
            heap.keep_large_buffers()
        wanted = command.data or ((None,) if not names else ())
        texts = [open_text(reader, data, progress=bar) for data in wanted]
        found = {"run": str(command.run), "step": reader.step, "precision": reader.recipe.precision}
        found |= {"texts": [], "tasks": []}
        for loader in texts:
            row = evaluate_text(reader, loader, command.tokens, command.batch_size, progress=bar)
            found["texts"].append(row)
            print(json.dumps(row) if command.json else report.text_line(row), flush=True)
        if tasks is not None:
            rows = _answers(reader, tasks, command, bar)
            found["tasks"] = [row | {"published": report.published(row)} for row in rows]
            parameters = reader.recipe.shape.n_params
            table = [report.tasks_table(rows, command.run, parameters)]
            print(*(map(json.dumps, found["tasks"]) if command.json else table), sep="\n", flush=True)
    if command.out is not None:
        write_atomically(command.out, json.dumps(found, indent=1).encode() + b"\n")


def _answers(reader: Reader, tasks, command: Eval, bar: bool) -> list[dict]:
    from cgpt.evaluate.harness import RunLM

    return _lm_eval().evaluate_tasks(RunLM(reader, command.batch_size, progress=bar), tasks, command.limit)


def _lm_eval():
    """The file that imports lm_eval. Raises InputError where that is not installed."""
    try:
        from cgpt.evaluate import tasks
    except ModuleNotFoundError as error:
        missing = (error.name or "cgpt").split(".")[0]
        if missing.startswith("cgpt"):
            raise
        raise InputError(f"--tasks: wanted lm_eval (pip install 'cgpt-ext[hf]'), got no module {missing}") from error
    return tasks
