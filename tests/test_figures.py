"""Figures are reproducible, and methods can be told apart without colour."""

import io
import re
from collections.abc import Iterator
from typing import Literal
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from l2olib import figures

KNOWN = ("L2O", "LGL2O", "GL2O", "SGD", "SGD+momentum", "Adam")


@pytest.fixture(autouse=True)
def book_style() -> Iterator[None]:
    """Use the book's style without a display; leave matplotlib as it was."""
    with mpl.rc_context():
        plt.switch_backend("agg")
        figures.use_style()
        yield
        plt.close("all")


def drawing(name: str = "L2O") -> bytes:
    """Draw a band for `name` and return the SVG file."""
    fig, ax = figures.figure()
    figures.band(ax, np.arange(1, 9), np.arange(24.0).reshape(3, 8), name)
    ax.set(title="loss $F$", xscale="log")
    ax.legend()
    file = io.BytesIO()
    fig.savefig(file, format="svg", metadata={"Creator": None, "Date": None})
    plt.close(fig)
    return file.getvalue()


def test_same_figure_is_same_file() -> None:
    """Two drawings of one figure are equal byte for byte; another one differs."""
    assert drawing() == drawing()
    assert drawing() != drawing("Adam")


def test_methods_differ_without_colour() -> None:
    """Every method, named or new, has a marker of its own."""
    names = [*KNOWN, *(f"method {i}" for i in range(8))]
    looks = [figures.style(name) for name in names]
    assert len({look["marker"] for look in looks}) == len(names)
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == len(
        names
    )


def test_a_new_method_looks_like_no_known_one() -> None:
    """No known method has its colour or dash, none of the six above its marker."""
    known = [figures.style(name) for name in figures._METHODS]
    for i in range(len(figures._OTHERS)):
        look = figures.style(f"method {i}")
        for key in ("color", "linestyle"):
            assert look[key] not in [each[key] for each in known]
        assert look["marker"] not in [figures.style(name)["marker"] for name in KNOWN]


def test_new_methods_contrast_with_the_page_and_with_known_ones() -> None:
    """WCAG: 4.5 to 1 with white; each shade is darker than all known ones but black."""

    def luminance(color: str) -> float:
        rgb = np.array(mpl.colors.to_rgb(color))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    spare = [luminance(color) for color, _, _ in figures._OTHERS]
    known = [luminance(color) for color, _, _ in figures._METHODS.values()]
    assert 1.05 / (max(spare) + 0.05) > 4.5
    assert 0 < max(spare) < min(x for x in known if x)


def test_a_new_method_keeps_its_style_until_the_next_chapter() -> None:
    """The order of first use decides, and `use_style` starts afresh."""
    first, second = figures.style("one"), figures.style("two")
    assert first != second
    assert figures.style("one") == first
    figures.use_style()
    assert figures.style("two") == first


@pytest.mark.parametrize(
    ("center", "line"), [("mean", [2.0, 3.0, 5.0]), ("median", [2.0, 3.0, 6.0])]
)
def test_band_draws_center_and_range(
    center: Literal["mean", "median"], line: list[float]
) -> None:
    """The line is the center over seeds, the band goes from minimum to maximum."""
    _, ax = figures.figure()
    values = np.array([[1.0, 5.0, 3.0], [3.0, 1.0, 6.0], [2.0, 3.0, 6.0]])
    figures.band(ax, [1, 2, 3], values, "LGL2O", center)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), line)
    outline = ax.collections[0].get_paths()[0].vertices
    for step, low, high in [(1, 1, 3), (2, 1, 5), (3, 3, 6)]:
        ends = outline[outline[:, 0] == step][:, 1]
        assert (ends.min(), ends.max()) == (low, high)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_band_has_a_gap_where_a_seed_is_not_finite(bad: float) -> None:
    """One diverged seed is not hidden by the mean of the others."""
    _, ax = figures.figure()
    figures.band(ax, [1, 2, 3], [[1.0, bad, 3.0], [1.0, 2.0, 3.0]], "L2O")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1.0, np.nan, 3.0])


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1)])
def test_band_refuses_shapes_that_disagree(shape: tuple[int, ...]) -> None:
    """Name both shapes in the message."""
    _, ax = figures.figure()
    with pytest.raises(ValueError, match=r"do not fit steps of shape \(3,\)"):
        figures.band(ax, [1, 2, 3], np.zeros(shape), "L2O")


def test_width_depends_on_columns_only() -> None:
    """A page has two widths of figures; height is by row."""
    sizes = [
        tuple(figures.figure(rows, cols, height=2.0)[0].get_size_inches())
        for rows, cols in [(1, 1), (2, 1), (1, 2), (1, 3)]
    ]
    assert sizes == [(5.2, 2.0), (5.2, 4.0), (7.2, 2.0), (7.2, 2.0)]


