"""A GPT from its definition, every step written out: what the model must equal, sharing nothing with it."""

import math

import torch
import torch.nn.functional as F

from cgpt.model.gpt import GPT


def gpt_logits(weights, ids, config):
    """(B, T) -> (B, T, V) in the dtype of `weights`, a dictionary of HF GPT-2's names."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def project(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def act(x):
        if config.activation == "swiglu":
            gate, value = x[..., : config.d_ff], x[..., config.d_ff :]
            return gate / (1 + torch.exp(-gate)) * value
        if config.activation == "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    def turn(x):
        """Pairs (i, i + K / 2) as complex numbers, turned by t 10000^(-2i / K)."""
        half = config.d_head // 2
        speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(time, dtype=torch.float64)[:, None] * speed
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle).to(
            torch.complex128 if x.dtype == torch.float64 else torch.complex64
        )
        return torch.cat((turned.real, turned.imag), -1)

    time = ids.shape[1]
    place = torch.arange(time)
    future = place[None, :] > place[:, None]
    scale = 1 / math.sqrt(config.d_head) if config.softmax_scale is None else config.softmax_scale
    x = weights["wte.weight"][ids]
    if config.positions == "learned":
        x = x + weights["wpe.weight"][:time]
    x = x * config.embedding_scale
    if config.embedding_norm:
        x = norm(x, "ln_emb")
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        packed = project(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        heads = []
        for head in range(config.n_head):
            q, k, v = (
                packed[..., part * config.d_model + head * config.d_head :][..., : config.d_head] for part in range(3)
            )
            if config.positions == "rotary":
                q, k = turn(q), turn(k)
            scores = q @ k.transpose(1, 2) * scale
            if config.positions == "alibi":
                scores = scores - SLOPES[config.n_head][head] * (place[:, None] - place[None, :])
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
        x = x + config.residual_scale * project(torch.cat(heads, -1), f"{block}.attn.c_proj")
        inside = act(project(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + config.residual_scale * project(inside, f"{block}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].t() * config.logits_scale


SLOPES = {2: (2**-4, 2**-8), 3: (2**-4, 2**-8, 2**-2), 4: (2**-2, 2**-4, 2**-6, 2**-8)}  # ALiBi's, by number of heads


def loss_and_gradients(weights, ids, targets, config):
    """The definition's loss and its gradient by parameter name, in the dtype of `weights`."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss = F.cross_entropy(gpt_logits(leaves, ids, config).flatten(0, 1), targets.flatten())
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def lively(config, dtype=torch.float32, seed=0):
    """A model whose every term matters: weights far from init, biases and norms off zero and one."""
    model = GPT(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.to(dtype)


def tokens(config, batch, time, seed=0):
    """Ids and the targets that follow them, both (batch, time)."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(0, config.vocab_size, (batch, time + 1), generator=generator)
    return both[:, :-1], both[:, 1:]


def error(got, want):
    """Relative error in the L2 norm, in fp64."""
    return ((got.double() - want).norm() / want.norm()).item()
