"""The attention named "cgpt" in transformers' models: padded, packed, cached and windowed, it is SDPA's to rounding."""

import copy
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from transformers import BertConfig, BertModel
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from cgpt_ext.integrations import transformers as interface
from hf_models import MODELS, VOCAB, assert_models_agree, batch, count_attention, gpt2, llama, mistral, positions

interface.register()
interface.register()  # twice is once
OURS = {"attention", "attention_varlen"}


@pytest.fixture
def calls(monkeypatch):
    return count_attention(monkeypatch)


def named(model, attention):
    model.set_attn_implementation(attention)
    return model


def results(model, attention, ids, mask):
    """Logits, padding's too, and all gradients of their loss."""
    named(model, attention).zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1).double(), ids.flatten()).backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def hold(model, ids, mask, dtype=torch.float32):
    """Logits and gradients at the bar that SDPA sets in that dtype; in fp64 it is the truth."""
    wide = copy.deepcopy(model).double()
    model = model.to(dtype)
    got = results(model, "cgpt", ids, mask)
    want = results(wide, "sdpa", ids, mask)
    theirs = results(model, "sdpa", ids, mask)
    assert_models_agree(got, want, theirs, dtype)


@pytest.mark.parametrize("side", ["none", "left", "right", "both", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_is_exact(name, side, calls):
    ids, mask = batch(side)
    hold(MODELS[name]().train(), ids, mask)
    windowed_behind = name == "mistral" and side in ("right", "both")
    assert set(calls) <= ({"sdpa"} if side == "holes" or windowed_behind else OURS)
    assert calls


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_padding_in_bf16(make, side):
    ids, mask = batch(side)
    model = make().to(torch.bfloat16)  # the reference's weights are the rounded ones
    hold(model, ids, mask, torch.bfloat16)


@pytest.mark.parametrize("side", ["none", "left", "both"])
def test_a_sequence_of_padding_alone(side):
    ids, mask = batch(side)
    mask[2] = 0
    model = named(llama().train(), "cgpt")
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (logits - named(model, "sdpa")(ids, attention_mask=mask).logits).abs().max() < 1e-5

    def last(attention):
        """From a cache: the sequence of padding has no key at all."""
        cache = named(model, attention)(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        return model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits

    assert (last("cgpt") - last("sdpa")).abs().max() < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("make", [gpt2, llama, mistral])
def test_generate_token_for_token(make, side, cache, calls):
    ids, mask = batch(side)
    model = make().eval()

    def tokens(attention):
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        return named(model, attention).generate(ids, attention_mask=mask, **options)

    got = tokens("cgpt")
    if side in ("none", "left"):
        assert calls["sdpa"] <= 2  # mistral's static cache, unpadded: its ring of keys is a mask of its own at first
    assert torch.equal(got, tokens("sdpa"))
    assert torch.equal(got[0], tokens("eager")[0])


def test_a_cache_continued_by_several_tokens(calls):
    """As in chunked prefill: queries fewer than keys, more than one, with padding in front."""
    ids, mask = batch("left")
    model = named(llama().eval(), "cgpt")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        first = model(ids[:, :9], attention_mask=mask[:, :9], position_ids=positions(mask)[:, :9], use_cache=True)
        rest = model(
            ids[:, 9:], attention_mask=mask, position_ids=positions(mask)[:, 9:], past_key_values=first.past_key_values
        ).logits
    assert not calls["sdpa"]
    assert (rest - whole[:, 9:]).abs().max() < 1e-5


def test_packed_sequences(calls):
    """position_ids that start again: each sequence by itself, in one call of the kernel."""
    ids, _ = batch("none", sequences=2)
    places = torch.cat([torch.arange(n) for n in (4, 1, 16)]).expand(2, -1)
    model = llama().eval()

    def logits(attention, ids, places):
        return named(model, attention)(ids, position_ids=places, use_cache=False).logits.detach()

    got = logits("cgpt", ids, places)
    assert calls == {"attention_varlen": 2}
    assert (got - logits("sdpa", ids, places)).abs().max() < 1e-5
    assert (got[:, 5:] - logits("cgpt", ids[:, 5:], places[:, 5:])).abs().max() < 1e-5


def test_a_mask_of_the_callers(calls):
    """A prefix seen in both directions, which no span is."""
    ids, _ = batch("none")
    mask = torch.ones(4, 1, 21, 21, dtype=torch.bool).tril()
    mask[..., :6] = True
    model = gpt2().eval()
    got = named(model, "cgpt")(ids, attention_mask=mask).logits
    assert calls == {"sdpa": 2}
    assert torch.equal(got, named(model, "sdpa")(ids, attention_mask=mask).logits)


def test_attention_in_both_directions(calls):
    """An encoder without padding runs on the kernel, uncausal; with padding on SDPA."""
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config).eval()
    for side, server in (("none", "attention"), ("right", "sdpa")):
        ids, mask = batch(side)
        calls.clear()
        got = named(model, "cgpt")(ids, attention_mask=mask).last_hidden_state
        assert calls == {server: 1}
        want = named(model, "sdpa")(ids, attention_mask=mask).last_hidden_state
        assert (got - want).abs().max() < 1e-5


def test_cross_attention(calls):
    model = gpt2(add_cross_attention=True).eval()
    ids, mask = batch("left")
    encoded = torch.randn(4, 5, 64)
    got = named(model, "cgpt")(ids, attention_mask=mask, encoder_hidden_states=encoded).logits
    assert calls == {"attention_varlen": 2, "attention": 2}
    want = named(model, "sdpa")(ids, attention_mask=mask, encoder_hidden_states=encoded).logits
    assert (got - want).abs().max() < 1e-5


def test_dropout_is_sdpas(calls):
    ids, mask = batch("left")
    model = gpt2(dropout=0.5)
    model.transformer.drop.p = 0.0  # alone in drawing random numbers is what attention drops
    for block in model.transformer.h:
        block.attn.resid_dropout.p = block.mlp.dropout.p = 0.0

    def logits(attention):
        torch.manual_seed(1)
        return named(model, attention)(ids, attention_mask=mask).logits

    model.train()
    assert torch.equal(logits("cgpt"), logits("sdpa"))
    assert calls == {"sdpa": 2}
    model.eval()
    logits("cgpt")
    assert calls == {"sdpa": 2, "attention_varlen": 2}


@pytest.mark.parametrize(("make", "reentrant"), [(gpt2, False), (llama, False), (llama, True)])
def test_gradient_checkpointing(make, reentrant, calls):
    ids, mask = batch("left")
    model = make().train()
    want = results(model, "cgpt", ids, mask)
    once = calls.total()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = results(model, "cgpt", ids, mask)
    assert calls == {"attention_varlen": 3 * once}  # forward, and again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast():
    ids, mask = batch("left")
    model = llama().train()
    with torch.autocast("cpu", torch.bfloat16):
        got = results(model, "cgpt", ids, mask)
        theirs = results(model, "sdpa", ids, mask)
    want = results(model.double(), "sdpa", ids, mask)
    assert_models_agree(got, want, theirs, torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "attention", "server", "backend"),
    [  # the first is SDPA's own business past dynamo
        (gpt2, "cgpt", "sdpa", "eager"),
        (gpt2, "cgpt_causal", "attention", "aot_eager"),
        (llama, "cgpt_causal", "attention", "aot_eager"),
    ],
)
def test_compiles_whole(make, attention, server, backend, calls):
    """Without a graph break, forward and backward; what serves it there is what the file's head says."""
    torch._dynamo.reset()
    ids, _ = batch("none")
    model = named(make(num_hidden_layers=1).train(), attention)
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step(function):
        model.zero_grad()
        logits = function(ids, use_cache=False).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    got = step(compiled)
    assert set(calls) == {server}
    want = step(model)
    assert calls["attention"] > 0  # of eager mode both
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_causal_by_name(calls):
    ids, _ = batch("none")
    model = llama().eval()
    want = named(model, "sdpa")(ids).logits
    assert (named(model, "cgpt_causal")(ids).logits - want).abs().max() < 1e-5
    got = model.generate(ids[:, :5], max_new_tokens=5, do_sample=False, attention_mask=None)
    assert torch.equal(got, named(model, "sdpa").generate(ids[:, :5], max_new_tokens=5, do_sample=False))
    assert not calls["sdpa"]
    named(model, "cgpt_causal")
    for options, message in (
        ({"attention_mask": batch("left")[1]}, r"attention_mask must be None, got shape \(4, 21\)"),
        ({"position_ids": torch.arange(21).remainder(9)[None]}, "the mask must be plain causal"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, use_cache=False, **options)
    with pytest.raises(ValueError, match="the sequence must be shorter than 7, got 21"):
        named(mistral(), "cgpt_causal")(ids)
    with pytest.raises(ValueError, match="queries must be as many as keys, or one, got 1 for 64"):
        interface.no_mask(2, 1, 64, torch.tensor(5))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "cache"])
