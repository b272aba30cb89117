"""The noisy quadratic model of a learned optimizer: spectra, expected loss, stability.

The model is that of STAR (Harrison, Metz, Sohl-Dickstein, NeurIPS 2022), (4)-(8)::

    loss         l_t(phi) = (1/2) (phi - xi_t)' H (phi - xi_t),   xi_t iid (0, Sigma)
    optimizer    phi_{t+1} = phi_t - M grad l_t(phi_t),   M = alpha I + P
    dynamics     phi_{t+1} = A phi_t + (I - A) xi_t,      A = I - M H

``alpha`` is the nominal term, ``P`` the blackbox term, H the Hessian. Everything is
torch float64. ``alpha``, ``P`` and ``A`` may have leading batch dimensions; dynamics,
losses and simulation also run under ``torch.func.vmap`` and autograd, so the exact
gradient of the expected loss with respect to the optimizer is one ``backward`` away.
Chapter "Stability of learned optimizers" proves the statements used here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOMENTUM_METHODS = ("polyak", "ema", "nesterov", "aggmo")


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    """Return `matrix` as float64, or raise ValueError if it is not symmetric."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"{name} must be a square matrix, got shape {tuple(matrix.shape)}"
        )
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite")
    if not torch.allclose(matrix, matrix.mT, rtol=1e-12, atol=1e-12):
        raise ValueError(f"{name} must be symmetric")
    return matrix


def _unit_interval(value: float, name: str) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return value


def spectral_radius(dynamics: Tensor) -> Tensor:
    """Return the largest modulus of the eigenvalues of A [..., n, n] -> [...]."""
    return torch.linalg.eigvals(dynamics).abs().amax(-1)


def solve_lyapunov(dynamics: Tensor, source: Tensor) -> Tensor:
    """Solve X = A X A' + Q for X [..., n, n] by the Kronecker system.

    Unique where no two eigenvalues of A multiply to 1; elsewhere the result is NaN or
    nonsense, and nothing is raised. Costs O(n^6): for small n.
    """
    n = dynamics.shape[-1]
    kron = torch.einsum("...ik,...jl->...ijkl", dynamics, dynamics)
    system = torch.eye(n * n, dtype=dynamics.dtype) - kron.flatten(-2).flatten(-3, -2)
    # vmap needs right-hand sides of the batch shape of the system
    source = source.expand(dynamics.shape).flatten(-2).unsqueeze(-1)
    solution = torch.linalg.solve_ex(system, source).result
    return solution.squeeze(-1).unflatten(-1, (n, n))


