"""How a parameter's numbers are kept, and what they weigh; imports no torch.

    precision  working weights       master                              with moments in fp32, bf16: bytes an element
    bf16       bf16, the high half   int16, the low half: split master   2 + 2 + 8 = 12    2 + 2 + 4 = 8
    fp16       fp16, rounded         fp32                                2 + 4 + 8 = 14    2 + 4 + 4 = 10
    fp32       fp32, the master      none                                4 + 8     = 12    4 + 4     = 8

Moments in bf16 are rounded up or down at random, so that what a step adds below their last bit adds up on average
(csrc/adamw.h states how, and why exp_avg_sq would stand still otherwise).
"""

from __future__ import annotations

from dataclasses import dataclass

from cgpt.errors import InputError

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "int16": 2}  # bytes
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Format:
    """precision: "bf16", "fp16" or "fp32", of weights and activations. moments: "fp32" or "bf16", of the optimizer's.
    training: False for working weights alone. Raises InputError for any other."""

    precision: str = "bf16"
    moments: str = "fp32"
    training: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("precision", self.precision, DTYPES), ("moments", self.moments, ("fp32", "bf16"))):
            if value not in known:
                raise InputError(f"{name}: wanted one of {', '.join(known)}, got {value}")

    @property
    def sections(self) -> dict[str, str]:
        """What a record holds, in the order in which it lies, and the dtype of each."""
        found = {"working": DTYPES[self.precision]}
        if self.training:
            if self.precision == "bf16":
                found["low"] = "int16"
            if self.precision == "fp16":
                found["master"] = "float32"
            found |= dict.fromkeys(MOMENTS, DTYPES[self.moments])
        return found

    @property
    def working(self) -> int:
        """Bytes an element of the weights that a layer computes with."""
        return WIDTHS[DTYPES[self.precision]]

    @property
    def record(self) -> int:
        """Bytes an element of weights, masters and moments."""
        return sum(WIDTHS[dtype] for dtype in self.sections.values())

    @property
    def traffic(self) -> int:
        """Bytes an element that AdamW moves: the record read and written, the gradient read."""
        return 2 * self.record + self.working
