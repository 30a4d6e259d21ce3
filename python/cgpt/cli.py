"""`cgpt`: the only reader of the command line.

    train   plan   fit   coord-check   sweep   ablate   eval   generate   import   export   plot
    data prepare|export|info   info

Exit codes: 0 done; 1 `info` found an op wrong; 2 a one-line `cgpt: ...` on stderr, for what the user can mend; 130 or
143 after Ctrl-C or SIGTERM (128 and the signal's number, as shells count), with the run saved; 75 where --hang-timeout
ended it. With --devices, the code of the process that failed first. Nothing heavy is imported before it is known what
is asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cgpt.data.flags import Data
from cgpt.errors import InputError
from cgpt.evaluate.eval_flags import Eval
from cgpt.evaluate.generate_flags import Generate
from cgpt.experiments.flags import Ablate, CoordCheck, Sweep
from cgpt.info_flags import Info
from cgpt.interchange.flags import Export, Import
from cgpt.planning.flags import Plan
from cgpt.plot_flags import Plot
from cgpt.train_flags import Switch, TrainConfig


@dataclass(frozen=True)
class Fit:
    """A scaling law from training runs: coefficients with intervals, the best use of compute, what larger runs reach.

    power: loss over FLOPs. envelope: the best size at each budget, from training curves. isoflop: the same, from
    several sizes at each of a few budgets. parametric: loss over parameters and tokens.
    """

    data: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA...", help_behavior_hint="")]
    """Run folders, folders of them, and CSV files with columns params, tokens, flops, loss. Two of the first three give
    the third: flops = 6 params tokens."""
    method: Literal["power", "envelope", "isoflop", "parametric"] = "parametric"
    """What to fit."""
    bootstrap: int = 200
    """Samples for the 95 % intervals, 0 for none."""
    seed: int = 0
    """Of the samples."""
    json: Switch = False
    """Print JSON."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw points, fit and what it foretells (.png, .svg, .pdf)."""


Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[CoordCheck, tyro.conf.subcommand("coord-check")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Ablate, tyro.conf.subcommand("ablate")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Raises SystemExit for --help alone."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    refused = False
    try:
        code = run(parse(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a reader that has left can still be told from an error
        return code
    except InputError as error:
        message, refused = str(error), True
    except BrokenPipeError:  # the reader of our output has left: `cgpt info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there at exit
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = where + (error.strerror or str(error))
    except ImportError as error:  # a native module that does not load: cgpt_ext/__init__.py says what to do
        if not str(error).startswith("cgpt_ext does not load"):
            raise
        message = str(error)
    except KeyboardInterrupt:
        print("cgpt: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    print("cgpt: " + " ".join(message.split()), file=sys.stderr)
    if refused:
        from cgpt.launch import give_up

        give_up()
    return 2


def parse(argv: Sequence[str]):
    """The command that `argv` asks for. Raises InputError, one line, where it asks for none."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                Command,
                prog="cgpt",
                description="Train GPTs, measure them, let them write.",
                args=list(argv),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise InputError(_one_line(box.getvalue())) from error


def _one_line(box: str) -> str:
    """tyro's framed message, in UTF-8 or ASCII, on one line: what is wrong, and the nearest option if it knows one."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match(r"[╭─╰]|-{5,}$", line)] or [-1, len(lines)]
    body = lines[rules[0] + 1 : rules[1]]
    if "" in body:  # after a blank line come the attempts at each type of a union
        body = body[: body.index("")]
    message = " ".join(body)
    near = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(lines))
    helps = re.search(r"(?:run|see) (cgpt[\w ]* --help)", " ".join(lines))
    message = message.rstrip(".") + (f"; perhaps {near[1]}?" if near else "")
    return message + (f" ({helps[1]} lists what there is)" if helps else "")


def run(command) -> int:
    """Runs a parsed command."""
    if isinstance(command, TrainConfig):
        return _train(command)
    if isinstance(command, Sweep | Ablate):
        return _experiment(command)
    if isinstance(command, Info):
        from cgpt.info import info

        return info(command)
    steps = {Plan: _plan, Fit: _fit, CoordCheck: _coord_check, Eval: _eval, Generate: _generate}
    if isinstance(command, CoordCheck | Eval | Generate):  # a training run does so once its text is tokenized
        from cgpt.stream.cores import settle_threads

        settle_threads()
    steps |= {Import: _import, Export: _export, Plot: _plot, Data: _data}
    steps[type(command)](command)
    return 0


def _train(config: TrainConfig) -> int:
    from cgpt import launch

    if launch.starts(config):
        return launch.launch(config)
    config = launch.joined(config)
    from cgpt.train import train

    summary = train(config)
    return 128 + summary.stopped_by if summary.stopped_by else 0


def _experiment(command: Sweep | Ablate) -> int:
    from cgpt.experiments.commands import run_ablate, run_sweep
    from cgpt.experiments.matrix import Stopped

    try:
        run_sweep(command) if isinstance(command, Sweep) else run_ablate(command)
    except Stopped as stopped:
        print("cgpt: stopped, saved; the same command goes on", file=sys.stderr)
        return 128 + stopped.signal
    return 0


def _plan(command: Plan) -> None:
    if command.model is None and command.target is not None:
        _propose(command)
        return
    from cgpt.planning.memory import problem, solve
    from cgpt.planning.memory_report import show, to_dict

    command.check_model()
    if command.counts:
        _curve(command)
        return
    kind = command.model or "13B", command.device or "h100"
    found = solve(problem(*kind, count=command.one_count, **command.machine))
    print(json.dumps(to_dict(found), indent=1) if command.json else show(found))


def _curve(command: Plan) -> None:
    from cgpt.pictures import check_plot
    from cgpt.planning import curve_report
    from cgpt.planning.curve import curve

    if command.plot:
        check_plot(command.plot)
    found = curve(command.model or "13B", command.device or "h100", command.counts, command.machine)
    print(json.dumps(curve_report.to_dict(found), indent=1) if command.json else curve_report.show(found))
    if command.plot:
        curve_report.plot(found, command.plot)


def _propose(command: Plan) -> None:
    from cgpt.pictures import check_plot
    from cgpt.planning import proposal_report
    from cgpt.planning.proposal import propose, write

    if command.plot:
        check_plot(command.plot)
    found = propose(command)
    print(json.dumps(proposal_report.to_dict(found), indent=1) if command.json else proposal_report.show(found))
    if command.plot:
        proposal_report.plot(found, command.plot)
    if command.write:
        write(found, command.write)


def _fit(command: Fit) -> None:
    from cgpt import fit_report
    from cgpt.pictures import check_plot
    from cgpt.scaling.fit import fit
    from cgpt.scaling.points import read_points

    if command.plot:
        check_plot(command.plot)
    points = read_points(command.data, curves=command.method == "envelope")
    fitted = fit(points, command.method, command.bootstrap, command.seed)
    print(json.dumps(fit_report.to_dict(fitted), indent=1) if command.json else fit_report.show(fitted))
    if command.plot:
        fit_report.plot(fitted, command.plot)


def _plot(command: Plot) -> None:
    from cgpt.comparison import compare

    path, notes = compare(command)
    print("\n".join([*(f"note: {note}" for note in notes), str(path)]))


def _coord_check(command: CoordCheck) -> None:
    from cgpt.experiments.commands import run_coord_check

    run_coord_check(command)


def _eval(command: Eval) -> None:
    from cgpt.console import interactive
    from cgpt.evaluate.command import run_eval

    run_eval(command, interactive(), _say_placed)


def _generate(command: Generate) -> None:
    from cgpt.console import interactive
    from cgpt.evaluate.write_run import write_run

    write_run(command, live=interactive(), say=_say_placed)


def _import(command: Import) -> None:
    from cgpt.interchange.commands import run_import

    run_import(command)


def _export(command: Export) -> None:
    from cgpt.interchange.commands import run_export

    run_export(command)


def _say_placed(where: str) -> None:
    """On stderr: stdout is for the result."""
    print(f"placed   {where}", file=sys.stderr, flush=True)


def _data(command: Data) -> None:
    from cgpt.console import interactive
    from cgpt.data.commands import run as run_data

    run_data(command.command, interactive())
