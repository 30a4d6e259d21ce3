"""Tokens per second of one training step, against the same model in plain PyTorch, interleaved step by step.

    python bench/train_step.py --model 111M --batch-size 2 --seq-len 1024 --precision bf16

Each contender lives in a process of its own, so that neither's allocator, thread pool or settings touch the other's,
and they step in turns, so that a machine whose speed drifts slows both. Peers: bench/twin.py and, where transformers is
installed, Hugging Face's GPT2LMHeadModel. Medians go to bench/results/<device>/train_step-<model>.json.
"""

import argparse
import multiprocessing
import resource
import statistics
import time

import torch

from cgpt.model.init import init_parameter
from cgpt.model.presets import PRESETS
from cgpt.opening import keep_large_buffers
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from record import save
from twin import TwinTrainer


class Ours:
    def __init__(self, config, precision):
        keep_large_buffers()
        _, store = build(config, Format(precision), "cpu")
        store.initialise(lambda name, tensor: init_parameter(name, tensor, config, seed=0))
        self.executor, self.optimizer = Executor(store), AdamW(store)

    def step(self, ids, targets):
        gradients = self.executor.gradients([[(ids, targets)]])
        self.optimizer.step(gradients, lr=6e-4)
        return gradients.loss


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


def worker(pipe, contender, config, precision, batch_size, seq_len, threads):
    """Answers each message with the seconds of one step and its loss; None ends it."""
    torch.set_num_threads(threads)
    trainer = contender(config, precision)
    generator = torch.Generator().manual_seed(0)
    while pipe.recv():
        tokens = torch.randint(config.vocab_size, (batch_size, seq_len + 1), generator=generator)
        start = time.perf_counter()
        loss = trainer.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        pipe.send((time.perf_counter() - start, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="111M", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=7, help="timed steps each, after two of warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()

    contenders = {"cgpt": Ours, "plain PyTorch": TwinTrainer}
    try:
        import transformers

        contenders[f"transformers {transformers.__version__}"] = HuggingFace
    except ImportError:
        pass
    config = PRESETS[args.model].config
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for name, contender in contenders.items():
        pipes[name], theirs = spawn.Pipe()
        given = (theirs, contender, config, args.precision, args.batch_size, args.seq_len, args.threads)
        spawn.Process(target=worker, args=given, daemon=True).start()

    seconds = {name: [] for name in pipes}
    losses, peak = {}, {}
    for i in range(args.steps + 2):
        for name, pipe in pipes.items():
            pipe.send(True)
            once, loss, kilobytes = pipe.recv()
            losses.setdefault(name, loss)
            peak[name] = kilobytes * 1024
            if i >= 2:
                seconds[name].append(once)
    for pipe in pipes.values():
        pipe.send(None)
    tokens = args.batch_size * args.seq_len
    flops = matmul_flops_per_token(config, args.seq_len)
    rows = {}
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)
        rows[name] = {
            "seconds": times,
            "tokens_per_second": rate,
            "model_flops_per_second": rate * flops,
            "first_loss": losses[name],
            "peak_memory_bytes": peak[name],
        }
    ours = rows["cgpt"]["tokens_per_second"]
    for name, row in rows.items():
        rate = row["tokens_per_second"]
        print(
            f"{name:22} {rate:9.1f} tokens/s  {row['model_flops_per_second'] / 1e9:7.1f} model GFLOP/s"
            f"  {row['peak_memory_bytes'] / 2**30:5.2f} GiB  cgpt is {ours / rate:5.2f} x"
        )
    if not args.no_save:
        print("wrote", save(f"train_step-{args.model}", {"settings": vars(args), "contenders": rows}))


if __name__ == "__main__":
    main()
