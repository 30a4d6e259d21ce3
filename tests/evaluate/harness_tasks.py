"""Small tasks of the four kinds that lm_eval knows, as YAML over local JSON, and a reader of random weights."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from cgpt.data.tokenizer import Tokenizer
from cgpt.data.vocabulary import learn
from cgpt.evaluate.reader import Reader
from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format

WORDS = "the whale sea ship captain of and a to in white old sailor deck harpoon".split()
SEQ_LEN = 64
CONFIG = GPTConfig(n_layer=2, n_head=2, d_model=32, d_head=16, d_ff=64, vocab_size=305, seq_len=SEQ_LEN)

CHOICE = """output_type: multiple_choice
doc_to_text: "? {{q}}"
doc_to_choice: c
doc_to_target: a
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
LAST = """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
UNTIL = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs:
  until: [" ship", "\\n"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, body: str, rows: list[dict]) -> Path:
    """`folder`/NAME.yaml and the questions that it names; examples come from the same."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\n    train: {file}\n"
    path.write_text(f"task: {name}\n{data}test_split: test\nfewshot_split: train\n{body}")
    return path


def write_tasks(folder: Path, seed: int = 7) -> None:
    """choice, last, rolling and until: words, some of them out of every vocabulary, texts of up to five windows."""
    draw = random.Random(seed)

    def text(*counts: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.choice(counts)))

    odd = ["na\u00efve \u6f22 \U0001f40b", "a<|endoftext|>b", "two\n\nlines"]
    rows = [{"q": text(1, 4, 12), "c": [text(1, 1, 2, 4) for _ in range(4)], "a": draw.randrange(4)} for _ in range(16)]
    unknown = {"q": odd[0], "c": ["\u6f22", "\u00ef", "whale", "\U0001f40b the"], "a": 3}
    write_task(folder, "choice", CHOICE, [*rows, unknown])
    rows = [{"text": text(3, 20, 70, 90)} for _ in range(16)]
    write_task(folder, "last", LAST, [*rows, {"text": f"a {odd[1]} sea"}])
    rows = [{"text": text(1, 5, 63, 64, 65, 300)} for _ in range(10)]
    write_task(folder, "rolling", ROLLING, rows + [{"text": each} for each in odd])
    write_task(folder, "until", UNTIL, [{"q": text(1, 9, 20, 60), "a": text(2)} for _ in range(8)])


def vocabulary() -> Tokenizer:
    """Learnt from the tasks' words: most of them are one token each."""
    draw = random.Random(0)
    return learn([" ".join(draw.choice(WORDS) for _ in range(3000))], CONFIG.vocab_size)


@contextmanager
def random_reader(folder: Path, seed: int = 0, precision: str = "fp32") -> Iterator[Reader]:
    """Random weights, tilted towards whole words, so that perplexities are of the size of those of real models."""
    tokenizer = vocabulary()
    (folder / "tokenizer.json").write_bytes(tokenizer.file)
    model, store = build(CONFIG, Format(precision, training=False), "cpu")

    def fill(name: str, tensor: torch.Tensor) -> None:
        init_parameter(name, tensor, CONFIG, seed)
        if name == "wte.weight":
            tensor *= 5
            tensor[[token for word in WORDS for token in tokenizer.encode_ordinary(f" {word}")], 0] += 1
        if name == "ln_f.bias":
            tensor[0] = 8

    store.initialise(fill)
    recipe = SimpleNamespace(seq_len=SEQ_LEN, shape=CONFIG, precision=precision)
    try:
        yield Reader(folder, recipe, {}, tokenizer, model, store, Executor(store), 0)
    finally:
        store.close()
