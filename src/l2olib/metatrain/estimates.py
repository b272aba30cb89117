"""Estimates of a meta-gradient held against the exact one; meta-training by them.

The test piece is SGD with a learned rate on the noisy quadratic of STAR. Its only
meta-parameter is theta, the logarithm of the rate; the meta-loss is the mean loss of
the first T steps, l_t(phi_t) for t = 0..T - 1. Second moments of phi_t obey a linear
recursion, also when theta is perturbed anew in each truncation, and so the loss that
PES differentiates, and what truncated estimators differentiate instead, are exact.

For the meta-training of a learned optimizer on a network, :class:`NetworkEstimates` has
what such a comparison needs; back-propagation through whole unrolls is exact there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.utils._pytree import tree_map

from ..learned.sgd import LearnableSGD
from ..optimizers import Adam, State, check_literals, constant
from ..stability import NoisyQuadratic
from ..train import log_spaced
from .evolution import (
    PES,
    BackPropagation,
    Evolution,
    EvolutionJob,
    clipped,
    generator,
    over_pairs,
)
from .quadratic import HESSIAN, Matrix, problem_of
from .truncated import strided_snapshots

NODES = 20
"""Of the quadrature over one perturbation."""


def rate_step(
    problem: NoisyQuadratic, meta: Tensor, params: Tensor, state: State, minimum: Tensor
) -> tuple[Tensor, Tensor, State]:
    """One inner step: theta ``meta [1]``, ``params [n]``, the minimum xi_t ``[n]``."""
    gap = params - minimum
    grad = problem.hessian @ gap
    delta, state = LearnableSGD().update({"log_lr": meta}, grad, state, params)
    return 0.5 * gap @ grad, params + delta, state


def meta_loss(
    problem: NoisyQuadratic,
    theta: Tensor,
    horizon: int,
    spread: float,
    truncation: int | None = None,
    sigma: float = 0.0,
    carried: bool = True,
) -> Tensor:
    """Expected mean loss of ``horizon`` steps from phi_0 ~ N(0, spread I), a scalar.

    With ``sigma`` its mean over perturbations N(0, sigma^2) of theta, one for each
    ``truncation`` steps (None: one for the unroll): what PES differentiates. Only the
    state's second moment S goes on from one truncation to the next, and is averaged
    over the perturbation before; one-dimensional Gauss-Hermite quadrature does that.
    It is exact to rounding while rates a few sigma above are stable, and says nothing
    beyond: there rare perturbations have astronomical losses and decide the mean.

    With ``carried=False`` the derivative takes each truncation's first state for given:
    what truncated ES and truncated back-propagation (``sigma=0``) differentiate.
    """
    h, eye = problem.hessian, torch.eye(problem.size, dtype=torch.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES if sigma else 1)
    weight = torch.tensor(weights / weights.sum())
    rates = (theta.double() + sigma * torch.tensor(nodes)).exp()
    a = problem.dynamics(0 * eye, rates)
    noise = (eye - a) @ problem.noise @ (eye - a).mT
    moment, total = spread * eye, torch.zeros((), dtype=torch.float64)
    for first in range(0, horizon, truncation or horizon):
        here = (moment if carried else moment.detach()).expand_as(a)
        for _ in range(first, min(first + (truncation or horizon), horizon)):
            losses = 0.5 * (h * (here + problem.noise)).sum((-1, -2))
            total = total + weight @ losses
            here = a @ here @ a.mT + noise
        moment = torch.einsum("k,kij->ij", weight, here)
    return total / horizon


def meta_gradient(problem: NoisyQuadratic, theta: float, *rest: Any) -> float:
    """Derivative of :func:`meta_loss` at ``theta``; ``rest`` are its arguments."""
    with torch.enable_grad():
        at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        value = meta_loss(problem, at, *rest)
        (slope,) = torch.autograd.grad(value, at)
    return slope.item()


def stationary(problem: NoisyQuadratic, low: float, high: float, *rest: Any) -> float:
    """The theta in [low, high] at which :func:`meta_gradient` vanishes.

    ValueError if it has the same sign at both ends.
    """
    return brentq(lambda theta: meta_gradient(problem, theta, *rest), low, high)


def starts(
    problem: NoisyQuadratic, spread: float, *key: Any
) -> Callable[[int, int], tuple[Tensor, State]]:
    """What PES calls to begin an episode of a pair; ``key`` tells runs apart."""

    def begin(pair: int, episode: int) -> tuple[Tensor, State]:
        gen = generator("start", *key, pair, episode)
        phi = torch.randn(problem.size, generator=gen, dtype=torch.float64)
        return spread**0.5 * phi, {}

    return begin


def minima_of(problem: NoisyQuadratic, pairs: int, steps: int, *key: Any) -> Tensor:
    """Minima xi_t ~ N(0, I) ``[pairs, steps, n]`` of a piece named by ``key``."""
    gen, shape = generator("minima", *key), (pairs, steps, problem.size)
    return torch.randn(shape, generator=gen, dtype=torch.float64)


# ---- bias and variance ---------------------------------------------------------------


@dataclass(frozen=True)
class EstimateStatistics:
    """How estimates of the derivative in theta, at rate ``rate``, scatter.

    For each seed the estimator's pairs go through one whole unroll, one estimate each
    truncation; the mean of these estimates one for the unroll.
    """

    estimator: PES
    seeds: tuple[int, ...]
    rate: float
    spread: float = 10.0
    hessian: Matrix = HESSIAN

    def __post_init__(self) -> None:
        e = self.estimator
        if e.horizon % e.truncation or e.offset:
            raise ValueError(
                "pairs go through an unroll together: use a horizon that is a multiple "
                f"of the truncation, not {e.horizon} and {e.truncation}, and no offset"
            )
        if e.pairs < 2:
            raise ValueError("a variance takes at least 2 pairs, not 1")

    def seconds(self) -> float:
        e = self.estimator
        return len(self.seeds) * (e.horizon * (4e-4 + 2e-7 * e.pairs) + 5e-5 * e.pairs)

    on_cpu: ClassVar[bool] = True

    def job(self, device: str, compile: bool, metas: Any) -> EstimateStatisticsJob:
        return EstimateStatisticsJob(self)


@dataclass
class EstimateStatisticsJob:
    """The resumable computation of an :class:`EstimateStatistics`; a seed a piece."""

    config: EstimateStatistics
    problem: NoisyQuadratic = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.problem = problem_of(c.hessian)
        self.theta = torch.tensor([c.rate], dtype=torch.float64).log()
        self.pieces = c.estimator.horizon // c.estimator.truncation

    def start(self) -> State:
        blank = torch.full((len(self.config.seeds),), torch.nan, dtype=torch.float64)
        return {
            "done": torch.zeros((), dtype=torch.int64),
            "estimate": blank.clone(),
            "whole": blank.clone(),
            "online": blank[:, None].repeat(1, self.pieces),
        }

    def position(self, state: State) -> tuple[int, int]:
        return int(state["done"]), len(self.config.seeds)

    def unroll(self, seed: int) -> Tensor:
        """Estimates [S, N] of N pairs from each of S truncations."""
        c, e, found = self.config, self.config.estimator, []

        def step(*args: Any) -> Any:
            return rate_step(self.problem, *args)

        begin = starts(self.problem, c.spread, seed)
        pairs = e.start(self.theta, begin, seed)
        for k in range(self.pieces):
            eps = e.perturbations(self.theta, seed, k)
            minima = minima_of(self.problem, e.pairs, e.truncation, seed, k)
            one, pairs = e.estimate(
                over_pairs(step), begin, self.theta, eps, pairs, minima
            )
            found.append(one.per_pair[:, 0])
        return torch.stack(found)

    @torch.no_grad()
    def advance(self, state: State) -> State:
        k = int(state["done"])
        found = self.unroll(self.config.seeds[k])
        new = {n: state[n].clone() for n in ("estimate", "whole", "online")}
        new["estimate"][k] = found.mean()
        new["whole"][k] = found.mean(0).var()
        new["online"][k] = found.var(1)
        return new | {"done": state["done"] + 1}

    def finish(self, state: State) -> dict[str, Tensor]:
        """For each seed: ``estimate [R]`` for the unroll, mean over pairs; the variance
        of one pair's: ``whole [R]`` of that for the unroll, ``online [R, S]`` from each
        truncation, ``late [R]`` from the last. ``exact [1]``: the derivative of the
        smoothed meta-loss; ``expected [1]``: the mean of this estimator, if its
        restarts are free.
        """
        c, e = self.config, self.config.estimator
        theta, rest = self.theta.item(), (e.horizon, c.spread, e.truncation, e.sigma)
        exact = meta_gradient(self.problem, theta, *rest)
        mean = meta_gradient(self.problem, theta, *rest, e.accumulate)
        return {
            "estimate": state["estimate"],
            "whole": state["whole"],
            "online": state["online"].float(),
            "late": state["online"][:, -1].clone(),
            "exact": torch.tensor([exact]),
            "expected": torch.tensor([mean]),
        }


@dataclass(frozen=True)
class NetworkEstimates:
    """How estimates scatter along the meta-training that ``weights`` names.

    ``training`` has their ``estimator``, problem, seed and clipping. At every
    ``stride``-th snapshot, counted from the last, the meta-parameters stay, unrolls go
    on from truncation to truncation, and ``count`` estimates are made, after as many as
    it takes the unrolls to spread over an ``offset``.
    """

    training: Evolution
    weights: dict[str, str]
    count: int
    stride: int = 1
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def optimizer(self) -> Any:
        return self.training.optimizer

    @property
    def data(self) -> str:
        return self.training.data

    @property
    def seeds(self) -> tuple[int]:
        return self.training.seeds

    @property
    def settling(self) -> int:
        """Estimates before those that count."""
        e = self.training.estimator
        return math.ceil(e.offset / e.truncation)

    def seconds(self) -> float:
        looks = math.ceil(len(self.training.snapshots()) / self.stride)
        iterations = looks * (self.settling + self.count)
        of = replace(
            self.training, iterations=iterations, validate_every=iterations + 1
        )
        return of.seconds()

    def job(self, device: str, compile: bool, metas: Any) -> NetworkEstimatesJob:
        return NetworkEstimatesJob(self, metas["optimizer"], device, compile)


@dataclass
class NetworkEstimatesJob:
    """The resumable computation of :class:`NetworkEstimates`; a snapshot a piece.

    ``trained`` are the arrays of the meta-training's record.
    """

    config: NetworkEstimates
    trained: dict[str, Tensor]
    device: str = "cpu"
    compile: bool = False

    def __post_init__(self) -> None:
        self.chosen = strided_snapshots(self.config.stride, self.trained)
        self.inner = EvolutionJob(self.config.training, self.device, self.compile)

    def start(self) -> State:
        size, d = len(self.chosen), self.inner.layout.n
        state: State = {"done": torch.zeros((), dtype=torch.int64)}
        for name in ("whole", "clipped"):
            state[name] = {
                "mean": torch.zeros(1, size, d, dtype=torch.float64),
                "square": torch.zeros(1, size, dtype=torch.float64),
            }
        return state

    def position(self, state: State) -> tuple[int, int]:
        return int(state["done"]), len(self.chosen)

    @torch.no_grad()
    def advance(self, state: State) -> State:
        c, k = self.config, int(state["done"])
        of, e = c.training, c.training.estimator
        meta = self.trained["snapshots"][self.chosen[k]].to(self.device)
        pairs = e.start(meta, self.inner.begin, of.seed)
        new = tree_map(torch.clone, state)
        for i in range(c.settling + c.count):
            eps = e.perturbations(meta, of.seed, i)
            found, pairs = self.inner.estimate(meta, eps, pairs, self.inner.batches(i))
            if i < c.settling:
                continue
            for name, bound in (("whole", torch.inf), ("clipped", of.clip)):
                one = clipped(found.gradient, bound).double().cpu()
                new[name]["mean"][0, k] += one / c.count
                new[name]["square"][0, k] += one @ one / c.count
        return new | {"done": state["done"] + 1}

    def finish(self, state: State) -> dict[str, Tensor]:
        """At the snapshots after ``rollouts [S]`` iterations: the ``mean [1, S, d]`` of
        the estimates and of their squared lengths, ``square [1, S]``; ``clipped.mean``
        and ``clipped.square`` of what the outer optimizer sees of them.
        """
        clip = {f"clipped.{name}": v for name, v in state["clipped"].items()}
        at = self.trained["snapshot_rollouts"][self.chosen]
        return state["whole"] | clip | {"rollouts": at}


# ---- meta-training -------------------------------------------------------------------


@dataclass(frozen=True)
class RateTraining:
    """Meta-train theta from the rate ``start`` by Adam, for ``steps`` inner steps.

    One outer step each truncation of ``estimator``, with estimates of its pairs; or, by
    ``back-propagation``, with the derivative of as many runs (two a pair) through a
    truncation. Every run sees ``steps`` inner steps in all, whatever the truncation.
    """

    estimator: PES
    seeds: tuple[int, ...]
    by: Literal["evolution", "back-propagation"] = "evolution"
    steps: int = 20_000
    meta_lr: float = 0.03
    start: float = 0.01
    clip: float = 1.0
    spread: float = 10.0
    points: int = 100
    hessian: Matrix = HESSIAN

    def __post_init__(self) -> None:
        e = self.estimator
        if e.horizon % e.truncation or e.resets != "free" or e.offset:
            raise ValueError(
                "runs restart together, at the end of a truncation: use a horizon that "
                "is a multiple of it, free resets and no offset"
            )
        if self.steps < e.truncation:
            raise ValueError(
                f"steps must be at least a truncation, {e.truncation}, not {self.steps}"
            )
        check_literals(self)

    @property
    def iterations(self) -> int:
        return self.steps // self.estimator.truncation

    def seconds(self) -> float:
        return 6e-4 * self.steps

    on_cpu: ClassVar[bool] = True

    def job(self, device: str, compile: bool, metas: Any) -> RateTrainingJob:
        return RateTrainingJob(self)


@dataclass
class RateTrainingJob:
    """The resumable computation of a :class:`RateTraining`, all seeds at once.

    A piece is the iterations up to the next of about ``points`` log-spaced ones.
    """

    config: RateTraining
    problem: NoisyQuadratic = field(init=False)

    def __post_init__(self) -> None:
        c, e = self.config, self.config.estimator
        self.problem = problem_of(c.hessian)
        self.outer = Adam(constant(c.meta_lr))
        self.marks = [0, *log_spaced(1, c.iterations, c.points)]
        self.one: PES | BackPropagation = e  # the estimator of one seed
        self.all: PES | BackPropagation = replace(e, pairs=e.pairs * len(c.seeds))
        if c.by == "back-propagation":
            self.one = BackPropagation(2 * e.pairs, e.truncation, e.horizon)
            self.all = replace(self.one, unrolls=self.one.pairs * len(c.seeds))

        def step(*args: Any) -> Any:
            return rate_step(self.problem, *args)

        self.step = over_pairs(step)

    def begin(self, run: int, episode: int) -> tuple[Tensor, State]:
        """Runs, or pairs, are counted seed by seed; a seed's are always the same."""
        seed = self.config.seeds[run // self.one.pairs]
        begin = starts(self.problem, self.config.spread, seed)
        return begin(run % self.one.pairs, episode)

    def start(self) -> State:
        c = self.config
        meta = torch.full((len(c.seeds), 1), c.start, dtype=torch.float64).log()
        state: State = {
            "done": torch.zeros((), dtype=torch.int64),
            "meta": meta,
            "adam": self.outer.init(meta),
            "path": torch.full((len(c.seeds), len(self.marks)), torch.nan).double(),
        }
        state["pairs"] = self.all.start(meta[0], self.begin)
        return self._note(state)

    def position(self, state: State) -> tuple[int, int]:
        return int(state["done"]), self.config.iterations

    def advance(self, state: State) -> State:
        done = int(state["done"])
        for iteration in range(done, min(k for k in self.marks if k > done)):
            state = self._iterate(state, iteration)
        return self._note(state)

    @torch.no_grad()
    def _iterate(self, state: State, iteration: int) -> State:
        c, e, meta = self.config, self.one, state["meta"]
        minima = torch.cat(
            [
                minima_of(self.problem, e.pairs, e.truncation, seed, iteration)
                for seed in c.seeds
            ]
        )
        eps = [e.perturbations(meta[0], seed, iteration) for seed in c.seeds]
        found, pairs = self.all.estimate(
            self.step, self.begin, meta.repeat_interleave(e.pairs, 0), torch.cat(eps),
            state["pairs"], minima,
        )  # fmt: skip
        gradient = found.per_pair.unflatten(0, (-1, e.pairs)).mean(1)
        move, adam = self.outer.update(
            {}, clipped(gradient, c.clip), state["adam"], meta
        )
        changed = {"meta": meta + move, "adam": adam, "pairs": pairs}
        return state | changed | {"done": state["done"] + 1}

    def _note(self, state: State) -> State:
        path = state["path"].clone()
        path[:, self.marks.index(int(state["done"]))] = state["meta"][:, 0]
        return state | {"path": path}

    def finish(self, state: State) -> dict[str, Tensor]:
        """After ``steps [P]`` inner steps of each run: ``rate [R, P]``, and ``excess
        [R, P]``, the exact meta-loss over its lowest value, less one; ``final [R]``:
        its mean over the recorded points of the second half. ``best [1]``: the
        rate of lowest meta-loss.
        """
        c, horizon = self.config, self.all.horizon
        best = _best(c.hessian, c.spread, horizon)

        def loss(theta: Tensor) -> Tensor:
            return meta_loss(self.problem, theta, horizon, c.spread)

        losses = torch.func.vmap(torch.func.vmap(loss))(state["path"])
        excess = losses / loss(best) - 1
        late = torch.tensor(self.marks) * 2 > c.iterations
        return {
            "steps": torch.tensor(self.marks) * self.all.truncation,
            "rate": state["path"].exp().float(),
            "excess": excess.float(),
            "final": excess[:, late].mean(1),
            "best": best.exp()[None],
        }


@cache
def _best(hessian: Matrix, spread: float, horizon: int) -> Tensor:
    """The theta of lowest meta-loss."""
    problem = problem_of(hessian)
    edge = math.log(2 / problem.sharpness)
    best = stationary(problem, -10.0, edge, horizon, spread)
    return torch.tensor(best, dtype=torch.float64)
