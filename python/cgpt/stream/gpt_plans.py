"""The stops of a GPT's walk in numbers, without building it: embed, h.0, ..., h.(L-1), head; imports no torch.

Names and shapes are Hugging Face GPT-2's: projections (in, out), and the head reads the embedding's wte.
"""

from cgpt.model.config import GPTConfig
from cgpt.stream.layout import LayerPlan, Shapes, layers_plan


def gpt_plans(config: GPTConfig) -> list[LayerPlan]:
    """What each layer of a GPT of this shape owns and reads."""
    d = config.d_model
    wte = {"wte.weight": (config.vocab_size, d)}
    embed = dict(wte)
    if config.position_rows:
        embed["wpe.weight"] = (config.position_rows, d)
    if config.embedding_norm:
        embed |= {"ln_emb.weight": (d,), "ln_emb.bias": (d,)}
    head = {"ln_f.weight": (d,), "ln_f.bias": (d,)} | wte
    blocks = [(f"h.{i}", _block(f"h.{i}.", config)) for i in range(config.n_layer)]
    return layers_plan([("embed", embed), *blocks, ("head", head)])


def _block(prefix: str, config: GPTConfig) -> Shapes:
    d = config.d_model
    shapes = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, config.d_fc),
        "mlp.c_fc.bias": (config.d_fc,),
        "mlp.c_proj.weight": (config.d_ff, d),
        "mlp.c_proj.bias": (d,),
    }
    return {prefix + name: shape for name, shape in shapes.items()}
