"""Log-likelihoods: against a model read one whole sequence at a time in fp64, however they are batched and placed."""

import math

import pytest
import torch

from cgpt.errors import InputError
from cgpt.evaluate import likelihood
from cgpt.evaluate.likelihood import log_likelihoods, pieces
from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.placement import Placement

CONFIG = GPTConfig(n_layer=2, n_head=2, d_model=16, d_head=8, d_ff=32, vocab_size=40, seq_len=8, embedding_init_std=0.5)
HOST = Placement(("host",) * 4, ("host",) * 4, (True,) * 4, micro_batches=3)


def opened(precision="fp32", placement=None):
    model, store = build(CONFIG, Format(precision, training=False), "cpu", placement=placement)
    store.initialise(lambda name, tensor: init_parameter(name, tensor, CONFIG, 7))
    return model, Executor(store)


@pytest.fixture(scope="module")
def model():
    return opened()


def ids(count, start=0):
    return [(start + 7 * i * i + 3 * i) % 40 for i in range(count)]


PAIRS = [
    (ids(3), ids(2, 1)),
    (ids(5), ids(1, 2)),
    (ids(5), ids(1, 9)),  # shares its forward with the one before
    (ids(1), ids(8, 3)),  # fills the context
    (ids(30), ids(3, 4)),  # is cut from the left
    (ids(2), ids(8, 5)),  # one token too many
    (ids(4), ids(21, 6)),  # three pieces
    (ids(3), []),
    (ids(3), ids(2, 1)),  # the first again
]


def naive(model, context, continuation):
    """Token by token: the last seq_len tokens before each piece's end."""
    total, greedy, whole = 0.0, True, [*context, *continuation]
    for start in range(len(context), len(whole), 8):
        stop = min(start + 8, len(whole))
        inputs = whole[max(0, stop - 9) : stop - 1]
        with torch.no_grad():
            logits = model(torch.tensor([inputs]))[0].double()
        for place, target in zip(range(len(inputs) - (stop - start), len(inputs)), whole[start:stop], strict=True):
            total += logits[place].log_softmax(-1)[target].item()
            greedy &= int(logits[place].argmax()) == target
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_they_are_those_of_each_pair_alone(model, batch_size):
    found = log_likelihoods(model[1], 8, 40, PAIRS, batch_size)
    assert len(found) == len(PAIRS)
    for answer, pair in zip(found, PAIRS, strict=True):
        wanted, greedy = naive(model[0], *pair)
        assert answer.logprob == pytest.approx(wanted, rel=2e-6, abs=1e-12)
        assert answer.greedy == greedy
    assert (found[7].logprob, found[7].greedy) == (0.0, True)
    assert found[0] == found[8]


def test_they_are_those_of_transformers_gpt2(model):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2, n_inner=32, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=CONFIG.layer_norm_eps,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.transformer.load_state_dict(model[0].state_dict())
    found = log_likelihoods(model[1], 8, 40, PAIRS, 3)
    wanted = [naive(lambda ids: theirs(ids).logits, *pair) for pair in PAIRS]
    assert [answer.logprob for answer in found] == pytest.approx([value for value, _ in wanted], rel=2e-6, abs=1e-12)
    assert [answer.greedy for answer in found] == [flag for _, flag in wanted]


def test_greedy_continuations_are_found_and_one_token_off_is_not(model):
    context = ids(3)
    more = []
    for _ in range(12):
        with torch.no_grad():
            more.append(int(model[0](torch.tensor([(context + more)[-8:]]))[0, -1].argmax()))
    more = more[:5]
    other = [*more[:4], (more[4] + 1) % 40]
    found = log_likelihoods(model[1], 8, 40, [(context, more), (context, other), (context, more[:1])], 4)
    assert [answer.greedy for answer in found] == [True, False, True]


