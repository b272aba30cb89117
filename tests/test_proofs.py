"""Every certificate proves a true statement and refuses a false one."""

import pytest
import sympy as sp

from l2olib.proofs import (
    CORRECTED,
    FORMULA_WIDTH,
    HOLDS,
    ProofError,
    Theorem,
    _width,
    added,
    eq,
    ge,
    gt,
    is_zero,
    le,
    lt,
    raised,
    times,
)

a, b = sp.symbols("a b", positive=True)
x, y = sp.symbols("x y", real=True)
n = sp.Symbol("n", integer=True, nonnegative=True)
k = sp.Symbol("k", integer=True, positive=True)
u = sp.Function("u")
half = sp.Rational(1, 2)


def theorem() -> Theorem:
    return Theorem(
        "T", source="LGL2O, (1)", entry=1, label="t", verdict=HOLDS, printed="T."
    )


POSITIVE = sp.Interval.open(0, sp.oo)
IDENTITIES = [
    (eq((x + y) ** 2, x**2 + 2 * x * y + y**2), eq((x + y) ** 2, x**2 + y**2)),
    (eq(sp.Integral(x, (x, 0, a)), a**2 / 2), eq(sp.Integral(x, (x, 0, a)), a**2)),
    (
        eq(sp.Limit((1 + a / k) ** k, k, sp.oo), sp.exp(a)),
        eq(sp.Limit(a / k, k, sp.oo), a),
    ),
    (
        eq(sp.Sum(k**-2, (k, 1, sp.oo)), sp.pi**2 / 6),
        eq(sp.Sum(k**-2, (k, 1, sp.oo)), 2),
    ),
    (eq(sp.Sum(1 / k, (k, 1, sp.oo)), sp.oo), eq(sp.Sum(k**-2, (k, 1, sp.oo)), sp.oo)),
    (
        eq(sp.Matrix([[a**2 - b**2, 1]]), sp.Matrix([[(a - b) * (a + b), 1]])),
        eq(sp.Matrix([[a**2 - b**2, 1]]), sp.Matrix([[(a - b) * (a - b), 1]])),
    ),
]


@pytest.mark.parametrize(("true", "false"), IDENTITIES)
def test_identity(true: sp.Eq, false: sp.Eq) -> None:
    theorem().identity("t", "t", true)
    with pytest.raises(ProofError):
        theorem().identity("t", "t", false)


def test_inequality_needs_the_gap_and_its_sign() -> None:
    t = theorem()
    t.inequality("t", "t", ge(x**2 + y**2, 2 * x * y), (x - y) ** 2)
    t.inequality("t", "t", lt(a * b, b), b * (1 - a), [lt(a, 1)])
    with pytest.raises(ProofError, match="gap"):
        t.inequality("t", "t", ge(x**2 + y**2, 3 * x * y), (x - y) ** 2)
    with pytest.raises(ProofError, match="sign"):
        t.inequality("t", "t", ge(x**2, y**2), (x - y) * (x + y))
    with pytest.raises(ProofError, match="sign"):  # equality is possible
        t.inequality("t", "t", gt(x**2 + y**2, 2 * x * y), (x - y) ** 2)
    with pytest.raises(ProofError, match="sign"):  # <= does not give <
        t.inequality("t", "t", lt(a * b, b), b * (1 - a), [le(a, 1)])
    t.inequality("t", "t", gt(2**x, 0), 2**x)
    complex_ = sp.Symbol("z")
    with pytest.raises(ProofError, match="sign"):  # a power need not even be real
        t.inequality("t", "t", gt(2**complex_, 0), 2**complex_)


def test_solution_must_be_the_exact_region() -> None:
    region = sp.Interval.open(-half, half)
    theorem().solution("t", "t", lt(4 * x**2, 1), x, region)
    theorem().solution("t", "t", eq(4 * x**2, 1), x, sp.FiniteSet(-half, half))
    for wrong in (sp.Interval(-half, half), sp.Interval.open(0, half)):
        with pytest.raises(ProofError):
            theorem().solution("t", "t", lt(4 * x**2, 1), x, wrong)


def test_extremum_is_attained_and_global() -> None:
    theorem().extremum("t", "t", le(a * (1 - a / 2), half), a, 1, 1)
    theorem().extremum("t", "t", ge(a + 1 / a, 2), a, 1, (a + 1) / a**2)
    with pytest.raises(ProofError):  # true, but not attained
        theorem().extremum("t", "t", le(a * (1 - a / 2), 1), a, 1, 1)
    with pytest.raises(ProofError):  # only a local maximum: the factor changes sign
        f = a**2 * (3 - 2 * a) - a**4
        slope = sp.cancel(-sp.diff(f, a) / (a - half))
        theorem().extremum("t", "t", le(f, f.subs(a, half)), a, half, slope)


