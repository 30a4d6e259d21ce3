"""A hundred runs give the same bits, a CUDA graph gives them on new data, and so does a compiled call."""

import pytest
import torch

import cgpt_ext
from problems import GPU, ONE_EACH, attempt, everywhere

BF16 = [torch.bfloat16]
CASES = pytest.mark.parametrize(("device", "name", "build", "size", "dtype"), everywhere(ONE_EACH, BF16))
REPEATS = {"cuda": 100, "cpu": 5}


def assert_same_bits(found, wanted):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"output or gradient {i} differs in {int((a != b).sum())} of {a.numel()} places"


@CASES
def test_every_run_gives_the_same_bits(device, name, build, size, dtype):
    problem = build(device, dtype, *size)
    first = attempt(problem.op, device, name, problem.run)
    for _ in range(REPEATS[device] - 1):
        assert_same_bits(attempt(problem.op, device, name, problem.run), first)


@CASES
def test_compiled_equals_eager(device, name, build, size, dtype):
    problem = build(device, dtype, *size)
    torch._dynamo.reset()
    compiled = torch.compile(problem.ours, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    eager = attempt(problem.op, device, name, problem.run)
    assert_same_bits(attempt(problem.op, device, name, lambda: problem.run(compiled)), eager)


@CASES
def test_a_captured_graph_replays_on_new_data(device, name, build, size, dtype):
    problem = build(device, dtype, *size)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in problem.inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def call():
        out = problem.ours(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        grads = problem.dout if isinstance(problem.dout, tuple) else (problem.dout,)
        found = torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
        return [*(o.detach() for o in outs), *found]

    replay = attempt(problem.op, device, name, lambda: captured(call, device))
    for _ in range(2):
        with torch.no_grad():
            for x in wanted:
                x.copy_(torch.randn_like(x))
        assert_same_bits(replay(), attempt(problem.op, device, name, call))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_captured_optimizer_step_reads_its_numbers_from_the_device(device):
    """Step count and gradient scale change between replays of one graph, the clip coefficient's norm with them."""

    def state():
        torch.manual_seed(2)
        masters = [torch.randn(n, device=device) for n in (5, 20_000)]
        return masters, [torch.randn_like(p) for p in masters], *([torch.zeros_like(p) for p in masters] for _ in "mv")

    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    def stepper(params, grads, m, v, step, scale):
        def call():
            norm = cgpt_ext.grad_norm(grads)
            cgpt_ext.adamw_(params, grads, m, v, step, grad_scale=scale / norm, **hyper)
            return []

        return call

    step, scale = torch.zeros((), device=device), torch.ones((), device=device)  # step 0 leaves everything alone
    graphed, eager = state(), state()
    replay, call = captured(stepper(*graphed, step, scale), device), stepper(*eager, step, scale)
    for t in (1, 2, 3):
        step.fill_(t)
        scale.fill_(1 / t)
        replay()
        call()
    for mine, theirs in zip(graphed, eager, strict=True):
        assert_same_bits(mine, theirs)


def captured(call, device):
    """`call` as one CUDA graph; the result replays it and gives its outputs. On a CPU a replay is a call."""
    if device == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay():
        graph.replay()
        return outputs

    return replay