@dataclass(frozen=True)
class NoisyQuadratic:
    """Hold the Hessian H [n, n] and the noise covariance Sigma [n, n] of the model.

    Raises ValueError unless H is symmetric positive definite and Sigma is symmetric
    positive semidefinite of the same size.
    """

    hessian: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        hessian = _symmetric(self.hessian, "the Hessian")
        noise = _symmetric(self.noise, "the noise covariance")
        if hessian.ndim != 2 or noise.shape != hessian.shape:
            raise ValueError(
                "the Hessian and the noise covariance must be two matrices of one "
                f"size, got {tuple(hessian.shape)} and {tuple(noise.shape)}"
            )
        if torch.linalg.eigvalsh(hessian).min() <= 0:
            raise ValueError("the Hessian must be positive definite")
        if torch.linalg.eigvalsh(noise).min() < -1e-12:
            raise ValueError("the noise covariance must be positive semidefinite")
        object.__setattr__(self, "hessian", hessian)
        object.__setattr__(self, "noise", noise)

    @property
    def size(self) -> int:
        """Return the number n of inner parameters."""
        return self.hessian.shape[0]

    @property
    def sharpness(self) -> float:
        """Return the largest eigenvalue of H."""
        return torch.linalg.eigvalsh(self.hessian)[-1].item()

    def power(self, exponent: float) -> Tensor:
        """Return the symmetric matrix power of H [n, n]."""
        values, vectors = torch.linalg.eigh(self.hessian)
        return (vectors * values**exponent) @ vectors.mT

    def gain(self, blackbox: Tensor, nominal: Tensor | float = 0.0) -> Tensor:
        """Return M = alpha I + P [..., n, n]."""
        if blackbox.shape[-2:] != self.hessian.shape:
            raise ValueError(
                f"P must end in shape {tuple(self.hessian.shape)}, "
                f"got {tuple(blackbox.shape)}"
            )
        nominal = torch.as_tensor(nominal, dtype=torch.float64)[..., None, None]
        return nominal * torch.eye(self.size, dtype=torch.float64) + blackbox

    def dynamics(
        self,
        blackbox: Tensor,
        nominal: Tensor | float = 0.0,
        *,
        decay: float = 0.0,
        preconditioning: float = 0.0,
    ) -> Tensor:
        """Return A = I - H^(-q) (alpha I + (1 - d) P) H [..., n, n].

        The three interventions of STAR, Fig. 1: `nominal` adds alpha I (5), `decay`
        d in [0, 1] shrinks the blackbox term P [..., n, n] towards zero, and
        `preconditioning` q in [0, 1] divides the update by H^q (q = 1/2 is (11)).
        """
        shrink = 1.0 - _unit_interval(decay, "decay")
        exponent = -_unit_interval(preconditioning, "preconditioning")
        update = self.gain(shrink * blackbox, nominal) @ self.hessian
        return torch.eye(self.size, dtype=torch.float64) - self.power(exponent) @ update

    def _injected(self, dynamics: Tensor) -> Tensor:
        """Return the covariance (I - A) Sigma (I - A)' that one step injects."""
        gap = torch.eye(self.size, dtype=torch.float64) - dynamics
        return gap @ self.noise @ gap.mT

    def _half_trace(self, moment: Tensor) -> Tensor:
        return 0.5 * torch.einsum("ij,...ji->...", self.hessian, moment)

    def loss(self, phi: Tensor, xi: Tensor) -> Tensor:
        """Return (1/2) (phi - xi)' H (phi - xi) for phi, xi [..., n]."""
        gap = phi - xi
        return 0.5 * torch.einsum("...i,ij,...j->...", gap, self.hessian, gap)

    def simulate(self, dynamics: Tensor, start: Tensor, noise: Tensor) -> Tensor:
        """Run phi_{t+1} = A phi_t + (I - A) xi_t; return phi_0..phi_T [T+1, ..., n].

        `start` is phi_0 [..., n], `noise` the draws xi_0..xi_{T-1} [T, ..., n].
        """
        path = [start]
        for xi in noise:
            path.append(xi + torch.einsum("...ij,...j->...i", dynamics, path[-1] - xi))
        return torch.stack(path)

    def step_losses(self, dynamics: Tensor, start: Tensor, steps: int) -> Tensor:
        """Return E l_t(phi_t) for t = 1..T [..., T] by the recursion (7).

        `start` is the second moment E phi_0 phi_0' [..., n, n], so that
        E phi_{t+1} phi_{t+1}' = A E[phi_t phi_t'] A' + (I - A) Sigma (I - A)'.
        Exact for every A, stable or not. STAR's L(theta; T) is the mean over t.
        """
        moment, injected, losses = start, self._injected(dynamics), []
        for _ in range(steps):
            moment = dynamics @ moment @ dynamics.mT + injected
            losses.append(self._half_trace(moment + self.noise))
        return torch.stack(losses, dim=-1)

    def expected_loss(self, dynamics: Tensor, start: Tensor, steps: int) -> Tensor:
        """Return L(T) = (1/T) sum_{t=1..T} E l_t(phi_t) [...] in closed form.

        With S = A S A' + (I-A) Sigma (I-A)', X = A'XA + A'HA, X_T = X - (A^T)' X A^T::

            L(T) = (1/2) [tr H (Sigma + S) + (1/T) tr X_T (start - S)]

        The identity needs no stability, only that no two eigenvalues of A multiply
        to 1 (otherwise the result means nothing: use `step_losses`). `start` as there.
        """
        stationary = solve_lyapunov(dynamics, self._injected(dynamics))
        observed = solve_lyapunov(dynamics.mT, dynamics.mT @ self.hessian @ dynamics)
        late = torch.linalg.matrix_power(dynamics, steps)
        transient = observed - late.mT @ observed @ late
        memory = torch.einsum("...ij,...ji->...", transient, start - stationary)
        return self._half_trace(self.noise + stationary) + 0.5 * memory / steps

    def meta_gradient_moments(
        self,
        blackbox: Tensor,
        nominal: Tensor | float,
        start: Tensor,
        steps: int,
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance [steps, ..., n, n] of the meta-gradient, exactly.

        That is, of the derivative with respect to P [..., n, n] of the mean loss of ONE
        run, (1/T) sum_{t=1..T} l_t(phi_t), for T = 1..steps. The minima xi_t and
        phi_0, of second moment `start` [..., n, n], are Gaussian of mean zero.

        The state and its derivative with respect to one entry of P, s = (phi, psi),
        are linear in what is random, and a step adds g = (phi - xi)' H psi = w'Qw with
        w = (s, xi) Gaussian. With C = Cov w, G the sum so far and D = Cov(G, ww')::

            E G + tr QC,   Var G + 2 tr QD + 2 tr QCQC,   D + 2 CQC

        are the moments with one more step, and w becomes B w plus fresh noise.
        """
        n, zero = self.size, torch.zeros_like(self.hessian)
        blackbox = blackbox + zero
        dynamics = self.dynamics(blackbox, nominal)
        gap = torch.eye(n, dtype=torch.float64) - dynamics
        # one system for each entry (i, j) of P: d psi = -e_i (H (phi - xi))_j
        entries = torch.eye(n * n, dtype=torch.float64).unflatten(0, (n, n))
        kick = entries.unflatten(-1, (n, n)) @ self.hessian
        batch = (*dynamics.shape[:-2], n, n)

        def blocks(*rows: Sequence[Tensor]) -> Tensor:
            return torch.cat(
                [
                    torch.cat([x.expand(*batch, n, n) for x in row], dim=-1)
                    for row in rows
                ],
                dim=-2,
            )

        a, b = (x[..., None, None, :, :] for x in (dynamics, gap))
        move = blocks([a, zero, b], [-kick, a, kick], [zero] * 3)
        half = self.hessian / 2
        form = blocks([zero, half, zero], [half, zero, -half], [zero, -half, zero])
        fresh = blocks([zero] * 3, [zero] * 3, [zero, zero, self.noise])
        first = start[..., None, None, :, :]
        cov = blocks([first, zero, zero], [zero] * 3, [zero] * 3) + fresh
        memory = torch.zeros_like(cov)
        mean, variance = torch.zeros(2, *batch, dtype=torch.float64)
        means, variances = [], []
        for t in range(1, steps + 1):
            cov = move @ cov @ move.mT + fresh
            memory = move @ memory @ move.mT
            seen = form @ cov
            mean = mean + torch.einsum("...ii->...", seen)
            both = form @ (memory + cov @ seen)
            variance = variance + 2 * torch.einsum("...ii->...", both)
            memory = memory + 2 * cov @ seen
            means.append(mean / t)
            variances.append(variance / t**2)
        return torch.stack(means), torch.stack(variances)

    def limit_loss(self, dynamics: Tensor) -> Tensor:
        """Return the limit of L(T) as T grows [...]: (1/2) tr H (Sigma + S).

        NaN where rho(A) >= 1: there the limit is infinite or depends on the start.
        """
        stable = spectral_radius(dynamics.detach()) < 1
        # a harmless matrix on the branch not taken keeps gradients finite
        safe = torch.where(stable[..., None, None], dynamics, 0.0)
        stationary = solve_lyapunov(safe, self._injected(safe))
        value = self._half_trace(self.noise + stationary)
        return torch.where(stable, value, torch.nan)

    def loss_is_bounded(self, dynamics: Tensor) -> bool:
        """Decide sup_T L(T) < inf (Proposition 25A) for one A [n, n], Sigma > 0.

        True iff every eigenvalue of A is inside the unit disc or is a semisimple
        eigenvalue 1 (no noise enters that mode). An eigenvalue counts as 1 within
        1e-6: rounding splits a defective pair by about 1e-8.
        """
        eigenvalues = torch.linalg.eigvals(dynamics)
        gap = torch.eye(self.size, dtype=torch.float64) - dynamics
        kernel = self.size - torch.linalg.matrix_rank(gap, atol=1e-9).item()
        at_one = (eigenvalues - 1).abs() <= (1e-6 if kernel else 0.0)
        others_inside = (eigenvalues[~at_one].abs() < 1).all()
        return bool(others_inside) and at_one.sum().item() == kernel

    def margins(
        self,
        blackbox: Tensor,
        nominal: Tensor | float = 0.0,
        *,
        preconditioning: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the two margins of Theorem 27A: rho(A) <= 1 if both are >= 0.

        For symmetric P [..., n, n]: lambda_min(P) + alpha, which is (9), and
        2 / lambda_max(H)^(1-q) - alpha - lambda_max(P), which is (10) at q = 0 and
        (13) at q = 1/2. Lemma 29A: with a P that commutes with every diagonal error
        in (0, d] and 0 < alpha < 2 / lambda_max(H), the margins of d P are those of
        (16), (17). With noise the loss is bounded only if the second is > 0.
        Raises ValueError for a non-symmetric P, for which the theorem is false.
        """
        values = torch.linalg.eigvalsh(_symmetric(blackbox, "P"))
        exponent = 1.0 - _unit_interval(preconditioning, "preconditioning")
        bound = 2 / self.sharpness**exponent
        return nominal + values[..., 0], bound - nominal - values[..., -1]

    def descent_margin(self, blackbox: Tensor, nominal: Tensor | float = 0.0) -> Tensor:
        """Return lambda_min(M + M' - M' H M) [...] for any P, symmetric or not.

        Non-negative iff no noiseless step can raise the loss, A'HA <= H; then no
        sequence of such optimizers P_t can, in any order (Theorem 27B; with noise the
        covariance is bounded if there is some room to spare).
        """
        gain = self.gain(blackbox, nominal)
        certificate = gain + gain.mT - gain.mT @ self.hessian @ gain
        return torch.linalg.eigvalsh(certificate)[..., 0]


def _betas(method: str, betas: float | Sequence[float]) -> list[float]:
    if method not in MOMENTUM_METHODS:
        raise ValueError(f"method must be one of {MOMENTUM_METHODS}, got {method!r}")
    values = [betas] if isinstance(betas, int | float) else list(betas)
    if not values or any(not 0.0 <= beta < 1.0 for beta in values):
        raise ValueError(f"every beta must lie in [0, 1), got {betas}")
    if method not in ("aggmo", "ema") and len(values) != 1:
        raise ValueError(f"{method} takes one beta, got {len(values)}")
    return values


def momentum_polynomial(
    method: str, step: Tensor | float, betas: float | Sequence[float]
) -> Tensor:
    """Return the characteristic polynomial [..., K + 2] of one mode.

    The leading coefficient comes first. `step` is s = alpha lambda, K the number of
    betas (more than one for AggMo and EMA only):

    - polyak    x+ = x - alpha g(x) + beta (x - x_):     z^2 - (1+beta-s) z + beta
    - ema       aggmo with v_i = beta_i v_i - (1-beta_i) g: averages of gradients, as
      in Adam, and for several betas STAR's nominal term without its division
    - nesterov  x+ = y - alpha g(y), y = x + beta (x - x_):
      z^2 - (1+beta)(1-s) z + beta (1-s)
    - aggmo     v_i = beta_i v_i - g, x+ = x + (alpha/K) sum_i v_i:
      (z-1) prod_i (z-beta_i) + (s/K) z sum_i prod_{j != i} (z-beta_j)
    """
    values = _betas(method, betas)
    s = torch.as_tensor(step, dtype=torch.float64)
    one = torch.ones_like(s)
    if method == "nesterov":
        beta = values[0]
        return torch.stack([one, -(1 + beta) * (1 - s), beta * (1 - s)], dim=-1)

    def product(roots: list[float]) -> list[float]:
        return np.atleast_1d(np.poly(roots)).tolist()

    weights = [1 - v if method == "ema" else 1.0 for v in values]
    others = [
        [w * c for c in product(values[:i] + values[i + 1 :])]
        for i, w in enumerate(weights)
    ]
    feedback = [0.0, *(sum(c) / len(values) for c in zip(*others, strict=True)), 0.0]
    return torch.stack(
        [
            a * one + b * s
            for a, b in zip(product([1.0, *values]), feedback, strict=True)
        ],
        dim=-1,
    )


def jury_stable(coefficients: Tensor) -> Tensor:
    """Decide by the Jury table whether all roots lie strictly inside the unit disc.

    `coefficients` [..., degree + 1], leading (positive) term first -> bool [...].
    """
    stable = coefficients[..., 0] > 0
    while coefficients.shape[-1] > 1:
        ratio = coefficients[..., -1:] / coefficients[..., :1]
        stable = stable & (ratio[..., 0].abs() < 1)
        coefficients = (coefficients - ratio * coefficients.flip(-1))[..., :-1]
    return stable


def momentum_limit(method: str, betas: float | Sequence[float]) -> float:
    """Return the s = alpha lambda below which a mode is stable (0 < s < limit).

    Polyak 2 (1+beta), Nesterov 2 (1+beta)/(1+2 beta), AggMo and EMA twice the harmonic
    mean of 1 + beta_i and of (1+beta_i)/(1-beta_i). Gradient descent (beta = 0) has 2.
    """
    values = _betas(method, betas)
    beta = values[0]
    if method == "nesterov":
        return 2 * (1 + beta) / (1 + 2 * beta)
    loads = [(1 - v if method == "ema" else 1.0) / (1 + v) for v in values]
    return 2 * len(values) / sum(loads)


def momentum_variance(
    method: str, alpha: float, curvature: float, beta: float, noise: float = 1.0
) -> float:
    """Return the stationary variance of one mode under gradient noise.

    The gradient is lambda x + xi with Var xi = `noise`. With z^2 + c1 z + c2 the
    characteristic polynomial, x is autoregressive of order two, driven by alpha xi
    (EMA: (1-beta) alpha xi), and::

        Var x = alpha^2 noise (1 + c2) / ((1 - c2) ((1 + c2)^2 - c1^2))

    Raises ValueError outside the stability region.
    """
    if method == "aggmo":
        raise ValueError("the closed form is for one beta: polyak, ema or nesterov")
    coefficients = momentum_polynomial(method, alpha * curvature, beta)
    if not jury_stable(coefficients):
        limit = momentum_limit(method, beta)
        raise ValueError(
            f"no stationary variance: alpha * curvature must lie in (0, {limit:.6g})"
        )
    _, c1, c2 = coefficients.tolist()
    drive = alpha * (1 - beta) if method == "ema" else alpha
    return drive**2 * noise * (1 + c2) / ((1 - c2) * ((1 + c2) ** 2 - c1**2))