def test_what_is_refused(option):
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"^attention_forward: {option} must be None, got float$"):
        interface.attention_forward(torch.nn.Identity(), q, q, q, None, **{option: 30.0})


def seen(spans):
    """The mask that spans stand for."""
    B, Tq, Tk = spans.shape
    mask = torch.zeros(B, Tq, Tk, dtype=torch.bool)
    window = spans.window or Tk
    if spans.cu_seqlens is None:
        for b0, b1, k0, k1 in spans.runs:
            for i in range(Tq):
                own = k1 - Tq + i
                mask[b0:b1, i, max(k0, own - window + 1) : own + 1] = True
        return mask
    flat = torch.zeros(B * Tq, B * Tk, dtype=torch.bool)
    for a, b in zip(spans.cu_seqlens[:-1].tolist(), spans.cu_seqlens[1:].tolist(), strict=True):
        for i in range(a, b):
            flat[i, max(a, i - window + 1) : i + 1] = True
    if spans.late is not None:
        queries, keys, cu_q, cu_k, *_ = spans.late
        for n in range(len(cu_q) - 1):
            rows = queries[cu_q[n] : cu_q[n + 1]]
            flat[rows] = False
            flat[rows[:, None], keys[cu_k[n] : cu_k[n + 1]]] = True
    flat = flat.view(B, Tq, B, Tk)
    mask = torch.stack([flat[b, :, b] for b in range(B)])
    assert int(mask.sum()) == int(flat.sum())  # nothing is seen across sequences
    if spans.early is not None:
        mask[spans.early.view(B, Tq)] = False
    return mask


