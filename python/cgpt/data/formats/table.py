"""Which format a token file is of, and the formats by name."""

from __future__ import annotations

from pathlib import Path

from cgpt.data.formats import datatrove, llmc, megatron, nanogpt
from cgpt.data.formats.token_file import TokenFile

WRITERS = {"nanogpt": nanogpt.write, "llmc": llmc.write, "megatron": megatron.write, "datatrove": datatrove.write}
SUFFIXES = (".bin", ".idx", ".ds")
DATA = (".bin", ".ds")  # those that hold ids; .idx goes with a .bin


def token_files(folder: Path) -> list[Path]:
    """The token files of `folder`, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in DATA and path.is_file())


def read_token_file(path: Path) -> TokenFile:
    """Opens a `.bin`, `.idx` or `.ds`. A `.bin` with an `.idx` beside it is Megatron's. Raises InputError as its
    format's `read` does."""
    if path.suffix == ".ds":
        return datatrove.read(path)
    if path.suffix == ".idx" or path.with_suffix(".idx").exists():
        return megatron.read(path)
    return llmc.read(path) if llmc.is_llmc(path) else nanogpt.read(path)
