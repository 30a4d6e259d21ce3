"""The README's table of trainers, from bench/results/integrations.json: `python bench/integrations.py`.

`--write` first runs the trainers' tests, tests/integrations, and keeps what they found. Each trains ten steps of a tiny
model with and without our parts on a CPU and counts our kernels' calls. A trainer that is not here keeps the row it
had: CGPT_NANOGPT names a checkout of nanoGPT, CGPT_LITGPT_PYTHON and CGPT_TORCHTITAN_PYTHON the interpreters of
environments that have those (their tests, skipped, say how to make one). tests/integrations/test_table.py holds the
README to the table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "integrations.json"

# trainer, as its test calls it -> (what the README calls it, how our parts get into it)
ROWS = {
    "transformers": ("transformers", "`apply_cgpt_kernels_to_gpt2()`, `Trainer(optimizer_cls_and_kwargs=(AdamW, {}))`"),
    "lightning": ("Lightning", "`cgpt_ext.nn` modules, `AdamW` from `configure_optimizers`"),
    "lightning Fabric": ("Lightning Fabric", "`fabric.setup(model, AdamW(model.parameters()))`"),
    "accelerate": ("Accelerate", "`accelerator.prepare(model, AdamW(model.parameters()), loader)`"),
    "nanoGPT": ("nanoGPT, unmodified", "`python -m cgpt_ext.integrations.nanogpt train.py ...`"),
    "litgpt": ("LitGPT", "`python -m cgpt_ext.integrations.litgpt pretrain ... --optimizer cgpt_ext.optim.AdamW`"),
    "torchtitan": ("torchtitan", "`--override.imports cgpt_ext.integrations.torchtitan.{attention,adamw}`"),
}


def table() -> str:
    """Markdown: trainer, version, how, the parts that ran, and the largest difference of a loss over the steps."""
    found = {row["trainer"]: row for row in json.loads(RESULTS.read_text())}
    lines = ["| trainer | with one line | parts | loss differs by |", "|---|---|---|---|"]
    for trainer, (name, how) in ROWS.items():
        if trainer in found:
            row = found[trainer]
            version = "" if "sha256" in row["version"] else f" {row['version']}"
            lines.append(f"| {name}{version} | {how} | {', '.join(row['parts'])} | {row['largest_difference']:.0e} |")
    return "\n".join(lines)


def write(lines: list[dict]) -> None:
    """One row a trainer, the largest difference of its tests; rows of trainers that did not run stay."""
    rows = {row["trainer"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    unknown = {row["trainer"] for row in lines} - ROWS.keys()
    if unknown:
        raise ValueError(f"integrations: trainers must be of ROWS, got {', '.join(sorted(unknown))}")
    fresh = {}
    for row in lines:
        before = fresh.setdefault(row["trainer"], row)
        if row["largest_difference"] > before["largest_difference"]:
            fresh[row["trainer"]] = row
    rows.update(fresh)
    text = ",\n".join(json.dumps(rows[trainer]) for trainer in ROWS if trainer in rows)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(f"[\n{text}\n]\n")
    temporary.replace(RESULTS)


def run() -> list[dict]:
    """What the trainers' tests found, a line each."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "found.jsonl"
        record.touch()
        tests = ["tests/integrations", "--ignore=tests/integrations/test_table.py"]  # that one reads what these write
        command = [sys.executable, "-m", "pytest", "-n0", "-q", "-rs", *tests]  # alone: some are timed
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CGPT_RECORD": str(record)}, check=False)
        if done.returncode:
            sys.exit(
                f"integrations: wanted the trainers' tests to pass, got exit code {done.returncode}; wrote nothing"
            )
        return [json.loads(line) for line in record.read_text().splitlines()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="run the trainers' tests and keep what they found")
    if parser.parse_args(argv).write:
        write(run())
    print(table())


if __name__ == "__main__":
    main()
