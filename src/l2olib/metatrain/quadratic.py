"""Experiments on the noisy quadratic of STAR: what instability does to meta-training.

The model is that of :mod:`l2olib.stability`: a linear optimizer M = alpha I + P on a
quadratic whose minimum jumps, of which P is meta-trained and alpha is not. Three works:
the eigenvalues of A = I - M H under STAR's interventions (its Fig. 1), the variance of
one estimate of the meta-gradient (Fig. 2a), and meta-training P by evolution strategies
(Figs. 2b and 2c). The meta-loss is the mean of l_t(phi_t) over t = 1..T; l_0 is left
out, as in STAR (8), since no optimizer has a part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..optimizers import AdamW, State, check_least, check_literals, constant
from ..records import later
from ..stability import NoisyQuadratic, spectral_radius
from ..train import log_spaced
from .evolution import clipped, es, generator

Matrix = tuple[tuple[float, ...], ...]

HESSIAN: Matrix = ((1.11, 0.596), (0.596, 0.486))
"""H of STAR (A.30)."""


def problem_of(hessian: Matrix) -> NoisyQuadratic:
    """The model with that Hessian and minima xi_t ~ N(0, I)."""
    exact = torch.tensor(hessian, dtype=torch.float64)
    return NoisyQuadratic(exact, torch.eye(len(hessian)))


def unroll_losses(
    problem: NoisyQuadratic, dynamics: Tensor, phi: Tensor, minima: Tensor
) -> Tensor:
    """Mean loss [N] of N runs of T steps: A [N, n, n], phi_0 [N, n], xi [T + 1, N, n].

    What ``simulate`` and ``loss`` of the problem do, in fewer operations: the distance
    y_t = phi_t - xi_t from the minimum obeys y+ = A y + (xi - xi+). The last minimum is
    only seen by the last loss.
    """
    gap = (phi - minima[0])[..., None]
    jumps = -minima.diff(dim=0)[..., None]
    path = []
    for jump in jumps:
        gap = torch.baddbmm(jump, dynamics, gap)
        path.append(gap)
    gaps = torch.stack(path)[..., 0]
    return 0.5 * (gaps @ problem.hessian * gaps).sum(-1).mean(0)


# ---- Fig. 1: eigenvalues -------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of A of random problems under some of STAR's interventions.

    A problem of each seed: H with ``size`` eigenvalues log-spaced in 10^``span`` and a
    random basis, P with entries N(0, scale^2 / size). With a ``nominal`` step, the
    share ``decay`` taken from P and the power ``preconditioning`` of H divided out.
    """

    seeds: tuple[int, ...]
    size: int = 24
    span: tuple[float, float] = (-1.3, 0.9)
    scale: float = 0.5
    nominal: float = 0.0
    decay: float = 0.0
    preconditioning: float = 0.0

    def seconds(self) -> float:
        return 1e-3 * len(self.seeds)

    on_cpu: ClassVar[bool] = True

    def job(self, device: str, compile: bool, metas: Any) -> SpectrumJob:
        return SpectrumJob(self)

    def eigenvalues(self, seed: int) -> Tensor:
        """Eigenvalues of A [size], complex."""
        n, gen = self.size, generator("spectrum", seed)
        basis = torch.linalg.qr(torch.randn(n, n, generator=gen).double()).Q
        values = torch.logspace(*self.span, n, dtype=torch.float64)
        problem = NoisyQuadratic((basis * values) @ basis.mT, torch.eye(n))
        blackbox = self.scale * torch.randn(n, n, generator=gen).double() / n**0.5
        dynamics = problem.dynamics(
            blackbox,
            self.nominal,
            decay=self.decay,
            preconditioning=self.preconditioning,
        )
        return torch.linalg.eigvals(dynamics)


