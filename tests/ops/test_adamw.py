import math

import pytest
import torch

from cgpt_ext import _native, adamw_, adamw_ref, dispatch, join_master, split_master
from numerics import DTYPES, assert_as_good_as_torch

SHAPES = [(1,), (7,), (3, 5), (127, 3), (2, 3, 64), (32769,)]  # the last is one past a chunk
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


FLOATS = "float32 or bfloat16 or float16"


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors and the reference's many small torch ops: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class State:
    """Parameters of the given shapes with everything a step needs; `kept` says where the fp32 weights are."""

    def __init__(self, shapes, dtype=torch.float32, kept=None, grad_dtype=None, scale=1.0, state_dtype=torch.float32):
        values = [torch.randn(shape) * scale for shape in shapes]
        self.params = [x.to(dtype) for x in values]
        self.masters = self.lows = None
        if kept == "master":
            self.masters = values
        if kept == "split":
            self.params, self.lows = (list(half) for half in zip(*map(split_master, values), strict=True))
        self.grads = [(torch.randn(shape) * scale).to(grad_dtype or dtype) for shape in shapes]
        self.exp_avgs = [torch.zeros(shape, dtype=state_dtype) for shape in shapes]
        self.exp_avg_sqs = [torch.zeros(shape, dtype=state_dtype) for shape in shapes]

    def step(self, function=adamw_, steps=3, **changes):
        for t in range(1, steps + 1):
            grads = [g * t for g in self.grads]
            lists = (self.params, grads, self.exp_avgs, self.exp_avg_sqs)
            function(*lists, t, **{**HYPER, "masters": self.masters, "lows": self.lows, **changes})
        return self

    def weights(self):
        if self.lows:
            return [join_master(p, low) for p, low in zip(self.params, self.lows, strict=True)]
        return self.masters or self.params

    def tensors(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *(self.masters or []), *(self.lows or [])]


def same_bits(a, b):
    def bits(x):
        return x.view(torch.int16 if x.element_size() == 2 else torch.int32)

    return all(
        x.dtype == y.dtype
        and torch.equal(bits(x)[~x.isnan()], bits(y)[~y.isnan()])
        and torch.equal(x.isnan(), y.isnan())
        for x, y in zip(a, b, strict=True)
    )


def twin(*args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return State(*args, **kwargs)


def torch_fused(params, grads, exp_avgs, exp_avg_sqs, step, *, masters, lows, **hyper):
    steps = [torch.tensor(float(step) - 1) for _ in params]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False, **hyper)


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_error_within_twice_torchs(isa, steps, scale):
    shapes = [(1000,), (37, 11)]
    ours, theirs = twin(shapes, scale=scale).step(steps=steps), twin(shapes, scale=scale).step(torch_fused, steps)
    truth = twin(shapes, scale=scale)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        setattr(truth, name, [x.double() for x in getattr(truth, name)])
    truth.step(adamw_ref, steps)
    for got, want, torchs in zip(ours.tensors(), truth.tensors(), theirs.tensors(), strict=True):
        assert_as_good_as_torch(got, want, torchs)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, "master"),
        (torch.float16, "master"),
        (torch.bfloat16, "split"),
    ],
)
def test_bits_are_the_references(isa, dtype, kept, grad_dtype):
    args = (SHAPES, dtype, kept, grad_dtype)
    options = {"grad_scale": torch.tensor(0.37), "maximize": True}
    assert same_bits(twin(*args).step(**options).tensors(), twin(*args).step(adamw_ref, **options).tensors())


@pytest.mark.parametrize("scale", [1e-22, 1e-12, 1e15, 1e18])
def test_bits_at_the_edges_of_the_range(isa, scale):
    """Squares that are subnormal, or overflow: still the sequence of operations, to the bit."""
    shapes = [(2000,)]
    assert same_bits(twin(shapes, scale=scale).step().tensors(), twin(shapes, scale=scale).step(adamw_ref).tensors())


def test_bits_of_negative_zero(isa):
    """lr 0 makes a coefficient -0, whose sign a weight of -0 shows."""
    ours, reference = twin([(40,)]), twin([(40,)])
    for state, function in ((ours, adamw_), (reference, adamw_ref)):
        state.params[0].copy_(torch.tensor([0.0, -0.0] * 20))
        state.step(function, lr=0.0)
    assert same_bits(ours.tensors(), reference.tensors())


