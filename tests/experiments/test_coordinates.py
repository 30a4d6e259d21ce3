"""muP keeps what it promises over a 4 x width, SP does not, and a mistake in the table of rules shows."""

import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from cgpt import cli
from cgpt.errors import Diverged, InputError
from cgpt.experiments import coordinates_report
from cgpt.experiments.coordinates import (
    JUDGED,
    LIMIT,
    QUANTITIES,
    Coordinates,
    base_at,
    check,
    deeper,
    follow,
    score_gradients,
    watching,
    wider,
)
from cgpt.model.gpt import GPT
from cgpt.model.parametrization import EXPONENTS, KINDS, parametrize
from cgpt.stream.optimizer import AdamW

VOCAB = 97


@pytest.fixture(scope="module")
def batch():
    """Zipf's odds, and each token after the first of a pair is a function of it half the time."""
    draw = np.random.default_rng(0)
    odds = 1 / np.arange(1, VOCAB + 1)
    tokens = draw.choice(VOCAB, (8, 65), p=odds / odds.sum())
    known = draw.permutation(VOCAB)
    for t in range(1, 65):
        follows = draw.random(8) < 0.5
        tokens[follows, t] = known[tokens[follows, t - 1]]
    return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def over_widths(batch, kinds, seeds=2, widths=(64, 256), **more):
    base = base_at(widths[0], 2, 2, VOCAB, 6e-3, 0.08, 10.0)
    return check(base, [wider(base, width) for width in widths], kinds, batch, seeds=seeds, **more)


def ratios(found, kind):
    return {name: found.ratio(kind, name) for name in QUANTITIES}


def test_mup_holds_over_four_times_the_width_and_sp_does_not(batch):
    found = over_widths(batch, ("mup", "sp"), widths=(64, 128, 256))
    mup, sp = ratios(found, "mup"), ratios(found, "sp")
    assert found.within("mup")
    assert max(mup[name] for name in JUDGED) <= LIMIT == 1.2
    assert not found.within("sp")
    assert min(sp[name] for name in ("attention", "mlp", "stream", "scores")) > 5
    assert sp["readout"] > 1.5
    first = found.means("mup", "logits")[:, 0]
    assert first[:-1] / first[1:] == pytest.approx([math.sqrt(2)] * 2, rel=0.05)  # why they are not judged


def test_completep_holds_over_depth_and_mup_does_not(batch):
    base = base_at(32, 2, 2, VOCAB, 6e-3, 0.08, 10.0)
    found = check(base, [deeper(base, depth) for depth in (2, 4, 8)], ("completep", "mup"), batch, seeds=2)
    assert (found.along, found.sizes) == ("depth", (2, 4, 8))
    assert found.within("completep")
    assert not found.within("mup")
    assert min(found.ratio("mup", name) for name in ("attention", "mlp", "stream", "readout")) > 1.3


@pytest.mark.parametrize(
    ("rule", "of_width_and_heads", "shows"),
    [
        ("hidden_lr_scale", (0, 0), "attention mlp stream scores readout"),
        ("logits_scale", (0, 0), "attention readout"),
        ("softmax_scale", (0, -1 / 2), "scores"),
        ("hidden_init_std", (0, 0), "attention mlp scores"),
        ("residual_init_std", (0, 0), "attention mlp"),
        ("embedding_lr_scale", (-1, 0), "readout"),
    ],
)
def test_a_mistake_in_the_rules_shows(batch, monkeypatch, rule, of_width_and_heads, shows):
    sp, mup, completep = EXPONENTS[rule]
    monkeypatch.setitem(EXPONENTS, rule, (sp, (*of_width_and_heads, mup[2]), completep))
    found = over_widths(batch, ("mup",), seeds=1)
    assert not found.within("mup")
    assert min(found.ratio("mup", name) for name in shows.split()) > 1.35


