"""The noisy quadratic model against simulation, exact arithmetic and brute force."""

import pytest
import sympy as sp
import torch

from l2olib.stability import (
    NoisyQuadratic,
    jury_stable,
    momentum_limit,
    momentum_polynomial,
    momentum_variance,
    solve_lyapunov,
    spectral_radius,
)

F64 = torch.float64
STAR_H = torch.tensor([[1.11, 0.596], [0.596, 0.486]], dtype=F64)


def matrix(*rows):
    return torch.tensor(rows, dtype=F64)


def random_problem(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=F64)
    hessian = root @ root.T / size + 0.1 * torch.eye(size, dtype=F64)
    other = torch.randn(size, size, generator=generator, dtype=F64)
    return NoisyQuadratic(hessian, other @ other.T / size), generator


@pytest.fixture
def star():
    return NoisyQuadratic(STAR_H, torch.eye(2, dtype=F64))


# --- dynamics and interventions


def test_dynamics_is_the_jacobian_of_one_update():
    problem, generator = random_problem(3, 0)
    blackbox = torch.randn(3, 3, generator=generator, dtype=F64)
    phi = torch.randn(3, generator=generator, dtype=F64)
    xi = torch.randn(3, generator=generator, dtype=F64)

    def update(phi):
        slope = torch.func.grad(problem.loss)(phi, xi)
        return phi - (0.3 * slope + blackbox @ slope)

    dynamics = problem.dynamics(blackbox, 0.3)
    torch.testing.assert_close(torch.func.jacrev(update)(phi), dynamics)
    step = problem.simulate(dynamics, phi, xi[None])[1]
    torch.testing.assert_close(step, update(phi))


def test_interventions_do_what_they_say(star):
    blackbox = matrix([0.7, -2.0], [1.5, 0.4])
    identity = torch.eye(2, dtype=F64)
    plain = star.dynamics(blackbox)
    torch.testing.assert_close(star.dynamics(blackbox, decay=1.0), identity)
    torch.testing.assert_close(
        star.dynamics(blackbox, decay=0.25) - identity, 0.75 * (plain - identity)
    )
    torch.testing.assert_close(star.dynamics(blackbox, 0.2), plain - 0.2 * star.hessian)
    # full preconditioning of the nominal term alone is Newton's method
    newton = star.dynamics(0 * blackbox, 0.2, preconditioning=1.0)
    torch.testing.assert_close(newton, 0.8 * identity)
    # and the square root takes the condition number to its square root (35.b)
    half = star.dynamics(0 * blackbox, 1.0, preconditioning=0.5)
    values = torch.linalg.eigvalsh(identity - half)
    h = torch.linalg.eigvalsh(star.hessian)
    torch.testing.assert_close(values[1] / values[0], (h[1] / h[0]).sqrt())


def test_matrix_power_of_the_hessian(star):
    torch.testing.assert_close(star.power(0.5) @ star.power(0.5), star.hessian)
    torch.testing.assert_close(star.power(-1.0), torch.linalg.inv(star.hessian))


@pytest.mark.parametrize(
    ("hessian", "noise", "message"),
    [
        ([[1.0, 2.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], "symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], "positive definite"),
        ([[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]], "semidefinite"),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0]], "one size"),
        ([[1.0, 0.0]], [[1.0]], "square"),
        ([[float("nan"), 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], "finite"),
    ],
)
def test_bad_problems_are_refused(hessian, noise, message):
    with pytest.raises(ValueError, match=message):
        NoisyQuadratic(torch.tensor(hessian), torch.tensor(noise))


def test_bad_arguments_are_refused(star):
    with pytest.raises(ValueError, match="decay"):
        star.dynamics(STAR_H, decay=1.5)
    with pytest.raises(ValueError, match="preconditioning"):
        star.dynamics(STAR_H, preconditioning=-0.5)
    with pytest.raises(ValueError, match="P must end in shape"):
        star.dynamics(torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match="P must be symmetric"):
        star.margins(matrix([1.0, 2.0], [0.0, 1.0]))


