"""`cgpt eval`: what it measures, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable

from cgpt.errors import InputError
from cgpt.evaluate import report
from cgpt.evaluate.flags import Eval
from cgpt.evaluate.loss import evaluate_text, open_text
from cgpt.evaluate.reader import open_reader
from cgpt.files import write_atomically


def run_eval(command: Eval, bar: bool, say: Callable[[str], None]) -> None:
    """Everything that is asked for is opened before the first of it is measured. bar: whether progress is drawn; say:
    told where the layers live. Raises InputError."""
    command.check()
    names = command.task_names
    tasks = _harness().open_tasks(names, command.num_fewshot) if names else None
    with open_reader(command.run, command.room(), command.batch_size, command.precision, say) as reader:
        wanted = command.data or ((None,) if not names else ())
        texts = [open_text(reader, data, progress=bar) for data in wanted]
        found = {"run": str(command.run), "step": reader.step, "precision": reader.recipe.precision}
        found |= {"texts": [], "tasks": []}
        for loader in texts:
            row = evaluate_text(reader, loader, command.tokens, command.batch_size, progress=bar)
            found["texts"].append(row)
            print(json.dumps(row) if command.json else report.text_line(row), flush=True)
        if tasks is not None:
            rows = _harness().evaluate_tasks(reader, tasks, command.limit, command.batch_size, progress=bar)
            found["tasks"] = rows
            parameters = reader.recipe.shape.n_params
            shown = map(json.dumps, rows) if command.json else [report.tasks_table(rows, command.run, parameters)]
            print(*shown, sep="\n", flush=True)
    if command.out is not None:
        write_atomically(command.out, json.dumps(found, indent=1).encode() + b"\n")


def _harness():
    """lm_eval's adapter. Raises InputError where lm_eval is not installed."""
    try:
        from cgpt.evaluate import harness
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0].startswith("cgpt"):
            raise
        raise InputError(f"--tasks: wanted lm_eval (pip install 'cgpt-ext[hf]'), got no module {error.name}") from error
    return harness
