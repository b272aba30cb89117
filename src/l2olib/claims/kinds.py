"""The kinds of tests: small declarative objects, and the statistics they rest on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..train import BURN_IN

Arrays = Mapping[str, Tensor]
Curves = Mapping[str, Arrays]
Window = tuple[int, int]

ALPHA = 0.05
PAIRS = 5
"""Fewer pairs cannot reach ``ALPHA`` in an exact one-sided sign-flip test."""


class NotTestable(Exception):
    """The records cannot decide this test; the message says why."""


class NotRecorded(NotTestable):
    """Records that could decide this test are still to be made."""


@dataclass(frozen=True)
class Outcome:
    """What one test found: pass or fail, its p-value where it has one, and the facts.

    ``detectable``: the smallest effect (in the metric's units) that this many pairs
    with this spread would show with probability 0.8, other rows left aside.
    """

    passed: bool
    p: float | None
    measured: str
    detectable: float | None = None

    @property
    def mark(self) -> str:
        return "✓" if self.passed else "✗"

    def __str__(self) -> str:
        if self.detectable is None or self.detectable < 1e-9:  # no spread but rounding
            return self.measured
        return f"{self.measured}, detectable {self.detectable:.2g}"


def against(a: float | Tensor, b: float | Tensor) -> str:
    """Two numbers in three digits, or in as many up to six as tell them apart."""
    for digits in range(3, 7):
        pair = f"{float(a):.{digits}g}", f"{float(b):.{digits}g}"
        if len(set(pair)) == 2:
            break
    return " against ".join(pair)


# ---- statistics ----------------------------------------------------------------------


def sign_flip(differences: Tensor) -> float:
    """Exact one-sided p-value that the mean of paired differences ``[R]`` is below 0.

    The share of the 2^R sign patterns whose mean is at most the observed one (Fisher's
    randomization test); above 16 pairs, of 100,000 patterns drawn with a fixed seed,
    the observed one counted. Raises NotTestable for a difference that is not finite.
    """
    d = differences.double()
    if not d.isfinite().all():  # comparisons with NaN are False: p would be 0
        raise NotTestable("paired differences are not finite")
    sums, extra = _signs(len(d)) @ d, len(d) > 16
    slack = 1e-12 * d.abs().sum()
    return (int((sums <= d.sum() + slack).sum()) + extra) / (len(sums) + extra)


@cache
def _signs(n: int) -> Tensor:
    """The sign patterns ``[patterns, n]`` of :func:`sign_flip`."""
    if n <= 16:
        patterns = torch.tensor(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        gen = torch.Generator().manual_seed(0)
        patterns = torch.randint(0, 2, (100_000, n), generator=gen) * 2.0 - 1
    return patterns.double()


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = worst
    return adjusted


def detectable(differences: Tensor) -> float:
    """Effect that :func:`sign_flip` finds at 0.05 with probability 0.8.

    In normal differences with this spread; without Holm's adjustment. That of a z-test
    is 2.486 standard errors; what few pairs need beyond that is from simulations.
    """
    n = len(differences)
    factor = {5: 3.78, 6: 3.02, 7: 2.94}.get(n, 2.486 + 2.5 / n)
    return float(factor * differences.double().std() / n**0.5)


def median(values: Tensor, dim: int | None = None) -> Tensor:
    """Median of all values or along ``dim``; NaN counts as infinite.

    Of an even number it is the mean of the middle two (PyTorch's is the lower one).
    """
    if dim is None:
        values, dim = values.flatten(), 0
    ordered = values.double().nan_to_num(math.inf, math.inf, -math.inf).sort(dim).values
    n = ordered.shape[dim]
    return (ordered.select(dim, (n - 1) // 2) + ordered.select(dim, n // 2)) / 2


# ---- reading curves ------------------------------------------------------------------


def window_mean(
    arrays: Arrays, window: Window, values: str = "bin_mean", at: str = "steps"
) -> Tensor:
    """Mean mini-batch training loss ``[R]`` over the steps ``a < k <= b``.

    Exact up to the snapping of a and b to the record's log-spaced points. Likewise
    other means over the bins between points, such as ``use_l2o`` over ``decisions``.
    """
    a, b = window
    steps = _until(arrays, b, at)
    starts = torch.cat([steps.new_zeros(1), steps[:-1]])
    low = int((starts - a).abs().argmin())
    high = max(int((steps - b).abs().argmin()), low)
    width = (steps - starts)[low : high + 1].double()
    means = arrays[values][:, low : high + 1].double()
    return (means * width).sum(1) / width.sum()


def divergence(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Which seeds diverge (bool ``[R]``) and from which step on (``[R]``, 0 if not).

    Diverges: a loss is not finite, or the smoothed loss at the end is at least 1.5 x
    its own earlier minimum and above the smoothed loss at 10% of the horizon (protocol,
    section 2), where earlier means since losses are smoothed. The time is the first
    point from which on it stays at 1.5 x its running minimum, or is not finite.
    """
    steps, smooth = arrays["steps"], arrays["smooth"].double()
    settled = steps >= BURN_IN
    if not settled.any():
        raise NotTestable(f"the records end before step {BURN_IN}")
    bad = ~arrays["bin_mean"].isfinite().int().cummin(1).values.bool()
    clean = torch.where(bad | ~settled, torch.inf, smooth)
    lowest = clean.cummin(1).values
    first = int(settled.int().argmax())
    tenth = clean[:, max(int((steps <= steps[-1] // 10).sum()) - 1, first)]
    end = clean[:, -1]
    diverged = bad[:, -1] | ((end >= 1.5 * lowest[:, -1]) & (end > tenth))
    high = bad | (settled & (clean >= 1.5 * lowest))
    stays = high.int().flip(1).cummin(1).values.flip(1)
    onset = torch.where(stays.any(1), steps[stays.argmax(1)], steps[-1])
    return diverged, torch.where(diverged, onset, torch.zeros_like(onset))


def diverging(arrays: Arrays, since: bool = True) -> str:
    """How many seeds diverge, and from which step on in the median: "3 of 5, 3,969".

    Nothing of a run that is too short to tell; without ``since`` only how many.
    """
    if int(arrays["steps"][-1]) < BURN_IN:
        return ""
    lost, onset = divergence(arrays)
    found = f"{int(lost.sum())} of {len(lost)}"
    return f"{found}, {median(onset[lost]):,.0f}" if since and lost.any() else found


def _method(curves: Curves, name: str) -> Arrays:
    if name not in curves:
        raise NotRecorded(f"there is no record of {name}")
    return curves[name]


def _enough(n: int) -> None:
    if n < PAIRS:
        raise NotTestable(f"{n} seeds are fewer than {PAIRS}")


def _until(arrays: Arrays, last: int, at: str = "steps", of: str = "step") -> Tensor:
    """The recorded points; NotTestable if they end before ``last``."""
    points = arrays[at]
    if (end := int(points[-1])) < last:
        raise NotTestable(f"the records end at {of} {end}, before {last}")
    return points


def _nearly(found: Tensor, expected: bool = True) -> bool:
    """Whether at least four fifths of the seeds show it (or at most one fifth)."""
    share = found.double().mean().item()
    return share >= 0.8 if expected else share <= 0.2


# ---- tests ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _OfOne:
    """A test of a method, by the records of an experiment."""

    experiment: str
    method: str

    def arrays(self, curves: Curves) -> Arrays:
        return _method(curves, self.method)


@dataclass(frozen=True)
class _OfTwo(_OfOne):
    """A test that compares it with another."""

    reference: str

    def both(self, curves: Curves) -> tuple[Arrays, Arrays]:
        return _method(curves, self.method), _method(curves, self.reference)


@dataclass(frozen=True)
class Lower(_OfTwo):
    """``method`` has a lower mean training loss than ``reference`` over a window.

    By more than ``by`` nats (``by > 0`` claims a clear lead); paired by seed, exact
    one-sided sign-flip test. Losses above 1,000, or not finite, count as 1,000.
    """

    window: Window
    by: float = 0.0

    def __call__(self, curves: Curves) -> Outcome:
        a, b = (window_mean(one, self.window) for one in self.both(curves))
        return _paired(a, b, -self.by)

    def __str__(self) -> str:
        lead = f" by more than {self.by:g} nat" if self.by else ""
        return f"{self.method} below {self.reference}{lead}, {_steps(self.window)}"


@dataclass(frozen=True)
class NotWorse(_OfTwo):
    """``method`` is not worse than ``reference`` over a window, within a margin.

    The margin is 0.02 nat of mean training loss, or 5% of the reference's where that is
    below 0.1 (protocol, section 2). Paired by seed, one-sided sign-flip test.
    """

    window: Window

    def __call__(self, curves: Curves) -> Outcome:
        a, b = (window_mean(one, self.window) for one in self.both(curves))
        margin = torch.where(b < 0.1, 0.05 * b, torch.full_like(b, 0.02))
        return _paired(a, b, torch.where(b < CEILING, margin, 0.0))

    def __str__(self) -> str:
        return f"{self.method} not worse than {self.reference}, {_steps(self.window)}"


CEILING = 1e3
"""What a loss above it, or one that is not finite, counts as."""


def _clipped(losses: Tensor) -> Tensor:
    return torch.nan_to_num(losses, CEILING, CEILING, CEILING).clamp(max=CEILING)


def _paired(a: Tensor, b: Tensor, margin: float | Tensor) -> Outcome:
    """Test mean(a - b - margin) < 0 over seeds."""
    a, b = _clipped(a), _clipped(b)
    text = f"{against(a.mean(), b.mean())} nat"
    return replace(
        _below_zero(a - b - margin, text, count=True), detectable=detectable(a - b)
    )


@dataclass(frozen=True)
class Diverges(_OfOne):
    """``method`` diverges (or not) in at least four fifths of the seeds.

    With ``between``, the median time of divergence must lie in that range of steps.
    """

    expected: bool = True
    between: Window | None = None

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        diverged, onset = divergence(arrays)
        _enough(len(diverged))
        horizon = int(_until(arrays, self.between[1] if self.between else 0)[-1])
        text = f"{int(diverged.sum())} of {len(diverged)} seeds diverge in {horizon:,}"
        passed = _nearly(diverged, self.expected)
        if diverged.any():
            middle = median(onset[diverged]).item()
            text += f" steps, median from step {middle:,.0f}"
            if self.between is not None:
                passed &= self.between[0] <= middle <= self.between[1]
        else:
            text += " steps"
        return Outcome(passed, None, text)

    def __str__(self) -> str:
        when = f", from a step in {_range(self.between)}" if self.between else ""
        return (
            f"{self.method} {'diverges' if self.expected else 'does not diverge'}{when}"
        )


@dataclass(frozen=True)
class Later(_OfOne):
    """``method`` has a lower mean training loss over ``window`` than ``earlier``."""

    window: Window
    earlier: Window

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        late, early = (window_mean(arrays, w) for w in (self.window, self.earlier))
        return _paired(late, early, 0.0)

    def __str__(self) -> str:
        return (
            f"{self.method} lower in {_steps(self.window)} than {_steps(self.earlier)}"
        )


def _tenths(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Shares of decisions won by the proposal, ``[R]``: in a run's first tenth, and in
    its last."""
    last = int(arrays["decisions"][-1])
    first, final = (0, last // 10), (last - last // 10, last)
    early = window_mean(arrays, first, "use_l2o", "decisions")
    return early, window_mean(arrays, final, "use_l2o", "decisions")


@dataclass(frozen=True)
class Switching(_OfOne):
    """The guard's choice drifts from the proposal to the fallback, but not for good.

    Share of decisions won by the proposal: lower in the last tenth of the run than in
    the first (paired, one-sided), and above zero in the last tenth in at least four
    fifths of the seeds.
    """

    def __call__(self, curves: Curves) -> Outcome:
        early, late = _tenths(self.arrays(curves))
        found = _below_zero(
            late - early, f"share {early.mean():.3g}, then {late.mean():.3g}"
        )
        return replace(found, passed=found.passed and _nearly(late > 0))

    def __str__(self) -> str:
        return (
            f"{self.method}: proposals win less often late than early, but still some"
        )


@dataclass(frozen=True)
class Seldom(_OfOne):
    """Proposals of ``method`` win less than ``share`` of its last tenth of decisions.

    One-sided sign-flip test over seeds.
    """

    share: float = 0.1

    def __call__(self, curves: Curves) -> Outcome:
        _, late = _tenths(self.arrays(curves))
        return _below_zero(late - self.share, f"{late.mean():.1%} of them")

    def __str__(self) -> str:
        return f"{self.method}: proposals win less than {self.share:.0%} late"


def _below_zero(gap: Tensor, text: str, count: bool = False) -> Outcome:
    """Test mean(gap) < 0 over seeds; ``text`` says what was measured."""
    _enough(len(gap))
    p = sign_flip(gap)
    text = f"{text}, p = {p:.2g}" + f", {len(gap)} seeds" * count
    return Outcome(p < ALPHA, p, text, detectable(gap))


@dataclass(frozen=True)
class MoreSwitching(_OfTwo):
    """``method`` changes its choice in a larger share of decisions than ``reference``.

    Over the whole run; paired by seed, one-sided sign-flip test.
    """

    def __call__(self, curves: Curves) -> Outcome:
        a, b = (
            arrays["switches"].double().sum(1) / arrays["decisions"][-1]
            for arrays in self.both(curves)
        )
        text = f"{against(a.mean(), b.mean())} of decisions"
        return _below_zero(b - a, text)

    def __str__(self) -> str:
        return f"{self.method} switches more often than {self.reference}"


@dataclass(frozen=True)
class AcceptsMore(_OfTwo):
    """``method`` accepts a larger share of proposals than ``reference``.

    Over the whole run; paired by seed, one-sided sign-flip test.
    """

    def __call__(self, curves: Curves) -> Outcome:
        a, b = (
            window_mean(
                arrays, (0, int(arrays["decisions"][-1])), "use_l2o", "decisions"
            )
            for arrays in self.both(curves)
        )
        return _below_zero(b - a, f"{a.mean():.1%} against {b.mean():.1%} of proposals")

    def __str__(self) -> str:
        return f"{self.method} accepts more than {self.reference}"


@dataclass(frozen=True)
class Noisier(_OfTwo):
    """The smoothed loss of ``method`` varies more than that of ``reference``.

    Standard deviation over the recorded points of a window, of each seed; paired,
    one-sided sign-flip test.
    """

    window: Window

    def __call__(self, curves: Curves) -> Outcome:
        a, b = map(self._spread, self.both(curves))
        text = f"spread {against(a.mean(), b.mean())} nat"
        return _below_zero(b - a, text)

    def _spread(self, arrays: Arrays) -> Tensor:
        steps = _until(arrays, self.window[1])
        inside = (steps > self.window[0]) & (steps <= self.window[1])
        return _clipped(arrays["smooth"][:, inside].double()).std(1)

    def __str__(self) -> str:
        return f"{self.method} noisier than {self.reference}, {_steps(self.window)}"


@dataclass(frozen=True)
class Stuck(_OfOne):
    """``method`` makes next to no progress from ``earlier`` to ``window``.

    Its mean training loss falls by less than ``share`` of the earlier one; one-sided
    sign-flip test over seeds.
    """

    window: Window
    earlier: Window
    share: float = 0.1

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        late, early = (
            _clipped(window_mean(arrays, w)) for w in (self.window, self.earlier)
        )
        text = f"{early.mean():.3g}, then {late.mean():.3g} nat"
        return _below_zero((1 - self.share) * early - late, text)

    def __str__(self) -> str:
        return (
            f"{self.method} falls by less than {self.share:.0%} from "
            f"{_steps(self.earlier)} to {_range(self.window)}"
        )


@dataclass(frozen=True)
class RisesFirst(_OfOne):
    """The loss of ``method`` climbs by more than ``by`` nat before it falls.

    Largest mini-batch loss of the first hundred steps against the first one; one-sided
    sign-flip test over seeds.
    """

    by: float = 0.05

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        losses = _clipped(arrays["loss"][:, arrays["steps"] <= 100].double())
        rise = losses.max(1).values - losses[:, 0]
        return _below_zero(self.by - rise, f"by {rise.mean():.3g} nat")

    def __str__(self) -> str:
        return f"{self.method} rises by more than {self.by:g} nat first"


@dataclass(frozen=True)
class Breaks(_OfOne):
    """A loss of ``method`` is not finite within so many steps, in at least four fifths
    of the seeds."""

    within: int

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        early = arrays["bin_mean"][:, _until(arrays, self.within) <= self.within]
        _enough(len(early))
        broken = ~early.isfinite().all(1)
        text = f"{int(broken.sum())} of {len(broken)} seeds"
        return Outcome(_nearly(broken), None, text)

    def __str__(self) -> str:
        return f"{self.method} is not finite within {self.within:,} steps"


@dataclass(frozen=True)
class KeepsBetter(_OfOne):
    """At every audited decision ``method`` keeps a point whose full training loss is at
    most that of the fallback's candidate (up to rounding, 1e-6 nat)."""

    def __call__(self, curves: Curves) -> Outcome:
        estimate = self.arrays(curves)
        y, z = (estimate[f"audit.full_{side}"] for side in ("proposal", "fallback"))
        kept = torch.where(estimate["audit.use_l2o"] > 0, y, z)
        good = kept <= z + 1e-6
        text = f"{int(good.sum()):,} of {good.numel():,} decisions"
        return Outcome(bool(good.all()), None, text)

    def __str__(self) -> str:
        return f"{self.method} never keeps a point worse than the fallback's"


@dataclass(frozen=True)
class KeepsLower(_OfOne):
    """From the points of ``method`` it keeps a lower loss than another guard would.

    On the whole training set, after one decision of each on the same batches
    (:class:`l2olib.meta_guard.Compared`), at more than ``share`` of the marks;
    one-sided sign-flip test over seeds.
    """

    other: str
    share: float = 0.9

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        won = arrays["kept"].double() <= arrays[f"kept.{self.other}"].double()
        found = won.double().mean(1)
        text = f"at {found.mean():.0%} of {won.shape[1]} points a seed"
        return _below_zero(self.share - found, text)

    def __str__(self) -> str:
        return f"{self.method} keeps no higher a loss than {self.other} would"


@dataclass(frozen=True)
class BarFalls(_OfOne):
    """The bar of a residual guard never rises (recorded decisions, every seed)."""

    def __call__(self, curves: Curves) -> Outcome:
        bar = self.arrays(curves)["bar"]
        risen = (bar.diff(dim=1) > 0).any(1)
        text = f"rises in {int(risen.sum())} of {len(risen)} seeds"
        return Outcome(not risen.any(), None, f"{text}, {bar.shape[1]} decisions each")

    def __str__(self) -> str:
        return f"the bar of {self.method} never rises"


@dataclass(frozen=True)
class Saturates(_OfOne):
    """A residual guard's bar falls below ``share`` of its start while the loss does
    not: over the last tenth of the run its mean is at least 0.9 of the first loss.

    In at least four fifths of the seeds.
    """

    share: float = 0.1

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        late = _clipped(ending(arrays))
        first, bar = arrays["loss"][:, 0].double(), arrays["bar"].double()
        _enough(len(late))
        fell = bar[:, -1] / bar[:, 0]
        seen = (fell < self.share) & (late >= 0.9 * first)
        text = f"bar to {median(fell):.2g} of its start, loss {median(first):.3g}, "
        text += f"then {median(late):.3g} nat (medians)"
        return Outcome(_nearly(seen), None, text)

    def __str__(self) -> str:
        return (
            f"the bar of {self.method} falls below {self.share:.0%} of its start, its "
            "loss does not fall"
        )


@dataclass(frozen=True)
class AcceptsWorse(_OfOne):
    """Most proposals that ``method`` accepts have a higher full training loss than the
    fallback's candidate: more than ``share`` of the audited acceptances, one-sided
    sign-flip test over the seeds that have any."""

    share: float = 0.5

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        use = arrays["audit.use_l2o"].double()
        worse = ~(arrays["audit.full_proposal"] < arrays["audit.full_fallback"])
        some = use.sum(1) > 0
        found = (use * worse).sum(1)[some] / use.sum(1)[some]
        count = f"{int(use.sum())} audited acceptances"
        if len(found) < PAIRS:
            raise NotTestable(f"only {len(found)} seeds have audited acceptances")
        return _below_zero(self.share - found, f"{found.mean():.0%} of {count}")

    def __str__(self) -> str:
        return f"most proposals that {self.method} accepts are worse than its fallback"


@dataclass(frozen=True)
class Learns:
    """After meta-training, 100 steps bring the loss to (or not to) ``share`` of chance.

    The last mini-batch loss with the selected meta-parameters, mean over seeds of one
    given meta-training; chance is ln(classes). One-sided sign-flip test over seeds.
    """

    experiment: str
    zeta: str
    data: str
    classes: int
    expected: bool = True
    share: float = 0.75

    def __call__(self, curves: Curves) -> Outcome:
        arrays = _method(curves, f"{self.zeta}/{self.data}")
        last = _clipped(arrays["selected.last"].double())
        bar = self.share * math.log(self.classes)
        gap = last - bar if self.expected else bar - last
        text = f"loss {last.mean():.3g} nat, bar {bar:.3g}"
        return _below_zero(gap, text, count=True)

    def __str__(self) -> str:
        verb = "learns" if self.expected else "does not learn"
        return (
            f"the L2O {verb} {self.data} (loss {self.share:.0%} of chance in 100 steps)"
        )


@dataclass(frozen=True)
class BetterTrained(_OfTwo):
    """After ``iterations`` of meta-training ``method`` has a lower meta-objective.

    That is the mean loss along the horizon, on starts of the optimizee that
    meta-training has not seen; of the recorded snapshot nearest to ``iterations``, a
    fifth away at most, or of the meta-parameters that are its result (None). With a
    ``margin`` (nat): not higher by more than that. One given meta-training against
    another; paired by start, one-sided sign-flip test.
    """

    iterations: int | None = None
    margin: float = 0.0

    def __call__(self, curves: Curves) -> Outcome:
        a, b = map(self.objective, self.both(curves))
        return _paired(a, b, self.margin)

    def objective(self, arrays: Arrays) -> Tensor:
        """The meta-objective of each start that the test compares."""
        if self.iterations is None:
            return arrays["selected.objective"].double()
        at = arrays["rollouts"]
        nearest = int((at - self.iterations).abs().argmin())
        if abs(int(at[nearest]) - self.iterations) > 0.2 * self.iterations:
            raise NotTestable(f"no snapshot is near: the next is of {int(at[nearest])}")
        return arrays["objective"][:, nearest].double()

    def __str__(self) -> str:
        verb = "not worse than" if self.margin else "below"
        when = "in the end" if self.iterations is None else (
            f"after {self.iterations:,} iterations")  # fmt: skip
        return f"meta-objective of {self.method} {verb} {self.reference}, {when}"


@dataclass(frozen=True)
class WorseStart(_OfTwo):
    """Points of ``method`` are worse starts than points of ``reference`` as low.

    What the same optimizer alone makes of them (:class:`l2olib.train.Released`): at the
    marks in the window, the logarithm of the loss where it ends, less that where it
    ends from the reference's point of equal loss, interpolated along its seed's run
    (both logarithmic). The mean over marks is above zero, or below (``worse=False``);
    paired by seed, one-sided sign-flip test. A mark whose loss the reference does not
    pass through is left out; a seed needs one.
    """

    window: Window
    worse: bool = True

    def __call__(self, curves: Curves) -> Outcome:
        a, b = self.both(curves)
        inside = (a["marks"] > self.window[0]) & (a["marks"] <= self.window[1])
        gaps = []
        for now, then, seen, ends in zip(
            a["full_loss"][:, inside], a["released"][:, inside], b["full_loss"],
            b["released"], strict=True,
        ):  # fmt: skip
            order = seen.argsort()
            x, y = (v[order].double().log().numpy() for v in (seen, ends))
            at = now.double().log()
            known = (at >= x[0]) & (at <= x[-1])
            if not known.any():
                raise NotTestable("the reference does not pass through these losses")
            expected = torch.from_numpy(np.interp(at[known].numpy(), x, y))
            gaps.append((then[known].double().log() - expected).mean())
        gap = torch.stack(gaps)
        text = f"loss after {gap.mean().exp():.3g} times that from an equal loss"
        return _below_zero(-gap if self.worse else gap, text)

    def __str__(self) -> str:
        kind = "worse" if self.worse else "better"
        return (
            f"points of {self.method} are {kind} starts than points of "
            f"{self.reference} as low, {_steps(self.window)}"
        )


@dataclass(frozen=True)
class BestTrained:
    """The best of ``methods`` is not worse than the best of ``references``.

    Best: of lowest mean over starts; a choice of units, such as a scale, then makes no
    difference. Within 0.02 nat of meta-objective (:class:`BetterTrained`).
    """

    experiment: str
    methods: tuple[str, ...]
    references: tuple[str, ...]
    iterations: int = 0

    def __call__(self, curves: Curves) -> Outcome:
        def best(names: tuple[str, ...]) -> str:
            return min(names, key=lambda name: self._mean(curves, name))

        a, b = best(self.methods), best(self.references)
        of = BetterTrained(self.experiment, a, b, self.iterations, margin=0.02)
        found = of(curves)
        return replace(found, measured=f"{a} beside {b}: {found.measured}")

    def _mean(self, curves: Curves, name: str) -> float:
        test = BetterTrained(self.experiment, name, name, self.iterations)
        found = test.objective(_method(curves, name)).mean()
        return found.nan_to_num(math.inf).item()

    def __str__(self) -> str:
        first, other = (names[0].rpartition(", ")[0] for names in
                        (self.methods, self.references))  # fmt: skip
        return f"{first} at its best not worse than {other} at its best"


@dataclass(frozen=True)
class Unbiased(_OfOne):
    """Estimates of ``method`` have the exact meta-gradient for a mean (or not).

    Over seeds: within 3 standard errors, these at most 3% of it; "or not": more than 5
    away from it.
    """

    expected: bool = True

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        estimate, exact = arrays["estimate"].double(), arrays["exact"][0].item()
        _enough(len(estimate))
        error = estimate.std().item() / len(estimate) ** 0.5
        away = abs(estimate.mean().item() - exact) / error
        small = error <= 0.03 * abs(exact)
        passed = small and (away < 3 if self.expected else away > 5)
        text = (
            f"{against(estimate.mean(), exact)}, {away:.1f} standard errors "
            f"of {error / abs(exact):.1%}"
        )
        return Outcome(passed, None, text)

    def __str__(self) -> str:
        return f"{self.method} is {'un' if self.expected else ''}biased"


@dataclass(frozen=True)
class AtTheEdge(_OfOne):
    """Training with ``method`` runs at its stability bound, an eigenvalue of -1.

    The step's leftmost eigenvalue falls below -0.9; from that mark on, until the loss
    is a tenth of the first, its mean lies in [-1.3, -0.7]. In four fifths of the seeds.
    """

    expected: bool = True

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        left = arrays["ritz"][..., 0].double().nan_to_num(torch.inf).amin(2)
        loss = arrays["full_loss"].double()
        _enough(len(left))
        seen, means = [], []
        for values, falling in zip(left, loss >= loss[:, :1] / 10, strict=True):
            reached = (values < -0.9).cummax(0).values & falling
            lowest = torch.where(falling, values, torch.inf).min()
            means.append(values[reached].mean() if reached.any() else lowest)
            seen.append(bool(reached.any()) and -1.3 <= float(means[-1]) <= -0.7)
        share = sum(seen) / len(seen)
        middle = median(torch.stack(means))
        text = f"{share:.0%} of seeds, leftmost eigenvalue {middle:.3g} (median)"
        return Outcome(share >= 0.8 if self.expected else share <= 0.2, None, text)

    def __str__(self) -> str:
        return f"{self.method} {'runs' if self.expected else 'does not run'} at -1"


@dataclass(frozen=True)
class StepsInside(_OfOne):
    """At the last three marks no eigenvalue of ``method``'s step is above ``bound`` in
    modulus, in four fifths of the seeds (or not: in four fifths some is).

    Where training has diverged and there is no step, it counts as outside.
    """

    expected: bool = True
    bound: float = 1.05

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        modulus = arrays["ritz"][:, -3:].double().norm(dim=-1)  # some may be NaN
        gone = modulus.isnan().all(-1, keepdim=True)
        modulus = torch.where(gone, torch.inf, modulus.nan_to_num(0.0))
        largest = modulus.amax((1, 2))
        _enough(len(largest))
        share = (largest <= self.bound).double().mean().item()
        beyond = median(largest).item() - 1
        side = "above" if beyond > 0 else "below"
        text = f"{share:.0%} of seeds inside, largest modulus (median) "
        text += f"{abs(beyond):.2g} {side} 1"
        return Outcome(share >= 0.8 if self.expected else share <= 0.2, None, text)

    def __str__(self) -> str:
        side = "inside" if self.expected else "outside"
        return f"the step of {self.method} ends {side} the circle of {self.bound:g}"


@dataclass(frozen=True)
class IdleGrow(_OfOne):
    """Weights of ``method`` that no gradient reaches have grown ``by`` when it ends.

    Against the same weights at the start, in at least four fifths of the seeds (or not:
    in at most one fifth). Where no weight is idle there is no growth.
    """

    expected: bool = True
    by: float = 10.0

    def __call__(self, curves: Curves) -> Outcome:
        growth = self.arrays(curves)["growth"][:, -1].double()
        growth = growth.nan_to_num(0.0, torch.inf)
        return _most(growth > self.by, self.expected, growth, "times the size")

    def __str__(self) -> str:
        verb = "grow" if self.expected else "do not grow"
        return f"idle weights of {self.method} {verb} by {self.by:g}"


@dataclass(frozen=True)
class IdleHarm(_OfOne):
    """Without its idle weights ``method`` ends with a held-out loss lower by a factor.

    Those that no gradient reaches when it ends, and the factor ``by``; in at least four
    fifths of the seeds (or not: in at most one fifth). A loss that is not finite is
    infinite.
    """

    expected: bool = True
    by: float = 2.0

    def __call__(self, curves: Curves) -> Outcome:
        with_, without = (
            self.arrays(curves)[name][:, -1].double()
            for name in ("test_loss", "pruned.test_loss")
        )
        with_, without = (
            torch.where(loss.isfinite(), loss, torch.inf) for loss in (with_, without)
        )
        ratio = (with_ / without).nan_to_num(1.0, torch.inf)  # both infinite: no less
        return _most(ratio > self.by, self.expected, ratio, "times the loss")

    def __str__(self) -> str:
        verb = "is" if self.expected else "is not"
        return (
            f"held-out loss of {self.method} {verb} lower by a factor of {self.by:g} "
            "without idle weights"
        )


@dataclass(frozen=True)
class Larger(_OfTwo):
    """All weights of ``method`` together end larger than those of ``reference``.

    Their Euclidean norm, by more than the factor ``by``, paired by seed; in at least
    four fifths of the seeds (or not: in at most one fifth). A norm that is not finite
    is infinite.
    """

    expected: bool = True
    by: float = 3.0

    def __call__(self, curves: Curves) -> Outcome:
        mine, other = (
            one["norms"][:, -1].double().norm(dim=1) for one in self.both(curves)
        )
        ratio = (mine / other).nan_to_num(torch.inf, torch.inf)
        return _most(ratio > self.by, self.expected, ratio, "times the norm")

    def __str__(self) -> str:
        verb = "end" if self.expected else "do not end"
        return (
            f"weights of {self.method} {verb} {self.by:g} times as large as those of "
            f"{self.reference}"
        )


def _most(found: Tensor, expected: bool, values: Tensor, of: str) -> Outcome:
    """Whether nearly all seeds show it (or nearly none)."""
    _enough(len(found))
    text = f"{int(found.sum())} of {len(found)} seeds, median {median(values):.3g} {of}"
    return Outcome(_nearly(found, expected), None, text)


@dataclass(frozen=True)
class Matched(_OfTwo):
    """One inner step of ``method`` costs at most ``within`` times one of ``reference``.

    ``quantity`` as in :class:`Cheaper`; a step is gradient and update together.
    """

    quantity: str
    within: float = 1.1

    def __call__(self, curves: Curves) -> Outcome:
        a, b = (float(one[self.quantity].double().mean()) for one in self.both(curves))
        return Outcome(a <= self.within * b, None, f"ratio {a / b:.3g}")

    def __str__(self) -> str:
        return (
            f"{self.quantity} of a step of {self.method} at most {self.within:g} times "
            f"those of {self.reference}"
        )


@dataclass(frozen=True)
class Cheaper(_OfTwo):
    """One inner step of ``method`` costs less than one of ``reference``.

    ``quantity``: ``flops`` (matrix work, by formula), ``depth`` (passes that must
    follow one another) or ``seconds`` (measured, and comparable only where code,
    machine, threads and compilation were the same).
    """

    quantity: str

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.both(curves)
        if self.quantity == "seconds":
            if len(torch.cat([one["conditions"] for one in arrays]).unique()) > 1:
                raise NotTestable("times were not measured under equal conditions")
        a, b = (float(one[self.quantity].double().mean()) for one in arrays)
        return Outcome(a < b, None, f"ratio {a / b:.4g}")

    def __str__(self) -> str:
        return (
            f"a step of {self.method} costs less than one of {self.reference} in "
            f"{self.quantity}"
        )


@dataclass(frozen=True)
class FewerHyperparameters(_OfTwo):
    """``method`` has fewer numbers of its own to choose than ``reference``.

    Counted by :func:`l2olib.experiments.hyperparameters`: the guard's own numbers and
    rules. What both need besides (step size, schedule, weights) is not counted.
    """

    def __call__(self, curves: Curves) -> Outcome:
        a, b = (int(one["hyperparameters"][0]) for one in self.both(curves))
        return Outcome(a < b, None, f"{a} against {b}")

    def __str__(self) -> str:
        return f"{self.method} has fewer hyperparameters than {self.reference}"


QUANTITIES = {
    "radius": "spectral radius",
    "real": "mean real part",
    "reach": "mean distance from 1",
    "unevenness": "largest distance from 1 over the median",
    "variance": "measured variance of ES",
    "single": "exact variance of one run's gradient",
    "late": "variance of the last truncation's estimate",
    "whole": "variance of an unroll's estimate",
    "final": "final excess of the meta-loss",
}
"""Names, for a reader, of recorded quantities."""


@dataclass(frozen=True)
class Less(_OfTwo):
    """``method`` has a lower ``quantity`` than ``reference``, one value a seed.

    Paired by seed, exact one-sided sign-flip test.
    """

    quantity: str

    def __call__(self, curves: Curves) -> Outcome:
        a, b = (one[self.quantity].double() for one in self.both(curves))
        return _below_zero(a - b, against(a.mean(), b.mean()), count=True)

    def __str__(self) -> str:
        name = QUANTITIES.get(self.quantity, self.quantity)
        return f"{name} of {self.method} below that of {self.reference}"


@dataclass(frozen=True)
class LessAligned(_OfTwo):
    """Estimates of ``method`` point less along the meta-gradient than ``reference``'s.

    :func:`alignment` with the mean of the estimates of ``exact``, mean over the
    recorded places; in at least four fifths of the seeds.
    """

    exact: str

    def __call__(self, curves: Curves) -> Outcome:
        exact = _method(curves, self.exact)["mean"]
        a, b = (alignment(one, exact).mean(1) for one in self.both(curves))
        return _most(a < b, True, a, f"against {median(b):.3g}")

    def __str__(self) -> str:
        return f"estimates by {self.method} less aligned than by {self.reference}"


def alignment(arrays: Arrays, exact: Tensor, clip: str = "clipped.") -> Tensor:
    """Inner product of estimates with ``exact [R, S, d]``, over their lengths, [R, S].

    Of the mean product and the root mean square length: 1 if every estimate is the same
    positive multiple of ``exact``, its cosine with it if all are alike, and less with
    noise.
    """
    mean, square = arrays[f"{clip}mean"].double(), arrays[f"{clip}square"].double()
    product = (mean * exact).sum(-1)
    return product / (square.sqrt() * exact.norm(dim=-1)).clamp(min=1e-300)


@dataclass(frozen=True)
class Inside(_OfOne):
    """All eigenvalues of ``method`` are inside the unit circle (or not) in at least
    four fifths of the seeds."""

    expected: bool = True

    def __call__(self, curves: Curves) -> Outcome:
        radius = self.arrays(curves)["radius"].double()
        _enough(len(radius))
        inside = radius < 1
        text = f"{inside.double().mean():.0%} of {len(radius)} seeds inside, radius "
        text += f"{radius.mean():.3g} on average"
        return Outcome(_nearly(inside, self.expected), None, text)

    def __str__(self) -> str:
        verb = "are" if self.expected else "are not all"
        return f"eigenvalues with {self.method} {verb} inside the unit circle"


@dataclass(frozen=True)
class Quieter(_OfOne):
    """The meta-gradient varies less for alpha inside the stable interval than at both
    of its ends, by a factor of more than ``by``, at every horizon of a range.

    Trace of the variance over seeds. Inside are the recorded alphas with ``inside[0] <
    alpha lambda_max / 2 < inside[1]``; the one of largest variance counts. One-sided
    sign-flip test over batches of seeds, which are the same at every alpha; its p-value
    is the largest of all horizons and ends.
    """

    inside: tuple[float, float]
    horizons: Window
    by: float = 1.0

    def __call__(self, curves: Curves) -> Outcome:
        arrays = self.arrays(curves)
        at = _until(arrays, self.horizons[1], "horizons", "horizon")
        alphas = arrays["alphas"]
        wanted = (at >= self.horizons[0]) & (at <= self.horizons[1])
        values = arrays["deviation"].double()[:, wanted]
        _enough(len(values))
        chosen = (alphas > self.inside[0]) & (alphas < self.inside[1])
        within, rows = values[..., chosen], torch.arange(values.shape[1])
        worst = within[:, rows, within.mean(0).argmax(1)]
        p, failed, least = 0.0, set(), math.inf
        for end in (values[..., 0], values[..., -1]):
            for row in rows.tolist():
                here = sign_flip(self.by * worst[:, row] - end[:, row])
                p = max(p, here)
                least = min(least, float(end[:, row].mean() / worst[:, row].mean()))
                if here >= ALPHA:
                    failed.add(int(at[wanted][row]))
        text = f"at least {least:.3g} times lower" if least >= 1 else (
            f"at worst {1 / least:.3g} times higher")  # fmt: skip
        if failed:
            text += f", not shown at horizon {', '.join(map(str, sorted(failed)))}"
        return Outcome(p < ALPHA, p, f"{text}, p = {p:.2g}")

    def __str__(self) -> str:
        lead = f" more than {self.by:g} times" if self.by > 1 else ""
        low, high = self.inside
        return (
            f"{self.method}: variance for alpha in ({low:g}, {high:g}) of the edge"
            f"{lead} lower than at both ends, horizons {_range(self.horizons)}"
        )


@dataclass(frozen=True)
class GoesWith:
    """``quantity`` is high where the spectral radius of A is, along meta-trainings.

    Spearman's rank correlation over the recorded iterations of a window of all
    ``methods`` together, one for each seed. Its mean is above ``least``, one-sided
    sign-flip test over seeds.
    """

    experiment: str
    methods: tuple[str, ...]
    quantity: str
    window: Window
    least: float = 0.5

    def __call__(self, curves: Curves) -> Outcome:
        xs, ys = [], []
        for name in self.methods:
            arrays = _method(curves, name)
            steps = _until(arrays, self.window[1], of="iteration")
            now = (steps > self.window[0]) & (steps <= self.window[1])
            xs.append(arrays["radius"].double()[:, now])
            ys.append(arrays[self.quantity].double()[:, now])
        x, y = torch.cat(xs, 1), torch.cat(ys, 1)
        found = torch.stack([rank_correlation(a, b) for a, b in zip(x, y, strict=True)])
        text = f"rank correlation {found.mean():.3g}"
        return _below_zero(self.least - found, text, count=True)

    def __str__(self) -> str:
        return (
            f"{QUANTITIES.get(self.quantity, self.quantity)} goes with the spectral "
            f"radius (rank correlation above {self.least:g}), iterations "
            f"{_range(self.window)}"
        )


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation of two samples [n] without ties; NaN is no value."""
    both = torch.stack([x, y])[:, x.isfinite() & y.isfinite()]
    return torch.corrcoef(both.argsort(1).argsort(1).double())[0, 1]


def first_near(arrays: Arrays, bar: float) -> Tensor:
    """First recorded iteration [R] whose exact meta-loss is at most ``bar`` times the
    lowest possible one; infinite if there is none."""
    near = arrays["exact"] <= bar * arrays["optimum"][0]
    first = arrays["steps"][near.int().argmax(1)].double()
    return torch.where(near.any(1), first, torch.inf)


@dataclass(frozen=True)
class NearOptimum:
    """The quickest of ``methods`` comes near the optimum within ``iterations``.

    Near: an exact meta-loss of at most ``bar`` times the lowest possible. In at least
    four fifths of the seeds; the quickest is the one of smallest median.
    """

    experiment: str
    methods: tuple[str, ...]
    iterations: int
    bar: float = 1.05

    def __call__(self, curves: Curves) -> Outcome:
        found = _firsts(curves, self.methods, self.bar)
        name = min(found, key=lambda n: median(found[n]).item())
        if int(_method(curves, name)["steps"][-1]) < self.iterations:
            raise NotTestable(f"the records end before iteration {self.iterations:,}")
        share = (found[name] <= self.iterations).double().mean().item()
        middle = median(found[name]).item()
        text = f"{name}: median {middle:,.0f} iterations, {share:.0%} of "
        return Outcome(share >= 0.8, None, f"{text}{len(found[name])} seeds in time")

    def __str__(self) -> str:
        return (
            f"the best alpha is within {self.bar - 1:.0%} of the optimum after "
            f"{self.iterations:,} iterations"
        )


@dataclass(frozen=True)
class TimesSlower:
    """The slowest of ``methods`` takes at least ``factor`` times the quickest's median
    number of iterations to come near the optimum, or does not within the records,
    which must be that long."""

    experiment: str
    methods: tuple[str, ...]
    factor: float
    bar: float = 1.05

    def __call__(self, curves: Curves) -> Outcome:
        medians = {
            name: median(first).item()
            for name, first in _firsts(curves, self.methods, self.bar).items()
        }
        quick, slow = min(medians.values()), max(medians.values())
        name = max(medians, key=lambda n: medians[n])
        last = int(_method(curves, name)["steps"][-1])
        if math.isinf(slow):
            if last < self.factor * quick:
                raise NotTestable(
                    f"{name} has not arrived, but the records end at iteration "
                    f"{last:,}, before {self.factor:g} times the quickest"
                )
            return Outcome(True, None, f"{name}: not in {last:,} iterations")
        text = f"{name}: {slow:,.0f} against {quick:,.0f} iterations"
        return Outcome(slow >= self.factor * quick, None, f"{text}, median")

    def __str__(self) -> str:
        return (
            f"the worst alpha takes at least {self.factor:g} times as many iterations "
            f"to {self.bar - 1:.0%} of the optimum as the best"
        )


def _firsts(curves: Curves, methods: Iterable[str], bar: float) -> dict[str, Tensor]:
    found = {name: first_near(_method(curves, name), bar) for name in methods}
    for first in found.values():
        _enough(len(first))
    return found


def fails(arrays: Arrays) -> Tensor:
    """Which seeds diverge, or end 10% above the loss that they began with (``[R]``).

    The second is not divergence as the protocol has it, which looks from
    ``BURN_IN`` on: a run that explodes in its first steps and stays there.
    """
    first = arrays["bin_mean"][:, 0].double()
    return divergence(arrays)[0] | (ending(arrays) > 1.1 * first)


def ending(arrays: Arrays) -> Tensor:
    """Mean training loss ``[R]`` of a run's last tenth; infinite if not finite."""
    last = int(arrays["steps"][-1])
    return window_mean(arrays, (last - last // 10, last)).nan_to_num(math.inf, math.inf)


def _on_tasks(curves: Curves, tasks: Sequence[str], method: str) -> dict[str, Arrays]:
    """The runs of a method on several tasks; their labels are "task, method"."""
    found = {task: _method(curves, f"{task}, {method}") for task in tasks}
    _enough(sum(len(arrays["bin_mean"]) for arrays in found.values()))
    return found


def _short(runs: Mapping[str, Arrays], horizon: int) -> list[str]:
    """The tasks whose runs end before ``horizon``."""
    return [task for task, a in runs.items() if int(a["steps"][-1]) < horizon]


def _end(tasks: Iterable[str], horizon: int) -> str:
    return f"the runs on {', '.join(tasks)} end before step {horizon:,}"


def _count(found: Tensor) -> tuple[int, int]:
    return int(found.sum()), len(found)


def _seeds(found: Mapping[str, Tensor]) -> str:
    """In how many of its seeds something was found, for each task."""
    return ", ".join(
        "{} ({} of {} seeds)".format(task, *_count(each))
        for task, each in found.items()
    )


def _of(tasks: Sequence[str], low: float, high: float = 1.0) -> str:
    """How many of the tasks, for a reader."""
    if low == high == 1:
        return f"all {len(tasks)} tasks"
    if high == 1:
        return f"at least {low:.0%} of {len(tasks)} tasks"
    if low == 0:
        return f"at most {high:.0%} of {len(tasks)} tasks"
    return f"{low:.0%} to {high:.0%} of {len(tasks)} tasks"


@dataclass(frozen=True)
class Wins:
    """On what share of ``tasks`` does ``method`` end lower than ``reference``?

    It lies between the two numbers of ``share``. A task counts with the share of its
    seeds in which the mean training loss over the last tenth of the run is below
    ``within`` times the reference's (1.05: not worse by 5%); tasks have losses of other
    kinds, so these are compared as ratios. A loss that is not finite is infinite.
    """

    experiment: str
    tasks: tuple[str, ...]
    method: str
    reference: str
    share: tuple[float, float]
    within: float = 1.0

    def __call__(self, curves: Curves) -> Outcome:
        ours, theirs = (
            _on_tasks(curves, self.tasks, name)
            for name in (self.method, self.reference)
        )
        won = {
            task: ending(ours[task]) < self.within * ending(theirs[task])
            for task in self.tasks
        }
        found = sum(Fraction(*_count(each)) for each in won.values()) / len(won)
        low, high = (Fraction(str(share)) for share in self.share)
        text = f"on {float(found):.0%}"
        if rest := {task: each for task, each in won.items() if not each.all()}:
            text += f"; not always on {_seeds(rest)}"
        return Outcome(low <= found <= high, None, text)

    def __str__(self) -> str:
        verb = "below" if self.within == 1 else f"within {self.within - 1:.0%} of"
        return f"{self.method} ends {verb} {self.reference} on " + _of(
            self.tasks, *self.share
        )


@dataclass(frozen=True)
class DivergesOn:
    """``method`` diverges (or not) on at least ``share`` of ``tasks``.

    On a task: in at least four fifths of its seeds (not: in at most one fifth), each as
    :func:`fails` says. A run shorter than ``horizon`` can show that it diverges, but
    not that it would not: where that could decide, the test is not testable.
    """

    experiment: str
    tasks: tuple[str, ...]
    method: str
    expected: bool = True
    share: float = 1.0
    horizon: int = 10_000

    def __call__(self, curves: Curves) -> Outcome:
        runs = _on_tasks(curves, self.tasks, self.method)
        bad = {task: fails(arrays) for task, arrays in runs.items()}
        said = {task: _nearly(each, self.expected) for task, each in bad.items()}
        # seeds may still diverge later: that is all a short run leaves open
        short = _short(runs, self.horizon)
        open_ = [task for task in short if said[task] != self.expected]
        sure = sum(said[task] for task in said if task not in open_)
        text = _seeds({task: each for task, each in bad.items() if each.any()})
        text = f"on {text or 'none'}"
        enough = Fraction(str(self.share)) * len(bad)
        if sure < enough <= sure + len(open_):
            raise NotTestable(f"{text}; {_end(open_, self.horizon)}")
        return Outcome(sure >= enough, None, text)

    def __str__(self) -> str:
        verbs = ("diverges", "ends") if self.expected else ("does not diverge", "end")
        return "{} {} (or {} 10% above its start) on {}".format(
            self.method, *verbs, _of(self.tasks, self.share)
        )


@dataclass(frozen=True)
class Descends:
    """On every task the best of ``methods`` still descends when the run ends.

    Best: of lowest mean over the seeds of the loss over the last tenth of the run.
    Descends: in at least four fifths of its seeds that loss is below the mean over the
    tenth before the middle, by a share of ``by``, and the run does not fail
    (:func:`fails`). That a run shorter than ``horizon`` descends shows nothing.
    """

    experiment: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    by: float = 0.01
    horizon: int = 10_000

    def __call__(self, curves: Curves) -> Outcome:
        found = {name: _on_tasks(curves, self.tasks, name) for name in self.methods}
        failed = []
        for task in self.tasks:
            runs = [found[name][task] for name in self.methods]
            best = min(runs, key=lambda arrays: ending(arrays).mean().item())
            half = int(best["steps"][-1]) // 2
            before = window_mean(best, (half - half // 5, half))
            down = (ending(best) < (1 - self.by) * before) & ~fails(best)
            if not _nearly(down):
                failed.append(task)
        text = f"on {len(self.tasks) - len(failed)} of {len(self.tasks)} tasks"
        text += f", not {', '.join(failed)}" if failed else ""
        short = _short(found[self.methods[0]], self.horizon)
        if short and not failed:
            raise NotTestable(f"{text}; {_end(short, self.horizon)}")
        return Outcome(not failed, None, text)

    def __str__(self) -> str:
        names = " or ".join(self.methods)
        return (
            f"{names} descends to the end (by {self.by:.0%} in its second half) on "
            f"{_of(self.tasks, 1.0)}"
        )


def _range(window: Window) -> str:
    return f"{window[0]:,}–{window[1]:,}"


def _steps(window: Window) -> str:
    return f"steps {_range(window)}"
