"""`cgpt generate`: prompts from flags, a file or a pipe; texts to the terminal, or as lines of JSON to one of those.

    {"prompt": "Call me", "sample": 0, "text": " Ishmael.", "tokens": [...], "finish_reason": "stop"}

The file appears under its name when it is whole, or when Ctrl-C ends it with what there is.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from cgpt.checkpoint import open_tokenizer, open_trained
from cgpt.errors import InputError
from cgpt.evaluate.generate import cache_shape
from cgpt.evaluate.sampling import Draw
from cgpt.evaluate.write import Written, encode, write
from cgpt.files import naming, sync_folder
from cgpt.model.cache import cache_bytes
from cgpt.recipe import read_config
from cgpt.stream.executor import Executor

if TYPE_CHECKING:
    from cgpt.evaluate.generate_flags import Generate

PIPE = Path("-")
DEFAULT = "\n"  # a prompt: what a document goes on with


def write_run(command: Generate, *, live: bool, say: Callable[[str], None]) -> None:
    """Does what `command` asks. live: somebody watches stderr, and is told how fast it goes. say: is told where a
    model that streams lives.

    Raises InputError for bad flags and files, and where model and cache do not fit, with both numbers; OSError for the
    file that is written; KeyboardInterrupt once what there was has been written.
    """
    draw = Draw(command.temperature, command.top_k, command.top_p, command.seed)
    recipe, identity = read_config(command.run)
    context = recipe.seq_len if command.context is None else command.context
    _check(command, context, recipe.shape.seq_len)
    tokenizer, prompts = open_tokenizer(command.run, identity), read_prompts(command)
    lengths = [len(encode(tokenizer, prompt)) for prompt in prompts]
    slots, capacity = cache_shape(lengths, command.max_tokens, context, command.batch_size, command.num_samples)
    cache = cache_bytes(recipe.shape, slots, capacity, recipe.format.working)
    sequences = -(-max(context, slots) // recipe.seq_len)  # that a walk reads at most
    with contextlib.ExitStack() as stack:
        put = stack.enter_context(_writer(command, prompts))
        _, _, model, store = open_trained(command.run, command.room(), sequences, say=say, cache=cache)
        stack.enter_context(contextlib.closing(store))
        put.begin()
        walk = Executor(store) if store.placement.streams else None
        many = (command.batch_size, command.num_samples, context)
        written = write(model, tokenizer, prompts, command.max_tokens, draw, command.stop, walk, *many, put.show)
        total = len(prompts) * command.num_samples
        _put_all(written, put, live, total if total > 1 and command.out not in (None, PIPE) else 0)


def _check(command: Generate, context: int, seq_len: int) -> None:
    """What is cheap to refuse before a model is read."""
    least = {"--max-tokens": (command.max_tokens, 0), "--num-samples": (command.num_samples, 1)}
    least |= {"--batch-size": (command.batch_size, 1)}
    for flag, (value, wanted) in least.items():
        if value < wanted:
            raise InputError(f"{flag}: wanted at least {wanted}, got {value}")
    if not 1 <= context <= seq_len:
        raise InputError(f"--context: wanted 1 to the model's {seq_len} positions, got {context}")
    if "" in command.stop:
        raise InputError("--stop: wanted a text, got an empty one")


def read_prompts(command: Generate) -> list[str]:
    """The texts to go on from. Raises InputError for a file that holds none, or none that can be read."""
    if command.prompts is None:
        prompt = DEFAULT if command.prompt is None else command.prompt
        return [_read(PIPE) if prompt == str(PIPE) else _clean(prompt)]
    if command.prompt is not None:
        raise InputError(f"--prompts: wanted one of --prompt and --prompts, got both, {command.prompts} the second")
    path = command.prompts
    lines = [line.removesuffix("\r") for line in _read(path).split("\n")]
    if path.suffix == ".jsonl":
        found = [_prompt_of(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        found = [line for line in lines if line.strip()]
    if not found:
        raise InputError(f"{_name(path)}: wanted a prompt, got none")
    return found


def _read(path: Path) -> str:
    data = sys.stdin.buffer.read() if path == PIPE else path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise InputError(f"{_name(path)}: wanted text in UTF-8, got {got}") from error


def _name(path: Path) -> str:
    return "standard input" if path == PIPE else str(path)


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: wanted JSON, got {error}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise InputError(f'{where}: wanted an object with a text "prompt", got {line[:60]}')
    return _clean(prompt)


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which no encoding takes: an argument's bytes that are no UTF-8 come as such,
    and JSON can spell them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _Terminal:
    """Texts to standard output as they read: the only one as it comes, of several each when it has ended."""

    def __init__(self, prompts: Sequence[str], samples: int):
        self.prompt, self.samples = prompts[0], samples
        self.show = self._show if samples == 1 else None
        self.within_a_line = False

    def begin(self) -> None:
        if self.samples == 1:
            self._show(self.prompt)

    def _show(self, piece: str) -> None:
        self.within_a_line = True
        print(piece, end="", flush=True)

    def __call__(self, written: Written) -> None:
        if self.samples > 1:
            self._show(f"--- {written.sample + 1} of {self.samples}\n{written.prompt}{written.text}")
        self.close()

    def close(self) -> None:
        if self.within_a_line:
            print(flush=True)
        self.within_a_line = False


class _Lines:
    """A line of JSON each, in ASCII where the file takes nothing else."""

    show = None

    def __init__(self, file: TextIO):
        self.file, self.ascii = file, codecs.lookup(file.encoding or "ascii").name != "utf-8"

    def begin(self) -> None:
        pass

    def __call__(self, written: Written) -> None:
        self.file.write(json.dumps(asdict(written), ensure_ascii=self.ascii) + "\n")
        self.file.flush()


@contextlib.contextmanager
def _writer(command: Generate, prompts: Sequence[str]) -> Iterator[_Terminal | _Lines]:
    """Where texts go. A file has its name once this ends: not by an error, and not by Ctrl-C before the first text."""
    if command.out in (None, PIPE):
        if command.out is None and command.prompts is None:
            with contextlib.closing(_Terminal(prompts, command.num_samples)) as terminal:
                yield terminal
        else:
            yield _Lines(sys.stdout)
        return
    path = command.out
    if path.is_dir():
        raise InputError(f"--out: wanted a file, got the folder {path}")
    if path.exists() and not path.is_file():  # /dev/null, or a named pipe, whose name no file must take
        with path.open("w", encoding="utf-8") as file:
            yield _Lines(file)
        return
    temporary = path.with_name(path.name + ".tmp")
    interrupted = None
    try:
        with naming(path):
            file = temporary.open("w", encoding="utf-8")
        with file:
            try:
                yield _Lines(file)
            except KeyboardInterrupt as error:
                if not file.tell():
                    raise
                interrupted = error
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if interrupted is not None:
        raise interrupted


def _put_all(written: Iterator[Written], put: Callable[[Written], None], live: bool, total: int) -> None:
    """Puts each where it goes. live: says beside it how fast they come, with a bar where there is a `total`."""
    bar = tqdm(total=total, unit="text", file=sys.stderr, dynamic_ncols=True) if live and total else None
    began, tokens = time.monotonic(), 0
    try:
        for text in written:
            put(text)
            tokens += len(text.tokens)
            if bar is not None:
                bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.3g} tokens/s", refresh=False)
                bar.update()
    finally:
        if bar is not None:
            bar.close()
        if live:
            seconds = max(time.monotonic() - began, 1e-9)
            print(f"{tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:.3g} tokens/s", file=sys.stderr)
