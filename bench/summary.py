"""The README's tables of measurements, from bench/results and nothing else: `python bench/summary.py [DEVICE]`.

tests/test_readme.py holds the README to it. What has not been measured yet is named beside the table.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DEVICE, OLDER_DEVICE = "amd-epyc-avx512-bf16", "amd-epyc-avx2"

AVX2 = "fp32 by our AVX2 kernels, torch on all of the machine"

# what the README calls it -> the row of the op's file
ROWS = {
    "attention forward, causal, (2, 1024, 12, 64) bf16": "test_attention[forward-2x1024x12x64-bf16-attention]",
    "attention backward, same": "test_attention[backward-2x1024x12x64-bf16-attention]",
    "attention backward, same in fp32": "test_attention[backward-2x1024x12x64-fp32-attention]",
    f"attention backward, same in {AVX2}": "test_attention[backward-2x1024x12x64-fp32-avx2-attention]",
    "attention forward, causal, (2, 1024, 12, 128) bf16": "test_attention[forward-2x1024x12x128-bf16-attention]",
    "attention backward, same at head dim 128": "test_attention[backward-2x1024x12x128-bf16-attention]",
    "linear + cross-entropy, 2048 x 768 x 50257 bf16, forward + backward": "test_cross_entropy[2048x768x50257-bf16]",
    f"linear + cross-entropy, same in {AVX2}": "test_cross_entropy[2048x768x50257-fp32-avx2]",
    "gelu_mlp, 2048 x 768 x 3072 bf16, forward + backward": "test_gelu_mlp[in_out-gelu-bf16]",
    f"gelu_mlp, same in {AVX2}": "test_gelu_mlp[in_out-gelu-fp32-avx2]",
    "gelu_mlp, 2048 x 2048 x 8192 bf16, forward + backward": "test_gelu_mlp[2048x2048x8192-in_out-gelu-bf16]",
    "linear, 2048 x 768 x 2304 bf16, forward + backward": "test_linear[2048x768x2304-in_out-bf16]",
    "linear, 2048 x 768 x 768 bf16, forward + backward": "test_linear[2048x768x768-in_out-bf16]",
    "layer_norm, 2048 x 768 bf16, forward + backward": "test_layer_norm[2048x768-bf16]",
    "layer_norm, 2048 x 768 fp32, forward + backward": "test_layer_norm[2048x768-fp32]",
    "adamw, 95M parameters, split master": "test_adamw[2-bf16-split-master]",
    "optim.AdamW, 95M fp32 parameters": "test_optimizer[2]",
    "grad_norm, 95M fp32": "test_grad_norm[2-fp32]",
}

# and of a machine with neither AVX-512 nor a bf16 product of torch's
OLDER_ROWS = {
    "attention forward, causal, (2, 1024, 12, 64) bf16": "test_attention[forward-2x1024x12x64-bf16-attention]",
    "attention forward, same in fp32": "test_attention[forward-2x1024x12x64-fp32-attention]",
    "attention backward, same in bf16": "test_attention[backward-2x1024x12x64-bf16-attention]",
    "attention backward, same in fp32": "test_attention[backward-2x1024x12x64-fp32-attention]",
    "attention forward, causal, (2, 1024, 12, 128) fp32": "test_attention[forward-2x1024x12x128-fp32-attention]",
    "attention backward, same at head dim 128": "test_attention[backward-2x1024x12x128-fp32-attention]",
    "linear + cross-entropy, 2048 x 768 x 50257 fp32, forward + backward": "test_cross_entropy[2048x768x50257-fp32]",
    "gelu_mlp, 2048 x 768 x 3072 fp32, forward + backward": "test_gelu_mlp[in_out-gelu-fp32]",
    "gelu_mlp, 2048 x 2048 x 8192 fp32, forward + backward": "test_gelu_mlp[2048x2048x8192-in_out-gelu-fp32]",
    "linear, 2048 x 768 x 2304 fp32, forward + backward": "test_linear[2048x768x2304-in_out-fp32]",
    "layer_norm, 2048 x 768 fp32, forward + backward": "test_layer_norm[2048x768-fp32]",
    "optim.AdamW, 95M fp32 parameters": "test_optimizer[2]",
}

# results of bench/train_step.py, in the order of the table
OLDER_STEPS = ["train_step-111M-fp32"]
STEPS = [
    "train_step-111M",
    "train_step-111M-fp32",
    "train_step-111M-fp32-avx2",
    "train_step-590M",
    "train_step-1.3B",
]


def shown(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The rows and steps that a device's table has."""
    return (OLDER_ROWS, OLDER_STEPS) if folder.name == OLDER_DEVICE else (ROWS, STEPS)


def table(folder: Path = RESULTS / DEVICE) -> str:
    """Markdown: ours, the best peer in the same run, and the ratio of the medians. In brackets the share of the rate of
    torch's own matrix product, where the run has timed one."""
    rows, (wanted, steps) = measured(folder), shown(folder)
    lines = ["| what | ours | torch | ratio |", "|---|---|---|---|"]
    for what, name in wanted.items():
        if name not in rows:
            continue
        row = rows[name]
        ours, peer = milliseconds(row["seconds"] * 1e3), milliseconds(min(row["peers"].values()) * 1e3)
        if "gemm_share" in row:
            ours += f" ({row['gemm_share']:.0%} of GEMM)"
        lines.append(f"| {what} | {ours} | {peer} | {row['ratio']:.2f} |")
    for name in steps:
        if (path := folder / f"{name}.json").exists():
            lines += step_lines(json.loads(path.read_text()))
    return "\n".join(lines)


def missing(folder: Path = RESULTS / DEVICE) -> list[str]:
    """Names of what the table would show and nobody has measured."""
    rows, (wanted, steps) = measured(folder), shown(folder)
    return [name for name in wanted.values() if name not in rows] + [
        name for name in steps if not (folder / f"{name}.json").exists()
    ]


def measured(folder: Path) -> dict[str, dict]:
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    # a profile's rows are parts of a step, which have no peers
    return {row["name"]: row for file in files for row in file.get("rows", []) if "peers" in row}


def step_lines(step: dict) -> list[str]:
    """One for each peer, and one for the step's matrix products alone, as if they were a peer."""
    settings, rates = step["settings"], {name: row["tokens_per_second"] for name, row in step["contenders"].items()}
    ours = rates.pop("cgpt")
    if "floor_seconds" in step:
        rates["its matrix products alone"] = settings["batch_size"] * settings["seq_len"] / step["floor_seconds"]
    what = "training step, {model}, {batch_size} x {seq_len} {precision}".format(**settings)
    if settings.get("isa"):
        what += f", both held to {settings['isa'].upper()}"
    return [
        f"| {what}, against {name} | {per_second(ours)} | {per_second(rate)} | {ours / rate:.2f} |"
        for name, rate in rates.items()
    ]


def milliseconds(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def per_second(tokens: float) -> str:
    return f"{tokens:.0f} tokens/s" if tokens >= 100 else f"{tokens:.3g} tokens/s"


if __name__ == "__main__":
    device = RESULTS / (sys.argv[1] if len(sys.argv) > 1 else DEVICE)
    if not device.is_dir():
        sys.exit(f"wanted one of {', '.join(sorted(p.name for p in RESULTS.glob('*-*')))}, got {device.name}")
    print(table(device))
    if absent := missing(device):
        print("not measured:", ", ".join(absent), file=sys.stderr)
