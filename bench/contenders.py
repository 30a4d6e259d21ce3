"""Who steps against whom in bench/train_step.py: ours, and GPT-2 as transformers has it; twin.py is the third."""

import torch

from cgpt.heap import keep_large_buffers
from cgpt.model.init import init_parameter
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from twin import TwinTrainer


class Ours:
    """What `cgpt train` does in a step."""

    def __init__(self, config, precision):
        keep_large_buffers()
        _, self.store = build(config, Format(precision), "cpu")
        self.store.initialise(lambda name, tensor: init_parameter(name, tensor, config, seed=0))
        self.executor, self.optimizer = Executor(self.store), AdamW(self.store)

    def step(self, ids, targets):
        gradients = self.executor.gradients([[(ids, targets)]])
        self.optimizer.step(gradients, lr=6e-4)
        return gradients.loss

    def rest(self):
        """Nothing of a step outlives it."""


class HuggingFace(TwinTrainer):
    def __init__(self, config, precision):
        from transformers import GPT2Config, GPT2LMHeadModel

        class Model(GPT2LMHeadModel):
            def forward(self, ids, targets):
                logits = super().forward(ids).logits
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        shape = GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.d_ff,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        self.start(Model(shape), precision)