def test_masters_agree_in_every_form(isa):
    """The fp32 weight goes the same way as an fp32 parameter, as a master and as a split master."""
    grads = {"grad_dtype": torch.bfloat16}
    plain = twin(SHAPES, torch.float32, **grads).step()
    master = twin(SHAPES, torch.bfloat16, "master", **grads).step()
    split = twin(SHAPES, torch.bfloat16, "split", **grads).step()
    assert same_bits(plain.weights(), master.weights())
    assert same_bits(plain.weights(), split.weights())
    assert same_bits(master.params, [w.bfloat16() for w in master.weights()])


def test_a_weight_at_one_moves():
    """lr 1e-5 is far below bf16's last bit at 1.0; a master adds the steps up."""
    moved = twin([(64,)], torch.bfloat16, "split")
    moved.params, moved.lows = [torch.ones(64, dtype=torch.bfloat16)], [torch.zeros(64, dtype=torch.int16)]
    moved.step(steps=100, lr=1e-5, weight_decay=0.0)
    assert (moved.weights()[0] - 1).abs().min() > 5e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_come_out(isa, bad):
    for kept, dtype in ((None, torch.float32), ("split", torch.bfloat16), ("master", torch.bfloat16)):
        state = twin([(50,)], dtype, kept)
        state.grads[0][7] = bad
        state.step()
        others = [i for i in range(50) if i != 7]
        assert state.params[0][7].isnan()
        assert state.weights()[0][7].isnan()
        assert state.params[0][others].isfinite().all()


def test_bits_do_not_depend_on_threads_or_repeats(isa):
    shapes = [(70001,), (5,), (33, 1025)]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(twin(shapes).step().tensors())
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    first = twin([(129,)]).step().tensors()
    assert all(same_bits(first, twin([(129,)]).step().tensors()) for _ in range(100))


def test_bits_do_not_depend_on_chunking(isa):
    """A tensor gives the bits of its pieces, cut anywhere."""
    whole = twin([(70001,)])
    parts = twin([(70001,)])
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        setattr(parts, name, list(getattr(parts, name)[0].split([1, 15, 33, 40000, 29952])))
    whole.step()
    parts.step()
    for a, b in zip(whole.tensors(), (parts.params, parts.exp_avgs, parts.exp_avg_sqs), strict=True):
        assert same_bits([a], [torch.cat(b)])


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_scalars_from_tensors(kind):
    shapes = [(9,), (300,)]
    want = twin(shapes).step(steps=1, lr=0.25, grad_scale=torch.tensor(0.5)).tensors()
    one = torch.ones((), dtype=kind)
    for step, lr in ((one, torch.tensor(0.25)), ([one, one.clone()], torch.tensor(0.25, dtype=torch.float64))):
        got = twin(shapes)
        lists = (got.params, got.grads, got.exp_avgs, got.exp_avg_sqs)
        adamw_(*lists, step, **{**HYPER, "lr": lr}, grad_scale=torch.tensor(0.5))
        assert same_bits(want, got.tensors())


