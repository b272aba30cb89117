r"""Turn a written proof into statements that SymPy checks.

The theory chapters are the only source of the proofs. A cell declares a
:class:`Theorem` (what the paper prints, the verdict, what is right) and adds the
steps of its proof::

    with_gradient_step = Theorem(
        "Proposition 1", source="LGL2O, (2)", entry=1, label="thm-descent",
        verdict=HOLDS, printed=r"$E(w^+) - E(w) \le \ldots$",
    )
    with_gradient_step.prose("Selection", "The guard keeps the better candidate.")
    with_gradient_step.identity("1.b", "Insert the step", eq(lhs, rhs))
    with_gradient_step.proof()

Every step but :meth:`Theorem.prose` and :meth:`Theorem.measured` holds a *statement*,
the SymPy relation that is both typeset and checked, and a *certificate* that is fixed
when the step is written and never derived from the statement. A step is checked when it
is declared; a statement that the certificate does not prove raises :class:`ProofError`.
The check covers the statement alone: a relation in the words beside it is marked as
prose.

Cells that declare theorems carry the tag ``proof`` and depend only on cells with that
tag, so that :func:`load` can run them without the simulations of the chapter: the
tests and the table of errata read the theorems that way. Cells that compare a theorem
with a simulation (:meth:`Theorem.measured`) carry the tag ``measured``.

A *tag* such as ``6.c`` names a step across the repository. The tests hold the list of
tags that must exist and perturb every checked statement to see its check fail.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import sympy as sp
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

HOLDS = "holds"
CORRECTED = "holds as corrected"
FALSE = "false"
NEW = "new"
VERDICTS = (HOLDS, CORRECTED, FALSE, NEW)

PAPERS = ("LGL2O", "GL2O", "Meta Guard", "STAR", "Training techniques", "this book")


FORMULA_WIDTH = 34.0  # em of a line of a displayed formula; the column has 36.8
_ROW = r"\\[0.7ex]"  # the end of a row in a matrix with fractions
LONG_NUMBER = 7  # digits; an exact number with more of them is shown rounded
_SIGNS = {
    "==": "=",
    "!=": r"\ne",
    "<": "<",
    "<=": r"\le",
    ">": ">",
    ">=": r"\ge",
}


class ProofError(AssertionError):
    """A statement was not proved by its certificate."""


# --- statements ----------------------------------------------------------------------


def _relation(kind: type) -> Callable[[object, object], Relational]:
    def build(left: object, right: object) -> Relational:
        return kind(sp.sympify(left), sp.sympify(right), evaluate=False)

    build.__doc__ = f"Return the unevaluated relation {kind.__name__}(left, right)."
    return build


eq = _relation(sp.Eq)
ne = _relation(sp.Ne)
le = _relation(sp.Le)
lt = _relation(sp.Lt)
ge = _relation(sp.Ge)
gt = _relation(sp.Gt)


def added(*terms: object) -> sp.Expr:
    """Return the sum as it is written, so that carrying it out is left to the check."""
    return sp.Add(*map(sp.sympify, terms), evaluate=False)


def times(*factors: object) -> sp.Expr:
    """Return the product as it is written."""
    return sp.Mul(*map(sp.sympify, factors), evaluate=False)


def raised(base: object, exponent: object) -> sp.Expr:
    """Return the power as it is written."""
    return sp.Pow(sp.sympify(base), sp.sympify(exponent), evaluate=False)


def _excess(statement: Relational) -> sp.Expr:
    """Return the side that should be larger minus the other one."""
    if isinstance(statement, sp.Ge | sp.Gt):
        return statement.lhs - statement.rhs
    if isinstance(statement, sp.Le | sp.Lt):
        return statement.rhs - statement.lhs
    raise ProofError(f"an inequality is needed, not {type(statement).__name__}")


def _tex(expression: object) -> str:
    tex: str = sp.latex(expression, mul_symbol=None, fold_short_frac=False)
    return tex.replace(r"\\", _ROW) if r"\frac" in tex else tex  # or rows touch


def _rounded(value: sp.Basic) -> str:
    """Return an exact number to four digits, if it is too long to be read, or ''."""
    parts = [
        part for number in value.atoms(sp.Rational) for part in number.as_numer_denom()
    ]
    if not value.is_number or all(abs(part) < 10**LONG_NUMBER for part in parts):
        return ""
    return f"\\approx {_tex(sp.N(value, 4))}"


# --- layout of formulas --------------------------------------------------------------

_ATOM = re.compile(r"\\[a-zA-Z]+|\\.|\S")
_MATRIX = re.compile(r"\\begin\{matrix\}(.*?)\\end\{matrix\}")
_RELATIONS = frozenset(r"= < > \le \leq \ge \geq \ne \neq \to \in".split())
_SIZES = (1.0, 1.0, 0.7, 0.5)  # in a display, in text, in a script, in its script
_LETTER = 0.52
_EMS = {
    **dict.fromkeys((r"\limits", r"\substack", r"\tilde", r"\bar", r"\hat"), 0.0),
    # the space beside a bracket
    **dict.fromkeys((r"\left", r"\right", r"\biggl", r"\biggr"), 0.2),
    **dict.fromkeys(("(", ")", "[", "]", "|", ".", ",", r"\,"), 0.4),
    **dict.fromkeys((r"\quad", r"\sqrt", r"\int", r"\infty"), 1.0),
    **dict.fromkeys((r"\lim", r"\sum", r"\log", r"\sin", r"\cos"), 1.45),
    **dict.fromkeys((r"\min", r"\max"), 1.8),
}  # a Greek letter has 0.6


def _width(tex: str, level: int = 0) -> float:
    """Return about how many em wide a formula is; its size is that of the level."""

    def block(matrix: re.Match[str]) -> str:
        text = matrix[1].replace(_ROW, r"\\")
        rows = [row.split("&") for row in text.split(r"\\")]
        columns = [
            max(_width(cell, max(level, 1)) for cell in column)
            for column in zip(*rows, strict=True)
        ]
        return "x" * round((sum(columns) + len(columns) - 1) / _LETTER)

    return _measure(deque(_ATOM.findall(_MATRIX.sub(block, tex))), level)


def _measure(atoms: deque[str], level: int) -> float:
    """Measure the atoms up to the brace that closes the group."""
    size, spaced = _SIZES[level], level < 2
    width, before, script = 0.0, "", 0.0
    while atoms and (atom := atoms.popleft()) != "}":
        if atom in ("_", "^"):
            wide = _argument(atoms, min(max(level, 1) + 1, 3))
            if before in (r"\lim", r"\sum"):  # above or below it, not beside
                wide -= _EMS[before] * size
            width, script = width + max(wide - script, 0.0), max(wide, script)
            continue
        script = 0.0
        if atom == "{":
            width += _measure(atoms, level)
        elif atom in (r"\frac", r"\binom"):
            inner = min(level + 1, 3)
            parts = [_argument(atoms, inner), _argument(atoms, inner)]
            width += max(parts) + (0.3 if atom == r"\frac" else 1.0) * size
        elif atom in _RELATIONS:
            width += 0.8 * size + 0.56 * spaced
        elif atom in ("+", "-"):
            binary = before not in ("", "(", "[") and before not in _RELATIONS
            width += 0.8 * size + 0.44 * (spaced and binary)
        elif atom.isalnum():
            width += (0.74 if atom.isupper() else _LETTER) * size
        else:
            width += _EMS.get(atom, 0.6) * size
        before = before if atom == r"\limits" else atom
    return width


def _argument(atoms: deque[str], level: int) -> float:
    first = atoms.popleft() if atoms else ""
    return _measure(atoms if first == "{" else deque([first]), level)


_BRACKETS = re.compile(r"(\\left\\?.|\\right\\?.)")
_MARKS = re.compile(_BRACKETS.pattern[:-1] + "|[{}]| [+-] )")


def _split(tex: str, depth: int, factors: bool) -> list[str]:
    """Cut a formula before the signs, or factors, that stand in `depth` brackets."""
    pieces, opened, closed = [""], 0, 0
    for place, part in enumerate(_MARKS.split(tex)):
        if place % 2 and not closed and opened <= depth:
            if part in (" + ", " - "):
                pieces.append("")
            elif factors and part == r"\left(" and pieces[-1].endswith(r"\right) "):
                pieces.append(r" \cdot ")
        pieces[-1] += part
        if place % 2 and part.endswith(("(", ")")):
            opened += 1 if part == r"\left(" else -1
        elif place % 2 and part not in (" + ", " - "):
            closed += 1 if part == "{" or part.startswith(r"\left") else -1
    return pieces


def _pieces(tex: str, level: int = 0) -> Iterator[str]:
    """Yield pieces that fit a line, cut in as few brackets as will do."""
    for piece in _split(tex, level // 2, factors=level % 2 == 1):
        if level < 4 and _width(piece) > FORMULA_WIDTH - _EMS[r"\quad"]:
            yield from _pieces(piece, level + 1)
        else:
            yield piece


def _lines(side: sp.Basic, before: str = "") -> list[str]:
    """Return a side of a relation as lines that fit the page."""
    lines = [before]
    for place, piece in enumerate(_pieces(_tex(side))):
        if place and _width(lines[-1] + piece) > FORMULA_WIDTH:
            lines.append(r"\quad {}")
        lines[-1] += piece
    return [_sized(line) for line in lines]


def _sized(line: str) -> str:
    """Give a fixed size to brackets whose partner is on another line."""
    parts = _BRACKETS.split(line)
    waiting: list[int] = []
    for place, part in enumerate(parts):
        if part.startswith(r"\left"):
            waiting.append(place)
        elif part.startswith(r"\right"):
            if waiting:
                waiting.pop()
            else:
                parts[place] = r"\biggr)"
    for place in waiting:
        parts[place] = r"\biggl("
    return "".join(parts)


def _formula(statement: sp.Basic) -> str:
    """Return the displayed formula; one that is too wide is broken into lines."""
    tex = _tex(statement)
    if _width(tex) <= FORMULA_WIDTH or not isinstance(statement, Relational):
        return tex
    sign = _SIGNS[statement.rel_op]
    lines = [*_lines(statement.lhs), *_lines(statement.rhs, f"{sign} ")]
    rows = " \\\\[1ex]\n& ".join(lines)
    return f"\\begin{{aligned}}\n& {rows}\n\\end{{aligned}}"


_PUNCTUATED = re.compile(r"\$\$.*?\$\$|\$([^$]+)\$([.,;:]+\)?)?", re.DOTALL)


def _joined(text: str) -> str:
    """Take punctuation behind a formula into it, or a line may begin with it."""

    def join(found: re.Match[str]) -> str:
        if not found[2]:
            return found[0]
        return f"${found[1]}{found[2].replace(':', '{:}')}$"

    return _PUNCTUATED.sub(join, text)


# --- deciding zero and sign ----------------------------------------------------------


def _sample(symbol: sp.Symbol, index: int, shift: int) -> sp.Expr:
    """Return a rational that respects the assumptions on the symbol."""
    prime = sp.prime(index + 2 + 3 * shift)
    if symbol.is_integer:
        value = sp.Integer(index + 2 + shift)
    else:
        value = sp.Rational(prime, 7 + 2 * index + 4 * shift)
    return -value if symbol.is_negative else value


def _probe_nonzero(expression: sp.Expr) -> bool:
    """Return True if the expression is certainly nonzero at a rational point."""
    if expression.has(AppliedUndef, sp.MatrixSymbol, sp.Indexed):
        return False
    symbols = sorted(expression.free_symbols, key=lambda s: s.name)
    for shift in range(2):
        point = {s: _sample(s, i, shift) for i, s in enumerate(symbols)}
        value = expression.subs(point).evalf(40)
        if value.is_comparable is False and not value.is_number:
            continue
        try:
            size = abs(complex(value))
        except TypeError:
            continue
        if size > 1e-20:
            return True
    return False


def _is_root(expression: sp.Basic) -> bool:
    return isinstance(expression, sp.Pow) and expression.exp.is_Rational


def _factor_radicand(root: sp.Pow) -> sp.Expr:
    return sp.factor(root.base) ** root.exp


def is_zero(expression: sp.Basic) -> bool:
    """Decide whether an expression (or every entry of a matrix) is identically zero.

    Integrals, sums, limits and derivatives are carried out first. A rational sample
    point can refute; only an exact simplification to zero can confirm.
    """
    if isinstance(expression, sp.MatrixBase):
        return all(is_zero(entry) for entry in expression)
    expression = sp.sympify(expression).doit()
    if expression == 0:
        return True
    if expression.has(sp.nan, sp.zoo) or _probe_nonzero(expression):
        return False
    attempts: tuple[Callable[[sp.Expr], sp.Expr], ...] = (
        sp.expand,
        lambda e: sp.cancel(sp.together(e)),
        sp.simplify,
        lambda e: sp.simplify(sp.expand(e.rewrite(sp.exp))),
        lambda e: sp.expand_func(sp.gammasimp(e)),
        sp.radsimp,
        lambda e: sp.simplify(e.replace(_is_root, _factor_radicand)),
    )
    for attempt in attempts:
        try:
            if attempt(expression) == 0:
                return True
        except (NotImplementedError, ValueError, TypeError, sp.PolynomialError):
            continue
    return False


class _Signs:
    """Signs of expressions that follow from symbols and given inequalities."""

    def __init__(self, given: Iterable[Relational]) -> None:
        self.known = [
            (sp.expand(_excess(g)), isinstance(g, sp.Lt | sp.Gt)) for g in given
        ]

    def _given(self, expression: sp.Expr, strict: bool) -> bool:
        expression = sp.expand(expression)
        for known, known_strict in self.known:
            ratio = sp.cancel(expression / known)
            if ratio.is_positive and (known_strict or not strict):
                return True
        return False

    def holds(self, expression: sp.Expr, strict: bool) -> bool:
        """Return True if expression > 0 (strict) or >= 0 is certain."""
        known = expression.is_positive if strict else expression.is_nonnegative
        if known or self._given(expression, strict):
            return True
        if isinstance(expression, sp.Pow):
            base, exponent = expression.args
            if exponent.is_integer and exponent.is_even and not strict:
                return bool(base.is_real)
            positive = exponent.is_extended_real and self.holds(base, strict=True)
            return bool(positive) or (
                not strict and exponent.is_positive and self.holds(base, strict=False)
            )
        if isinstance(expression, sp.Mul):
            return all(self.holds(factor, strict) for factor in expression.args)
        if isinstance(expression, sp.Add):
            return all(self.holds(term, False) for term in expression.args) and (
                not strict or any(self.holds(term, True) for term in expression.args)
            )
        return False


# --- certificates --------------------------------------------------------------------


class Certificate(Protocol):
    """A fixed way to prove a statement."""

    def verify(self, statement: sp.Basic) -> None:
        """Raise ProofError unless the statement follows."""

    def how(self) -> str:
        """Describe the check in Markdown, without a full stop."""


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ProofError(message)


_ROUNDED = " (rounded here, exact in the check)"


def _given_tex(given: Sequence[Relational]) -> str:
    return f" for ${', '.join(_tex(g) for g in given)}$" if given else ""


@dataclass(frozen=True)
class Identity:
    """Both sides of an equation agree identically (integrals, limits carried out)."""

    def verify(self, statement: sp.Basic) -> None:
        _require(isinstance(statement, sp.Eq), "an identity needs an equation")
        left, right = statement.lhs, statement.rhs
        if isinstance(left, sp.MatrixBase):
            _require(left.shape == right.shape, "the shapes differ")
        elif sp.oo in (right, -right):
            _require(left.doit() == right, f"{left} is not {right}")
            return
        _require(is_zero(left - right), f"{left} is not identically {right}")

    def how(self) -> str:
        return "the difference of the two sides simplifies to zero"


@dataclass(frozen=True)
class Sign:
    """An inequality whose gap equals a sum of terms of known sign."""

    terms: tuple[sp.Expr, ...]
    given: tuple[Relational, ...] = ()

    def verify(self, statement: sp.Basic) -> None:
        gap, signs = sp.Add(*self.terms), _Signs(self.given)
        _require(is_zero(_excess(statement) - gap), f"the gap is not {gap}")
        for term in self.terms:
            _require(signs.holds(term, False), f"the sign of {term} is not known")
        if isinstance(statement, sp.Lt | sp.Gt):
            positive = any(signs.holds(term, True) for term in self.terms)
            _require(positive, f"the sign of {gap} is not known: it may be zero")

    def how(self) -> str:
        gap = " + ".join(
            f"\\left({_tex(term)}\\right)"
            if isinstance(term, sp.Add) and len(self.terms) > 1
            else _tex(term)
            for term in self.terms
        )
        short = _rounded(sp.Add(*self.terms))
        sides = f"larger side minus smaller side is $\\displaystyle {short or gap}$"
        note = _ROUNDED if short else ""
        return f"{sides}{note}, of known sign{_given_tex(self.given)}"


@dataclass(frozen=True)
class Solution:
    """A relation in one real variable holds exactly on the region."""

    variable: sp.Symbol
    region: sp.Set
    domain: sp.Set = sp.Reals

    def verify(self, statement: sp.Basic) -> None:
        x = sp.Dummy("x", real=True)
        plain = statement.subs(self.variable, x)
        if isinstance(plain, sp.Eq):
            found = sp.solveset(plain.lhs - plain.rhs, x, self.domain)
        elif plain in (sp.true, sp.false):
            found = self.domain if plain == sp.true else sp.S.EmptySet
        else:
            found = sp.solve_univariate_inequality(
                plain, x, relational=False, domain=self.domain
            )
        same = found.symmetric_difference(self.region).simplify() == sp.S.EmptySet
        _require(found == self.region or same, f"holds on {found}")

    def how(self) -> str:
        among = "" if self.domain == sp.Reals else f" within ${_tex(self.domain)}$"
        name = _tex(self.variable)
        return f"solved exactly: it holds for ${name} \\in {_tex(self.region)}${among}"


@dataclass(frozen=True)
class Extremum:
    """f <= v (or >=) with equality at `at`, from the exact sign of the derivative.

    The derivative of f must equal (at - variable) * factor with factor > 0 for a
    maximum, (variable - at) * factor for a minimum.
    """

    variable: sp.Symbol
    at: sp.Expr
    factor: sp.Expr
    given: tuple[Relational, ...] = ()

    def verify(self, statement: sp.Basic) -> None:
        gap = _excess(statement)
        small, large = (
            (statement.lhs, statement.rhs)
            if isinstance(statement, sp.Le)
            else (statement.rhs, statement.lhs)
        )
        _require(isinstance(statement, sp.Le | sp.Ge), "needs <= or >=")
        _require(
            small.has(self.variable) != large.has(self.variable),
            "exactly one side must depend on the variable",
        )
        slope = (self.variable - self.at) * self.factor
        _require(
            is_zero(sp.diff(gap, self.variable) - slope),
            f"the derivative of the gap is not {slope}",
        )
        _require(is_zero(gap.subs(self.variable, self.at)), "no equality there")
        _require(_Signs(self.given).holds(self.factor, True), "sign of the factor")

    def how(self) -> str:
        moved = _tex(self.variable - self.at)
        if isinstance(self.variable - self.at, sp.Add):
            moved = f"\\left({moved}\\right)"
        rest = "" if self.factor == 1 else f" \\cdot {_tex_factor(self.factor)}"
        sign = f" with a positive last factor{_given_tex(self.given)}" if rest else ""
        return (
            f"equality at ${_tex(self.variable)} = {_tex(self.at)}$, and the "
            f"derivative of the gap is $\\displaystyle {moved}{rest}${sign}"
        )


def _tex_factor(expression: sp.Expr) -> str:
    text = _tex(expression)
    return f"\\left({text}\\right)" if isinstance(expression, sp.Add) else text


@dataclass(frozen=True)
class Recurrence:
    """A closed form u(n) = ..., from its start and the identity of the induction step.

    `step` is an equation for u(n + 1) in terms of u(n); `start` maps n to u(n).
    """

    step: Relational
    start: Mapping[sp.Expr, sp.Expr]

    def verify(self, statement: sp.Basic) -> None:
        term = statement.lhs
        _require(
            isinstance(statement, sp.Eq) and isinstance(term, AppliedUndef),
            "needs u(n) = closed form",
        )
        n = term.args[0]
        _require(n.is_Symbol, "needs u(n) on the left")
        _require(bool(self.start), "needs a start")
        for k, value in self.start.items():
            _require(is_zero(statement.rhs.subs(n, k) - value), f"wrong start at {k}")

        def closed(index: sp.Expr) -> sp.Expr:
            return statement.rhs.subs(n, index)

        gap = (self.step.lhs - self.step.rhs).replace(term.func, closed)
        _require(is_zero(gap), "the induction step fails")

    def how(self) -> str:
        start = ", ".join(f"n = {_tex(k)}" for k in self.start)
        return f"induction: true at ${start}$, and it satisfies ${_tex(self.step)}$"


@dataclass(frozen=True)
class Evaluation:
    """A relation between exact numbers: both sides take the stated values."""

    at: Mapping[sp.Basic, sp.Basic]
    values: tuple[sp.Basic, sp.Basic]

    def verify(self, statement: sp.Basic) -> None:
        sides = [s.subs(self.at).doit() for s in (statement.lhs, statement.rhs)]
        for side, value in zip(sides, self.values, strict=True):
            _require(not side.has(sp.Float), "a floating-point number")
            _require(is_zero(side - value), f"{side} is not {value}")
        outcome = statement.func(*self.values)
        _require(outcome == sp.true, f"{self.values} do not satisfy the relation")

    def how(self) -> str:
        point = ", ".join(f"{_tex(k)} = {_tex(v)}" for k, v in self.at.items())
        left, right = (_rounded(value) or _tex(value) for value in self.values)
        where = f"at ${point}$ " if point else ""
        sides = f"the sides are ${left}$ and ${right}$"
        if self.values[0] == self.values[1]:
            sides = f"both sides are ${left}$"
        note = _ROUNDED if any(map(_rounded, self.values)) else ""
        return f"exact arithmetic: {where}{sides}{note}"


# --- theorems ------------------------------------------------------------------------


# a formula of the running text that says something, not only names something
_RELATION = re.compile(
    r"\$[^$]*(?:[=<>]|\\(?:le|lt|ge|gt|ne|neq|to|in|sim|preceq|succeq)(?![a-z]))[^$]*\$"
)

# words that begin like this say what follows from the formula: they stand after it
_CONSEQUENCES = ("So ", "so ", "It ", "Then ", "Hence ")


def _words(text: str) -> str:
    """Return the words beside a checked formula, marked if they argue in formulas."""
    return f"{text} *(Prose.)*" if _RELATION.search(text) else text


@dataclass(frozen=True, repr=False)
class Step:
    """One step of a proof.

    `kind` is ``checked``, ``counterexample``, ``prose`` or ``measured``; only the first
    two have a statement and a certificate.
    """

    tag: str | None
    name: str
    kind: str
    statement: sp.Basic | None = None
    certificate: Certificate | None = None
    text: str = ""

    def verify(self, statement: sp.Basic | None = None) -> None:
        """Check the step, or another statement by the same certificate.

        Whatever goes wrong in the check counts as "not proved".
        """
        if self.certificate is None:
            return
        target = self.statement if statement is None else statement
        assert target is not None
        try:
            _require(not target.has(sp.Float), "a floating-point number")
            self.certificate.verify(target)
        except ProofError as error:
            raise ProofError(f"[{self.tag}] {self.name}: {error}") from None
        except Exception as error:  # SymPy could not decide
            raise ProofError(f"[{self.tag}] {self.name}: {error!r}") from error

    def __repr__(self) -> str:
        return f"<step {self.tag or ''} {self.name}: {self.kind}>"

    def _repr_markdown_(self) -> str:
        return _joined(self._markdown())

    def _markdown(self) -> str:
        tag = f" `[{self.tag}]`" if self.tag else ""
        if self.kind == "prose":
            return f"**{self.name}.** {self.text} *(Argued in prose.)*"
        if self.kind == "measured":
            return f"**{self.name}.** {self.text} *(Measured, not proved)*{tag}"
        mark = "Counterexample checked" if self.kind == "counterexample" else "Checked"
        assert self.certificate is not None and self.statement is not None
        formula = f"\n\n$$\n{_formula(self.statement)}\n$$\n\n"
        check = f"✓ *{mark}:* {self.certificate.how()}.{tag}"
        before = after = f" {_words(self.text)}" if self.text else ""
        if self.text.startswith(_CONSEQUENCES):
            before = ""
        else:
            after = ""
        return f"**{self.name}.**{before}{formula}{check}{after}"


@dataclass(frozen=True, repr=False)
class Proof:
    """Consecutive steps, as one cell shows them."""

    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        return f"<proof: {len(self.steps)} steps>"

    def _repr_markdown_(self) -> str:
        return "\n\n".join(step._repr_markdown_() for step in self.steps)


@dataclass(repr=False)
class Theorem:
    r"""A claim of a paper (or of this book), its verdict and its proof.

    Parameters
    ----------
    name : how the claim is called in the text.
    source : paper and place, e.g. ``"LGL2O, (2)"``; starts with a name of PAPERS.
    entry : the number of the claim in the list of claims behind the book.
    label : MyST label of the section with the proof.
    verdict : one of HOLDS, CORRECTED, FALSE, NEW.
    printed : the claim as printed (Markdown with formulas); empty if NEW.
    corrected : what is right (Markdown with formulas); empty if HOLDS as printed.
    slip : one line for the table of errata: what is wrong, or the counterexample; if
        it HOLDS, what is wrong in its proof.
    paraphrase : `printed` is in our words, because the paper's were not at hand.

    Raises ValueError for an unknown verdict or paper, or a missing text.
    """

    name: str
    source: str
    entry: int
    label: str
    verdict: str
    printed: str = ""
    corrected: str = ""
    slip: str = ""
    paraphrase: bool = False
    steps: list[Step] = field(default_factory=list)
    _shown: int = 0

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {VERDICTS}, not {self.verdict!r}")
        if not self.source.startswith(PAPERS):
            raise ValueError(f"source must start with one of {PAPERS}")
        if self.verdict != NEW and not self.printed:
            raise ValueError(f"{self.name}: what is printed?")
        if self.verdict in (CORRECTED, NEW) and not self.corrected:
            raise ValueError(f"{self.name}: what is right?")
        if self.verdict in (CORRECTED, FALSE) and not self.slip:
            raise ValueError(f"{self.name}: what is wrong, in one line?")
        for text in ("printed", "corrected", "slip"):
            setattr(self, text, _joined(getattr(self, text)))

    def __repr__(self) -> str:
        return f"<{self.name}: {self.verdict}>"

    def _add(self, step: Step) -> Step:
        step.verify()
        self.steps.append(step)
        return step

    def prose(self, name: str, text: str) -> Step:
        """Add a step that rests on the written argument."""
        return self._add(Step(None, name, "prose", text=text))

    def identity(
        self, tag: str, name: str, statement: Relational, text: str = ""
    ) -> Step:
        """Add an equation whose sides agree identically.

        Raises ProofError if they are one and the same expression: SymPy has then done
        the step while it was written, and there is nothing to show or check. Write it
        with :func:`added`, :func:`times` and :func:`raised`.
        """
        same = sp.srepr(statement.lhs) == sp.srepr(statement.rhs)
        _require(not same, f"[{tag}] {name}: both sides are {statement.lhs}")
        return self._add(Step(tag, name, "checked", statement, Identity(), text))

    def inequality(
        self,
        tag: str,
        name: str,
        statement: Relational,
        gap: sp.Expr | Sequence[sp.Expr],
        given: Sequence[Relational] = (),
        text: str = "",
    ) -> Step:
        """Add an inequality whose gap equals a term, or a sum, of known sign."""
        terms = gap if isinstance(gap, list | tuple) else [gap]
        certificate = Sign(tuple(map(sp.sympify, terms)), tuple(given))
        return self._add(Step(tag, name, "checked", statement, certificate, text))

    def solution(
        self,
        tag: str,
        name: str,
        statement: Relational,
        variable: sp.Symbol,
        region: sp.Set,
        domain: sp.Set = sp.Reals,
        text: str = "",
    ) -> Step:
        """Add a relation in one variable that holds exactly on the region."""
        certificate = Solution(variable, region, domain)
        return self._add(Step(tag, name, "checked", statement, certificate, text))

    def extremum(
        self,
        tag: str,
        name: str,
        statement: Relational,
        variable: sp.Symbol,
        at: sp.Expr,
        factor: sp.Expr,
        given: Sequence[Relational] = (),
        text: str = "",
    ) -> Step:
        """Add a bound that is attained, proved by the sign of the derivative."""
        certificate = Extremum(
            variable, sp.sympify(at), sp.sympify(factor), tuple(given)
        )
        return self._add(Step(tag, name, "checked", statement, certificate, text))

    def recurrence(
        self,
        tag: str,
        name: str,
        statement: Relational,
        step: Relational,
        start: Mapping[object, object],
        text: str = "",
    ) -> Step:
        """Add a closed form of a recurrence, proved by induction."""
        exact = {sp.sympify(k): sp.sympify(v) for k, v in start.items()}
        certificate = Recurrence(step, exact)
        return self._add(Step(tag, name, "checked", statement, certificate, text))

    def example(
        self,
        tag: str,
        name: str,
        statement: Relational,
        values: tuple[object, object],
        at: Mapping[object, object] | None = None,
        text: str = "",
    ) -> Step:
        """Add an exact evaluation: the two sides take the stated values."""
        return self._evaluation("checked", tag, name, statement, values, at, text)

    def counterexample(
        self,
        tag: str,
        name: str,
        statement: Relational,
        values: tuple[object, object],
        at: Mapping[object, object] | None = None,
        text: str = "",
    ) -> Step:
        """Add an exact evaluation that refutes the claim."""
        return self._evaluation(
            "counterexample", tag, name, statement, values, at, text
        )

    def _evaluation(
        self,
        kind: str,
        tag: str,
        name: str,
        statement: Relational,
        values: tuple[object, object],
        at: Mapping[object, object] | None,
        text: str,
    ) -> Step:
        left, right = map(sp.sympify, values)
        point = {sp.sympify(k): sp.sympify(v) for k, v in (at or {}).items()}
        certificate = Evaluation(point, (left, right))
        return self._add(Step(tag, name, kind, statement, certificate, text))

    def measured(
        self,
        tag: str,
        name: str,
        text: str,
        value: float,
        bound: float,
        *,
        floor: bool = False,
    ) -> Step:
        """Add a simulated quantity that must not exceed its bound (3 digits shown).

        With `floor` it is `value` that is proved, a lower bound of the simulated
        `bound`. Raises ProofError if the bound is exceeded, or not a number.
        """
        if not value <= bound:
            raise ProofError(f"[{tag}] {name}: {value:.3g} exceeds {bound:.3g}")
        words = ("Proved floor", "measured") if floor else ("Worst value", "bound")
        shown = f"{text} {words[0]} {value:.3g}, {words[1]} {bound:.3g}."
        return self._add(Step(tag, name, "measured", text=shown))

    def proof(self) -> Proof:
        """Return the steps added since the last call, for display."""
        steps = tuple(self.steps[self._shown :])
        self._shown = len(self.steps)
        return Proof(steps)

    def _repr_markdown_(self) -> str:
        lines = [f"**{self.name}** ({self.source}). *Verdict: {self.verdict}.*"]
        if self.printed:
            word = "In our words" if self.paraphrase else "As printed"
            lines.append(f"*{word}.* {self.printed}")
        if self.slip:
            word = "A slip on the way" if self.verdict == HOLDS else "What is wrong"
            lines.append(f"*{word}.* {self.slip}")
        if self.corrected:
            right = {NEW: "Statement", HOLDS: "Remark"}
            word = right.get(self.verdict, "What is right")
            lines.append(f"*{word}.* {self.corrected}")
        # a quotation sets the statement off from the steps of its proof
        text = "\n\n".join(lines)
        return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


# --- chapters ------------------------------------------------------------------------


def proof_code(
    notebook: str | os.PathLike[str], tags: Iterable[str] = ("proof",)
) -> str:
    """Return the code of the notebook's cells that carry one of the tags."""
    wanted = set(tags)
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    chosen = (
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code"
        and wanted & set(cell["metadata"].get("tags", ()))
    )
    return "\n\n".join(chosen)


def load(
    notebook: str | os.PathLike[str], tags: Iterable[str] = ("proof",)
) -> list[Theorem]:
    """Run the proof cells of a chapter and return its theorems in order.

    Every check runs again; ProofError if one fails. `tags` chooses the cells by their
    notebook tags; a cell that needs simulations carries ``measured`` instead.
    """
    namespace: dict[str, object] = {"__name__": Path(notebook).stem}
    code = compile(proof_code(notebook, tags), str(notebook), "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, namespace)
    return [value for value in namespace.values() if isinstance(value, Theorem)]
