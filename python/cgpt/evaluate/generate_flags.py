"""What `cgpt generate` is asked. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cgpt.read_flags import Read
from cgpt.train_flags import Int, Text

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class Generate(Read):
    """Text from a trained run: of one prompt as it comes, of many to a file.

    Keys and values of what has been read are kept, so that a token costs one position's arithmetic; layers that do not
    fit on the device cross to it once a token, for all prompts that grow at once. A draw depends on seed, sample and
    position: a prompt gets among others the text that it gets alone. Ctrl-C ends it and keeps what there is.

    cgpt generate RUN --prompt "Call me" --stop "." --num-samples 3

    cgpt generate RUN --prompts questions.jsonl --out answers.jsonl --temperature 0
    """

    prompt: Text = None
    """The text to go on from; - reads it from standard input (default: a line's end)."""
    prompts: File = None
    """Many of them: a line each, blank ones left out, or objects with "prompt" in a .jsonl; - reads lines from standard
    input."""
    out: File = None
    """Write a line of JSON a text: prompt, sample, text, tokens (ids) and finish_reason, one of eot, stop, length and
    interrupted (default: to standard output where there are many prompts)."""
    max_tokens: int = 128
    """Tokens to add, at most."""
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")] = ()
    """End before the first of these; in bash a line's end is $'\\n'."""
    num_samples: int = 1
    """Texts of each prompt, each with draws of its own."""
    temperature: float = 0.8
    """0 always takes the most probable token."""
    top_k: int = 50
    """Draw among this many, 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest that hold this much probability."""
    seed: int = 0
    """Of the draws."""
    batch_size: int = 8
    """Texts that grow at once; each takes memory for its keys and values."""
    context: Int = None
    """Tokens that are looked back on; a text that grows longer forgets half of them at once (default: the length of the
    sequences that the run was trained on)."""