def test_at_the_base_all_are_one(batch):
    base = base_at(32, 1, 2, VOCAB, 6e-3, 0.08, 10.0)
    found = check(base, [base.config, wider(base, 64)], KINDS, batch, steps=1, seeds=1)
    assert (found.values[:, 0] == found.values[0, 0]).all()
    assert (found.values[1, 1] != found.values[0, 1]).any()


def test_what_is_read(batch):
    base = base_at(32, 2, 2, VOCAB, 6e-3, 0.08, 10.0)
    shape = parametrize(deeper(base, 4), "completep", base)
    rows = follow(shape, base.lr, batch, 2, seed=3)
    model = GPT(shape, seed=3)
    with torch.no_grad():
        x = model.embed(batch[0])
        want = {"embedding": x.abs().mean(), "attention": 0.0, "mlp": 0.0}
        for block in model.h:
            added = block.attn(block.ln_1(x))
            y, x = block.ln_2(added, residual=x)
            want["attention"] += added.abs().mean() / shape.residual_scale / 4
            want["mlp"] += block.mlp(y).abs().mean() / 4
            x = x + shape.residual_scale * block.mlp(y)
        want |= {"stream": x.abs().mean(), "logits": model(batch[0]).abs().mean(), "scores": 0.0, "readout": 0.0}
    assert dict(zip(QUANTITIES, rows[0], strict=True)) == pytest.approx(
        {k: float(v) for k, v in want.items()}, rel=1e-5
    )
    assert (rows[1:, QUANTITIES.index("scores")] > 0).all()
    assert rows[2, QUANTITIES.index("readout")] > rows[1, QUANTITIES.index("readout")] > 0


def test_score_gradients_are_the_losss(batch):
    """Their sum with the scores is the loss's slope as all scores grow by one factor."""
    shape = replace(base_at(32, 2, 2, VOCAB, 6e-3, 0.5, 10.0).config, softmax_scale=0.25)
    model = GPT(shape)

    def loss(factor):
        changed = GPT(replace(shape, softmax_scale=0.25 * factor))
        with torch.no_grad():
            return float(changed(*batch))

    found = score_gradients(model, batch)
    with torch.no_grad(), watching(model) as seen:
        model(batch[0])
    assert found.shape == (2, 8, 2, 64, 64)
    slope = (loss(1.01) - loss(0.99)) / 0.02
    assert abs(slope) > 0.01
    assert float((found * seen.scores(shape)).sum()) == pytest.approx(slope, rel=5e-3)


def test_bf16_holds_too(batch):
    found = over_widths(batch, ("mup",), seeds=1, precision="bf16")
    exact = over_widths(batch, ("mup",), seeds=1)
    assert found.within("mup")
    assert not np.array_equal(found.values, exact.values)
    assert ratios(found, "mup") == pytest.approx(ratios(exact, "mup"), rel=0.05)


def test_divergence_is_named(batch):
    base = base_at(32, 1, 2, VOCAB, 1e30, 0.08, 10.0)
    shapes = [wider(base, 64), base.config]
    with pytest.raises(Diverged, match=r"mup, width 64: wanted finite activations, got others at lr 1e\+30"):
        check(base, shapes, ("mup",), batch, seeds=1)


def test_a_step_that_is_skipped_has_no_row(batch, monkeypatch):
    base = base_at(32, 1, 2, VOCAB, 6e-3, 0.08, 10.0)
    monkeypatch.setattr(AdamW, "step", lambda *_: False)
    rows = follow(base.config, base.lr, batch, 1, 0)
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1]).all()


def test_only_one_thing_may_differ(batch):
    base = base_at(32, 1, 2, VOCAB, 6e-3, 0.08, 10.0)
    for shapes in ([base.config], [base.config, replace(wider(base, 64), n_layer=2)]):
        with pytest.raises(InputError, match="wanted shapes that differ in width or in depth, two at least"):
            check(base, shapes, ("mup",), batch)


