"""Text in columns: parquet and Arrow files, and folders that Hugging Face's `Dataset.save_to_disk` wrote.

One row of the text column is one document. Rows come a few thousand at a time, whatever the size of a row group, and
every batch is validated before a byte of it is read: a damaged file ends in a message, not in a crash. Rows are
numbered from 0, as pyarrow and pandas do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cgpt.errors import InputError

if TYPE_CHECKING:
    import pyarrow

TABLE_KINDS = (".parquet", ".arrow")
ROWS = 1024  # read at once: web pages, so a few megabytes
BUFFER = 1 << 20  # bytes of a column chunk read at once
STATE, SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk leaves of a dataset and of a dict of them


def saved_files(folder: Path) -> tuple[Path, ...] | None:
    """The Arrow files, in order, of what `save_to_disk` left in `folder`; None where it holds something else.

    A dict of datasets is its one split. Raises InputError where it has several, or the folder is damaged.
    """
    if (folder / SPLITS).is_file():
        splits = _listed(folder / SPLITS, lambda content: content["splits"])
        if len(splits) != 1:
            wanted = f"wanted one split, as {folder / splits[0]}" if splits else "wanted a split"
            raise InputError(f"{folder}: {wanted}, got the dataset's {', '.join(splits) or 'none'}")
        folder = folder / splits[0]
        if not (folder / STATE).is_file():
            raise InputError(f"{folder / STATE}: no such file; wanted the split that {SPLITS} names")
    elif not (folder / STATE).is_file():
        return None
    names = _listed(folder / STATE, lambda content: [file["filename"] for file in content["_data_files"]])
    files = tuple(folder / name for name in names)
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file; wanted what {folder / STATE} names")
    if not files:
        raise InputError(f"{folder / STATE}: wanted Arrow files, got none")
    return files


def _listed(path: Path, names) -> list[str]:
    try:
        found = names(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: wanted what save_to_disk writes, got a damaged file ({error!r})") from error
    if not isinstance(found, list) or not all(isinstance(name, str) and Path(name).name == name for name in found):
        raise InputError(f"{path}: wanted names in its folder, got {found!r}")
    return found


def read_table(path: Path, text_field: str) -> Iterator[tuple[str, bool, int]]:
    """(text, True, bytes of the file read so far) of each row.

    Raises InputError without the pyarrow package, for a damaged file, one without a text column of that name, and
    rows, which are named, that are null or no UTF-8.
    """
    try:
        import pyarrow
    except ImportError as error:
        wanted = f"wanted the pyarrow package to read {path.suffix}"
        raise InputError(f"{path}: {wanted}, got none: pip install 'cgpt-ext[data]'") from error
    batches = _parquet(path, text_field) if path.suffix.lower() == ".parquet" else _arrow(path, text_field)
    row = 0
    try:
        for column, consumed in batches:
            for text in _checked(column):
                yield _text(path, row, text), True, consumed
                row += 1
    except (pyarrow.ArrowException, MemoryError) as error:  # a length that lies may ask for more than there is
        raise InputError(f"{path}: wanted a whole {path.suffix} file, got a damaged one: {_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{path}: wanted a whole {path.suffix} file, got a damaged one: {_line(error)}") from error


def _parquet(path: Path, text_field: str) -> Iterator[tuple[pyarrow.Array, int]]:
    from pyarrow import parquet

    size, done = path.stat().st_size, 0
    with path.open("rb") as raw, parquet.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False) as file:
        _check_column(path, file.schema_arrow, text_field)
        total = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(ROWS, columns=[text_field], use_threads=False):
            done += batch.num_rows
            yield batch.column(0), size * done // total


def _arrow(path: Path, text_field: str) -> Iterator[tuple[pyarrow.Array, int]]:
    import pyarrow

    with path.open("rb") as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        with pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw) as reader:
            _check_column(path, reader.schema, text_field)
            place = reader.schema.get_field_index(text_field)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                column = batch.column(place)
                column.validate()  # that it may be sliced
                for start in range(0, len(column), ROWS):
                    yield column.slice(start, ROWS), raw.tell()


def _check_column(path: Path, schema: pyarrow.Schema, text_field: str) -> None:
    from pyarrow import types

    wanted = f"wanted one text column {text_field!r} (--text-field names another)"
    if schema.names.count(text_field) != 1:
        raise InputError(f"{path}: {wanted}, got the columns {', '.join(schema.names[:12]) or 'of none'}")
    kind = schema.field(text_field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise InputError(f"{path}: {wanted}, got one of {kind}")


def _checked(column: pyarrow.Array) -> pyarrow.Array:
    """`column`, once every offset of it is known to lie within its buffers. Raises ArrowInvalid."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    # As bytes: whether they are UTF-8 is asked row by row, so that the row can be named.
    kinds = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    column.view(kinds.get(column.type, pyarrow.binary_view())).validate(full=True)
    return column


def _text(path: Path, row: int, value: pyarrow.Scalar) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at byte {error.start} of it"
        raise InputError(f"{path}: row {row}: wanted UTF-8 text, got {got}") from error
    if text is None:
        raise InputError(f"{path}: row {row}: wanted text, got null")
    return text


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
