"""A model small enough for tests: `python nano.py train --model nano ...` is `cgpt` with that preset added.

The vocabulary is GPT-2's, as every corpus needs; all else is as narrow as it goes: 0.8M parameters.
`python nano.py serve` runs many such commands, each in a process of its own that has everything imported: `Runs`.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from cgpt import checkpoint, opening, train
from cgpt.cli import main
from cgpt.data.tokenizer import gpt2
from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS, Preset
from cgpt.placing import Placed
from cgpt.recipe import Recipe
from cgpt.stream.account import account
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.world import World

NANO = Preset(
    name="nano",
    config=GPTConfig(n_layer=2, n_head=2, d_model=16, d_head=8, d_ff=32, vocab_size=50257, seq_len=16),
    batch_schedule=((0, 2),),
    steps=12,
    lr=1e-2,
    warmup_tokens=64,
    decay="linear",
    adam_eps=1e-8,
)


def write_corpus(folder: Path, words: int = 3000) -> Path:
    """A text file whose words are drawn with uneven odds: something to learn."""
    draw = random.Random(0)
    known = "the whale sea ship captain of and a to in white old sailor deck harpoon".split()
    path = folder / "corpus.txt"
    path.write_text(" ".join(known[int(len(known) * draw.random() ** 2)] for _ in range(words)))
    return path


def start(*arguments: str, cwd: Path, script: str = __file__, **options) -> subprocess.Popen:
    """This file as a process of its own, its caches under `cwd`, one thread, so that several share two cores."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, preexec_fn=hear_interrupts, **pipes, **options)


def hear_interrupts() -> None:
    """In a child: a shell starts what it runs in the background, tests among it, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# embed, h.0, h.1, head: (weights, state)
HOMES = {
    "resident": (("device",) * 4, ("device",) * 4),
    "host": (("host",) * 4, ("host",) * 4),
    "disk": (("disk",) * 4, ("disk",) * 4),
    "mixed": (("host", "device", "disk", "device"), ("disk", "host", "disk", "device")),
}


class Runs:
    """Commands of cgpt, one after another, as processes that may be killed."""

    def __init__(self, cwd: Path):
        self._server = start("serve", cwd=cwd, stdin=subprocess.PIPE)

    def run(
        self, *arguments: str, where: str | None = "resident", aside: int | None = None, kill=None, ranks: int = 1
    ) -> tuple[int, str]:
        """Its exit code, less than zero for a signal's, and what it said. where: of HOMES, None for what the flags ask.
        kill: seconds after which it is killed, (failpoint, count), where it kills itself, or (rank, step), after which
        that rank gets SIGTERM. Of several ranks, the last one's code, and all that they said."""
        request = {"arguments": arguments, "where": where, "aside": aside, "kill": kill, "ranks": ranks}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return tuple(json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()


def serve() -> None:
    """Answers each request of `Runs` once its process has ended."""
    gpt2().encode_ordinary("")
    for line in sys.stdin:
        request = json.loads(line)
        ranks, port = request.pop("ranks"), free_port()
        said = [Path(f"said-{rank}") for rank in range(ranks)]
        processes = [os.fork()]
        while processes[-1] and len(processes) < ranks:
            processes.append(os.fork())
        process = processes[-1]
        if not process:
            code, rank = 1, len(processes) - 1
            if ranks > 1:
                os.setsid()  # as torchrun's are
                os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
                os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            with contextlib.suppress(SystemExit), said[rank].open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                code = serve_one(**request)
                sys.stdout.flush()
            os._exit(code)
        if isinstance(request["kill"], float):
            signal.signal(signal.SIGALRM, lambda *_, process=process: os.kill(process, signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, request["kill"])
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # its number stays its own until no signal can come
        signal.setitimer(signal.ITIMER_REAL, 0)
        for process in processes:
            _, status = os.waitpid(process, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), "".join(map(Path.read_text, said))]), flush=True)


def free_port() -> str:
    with socket.socket() as here:
        here.bind(("localhost", 0))
        return str(here.getsockname()[1])


def serve_one(arguments: list[str], where: str | None, aside: int | None, kill: list | float | None) -> int:
    train.sample, train.plot_loss = lambda run: "none", lambda folder, *_: folder  # of no concern, and slow
    if where is not None:
        put(where, aside)
    passed, one_step = [], train.one_step

    def failpoint(name: str) -> None:
        passed.append(name)
        if isinstance(kill, list) and passed.count(kill[0]) == kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepped(run: opening.Run) -> dict:
        row = one_step(run)
        if kill == [run.store.world.rank, run.step]:
            signal.raise_signal(signal.SIGTERM)
        return row

    checkpoint.failpoint, train.one_step = failpoint, stepped
    return main(arguments)


def put(where: str, aside: int | None) -> None:
    """Has layers live where HOMES says, whatever the flags ask."""
    weights, state = HOMES[where]
    homes = {"weights": weights, "state": state, "recompute": tuple(home != "device" for home in weights)}
    build = opening.build
    opening.build = lambda *what, **options: build(*what, **options | {"disk": os.getcwd()})
    check = opening.check_machine
    opening.check_machine = lambda format, device, where, _, world: check(format, device, where, os.getcwd(), world)
    place_run = opening.place_run

    def placed(recipe: Recipe, world: World) -> Placed:
        found, tokens = place_run(recipe, world), recipe.micro_batch_size * recipe.seq_len
        placement = replace(found.placement, **homes, aside=aside)
        taken = account(gpt_plans(recipe.shape), placement, recipe.format, tokens, recipe.shape.d_model)
        return replace(found, placement=placement, account=taken)

    opening.place_run = placed


if __name__ == "__main__":
    PRESETS["nano"] = NANO
    sys.exit(serve() if sys.argv[1:] == ["serve"] else main())
