"""The book's figure style: one width, one look per method, reproducible SVG.

And one way of writing the numbers of a table's column.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Colours of Okabe and Ito (2008), told apart in every common form of colour blindness;
# dash and marker repeat the message without colour. The LGL2O paper draws L2O green and
# LGL2O red, so the nearest of the set are theirs here.
_GREEN, _RED, _BLUE = "#009E73", "#D55E00", "#0072B2"
_BLACK, _SKY, _ORANGE, _PURPLE = "#000000", "#56B4E9", "#E69F00", "#CC79A7"
_GREY = "#7F7F7F"

_METHODS: dict[str, tuple[str, Any, str]] = {
    "L2O": (_GREEN, "--", "o"),
    "LGL2O": (_RED, "-", "s"),
    "GL2O": (_BLUE, "-.", "^"),
    "SGD": (_BLACK, ":", "v"),
    "SGD+momentum": (_SKY, (0, (5, 1)), "D"),
    "Adam": (_ORANGE, (0, (3, 1, 1, 1)), "P"),
    "LGL2O reset": (_PURPLE, "-", "X"),
    "LGL2O reset, margin": (_BLUE, "-", "p"),
    "LGL2O reset, sequential": (_ORANGE, "-", "h"),
    "LGL2O reset, lazy": (_PURPLE, "-.", "d"),
    "LGL2O margin": (_GREY, "--", "*"),
    "LGL2O shadow": (_SKY, "-", "*"),
    "LGL2O shadow 1%": (_GREEN, "-", "d"),
    "LGL2O over SGD": (_RED, "-", "s"),
    "LGL2O over SGD+momentum": (_SKY, "-", "D"),
    "LGL2O over Adam": (_ORANGE, "-", "P"),
    "LGL2O with update": (_RED, "-", "s"),
    "LGL2O without update": (_ORANGE, "-", "D"),
    "SMG": (_SKY, "-.", "v"),
    "AMG": (_BLUE, "-", "^"),
    "AMG plain": (_PURPLE, "-.", "d"),
    "AMG frozen": (_GREY, "--", "*"),
    "STAR 0.5": (_BLUE, "-", "s"),
    "STAR 0.1": (_SKY, "-.", "v"),
    "STAR 0.1 held": (_BLACK, "-.", "X"),
    "STAR 0.1 stopped": (_GREY, "-.", "v"),
    "STAR 0.5 stopped": (_ORANGE, "--", "D"),
    "Blackbox held": (_PURPLE, "--", "X"),
    "Blackbox stopped": (_ORANGE, "--", "o"),
    "Blackbox": (_RED, "--", "o"),
    "Hyperparam": (_GREEN, "-", "^"),
    "STAR 0": (_ORANGE, "-", "*"),
    "no nominal term": (_PURPLE, "--", "X"),
    "no preconditioner": (_BLACK, "-.", "d"),
    "Adam 0.0003": (_BLACK, ":", "P"),
    "Adam 0.001": (_PURPLE, ":", "<"),
    "Adam 0.003": (_GREY, "--", "*"),
    "alpha=0": (_BLACK, "--", "*"),
    "alpha=0.1": (_PURPLE, ":", "<"),
    "alpha=0.2": (_SKY, "-", ">"),
    "alpha=0.3": (_GREEN, "-", "h"),
    "alpha=0.4": (_RED, "-.", "d"),
}
# What a chapter draws besides: five shades, darker than all of these but black and told
# apart in every common form of colour blindness, with dashes that no known method has.
_INDIGO, _BROWN, _MAGENTA = "#332288", "#8C510A", "#AA1188"
_FOREST, _VIOLET = "#0B4D2D", "#7722EE"
_LONG, _DOUBLE, _DENSE, _UNEVEN = (
    (0, (7, 2)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (1, 1)),
    (0, (5, 1, 2, 1)),
)
_OTHERS: list[tuple[str, Any, str]] = [
    (_INDIGO, _LONG, "<"),
    (_BROWN, _DOUBLE, "*"),
    (_MAGENTA, _DENSE, ">"),
    (_FOREST, _UNEVEN, "x"),
    (_VIOLET, _LONG, "p"),
    (_INDIGO, _DENSE, "1"),
    (_BROWN, _LONG, "d"),
    (_MAGENTA, _UNEVEN, "+"),
]
_given: dict[str, int] = {}

# Inches. At 72 points to the inch a page one column wide shows these unscaled; a
# telephone of 375 px shows the narrow one at two thirds, with the text still legible.
_NARROW, _WIDE = 5.2, 7.2

PALE = {"linewidth": 6.0, "linestyle": "-", "alpha": 0.35, "marker": "", "zorder": 1.9}
"""Added to a `style`: a curve wide and pale, below others that coincide with it."""


def use_style() -> None:
    """Set matplotlib's defaults to the book's, and forget styles given to new names.

    In a notebook, figures become SVG without a date: the same figure is the same file.
    """
    import matplotlib as mpl

    _given.clear()
    mpl.rcParams.update(
        {
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "grid.alpha": 0.3,
            "grid.linewidth": 0.6,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "savefig.bbox": None,
            "svg.fonttype": "path",
            "svg.hashsalt": "l2olib",
        }
    )
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from matplotlib.figure import Figure
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats(
            "svg", bbox_inches=None, metadata={"Creator": None, "Date": None}
        )
        formatter = ipython.get_ipython().display_formatter.formatters["image/svg+xml"]
        draw = formatter.for_type(Figure)
        formatter.for_type(Figure, lambda fig: compact(draw(fig)))


def compact(svg: str) -> str:
    """Return the same drawing in little more than half the bytes.

    Comments and line ends go (a notebook stores each line as a string of its own), ids
    become short or, where nothing refers to them, vanish, and coordinates keep two
    decimals, a hundredth of a point. Glyphs, which are scaled when they are used, have
    whole coordinates and do not change.
    """

    def rounded(match: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", match[0])

    reference = r'(?<=href="#)[^"]+|(?<=url\(#)[^)]+'
    # some readers put all drawings of a notebook on one page: ids differ by drawing
    mark = f"{zlib.crc32(svg.encode()) % 4096:03x}"
    names: dict[str, str] = {}
    for each in re.findall(reference, svg):
        names.setdefault(each, f"i{mark}{len(names)}")
    svg = re.sub(reference, lambda match: names[match[0]], svg)
    svg = re.sub(
        r' id="([^"]*)"',
        lambda match: f' id="{names[match[1]]}"' if match[1] in names else "",
        svg,
    )
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<=\s)(?:d|x|y|points)="[^"]*"', rounded, svg)
    svg = re.sub(
        r'(?<=\sd=")[^"]*', lambda d: re.sub(r"\s*([A-Za-z])\s*", r"\1", d[0]), svg
    )
    svg = re.sub(r'(?<=style=")[^"]*', lambda s: re.sub(r"([;:])\s+", r"\1", s[0]), svg)
    return re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").strip()


def figure(
    rows: int = 1, cols: int = 1, height: float = 3.0, **subplots: Any
) -> tuple[Figure, Any]:
    """Open a figure of the book's width with `rows` x `cols` axes.

    height: inches of one row. `subplots`: further arguments of `pyplot.subplots`, such
    as ``sharey=True``. Returns the figure and its axes: one `Axes` for a single panel,
    otherwise an array of them.
    """
    import matplotlib.pyplot as plt

    width = _NARROW if cols == 1 else _WIDE
    return plt.subplots(rows, cols, figsize=(width, height * rows), **subplots)


def style(method: str) -> dict[str, Any]:
    """Return the arguments of `Axes.plot` that mark a method in every figure.

    Known names have a fixed colour, dash and marker. A new name gets the next spare
    style, which no known one resembles, and keeps it until `use_style` (or
    `chapters.begin`) is called.
    """
    if method in _METHODS:
        color, dash, marker = _METHODS[method]
    else:
        place = _given.setdefault(method, len(_given))
        color, dash, marker = _OTHERS[place % len(_OTHERS)]
    return {"color": color, "linestyle": dash, "marker": marker, "markevery": 0.12}


def few_ticks(axis: Axis) -> None:
    """Label a logarithmic axis that spans few decades 0.1, 0.2, 0.5, 1, and no more."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def band(
    ax: Axes,
    steps: ArrayLike,
    values: ArrayLike,
    name: str,
    center: Literal["mean", "median"] = "mean",
) -> None:
    """Draw the mean (or median) over seeds as a line and their range as a band.

    steps: shape (points,). values: shape (seeds, points). Where a seed is not finite
    the line and the band have a gap, because a mean of the others would hide it.

    Raises ValueError if the shapes disagree.
    """
    steps, values = np.asarray(steps), np.asarray(values)
    if values.ndim != 2 or steps.shape != values.shape[1:]:
        raise ValueError(
            f"values of shape {values.shape} do not fit steps of shape {steps.shape}: "
            "values must be (seeds, points) and steps (points,)."
        )
    values = np.where(np.isfinite(values).all(axis=0), values, np.nan)
    look = style(name)
    middle = getattr(np, center)(values, axis=0)
    ax.plot(steps, middle, label=name, **look)
    ax.fill_between(
        steps,
        values.min(axis=0),
        values.max(axis=0),
        color=look["color"],
        alpha=0.2,
        linewidth=0,
    )


