"""The model a careful user writes in plain PyTorch: nn.Linear, SDPA, F.cross_entropy, autocast, fused AdamW.

The same GPT as cgpt.model.gpt (pre-LayerNorm, learned positions, GELU, tied head), kept here as the peer that
bench/train_step.py measures against.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.c_attn, self.c_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (
            h.view(B, T, self.n_head, D // self.n_head).transpose(1, 2)
            for h in self.c_attn(self.ln_1(x)).split(D, dim=2)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(out.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.ln_2(x))


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.d_model
        self.wte, self.wpe = nn.Embedding(config.vocab_size, D), nn.Embedding(config.seq_len, D)
        self.h = nn.ModuleList(Block(D, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class TwinTrainer:
    """One step as people write it: zero_grad, autocast, backward, clip, fused AdamW."""

    def __init__(self, config, precision):
        torch.manual_seed(0)
        self.start(Twin(config), precision)

    def start(self, model, precision):
        self.model = model
        decayed = [p for p in self.model.parameters() if p.dim() == 2]
        rest = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
            lr=6e-4,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def step(self, ids, targets):
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = self.model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def rest(self):
        """Between two turns: gradients are not the model."""
        self.optimizer.zero_grad(set_to_none=True)
