"""How every picture begins and ends: no pyplot, so no global state and no window; written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from cgpt.errors import InputError
from cgpt.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

# Told apart by people with any kind of colour vision. Source: Okabe and Ito 2008, "Color Universal Design"; its yellow,
# too faint for a line on white, gives way to grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")


def blank(width: float, height: float) -> Figure:
    """A figure of so many inches, to be filled with axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes) -> None:
    """A faint grid, and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write(figure: Figure, path: Path) -> Path:
    """Writes what `path` ends in (FORMATS) and returns it. Raises OSError naming the file."""
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:])
    write_atomically(path, data.getvalue())
    return path


def check_plot(path: Path, flag: str = "--plot") -> None:
    """Raises InputError, naming the flag, unless `path` ends as a picture does and its folder is there."""
    if path.suffix not in FORMATS:
        raise InputError(f"{flag}: wanted a file ending in {', '.join(FORMATS)}, got {path}")
    if not path.parent.is_dir():
        raise InputError(f"{flag}: wanted a file in a folder that is there, got {path}")
