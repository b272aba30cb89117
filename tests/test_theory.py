"""The theory chapters: every tag has its check, every check is sensitive.

Each numeral, sign and exponent of a checked statement is perturbed, one at a time, and
the mutant is checked by the certificate of the original. A mutant that still passes is
a survivor; golden/mutation_survivors.txt counts them by tag and says why they are true
as well.
"""

import ast
import functools
import itertools
import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sympy as sp
from sympy.core.relational import Relational

from l2olib import proofs

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
GOLDEN = ROOT / "tests" / "golden"
SECONDS_A_MUTANT = 2.0  # of processor time

ENTRIES = {
    "03-convergence-loss-guard": {*range(1, 14), 15, 17},
    "03b-noise-aware-guards": {14, 16, 37, 38, 39},
    "03c-residual-guard": {40},
    "07-convergence-meta-guard": set(range(18, 23)) | {36},
    "08-stability-theory": set(range(23, 33)) | {35},
    "08b-stability-momentum": {33, 34},
}
"""Chapter -> the claims that are checked once it exists (in any theory chapter)."""

THEORY = [
    path for path in sorted(BOOK.glob("*.ipynb")) if proofs.proof_code(path).strip()
]


@functools.cache
def theorems(chapter: Path) -> list[proofs.Theorem]:
    """Run the proof cells of a chapter, once for all tests."""
    return proofs.load(chapter)


def lines(name: str) -> list[str]:
    """Return the lines of a golden file that are not comments."""
    text = (GOLDEN / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def survivors() -> dict[str, int]:
    """Return tag -> how many mutants of its statements are known to be true too."""
    rows = [line.split(maxsplit=2) for line in lines("mutation_survivors.txt")]
    assert all(len(row) == 3 for row in rows), "a tag, a number and a reason"
    return {tag: int(number) for tag, number, _ in rows}


def measured_tags(chapter: Path) -> set[str]:
    """Return the tags of measured steps; nbval runs them, so reading is enough."""
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return {
        node.value
        for source in code
        if ".measured(" in source
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"\d+\.[a-z]", node.value)
    }


def tags_of(chapter: Path) -> set[str]:
    steps = itertools.chain.from_iterable(t.steps for t in theorems(chapter))
    return {step.tag for step in steps if step.tag} | measured_tags(chapter)


def test_every_tag_has_a_check() -> None:
    """A check may stand in any theory chapter, but it must be there."""
    found = set().union(*(tags_of(chapter) for chapter in THEORY))
    present = {path.stem for path in BOOK.glob("*.ipynb")}
    due = set().union(*(e for name, e in ENTRIES.items() if name in present))
    wanted = [tag for tag in lines("theory_tags.txt") if int(tag.split(".")[0]) in due]
    assert len(wanted) > 50
    assert not [tag for tag in wanted if tag not in found]


def test_tags_are_well_formed_and_agree_with_their_claim() -> None:
    for chapter in THEORY:
        for theorem in theorems(chapter):
            for step in theorem.steps:
                if step.tag:
                    assert step.tag.split(".")[0] == str(theorem.entry), step


def test_every_claim_has_an_entry() -> None:
    """Every claim of a chapter's list appears as a theorem with a verdict."""
    claims = {t.entry for chapter in THEORY for t in theorems(chapter)}
    present = {path.stem for path in BOOK.glob("*.ipynb")}
    due = set().union(*(e for name, e in ENTRIES.items() if name in present))
    assert due <= claims


@pytest.mark.parametrize("chapter", THEORY, ids=lambda path: path.stem)
def test_theorems_are_complete(chapter: Path) -> None:
    """A refuted claim has a counterexample; every label is one of the chapter."""
    text = chapter.read_text(encoding="utf-8")
    for theorem in theorems(chapter):
        kinds = Counter(step.kind for step in theorem.steps)
        assert theorem.steps, theorem
        if theorem.verdict == proofs.FALSE:
            assert kinds["counterexample"], theorem
        assert f"({theorem.label})=" in text, theorem.label


@pytest.mark.parametrize("chapter", THEORY, ids=lambda path: path.stem)
def test_titles_and_words_of_steps_begin_sentences(chapter: Path) -> None:
    """A title is set with a full stop: neither it nor what follows goes on."""
    steps = [step for theorem in theorems(chapter) for step in theorem.steps]
    assert not [s for s in steps if s.name[0].islower() or s.text[:1].islower()]


def mutants(statement: sp.Basic) -> Iterator[sp.Basic]:
    """Yield the statement with one numeral, sign or exponent changed."""
    if isinstance(statement, Relational):
        flipped = {sp.Lt: sp.Gt, sp.Le: sp.Ge, sp.Gt: sp.Lt, sp.Ge: sp.Le}
        kind = statement.func
        if kind in flipped:
            yield flipped[kind](statement.lhs, statement.rhs, evaluate=False)
        for left in _changed(statement.lhs):
            yield kind(left, statement.rhs, evaluate=False)
        for right in _changed(statement.rhs):
            yield kind(statement.lhs, right, evaluate=False)


