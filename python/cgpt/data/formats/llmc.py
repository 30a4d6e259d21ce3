"""llm.c's `.bin`: a header of 256 int32, then the ids. All little-endian; documents are told by EOT alone.

    header: magic 20240520, version 1 (uint16 ids) or magic 20240801, version 7 (uint32 ids); then the count of ids

Read as two uint16, either magic holds an id past GPT-2's vocabulary, so no nanoGPT file can look like one of these. The
count is an int32: more ids take several files, which llm.c's loader opens as one in the order of their names.

Source: `dev/data/data_common.py` and `llmc/dataloader.h` of github.com/karpathy/llm.c.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cgpt.data.formats.token_file import Stream, TokenFile, expect
from cgpt.errors import InputError

HEADER_BYTES = 1024
KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, dtype of the ids
FILE_TOKENS = 10**8  # as llm.c's own scripts cut


def is_llmc(path: Path) -> bool:
    """Whether `path` begins with one of the magics."""
    header = np.fromfile(path, dtype="<i4", count=3)
    return len(header) == 3 and int(header[0]) in KINDS


def read(path: Path) -> TokenFile:
    """Maps `path`. Raises InputError where version or size are not what its header says, or it holds no ids."""
    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    known, dtype = KINDS[magic]
    expect(path, f"llm.c format {magic} version", known, version)
    wanted, size = HEADER_BYTES + count * np.dtype(dtype).itemsize, path.stat().st_size
    expect(path, f"bytes for the {count} tokens of its header:", wanted, size)
    if count < 1:
        raise InputError(f"{path}: wanted tokens, got an empty file")
    return TokenFile([np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)], None)


def write(folder: Path, name: str, stream: Stream) -> None:
    """Writes `folder`/`name`_000000.bin and on, uint16 where the vocabulary allows it."""
    magic, (version, dtype) = list(KINDS.items())[stream.vocab_size > 1 << 16]
    for number, start in enumerate(range(0, stream.n_tokens, FILE_TOKENS)):
        stop = min(start + FILE_TOKENS, stream.n_tokens)
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = magic, version, stop - start
        with (folder / f"{name}_{number:06d}.bin").open("wb") as file:
            file.write(header)
            stream.write(file, dtype, start, stop)
