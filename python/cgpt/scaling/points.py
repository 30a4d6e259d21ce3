"""What laws are fitted to: (parameters, tokens, FLOPs, loss) of training runs, from CSV files and run folders.

A CSV file names its columns `params`, `tokens`, `flops`, `loss` and `run` in its first line, in any order; others are
passed over. Of params, tokens and flops two give the third by C = 6·N·D, which `notes` then says. A run folder gives
its final held-out loss or, as a curve, every held-out loss on the way, with FLOPs by the published convention of its
own shape (cgpt.scaling.flops).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from cgpt.errors import InputError
from cgpt.scaling.flops import flops_per_token

NUMBERS = ("params", "tokens", "flops", "loss")
DERIVED = {  # column: how it follows from two others
    "flops": (("params", "tokens"), "flops = 6 params tokens", lambda params, tokens: 6 * params * tokens),
    "tokens": (("flops", "params"), "tokens = flops / (6 params)", lambda flops, params: flops / (6 * params)),
    "params": (("flops", "tokens"), "params = flops / (6 tokens)", lambda flops, tokens: flops / (6 * tokens)),
}


@dataclass(frozen=True)
class Points:
    """Columns of equal length n, float64, all finite and above 0; None where the data do not say.

    params: parameters. tokens: seen in training. flops: of training. loss: nats per token. run: which curve a point is
    on. source: where they come from, for messages. notes: what was assumed, a line each.
    """

    loss: np.ndarray
    params: np.ndarray | None = None
    tokens: np.ndarray | None = None
    flops: np.ndarray | None = None
    run: tuple[str, ...] | None = None
    source: str = "the points"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in NUMBERS:
            column = getattr(self, name)
            if column is None:
                continue
            values = np.asarray(column, dtype=np.float64)
            object.__setattr__(self, name, values)
            if values.shape != (np.size(self.loss),):
                raise InputError(f"{self.source}: {name}: wanted {np.size(self.loss)} numbers, got {values.shape}")
            bad = ~(np.isfinite(values) & (values > 0))
            if bad.any():
                raise InputError(f"{self.source}: {name}: wanted numbers above 0, got {values[bad][0]:g}")

    def __len__(self) -> int:
        return len(self.loss)

    def completed(self) -> Points:
        """With the third of params, tokens and flops where there are two."""
        for name, (known, told, rule) in DERIVED.items():
            columns = [getattr(self, other) for other in known]
            if getattr(self, name) is None and all(column is not None for column in columns):
                return replace(self, **{name: rule(*columns)}, notes=(*self.notes, told))
        return self

    def needing(self, *names: str) -> Points:
        """Itself. Raises InputError where a column of `names` is not there."""
        lacking = [name for name in names if getattr(self, name) is None]
        if lacking:
            there = [name for name in NUMBERS if getattr(self, name) is not None]
            raise InputError(
                f"{self.source}: wanted {', '.join(names)}, or two of params, tokens and flops; got {', '.join(there)}"
            )
        return self


def read_points(paths: Sequence[Path], curves: bool = False) -> Points:
    """Points of CSV files, run folders, and folders of run folders, one after the other.

    curves: of a run folder all held-out losses, not the last alone. Raises InputError, with file and line, for whatever
    is no point; OSError for what cannot be read.
    """
    if not paths:
        raise InputError("DATA: wanted a CSV file or run folders, got none")
    parts = []
    for path in paths:
        if path.is_dir():
            parts += [_of_run(folder, curves) for folder in _run_folders(path)]
        elif path.exists():
            parts.append(_of_csv(path).completed())
        else:
            raise InputError(f"{path}: no such file or folder")
    source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    columns = {name: _joined(getattr(part, name) for part in parts) for name in NUMBERS}
    runs = None
    if all(part.run is not None for part in parts):
        runs = tuple(name for part in parts for name in part.run)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return Points(**columns, run=runs, source=source, notes=notes).completed()


def _joined(columns: Iterable[np.ndarray | None]) -> np.ndarray | None:
    columns = list(columns)
    return None if any(column is None for column in columns) else np.concatenate(columns)


def _of_csv(path: Path) -> Points:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(reader.line_num, row) for reader in [csv.reader(file, skipinitialspace=True)] for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: wanted a CSV file, got something else ({error})") from error
    rows = [(line, row) for line, row in rows if any(cell.strip() for cell in row) and not row[0].startswith("#")]
    if not rows:
        raise InputError(f"{path}: wanted a line of column names and points, got an empty file")
    header = [cell.strip().lower() for cell in rows[0][1]]
    known = [name for name in header if name in (*NUMBERS, "run")]
    if "loss" not in known or not set(known) - {"loss", "run"}:
        got = ", ".join(header)[:80]
        raise InputError(f"{path}: wanted columns named loss and some of params, tokens, flops, got {got}")
    if len(set(known)) < len(known):
        raise InputError(f"{path}: wanted each column once, got {', '.join(known)}")
    if len(rows) == 1:
        raise InputError(f"{path}: wanted points under the column names, got none")
    columns: dict[str, list] = {name: [] for name in known}
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(f"{path}, line {line}: wanted {len(header)} cells, got {len(row)}")
        for name, cell in zip(header, row, strict=True):
            if name == "run":
                columns[name].append(cell.strip())
            elif name in columns:
                columns[name].append(_number(cell, f"{path}, line {line}: {name}"))
    runs = tuple(columns.pop("run")) if "run" in columns else None
    return Points(**{name: np.array(values) for name, values in columns.items()}, run=runs, source=str(path))


def _number(value, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise InputError(f"{what}: wanted a number above 0, got {str(value).strip() or 'nothing'}")
    return number


def _run_folders(path: Path) -> list[Path]:
    """`path` itself if it is a run, else the runs in it."""
    if (path / "config.json").is_file():
        return [path]
    found = sorted(folder for folder in path.iterdir() if (folder / "config.json").is_file())
    if not found:
        raise InputError(f"{path}: wanted a run folder, or a folder of them (config.json), got none")
    return found


def _of_run(folder: Path, curves: bool) -> Points:
    config, summary = _json(folder / "config.json"), _json(folder / "summary.json")
    try:
        recipe = config["recipe"]
        params = int(_number(summary["parameters"], f"{folder / 'summary.json'}: parameters"))
        shape = SimpleNamespace(**{**recipe["shape"], "seq_len": recipe["seq_len"]}, n_params=params)
        each = flops_per_token(shape).total
        if curves:
            rows = [row for row in _rows(folder / "metrics.jsonl") if row.get("val_loss") is not None]
        else:
            rows = [summary]
            if summary["val_loss"] is None:
                raise InputError(f"{folder}: wanted a finished run, got one that was stopped before its held-out loss")
        tokens = np.array([_number(row["tokens"], f"{folder}: tokens") for row in rows])
        loss = np.array([_number(row["val_loss"], f"{folder}: val_loss") for row in rows])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: wanted a run's config.json and summary.json, got damaged ones ({error})"
        ) from error
    told = "flops of run folders are their shapes' own, by the published convention"
    columns = {"params": np.full(len(rows), float(params)), "tokens": tokens, "flops": each * tokens, "loss": loss}
    return Points(**columns, run=(str(folder),) * len(rows), source=str(folder), notes=(told,))


def _json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path.parent}: wanted a finished run ({path.name}), got none")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: wanted JSON, got a damaged file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a JSON object, got {type(content).__name__}")
    return content


def _rows(path: Path) -> list[dict]:
    """Lines of JSON; a last one torn by a crash is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
