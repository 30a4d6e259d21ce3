"""These kernels inside transformers' GPT-2 and Llama, in one line; the shape of the call is Liger-Kernel's.

    from cgpt_ext.integrations.transformers import apply_cgpt_kernels_to_gpt2

    apply_cgpt_kernels_to_gpt2()                      # every GPT-2 made or loaded from here on
    apply_cgpt_kernels_to_gpt2(model=model)           # a model there is
    with apply_cgpt_kernels_to_gpt2(model=model):     # and back at the end of the block
        ...

A patched module is given a subclass as its class; parameters, names and state_dict are left as they are. What a kernel
cannot serve keeps the module's own forward: other activations, float64, and layers that somebody else has changed, be
it by another class (PEFT, quantisation, parametrisations), by hooks or by a forward of their own. Attention alone does
not fall back for a dtype or head dim: it raises what `cgpt_ext.attention` raises.

In training with labels the language model's loss comes from the fused linear cross-entropy and `logits` is None, as
with Liger; `skip_logits=False` in the call keeps them and the usual loss, `skip_logits=True` asks for it in eval too.
"""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature

import torch
from torch import Tensor
from transformers import PreTrainedModel, activations
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple

from cgpt_ext.integrations import transformers as interface
from cgpt_ext.nn import LayerNorm as FusedLayerNorm
from cgpt_ext.ops.cross_entropy import cross_entropy as linear_cross_entropy
from cgpt_ext.ops.gelu_mlp import gelu_mlp

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


class Patch:
    """What was done to a model or to transformers' classes, and can be undone: by `revert()`, or as a context manager.

    Patches of the same classes are reverted in the reverse order of their making.
    """

    def __init__(self):
        self._undo: list[Callable[[], None]] = []

    def revert(self) -> None:
        """Undoes it. Models made under a patch of classes stay as they were made."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_) -> None:
        self.revert()


def apply_cgpt_kernels_to_gpt2(
    attention: bool = True,
    mlp: bool = True,
    layer_norm: bool = True,
    cross_entropy: bool = True,
    model: torch.nn.Module | None = None,
) -> Patch:
    """Puts these kernels into GPT-2: into `model`, or without one into every GPT-2 made or loaded from now on.

    Args:
        attention: as `set_attn_implementation("cgpt")`; of models to come, those with SDPA, transformers' default.
            Dropout in training, GPT-2's default of 0.1 too, is SDPA's: set attn_pdrop to 0 for the kernel.
        mlp: the two projections and the activation between in one op; activations "gelu", "gelu_new" and the like.
        layer_norm: every LayerNorm of the model.
        cross_entropy: the loss of GPT2LMHeadModel without whole logits, in training; derived classes keep theirs.
        model: a GPT-2 with any head, or a module that holds one, as PEFT's do.

    Returns:
        A Patch, to undo it.

    Raises:
        ValueError: where `model` holds no GPT-2.
    """
    classes = {}
    if mlp:
        classes[modeling_gpt2.GPT2MLP] = GPT2MLP
    if layer_norm:
        classes[torch.nn.LayerNorm] = LayerNorm
    if cross_entropy:
        classes[modeling_gpt2.GPT2LMHeadModel] = GPT2LMHeadModel
    roots = (modeling_gpt2.GPT2Model, modeling_gpt2.GPT2LMHeadModel)
    return _apply("apply_cgpt_kernels_to_gpt2", "a GPT-2", roots, classes, attention, model)


def apply_cgpt_kernels_to_llama(
    attention: bool = True, mlp: bool = True, cross_entropy: bool = True, model: torch.nn.Module | None = None
) -> Patch:
    """The same for Llama: arguments, result and errors as of `apply_cgpt_kernels_to_gpt2`.

    mlp: SwiGLU in one op, its two projections joined into one for the call. The copy is kept for the backward pass, so
        that it is made only for batches of at least hidden_size tokens: what it saves is then more than it takes.
    Rotary embeddings and RMSNorm stay transformers' own.
    """
    classes = {}
    if mlp:
        classes[modeling_llama.LlamaMLP] = LlamaMLP
    if cross_entropy:
        classes[modeling_llama.LlamaForCausalLM] = LlamaForCausalLM
    roots = (modeling_llama.LlamaModel, modeling_llama.LlamaForCausalLM)
    return _apply("apply_cgpt_kernels_to_llama", "a Llama", roots, classes, attention, model)


def register_with_liger() -> None:
    """`TrainingArguments(use_liger_kernel=True)` serves GPT-2, which Liger-Kernel has no kernels for, with these.

    `liger_kernel_config` takes `apply_cgpt_kernels_to_gpt2`'s arguments. It is a row in Liger's own table of models,
    which is not documented there; liger_kernel 0.8 has it.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN["gpt2"] = apply_cgpt_kernels_to_gpt2


def _apply(name, what, roots, classes, attention, model):
    if attention:
        interface.register()
    patch = Patch()
    if model is not None:
        if not isinstance(model, torch.nn.Module) or not any(isinstance(part, roots) for part in model.modules()):
            raise ValueError(f"{name}: model must hold {what}, got {type(model).__name__}")
        _patch_model(model, classes, attention, patch)
        return patch
    for root in roots:
        _patch_constructor(root, classes, attention, patch)
    return patch


def _patch_model(model, classes, attention, patch):
    for module in model.modules():
        if type(module) in classes and (type(module) is not torch.nn.LayerNorm or _fits_layer_norm(module)):
            patch._undo.append(_restore_class(module, type(module)))
            module.__class__ = classes[type(module)]
    if attention:
        for module in model.modules():
            # of a model and its parts the whole comes first, and hands the name on to the parts' configs
            if isinstance(module, PreTrainedModel) and module.config._attn_implementation not in interface.NAMES:
                patch._undo.append(_restore_attention(module, module.config._attn_implementation))
                module.set_attn_implementation("cgpt")


