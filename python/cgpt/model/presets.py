"""Model sizes and how each was trained: one row a size.

The seven published rows are Cerebras-GPT (Dey et al. 2023, arXiv 2304.03208, tables 1 and 6) and its released
configurations: 20 tokens per parameter on the Pile. Each has a muP form, `111M-mup` and so on: the same tokens, the
numbers of cgpt.model.parametrization's table at the published base, linear decay. The paper trained five of those;
6.7B and 13B follow the same rules. `tiny` and `mini` are ours, with the same vocabulary, sized and tuned so that two
CPU cores see the loss fall: tiny in minutes on a book, mini in hours on a few million tokens.
"""

from dataclasses import dataclass, replace

from cgpt.model.config import GPTConfig
from cgpt.model.parametrization import CEREBRAS, parametrize
from cgpt.schedule import tokens_after

GPT2_VOCAB = 50257


@dataclass(frozen=True)
class Preset:
    """A shape and its training recipe: AdamW, linear warm-up, decay to min_lr_ratio, clipped by the global
    norm.

    batch_schedule: (from_tokens, sequences) steps, see cgpt.schedule. Sequences are config.seq_len tokens
    long.
    steps: optimizer steps of the whole run. lr: the peak. decay: of cgpt.schedule.DECAYS. Weight decay spares
    biases and LayerNorm. parametrization: of cgpt.model.parametrization.KINDS, what the config's numbers follow.
    """

    name: str
    config: GPTConfig
    batch_schedule: tuple[tuple[int, int], ...]
    steps: int
    lr: float
    warmup_tokens: int
    decay: str
    adam_eps: float
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    min_lr_ratio: float = 0.1
    parametrization: str = "sp"

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return tokens_after(self.steps, self.batch_schedule, self.config.seq_len)


def _row(
    name: str,
    layers: int,
    d_model: int,
    heads: int,
    seq_len: int,
    batch: tuple[tuple[int, int], ...],
    steps: int,
    lr: float,
    warmup_tokens: int,
    decay: str,
    eps: float = 1e-8,
    residual_std: float | None = None,
    init_std: float = 0.02,
) -> Preset:
    config = GPTConfig(
        n_layer=layers,
        n_head=heads,
        d_model=d_model,
        d_head=d_model // heads,
        d_ff=4 * d_model,
        vocab_size=GPT2_VOCAB,
        seq_len=seq_len,
        embedding_init_std=init_std,
        hidden_init_std=init_std,
        residual_init_std=residual_std,
    )
    return Preset(name, config, batch, steps, lr, warmup_tokens, decay, eps)


_13B_BATCH = ((0, 720), (57_000 * 720 * 2048, 1080))  # 57,000 steps of 720, then 78,223 of 1,080

# fmt: off
_ROWS = (
    #    name  layers width heads seq_len batch          steps peak lr    warm-up   decay     eps  resid. std
    _row("tiny",    2,   96,  2,  128, ((0, 4),),        1600, 3e-3,        40_960, "linear", init_std=0.08),
    _row("mini",    6,  256,  4,  256, ((0, 8),),        4000, 1e-3,       409_600, "linear", init_std=0.04),
    _row("111M",   10,  768, 12, 2048, ((0, 120),),      9037, 6e-4,   374_784_000, "linear"),
    _row("256M",   14, 1088, 17, 2048, ((0, 264),),      9468, 6e-4,   374_685_696, "linear"),
    _row("590M",   18, 1536, 12, 2048, ((0, 264),),     21836, 2e-4,   374_685_696, "linear"),
    _row("1.3B",   24, 2048, 16, 2048, ((0, 528),),     24334, 2e-4,   374_145_024, "cosine", 1e-8, 0.0025),
    _row("2.7B",   32, 2560, 32, 2048, ((0, 528),),     49041, 2e-4,   374_145_024, "cosine", 1e-8, 0.0025),
    _row("6.7B",   32, 4096, 32, 2048, ((0, 1040),),    62522, 1.2e-4, 374_865_920, "linear", 1e-9, 0.0025),
    _row("13B",    40, 5120, 40, 2048, _13B_BATCH,     135223, 1.2e-4, 374_538_240, "cosine", 1e-9, 0.0025),
)
# fmt: on


def _mup(row: Preset) -> Preset:
    """The muP form of a published row."""
    config = parametrize(row.config, "mup", CEREBRAS)
    name = f"{row.name}-mup"
    return replace(row, name=name, config=config, lr=CEREBRAS.lr, decay="linear", parametrization="mup")


_PUBLISHED = _ROWS[2:]

PRESETS: dict[str, Preset] = {row.name: row for row in (*_ROWS, *map(_mup, _PUBLISHED))}
