"""What `cgpt eval` prints: a line a text; tables of the tasks, the run's row first, the published ones under it."""

from __future__ import annotations

from pathlib import Path

from cgpt.evaluate.published import COLUMNS, models
from cgpt.metrics import human


def text_line(row: dict) -> str:
    """One text's loss, as `evaluate_text` gives it."""
    perplexity = "over 1e308" if row["perplexity"] is None else number(row["perplexity"])
    bits = f", {row['bits_per_byte']:.3f} bits a byte" if row["bits_per_byte"] else ""
    told = f"{row['loss']:.4f} nats a token, perplexity {perplexity}{bits}, over {row['tokens']:,} tokens"
    return f"{row['data']} ({row['split']}): {told}"


def tasks_table(rows: list[dict], run: Path, parameters: int) -> str:
    """Every metric of every task, and, of those with published rows, accuracies beside the Cerebras-GPTs'."""
    lines = [("task", "examples", "questions", "metric", "value", "+-")]
    for row in rows:
        for name, value in row["metrics"].items():
            error = row["stderr"].get(name)
            count = "" if row["documents"] is None else f"{row['documents']:,}"
            shots = "" if row["shots"] is None else str(row["shots"])
            lines.append((row["task"], shots, count, name, number(value), "" if error is None else number(error)))
    parts = [_aligned(lines, left=(0, 3))]
    for shots in dict.fromkeys(row["shots"] for row in rows):
        beside = _beside([row for row in rows if row["shots"] == shots], shots, f"{run.name or run}", parameters)
        if beside:
            parts.append(beside)
    return "\n\n".join(parts)


def _beside(rows: list[dict], shots: int | None, name: str, parameters: int) -> str:
    """Accuracies of the tasks that the published tables have; "" where there is none of them."""
    own = {row["task"]: row["metrics"]["acc"] for row in rows if row["task"] in COLUMNS and "acc" in row["metrics"]}
    published = [model for model in models(shots) if model.is_cerebras] if shots is not None else []
    if not own or not published:
        return ""
    tasks = [task for task in COLUMNS if task in own]
    whole = len(tasks) == len(COLUMNS)
    lines = [(f"acc, {shots} examples", "size", "FLOPs", *tasks, *["mean"] * whole)]

    def line(name: str, size: str, flops: str, values: list[float | None]) -> tuple[str, ...]:
        return name, size, flops, *("-" if value is None else f"{value:.3f}" for value in values)

    values = [own[task] for task in tasks]
    mean = [sum(values) / len(values)] if whole and None not in values else [None] * whole
    lines.append(line(name, human(parameters), "", values + mean))
    for model in published:
        values = [model.accuracy[task] for task in tasks] + [model.mean] * whole
        family = model.name.removesuffix(f" {model.size}")
        lines.append(line(family, model.size, f"{model.train_flops:.1e}" if model.train_flops else "", values))
    return _aligned(lines, left=(0,)) + "\n(Cerebras-GPT: arXiv 2304.03208, as lm_eval of early 2023 asked)"


def published(row: dict) -> dict[str, float]:
    """The published models' accuracies in the task of `row` with as many examples; {} where there are none."""
    if row["task"] not in COLUMNS or row["shots"] is None:
        return {}
    return {model.name: model.accuracy[row["task"]] for model in models(row["shots"])}


def number(value: float | None) -> str:
    """Four decimals, four digits where the number is large or that would leave nothing; - for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) >= 1e5 or 0 < abs(value) < 5e-5 else f"{value:.4f}"


def _aligned(lines: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Columns as wide as their widest cell; those in `left` begin together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
