"""The thin trainer: text goes in one door, a trained GPT comes out of the other.

`cgpt.load(PATH)` opens a run or a Hugging Face folder as a torch module; `cgpt.import_(HF_DIR, RUN)` and
`cgpt.export(RUN, HF_DIR)` are what the commands run. Each is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cgpt.interchange.exporting import export
    from cgpt.interchange.importing import import_
    from cgpt.interchange.weights import load

__all__ = ["export", "import_", "load"]

_HOMES = {"export": "exporting", "import_": "importing", "load": "weights"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'cgpt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"cgpt.interchange.{_HOMES[name]}"), name)
