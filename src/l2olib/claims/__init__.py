"""The ledger of claims: what a paper says, the test of it, the verdict from records.

A test is a small declarative object; a hash of those of a row enters the provenance of
every record that they read, so a test written or changed after its record shows as
*post hoc*. Nobody types a verdict: :func:`judge` computes it. Words ("diverges", "not
worse", ...) are defined by the project's protocol and repeated on the classes of
``kinds``.

Curves are what :func:`l2olib.experiments.curves` makes of an experiment's records:
a dict from a method's name to arrays whose first axis is the seed.

``kinds`` has the kinds of tests and their statistics, ``verdicts`` what a row is and
how it is judged, ``lgl2o``, ``meta_guard`` and ``star`` the rows.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Iterable

from . import lgl2o, meta_guard, star
from .kinds import (
    ALPHA,
    Curves,
    NotRecorded,
    NotTestable,
    alignment,
    divergence,
    diverging,
    ending,
    fails,
    first_near,
    median,
    rank_correlation,
    window_mean,
)
from .verdicts import Claim, Settled, Verdict, judge, settle

__all__ = [
    "LEDGER",
    "Claim",
    "Curves",
    "NotRecorded",
    "NotTestable",
    "Settled",
    "Verdict",
    "alignment",
    "divergence",
    "diverging",
    "ending",
    "fails",
    "first_near",
    "hashes_for",
    "judge",
    "markdown",
    "median",
    "rank_correlation",
    "report",
    "robustness",
    "settle",
    "window_mean",
]

LEDGER = tuple(
    sorted((*lgl2o.ROWS, *meta_guard.ROWS, *star.ROWS), key=lambda claim: claim.place)
)


def hashes_for(experiment: str) -> dict[str, str]:
    """The tests that read ``experiment``, by claim: what its records remember."""
    return {c.id: c.hashes[experiment] for c in LEDGER if experiment in c.hashes}


def report(*patterns: str) -> list[Verdict]:
    """Judge the claims whose id matches one of ``patterns`` (none: all of them).

    From committed records, in the order of the ledger.

    A chapter's rows are all judged together (see :func:`judge`), so ask once for all.
    """
    from .. import experiments

    patterns = patterns or ("*",)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(c.id, pattern) for c in LEDGER):
            raise experiments.ExperimentError(
                f"there is no claim {pattern!r}: choose from "
                + ", ".join(c.id for c in LEDGER)
            )
    chosen = [c for c in LEDGER if any(fnmatch.fnmatch(c.id, p) for p in patterns)]
    verdicts = []
    for chapter in dict.fromkeys(c.chapter for c in chosen):
        rows = [c for c in LEDGER if c.chapter == chapter]
        verdicts += [v for v in judge(rows, experiments.evidence) if v.claim in chosen]
    return sorted(verdicts, key=lambda v: v.claim.place)


def robustness() -> list[Settled]:
    """Tests of LGL2O and GL2O under open details, from records; see ``settle``."""
    from .. import experiments

    rows = [c for c in LEDGER if c.id[0] in "BC" and not c.source.startswith("ours")]
    read = functools.cache(experiments.evidence)
    return [
        *settle(rows, lgl2o.DETAILS, "LGL2O", read),
        *settle(rows, lgl2o.GL2O_DETAILS, "GL2O", read),
    ]


def markdown(verdicts: Iterable[Verdict]) -> str:
    """The ledger as a Markdown list: verdict and claim, the tests with their outcomes.

    Tests that pass are folded behind their number where others do not. Where the tests
    of a row read several figures, each says which. Links lead to row B2 by ``#row-B2``.
    """
    items = []
    for v in verdicts:
        waiting = Counter(str(o) for _, o in v.findings if isinstance(o, NotTestable))
        passed, failed = (
            [f"{o.mark} {v.claim.name(t)}: {o}" for t, o in v.ran if o.mark == mark]
            for mark in "✓✗"
        )
        rest = failed + [
            f"· {count} test{'s' * (count > 1)} not testable: {why}"
            for why, count in waiting.items()
        ]
        if rest and len(passed) > 2:
            title = f"<summary>{len(passed)} tests pass</summary>"
            passed = [f"<details>{title}{'<br>'.join(passed)}</details>"]
        name = f'<span id="row-{v.claim.id}"></span>**{v.claim.id}: {v.verdict}**'
        head = f"{name} ({v.tally}{', *post hoc*' * v.post_hoc})"
        found = "<br>".join(passed + rest)
        items.append(f"{head}\n: {v.claim.statement} *({v.claim.source})*\n: {found}")
    note = (
        f"*Detectable: the difference that these seeds, with their spread, would show "
        f"at {ALPHA:g} with probability 0.8, without Holm's adjustment. It and p are "
        "over the seeds of a test: where these are starts of given meta-trained "
        "optimizers, they say nothing about other meta-trainings.*"
    )
    return "\n\n".join([*items, note])