FUNCTIONS = {
    "causal": (causal_mask_function, None),
    "sliding": (sliding_window_causal_mask_function(5), 5),
    "one": (sliding_window_causal_mask_function(1), 1),
    "chunked": (chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int64)), 4),
    "packed": (
        and_masks(causal_mask_function, packed_sequence_mask_function((torch.arange(12) // 5).expand(3, -1))),
        None,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("queries", [12, 4, 1])
def test_spans_are_the_mask(name, queries):
    """Where spans are found they say what the mask says; where a bit is changed, so do they, or there are none."""
    function, size = FUNCTIONS[name]
    draw = torch.Generator().manual_seed(5)
    found = Counter()
    for trial in range(40):
        side = ("none", "left", "right", "both")[trial % 4]
        real = torch.ones(3, 12, dtype=torch.bool)
        for b in range(3):
            front, back = torch.randint(1, 5, (2,), generator=draw).tolist()
            real[b, : front if side in ("left", "both") else 0] = False
            real[b, 12 - (back if side in ("right", "both") else 0) :] = False
        at = (trial % 3, 11, int(torch.randint(12, (), generator=draw)))

        def altered(b, h, q, k, at=at):
            return function(b, h, q, k) ^ ((b == at[0]) & (q == at[1]) & (k == at[2]))

        for mask_function in (function, altered):
            mask = interface.attention_mask(
                3, queries, 12, 12 - queries, 0, mask_function=mask_function, local_size=size,
                attention_mask=None if side == "none" else real, allow_is_causal_skip=False,
            )  # fmt: skip
            spans = getattr(mask, "cgpt_spans", None)
            assert spans is None or torch.equal(seen(spans), mask[:, 0])
            found[side] += spans is not None and mask_function is function
    if queries == 12:
        assert found["none"] == 10  # of ten
    if name in ("causal", "sliding"):
        assert found["none"] == found["left"] == 10
    if name == "causal" and queries == 12:
        assert found["right"] == found["both"] == 10


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_hardly_any_tokens(shape, calls):
    model = named(llama().eval(), "cgpt")
    ids = torch.ones(shape, dtype=torch.int64)
    for mask in (torch.ones_like(ids), torch.zeros_like(ids)):
        got = model(ids, attention_mask=mask).logits
        assert not calls["sdpa"]
        want = named(model, "sdpa")(ids, attention_mask=mask).logits
        named(model, "cgpt")
        assert got.shape == want.shape
        assert ((got - want).abs() < 1e-5).all()


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(interface, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match=r"^register: transformers must be 5\.4 or newer, got 5"):
        interface.register()
