"""`cgpt import`: a Hugging Face model as a run, with weights and no moments.

RUN/config.json                          the model's shape, in a recipe that says imported and trains nothing
RUN/checkpoints/step-00000000/...        weights, fp32, under the names they have there
RUN/tokenizer.json                       where the vocabulary is not GPT-2's
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from cgpt import checkpoint
from cgpt.data.prepare import open_corpus
from cgpt.data.shards import TokenDataset
from cgpt.data.tokenizer import TOKENIZER, gpt2
from cgpt.errors import InputError
from cgpt.files import naming, sync_folder, write_atomically
from cgpt.interchange.folder import whole_folder
from cgpt.interchange.weights import HuggingFaceWeights, Weights, open_weights
from cgpt.recipe import Recipe, write_config
from cgpt.starting import IMPORTED
from cgpt.stream.format import Format

FRESH = {"samples": 0, "tokens": 0, "seconds": 0.0}  # of a checkpoint: nothing has been seen yet


@dataclass(frozen=True)
class Imported:
    """What has been written."""

    run: Path
    parameters: int
    precision: str
    vocab_size: int


def import_(path: str | os.PathLike, out: str | os.PathLike, precision: str | None = None) -> Imported:
    """Writes the run folder `out` from a Hugging Face folder of a GPT-2 or btlm model.

    precision: "fp32", "bf16" or "fp16", in which the run is evaluated and generates (default: in which the weights are
    stored); the checkpoint holds fp32 whatever it is. Takes a tensor or two at a time. Raises InputError, one line, for
    what `open_weights` refuses, a vocabulary that cannot be read here, and an `out` in use, and OSError; nothing is
    then left in `out`.
    """
    path, out = Path(path), Path(out)
    if precision is not None:
        Format(precision)
    weights = open_weights(path)
    if not isinstance(weights, HuggingFaceWeights):
        raise InputError(f"{path}: wanted a Hugging Face model, got a run; cgpt export makes one of it")
    tokenizer = weights.tokenizer
    recipe = replace(weights.recipe, precision=precision or weights.recipe.precision)
    identity = {IMPORTED: recipe.model}
    with whole_folder(out, "the run") as folder:
        state = {**FRESH, "optimizer": {}, "recipe": recipe.to_dict()}
        checkpoint.save(folder / checkpoint.CHECKPOINTS, weights, 0, state)
        if tokenizer is not gpt2():
            write_atomically(folder / TOKENIZER, tokenizer.file)
            identity["vocabulary"] = tokenizer.hash
        write_config(folder, recipe, identity)
    return Imported(out, recipe.shape.n_params, recipe.precision, tokenizer.n_vocab)


def start_from(weights: Weights, run: Path, recipe: Recipe, optimizer: dict) -> None:
    """Makes `weights` the checkpoint of step 0 of `run`, which from then on needs them no more.

    optimizer: its state before the first step. Raises InputError and OSError; the run then has no checkpoint.
    """
    partial = run / (checkpoint.CHECKPOINTS + ".tmp")  # a name that a run's folder may have before it is a run's
    checkpoint.save(partial, weights, 0, {**FRESH, "optimizer": optimizer, "recipe": recipe.to_dict()})
    with naming(run):
        partial.rename(run / checkpoint.CHECKPOINTS)
    sync_folder(run)


def data_of(recipe: Recipe, start: Weights | None, run: Path, identity: dict | None, *, progress: bool) -> TokenDataset:
    """A run's data; text of one whose weights came with a vocabulary is read in that: of `start`, or, once the run has
    begun, of `run` itself, whose data had this identity.

    Raises as `open_corpus`, and InputError for tokens that do not mean what they do to the weights.
    """
    if recipe.init is None:
        return open_corpus(recipe.data, progress=progress)
    tokenizer = checkpoint.open_tokenizer(run, identity) if start is None else start.tokenizer
    dataset = open_corpus(recipe.data, progress=progress, tokenizer=tokenizer)
    if dataset.tokenizer is None or dataset.tokenizer.hash != tokenizer.hash:
        wanted = f"wanted text, or tokens of the vocabulary of {tokenizer.n_vocab} ids that the weights were trained in"
        raise InputError(f"{recipe.data}: {wanted}, got tokens of another, of {dataset.vocab_size}")
    return dataset