@dataclass
class SpectrumJob:
    """The computation of a :class:`Spectrum`; one seed a piece."""

    config: Spectrum

    def start(self) -> State:
        values = torch.zeros(len(self.config.seeds), self.config.size, 2)
        return {"done": torch.zeros((), dtype=torch.int64), "values": values.double()}

    def position(self, state: State) -> tuple[int, int]:
        return int(state["done"]), len(self.config.seeds)

    def advance(self, state: State) -> State:
        values, k = state["values"].clone(), int(state["done"])
        found = self.config.eigenvalues(self.config.seeds[k])
        values[k] = torch.view_as_real(found)
        return {"done": state["done"] + 1, "values": values}

    def finish(self, state: State) -> dict[str, Tensor]:
        """Per seed: eigenvalues, and what a test of Fig. 1 reads.

        ``radius``: largest modulus; ``real``: mean real part; ``reach``: mean distance
        from 1; ``unevenness``: the largest distance from 1 over the median one.
        """
        values = torch.view_as_complex(state["values"])
        far = (1 - values).abs()
        return {
            "eigenvalues": state["values"].float(),
            "radius": values.abs().amax(1),
            "real": values.real.mean(1),
            "reach": far.mean(1),
            "unevenness": far.amax(1) / far.quantile(0.5, 1),
        }


# ---- Fig. 2a: variance of the meta-gradient ------------------------------------------


@dataclass(frozen=True)
class GradientVariance:
    """Variance of the meta-gradient of one run at P = 0, over alpha and horizon.

    ``points`` values of alpha from 0 to 2 / lambda_max(H); phi_0 ~ N(0, spread I). A
    seed's phi_0 and minima are the same at every alpha and horizon.

    ``estimator``: ``exact`` is the derivative of the run's mean loss in P (what
    back-propagation finds), ``es`` one antithetic pair of size ``sigma``. Seeds are put
    in ``batches`` groups, so that a test has independent values of the variance.
    """

    seeds: tuple[int, ...]
    estimator: Literal["exact", "es"] = "exact"
    points: int = 50
    horizons: tuple[int, ...] = (1, 2, 5)
    batches: int = 25
    spread: float = 10.0
    sigma: float = 0.01
    hessian: Matrix = HESSIAN

    def __post_init__(self) -> None:
        check_literals(self)
        if len(self.seeds) % self.batches or len(self.seeds) < 2:
            raise ValueError(
                f"seeds must be two or more, in whole batches: {len(self.seeds)} are "
                f"not a multiple of {self.batches}"
            )
        if list(self.horizons) != sorted(set(self.horizons)) or min(self.horizons) < 1:
            raise ValueError(
                f"horizons must be ascending, from 1 on, not {self.horizons}"
            )

    def seconds(self) -> float:
        return 6e-8 * max(self.horizons) * self.points * len(self.seeds) + 1.0

    on_cpu: ClassVar[bool] = True

    def job(self, device: str, compile: bool, metas: Any) -> GradientVarianceJob:
        return GradientVarianceJob(self)


