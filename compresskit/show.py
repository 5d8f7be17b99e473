"""For notebooks only: claims that can fail, and the book's figures."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib_inline.backend_inline import set_matplotlib_formats

# All of them read on white and on black.
INK = "#7d8590"
COLORS = ("#3b82c4", "#d9742b", "#3f9b6c", "#b05fb0", "#c0504d", "#8a8d2f")

RESULTS = Path(__file__).parents[1] / "book" / "results"

_started = time.perf_counter()


def claim(text: str, holds: bool) -> None:
    """Print a statement that was just checked, or stop the notebook.

    Parameters
    ----------
    text : a sentence about what was computed, with the numbers in it
    holds : whether it is true, a bool of Python, NumPy or torch

    Raises
    ------
    AssertionError : it is not
    TypeError : not a bool; a number would be true whatever it says, and so would NaN

    Examples
    --------
    >>> claim("2 + 2 = 4", 2 + 2 == 4)
    ✓ 2 + 2 = 4
    """
    holds = getattr(holds, "item", lambda: holds)()
    if not isinstance(holds, bool):
        raise TypeError(f"a claim holds or not; give a bool, not {holds!r}")
    if not holds:
        raise AssertionError(f"this claim is false: {text}")
    print(f"✓ {text}")


def style() -> None:
    """The book's figure style: vector graphics, transparent, legible on light and dark pages."""
    set_matplotlib_formats("svg")
    plt.rcParams.update(
        {
            "figure.figsize": (5, 3),
            "figure.dpi": 100,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLORS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "grid.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 10,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "svg.hashsalt": "compresskit",
            "font.size": 9,
        }
    )


def axes(
    xlabel: str,
    ylabel: str,
    *,
    rows: int = 1,
    columns: int = 1,
    figsize: tuple[float, float] | None = None,
) -> Axes:
    """Labeled axes in the book's size; an array of axes for more than one row or column."""
    figsize = figsize or (5 * min(columns, 1.5), 3 * min(rows, 2))
    _, ax = plt.subplots(rows, columns, figsize=figsize)
    for one in [ax] if rows == columns == 1 else ax.flat:
        one.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def plot(
    lines: Mapping[str, tuple[Sequence, Sequence]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Curves with their names written at their right ends instead of in a legend.

    Parameters
    ----------
    lines : mapping
        name -> (x values, y values); a name that starts with "_" is drawn but not written
    xlabel : str
        with its unit
    ylabel : str
        with its unit
    title : str
        optional
    ax : Axes
        draw here instead of in a new figure

    Returns
    -------
    the axes, for further marks
    """
    if ax is None:
        ax = axes(xlabel, ylabel)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for name, (x, y) in lines.items():
        (line,) = ax.plot(x, y)
        if not name.startswith("_"):
            label(ax, x[-1], y[-1], name, line.get_color())
    return ax


def label(ax: Axes, x: float, y: float, text: str, color: str = INK) -> None:
    """Write `text` beside the point (x, y), in the color of what it names."""
    ax.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", color=color, va="center")


def stored(name: str) -> list[dict]:
    """The records of a long run that `make results` stored, after a line that says which.

    Parameters
    ----------
    name : file in book/results without ".json", such as "03_soft_labels"

    Raises
    ------
    ValueError : no such file, or its records are not those whose checksum it holds
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RESULTS.glob("*.json")))
        raise ValueError(f"no stored run {name!r}; there are {known}; `make results` writes them")
    whole = json.loads(path.read_text())
    made, records = whole["made"], whole["records"]
    if hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest() != whole["sha256"]:
        raise ValueError(f"{path} was changed by hand; restore it with git, or run `make results`")
    print(
        f"stored: {len(records)} records of `{made['command']}`, {made['date']},"
        f" {made['seconds'] / 60:.0f} min on {made['machine']}"
    )
    return records


def cost() -> None:
    """Print the time since this module was imported and the process's largest memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 1024 if sys.platform == "linux" else 1024**2  # kilobytes there, bytes on a Mac
    seconds = time.perf_counter() - _started
    print(f"This page ran in {seconds:.0f} s and used at most {peak:.0f} MiB of memory.")