# --- expected loss


def exact_mean_loss(h, a, noise, start, steps):
    """Sum (7) and (8) literally, in rational arithmetic."""
    gap = sp.eye(2) - a
    sigma, total = sp.zeros(2), 0
    for t in range(1, steps + 1):
        sigma = a * sigma * a.T + gap * noise * gap.T
        phi = a**t * start
        total += ((phi.T * h * phi)[0] + (h * (sigma + noise)).trace()) / 2
    return total / steps


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize(
    "a",
    [
        [["1/2", "1/3"], ["-1/4", "1/5"]],  # stable, complex eigenvalues
        [["3/2", "1/3"], ["0", "1/5"]],  # unstable: the identity still holds
    ],
)
def test_closed_form_is_the_exact_sum(a, steps):
    h, noise = sp.Matrix([[2, 1], [1, 3]]), sp.Matrix([[1, "1/2"], ["1/2", 2]])
    start = sp.Matrix([1, -2])
    a = sp.Matrix(a)
    exact = float(exact_mean_loss(h, a, noise, start, steps))

    def tensor(m):
        return torch.tensor(m.tolist(), dtype=F64)

    problem = NoisyQuadratic(tensor(h), tensor(noise))
    moment = tensor(start * start.T)
    closed = problem.expected_loss(tensor(a), moment, steps).item()
    recursion = problem.step_losses(tensor(a), moment, steps).mean().item()
    assert closed == pytest.approx(exact, rel=1e-12)
    assert recursion == pytest.approx(exact, rel=1e-13)


def test_scalar_enumeration_has_the_factor_one_half():
    # h = 1, A = 1/2, phi_0 = 1, xi = +-1, T = 1: four equally likely paths (24.a)
    problem = NoisyQuadratic(matrix([1.0]), matrix([1.0]))
    value = problem.expected_loss(matrix([0.5]), matrix([1.0]), 1)
    assert value.item() == pytest.approx(0.75, abs=1e-15)


def test_expected_loss_is_the_mean_of_simulations(star):
    generator = torch.Generator().manual_seed(3)
    replicas, steps = 40_000, 12
    dynamics = star.dynamics(matrix([0.3, -0.5], [0.4, 0.2]), 0.4)
    start = 3 * torch.randn(replicas, 2, generator=generator, dtype=F64)
    noise = torch.randn(steps + 1, replicas, 2, generator=generator, dtype=F64)
    path = star.simulate(dynamics, start, noise[:-1])
    losses = star.loss(path[1:], noise[1:])
    expected = star.step_losses(dynamics, 9 * torch.eye(2, dtype=F64), steps)
    error = (losses.mean(1) - expected) / (losses.std(1) / replicas**0.5)
    assert error.abs().max() < 4
    mean = losses.mean(0)
    closed = star.expected_loss(dynamics, 9 * torch.eye(2, dtype=F64), steps)
    assert abs(mean.mean() - closed) < 4 * mean.std() / replicas**0.5


def test_limit_loss_is_approached_like_one_over_steps(star):
    dynamics = star.dynamics(matrix([0.3, -0.5], [0.4, 0.2]), 0.4)
    start = 10 * torch.eye(2, dtype=F64)
    limit = star.limit_loss(dynamics)
    gaps = [star.expected_loss(dynamics, start, t) - limit for t in (1000, 2000)]
    assert gaps[1].item() == pytest.approx(gaps[0].item() / 2, rel=1e-9)


def test_scalar_limit_loss():
    # h s^2 / (2 - m h) (24.d)
    problem = NoisyQuadratic(matrix([2.0]), matrix([3.0]))
    dynamics = problem.dynamics(matrix([0.3]))
    assert problem.limit_loss(dynamics).item() == pytest.approx(6 / (2 - 0.6))


