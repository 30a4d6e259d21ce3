"""torch.compile over the model: no graph break, forward and backward, the values of eager.

The ops are opaque to the compiler, so their bits are eager's; what the compiler fuses around them (residual adds, the
sums of gradients) rounds elsewhere, which the tolerances of fp32 bound.
"""

from pathlib import Path

import pytest
import torch

from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT, Block
from cgpt_ext import nn
from problems import GPU

CONFIG = GPTConfig(n_layer=2, n_head=2, d_model=32, d_head=16, d_ff=64, vocab_size=101, seq_len=16)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def block():
    made = Block(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def step(function, inputs, parameters):
    """The outputs' sum of squares, and its gradients."""
    loss = function(*inputs)
    loss = loss if loss.dim() == 0 else loss.float().square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def assert_close(found, wanted, dtype=torch.float32):
    relative = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= relative * b.norm()


# aot_eager traces forward and backward and runs them op by op; inductor's own code generation takes a minute on a CPU.
DEVICES = pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=GPU)]
)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_compiles_whole(device, backend, dtype):
    model = block().to(device, dtype)
    x = torch.randn(2, 16, 32, device=device, dtype=dtype, requires_grad=True)
    leaves = [x, *model.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_close(step(compiled, [x], leaves), step(model, [x], leaves), dtype)


@DEVICES
def test_the_model_and_its_loss_compile_whole(device, backend):
    model = GPT(CONFIG).to(device)
    ids = torch.randint(101, (3, 16), device=device)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    leaves = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_close(step(compiled, [ids, targets], leaves), step(model, [ids, targets], leaves))
    assert_close([compiled(ids)], [model(ids)])


def test_lengths_may_vary():
    model = block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (16, 7, 11):
        x = torch.randn(2, length, 32, requires_grad=True)
        leaves = [x, *model.parameters()]
        assert_close(step(compiled, [x], leaves), step(model, [x], leaves))


def test_the_drop_in_modules_compile_whole():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.attn, self.mlp = nn.CausalSelfAttention(32, 2), nn.GeluMLP(32, 64)

        def forward(self, x):
            y, x = self.ln_2(self.attn(self.ln_1(x)), x)
            return x + self.mlp(y)

    model = Layer()
    x = torch.randn(2, 16, 32, requires_grad=True)
    leaves = [x, *model.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(step(compiled, [x], leaves), step(model, [x], leaves))


def test_every_registered_op_is_checked():
    """torch.library.opcheck over schema, fake and autograd: each op's own test file holds it."""
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "cgpt_ext::" in name
    }
    assert len(names) >= 12
    tests = "".join(path.read_text() for path in sorted((Path(__file__).parent / "ops").glob("test_*.py")))
    missing = [name for name in sorted(names) if f"{name}.default" not in tests]
    assert not missing
