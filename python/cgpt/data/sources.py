"""Where text comes from: files, folders, the hub and built-in corpora, read as one ordered stream of documents.

A `.txt` file is one document, a `.jsonl` line with a `text` field is one, a row of a parquet or Arrow file (tables.py)
is one, a Python source file is one. The order is fixed (sources as given, folders sorted by relative path): the stream
is the same on every machine. Every reader is a generator over bounded chunks: a file larger than memory passes through.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import lzma
import os
import re
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cgpt.data.hub import PREFIX, HubCorpus, find_on_hub
from cgpt.data.tables import TABLE_KINDS, read_table, saved_files
from cgpt.errors import InputError

BUILT_IN = ("moby-dick", "python-stdlib")
PACKINGS = (".gz", ".xz", ".zst")
TEXT_KINDS = (".txt", ".jsonl")  # and TABLE_KINDS, which are packed within
TEXT_FIELD = "text"

CHUNK = 1 << 20  # bytes of plain text read at once
ZST_CHUNK = 1 << 16  # bytes of a .zst read at once: all that they inflate to comes in one piece
NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
DAMAGE = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)

# GPT-2's pattern never matches across the start of a run of white space, and looks ahead only inside such a
# run. So text cut just before one gives the same tokens in two parts as in one.
SAFE_CUT = re.compile(r"(?<=\S)[ \n]")


class Piece(NamedTuple):
    """A whole document, or a part of a long one that gives the same tokens apart from the rest."""

    text: str
    ends_document: bool
    consumed: int  # bytes on disk read so far


@dataclass(frozen=True)
class Corpus:
    """The files of one source, in reading order. `name` enters the dataset's metadata: it holds no folder."""

    name: str
    root: Path
    files: tuple[Path, ...]
    python: bool = False
    ignored: int = 0  # files of the folder whose suffix is not one of text
    text_field: str = TEXT_FIELD

    @property
    def where(self) -> Path:
        """The file or folder to name in messages."""
        return self.files[0] if len(self.files) == 1 else self.root

    def fingerprint(self) -> str:
        """sha256 (hex) over the name and every file's relative path, size and modification time."""
        field = "" if self.text_field == TEXT_FIELD else f"\0{self.text_field}"
        digest = hashlib.sha256((self.name + field).encode("utf-8", "surrogateescape"))
        for path in self.files:
            stat = path.stat()
            row = [str(path.relative_to(self.root)), stat.st_size, stat.st_mtime_ns]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def size(self) -> int:
        """Bytes on disk of all files."""
        return sum(path.stat().st_size for path in self.files)


def find(source: str | Path, text_field: str = TEXT_FIELD) -> Corpus | HubCorpus:
    """The corpus behind a built-in name, a text file, a folder of text files (searched recursively), a folder that
    Hugging Face's `save_to_disk` wrote, or `hf:NAME[:SPLIT]`.

    text_field: of JSON lines and tables. A built-in name wins over a file of that name: `./moby-dick` means the file.
    Raises InputError where nothing is there, the suffix is unknown, a file is empty, or a folder holds no text.
    """
    if str(source).startswith(PREFIX):
        return find_on_hub(str(source), text_field)
    if source == "moby-dick":
        assets = Path(__file__).parent / "assets"
        return Corpus("moby-dick", assets, (assets / "moby_dick.jsonl.xz",))
    if source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = tuple(path for path in _walk(root, NOT_LIBRARY) if path.suffix == ".py")
        if not files:
            raise InputError(f"{root}: wanted the standard library's .py sources, got none")
        return Corpus("python-stdlib", root, files, python=True)

    path = Path(source)
    wanted = f"{' or '.join(TEXT_KINDS)} (plain or {', '.join(PACKINGS)}) or {' or '.join(TABLE_KINDS)}"
    if path.is_dir():
        if (saved := saved_files(path)) is not None:
            return Corpus(path.resolve().name, path, saved, text_field=text_field)
        everything = _walk(path)
        files = tuple(each for each in everything if _is_text(each))
        if not files:
            raise InputError(f"{path}: wanted a folder of {wanted} files, got {len(everything)} others")
        return Corpus(path.resolve().name, path, files, ignored=len(everything) - len(files), text_field=text_field)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; wanted one, or a corpus of {', '.join(BUILT_IN)}")
    if not _is_text(path):
        raise InputError(f"{path}: wanted a {wanted} file, got the suffix {''.join(path.suffixes[-2:])!r}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: wanted text, got an empty file")
    return Corpus(path.name, path.parent, (path,), text_field=text_field)