def test_limit_loss_is_nan_without_stability_and_keeps_gradients_finite(star):
    nominal = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    values = star.limit_loss(star.dynamics(torch.zeros(2, 2, dtype=F64), nominal))
    assert torch.isfinite(values[0])
    assert torch.isnan(values[1])
    values[0].backward()
    assert torch.isfinite(nominal.grad).all()


def test_gradients_agree_with_finite_differences_and_under_vmap(star):
    generator = torch.Generator().manual_seed(1)
    blackboxes = 0.1 * torch.randn(4, 2, 2, generator=generator, dtype=F64)
    nominal = torch.linspace(0.4, 0.9, 4, dtype=F64)
    start = 10 * torch.eye(2, dtype=F64)

    def closed(blackbox, nominal):
        return star.expected_loss(star.dynamics(blackbox, nominal), start, 20)

    def recursion(blackbox, nominal):
        return star.step_losses(star.dynamics(blackbox, nominal), start, 20).mean(-1)

    def limit(blackbox, nominal):
        return star.limit_loss(star.dynamics(blackbox, nominal))

    for function in (closed, recursion, limit):
        batched = torch.func.vmap(torch.func.grad(function, argnums=(0, 1)))
        slope_p, slope_a = batched(blackboxes, nominal)
        torch.testing.assert_close(
            torch.func.vmap(function)(blackboxes, nominal),
            function(blackboxes, nominal),
        )
        p = blackboxes.clone().requires_grad_()
        a = nominal.clone().requires_grad_()
        assert torch.autograd.gradcheck(function, (p, a), eps=1e-6, atol=1e-5)
        sums = torch.autograd.grad(function(p, a).sum(), (p, a))
        torch.testing.assert_close((slope_p, slope_a), sums)


def test_exact_gradient_is_the_mean_meta_gradient(star):
    generator = torch.Generator().manual_seed(5)
    replicas, steps = 20_000, 8
    start = torch.randn(replicas, 2, generator=generator, dtype=F64)
    noise = torch.randn(steps + 1, replicas, 2, generator=generator, dtype=F64)
    zero = torch.zeros(2, 2, dtype=F64)

    def sampled(nominal, start, noise):
        path = star.simulate(star.dynamics(zero, nominal), start, noise[:-1])
        return star.loss(path[1:], noise[1:]).mean()

    nominal = torch.tensor(0.7, dtype=F64)
    slopes = torch.func.vmap(torch.func.grad(sampled), (None, 0, 1))(
        nominal, start, noise
    )
    exact = torch.func.grad(
        lambda a: star.expected_loss(
            star.dynamics(zero, a), torch.eye(2, dtype=F64), steps
        )
    )(nominal)
    assert abs(slopes.mean() - exact) < 4 * slopes.std() / replicas**0.5


def sampled_meta_gradients(problem, blackbox, nominal, replicas, steps, seed):
    """Derivatives in P [replicas, n, n] of runs from phi_0 ~ N(0, 10 I)."""
    generator = torch.Generator().manual_seed(seed)
    n = problem.size
    first = 10**0.5 * torch.randn(replicas, n, generator=generator, dtype=F64)
    minima = torch.randn(steps + 1, replicas, n, generator=generator, dtype=F64)

    def loss(p, first, minima):
        path = problem.simulate(problem.dynamics(p, nominal), first, minima[:-1])
        return problem.loss(path[1:], minima[1:]).mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 1))
    return each(blackbox, first, minima)


@pytest.mark.parametrize("nominal", [0.1, 1.0])
def test_moments_of_the_meta_gradient_are_those_of_samples(star, nominal):
    """Every entry of P: mean and variance within 5 standard errors of 40,000 runs."""
    blackbox, start = matrix([0.3, -0.2], [0.1, 0.4]), 10 * torch.eye(2, dtype=F64)
    for steps in (1, 6):
        found = sampled_meta_gradients(star, blackbox, nominal, 40_000, steps, steps)
        mean, variance = star.meta_gradient_moments(blackbox, nominal, start, steps)
        squares = (found - mean[-1]).square()
        for sample, exact in ((found, mean[-1]), (squares, variance[-1])):
            error = (sample.mean(0) - exact).abs()
            assert (error < 5 * sample.std(0) / 200).all()
            assert (sample.std(0) / 200 < 0.05 * exact.abs().max()).all()


