"""A claim with its tests, and what records make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import records
from .kinds import ALPHA, Curves, NotRecorded, NotTestable, Outcome, holm


@dataclass(frozen=True)
class Claim:
    """A row of the ledger. "Reproduced": all tests pass, its adjusted p < 0.05."""

    id: str
    chapter: str
    source: str
    statement: str
    tests: tuple[Any, ...]

    @property
    def place(self) -> tuple[str, int, str]:
        """Where it stands in the ledger: S8 before S12, S5 before S5-convnet."""
        number = self.id[1:].partition("-")[0]
        return self.id[0], int(number), self.id

    @property
    def hashes(self) -> dict[str, str]:
        """For each experiment it reads: the hash of the tests that read it."""
        read: dict[str, list[Any]] = {}
        for test in self.tests:
            read.setdefault(test.experiment, []).append(records.spec(test))
        return {name: records.digest(tests)[:12] for name, tests in read.items()}

    def name(self, test: Any) -> str:
        """A test in words, with the figure it reads where the row reads several."""
        if len({t.experiment for t in self.tests}) == 1:
            return str(test)
        return f"{test.experiment.partition('.')[2]}, {test}"


@dataclass(frozen=True)
class Verdict:
    """A judged row: the verdict, and for each test its outcome or why there is none.

    (The latter waits for records, or is not testable with those of this profile.)
    """

    claim: Claim
    verdict: str
    findings: tuple[tuple[Any, Outcome | NotTestable], ...]
    p: float | None
    post_hoc: bool

    @property
    def ran(self) -> list[tuple[Any, Outcome]]:
        """The tests that could be run."""
        return [(t, o) for t, o in self.findings if isinstance(o, Outcome)]

    @property
    def tally(self) -> str:
        """What decides: tests that pass, wait, cannot be run; the adjusted p-value."""
        passed = sum(o.passed for _, o in self.ran)
        parts = [f"{passed} of {len(self.ran)} pass"] if self.ran else []
        rest = [o for _, o in self.findings if isinstance(o, NotTestable)]
        waiting = sum(isinstance(why, NotRecorded) for why in rest)
        for count, what in (
            (waiting, "waiting"),
            (len(rest) - waiting, "not testable"),
        ):
            if count:
                parts.append(f"{count} {what}")
        if self.p is not None:
            few = passed == len(self.findings) and self.p >= ALPHA
            parts.append(f"{'but ' * few}Holm p = {self.p:.2g}")
        return ", ".join(parts)


def judge(
    claims: Iterable[Claim], load: Callable[[str], tuple[Curves, Mapping[str, str]]]
) -> list[Verdict]:
    """Judge the rows of ONE chapter's ledger (Holm's adjustment runs over them).

    ``load(experiment)`` gives its curves and the test hashes known when its records
    were made; it raises :class:`NotTestable` where there are no records. A row's
    p-value is the largest of its tests (all must hold). A row that moves to another
    chapter changes what the rows there must reach, and no mark says so.
    """
    claims = list(claims)
    read: dict[str, tuple[Curves, Mapping[str, str]] | NotTestable] = {}

    def once(experiment: str) -> tuple[Curves, Mapping[str, str]]:
        if experiment not in read:
            try:
                read[experiment] = load(experiment)
            except NotTestable as why:
                read[experiment] = why
        known = read[experiment]
        if isinstance(known, NotTestable):
            raise known
        return known

    found: list[list[tuple[Any, Outcome | NotTestable]]] = []
    late: list[bool] = []
    for claim in claims:
        row: list[tuple[Any, Outcome | NotTestable]] = []
        changed = False
        for test in claim.tests:
            try:
                curves, known = once(test.experiment)
                row.append((test, test(curves)))
                changed |= known.get(claim.id) != claim.hashes[test.experiment]
            except NotTestable as why:
                row.append((test, why))
        found.append(row)
        late.append(changed)
    ps = [
        max((o.p for _, o in row if isinstance(o, Outcome) and o.p is not None),
            default=None)
        for row in found
    ]  # fmt: skip
    tested = [i for i, p in enumerate(ps) if p is not None]
    adjusted = dict(zip(tested, holm([ps[i] or 0.0 for i in tested]), strict=True))
    return [
        Verdict(claim, _verdict(row, adjusted.get(i)), tuple(row), adjusted.get(i), new)
        for i, (claim, row, new) in enumerate(zip(claims, found, late, strict=True))
    ]


@dataclass(frozen=True)
class Settled:
    """A test of ``claim`` judged twice: by default, and with an open detail of the
    paper settled otherwise."""

    claim: Claim
    test: Any
    detail: str
    default: Outcome
    changed: Outcome

    @property
    def flips(self) -> bool:
        return self.default.passed != self.changed.passed


def settle(
    claims: Iterable[Claim],
    details: Mapping[str, Mapping[str, tuple[str, str]]],
    method: str,
    load: Callable[[str], tuple[Curves, Mapping[str, str]]],
) -> list[Settled]:
    """Judge every test of ``method`` again under each detail that has records for it.

    ``details`` gives, by name of a detail and experiment of a test, where the records
    are and what ``method`` is called there with that detail. Both outcomes are from
    these records, so that nothing else differs.
    """
    found = []
    for claim in claims:
        for test in claim.tests:
            named = [k for k in ("method", "reference")
                     if getattr(test, k, None) == method]  # fmt: skip
            for detail, places in details.items():
                if not named or test.experiment not in places:
                    continue
                place, label = places[test.experiment]
                default = replace(test, experiment=place)
                try:
                    curves, _ = load(place)
                    first = default(curves)
                    second = replace(default, **dict.fromkeys(named, label))(curves)
                except NotTestable:
                    continue
                found.append(Settled(claim, default, detail, first, second))
    return found


def _verdict(row: Sequence[tuple[Any, Outcome | NotTestable]], p: float | None) -> str:
    outcomes = [o for _, o in row if isinstance(o, Outcome)]
    if passed := sum(o.passed for o in outcomes):
        whole = passed == len(row) and (p is None or p < ALPHA)
        return "reproduced" if whole else "partly"
    if len(outcomes) == len(row):
        return "not reproduced"
    # what fails rules a row out only if nothing that could still pass is left
    waiting = any(isinstance(o, NotRecorded) for _, o in row)
    return "not testable yet" if waiting else "not testable at this profile"