AXES = {"steps": "step", "work": "work (FLOP)", "seconds": "processor time (s)"}
"""What a training can be drawn against, and how that axis is labelled."""


def progress(arrays: Mapping[str, Any], steps: Any, against: str = "steps") -> Any:
    """``steps`` of a method as a place on one of `AXES`: itself, or what they cost.

    arrays: one method's, as `experiments.curves` gives them (``flops`` and measured
    ``seconds`` of a step and seed; where a method changes for good, ``turn``).
    """
    if against not in AXES:
        raise ValueError(f"against must be one of {', '.join(AXES)}, not {against!r}")
    if against == "steps":
        return steps
    if against == "work" and "turn" in arrays:
        at, before, after = arrays["turn"][0].tolist()
        return steps.clip(max=at) * before + (steps - at).clip(min=0) * after
    return steps * float(arrays["flops" if against == "work" else "seconds"].mean())


def comparison(
    curves: Mapping[str, Mapping[str, Any]],
    methods: Iterable[str],
    deciding: str,
    against: str = "steps",
) -> None:
    """Draw the training losses of ``methods``, and below, who decided in one guard.

    curves: arrays by method, as `experiments.curves` gives them. ``deciding`` is the
    guard whose share of accepted proposals is shown (1: all, 0: none); ``against`` one
    of `AXES`. Of more than 150 recorded points every other one is drawn.
    """
    _, (top, low) = figure(2, 1, height=2.7, sharex=True)

    def thin(x: Any, y: Any) -> tuple[Any, Any]:
        every = 1 + (len(x) > 150)
        return x[::every], y[:, ::every]

    for name in methods:
        at = progress(curves[name], curves[name]["steps"], against)
        band(top, *thin(at, curves[name]["smooth"]), name)
    top.set(xscale="log", yscale="log", ylabel="training loss (nat)")
    top.legend(ncols=2)
    guard = curves[deciding]
    interval = int(guard["steps"][-1]) // int(guard["decisions"][-1])
    at = progress(guard, guard["decisions"] * interval, against)
    band(low, *thin(at, guard["use_l2o"]), deciding)
    low.set(
        xlabel=AXES[against],
        ylabel=f"share of decisions\n{deciding} gives to the L2O",
        ylim=(-0.05, 1.05),
    )