def test_mean_meta_gradient_is_the_derivative_of_the_expected_loss(star):
    start = 10 * torch.eye(2, dtype=F64)
    blackbox = matrix([0.3, -0.2], [0.1, 0.4])
    for steps in (1, 2, 13):
        exact = torch.func.grad(
            lambda p, steps=steps: star.step_losses(
                star.dynamics(p, 0.1), start, steps
            ).mean()
        )(blackbox)
        mean, _ = star.meta_gradient_moments(blackbox, 0.1, start, steps)
        torch.testing.assert_close(mean[-1], exact)


def test_moments_in_one_dimension_by_hand():
    """h = alpha = 1, P = 0, T = 1: phi_1 = xi_0, g = -(xi_0 - xi_1)(phi_0 - xi_0)."""
    problem = NoisyQuadratic(torch.eye(1), torch.eye(1))
    mean, variance = problem.meta_gradient_moments(
        torch.zeros(1, 1, dtype=F64), 1.0, 4 * torch.eye(1, dtype=F64), 1
    )
    # E xy = Cov(xi_0, -xi_0) -> mean 1; Var xy = Var x Var y + (E xy)^2 = 2 * 5 + 1
    assert mean.item() == pytest.approx(1.0)
    assert variance.item() == pytest.approx(11.0)


def test_moments_take_batches_of_optimizers(star):
    start = 10 * torch.eye(2, dtype=F64)
    nominal = torch.tensor([0.0, 0.5, 1.5], dtype=F64)
    blackbox = matrix([0.3, -0.2], [0.1, 0.4])
    mean, variance = star.meta_gradient_moments(blackbox, nominal, start, 4)
    assert mean.shape == variance.shape == (4, 3, 2, 2)
    for k, alpha in enumerate(nominal.tolist()):
        one = star.meta_gradient_moments(blackbox, alpha, start, 4)
        torch.testing.assert_close((mean[:, k], variance[:, k]), one)


def test_lyapunov_solution_has_no_residual_and_no_transposed_twin():
    problem, generator = random_problem(4, 7)
    dynamics = 0.4 * torch.randn(3, 4, 4, generator=generator, dtype=F64)
    source = problem.noise
    solution = solve_lyapunov(dynamics, source)
    torch.testing.assert_close(dynamics @ solution @ dynamics.mT + source, solution)


# --- stability


def test_loss_is_bounded_agrees_with_the_recursion():
    identity = torch.eye(2, dtype=F64)
    problem = NoisyQuadratic(identity, identity)
    cases = {
        "contraction": (matrix([0.5, 0.9], [0.0, -0.5]), True),
        "rotation inside": (0.99 * matrix([0.0, 1.0], [-1.0, 0.0]), True),
        "semisimple one": (matrix([1.0, 0.0], [0.0, 0.3]), True),
        "identity": (identity, True),
        "Jordan block at one": (matrix([1.0, 1.0], [0.0, 1.0]), False),
        "minus one": (matrix([-1.0, 0.0], [0.0, 0.3]), False),
        "rotation on the circle": (matrix([0.0, 1.0], [-1.0, 0.0]), False),
        "one unstable mode": (matrix([2.0, 0.0], [0.0, 0.5]), False),
    }
    for name, (dynamics, bounded) in cases.items():
        assert problem.loss_is_bounded(dynamics) is bounded, name
        losses = problem.step_losses(dynamics, torch.zeros(2, 2, dtype=F64), 400)
        grows = losses[399] > 1.5 * losses[199]
        assert bool(grows) is not bounded, name


