"""Which calls skip torch's dispatcher."""

import pytest
import torch

from cgpt_ext import adamw_, attention, embedding, grad_norm, layer_norm
from cgpt_ext.ops._torch import direct


class Subclass(torch.Tensor):
    pass


def test_direct():
    x, other = torch.ones(2), torch.ones(2).as_subclass(Subclass)
    assert direct(x, torch.nn.Parameter(x), None, 3, [x, x], [])
    assert direct([])
    assert not direct(x, other)
    assert not direct([other], 0.5)
    assert not direct(x.to("meta"), x)
    assert not direct([x.to("meta")])
    assert direct(x, x.to("meta"))  # the border names what is wrong
    with pytest.raises(ValueError, match="layer_norm: weight must be on a cpu or cuda device"):
        layer_norm(torch.ones(3, 2), x.to("meta"), None)


def test_meta_tensors_have_shapes():
    x = torch.empty(2, 5, 4, 8, device="meta")
    q = attention(x, x, x, alibi_slopes=torch.empty(4, device="meta"))
    assert (q.shape, q.device.type) == (x.shape, "meta")
    ids = torch.empty(2, 5, dtype=torch.int64, device="meta")
    assert embedding(ids, torch.empty(9, 8, device="meta")).shape == (2, 5, 8)
    assert grad_norm([x, x]).is_meta
    adamw_([x], [x], [x], [x], 1, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated")
def test_a_trace_holds_the_op():
    """Of a kernel called past the dispatcher a trace would keep the result instead."""
    weight = torch.ones(8)
    traced = torch.jit.trace(lambda x: layer_norm(x, weight, None), torch.randn(2, 8))
    x = torch.randn(2, 8)
    assert torch.equal(traced(x), layer_norm(x, weight, None))