def diagram(
    ax: Axes,
    boxes: dict[str, tuple[float, float, str]],
    arrows: list[tuple[str, str, str]],
) -> None:
    """Draw boxes joined by arrows, in axes of the unit square without frame.

    boxes: name -> (x, y, text) of its centre; arrows: (from, to, label) by name.
    """
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    drawn = {
        name: ax.text(
            x, y, text, ha="center", va="center", bbox={"fc": "white", "pad": 5}
        )
        for name, (x, y, text) in boxes.items()
    }
    for start, end, label in arrows:
        ax.annotate(
            "",
            xy=boxes[end][:2],
            xytext=boxes[start][:2],
            arrowprops={
                "arrowstyle": "->",
                "patchA": drawn[start].get_bbox_patch(),
                "patchB": drawn[end].get_bbox_patch(),
            },
        )
        if label:
            x, y = (np.add(boxes[start][:2], boxes[end][:2])) / 2
            ax.text(x, y + 0.06, label, ha="center")


def one_format(text: str, digits: int = 3) -> str:
    """Give the numbers of each column of the Markdown tables in ``text`` one format.

    Tables of measured numbers with ``digits`` significant digits, as ``f"{x:.3g}"``
    writes them. If one of a column is like 9.95e-05, all become powers of ten
    (9.95·10⁻⁵ and 1.23·10⁻⁴), which no line break parts; 1.73e+03 becomes 1,730. Zeros
    that ``g`` dropped at the end come back. Names (the first column), percentages and
    columns of whole numbers stay.

    Raises ValueError if the rows of a table differ in length.
    """
    number = re.compile(r"(?<![\w.,·])-?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w%·]|[.,]\d)")

    def column(cells: list[str]) -> list[str]:
        found = [n for cell in cells[2:] for n in number.findall(cell)]
        if not any("." in n or "e" in n for n in found):
            return cells
        power = any("e-" in n for n in found)
        body = [
            number.sub(lambda n: _digits(n[0], digits, power), c) for c in cells[2:]
        ]
        return [*cells[:2], *body]

    def table(match: re.Match[str]) -> str:
        rows = [line.split("|") for line in match[0].splitlines()]
        edge, names, *rest = (list(cells) for cells in zip(*rows, strict=True))
        columns = [edge, names, *map(column, rest)]
        return "\n".join("|".join(row) for row in zip(*columns, strict=True))

    return re.sub(r"^\|.*(?:\n\|.*)*", table, text, flags=re.MULTILINE)


def _digits(number: str, digits: int, power: bool) -> str:
    """Write a number with so many significant digits, as a power of ten or without."""
    if not float(number):
        return "0"
    mantissa, exponent = f"{float(number):.{digits - 1}e}".split("e")
    if power:
        raised = str(int(exponent)).translate(
            str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
        )
        return f"{mantissa}·10{raised}"
    return f"{float(number):,.{max(digits - 1 - int(exponent), 0)}f}"