def test_every_tensor_has_its_own_step():
    separate, together = twin([(9,), (300,)]), twin([(9,), (300,)])
    for i, t in enumerate((2, 500)):
        adamw_(*([getattr(separate, name)[i]] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")), t, **HYPER)
    lists = (together.params, together.grads, together.exp_avgs, together.exp_avg_sqs)
    adamw_(*lists, [torch.tensor(2.0), torch.tensor(500.0)], **HYPER)
    assert same_bits(separate.tensors(), together.tensors())


def test_a_step_tensor_below_one_skips():
    for function in (adamw_, adamw_ref):
        state = twin([(9,)])
        before = [x.clone() for x in state.tensors()]
        function(state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, torch.tensor(0.0), **HYPER)
        assert same_bits(before, state.tensors())


def test_late_steps_are_exact():
    """beta^t by repeated squaring, against exact rational powers."""
    from fractions import Fraction

    for t in (1, 2, 1000, 123457):
        state = twin([(1,)])
        state.exp_avgs[0].fill_(1.0)
        state.exp_avg_sqs[0].fill_(1.0)
        state.grads[0].fill_(1.0)
        state.params[0].fill_(0.0)
        adamw_(state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, t, **{**HYPER, "lr": 1.0, "eps": 0.0})
        powers = [float(Fraction(b) ** t) if t < 10**4 else math.exp(t * math.log(b)) for b in (0.9, 0.95)]
        want = -math.sqrt(1 - powers[1]) / (1 - powers[0])
        assert state.params[0].item() == pytest.approx(want, rel=3e-7)


def test_dense_layouts_of_any_order(isa):
    plain, turned = twin([(6, 35)]), twin([(6, 35)])
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        setattr(turned, name, [x.t().contiguous().t() for x in getattr(turned, name)])
    assert turned.params[0].stride() == (1, 6)
    assert same_bits(plain.step().tensors(), [x.contiguous() for x in turned.step().tensors()])


def test_unaligned_and_empty_tensors(isa):
    plain, odd = twin([(33,)]), twin([(33,)])
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        x = getattr(odd, name)[0]
        setattr(odd, name, [torch.empty(0), torch.cat([x[:1], x])[1:]])
    odd.step()
    assert same_bits(plain.step().tensors(), odd.tensors()[1::2])
    adamw_([], [], [], [], 1, **HYPER)


EDGES = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000,
    0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0xBF808000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF,
    0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7F808000, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF,
    0xFF800001, 0xFFC00000, 0xFFFF7FFF, 0xFFFF8000, 0xFFFFFFFF,
]  # fmt: skip


def plain_torch_split(x):
    """The branch that serves other devices, reached here through a tensor that is not contiguous."""
    wide = torch.stack([x, x], 1)[:, 0]
    return split_master(wide)


@pytest.mark.parametrize("split", [split_master, plain_torch_split])
def test_split_master(isa, split):
    every_half = torch.arange(0, 2**32, 1021, dtype=torch.int64)
    bits = torch.cat([torch.tensor(EDGES), every_half])
    x = (((bits & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).int().view(torch.float32)
    high, low = split(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    joined = join_master(high, low)
    nan = x.isnan()
    assert torch.equal(joined.view(torch.int32)[~nan], x.view(torch.int32)[~nan])
    assert torch.equal(high.isnan(), nan)
    assert torch.equal(joined.isnan(), nan)
    tie = bits & 0xFFFF == 0x8000
    assert torch.equal(high[~tie & ~nan], x.bfloat16()[~tie & ~nan])
    away = (bits >> 16) + 1
    got = high.view(torch.int16).long() & 0xFFFF
    assert torch.equal(got[tie & ~nan], away[tie & ~nan])


def test_join_master_off_the_native_path():
    high, low = split_master(torch.randn(40, 2))
    assert torch.equal(join_master(high.t(), low.t()), join_master(high, low).t())


@pytest.mark.parametrize("kept", [None, "master", "split"])
def test_opcheck(kept):
    state = State([(4, 6), (3,)], torch.bfloat16 if kept else torch.float32, kept)
    steps = [torch.tensor(2.0), torch.tensor(3.0)]
    lists = (state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, steps)
    scalars = (1, 1e-3, None, 0.9, 0.95, 1e-8, 0.1)
    rest = (state.masters or [], state.lows or [], torch.tensor(0.5), False, None, None, [0, 0, 5, 1024])
    torch.library.opcheck(torch.ops.cgpt_ext.adamw_.default, (*lists, *scalars, *rest))


def test_compiled_equals_eager():
    eager, compiled = twin([(4, 6), (3,)]), twin([(4, 6), (3,)])
    eager.step()
    compiled.step(torch.compile(adamw_, fullgraph=True, backend="aot_eager"))
    assert same_bits(eager.tensors(), compiled.tensors())


def test_autograd_sees_the_change():
    weight = torch.randn(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        adamw_([weight], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], 1, **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dispatch_by_name():
    with dispatch.use(adamw="reference"):
        reference = twin([(40,)]).step().tensors()
    assert same_bits(reference, twin([(40,)]).step().tensors())


def call(**changes):
    x = [torch.randn(2, 8) for _ in range(4)]
    arguments = {"params": [x[0]], "grads": [x[1]], "exp_avgs": [x[2]], "exp_avg_sqs": [x[3].abs()], "step": 1, **HYPER}
    arguments.update({name: value(*x) if callable(value) else value for name, value in changes.items()})
    adamw_(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": []}, ValueError, "grads must be 1 tensors, as many as params, got 0"),
        ({"grads": lambda p, *_: [p[:1]]}, ValueError, "grads[0] must be (2, 8), got (1, 8)"),
        (
            {"grads": lambda p, *_: [p.clone().int()]},
            TypeError,
            "grads[0] must be float32 or bfloat16 or float16, got int32",
        ),
        (
            {"grads": lambda p, *_: [p.t().contiguous().t()]},
            ValueError,
            "grads[0] must be laid out like params[0] with strides (8, 1), got (1, 2)",
        ),
        (
            {"params": lambda p, *_: [p[:, :4]]},
            ValueError,
            "params[0] must be dense, got shape (2, 4) with strides (8, 1)",
        ),
        (
            {"params": lambda p, *_: [p[0, :1].expand(2, 8)]},
            ValueError,
            "params[0] must be dense, got shape (2, 8) with strides (0, 0)",
        ),
        (
            {"params": lambda p, *_: [p.double()]},
            TypeError,
            "params[0] must be float32 or bfloat16 or float16, got float64",
        ),
        ({"exp_avgs": lambda p, *_: [p.bfloat16()]}, TypeError, "exp_avgs[0] must be float32, got bfloat16"),
        ({"exp_avgs": lambda p, *_: [p]}, ValueError, "must be apart in memory, got one shared with"),
        ({"grads": lambda p, *_: [p]}, ValueError, "must be apart in memory, got one shared with"),
        ({"masters": lambda p, *_: [p.clone()]}, TypeError, "params[0] must be bfloat16 or float16, got float32"),
        (
            {"params": lambda p, *_: [p.half()], "lows": lambda p, *_: [p.to(torch.int16)]},
            TypeError,
            "params[0] must be bfloat16, got float16",
        ),
        (
            {"params": lambda p, *_: [p.bfloat16()], "masters": lambda p, *_: [p[:1]]},
            ValueError,
            "masters[0] must be (2, 8), got (1, 8)",
        ),
        (
            {"params": lambda p, *_: [p.bfloat16()], "lows": lambda p, *_: [p.clone()]},
            TypeError,
            "lows[0] must be int16, got float32",
        ),
        ({"step": 0}, ValueError, "step must be at least 1, got 0"),
        ({"step": 1.0}, TypeError, "step must be a list of tensors, got float"),
        ({"step": torch.ones(1)}, ValueError, "step must be (), got (1,)"),
        ({"step": torch.ones((), dtype=torch.int32)}, TypeError, "step must be float32 or int64, got int32"),
        ({"step": [torch.ones(()), torch.ones(())]}, ValueError, "step must be 1 tensors, as many as params, got 2"),
        ({"beta1": 1.0}, ValueError, "beta1 must be in [0, 1), got 1.000000"),
        ({"beta2": math.nan}, ValueError, "beta2 must be in [0, 1), got nan"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.000000"),
        ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must be (), got (2,)"),
        ({"grad_scale": 2.0}, TypeError, "grad_scale must be a torch.Tensor, got float"),
        ({"lr": torch.ones((), dtype=torch.int64)}, TypeError, "lr must be float32 or float64, got int64"),
        (
            {"stochastic_rounding_seed": 1},
            TypeError,
            "params[0] must be bfloat16, got float32",
        ),
        (
            {"stochastic_rounding_seed": 1, "lows": lambda p, *_: [p.to(torch.int16)]},
            ValueError,
            "stochastic_rounding_seed must be None where masters or lows are given, got a seed",
        ),
        (
            {"stochastic_rounding_seed": torch.ones((), dtype=torch.int32), "params": lambda p, *_: [p.bfloat16()]},
            TypeError,
            "stochastic_rounding_seed must be int64, got int32",
        ),
        (
            {"stochastic_rounding_seed": 1.0},
            TypeError,
            "stochastic_rounding_seed must be an int or a tensor, got float",
        ),
        ({"stochastic_rounding_seed": 2**63}, ValueError, f"stochastic_rounding_seed must fit 64 bits, got {2**63}"),
        ({"params": [3]}, TypeError, "params[0] must be a torch.Tensor, got int"),
        ({"params": torch.ones(2, 8)}, TypeError, "params must be a list of tensors, got Tensor"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    assert str(caught.value).startswith("adamw: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_input_leaves_everything_untouched():
    state = twin([(5,), (6,)])
    before = [x.clone() for x in state.tensors()]
    state.grads[1] = state.grads[1][:5]
    with pytest.raises(ValueError, match=r"grads\[1\] must be \(6,\)"):
        state.step()
    assert same_bits(before, state.tensors())


def test_split_of_another_dtype():
    with pytest.raises(TypeError, match="split_master: master must be float32, got bfloat16"):
        split_master(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="join_master: low must be int16, got float32"):
        join_master(torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
    with pytest.raises(ValueError, match=r"join_master: low must be \(2,\), got \(3,\)"):
        join_master(torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.int16))


def test_views_by_python_attributes():
    want = twin([(40,)]).step().tensors()
    _native.use_python_attributes(True)
    try:
        got = twin([(40,)]).step().tensors()
    finally:
        _native.use_python_attributes(False)
    assert same_bits(want, got)
