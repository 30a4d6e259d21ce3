"""What a person sees of a run: the report before it starts, a live line while it trains, the summary at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from cgpt.metrics import Summary, human
from cgpt.recipe import Recipe
from cgpt.scaling.flops import flops_per_token, matmul_flops_per_token
from cgpt.stream.account import Account
from cgpt.stream.limits import bytes_text

Say = Callable[[str], None]

PLAIN_SECONDS = 10  # between plain lines where there is no terminal

POSITIONS = {"learned": "", "none": "not marked", "rotary": "rotary", "alibi": "ALiBi"}


def report(
    say: Say,
    recipe: Recipe,
    n_params: int,
    data: str,
    implementations: dict[str, str],
    account: Account,
    out: Path,
    ranks: str | None = None,
) -> None:
    """The start-up report. ranks: which there are, if several; account: of each."""
    shape = recipe.shape
    kinds: dict[str, list[str]] = {}
    for op, name in implementations.items():
        kinds.setdefault(name, []).append(op)
    batches = ", then ".join(str(batch) for _, batch in recipe.batch_schedule)
    rows = {
        "model": f"{recipe.model}: {shape.n_layer} layers, width {shape.d_model}, {shape.n_head} heads, "
        f"{shape.seq_len} positions{_variant(recipe)}; {n_params:,} parameters",
        "data": data,
        "run": f"{recipe.steps:,} steps of {batches} x {recipe.seq_len} tokens, {recipe.micro_batch_size} at once; "
        f"{human(recipe.tokens)} tokens, {recipe.tokens / n_params:.3g} per parameter",
        "flops": _flops(recipe),
        "recipe": f"AdamW, peak lr {recipe.lr:g}, {recipe.decay} decay to {recipe.lr * recipe.min_lr_ratio:g}, "
        f"{human(recipe.warmup_tokens)} warm-up tokens, clip {recipe.clip:g}, seed {recipe.seed}"
        + (f"; tuned in {recipe.transfer_from}" if recipe.transfer_from else "")
        + (f"; from the weights of {recipe.init}" if recipe.init else ""),
        "ops": f"{recipe.device}, {recipe.precision}; "
        + "; ".join(f"{name}: {', '.join(ops)}" for name, ops in kinds.items()),
        **({"ranks": ranks} if ranks else {}),
        "memory": f"{_memory(account)} {'for each rank' if ranks else 'in all'}",
        "out": str(out),
    }
    for name, text in rows.items():
        say(f"{name:8} {text}")


def _memory(account: Account) -> str:
    """What a process takes by part, whichever tier it is of, and altogether."""
    parts: dict[str, int] = {}
    for name, size in (*account.device_parts.items(), *account.host_parts.items()):
        name = name.removesuffix(" (torch)")
        parts[name] = parts.get(name, 0) + size
    told = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
    return f"{told}; about {bytes_text(sum(parts.values()))}"


def _variant(recipe: Recipe) -> str:
    """What tells the model from the published ones."""
    shape = recipe.shape
    words = [POSITIONS[shape.positions], shape.activation, "embedding norm" * shape.embedding_norm]
    told = [word for word in (*words, recipe.parametrization) if word not in ("", "gelu", "sp")]
    return f" ({', '.join(told)})" if told else ""


def _flops(recipe: Recipe) -> str:
    """FLOPs a token by the published convention and its parts, by the rule of thumb, and of the products done here."""
    shape = recipe.shape
    count = flops_per_token(shape)
    parts = {name: value for name, value in count.to_dict().items() if name not in ("six_n", "total")}
    told = ", ".join(f"{name} {100 * value / count.total:.0f} %" for name, value in parts.items())
    done = matmul_flops_per_token(shape, recipe.seq_len)
    return (
        f"{human(count.total)} a token as published ({told}), {human(count.six_n)} by 6N, {human(done)} in products "
        f"done; {human(count.total * recipe.tokens)} in all"
    )


def interactive() -> bool:
    """Whether somebody watches: bars are drawn on a terminal only."""
    return sys.stderr.isatty()


def say(text: str) -> None:
    print(text, flush=True)


def hush(text: str) -> None:
    """In `say`'s place on ranks that another speaks for."""


class Live:
    """The live line: a progress bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, steps: int, done: int, flops_per_token: int):
        self.steps, self.done, self.flops_per_token = steps, done, flops_per_token
        self.bar = None
        if interactive():
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self.bar = tqdm(total=steps, initial=done, bar_format=form, dynamic_ncols=True, file=sys.stderr)
        self._began = self._said = time.monotonic()
        self._first = done

    def step(self, row: dict) -> None:
        """Shows one row of the metrics."""
        self.done = row["step"]
        speed = row["tokens_per_second"]
        text = f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {human(speed)} tokens/s, "
        text += human(speed * self.flops_per_token, "FLOP/s")
        if row["grad_norm"] is None:
            text += ", skipped: its gradient is not finite"
        held_out = f"step {self.done}: held-out loss {row['val_loss']:.4f}" if "val_loss" in row else None
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self.done - self.bar.n)
            if held_out:
                self.bar.write(held_out)
            return
        now = time.monotonic()
        if held_out or now - self._said >= PLAIN_SECONDS or self.done in (self._first + 1, self.steps):
            left = (now - self._began) / (self.done - self._first) * (self.steps - self.done)
            held_out = f", held-out loss {row['val_loss']:.4f}" if held_out else ""
            say(f"step {self.done}/{self.steps}: {text}, {clock(left)} left{held_out}")
            self._said = now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def show_summary(say: Say, summary: Summary) -> None:
    """The end of a run that came to its last step."""
    say(
        f"held-out loss {summary.val_loss:.4f} nats a token"
        + (f", {summary.bits_per_byte:.3f} bits a byte" if summary.bits_per_byte else "")
        + f"; unigram baseline {summary.unigram_loss:.4f}: {summary.unigram_loss - summary.val_loss:.4f} under it"
    )
    if summary.tokens_per_second:
        say(
            f"{summary.steps} steps, {human(summary.tokens)} tokens in {clock(summary.seconds)}: "
            f"{human(summary.tokens_per_second)} tokens/s, {human(summary.model_flops_per_second, 'FLOP/s')}, "
            f"peak memory {human(summary.peak_memory_bytes, 'B')}"
        )


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