def test_compact_drawing_is_the_same_drawing() -> None:
    """Same elements in the same order; coordinates move by half a hundredth at most."""
    plain = drawing().decode()
    small = figures.compact(plain)
    assert "\n" not in small
    assert len(small) < 0.75 * len(plain)
    number = re.compile(r"-?\d+\.?\d*")
    before, after = (list(ElementTree.fromstring(svg).iter()) for svg in (plain, small))
    places = [{e.get("id"): i for i, e in enumerate(tree)} for tree in (before, after)]
    for old, new in zip(before, after, strict=True):
        assert old.tag == new.tag
        assert set(old.keys()) - {"id"} == set(new.keys()) - {"id"}
        for key in set(new.keys()) - {"id"}:
            was, now = (
                re.sub(r"\s*([A-Za-z;:])\s*", r"\1", " ".join(e.get(key, "").split()))
                for e in (old, new)
            )
            targets = [
                re.findall(r"(?:^|url\()#([^)]+)", value) for value in (was, now)
            ]
            if targets[1]:  # a reference leads to the same element
                (first,), (second,) = targets
                assert places[0][first] == places[1][second]
            elif key in ("d", "x", "y", "points"):
                assert number.sub("#", was) == number.sub("#", now)
                moved = np.subtract(
                    *(np.array(number.findall(v), float) for v in (was, now))
                )
                assert np.abs(moved).max(initial=0) <= 0.005 + 1e-9
            else:
                assert was == now


def test_comparison_draws_methods_and_the_deciding_guard() -> None:
    points = np.array([10, 100, 1_000])
    arrays = {"steps": points, "smooth": np.ones((2, 3))}
    guard = arrays | {
        "decisions": np.array([1, 10, 100]),
        "use_l2o": np.array([[1.0, 0.5, 0.0], [1.0, 0.5, 0.2]]),
    }
    figures.comparison({"A": arrays, "G": guard, "B": arrays}, ["A", "G"], "G")
    top, low = plt.gcf().axes
    assert [line.get_label() for line in top.lines] == ["A", "G"]
    (share,) = low.lines
    assert share.get_xdata().tolist() == [10, 100, 1_000]
    assert share.get_ydata().tolist() == [1.0, 0.5, pytest.approx(0.1)]


def test_a_method_that_changes_costs_what_it_costs_at_the_time() -> None:
    arrays = {"turn": np.array([[100.0, 20.0, 1.0]]), "flops": np.array([2.0])}
    at = figures.progress(arrays, np.array([10, 100, 1_000]), "work")
    assert at.tolist() == [200, 2_000, 2_900]
    assert figures.progress(arrays, np.array([10]), "steps").tolist() == [10]
    with pytest.raises(ValueError, match="one of steps, work, seconds, not 'flop'"):
        figures.progress(arrays, np.array([10]), "flop")


def test_a_training_can_be_drawn_against_what_it_costs() -> None:
    points = np.array([10, 100])
    cost = {"flops": np.array([3.0]), "seconds": np.array([0.1, 0.3])}
    guard = {"steps": points, "smooth": np.ones((2, 2)), "decisions": points // 10}
    guard |= cost | {"use_l2o": np.ones((2, 2))}
    for against, ends in (("steps", 100), ("work", 300), ("seconds", 20)):
        figures.comparison({"G": guard}, ["G"], "G", against)
        top, low = plt.gcf().axes
        assert top.lines[0].get_xdata()[-1] == pytest.approx(ends)
        assert low.lines[0].get_xdata()[-1] == pytest.approx(ends)
        assert low.get_xlabel() == figures.AXES[against]


def test_few_ticks_are_labelled_in_plain_numbers() -> None:
    _, ax = figures.figure()
    ax.plot([1, 2], [0.09, 1.1])
    ax.set(yscale="log")
    figures.few_ticks(ax.yaxis)
    low, high = ax.get_ylim()
    ticks = [y for y in ax.get_yticks() if low <= y <= high]
    assert ticks == pytest.approx([0.1, 0.2, 0.5, 1])
    assert ax.yaxis.get_major_formatter().format_ticks(ticks) == "0.1 0.2 0.5 1".split()
    assert not len(ax.yaxis.get_minorticklocs())


@pytest.mark.parametrize(
    ("cells", "written"),
    [
        (["9.95e-05", "0.000123"], ["9.95·10⁻⁵", "1.23·10⁻⁴"]),
        (["0.16", "7.1e-05 (0.7)"], ["1.60·10⁻¹", "7.10·10⁻⁵ (7.00·10⁻¹)"]),
        (["1.73e+03", "756", "52", "9.77"], ["1,730", "756", "52.0", "9.77"]),
        (["0.269 to 0.22", "2 nat", "-0.1"], ["0.269 to 0.220", "2.00 nat", "-0.100"]),
        (["3e-10", "0"], ["3.00·10⁻¹⁰", "0"]),
        (["10 of 10", "3"], ["10 of 10", "3"]),
        (["1,000", "10,000", ""], ["1,000", "10,000", ""]),
        (["2.8%", "0.0%", "never"], ["2.8%", "0.0%", "never"]),
    ],
)
def test_a_column_has_one_format(cells: list[str], written: list[str]) -> None:
    """Names, heads and text around a table stay; writing it twice changes nothing."""

    def table(column: list[str]) -> str:
        rows = "\n".join(f"| weight 0.1 | {cell} | |" for cell in column)
        return (
            f"*After 1e-05:*\n\n| name | at 0.1 | |\n|---|---|---|\n{rows}\n\n*9e-05*"
        )

    assert figures.one_format(table(cells)) == table(written)
    assert figures.one_format(table(written)) == table(written)


def test_one_format_keeps_as_many_digits_as_are_known() -> None:
    table = "| | a |\n|---|---|\n| x | 4.0e-04 |\n| y | 0.0e+00 |\n| z | 0.059 |"
    assert figures.one_format(table, digits=2) == (
        "| | a |\n|---|---|\n| x | 4.0·10⁻⁴ |\n| y | 0 |\n| z | 5.9·10⁻² |"
    )
