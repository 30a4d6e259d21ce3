"""nanoGPT's train.py, unmodified, with our attention, GELU-MLP, LayerNorm and AdamW.

In a checkout of nanoGPT (github.com/karpathy/nanoGPT), with the arguments that train.py takes:

    python -m cgpt_ext.integrations.nanogpt train.py config/train_gpt2.py --compile=False

The names of parameters and the states of the optimizer stay, so its checkpoints go to and fro. Scripts that import
nanoGPT's model.py by themselves call `apply_cgpt_kernels_to_nanogpt(model)` instead, before or after they build one.
"""

import runpy
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from cgpt_ext import optim
from cgpt_ext.ops.attention import attention_qkv
from cgpt_ext.ops.gelu_mlp import gelu_mlp
from cgpt_ext.ops.layer_norm import layer_norm

CLASSES = ("CausalSelfAttention", "MLP", "LayerNorm")


def apply_cgpt_kernels_to_nanogpt(
    model: ModuleType, attention: bool = True, mlp: bool = True, layer_norm: bool = True
) -> None:
    """Gives the classes of nanoGPT's module `model` forwards of our ops; models that exist already change too.

    Attention with dropout stays nanoGPT's own while it trains, with a warning, as ours has no dropout. Heads are a
    multiple of 8 up to 256 wide, or the first forward raises ValueError.

    Raises:
        ValueError: where the module has none of these classes, so is not nanoGPT's.
    """
    missing = [name for name in CLASSES if not hasattr(model, name)]
    if missing:
        found = getattr(model, "__file__", model)
        raise ValueError(f"nanogpt: model must be nanoGPT's model.py, got {found} without {', '.join(missing)}")
    if attention:
        _patch_attention(model.CausalSelfAttention)
    if mlp:
        model.MLP.forward = _mlp
    if layer_norm:
        model.LayerNorm.forward = _layer_norm


def _patch_attention(kind: type) -> None:
    if hasattr(kind.forward, "theirs"):
        return
    init, theirs = kind.__init__, kind.forward

    def warn_of_dropout(self, config):
        init(self, config)
        if self.dropout > 0:
            warnings.warn(f"nanogpt: attention with dropout {self.dropout} trains by nanoGPT's own", stacklevel=2)

    def forward(self, x):
        if self.training and self.dropout > 0:
            return theirs(self, x)
        return self.resid_dropout(self.c_proj(attention_qkv(self.c_attn(x), self.n_head, causal=True)))

    forward.theirs = theirs
    kind.__init__, kind.forward = warn_of_dropout, forward


def _mlp(self, x):
    return self.dropout(gelu_mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias))


def _layer_norm(self, input):
    return layer_norm(input, self.weight, self.bias)


@contextmanager
def torchs_adamw_replaced():
    """`torch.optim.AdamW` is ours inside: for scripts that name no other."""
    theirs, torch.optim.AdamW = torch.optim.AdamW, optim.AdamW
    try:
        yield
    finally:
        torch.optim.AdamW = theirs


def main(arguments: list[str]) -> int:
    """Runs a script of nanoGPT's with our parts: its path, then its own arguments. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not (script.is_file() and (script.parent / "model.py").is_file()):
        print(f"nanogpt: wanted a script of nanoGPT's, with model.py beside it, got {script}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(script.parent.resolve()))  # as python itself does for a script
    sys.argv = arguments
    try:
        apply_cgpt_kernels_to_nanogpt(import_module("model"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with torchs_adamw_replaced():
        runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