def read(corpus: Corpus | HubCorpus, skipped: Counter[str]) -> Iterator[Piece]:
    """All pieces of `corpus` in order, none of them empty; what was passed over is counted in `skipped`.

    Raises InputError for text that is not UTF-8 or holds NUL bytes, JSON lines and rows without a string `text`, and
    archives and tables that are damaged; OSError where a file cannot be read.
    """
    if isinstance(corpus, HubCorpus):
        yield from (Piece(text, True, 0) for text in corpus.texts(skipped))
        return
    if corpus.ignored:
        skipped["files of other kinds"] += corpus.ignored
    finished = 0
    for path in corpus.files:
        pieces = _python_file(path, skipped) if corpus.python else _text_file(path, corpus.text_field)
        for text, ends_document, consumed in pieces:
            if text:
                yield Piece(text, ends_document, finished + consumed)
            else:
                skipped["empty documents"] += 1
        finished += path.stat().st_size


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Files under `root`, but hidden ones and folders named in `skip`, sorted by the parts of their path."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _kind(path: Path) -> tuple[str, str]:
    """(suffix of the text, suffix of the packing or ""), lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
    return (suffixes[-1] if suffixes else ""), packing


def _is_text(path: Path) -> bool:
    kind, packing = _kind(path)
    return kind in TEXT_KINDS or (kind in TABLE_KINDS and not packing)


def _python_file(path: Path, skipped: Counter[str]) -> Iterator[Piece]:
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):  # some sources declare a wrong encoding on purpose
        skipped["undecodable files"] += 1
    else:
        yield Piece(text, True, path.stat().st_size)


def _text_file(path: Path, text_field: str) -> Iterator[Piece]:
    kind, packing = _kind(path)
    if kind in TABLE_KINDS:
        yield from (Piece(*row) for row in read_table(path, text_field))
        return
    with path.open("rb") as raw:
        chunks = _unpacked(path, raw, packing)
        for text, ends_document in _txt(path, chunks) if kind == ".txt" else _jsonl(path, chunks, text_field):
            yield Piece(text, ends_document, raw.tell())


def _unpacked(path: Path, raw: BinaryIO, packing: str) -> Iterator[bytes]:
    """The plain bytes of a file in chunks. Raises InputError for a damaged archive."""
    try:
        if packing == ".zst":
            yield from _inflate_zst(path, raw)
        else:
            openers = {"": nullcontext, ".gz": lambda file: gzip.GzipFile(fileobj=file), ".xz": lzma.LZMAFile}
            with openers[packing](raw) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
    except DAMAGE as error:
        raise InputError(f"{path}: wanted a whole {packing} archive, got a damaged one: {error}") from error


def _inflate_zst(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, because zstandard's own stream reader takes a truncated file for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        message = f"{path}: wanted the zstandard package to read .zst, got none: pip install 'cgpt-ext[data]'"
        raise InputError(message) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # what `zstd --long=31` writes
    frame = None
    try:
        while packed := raw.read(ZST_CHUNK):
            while packed:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame:
        raise EOFError("it ends inside a frame")


def _txt(path: Path, chunks: Iterable[bytes]) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, offset = "", 0
    for chunk in chunks:
        _refuse_nul(path, chunk, offset)
        offset += len(chunk)
        fresh = _decoded(path, decoder.decode, chunk, offset)
        cut = SAFE_CUT.search(held + fresh, len(held)) if held else None
        held += fresh
        if cut:
            yield held[: cut.start()], False
            held = held[cut.start() :]
    yield held + _decoded(path, lambda rest: decoder.decode(rest, final=True), b"", offset), True


def _jsonl(path: Path, chunks: Iterable[bytes], text_field: str) -> Iterator[tuple[str, bool]]:
    offset = 0
    for number, line in enumerate(_lines(chunks), start=1):
        _refuse_nul(path, line, offset)
        offset += len(line)
        plain = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        row = _decoded(path, bytes.decode, plain, offset)
        if row.strip():
            yield _field_of(f"{path}:{number}", row, text_field), True


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their newline."""
    parts: list[bytes] = []
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join(parts) + line + b"\n"
            parts = []
        parts.append(rest)
    if any(parts):
        yield b"".join(parts)


def _field_of(where: str, row: str, name: str) -> str:
    wanted = f'wanted a JSON object with a string field "{name}"'
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {wanted}, got no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {wanted}, got a JSON {type(value).__name__}")
    if not isinstance(value.get(name), str):
        got = f"a {type(value[name]).__name__}" if name in value else f"the fields {sorted(value)[:8]}"
        raise InputError(f"{where}: {wanted}, got {got}")
    text = value[name]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: wanted Unicode text, got half a surrogate pair: {text[error.start]!r}") from error
    return text


def _refuse_nul(path: Path, data: bytes, offset: int) -> None:
    if (at := data.find(b"\0")) >= 0:
        raise InputError(f"{path}: wanted text, got binary data (a NUL byte at byte offset {offset + at})")


def _decoded(path: Path, decode, data: bytes, end: int) -> str:
    """`decode(data)`, where `data` ends at byte `end` of the plain text."""
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        # error.object is what the decoder had in hand: the end of `data`, with what it had kept from before.
        at = end - len(error.object) + error.start
        got = error.object[error.start]
        raise InputError(f"{path}: wanted UTF-8 text, got byte 0x{got:02x} at byte offset {at}") from error