def test_layers_that_stream_give_the_same_bits(model):
    _, streams = opened(placement=HOST)
    gathered = []
    gather = streams.store.gather
    streams.store.gather = lambda index: gathered.append(index) or gather(index)
    found = log_likelihoods(streams, 8, 40, PAIRS, 1)
    assert found == log_likelihoods(model[1], 8, 40, PAIRS, 1)
    assert len(gathered) % 4 == 0
    batches = len(list(likelihood._batches(likelihood._groups(PAIRS, 8), 8)))
    assert len(gathered) // 4 == math.ceil(batches / 3)  # a walk serves three batches
    streams.store.close()


def test_the_same_inputs_are_read_once_and_the_longest_first(model, monkeypatch):
    shapes, read = [], Executor.read

    def watched(self, batches, head):
        shapes.extend(tuple(batch.shape) for batch in batches)
        return read(self, batches, head)

    monkeypatch.setattr(Executor, "read", watched)
    answers = log_likelihoods(model[1], 8, 40, [([1, 2, 3], [token]) for token in range(40)], 8)
    assert shapes == [(1, 3)]
    assert sum(math.exp(answer.logprob) for answer in answers) == pytest.approx(1, abs=1e-5)
    assert sum(answer.greedy for answer in answers) == 1
    shapes.clear()
    log_likelihoods(model[1], 8, 40, [(ids(n), [n]) for n in range(1, 8)], 2)
    assert shapes == [(2, 7), (3, 5), (2, 2)]  # at most 16 tokens, padding too


def test_a_head_in_parts_changes_rounding_alone(model, monkeypatch):
    whole = log_likelihoods(model[1], 8, 40, PAIRS, 100)
    monkeypatch.setattr(likelihood, "HEAD_BYTES", 3 * 4 * 40 * 2)  # two positions
    parts = log_likelihoods(model[1], 8, 40, PAIRS, 100)
    assert [answer.greedy for answer in parts] == [answer.greedy for answer in whole]
    assert [answer.logprob for answer in parts] == pytest.approx([answer.logprob for answer in whole], rel=1e-6)


def test_half_precision_logits_are_normalised_in_fp32():
    _, half = opened("bf16")
    answers = log_likelihoods(half, 8, 40, [([1, 2, 3], [token]) for token in range(40)], 8)
    assert sum(math.exp(answer.logprob) for answer in answers) == pytest.approx(1, abs=1e-5)
    half.store.close()


@pytest.mark.parametrize(
    ("context", "continuation", "wanted"),
    [
        ([9], [], []),
        ([9], [1], [((9,), (1,))]),
        ([9], [1, 2, 3, 4], [((9, 1, 2, 3), (1, 2, 3, 4))]),
        ([9], [1, 2, 3, 4, 5], [((9, 1, 2, 3), (1, 2, 3, 4)), ((1, 2, 3, 4), (5,))]),
        ([7, 8, 9], [1, 2, 3], [((8, 9, 1, 2), (1, 2, 3))]),
        ([7, 8, 9], [1, 2, 3, 4, 5, 6], [((9, 1, 2, 3), (1, 2, 3, 4)), ((2, 3, 4, 5), (5, 6))]),
    ],
)
def test_pieces_predict_every_token_once_after_as_much_as_fits(context, continuation, wanted):
    assert [(piece.inputs, piece.targets) for piece in pieces(context, continuation, 4)] == wanted


def test_nothing_is_nothing(model):
    assert log_likelihoods(model[1], 8, 40, [], 8) == []
    assert [answer.logprob for answer in log_likelihoods(model[1], 8, 40, [([1], [])], 8)] == [0.0]
    with pytest.raises(ValueError, match="a context must be at least one token, got none"):
        log_likelihoods(model[1], 8, 40, [([], [1])], 8)


def test_weights_that_are_no_numbers_are_said():
    model, broken = opened()
    with torch.no_grad():
        model.h[1].mlp.c_proj.bias[3] = math.nan
    with pytest.raises(InputError, match="wanted a model with finite logits, got NaN or Inf"):
        log_likelihoods(broken, 8, 40, PAIRS, 8)
    broken.store.close()
