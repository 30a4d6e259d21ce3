"""Jobs of several ranks under torchrun's own agent, which starts them again when one of them is killed.

The ranks are forked from the agent, where torchrun would start programs: everything is imported already.
`python jobs.py serve` runs many, one after another: `Jobs`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import nano
from cgpt.data.tokenizer import gpt2

LIMIT = 300  # seconds


class Jobs:
    """They may die as often as asked, and then start again."""

    def __init__(self, cwd: Path):
        self._server = nano.start("serve", cwd=cwd, script=__file__, stdin=subprocess.PIPE)

    def run(self, *arguments: str, ranks: int, where: str = "resident", aside=None, kills=()) -> tuple[int, str, int]:
        """Its exit code, what the ranks said, and how often they were started. kills: for each start in turn (rank,
        seconds after which it is killed) or (rank, failpoint, count), where it kills itself."""
        request = {"arguments": arguments, "ranks": ranks, "where": where, "aside": aside, "kills": kills}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return tuple(json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()


def serve() -> None:
    """Answers each request of `Jobs` once its processes have ended."""
    gpt2().encode_ordinary("")
    for line in sys.stdin:
        for path in Path.cwd().glob("pid-*"):
            path.unlink()
        said = Path("said")
        process = os.fork()
        if not process:
            with said.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            try:
                lead(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        starts = len(list(Path.cwd().glob("pid-*-0")))
        print(json.dumps([os.waitstatus_to_exitcode(status), said.read_text(), starts]), flush=True)


def lead(arguments: list[str], ranks: int, where: str, aside: int | None, kills: list) -> None:
    """The agent, which ends a job that hangs as it would one that somebody ends."""
    limit = threading.Timer(LIMIT, os.kill, (os.getpid(), signal.SIGTERM))
    limit.daemon = True
    limit.start()
    threading.Thread(target=kill_each, args=(kills,), daemon=True).start()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(kills),
        start_method="fork",
        monitor_interval=0.02,
    )
    elastic_launch(config, take_part)(arguments, where, aside, kills)


def take_part(arguments: list[str], where: str, aside: int | None, kills: list) -> None:
    """A rank."""
    os.setsid()  # as torchrun's are
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    start, rank = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    path = Path(f"pid-{start}-{rank}.tmp")
    path.write_text(str(os.getpid()))
    path.rename(path.with_suffix(""))
    at = kills[start][1:] if start < len(kills) and kills[start][0] == rank and len(kills[start]) == 3 else None
    code = nano.serve_one(arguments=arguments, where=where, aside=aside, kill=at)
    if code:
        sys.stdout.flush()
        os._exit(code)


def kill_each(kills: list) -> None:
    for start, (rank, *when) in enumerate(kills):
        path = Path(f"pid-{start}-{rank}")
        while not path.exists():
            time.sleep(0.01)
        if len(when) == 1:
            time.sleep(when[0])
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    nano.PRESETS["nano"] = nano.NANO
    serve()
