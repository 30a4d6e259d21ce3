"""`cgpt import` and `cgpt export`: what they say."""

from __future__ import annotations

from cgpt.interchange.exporting import export
from cgpt.interchange.flags import Export, Import
from cgpt.interchange.importing import import_


def run_import(command: Import) -> None:
    """Runs the command. Raises as `import_`."""
    made = import_(command.path, command.out, command.precision)
    told = f"{made.parameters:,} parameters, vocabulary of {made.vocab_size:,}, computes in {made.precision}"
    print(f"{made.run}: {told}")
    print(f"next     cgpt generate {made.run}; cgpt eval {made.run} --data DATA; cgpt train --init {made.run}")


def run_export(command: Export) -> None:
    """Runs the command. Raises as `export`."""
    made = export(command.path, command.out, command.dtype, command.shard_size)
    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    how = ", its factors folded into the weights" if made.folded else ""
    print(f"{made.folder}: {made.parameters:,} parameters in {command.dtype}, {files}{how}")