def test_theorem_27a_is_sound_and_its_margins_are_tight():
    for seed in range(50):
        problem, generator = random_problem(3, seed)
        root = torch.randn(3, 3, generator=generator, dtype=F64)
        blackbox = 0.5 * (root + root.T)
        # put P on the boundary of both inequalities
        values = torch.linalg.eigvalsh(blackbox)
        blackbox = (blackbox - values[0] * torch.eye(3, dtype=F64)) / (
            values[-1] - values[0]
        )
        for q in (0.0, 0.5, 1.0):
            bound = 2 / problem.sharpness ** (1 - q)
            lower, upper = problem.margins(bound * blackbox, preconditioning=q)
            assert abs(lower) < 1e-12
            assert abs(upper) < 1e-12
            dynamics = problem.dynamics(bound * blackbox, preconditioning=q)
            eigenvalues = torch.linalg.eigvals(dynamics)
            assert eigenvalues.imag.abs().max() < 1e-7
            assert eigenvalues.real.abs().max() <= 1 + 1e-9
    problem, _ = random_problem(3, 0)
    tight = 2 / problem.sharpness
    zero = torch.zeros(3, 3, dtype=F64)
    assert spectral_radius(problem.dynamics(zero, 1.001 * tight)) > 1
    assert problem.margins(zero, 1.001 * tight)[1] < 0


def test_printed_theorem_1_fails_for_a_non_symmetric_blackbox_term():
    problem = NoisyQuadratic(matrix([1.0, 0.5], [0.5, 1.0]), torch.eye(2, dtype=F64))
    blackbox = matrix([1.0, 3.25], [0.0, 0.5])  # eigenvalues 1, 1/2; the bound is 4/3
    eigenvalues = torch.linalg.eigvals(problem.dynamics(blackbox)).real
    torch.testing.assert_close(
        eigenvalues.sort().values, torch.tensor([-2.0, 0.875], dtype=F64)
    )
    assert problem.descent_margin(blackbox) < 0


def test_descent_margin_decides_whether_a_step_can_raise_the_loss():
    signs = set()
    for seed in range(200):
        problem, generator = random_problem(3, seed)
        blackbox = 0.4 * torch.randn(3, 3, generator=generator, dtype=F64)
        dynamics = problem.dynamics(blackbox, 0.5)
        half = problem.power(0.5)
        norm = torch.linalg.matrix_norm(half @ dynamics @ problem.power(-0.5), 2)
        margin = problem.descent_margin(blackbox, 0.5)
        assert (margin >= 0) == (norm <= 1)
        signs.add(bool(margin >= 0))
    assert signs == {True, False}


# --- momentum


def state_matrix(method, s, betas):
    """Apply one update of the method, in its own words, to every basis state."""
    columns = []
    size = 1 + len(betas)
    for basis in torch.eye(size, dtype=F64):
        x, memory = basis[0], basis[1:]
        if method == "polyak":  # memory: the previous iterate
            columns.append([x - s * x + betas[0] * (x - memory[0]), x])
        elif method == "nesterov":
            y = x + betas[0] * (x - memory[0])
            columns.append([y - s * y, x])
        elif method == "ema":  # memory: averages of gradients, in units of lambda
            m = [b * m + (1 - b) * x for b, m in zip(betas, memory, strict=True)]
            columns.append([x - s * sum(m) / len(m), *m])
        else:  # aggmo, memory: velocities in units of lambda
            v = [b * m - x for b, m in zip(betas, memory, strict=True)]
            columns.append([x + s * sum(v) / len(v), *v])
    return torch.tensor(columns, dtype=F64).T


METHODS = [
    ("polyak", (0.9,)),
    ("ema", (0.9,)),
    ("ema", (0.9, 0.99, 0.999)),
    ("nesterov", (0.9,)),
    ("polyak", (0.0,)),
    ("aggmo", (0.5,)),
    ("aggmo", (0.0, 0.9, 0.99)),
    ("aggmo", (0.3, 0.3, 0.8, 0.95)),
]