def _restore_class(module, kind):
    def undo():
        module.__class__ = kind

    return undo


def _restore_attention(module, name):
    return lambda: module.set_attn_implementation(name)


def _patch_constructor(root, classes, attention, patch):
    original = root.__init__

    @wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        _patch_model(self, classes, attention and self.config._attn_implementation == "sdpa", Patch())

    def undo():
        root.__init__ = original

    root.__init__ = __init__
    patch._undo.append(undo)


def _fits_layer_norm(module):
    return len(module.normalized_shape) == 1 and module.weight is not None and _untouched(module)


def _untouched(module):
    """Whether nobody has put anything before, behind or in place of the module's own forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _plain(layer, kind, x):
    """Whether an op may take `layer`'s weight and bias in its stead."""
    if type(layer) is not kind or not _untouched(layer):
        return False
    weight = layer.weight
    same = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return weight.dtype in _SERVED and x.dtype in _SERVED and same and type(weight) in (Tensor, torch.nn.Parameter)


class LayerNorm(FusedLayerNorm):
    """`cgpt_ext.nn.LayerNorm`, and torch's where x is of a dtype that it does not serve."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.dtype in _SERVED else torch.nn.LayerNorm.forward(self, input)


def gpt2_mlp(module: torch.nn.Module, x: Tensor) -> Tensor | None:
    """The fused forward of a GPT2MLP, dropout included; None where its layers or activation do not allow it."""
    activation = _gelu(module.act) if _untouched(module.act) else None
    if activation is None or not (_plain(module.c_fc, Conv1D, x) and _plain(module.c_proj, Conv1D, x)):
        return None
    fc, proj = module.c_fc, module.c_proj
    return module.dropout(gelu_mlp(x, fc.weight.t(), fc.bias, proj.weight.t(), proj.bias, activation))


def llama_mlp(module: torch.nn.Module, x: Tensor) -> Tensor | None:
    """The fused forward of a LlamaMLP; None where its layers, activation or too few tokens do not allow it."""
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    if type(module.act_fn) not in (torch.nn.SiLU, activations.SiLUActivation) or x.numel() < x.shape[-1] ** 2:
        return None
    if not (_untouched(module.act_fn) and all(_plain(layer, torch.nn.Linear, x) for layer in (gate, up, down))):
        return None
    if (gate.bias is None) != (up.bias is None):
        return None
    bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
    return gelu_mlp(x, torch.cat([gate.weight, up.weight]), bias, down.weight, down.bias, "swiglu")


def _gelu(act):
    if isinstance(act, activations.GELUActivation):
        return "gelu"
    tanh = (activations.NewGELUActivation, activations.GELUTanh, activations.FastGELUActivation)
    return "gelu_tanh" if isinstance(act, tanh) else None


class GPT2MLP(modeling_gpt2.GPT2MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        fused = gpt2_mlp(self, hidden_states)
        return super().forward(hidden_states) if fused is None else fused


class LlamaMLP(modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        fused = llama_mlp(self, x)
        return super().forward(x) if fused is None else fused


def _causal_lm_forward(original, output_class):
    """A causal language model's forward that takes loss from hidden states where it can, and else is `original`."""
    parameters = list(signature(original).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD]

    @can_return_tuple
    def fused(self, labels, **kwargs):
        kwargs.pop("logits_to_keep", None)
        outputs = getattr(self, self.base_model_prefix)(**kwargs)
        hidden, head = outputs.last_hidden_state, self.lm_head
        if _plain(head, torch.nn.Linear, hidden) and head.bias is None:
            logits, loss = None, _fused_loss(hidden, head.weight, labels, **kwargs)
        else:
            logits = head(hidden)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        given = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        return output_class(loss=loss, logits=logits, **given)

    @wraps(original)
    def forward(self, *args, skip_logits: bool | None = None, **kwargs):
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(named) < len(args) + len(kwargs) or not _wants_fused_loss(self, skip_logits, named):
            return original(self, *args, **kwargs)  # too many arguments, or one of them twice, is its to complain of
        return fused(self, **named)

    return forward


def _wants_fused_loss(model, skip_logits, kwargs):
    wanted = model.training if skip_logits is None else skip_logits
    keep = kwargs.get("logits_to_keep", 0)
    everything = keep is None or (isinstance(keep, int) and keep == 0)
    return wanted and kwargs.get("labels") is not None and everything and _usual_loss(model)


def _usual_loss(model):
    """Whether `model.loss_function`, which torch.compile does not read for the warning in it, is transformers' own."""
    usual = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    return getattr(model, "_loss_function", usual) is ForCausalLMLoss


def _fused_loss(hidden, weight, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    """transformers' ForCausalLMLoss of `hidden @ weight.T`, without the logits."""
    if shift_labels is None:  # position t predicts token t + 1, the last one nothing
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.to(hidden.device)
    if num_items_in_batch is None:
        return linear_cross_entropy(hidden, weight, target, ignore_index)
    total = linear_cross_entropy(hidden, weight, target, ignore_index, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


# The model classes keep transformers' names: save_pretrained writes them into config.json.
class GPT2LMHeadModel(modeling_gpt2.GPT2LMHeadModel):
    forward = _causal_lm_forward(modeling_gpt2.GPT2LMHeadModel.forward, CausalLMOutputWithCrossAttentions)


class LlamaForCausalLM(modeling_llama.LlamaForCausalLM):
    forward = _causal_lm_forward(modeling_llama.LlamaForCausalLM.forward, CausalLMOutputWithPast)