def test_a_ratio_without_a_least_is_infinite_and_null():
    values = np.ones((1, 2, 1, 2, len(QUANTITIES)))
    values[0, 1, 0, 1, -1] = -1
    found = Coordinates(base_at(32, 1, 2, VOCAB, 1e-2, 0.08, 10.0), "width", (32, 64), ("sp",), values)
    assert found.ratio("sp", "readout") == math.inf
    assert not found.within("sp")
    verdict = json.loads(json.dumps(coordinates_report.to_dict(found), allow_nan=False))["verdict"]["sp"]
    assert verdict["ratios"]["readout"] is None
    assert verdict["ratios"]["mlp"] == 1


def output(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["coord-check", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_the_command_as_table_json_and_picture(here, capsys):
    argv = "--data corpus.txt --widths 64 32 --steps 2 --seeds 2 --layers 1".split()
    found = json.loads(output(capsys, *argv, "--json", "--plot", "check.png", "--out", "check.json"))
    assert json.loads((here / "check.json").read_text()) == found
    assert (found["along"], found["sizes"], found["steps"], found["seeds"], found["lr"]) == (
        "width", [32, 64], 2, 2, 6e-3,
    )  # fmt: skip
    assert found["base"]["vocab_size"] < 100
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2 * 3
    for kind in ("mup", "sp"):
        by_place = {(x["width"], x["step"], x["seed"]): x for x in rows if x["parametrization"] == kind}
        assert len(by_place) == 2 * 3 * 2
        verdict = found["verdict"][kind]
        for name in QUANTITIES:
            small, large = (
                [(by_place[width, t, 0][name] + by_place[width, t, 1][name]) / 2 for t in (1, 2)] for width in (32, 64)
            )
            worst = max(max(a, b) / min(a, b) for a, b in zip(small, large, strict=True))
            assert verdict["ratios"][name] == pytest.approx(worst)
        assert verdict["within"] == all(verdict["ratios"][name] <= 1.2 for name in found["judged"])
    data = (here / "check.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1932, 672)
    table = output(capsys, *argv)
    verdicts = [line for line in table.splitlines() if line.startswith("within")]
    assert verdicts == [
        f"within 1.2 x: {'yes' if found['verdict'][kind]['within'] else 'no'}" for kind in ("mup", "sp")
    ]
    line = next(line for line in table.splitlines() if line.startswith("readout"))
    assert float(line.split()[-2]) == pytest.approx(found["verdict"]["mup"]["ratios"]["readout"], abs=0.006)


def test_depths_compare_completep_with_mup(here, capsys):
    found = json.loads(output(capsys, *"--data corpus.txt --widths 16 --depths 1 2 --steps 1 --seeds 1 --json".split()))
    assert (found["along"], found["sizes"], list(found["verdict"])) == ("depth", [1, 2], ["completep", "mup"])
    assert {row["depth"] for row in found["rows"]} == {1, 2}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--widths 64", "--widths: wanted two or more, each once, got 64"),
        ("--widths 64 64", "--widths: wanted two or more, each once, got 64 64"),
        ("--widths 64 129", "--widths: wanted multiples of the 2 heads, got 129"),
        ("--widths 36 72", "GPTConfig: d_head must be a multiple of 8 up to 256, got 18"),
        ("--depths 2", "--depths: wanted two or more, each once, got 2"),
        ("--depths 0 2", "--depths: wanted numbers above 0, got 0"),
        ("--depths 2 4 --widths 64 128", "--widths: wanted one with --depths, got 64 128"),
        ("--depths 2 4 --layers 2", "--layers: wanted it or --depths, got both"),
        ("--steps 0", "--steps: wanted a number above 0, got 0"),
        ("--lr -1", "--lr: wanted a number above 0, got -1.0"),
        ("--parametrization ntk", "--parametrization: wanted some of sp, mup, completep, each once, got ntk"),
        ("--plot check.bmp", "--plot: wanted a file ending in .png, .svg, .pdf, got check.bmp"),
        ("--data nowhere.txt", "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(here, capsys, argv, told):
    before = sorted(here.iterdir())
    assert cli.main(["coord-check", "--data", "corpus.txt", *argv.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cgpt: ")
    assert told in line
    assert [path for path in sorted(here.iterdir()) if path.name != "cache"] == before
