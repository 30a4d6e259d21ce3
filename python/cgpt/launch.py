"""Starting several ranks: `cgpt train --devices N` is torchrun, whose agent runs in this process.

    cgpt train --devices N ...      agent ----> N x  python -m cgpt train ... --out DIR       (ranks)
    torchrun ... -m cgpt train ...  the same ranks, on one machine or several

Ranks, the search for one another, noticing a death and starting again are torchrun's; what is added is that

    the folder is decided before   so that ranks that are started again find the run, and go on with it
    flags are checked before       one line rather than one a rank
    a refusal is final             what the user has to mend is not tried again: a rank that refuses says so by SIGURG,
                                   which does nothing to who does not listen, such as a torchrun of the user's
    exit codes are cgpt's          130 after Ctrl-C, where torchrun ends with a traceback and 1

Ctrl-C or SIGTERM once: torchrun passes it on, every rank finishes the step and saves, for as long as SAVING. Twice: the
ranks get SIGTERM as well, which ends them at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from cgpt.errors import InputError
from cgpt.recipe import CONFIG, Recipe, new_folder, read_resumed, resolve, resolve_resumed, resumed_folder
from cgpt.stream.cores import launcher, usable_cores
from cgpt.train_flags import TrainConfig

RESTARTS = 3  # unless asked otherwise
SAVING = 3600  # seconds from a signal to SIGKILL; 30 under a torch that does not read the number
JOB = "TORCHELASTIC_RUN_ID"  # in the environment that torchrun gives to its ranks
SAYING = 1.0  # seconds that ranks have from the first one's refusal, for a line each


class Refused(BaseException):
    """A rank has said that there is nothing to try again. Not an Exception, which the agent might make a warning of."""


def starts(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is to start ranks: with one device there are none, and ranks start no others."""
    if config.max_restarts is not None and config.devices is None and not is_rank(environment):
        raise InputError("--max-restarts: wanted --devices with it, got none")
    return (config.devices or 1) > 1 and not is_rank(environment)


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or somebody in its stead, has started this process."""
    return "RANK" in environment or "WORLD_SIZE" in environment


def launch(config: TrainConfig) -> int:
    """Runs the job to its end; returns its exit code: 0, the code of the rank that failed first once no restart is
    left, 128 and the signal's number where a signal ended it, 2 where a rank refused. Raises InputError for flags that
    make no run."""
    recipe, folder = _asked(config)
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if recipe.device == "cuda":
        _count_gpus(config.devices, torch.cuda.device_count())
    restarts = RESTARTS if config.max_restarts is None else config.max_restarts
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))
    # Ranks size their threads by the cores that they take; else torchrun would set 1, and print six lines about it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // config.devices)))
    asked = ["--standalone", f"--nproc-per-node={config.devices}", f"--max-restarts={restarts}"]
    asked += ["-m", "cgpt", "train", *flags_of(replace(config, out=folder))]
    signal.signal(signal.SIGURG, _stop)
    try:
        torchrun.run(torchrun.parse_args(asked))
    except SignalException as ended:
        return 128 + ended.sigval
    except Refused:
        return 2
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        print(f"cgpt: rank {rank} ended by {how}, and no restart of {restarts} is left", file=sys.stderr)
        return 128 - code if code < 0 else code
    return 0


def joined(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> TrainConfig:
    """What a process trains that starts no others: on a rank, with --resume where it goes on with the job's run.

    Raises InputError for flags that differ from torchrun's, and where restarts would not find the run.
    """
    if not is_rank(environment):
        return config
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    theirs = {"devices": int(environment.get("WORLD_SIZE", "1")), "max_restarts": restarts}
    for name, value in theirs.items():
        given = getattr(config, name)
        if given not in (None, value):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: wanted none, or {value} as torchrun was asked for, got {given}")
    if restarts and config.out is None and not config.resume:
        raise InputError("--out: wanted a folder, so that torchrun's restarts find the run, got none")
    return resume_on_restart(config, environment)


def restarted(environment: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started the ranks again."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def resume_on_restart(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> TrainConfig:
    """`config`, with --resume where the run in --out is of this very job, begun before its ranks were started again.

    Which run is the job's is told by its age: one that was there before torchrun is left alone, and refused. The count
    of restarts would not do: on several machines, torchrun does not count alike on all.
    """
    if config.resume or config.out is None or JOB not in environment:
        return config
    run = config.out / CONFIG
    ours = run.is_file() and run.stat().st_mtime >= _job_began()
    return replace(config, resume=True) if ours else config


def give_up() -> None:
    """On a rank that has refused what only the user can mend: has `launch` start no other in its place."""
    if JOB in os.environ and (agent := launcher()) > 1:
        with contextlib.suppress(OSError):  # it has ended before
            os.kill(agent, signal.SIGURG)


def flags_of(config: TrainConfig) -> list[str]:
    """The flags that ask for `config`."""
    found = []
    for field in fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if value is True:
            found.append(flag)
        elif value is not None and value is not False:
            found += [f"{flag}={item}" for item in (value if isinstance(value, tuple) else [value])]
    return found


def _asked(config: TrainConfig) -> tuple[Recipe, Path]:
    """What is to be trained, as far as flags tell, and where."""
    if config.resume:
        folder = resumed_folder(config)
        return resolve_resumed(config, read_resumed(folder)[0], folder), folder
    recipe = resolve(config)
    return recipe, new_folder(config, recipe)


def _count_gpus(devices: int, gpus: int) -> None:
    if not gpus:
        raise InputError(f"--devices: wanted GPUs for {devices}, got a machine where torch finds none")
    if devices > gpus:
        told = f"share {gpus} GPU{'s' * (gpus > 1)}, and exchange through host memory"
        print(f"devices  {devices} processes {told}", flush=True)


def _stop(number, _frame) -> None:
    signal.signal(number, signal.SIG_IGN)  # the others say the same
    time.sleep(SAYING)
    raise Refused


def _job_began() -> float:
    """When torchrun was started, seconds of the epoch: its age is told on the clock that runs from the machine's
    start."""
    ticks = int(Path(f"/proc/{launcher()}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
