"""Meta Guard: rows D, and what this book adds on it."""

from __future__ import annotations

from typing import Any

from .kinds import (
    AcceptsMore,
    Cheaper,
    KeepsLower,
    Later,
    Lower,
    NotWorse,
    Seldom,
    Stuck,
    Wins,
)
from .verdicts import Claim

_META = "06-meta-guard"
_FIG1 = "metaguard.fig1"
_PANELS = ("a", "b", "c", "d")
_FIRST, _EARLIER, _MIDDLE, _LAST, _LATE = (
    (0, 200),
    (500, 1_000),
    (2_000, 3_000),
    (4_000, 5_000),
    (1_000, 5_000),
)
"""Windows; the paper's text names steps 200 and 1,000."""

_LGL2O = ("LGL2O with update", "LGL2O without update")
_MOST = (0.75, 1.0)
"""On most of the four panels: on three at least."""


def _each(kind: Any, *args: Any, of: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """A test on every panel; ``of``: the methods that it names."""
    return tuple(
        kind(_FIG1, *(f"{panel}, {name}" for name in of), *args) for panel in _PANELS
    )


ROWS: tuple[Claim, ...] = (
    Claim(
        "D1",
        _META,
        "Meta Guard, Fig. 1",
        "Plain L2O beats SGD over the first 200 steps or so, then diverges or stalls",
        (
            *_each(Lower, _FIRST, of=("L2O", "SGD")),
            *_each(Stuck, _LAST, _EARLIER, of=("L2O",)),
        ),
    ),
    Claim(
        "D2",
        _META,
        "Meta Guard, Fig. 1",
        "Both variants of LGL2O are fast early but improve very slowly, or worsen, "
        "after 1,000 steps",
        tuple(
            test
            for name in _LGL2O
            for test in (
                *_each(Lower, _FIRST, of=(name, "SGD")),
                *_each(Stuck, _LAST, _EARLIER, of=(name,)),
            )
        ),
    ),
    Claim(
        "D3",
        _META,
        "Meta Guard, Fig. 1",
        "SGD keeps improving, and is clearly slower than the L2O at first",
        (
            *_each(Lower, _FIRST, 0.1, of=("L2O", "SGD")),
            *_each(Later, _MIDDLE, _EARLIER, of=("SGD",)),
            *_each(Later, _LAST, _MIDDLE, of=("SGD",)),
        ),
    ),
    Claim(
        "D4",
        _META,
        "Meta Guard, Fig. 1",
        "SMG improves all the time and does not stall early, but is usually slower "
        "than SGD",
        (
            *_each(Later, _MIDDLE, _EARLIER, of=("SMG",)),
            *_each(Later, _LAST, _MIDDLE, of=("SMG",)),
            Wins(_FIG1, _PANELS, "SGD", "SMG", _MOST),
        ),
    ),
    Claim(
        "D5",
        _META,
        "Meta Guard, Fig. 1",
        "AMG outperforms the baselines in most cases",
        tuple(
            Wins(_FIG1, _PANELS, "AMG", name, _MOST)
            for name in ("SGD", "L2O", *_LGL2O, "SMG")
        ),
    ),
    Claim(
        "D7",
        _META,
        "LGL2O, against Meta Guard's Fig. 1",
        "LGL2O keeps pace with its fallback late, and so it does here",
        tuple(
            test for name in _LGL2O for test in _each(NotWorse, _LATE, of=(name, "SGD"))
        ),
    ),
    Claim(
        "D8",
        _META,
        "Meta Guard, abstract",
        "A guard that does not train its learned optimizer may make it useless for the "
        "rest of the run: its proposals win less than a tenth of the late decisions",
        tuple(test for name in _LGL2O for test in _each(Seldom, of=(name,))),
    ),
    Claim(
        "D9",
        _META,
        "Meta Guard",
        "What AMG keeps has a lower loss than what LGL2O and SMG would have kept: at "
        "nine points of ten along its runs, on the whole training set",
        tuple(
            KeepsLower("metaguard.compared", f"{panel}, AMG", other)
            for panel in ("a", "b")
            for other in ("LGL2O", "SMG")
        ),
    ),
    Claim(
        "D10",
        _META,
        "Meta Guard",
        "A step of AMG costs less than one of SMG, at equal T",
        tuple(
            Cheaper(_FIG1, f"{panel}, AMG", f"{panel}, SMG", quantity)
            for panel in _PANELS
            for quantity in ("gradients", "depth", "flops", "seconds")
        ),
    ),
    Claim(
        "N30",
        _META,
        "ours, on the paper's title; written before these runs",
        "It is the adaptation that makes AMG better: with its weights frozen it is "
        "higher late, and keeps fewer unrolls in all",
        (
            *_each(Lower, _LATE, of=("AMG", "AMG frozen")),
            *_each(AcceptsMore, of=("AMG", "AMG frozen")),
        ),
    ),
    Claim(
        "N31",
        _META,
        "ours; written before these runs",
        "Adaptation alone does not do it: the L2O that goes on training without a "
        "guard ends above AMG and above SGD",
        (
            *_each(Lower, _LATE, of=("AMG", "Adapted")),
            *_each(Lower, _LATE, of=("SGD", "Adapted")),
        ),
    ),
    Claim(
        "N32",
        _META,
        "ours, on Theorem R; written before these runs",
        "The plain gradient step among its candidates costs AMG nothing",
        _each(NotWorse, _LATE, of=("AMG plain", "AMG")),
    ),
    Claim(
        "N33",
        _META,
        "ours; written before these runs",
        "AMG is worth its work: it ends below the L2O that is used for 200 steps and "
        "replaced by SGD",
        _each(Lower, _LATE, of=("AMG", "L2O, then SGD")),
    ),
)
