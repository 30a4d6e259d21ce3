"""Every combination of positions, activation and embedding norm: values, counts, training, streaming, generating."""

import itertools
from dataclasses import replace

import pytest
import torch
from definition import error, gpt_logits, lively, loss_and_gradients, tokens

from cgpt import checkpoint
from cgpt.evaluate.generate import generate
from cgpt.model.config import ACTIVATIONS, POSITIONS, GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.init import init_parameter
from cgpt.model.position import alibi_slopes
from cgpt.stream.build import build, layers_of
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.layout import layers_plan
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement

SMALL = GPTConfig(n_layer=2, n_head=3, d_model=48, d_head=16, d_ff=72, vocab_size=101, seq_len=20)
SCALES = {"embedding_scale": 3.0, "softmax_scale": 0.4, "residual_scale": 0.6, "logits_scale": 0.3}
COMBINATIONS = list(itertools.product(POSITIONS, ACTIVATIONS, (False, True)))
every_combination = pytest.mark.parametrize(("positions", "activation", "embedding_norm"), COMBINATIONS)


@every_combination
def test_fp32_values_and_gradients_equal_the_fp64_definition(positions, activation, embedding_norm):
    config = replace(SMALL, positions=positions, activation=activation, embedding_norm=embedding_norm, **SCALES)
    model = lively(config)
    ids, targets = tokens(config, 3, 19)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    want_loss, want = loss_and_gradients(weights, ids, targets, config)

    assert error(model(ids), gpt_logits(weights, ids, config)) < 1e-5
    loss = model(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, want[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("positions", "activation"), [("rotary", "swiglu"), ("alibi", "gelu")])
def test_half_precision_errs_no_more_than_twice_what_torch_does(positions, activation, dtype):
    config = replace(SMALL, positions=positions, activation=activation, embedding_norm=True, **SCALES)
    model = lively(config, dtype)
    ids, targets = tokens(config, 3, 19)
    narrow = model.state_dict()
    want_loss, want = loss_and_gradients({n: v.double() for n, v in narrow.items()}, ids, targets, config)
    wide = {n: v.float() for n, v in narrow.items()}  # torch has no complex numbers of this width
    with torch.autocast("cpu", dtype):
        torch_loss, torch_gradients = loss_and_gradients(wide, ids, targets, config)

    loss = model(ids, targets)
    loss.backward()
    assert abs(loss.item() - want_loss.item()) <= 2 * abs(torch_loss.item() - want_loss.item()) + 1e-3
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, want[name]) <= 2 * error(torch_gradients[name], want[name]) + 1e-3, name


@every_combination
def test_counts_and_plans_are_the_built_models(positions, activation, embedding_norm):
    config = replace(SMALL, positions=positions, activation=activation, embedding_norm=embedding_norm)
    with torch.device("meta"):
        model = GPT(config)
    layers = layers_of(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_params
    assert {name for layer in layers for name in layer.parameters} == set(model.state_dict())
    shapes = [(layer.name, {name: p.shape for name, p in layer.parameters.items()}) for layer in layers]
    assert gpt_plans(config) == layers_plan(shapes)
    parts = config.param_breakdown()
    assert (parts["position_embedding"] == 0) == (positions != "learned")


@pytest.mark.parametrize(
    ("n_head", "slopes"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (8, [2**-i for i in range(1, 9)]),
        (3, [2**-4, 2**-8, 2**-2]),
        (12, [2**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_slopes_are_those_of_the_paper(n_head, slopes):
    assert alibi_slopes(n_head) == slopes


@pytest.mark.parametrize("positions", POSITIONS)
def test_what_a_shuffled_past_changes(positions):
    """Without positions the last token sees a set, one layer deep; with them a sequence."""
    model = lively(replace(SMALL, n_layer=1, positions=positions))
    ids, _ = tokens(SMALL, 1, 12)
    shuffled = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), 1)
    with torch.no_grad():
        moved = (model(shuffled)[0, -1] - model(ids)[0, -1]).norm() / model(ids)[0, -1].norm()
    assert moved < 1e-5 if positions == "none" else moved > 1e-2


def nodes(tensor):
    """Names of all nodes in a tensor's graph."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [source for source, _ in node.next_functions]
    return [type(node).__name__ for node in found]


def test_scales_of_one_are_not_in_the_graph():
    ids, targets = tokens(SMALL, 1, 5)
    plain = nodes(GPT(SMALL)(ids, targets))
    assert not [name for name in plain if "Mul" in name]
    scaled = nodes(GPT(replace(SMALL, **SCALES))(ids, targets))
    assert len([name for name in scaled if "Mul" in name]) == 3  # embedding, ln_f's weight and bias
    assert len(scaled) == len(plain) + 3


def three_steps(config, placement, folder, cut=False):
    """Losses of three steps, a greedy continuation and the masters; cut: the last step in another life."""
    where = {"placement": placement, "disk": str(folder)}
    model, store = build(config, Format("bf16"), "cpu", **where)
    store.initialise(lambda name, tensor: init_parameter(name, tensor, config, 0))
    executor, optimizer = Executor(store), AdamW(store)
    losses = []
    for step in range(3):
        if cut and step == 2:
            checkpoint.save(folder, store, step, {"optimizer": optimizer.state()})
            store.lanes.close()
            model, store = build(config, Format("bf16"), "cpu", **where)
            executor, optimizer = Executor(store), AdamW(store)
            path, manifest, _ = checkpoint.newest(folder)
            checkpoint.load(path, store, manifest)
            optimizer.load_state(manifest["optimizer"])
        found = executor.gradients([[tokens(config, 2, 16, step)]], optimizer.loss_scale)
        assert optimizer.step(found, 1e-2)
        losses.append(found.loss)
    text = list(generate(model, [1, 2, 3], 30, temperature=0, walk=executor))
    store.settle()
    masters = {name: store.read(name) for name in store.names()}
    store.lanes.close()
    return losses, text, masters


@pytest.mark.parametrize(
    ("positions", "activation", "embedding_norm"), [row for row in COMBINATIONS if row[1] != "gelu_tanh"]
)
def test_trains_streams_resumes_and_generates(positions, activation, embedding_norm, tmp_path):
    config = replace(SMALL, positions=positions, activation=activation, embedding_norm=embedding_norm)
    count = config.n_layer + 2
    losses, text, masters = three_steps(config, Placement.resident(count), tmp_path)
    assert len(set(losses)) == 3
    assert len(text) == 30  # past the model's 20 positions
    for home in ("host", "disk"):
        streamed = Placement(*(((value,) * count) for value in (home, home, True)))
        folder = tmp_path / home
        folder.mkdir()
        got = three_steps(config, streamed, folder, cut=True)
        assert got[:2] == (losses, text)
        assert all(torch.equal(got[2][name], value) for name, value in masters.items())


@pytest.mark.parametrize(("positions", "activation"), [("rotary", "swiglu"), ("alibi", "gelu"), ("none", "gelu")])
def test_compiles_whole(positions, activation):
    torch._dynamo.reset()
    config = replace(SMALL, positions=positions, activation=activation, embedding_norm=True, **SCALES)
    model = lively(config)
    ids, targets = tokens(config, 2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaves = list(model.parameters())
    want = torch.autograd.grad(model(ids, targets), leaves)
    for got, gradient in zip(torch.autograd.grad(compiled(ids, targets), leaves), want, strict=True):
        assert error(got, gradient.double()) < 1e-5