@dataclass
class GradientVarianceJob:
    """The resumable computation of a :class:`GradientVariance`; one horizon a piece.

    All horizons are read off one run of the longest. The derivative is carried forward
    with it: psi [.., n, n, n], of phi in P, obeys psi+ = A psi - e_i (H (phi - xi))_j.
    """

    config: GradientVariance
    problem: NoisyQuadratic = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.problem = problem_of(c.hessian)
        n, last = self.problem.size, max(c.horizons)
        edge = 2 / self.problem.sharpness
        self.alphas = edge * torch.linspace(0, 1, c.points, dtype=torch.float64)
        draws = torch.stack(
            [
                torch.randn(last + 2 + n, n, generator=generator("variance", seed))
                for seed in c.seeds
            ],
            dim=1,
        ).double()
        self.first = c.spread**0.5 * draws[0]
        self.eps = c.sigma * draws[1 : n + 1].movedim(0, 1)
        self.minima = draws[n + 1 :]

    def start(self) -> State:
        c, n = self.config, self.problem.size
        shape = c.points, len(c.seeds)
        found = torch.full((c.batches, len(c.horizons), c.points), torch.nan)
        state: State = {
            "done": torch.zeros((), dtype=torch.int64),
            "deviation": found.double(),
        }
        if c.estimator == "exact":
            return state | {
                "phi": self.first.expand(*shape, n).clone(),
                "psi": torch.zeros(*shape, n, n, n, dtype=torch.float64),
                "total": torch.zeros(*shape, n, n, dtype=torch.float64),
            }
        return state | {
            "phi": self.first.expand(2, *shape, n).clone(),
            "total": torch.zeros(2, *shape, dtype=torch.float64),
        }

    def position(self, state: State) -> tuple[int, int]:
        return int(state["done"]), len(self.config.horizons)

    def advance(self, state: State) -> State:
        c, k = self.config, int(state["done"])
        begin, end = (0, *c.horizons)[k], c.horizons[k]
        follow = self._derivative if c.estimator == "exact" else self._differences
        state, gradient = follow(state, begin, end)
        gap = gradient - gradient.mean(1, keepdim=True)
        each = gap.square().sum((-1, -2)) * len(c.seeds) / (len(c.seeds) - 1)
        groups = each.unflatten(1, (c.batches, -1)).mean(-1)
        deviation = state["deviation"].clone()
        deviation[:, k] = groups.mT
        return state | {"deviation": deviation, "done": state["done"] + 1}

    def _derivative(self, state: State, begin: int, end: int) -> tuple[State, Tensor]:
        h, n = self.problem.hessian, self.problem.size
        phi, psi, total = state["phi"], state["psi"], state["total"]
        zero = torch.zeros(n, n, dtype=torch.float64)
        a = self.problem.dynamics(zero, self.alphas)[:, None]
        eye = torch.eye(n, dtype=torch.float64)
        for t in range(begin, end):
            gap = phi - self.minima[t]
            kick = torch.einsum("ki,...j->...kij", eye, gap @ h)
            psi = (a @ psi.flatten(-2)).unflatten(-1, (n, n)) - kick
            phi = self.minima[t] + (a @ gap[..., None])[..., 0]
            late = (phi - self.minima[t + 1]) @ h
            total = total + torch.einsum("...k,...kij->...ij", late, psi)
        return state | {"phi": phi, "psi": psi, "total": total}, total / end

    def _differences(self, state: State, begin: int, end: int) -> tuple[State, Tensor]:
        h, phi, total = self.problem.hessian, state["phi"], state["total"]
        blackbox = torch.stack([self.eps, -self.eps])[:, None]
        a = self.problem.dynamics(blackbox, self.alphas[:, None])
        for t in range(begin, end):
            gap = phi - self.minima[t]
            phi = self.minima[t] + (a @ gap[..., None])[..., 0]
            late = phi - self.minima[t + 1]
            total = total + 0.5 * (late @ h * late).sum(-1)
        change = (total[0] - total[1]) / end / (2 * self.config.sigma**2)
        return state | {"phi": phi, "total": total}, change[..., None, None] * self.eps

    def finish(self, state: State) -> dict[str, Tensor]:
        """``deviation [batches, horizons, points]``: mean squared distance from the
        mean over all seeds, the measured trace of the variance; ``predicted
        [horizons, points]``, the same exactly, for ES in the limit of small sigma:
        (d + 2) tr Var + (d + 1) |mean|^2 with d parameters.
        """
        c, n = self.config, self.problem.size
        start = c.spread * torch.eye(n, dtype=torch.float64)
        zero = torch.zeros(n, n, dtype=torch.float64)
        means, variances = self.problem.meta_gradient_moments(
            zero, self.alphas, start, max(c.horizons)
        )
        at = torch.tensor(c.horizons) - 1
        predicted = variances[at].sum((-1, -2))
        if c.estimator == "es":
            size = means[at].square().sum((-1, -2))
            predicted = (n * n + 2) * predicted + (n * n + 1) * size
        return {
            "horizons": torch.tensor(c.horizons),
            "alphas": torch.linspace(0, 1, c.points, dtype=torch.float64),
            "deviation": state["deviation"],
            "predicted": predicted,
        }


# ---- Figs. 2b, 2c: meta-training P ---------------------------------------------------