def test_recurrence() -> None:
    step = eq(u(n + 1), a * u(n) + b)
    closed = a**n + b * (1 - a**n) / (1 - a)
    theorem().recurrence("t", "t", eq(u(n), closed), step, {0: 1})
    for wrong, start in ((closed, 2), (a**n + b * (1 - a**n), 1)):
        with pytest.raises(ProofError):
            theorem().recurrence("t", "t", eq(u(n), wrong), step, {0: start})
    with pytest.raises(ProofError, match="needs a start"):
        theorem().recurrence("t", "t", eq(u(n), closed), step, {})


def test_evaluation_shows_and_checks_both_sides() -> None:
    claim = gt((1 - a) ** 2, b)
    at = {a: half, b: sp.Rational(1, 5)}
    step = theorem().counterexample("t", "t", claim, ("1/4", "1/5"), at)
    assert r"$\frac{1}{4}$ and $\frac{1}{5}.$" in step._repr_markdown_()
    with pytest.raises(ProofError, match="is not"):
        theorem().counterexample("t", "t", claim, ("1/3", "1/5"), at)
    with pytest.raises(ProofError, match="satisfy"):
        theorem().counterexample("t", "t", claim, ("1/4", 1), {a: half, b: 1})
    with pytest.raises(ProofError, match="floating"):
        theorem().counterexample("t", "t", claim, ("1/4", "1/5"), {a: 0.5, b: 0.2})


def test_undecided_is_not_proved() -> None:
    with pytest.raises(ProofError):
        theorem().solution("t", "t", gt(sp.gamma(x) * sp.sin(x), x), x, POSITIVE)
    assert not is_zero(u(n) - 1)
    assert not is_zero(sp.zoo)


def test_measured() -> None:
    theorem().measured("t", "t", "Ratio.", 0.5, 1.0)
    for value in (2.0, float("nan")):
        with pytest.raises(ProofError):
            theorem().measured("t", "t", "Ratio.", value, 1.0)
    floor = theorem().measured("t", "t", "Loss.", 0.5, 1.0, floor=True)
    assert "Proved floor 0.5, measured 1." in floor._repr_markdown_()
    with pytest.raises(ProofError):
        theorem().measured("t", "t", "Loss.", 2.0, 1.0, floor=True)


def test_prose_is_never_shown_as_checked() -> None:
    text = theorem().prose("Compactness", "By compactness.")._repr_markdown_()
    assert "hecked" not in text
    assert "Argued in prose" in text


def test_a_tautology_is_no_step() -> None:
    """SymPy carries out a sum while it is written; as written, it stays to be shown."""
    half_twice = (x / 2, x / 2)
    with pytest.raises(ProofError, match="both sides are x"):
        theorem().identity("t", "t", eq(sum(half_twice), x))
    theorem().identity("t", "t", eq(added(*half_twice), x))
    theorem().identity("t", "t", eq(times(b, 1 / b, raised(-x, 2)), x**2))
    for wrong in (added(x, x / 2), times(2, x / 2, x), raised(-x, 3)):
        with pytest.raises(ProofError, match="identically"):
            theorem().identity("t", "t", eq(wrong, x))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("By Markov $P \\le 1$.", "By Markov $P \\le 1.$ *(Prose.)*\n\n$$"),
        ("For $\\alpha\\le2$.", "For $\\alpha\\le2.$ *(Prose.)*\n\n$$"),
        ("In both coordinates of $x$.", "In both coordinates of $x.$\n\n$$"),
        ("So $x = 0$.", "`[t]` So $x = 0.$ *(Prose.)*"),
    ],
)
def test_words_beside_a_check_are_not_part_of_it(words: str, shown: str) -> None:
    """A relation in them is marked; a consequence stands after the formula."""
    step = theorem().identity("t", "Two", eq(added(x, x), 2 * x), words)
    assert shown in step._repr_markdown_()


def test_a_wide_formula_is_broken_at_its_terms() -> None:
    """First before the relation, then between terms, never losing one."""
    narrow = theorem().identity("t", "t", eq((x + y) ** 2, x**2 + 2 * x * y + y**2))
    assert "aligned" not in narrow._repr_markdown_()
    terms = [(x + i) ** 2 for i in range(1, 12)]
    wide = theorem().identity("t", "t", eq(added(*terms), sp.expand(sum(terms))))
    shown = wide._repr_markdown_()
    assert shown.count(r"\\") == 2 and r"& = 11 x^{2}" in shown
    assert all(f"x + {i}" in shown for i in range(1, 12))


def lines_of(left: sp.Expr, right: object) -> list[str]:
    """Return the lines of an identity that is too wide for one."""
    shown = theorem().identity("t", "t", eq(left, right))._repr_markdown_()
    text = shown.split("aligned}")[1].removesuffix("\\end{")
    lines = [line.strip(" &\n") for line in text.split(r"\\[1ex]")]
    for line in lines:
        assert line.count(r"\left(") == line.count(r"\right)"), line
    assert max(map(_width, lines)) <= FORMULA_WIDTH
    return lines


