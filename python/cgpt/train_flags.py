"""What `cgpt train` is asked: flags alone, so that `cgpt --help` is quick. Field types that other commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


def _flag(metavar: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Int = Annotated[int | None, _flag("INT")]
Float = Annotated[float | None, _flag("FLOAT")]
Text = Annotated[str | None, _flag("TEXT")]
Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Folder = Annotated[Path | None, _flag("DIR")]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], _flag("TRACKER")]


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT. With no flags at all: the tiny model on Moby-Dick, a few minutes on two CPU cores."""

    model: Text = None
    """A preset, as `cgpt info` lists them (default: tiny)."""
    config: Annotated[Path | None, _flag("FILE")] = None
    """A preset of your own with flags that go with it, as `cgpt plan --write` leaves them (default: --model)."""
    data: Text = None
    """moby-dick, python-stdlib, text (.txt, .jsonl, .parquet), hf:NAME:SPLIT, a prepared folder, or token files of
    nanoGPT, llm.c, Megatron or datatrove (default: moby-dick)."""
    width: Int = None
    """Of the model, with more or fewer of the preset's heads and d_ff in proportion (default: the preset's)."""
    layers: Int = None
    """Of the model (default: the preset's)."""
    positions: Annotated[Literal["learned", "none", "rotary", "alibi"] | None, _flag("{learned,none,rotary,alibi}")] = (
        None
    )
    """How tokens know their place (default: the preset's, which is learned)."""
    activation: Annotated[Literal["gelu", "gelu_tanh", "swiglu"] | None, _flag("{gelu,gelu_tanh,swiglu}")] = None
    """Of the MLP; swiglu makes it 2/3 as wide, for about as many parameters (default: the preset's, which is gelu)."""
    embedding_norm: Switch = False
    """A LayerNorm behind the embedding."""
    parametrization: Annotated[Literal["sp", "mup", "completep"] | None, _flag("{sp,mup,completep}")] = None
    """Rules that init, factors and learning rates follow. Others than the preset's start from the published base, 256
    wide, and --lr from its 6e-3 (default: the preset's: mup where it is called -mup, else sp)."""
    transfer_from: Annotated[Path | None, _flag("RUN")] = None
    """Start from the init, factors and learning rate that were tuned in this run, by the rules of --parametrization
    (then mup by default). Without --model all else that is not asked for is the run's too: --width makes it wider."""
    init: Annotated[Path | None, _flag("PATH")] = None
    """Fine-tune the weights in this run or Hugging Face folder, whose shape and vocabulary the model has; text is read
    in that vocabulary. Moments start at zero. Defaults are then 1000 steps of 8 sequences, and a tenth of the peak
    learning rate that it was trained with, as far as is known."""
    steps: Int = None
    """Optimizer steps of the whole run (default: as many as see the preset's tokens)."""
    batch_size: Int = None
    """Sequences a step (default: the preset's)."""
    batch_schedule: Text = None
    """Sequences a step as they grow, from counts of tokens seen: 0:720,84049920000:1080."""
    micro_batch_size: Int = None
    """Sequences that are on their way at once; more are accumulated (default: as many as make 8192 tokens)."""
    seq_len: Int = None
    """Tokens a sequence (default: the preset's). More than the preset has gives the model more positions."""
    lr: Float = None
    """Peak learning rate; under mup and completep the projections' is a fraction of it (default: the preset's)."""
    warmup_tokens: Int = None
    """Tokens of linear warm-up (default: the preset's, at most a fifth of the run)."""
    decay: Annotated[Literal["linear", "cosine", "constant"] | None, _flag("{linear,cosine,constant}")] = None
    """How the learning rate falls after warm-up (default: the preset's)."""
    min_lr_ratio: Float = None
    """Where it ends, as a share of the peak (default: 0.1)."""
    weight_decay: Float = None
    """On all but biases and LayerNorm (default: 0.1)."""
    clip: Float = None
    """Largest global gradient norm, 0 for none (default: 1)."""
    precision: Annotated[Literal["bf16", "fp32", "fp16"] | None, _flag("{bf16,fp32,fp16}")] = None
    """Of weights and activations; masters and losses are fp32 always (default: bf16)."""
    moments: Annotated[Literal["fp32", "bf16"] | None, _flag("{fp32,bf16}")] = None
    """Of AdamW's: 12 or 8 bytes of state a parameter. bf16 is rounded at random, so that small changes add up on
    average (default: fp32)."""
    device: Annotated[Literal["cpu", "cuda"] | None, _flag("{cpu,cuda}")] = None
    """Where to train (default: cpu)."""
    devices: Int = None
    """How many GPUs of this machine train together, a process each; with --device cpu, how many processes, which share
    the cores. Each has its part of every batch and of the optimizer's state, and the losses are the same for any number
    of them. A run that one number began may be resumed with another. Ctrl-C lets them finish the step and save, twice
    ends them at once. On several machines, torchrun starts them: see --max-restarts (default: 1)."""
    max_restarts: Int = None
    """How often the job is brought back from its newest checkpoint after a process has died, if there are several. A
    job on 2 machines of 8 GPUs is `torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST
    --max-restarts 3 -m cgpt train --out DIR ...` on each, with DIR a folder that both see (default: 3)."""
    hang_timeout: Annotated[float | None, _flag("SECONDS")] = None
    """End a process in which nothing has been finished for so long, with what every lane and thread was at on stderr
    and in hang-rankN.txt of the run folder, and exit code 75; 0 for never. It has to be longer than the longest wait
    for another process, such as for a checkpoint that is written (default: 1800, or 0 if there is one process)."""
    placement: Annotated[Literal["resident", "auto"] | None, _flag("{resident,auto}")] = None
    """resident: all layers on the device. auto: as many as fit, the others stream from the host and the disk (default:
    auto with any of the next three flags, else resident)."""
    device_memory: Text = None
    """Of each device, as 4GiB (default: all that is free). On a CPU, a stretch of memory that stands for a device's."""
    host_memory: Text = None
    """Of the host, on a CPU of the whole process; with several devices, for all processes of a machine together
    (default: all that is free)."""
    disk: Folder = None
    """For optimizer state and weights that memory has no room for; what is written there is gone when the run ends."""
    timeline: Switch = False
    """Leave timeline.json (for chrome://tracing) and timeline.png of the last steps: what each lane did when."""
    seed: Int = None
    """Of initial weights, order of samples and rounding of bf16 moments (default: 0)."""
    eval_every: Int = None
    """Steps between held-out losses (default: a tenth of the run)."""
    eval_tokens: Int = None
    """Held-out tokens read each time, from the start of the split (default: 65536)."""
    checkpoint_every: Int = None
    """Steps between checkpoints (default: a tenth of the run, at most 1000); the end and Ctrl-C save too."""
    keep: Int = None
    """Checkpoints to keep (default: 2)."""
    out: Folder = None
    """Run folder (default: runs/MODEL-DATA, or the next free runs/MODEL-DATA-2, -3, ...)."""
    track: tyro.conf.UseAppendAction[
        Annotated[
            tuple[Literal["tensorboard", "wandb", "trackio"], ...],
            tyro.conf.arg(metavar="TRACKER", help_behavior_hint=""),
        ]
    ] = ()
    """Send the metrics there too, besides metrics.jsonl: tensorboard, wandb or trackio; give it once for each. One that
    fails is left out and the run goes on (default: with --resume the run's, else none)."""
    project: Text = None
    """Of wandb and trackio, to file the run under (default: cgpt)."""
    resume: Switch = False
    """Go on with the run in --out (default: the newest of runs/MODEL-DATA) from its newest whole checkpoint."""
