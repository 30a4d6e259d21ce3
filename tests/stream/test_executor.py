import copy

import pytest
import torch
from toy import DEPTH, Plain, batches, layers

from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.init import init_parameter
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.store import Layer, Store


def toy(precision="fp32", kind=Store):
    """(executor over the toy's layers, the same network whole in fp64)."""
    model = Plain()
    whole = copy.deepcopy(model).double()
    store = kind(layers(model), Format(precision))
    for name, parameter in whole.named_parameters():
        store.write(name, parameter.detach().float())
    return Executor(store), whole


def whole_gradients(whole, step):
    """Loss and gradients of the mean over all samples, in one batch, by torch alone."""
    ids, targets = (torch.cat(parts) for parts in zip(*step, strict=True))
    whole.zero_grad()
    loss = whole(ids, targets)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in whole.named_parameters()}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error <= 1e-5, name


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (3, 3, 3), (1,) * 5, (4, 3, 1)])
def test_gradients_equal_those_of_one_batch_in_plain_torch(sizes):
    executor, whole = toy()
    step = batches(sizes)
    found = executor.gradients([step])
    loss, want = whole_gradients(whole, step)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert_close(found.by_name, want)
    norm = torch.stack([gradient.norm() for gradient in want.values()]).norm().item()
    assert found.norm == pytest.approx(norm, rel=1e-6)


def test_grouping_micro_batches_into_visits_changes_no_bit():
    executor, _ = toy("bf16")
    step = batches((2,) * 6)
    want = executor.gradients([step])
    for visits in ([[batch] for batch in step], [step[:2], step[2:3], step[3:]]):
        found = executor.gradients(visits)
        assert (found.loss, found.norm) == (want.loss, want.norm)
        assert all(torch.equal(found.by_name[name], want.by_name[name]) for name in want.by_name)


def test_the_loss_scale_multiplies_gradients_and_not_the_loss():
    executor, _ = toy()
    step = batches((2, 2))
    plain, scaled = executor.gradients([step]), executor.gradients([step], loss_scale=1024.0)
    assert scaled.loss == plain.loss
    assert scaled.norm == plain.norm * 1024
    assert all(torch.equal(scaled.by_name[name], plain.by_name[name] * 1024) for name in plain.by_name)


def test_contributions_are_summed_in_fp32_in_their_order_and_rounded_once():
    executor, _ = toy("bf16")
    step = batches((2,) * 7)
    got = executor.gradients([step]).by_name
    alone = [executor.gradients([[batch]], 2**10 / 7).by_name for batch in step]
    for name, gradient in got.items():
        assert gradient.dtype == executor.store.dtype
        if name == "wte.weight":  # the embedding's and the head's parts are summed apart
            continue
        total = torch.zeros_like(gradient, dtype=torch.float32)
        for part in alone:
            total += part[name]
        want = total.to(gradient.dtype)
        # a contribution is scaled by its share before it is rounded; a power of two more is the same but for the scale
        assert torch.equal(gradient, want / 2**10), name


def test_sums_of_many_small_contributions_do_not_stand_still():
    """In bf16 256 + 1 is 256."""
    model = Plain()
    stops = layers(model)
    stops[1] = Layer("h.0", lambda x: x + 0 * model.h[0](x) + 1e-3 * model.h[0][1].bias, stops[1].parameters)
    executor = Executor(Store(stops, Format()))
    step = batches((1,) * 600)
    gradient = executor.gradients([[batch] for batch in step]).by_name["h.0.1.bias"]
    whole = executor.gradients([[tuple(torch.cat(part) for part in zip(*step, strict=True))]]).by_name["h.0.1.bias"]
    assert (gradient.float() - whole.float()).norm() <= 0.02 * whole.float().norm()


def test_evaluation_gives_the_training_loss_and_no_graph():
    executor, _ = toy()
    step = batches((3, 2))
    assert executor.loss(step) == executor.gradients([step]).loss
    assert all(parameter.grad is None for layer in executor.store.layers for parameter in layer.parameters.values())


class Recording(Store):
    """Notes every verb; `get` insists that the layer was gathered and not yet released."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.log, self.here, self.most = [], [], 0

    def gather(self, index):
        self.log.append(("gather", index))
        self.here.append(index)
        self.most = max(self.most, len(self.here))
        super().gather(index)

    def get(self, index):
        assert index in self.here
        self.log.append(("get", index))
        return super().get(index)

    def release(self, index, event):
        self.log.append(("release", index))
        self.here.remove(index)
        super().release(index, event)


@pytest.mark.parametrize("training", [True, False])
def test_each_visit_takes_every_layer_up_and_down_once_and_at_most_two_at_a_time(training):
    executor, _ = toy(kind=Recording)
    step = batches((2, 2, 2))
    executor.gradients([step]) if training else executor.loss(step)
    store, head = executor.store, DEPTH + 1
    order = [*range(head + 1), *(reversed(range(head)) if training else ())]
    for verb in ("gather", "get", "release"):
        assert [index for name, index in store.log if name == verb] == order
    assert store.here == []
    assert store.most == 2


def test_a_parameter_without_a_gradient_is_left_out():
    model = Plain()
    stops = layers(model)
    unused = torch.nn.Parameter(torch.ones(3))
    stops[1] = Layer("h.0", stops[1].module, {**stops[1].parameters, "h.0.unused": unused})
    found = Executor(Store(stops, Format("fp32"))).gradients([batches((2,))])
    assert "h.0.unused" not in found.by_name
    assert torch.isfinite(torch.tensor(found.norm))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpt_walked_equals_the_gpt_called_whole(precision):
    shape = GPTConfig(n_layer=2, n_head=2, d_model=16, d_head=8, d_ff=64, vocab_size=61, seq_len=8)
    model, store = build(shape, Format(precision), "cpu")
    store.initialise(lambda name, tensor: init_parameter(name, tensor, shape, 0))
    ids, targets = torch.randint(61, (2, 3, 8))
    found = Executor(store).gradients([[(ids, targets)]])

    whole = GPT(shape, seed=0).to(next(model.parameters()).dtype)
    whole.load_state_dict(model.state_dict())
    loss = whole(ids, targets)
    loss.backward()
    assert found.loss == loss.item()
    for name, parameter in whole.named_parameters():
        if name != "wte.weight":  # torch sums the tied gradient in the working dtype, we in fp32
            assert torch.equal(found.by_name[name], parameter.grad), name
    tied, sum_rounding = parameter_of(whole, "wte.weight").grad, 2**-8 if precision == "bf16" else 2**-22
    assert (found.by_name["wte.weight"] - tied).norm() <= sum_rounding * tied.float().norm()


def parameter_of(model, name):
    return dict(model.named_parameters())[name]
