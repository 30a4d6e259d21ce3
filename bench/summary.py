"""The README's table of measurements, from bench/results and nothing else: `python bench/summary.py`.

tests/test_readme.py holds the README to it.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DEVICE = "amd-epyc-avx512-bf16"

# what the README calls it -> the row of the op's file
ROWS = {
    "attention forward, causal, (2, 1024, 12, 64) bf16": "test_attention[forward-2x1024x12x64-bf16-attention]",
    "attention backward, same": "test_attention[backward-2x1024x12x64-bf16-attention]",
    "attention backward, same in fp32": "test_attention[backward-2x1024x12x64-fp32-attention]",
    "linear + cross-entropy, 2048 x 768 x 50257 bf16, forward + backward": "test_cross_entropy[2048x768x50257-bf16]",
    "gelu_mlp, 2048 x 768 x 3072 bf16, forward + backward": "test_gelu_mlp[in_out-gelu-bf16]",
    "layer_norm, 2048 x 768 bf16, forward + backward": "test_layer_norm[2048x768-bf16]",
    "layer_norm, 2048 x 768 fp32, forward + backward": "test_layer_norm[2048x768-fp32]",
    "adamw, 95M parameters, split master": "test_adamw[2-bf16-split-master]",
    "optim.AdamW, 95M fp32 parameters": "test_optimizer[2]",
    "grad_norm, 95M fp32": "test_grad_norm[2-fp32]",
}


def table() -> str:
    """Markdown: ours, the best peer in the same run, and the ratio of the medians."""
    folder = RESULTS / DEVICE
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = {row["name"]: row for file in files for row in file.get("rows", [])}
    lines = ["| what | ours | torch | ratio |", "|---|---|---|---|"]
    for what, name in ROWS.items():
        row = rows[name]
        ours, peer = row["seconds"] * 1e3, min(row["peers"].values()) * 1e3
        lines.append(f"| {what} | {milliseconds(ours)} | {milliseconds(peer)} | {row['ratio']:.2f} |")
    step = json.loads((folder / "train_step-111M.json").read_text())["contenders"]
    rates = {name: row["tokens_per_second"] for name, row in step.items()}
    ours = rates.pop("cgpt")
    for name, rate in rates.items():
        lines.append(
            f"| training step, 111M, 2 x 1024 bf16, against {name} | {ours:.0f} tokens/s | {rate:.0f} tokens/s"
            f" | {ours / rate:.2f} |"
        )
    return "\n".join(lines)


def milliseconds(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


if __name__ == "__main__":
    print(table())