@dataclass(frozen=True)
class QuadraticMetaTraining:
    """Meta-train a dense P by ES beside a nominal term ``share`` * 2 / lambda_max(H).

    An estimate is the mean of ``pairs`` antithetic pairs over runs of ``horizon`` steps
    from phi_0 ~ N(0, spread I): PES whose truncation is the horizon. Its entries are
    clipped to +-``clip``; AdamW at ``meta_lr`` with ``weight_decay`` on P follows. P
    starts with entries N(0, ``init``^2). STAR, Fig. 2c; ``meta_lr``, ``weight_decay``,
    ``pairs`` and ``init`` are ours.
    """

    share: float
    seeds: tuple[int, ...]
    iterations: int
    pairs: int = 4
    meta_lr: float = 1e-2
    init: float = 0.0
    horizon: int = 50
    sigma: float = 0.01
    clip: float = 1.0
    spread: float = 10.0
    smoothing: float = 0.95
    points: int = 120
    hessian: Matrix = HESSIAN
    weight_decay: float = later(0.0)

    def __post_init__(self) -> None:
        check_least(self, iterations=1, horizon=1, pairs=1)

    def seconds(self) -> float:
        return 2.4e-5 * self.horizon * self.iterations

    on_cpu: ClassVar[bool] = True

    def job(self, device: str, compile: bool, metas: Any) -> QuadraticMetaTrainingJob:
        return QuadraticMetaTrainingJob(self)