@pytest.mark.parametrize(("method", "betas"), METHODS)
def test_polynomial_belongs_to_the_method(method, betas):
    for s in (0.1, 1.3, 3.7):
        system = state_matrix(method, s, betas)
        ours = momentum_polynomial(method, s, betas)
        n = system.shape[0]
        for z in (0.3, -1.0, 1.7):
            direct = torch.linalg.det(z * torch.eye(n, dtype=F64) - system)
            powers = torch.tensor([z**k for k in range(n, -1, -1)], dtype=F64)
            assert direct.item() == pytest.approx((ours * powers).sum().item(), 1e-9)


@pytest.mark.parametrize(("method", "betas"), METHODS)
def test_limit_and_jury_agree_with_the_roots(method, betas):
    limit = momentum_limit(method, betas)
    fractions = torch.tensor([-0.01, 0.001, 0.3, 0.9, 0.999, 1.001, 1.5], dtype=F64)
    steps = limit * fractions
    stable = jury_stable(momentum_polynomial(method, steps, betas))
    assert stable.tolist() == [False, True, True, True, True, False, False]
    radii = [spectral_radius(state_matrix(method, s, betas)) < 1 for s in steps]
    assert stable.tolist() == [bool(r) for r in radii]


def test_jury_agrees_with_roots_of_random_polynomials():
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(2000, 5, generator=generator, dtype=F64)
    coefficients[:, 0] = 1.5
    companion = torch.zeros(2000, 4, 4, dtype=F64)
    companion[:, 1:, :-1] = torch.eye(3, dtype=F64)
    companion[:, 0] = -coefficients[:, 1:] / 1.5
    inside = spectral_radius(companion) < 1
    assert 100 < inside.sum() < 1900
    assert torch.equal(jury_stable(coefficients), inside)


def test_default_aggmo_limit_is_the_fraction_of_the_dossier():
    limit = momentum_limit("aggmo", (0.0, 0.9, 0.99))
    assert limit == pytest.approx(22686 / 7671, rel=1e-14)


@pytest.mark.parametrize("method", ["polyak", "ema", "nesterov"])
def test_variance_solves_the_lyapunov_equation(method):
    alpha, curvature, beta, noise = 0.4, 1.5, 0.8, 2.0
    system = state_matrix(method, alpha * curvature, (beta,))
    drive = {
        "polyak": [-alpha, 0.0],
        "nesterov": [-alpha, 0.0],
        # the buffer in units of lambda receives (1 - beta) xi / lambda
        "ema": [-alpha * (1 - beta), (1 - beta) / curvature],
    }[method]
    drive = torch.tensor(drive, dtype=F64)
    covariance = solve_lyapunov(system, noise * torch.outer(drive, drive))
    value = momentum_variance(method, alpha, curvature, beta, noise)
    assert value == pytest.approx(covariance[0, 0].item(), rel=1e-12)


def test_variance_of_polyak_is_the_formula_of_the_dossier():
    alpha, curvature, beta = 0.3, 2.0, 0.7
    s = alpha * curvature
    formula = alpha * (1 + beta) / (curvature * (1 - beta) * (2 * (1 + beta) - s))
    assert momentum_variance("polyak", alpha, curvature, beta) == pytest.approx(formula)


def test_momentum_refuses_bad_input():
    with pytest.raises(ValueError, match="method"):
        momentum_limit("adam", 0.9)
    with pytest.raises(ValueError, match="beta"):
        momentum_limit("polyak", 1.0)
    with pytest.raises(ValueError, match="one beta"):
        momentum_polynomial("nesterov", 0.1, (0.1, 0.2))
    with pytest.raises(ValueError, match="no stationary variance"):
        momentum_variance("nesterov", 1.5, 1.0, 0.9)
    with pytest.raises(ValueError, match="one beta"):
        momentum_variance("aggmo", 0.1, 1.0, 0.9)
