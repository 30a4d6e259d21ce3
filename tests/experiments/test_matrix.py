"""A matrix of runs: every cell once, whatever interrupts it."""

import json
import os
import signal
from dataclasses import replace

import pytest

from cgpt import train
from cgpt.errors import InputError
from cgpt.experiments import matrix
from cgpt.experiments.matrix import Cell, Stopped, run_matrix
from cgpt.recipe import TrainConfig, resolve


def recipe(**more):
    asked = {"model": "nano", "data": "corpus.txt", "steps": 3, "eval_tokens": 32, "checkpoint_every": 2, **more}
    return resolve(TrainConfig(**asked))


def cells(*rates):
    return [Cell(f"lr{lr:g}", {"lr": lr}, recipe(lr=lr)) for lr in rates]


def test_each_cell_is_a_run_and_a_line(here):
    said = []
    found = run_matrix(here / "out", cells(1e-3, 1e-2), said.append)
    assert [outcome.fields for outcome in found] == [{"lr": 1e-3}, {"lr": 1e-2}]
    for outcome in found:
        summary = json.loads((here / "out" / outcome.name / "summary.json").read_text())
        assert (outcome.loss, outcome.tokens) == (summary["val_loss"], summary["tokens"])
        assert "held-out loss" in (here / "out" / f"{outcome.name}.log").read_text()
    assert [line.split(":")[0].split() for line in said] == [["1/2", "lr0.001"], ["2/2", "lr0.01"]]


def test_finished_runs_are_not_trained_again_and_more_may_be_asked(here, monkeypatch):
    first = run_matrix(here / "out", cells(1e-3), str)
    trained = []
    job = matrix.train_job
    monkeypatch.setattr(matrix, "train_job", lambda asked: trained.append(asked.folder.name) or job(asked))
    again = run_matrix(here / "out", cells(1e-2, 1e-3), str)
    assert trained == ["lr0.01"]
    assert again[1] == first[0]


def test_a_run_that_was_cut_is_resumed_to_the_same_loss(here, monkeypatch):
    whole = run_matrix(here / "whole", cells(1e-3, 1e-2), str)
    one_step, steps = train.one_step, []

    def interrupted(run):
        steps.append(run.step)
        if len(steps) == 5:  # the second cell's second step
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(run)

    monkeypatch.setattr(train, "one_step", interrupted)
    with pytest.raises(Stopped) as stopped:
        run_matrix(here / "cut", cells(1e-3, 1e-2), str)
    assert stopped.value.signal == signal.SIGINT
    assert len((here / "cut" / "results.jsonl").read_text().splitlines()) == 1
    resumed = run_matrix(here / "cut", cells(1e-3, 1e-2), str)
    assert [outcome.loss for outcome in resumed] == [outcome.loss for outcome in whole]
    assert steps == [0, 1, 2, 0, 1, 2]


def test_a_torn_line_is_no_result(here):
    run_matrix(here / "out", cells(1e-3, 1e-2), str)
    results = here / "out" / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole[:-20])
    found = run_matrix(here / "out", cells(1e-3, 1e-2), str)
    assert [outcome.loss for outcome in found] == [json.loads(line)["loss"] for line in whole.splitlines()]


def test_divergence_is_a_result(here):
    found = run_matrix(here / "out", cells(1e-3, 1e30), str)
    assert found[0].loss is not None
    assert (found[1].loss, found[1].rank) == (None, float("inf"))
    assert "wanted a finite number" in (here / "out" / "lr1e+30.log").read_text()
    assert run_matrix(here / "out", cells(1e-3, 1e30), str) == found


def test_what_is_wrong_is_said_in_one_line(here):
    run_matrix(here / "out", cells(1e-3), str)
    other = [replace(cell, recipe=recipe(lr=1e-3, seed=1)) for cell in cells(1e-3)]
    with pytest.raises(InputError, match=r"lr0\.001: wanted a run with seed 1, got one with 0; another --out"):
        run_matrix(here / "out", other, str)
    with pytest.raises(InputError, match="wanted cells of different names"):
        run_matrix(here / "out", cells(1e-3, 1e-3), str)
