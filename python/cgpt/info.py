"""`cgpt info`: the presets, then what `python -m cgpt_ext` says of this machine."""

from __future__ import annotations

from cgpt.info_flags import Info
from cgpt.model.presets import PRESETS, Preset


def info(command: Info) -> int:
    """Prints it; returns the exit code of `python -m cgpt_ext`."""
    from cgpt_ext.__main__ import run

    presets = {name: row(preset) for name, preset in PRESETS.items()}
    if not command.json:
        print(f"{'preset':8} {'parameters':>14}  layers  width  heads  d_head  positions")
        for name, found in presets.items():
            print(
                f"{name:8} {found['parameters']:14,}  {found['n_layer']:6}  {found['d_model']:5}  {found['n_head']:5}  "
                f"{found['d_head']:6}  {found['seq_len']:9}"
            )
        print(flush=True)
    return run(command.check, command.json, presets=presets)


def row(preset: Preset) -> dict:
    """A preset as JSON takes it."""
    return {
        "parameters": preset.config.n_params,
        **preset.config.to_dict(),
        "steps": preset.steps,
        "tokens": preset.tokens,
        "batch_schedule": preset.batch_schedule,
        "lr": preset.lr,
        "warmup_tokens": preset.warmup_tokens,
        "decay": preset.decay,
    }
