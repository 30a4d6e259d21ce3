"""Flags of `cgpt eval`. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cgpt.errors import InputError
from cgpt.read_flags import Read
from cgpt.train_flags import Int, Switch

Texts = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Eval(Read):
    """A trained run on held-out text and on tasks of lm_eval.

    Text: loss in nats a token, perplexity and bits per byte, which alone compares runs of different vocabularies.
    Tasks: what each of them measures, beside the published Cerebras-GPTs where these were given the same task.
    """

    data: Annotated[Texts, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = ()
    """As for train; may be given several times. The run's own data gives its held-out split, any other is read whole
    (default: the run's own, or none with --tasks)."""
    tokens: Int = None
    """Read at most this many of each --data (default: all)."""
    tasks: Annotated[Texts, tyro.conf.arg(metavar="TASK,...", help_behavior_hint="")] = ()
    """lm_eval tasks: names (hellaswag,piqa,arc_*), YAML files, folders of them. The published rows are of hellaswag,
    piqa, winogrande, lambada_openai, arc_easy, arc_challenge and openbookqa, with 0 and 5 examples. A task's data comes
    over the network unless its YAML says dataset_path: json. Needs pip install 'cgpt-ext[hf]'."""
    num_fewshot: Int = None
    """Examples before each question (default: as the task says, mostly 0)."""
    limit: Int = None
    """Questions of each task, at most (default: all)."""
    batch_size: int = 8
    """Sequences of full length at once; of shorter ones as many as make as many tokens."""
    precision: Annotated[
        Literal["bf16", "fp32", "fp16"] | None, tyro.conf.arg(metavar="{bf16,fp32,fp16}", help_behavior_hint="")
    ] = None
    """Of weights and activations while they are read; losses are fp32 always (default: the run's)."""
    json: Switch = False
    """Print JSON, a line for each --data and each task."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write all of it to this file too, as one JSON object."""

    def check(self) -> None:
        """Raises InputError, naming the flag, for counts that are none and for flags that want another."""
        least = {"--tokens": (self.tokens, 1), "--batch-size": (self.batch_size, 1), "--limit": (self.limit, 1)}
        least["--num-fewshot"] = (self.num_fewshot, 0)
        for flag, (value, low) in least.items():
            if value is not None and value < low:
                raise InputError(f"{flag}: wanted at least {low}, got {value}")
        for flag, value in (("--num-fewshot", self.num_fewshot), ("--limit", self.limit)):
            if value is not None and not self.tasks:
                raise InputError(f"{flag}: wanted --tasks with it, got none")
        if self.tokens is not None and self.tasks and not self.data:
            raise InputError("--tokens: wanted --data with it, got --tasks alone; --limit bounds those")
        if self.tasks and not self.task_names:
            raise InputError("--tasks: wanted names, YAML files or folders, got none")
        if self.out is not None and not self.out.parent.is_dir():
            raise InputError(f"--out: wanted a file in a folder that is there, got {self.out}")
        if self.out is not None and self.out.is_dir():
            raise InputError(f"--out: wanted a file, got the folder {self.out}")

    @property
    def task_names(self) -> list[str]:
        """What --tasks names, in order, each once."""
        return list(dict.fromkeys(name.strip() for names in self.tasks for name in names.split(",") if name.strip()))