@dataclass
class QuadraticMetaTrainingJob:
    """The resumable computation of a :class:`QuadraticMetaTraining`, all seeds at once.

    A piece is the iterations up to the next of about ``points`` log-spaced ones, at
    which the state of things is noted.
    """

    config: QuadraticMetaTraining
    problem: NoisyQuadratic = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.problem = problem_of(c.hessian)
        self.alpha = c.share * 2 / self.problem.sharpness
        self.estimator = es(c.pairs * len(c.seeds), 1, c.sigma)
        self.outer = AdamW(constant(c.meta_lr), weight_decay=c.weight_decay)
        self.marks = [0, *log_spaced(1, c.iterations, c.points)]

    def start(self) -> State:
        c, n = self.config, self.problem.size
        meta = torch.stack(
            [torch.randn(n * n, generator=generator("init", seed)) for seed in c.seeds]
        )
        meta = c.init * meta.double()
        blank = torch.full((len(c.seeds), len(self.marks)), torch.nan).double()
        state: State = {
            "done": torch.zeros((), dtype=torch.int64),
            "meta": meta,
            "adam": self.outer.init(meta),
            "loss": blank[:, 0].clone(),
            "variance": blank[:, 0].clone(),
            "trace": {
                "blackbox": blank[..., None].repeat(1, 1, n * n),
                "loss": blank.clone(),
                "variance": blank.clone(),
            },
        }
        return self._note(state)

    def position(self, state: State) -> tuple[int, int]:
        return int(state["done"]), self.config.iterations

    def draws(self, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
        """Perturbations [N, n n], starts [N, n] and minima [T + 1, N, n] of all seeds'
        pairs, N of them; a seed's are the same whatever its company."""
        c, n = self.config, self.problem.size
        width = n * n + n + (c.horizon + 1) * n
        numbers = torch.cat(
            [
                torch.randn(c.pairs, width, generator=generator("es", seed, iteration))
                for seed in c.seeds
            ]
        ).double()
        eps, phi, minima = numbers.split([n * n, n, width - n * n - n], 1)
        minima = minima.unflatten(1, (-1, n)).movedim(1, 0)
        return c.sigma * eps, c.spread**0.5 * phi, minima

    def run(self, members: Tensor, phi: Tensor, state: State, minima: Tensor) -> Any:
        """One whole run of every member [N, 2, n n]: the step of the estimator."""
        n = self.problem.size
        dynamics = self.problem.dynamics(members.unflatten(-1, (n, n)), self.alpha)
        both = minima.movedim(1, 0).repeat_interleave(2, 1)
        losses = unroll_losses(
            self.problem, dynamics.flatten(0, 1), phi.flatten(0, 1), both
        )
        return losses.unflatten(0, (-1, 2)), phi, state

    @torch.no_grad()
    def advance(self, state: State) -> State:
        done = int(state["done"])
        for iteration in range(done, min(k for k in self.marks if k > done)):
            state = self._iterate(state, iteration)
        return self._note(state)

    def _iterate(self, state: State, iteration: int) -> State:
        c = self.config
        eps, phi, minima = self.draws(iteration)
        nothing = torch.zeros(len(eps), dtype=torch.int64)
        fresh = {
            "params": torch.stack([phi, phi], 1),
            "optimizer": {},
            "noise": torch.zeros_like(eps),
            "steps": nothing,
            "episodes": nothing,
        }
        meta = state["meta"].repeat_interleave(c.pairs, 0)
        found, _ = self.estimator.estimate(
            self.run, _never, meta, eps, fresh, minima.movedim(0, 1)[:, None]
        )
        each = found.per_pair.unflatten(0, (-1, c.pairs))
        gradient = clipped(each.mean(1), c.clip)
        move, adam = self.outer.update({}, gradient, state["adam"], state["meta"])
        loss = found.losses.unflatten(0, (-1, c.pairs)).mean((1, 2, 3))
        if c.pairs > 1:
            spread = each.var(1).sum(1)
        else:
            spread = torch.full_like(loss, torch.nan)
        return state | {
            "done": state["done"] + 1,
            "meta": state["meta"] + move,
            "adam": adam,
            "loss": self._average(state["loss"], loss),
            "variance": self._average(state["variance"], spread),
        }

    def _average(self, before: Tensor, value: Tensor) -> Tensor:
        """Exponential average, which begins at the first value."""
        mixed = self.config.smoothing * before + (1 - self.config.smoothing) * value
        return torch.where(before.isnan(), value, mixed)

    def _note(self, state: State) -> State:
        k = self.marks.index(int(state["done"]))
        trace = {name: values.clone() for name, values in state["trace"].items()}
        trace["blackbox"][:, k] = state["meta"]
        trace["loss"][:, k] = state["loss"]
        trace["variance"][:, k] = state["variance"]
        return state | {"trace": trace}

    def finish(self, state: State) -> dict[str, Tensor]:
        """At ``steps [P]`` iterations: ``blackbox [R, P, n n]`` and, of it, exactly,
        ``exact`` the meta-loss, ``radius`` the spectral radius of A, ``moduli`` of all
        its eigenvalues and ``single`` the trace of the variance of one run's
        meta-gradient; ``loss`` and ``variance`` (of one pair's estimate) are what
        training saw, exponentially averaged. ``optimum``: the lowest meta-loss of any
        P.
        """
        c, n = self.config, self.problem.size
        start = c.spread * torch.eye(n, dtype=torch.float64)
        blackbox = state["trace"]["blackbox"].unflatten(-1, (n, n))
        dynamics = self.problem.dynamics(blackbox, self.alpha)
        _, variances = self.problem.meta_gradient_moments(
            blackbox, self.alpha, start, c.horizon
        )
        losses = self.problem.step_losses(dynamics, start, c.horizon)
        moduli = torch.linalg.eigvals(dynamics).abs().sort(-1).values
        return {
            "steps": torch.tensor(self.marks),
            "loss": state["trace"]["loss"].float(),
            "variance": state["trace"]["variance"].float(),
            "blackbox": state["trace"]["blackbox"].float(),
            "exact": losses.mean(-1),
            "radius": spectral_radius(dynamics).float(),
            "moduli": moduli.float(),
            "single": variances[-1].sum((-1, -2)).float(),
            "optimum": lowest_loss(c.hessian, c.spread, c.horizon)[None],
        }


def _never(pair: int, episode: int) -> tuple[Tensor, State]:
    raise AssertionError("a run is one step: no pair restarts within an estimate")


@cache
def lowest_loss(hessian: Matrix, spread: float, steps: int) -> Tensor:
    """The lowest expected mean loss over ``steps`` of any linear optimizer M, a scalar.

    From phi_0 ~ N(0, spread I). By L-BFGS on M from half the largest stable step, with
    exact derivatives.
    """
    problem = problem_of(hessian)
    start = spread * torch.eye(problem.size, dtype=torch.float64)
    gain = (torch.eye(problem.size) / problem.sharpness).double().requires_grad_()
    search = torch.optim.LBFGS(
        [gain],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = problem.step_losses(problem.dynamics(gain), start, steps).mean()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(closure)
        return closure().detach()


def literal_shares(values: Sequence[float]) -> list[float]:
    """Turn values of 2 alpha / lambda_max (STAR, caption of Fig. 2, to the letter) into
    shares of the largest stable step, alpha lambda_max / 2."""
    sharpness = problem_of(HESSIAN).sharpness
    return [value * sharpness**2 / 4 for value in values]