def test_what_is_too_wide_within_brackets_is_broken_there() -> None:
    """Under a derivative or a limit, and between factors; brackets get a fixed size."""
    terms = [n / (x**2 + n) for n in range(1, 17)]
    total = added(*terms)
    for outer, first in (
        (sp.Derivative(total, x), r"\frac{d}{d x} \biggl("),
        (sp.Limit(total * x, x, sp.oo), r"\lim_{x \to \infty}"),
    ):
        lines = lines_of(outer, outer.doit())
        assert lines[0].startswith(first)
        assert any(line.endswith(r"\biggr)") for line in lines)
    factor = added(*terms[:7])
    lines = lines_of(
        times(factor, factor.subs(x, y)), sp.expand(factor * factor.subs(x, y))
    )
    assert lines[1].startswith(r"\quad {} \cdot \left(")


@pytest.mark.parametrize(
    ("tex", "measured"),
    [
        (r"\alpha \epsilon + p \left(1 - \epsilon\right) \leq b", 7.6),
        (r"\frac{\alpha \left(\beta + 1\right)}{\lambda \left(1 - \beta\right)}", 4.3),
        (r"\frac{1 + \frac{h_{2}^{2}}{h_{1}^{2}}}{h_{1} + \frac{1}{h_{1}^{2}}}", 3.8),
        (r"\lim_{t \to 0^+}\left(\frac{\sqrt{t^{2} + 1} - 1}{t^{2}}\right)", 9.0),
        (r"\left[\begin{matrix}2 \phi_{1} + 2 & 1\\h_{1} & 3\end{matrix}\right]", 5.9),
    ],
)
def test_the_width_of_a_formula_is_about_that_in_a_browser(
    tex: str, measured: float
) -> None:
    """In em, as MathJax sets it; a sum of letters' widths would be far off."""
    assert abs(_width(tex) / measured - 1) < 0.15


def test_a_number_of_many_digits_is_rounded_where_it_is_shown() -> None:
    """And only there: the check is of the exact one."""
    long = sp.Rational(2401 * 199**10, 20000 * 200**10)
    short = sp.Rational(699997, 10**6)
    step = theorem().counterexample(
        "t", "t", gt(a, b), (long, short / 10), {a: long, b: short / 10}
    )
    shown = step._repr_markdown_().split("✓")[1]
    assert r"sides are $\approx 0.1142$ and" in shown
    assert "rounded here, exact in the check" in shown
    with pytest.raises(ProofError, match="is not"):
        theorem().counterexample(
            "t", "t", gt(a, b), (long + sp.Rational(1, 10**30), 0), {a: long, b: 0}
        )
    step = theorem().counterexample(
        "t", "t", gt(a, b), (short, half), {a: short, b: half}
    )
    assert r"\frac{699997}{1000000}" in step._repr_markdown_()


def test_no_line_begins_with_the_punctuation_behind_a_formula() -> None:
    """A browser may break a line between the two, so that goes into the formula."""
    t = Theorem(
        "T", source="LGL2O", entry=1, label="t", verdict=HOLDS,
        printed="If $a$, $b$: $c$; so\n\n$$d$$\n\nfor $e$ (and $f$.)",
    )  # fmt: skip
    assert t.printed == "If $a,$ $b{:}$ $c;$ so\n\n$$d$$\n\nfor $e$ (and $f.)$"


def test_proof_shows_each_step_once() -> None:
    t = theorem()
    t.prose("One", "First.")
    assert "First." in t.proof()._repr_markdown_()
    t.identity("t", "Two", eq(added(x, x), 2 * x))
    assert "First." not in t.proof()._repr_markdown_()
    assert [s.name for s in t.steps] == ["One", "Two"]


def test_what_is_said_beside_a_statement_that_holds() -> None:
    """A slip is one of its proof only; what we paraphrase is not called printed."""
    base = {"source": "LGL2O", "entry": 1, "label": "t", "printed": "P.", "slip": "S."}
    holds = Theorem("T", verdict=HOLDS, corrected="C.", **base)._repr_markdown_()
    assert "> *A slip on the way.* S.\n>\n> *Remark.* C." in holds
    fixed = Theorem("T", verdict=CORRECTED, corrected="C.", **base, paraphrase=True)
    assert "> *In our words.* P.\n>\n> *What is wrong.*" in fixed._repr_markdown_()


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "true"},
        {"source": "Nobody, (1)"},
        {"printed": ""},
        {"verdict": CORRECTED, "corrected": "C."},
        {"verdict": CORRECTED, "slip": "S."},
    ],
)
def test_incomplete_theorems_are_refused(change: dict[str, str]) -> None:
    base = {"source": "LGL2O", "label": "t", "verdict": HOLDS, "printed": "P."}
    with pytest.raises(ValueError):
        Theorem("T", entry=1, **(base | change))
