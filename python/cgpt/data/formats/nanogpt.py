"""nanoGPT's `.bin`: bare little-endian uint16, each document followed by EOT, and neither header nor index.

Source: `data/openwebtext/prepare.py` and `train.py` of github.com/karpathy/nanoGPT.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cgpt.data.formats.token_file import Stream, TokenFile
from cgpt.errors import InputError

DTYPE = "<u2"


def read(path: Path) -> TokenFile:
    """Maps `path`. Raises InputError for an empty file or one of an odd size."""
    size = path.stat().st_size
    if size % 2:
        raise InputError(f"{path}: wanted uint16 tokens, an even number of bytes, got {size}")
    if not size:
        raise InputError(f"{path}: wanted tokens, got an empty file")
    return TokenFile([np.memmap(path, dtype=DTYPE, mode="r")], None)


def write(folder: Path, name: str, stream: Stream) -> None:
    """Writes `folder`/`name`.bin. Raises InputError for ids past uint16."""
    with (folder / f"{name}.bin").open("wb") as file:
        stream.write(file, DTYPE)