def _changed(node: sp.Basic, exponent: bool = False) -> Iterator[sp.Basic]:
    if isinstance(node, sp.MatrixBase):
        for place, entry in enumerate(node):
            for new in _changed(entry):
                entries = list(node)
                entries[place] = new
                yield type(node)(*node.shape, entries)
        return
    if isinstance(node, sp.Number):
        if node.is_finite:
            yield node + 1
            if node != 0:
                yield -node
            if node.is_Rational and not node.is_Integer:
                yield sp.Rational(node.p, node.q + 1)
        return
    if isinstance(node, sp.Symbol | sp.NumberSymbol):
        if not exponent:
            yield node**2
        yield -node
        return
    if isinstance(node, sp.Tuple):  # the range of a sum or an integral
        if len(node) == 3:
            for place in (1, 2):
                for new in _changed(node[place]):
                    ends = list(node.args)
                    ends[place] = new
                    yield sp.Tuple(*ends)
        return
    if isinstance(node, sp.Derivative):
        for new in _changed(node.expr):
            yield sp.Derivative(new, *node.variable_count)
        for variable, count in node.variable_count:
            yield sp.Derivative(node.expr, (variable, count + 1))
        return
    if isinstance(node, sp.Limit):
        expression, variable, point, side = node.args
        for new in _changed(expression):
            yield sp.Limit(new, variable, point, side)
        return
    if isinstance(node, sp.core.function.AppliedUndef):
        return  # the unknown of a recurrence
    for place, argument in enumerate(node.args):
        if isinstance(node, sp.Add) and not isinstance(argument, sp.Number):
            if not isinstance(argument, sp.Symbol):
                yield _with(node, place, -argument)
        is_base = isinstance(node, sp.Pow) and place == 0
        for new in _changed(argument, exponent=is_base):
            yield _with(node, place, new)


def _with(node: sp.Basic, place: int, new: sp.Basic) -> sp.Basic:
    arguments = list(node.args)
    arguments[place] = new
    return node.func(*arguments)


class _TooLong(Exception):
    pass


def _alarm(*_: object) -> None:
    raise _TooLong


def survives(step: proofs.Step, mutant: sp.Basic) -> bool:
    """Say whether the mutant passes; one that takes too long was not proved."""
    signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_A_MUTANT)
    try:
        step.verify(mutant)
    except (proofs.ProofError, _TooLong):
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return True


def distinct_mutants(statement: sp.Basic) -> list[sp.Basic]:
    """Return the mutants that can be written down and differ from the statement."""
    found: dict[str, sp.Basic] = {}
    generator = mutants(statement)
    while True:
        try:
            mutant = next(generator)
        except StopIteration:
            break
        except (ValueError, TypeError, ZeroDivisionError):
            break
        if mutant != statement and sp.srepr(mutant) != sp.srepr(statement):
            found.setdefault(sp.srepr(mutant), mutant)
    return list(found.values())


def test_every_numeral_sign_and_exponent_is_perturbed() -> None:
    x = sp.Symbol("x")
    found = {str(m) for m in mutants(proofs.eq(3 * x**2 - 1, x / 2))}
    expected = {
        "Eq(4*x**2 - 1, x/2)",  # numeral
        "Eq(-3*x**2 - 1, x/2)",  # sign
        "Eq(3*x**3 - 1, x/2)",  # exponent
        "Eq(-1 + 3/x**2, x/2)",  # sign of the exponent
        "Eq(3*x**2 + 1, x/2)",
        "Eq(3*x**2, x/2)",
        "Eq(3*x**2 - 1, x**2/2)",
        "Eq(3*x**2 - 1, x/3)",
        "Eq(3*x**2 - 1, -x/2)",
    }
    assert expected <= found
    assert {str(m) for m in mutants(proofs.lt(x, 1))} >= {"x > 1", "x < 2"}


@functools.cache
def mutation_counts(chapter: Path) -> tuple[int, dict[str, list[str]]]:
    """Return how many mutants were made, and by tag those that survive."""
    made = 0
    alive: dict[str, list[str]] = {}
    for theorem in theorems(chapter):
        for step in theorem.steps:
            if step.statement is None:
                continue
            assert step.tag, step
            for mutant in distinct_mutants(step.statement):
                made += 1
                if survives(step, mutant):
                    alive.setdefault(step.tag, []).append(str(mutant))
    return made, alive


@pytest.mark.parametrize("chapter", THEORY, ids=lambda path: path.stem)
def test_mutants_fail(chapter: Path) -> None:
    """Those that survive are few, each is counted, and its reason is known."""
    made, alive = mutation_counts(chapter)
    count = sum(map(len, alive.values()))
    print(f"{chapter.stem}: {made} mutants, {count} survive")
    known = survivors()
    assert not {t: found for t, found in alive.items() if len(found) > known.get(t, 0)}
    assert count <= 0.1 * made


def test_every_reason_for_a_survivor_is_needed() -> None:
    """A reason whose mutants all fail by now must go."""
    alive = set().union(*(mutation_counts(chapter)[1] for chapter in THEORY))
    assert survivors().keys() <= alive


def test_mutants_of_all_chapters_fail() -> None:
    """At least 95 % of all mutants fail."""
    counts = [mutation_counts(chapter) for chapter in THEORY]
    made = sum(made for made, _ in counts)
    count = sum(len(found) for _, alive in counts for found in alive.values())
    print(f"all chapters: {made} mutants, {count} survive")
    assert made > 1000
    assert count <= 0.05 * made
