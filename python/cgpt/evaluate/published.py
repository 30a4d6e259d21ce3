"""The published models' accuracies, beside which `cgpt eval --tasks` sets a run's own.

    assets/downstream_0shot.csv   family, size, FLOPs of training, Pile test loss, seven accuracies and their mean
           downstream_5shot.csv   the same accuracies with five examples before each question
           andromeda.csv          machines and largest batch that each Cerebras-GPT was trained with

Source of all three: Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208): its tables of downstream results, which also
measure Pythia, GPT-NeoX, GPT-J and OPT, and its table 6. Accuracies are lm_eval's `acc`, not normalised by length, as
lm_eval of early 2023 words the questions.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources

# lm_eval's name of a task -> its column. The order is that of the tables.
COLUMNS = {
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "lambada_openai": "lambada",
    "arc_easy": "arc_e",
    "arc_challenge": "arc_c",
    "openbookqa": "openbookqa",
}
SHOTS = (0, 5)
OURS = "Cerebras"  # the family and, with "muP", the other: the models that this project re-implements


@dataclass(frozen=True)
class Model:
    """One row. accuracy: by lm_eval's task name, in [0, 1]. mean: of all seven. train_flops: None where the table has
    none. batch_seqs, n_cs2: sequences of its largest batch and CS-2 machines, of the Cerebras-GPTs alone."""

    family: str
    size: str
    shots: int
    accuracy: dict[str, float]
    mean: float
    train_flops: float | None
    batch_seqs: int | None
    n_cs2: int | None

    @property
    def name(self) -> str:
        return f"{self.family.replace('Cerebras', 'Cerebras-GPT')} {self.size}"

    @property
    def is_cerebras(self) -> bool:
        return self.family.startswith(OURS)


def models(shots: int) -> list[Model]:
    """The published rows with `shots` examples, in the tables' order; none for other counts than 0 and 5."""
    if shots not in SHOTS:
        return []
    trained = {row["model"]: row for row in _rows("andromeda.csv")}
    flops = {(row["family"], row["size"]): float(row["train_flops"]) for row in _rows("downstream_0shot.csv")}
    found = []
    for row in _rows(f"downstream_{shots}shot.csv"):
        machine = trained.get(row["size"]) if row["family"].startswith(OURS) else None
        found.append(
            Model(
                row["family"],
                row["size"],
                shots,
                {task: float(row[column]) for task, column in COLUMNS.items()},
                float(row["avg"]),
                flops.get((row["family"], row["size"])),
                machine and int(machine["batch_seqs"]),
                machine and int(machine["n_cs2"]),
            )
        )
    return found


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("cgpt.evaluate").joinpath("assets", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
