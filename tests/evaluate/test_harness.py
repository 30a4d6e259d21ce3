"""Our lm_eval adapter against lm_eval's own for transformers' models (HFLM): the same weights, the same questions."""

import contextlib
import io
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", minversion="0.4.13")
pytest.importorskip("accelerate", reason="HFLM wants it")
import transformers
from harness_tasks import CONFIG, SEQ_LEN, WORDS, random_reader, write_tasks
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cgpt.errors import InputError
from cgpt.evaluate.generate import Text
from cgpt.evaluate.harness import RunLM
from cgpt.evaluate.sampling import Draw
from cgpt.evaluate.tasks import RESAMPLES, evaluate_tasks, open_tasks

NAMES = ["choice", "last", "rolling", "until"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here, threads = tmp_path_factory.mktemp("harness"), torch.get_num_threads()
    (here / "tasks").mkdir()
    write_tasks(here / "tasks")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_HUB_OFFLINE", "1"), ("DISABLE_MULTIPROC", "1"), ("TQDM_DISABLE", "1")):
            patch.setenv(name, value)
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
        patch.setattr(evaluator, "add_env_info", lambda results: None)  # five seconds of asking for compilers
        yield here
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reader(folder):
    with random_reader(folder) as found:
        yield found


@pytest.fixture(scope="module")
def theirs(reader):
    """transformers' GPT-2 with the reader's weights, and its tokenizer."""
    eot = reader.tokenizer.eot
    config = transformers.GPT2Config(
        vocab_size=CONFIG.vocab_size, n_positions=SEQ_LEN, n_embd=CONFIG.d_model, n_layer=CONFIG.n_layer,
        n_head=CONFIG.n_head, n_inner=CONFIG.d_ff, activation_function="gelu", layer_norm_epsilon=CONFIG.layer_norm_eps,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=eot, eos_token_id=eot,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.load_state_dict(reader.model.state_dict())
    model.tie_weights()
    file = str(reader.run / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
    return model, tokenizer


def hflm(theirs, batch_size=64):
    return HFLM(pretrained=theirs[0], tokenizer=theirs[1], batch_size=batch_size, device="cpu")


class TheirForward:
    """Where our adapter reads activations, transformers' logits: the arithmetic is then the same."""

    store = SimpleNamespace(device=torch.device("cpu"), placement=SimpleNamespace(micro_batches=1, streams=False))

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def read(self, batches, head):
        same = SimpleNamespace(logits=lambda x: x)
        return [head(same, row, self.model(ids).logits) for row, ids in enumerate(batches)]


@pytest.fixture(scope="module")
def answers(folder, theirs):
    """HFLM's own results by count of examples."""
    found = {}
    for shots in (0, 3):
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
            found[shots] = evaluator.simple_evaluate(
                model=hflm(theirs), tasks=NAMES, task_manager=manager, num_fewshot=shots, bootstrap_iters=RESAMPLES,
                log_samples=False,
            )  # fmt: skip
    return found


def numbers(row, found):
    """(metric or its error, ours, theirs) of a task."""
    wanted = found["results"][row["task"]]
    for name, value in row["metrics"].items():
        yield name, value, wanted[f"{name},none"]
    for name, value in row["stderr"].items():
        yield f"{name} +-", value, wanted[f"{name}_stderr,none"]


@pytest.mark.parametrize("shots", [0, 3])
def test_every_bit_is_hflms_where_the_forward_is(folder, reader, theirs, answers, shots):
    same = RunLM(replace(reader, executor=TheirForward(theirs[0])), 64)
    rows = evaluate_tasks(same, open_tasks([str(folder / "tasks")], shots))
    assert [row["task"] for row in rows] == NAMES
    seen = [(ours, wanted) for row in rows for _, ours, wanted in numbers(row, answers[shots])]
    assert len(seen) == 13
    for ours, wanted in seen:
        assert ours == wanted
    assert all(row["shots"] == shots for row in rows)


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_our_kernels_give_hflms_results_to_the_last_digit_that_is_printed(folder, reader, answers, shots, batch_size):
    rows = evaluate_tasks(RunLM(reader, batch_size), open_tasks([str(folder / "tasks")], shots))
    for row in rows:
        for name, ours, wanted in numbers(row, answers[shots]):
            assert ours == pytest.approx(wanted, rel=5e-7), (row["task"], name)
            assert f"{ours:.4f}" == f"{wanted:.4f}", (row["task"], name)  # as lm_eval's table has it


def requests(kind, *arguments):
    return [Instance(kind, {}, each, index, metadata=("asked", index, 1)) for index, each in enumerate(arguments)]


def greedy_words(theirs, context, count):
    model, tokenizer = theirs
    ids = tokenizer.encode(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return tokenizer.decode(ids[-count:])


def test_each_answer_is_hflms_the_greedy_ones_too(reader, theirs):
    greedy = greedy_words(theirs, "the whale", 2)
    asked = requests(
        "loglikelihood",
        ("the whale", greedy),
        ("the whale", greedy + " and"),
        ("", "the whale and the sea"),
        ("", "<|endoftext|>the sea"),
        ("the sea ", "ship"),
        ("the", "re"),
        ("\u6f22\u5b57", " \U0001f40b"),
        (" ".join(WORDS * 9), " old sailor"),
        ("a", " the" * SEQ_LEN),
    )
    ours = RunLM(reader, 2).loglikelihood(asked)
    wanted = hflm(theirs, 4).loglikelihood(asked, disable_tqdm=True)
    assert [flag for _, flag in ours] == [flag for _, flag in wanted]
    assert [flag for _, flag in ours][:2] == [True, False]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in wanted], rel=1e-6)


def test_texts_of_any_length_are_hflms(reader, theirs):
    draw = random.Random(5)
    text = " ".join(draw.choice(WORDS) for _ in range(400))
    asked = requests("loglikelihood_rolling", *((text[:n],) for n in (1, 2, 200, 330, 1999)), ("",))
    ours = RunLM(reader, 1).loglikelihood_rolling(asked)
    assert ours == pytest.approx(hflm(theirs, 4).loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-6)
    assert ours[-1] == 0.0
    assert len(reader.tokenizer.encode_ordinary(text[:1999])) > 5 * SEQ_LEN


def test_the_same_tokens_cut_in_two_ways_are_each_their_own(reader):
    """HFLM 0.4.13 reads the first positions of the longer continuation for the shorter."""
    words = "the whale sea ship captain"
    ids = reader.tokenizer.encode_ordinary
    asked = requests("loglikelihood", ("the", words[3:]), ("the whale sea ship", " captain"))
    (long, _), (short, _) = RunLM(reader, 8).loglikelihood(asked)
    assert long == pytest.approx(logprob(reader, ids("the"), ids(words[3:])), rel=1e-6)
    assert short == pytest.approx(logprob(reader, ids("the whale sea ship"), ids(" captain")), rel=1e-6)


def test_where_hflm_gives_up_the_whole_continuation_counts(reader):
    lm = RunLM(reader, 2)
    text = " ".join(WORDS * 12)
    (whole, _), (none, sure), (melted, _), (space, _) = lm.loglikelihood(
        requests("loglikelihood", ("", text), ("the whale", ""), ("the wh", "ale"), (" ", "the whale"))
    )
    assert len(reader.tokenizer.encode_ordinary(text)) > 2 * SEQ_LEN
    assert [whole] == lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert (none, sure) == (0.0, True)
    ids = reader.tokenizer.encode_ordinary
    assert len(ids("the whale")) == len(ids("the")) + 1  # "the wh" is longer than the text it is the start of
    assert melted == pytest.approx(logprob(reader, ids("the wh"), ids("ale")), rel=1e-6)
    assert space == pytest.approx(logprob(reader, [reader.tokenizer.eot], ids(" the whale")), rel=1e-6)


def logprob(reader, context, continuation):
    with torch.no_grad():
        logits = reader.model(torch.tensor([context + continuation]))[0].double().log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


@pytest.mark.parametrize("until", [[" ship", "\n"], " deck", [], None, ["whale sea", "sailor"]])
def test_generated_text_is_hflms(reader, theirs, until):
    settings = {"max_gen_toks": 24, "do_sample": False} | ({} if until is None else {"until": until})
    prompts = ["the whale", "old", "a white ship and", " ".join(WORDS * 6), "\u6f22"]
    asked = [(prompt, dict(settings)) for prompt in prompts]
    wanted = hflm(theirs, 3).generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert RunLM(reader).generate_until(requests("generate_until", *asked)) == wanted
    assert len({*wanted}) > 2


def test_texts_end_where_the_model_ends_them_and_draws_are_asked_for(reader, monkeypatch):
    eot, asked = reader.tokenizer.eot, []
    words = reader.tokenizer.encode_ordinary(" the whale")

    def ends(model, prompts, count, draw, end, walk, at_once, context):
        asked.append((prompts, count, draw, end, walk, at_once, context))
        for place in reversed(range(len(prompts))):
            text = Text(place, 0, [*prompts[place]], len(prompts[place]))
            for word in words:
                text.ids.append(word)
                yield text
                if text.reason:
                    break
            else:
                text.end("eot")
                yield text

    monkeypatch.setattr("cgpt.evaluate.harness.generate_batch", ends)
    settings = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": "7"}
    lm = RunLM(reader, 4)
    assert lm.generate_until(requests("generate_until", ("", settings), ("", settings))) == [" the whale"] * 2
    assert lm.generate_until(requests("generate_until", (" sea" * 99, {"until": "wh"}), ("a", {}))) == [
        " the ",
        " the whale",
    ]
    assert [each[0] for each in asked[:2]] == [[[eot]], [[eot]]]
    assert [each[2] for each in asked[:2]] == [Draw(0.5, top_p=0.9, seed=0), Draw(0.5, top_p=0.9, seed=1)]
    assert asked[0][1] == 7
    (prompts, *numbers) = asked[2]
    assert prompts == [
        reader.tokenizer.encode_ordinary(" sea" * 99)[-SEQ_LEN // 2 :],
        reader.tokenizer.encode_ordinary("a"),
    ]
    assert numbers == [SEQ_LEN // 2, Draw(0.0), eot, None, 4, SEQ_LEN]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"num_beams": 4}, "asked: generation_kwargs: wanted until, do_sample, .* max_gen_toks, got num_beams"),
        ({"max_gen_toks": 64}, "wanted max_gen_toks of 1 to 63, under the run's seq_len, got 64"),
        ({"max_gen_toks": 0}, "wanted max_gen_toks of 1 to 63, under the run's seq_len, got 0"),
    ],
)
def test_settings_of_generation_that_cannot_be_are_named(reader, settings, wanted):
    lm = RunLM(reader)
    with pytest.raises(InputError, match=wanted):
        lm.generate_until(requests("generate_until", ("the", settings)))
    assert lm.failed


def test_weights_that_are_no_numbers_are_named_by_their_run(folder):
    with random_reader(folder) as broken, torch.no_grad():
        broken.model.h[0].ln_1.weight[0] = float("nan")
        with pytest.raises(InputError, match=f"^{broken.run}: wanted a model with finite logits, got NaN or Inf$"):
            RunLM(broken).loglikelihood(requests("loglikelihood", ("the", " sea")))
        with pytest.raises(InputError, match=f"^{broken.run}: generate: .* must be finite, got NaN or Inf$"):
            RunLM(broken).generate_until(requests("generate_until", ("the", {})))


def test_a_bf16_run_is_near_its_fp32_self(folder, reader):
    asked = requests("loglikelihood", *((" ".join(WORDS[:n]), f" {WORDS[n]}") for n in range(1, 15)))
    with random_reader(folder, precision="bf16") as half:
        found = RunLM(half).loglikelihood(asked)
    wanted = RunLM(reader).loglikelihood(asked)
    assert found != wanted
    two_steps = 2 * 2**-4  # of bf16 between 8 and 16, where the logits are
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=two_steps)
