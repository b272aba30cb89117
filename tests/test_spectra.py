"""Eigenvalues of linearised steps, against problems whose spectrum is known."""

import math

import pytest
import torch
from problems import Step

from l2olib import spectra
from l2olib.data import load
from l2olib.guards import LGL2O
from l2olib.optimizees import MLP, Task
from l2olib.optimizers import SGD, Adam, AdamW, constant
from l2olib.train import Alone, drive


class Quadratic:
    """A task of one kind of item: f(x) = x'Hx / 2."""

    def __init__(self, hessian):
        self.hessian = hessian

    def loss_and_grad(self, params, idx):
        return params @ self.hessian @ params / 2, self.hessian @ params


def quadratic(*eigenvalues):
    turn = torch.linalg.qr(
        torch.randn(
            len(eigenvalues),
            len(eigenvalues),
            generator=torch.Generator().manual_seed(1),
            dtype=torch.float64,
        )
    ).Q
    return Quadratic(turn @ torch.diag(torch.tensor(eigenvalues).double()) @ turn.T)


def values(task, optimizer, n, size, params=None):
    params = torch.ones(n, dtype=torch.float64) if params is None else params
    step, at = spectra.step_map(
        task, optimizer, {}, params, optimizer.init(params), torch.arange(1)
    )
    return spectra.ritz_values(step, at, size)


def test_gradient_descent_on_a_quadratic_has_one_minus_rate_times_curvature():
    found, residuals = values(quadratic(8.0, 3.0, 1.0), SGD(constant(0.3)), 3, 3)
    expected = torch.tensor([1 - 0.3 * 8, 1 - 0.3, 1 - 0.3 * 3], dtype=torch.float64)
    torch.testing.assert_close(found.real, expected, rtol=0, atol=1e-10)
    assert found.imag.abs().max() < 1e-10
    assert residuals.max() < 1e-8


def test_the_order_of_a_state_does_not_matter():
    """A file gives it back by name; the step is the same."""
    torch.manual_seed(0)
    at, optimizer = torch.randn(3).double(), Adam(constant(0.1))
    _, state = optimizer.update({}, at, optimizer.init(at), at)
    turned = dict(reversed(state.items()))
    assert list(turned) != list(state)
    jacobians = []
    for each in (state, turned):
        arguments = {}, at, each, torch.arange(1)
        step, point = spectra.step_map(quadratic(3.0, 2.0, 1.0), optimizer, *arguments)
        jacobians.append(torch.func.jacrev(step)(point))
    moduli = [torch.linalg.eigvals(j).abs().sort().values for j in jacobians]
    torch.testing.assert_close(*moduli)


@pytest.mark.parametrize("curvature", [0.5, 60.0])
def test_momentum_has_the_roots_of_its_characteristic_polynomial(curvature):
    """Heavy ball: z^2 - (1 + beta - lr h) z + beta, by hand."""
    rate, beta = 0.05, 0.9
    found, _ = values(quadratic(curvature), SGD(constant(rate), momentum=beta), 1, 2)
    half = (1 + beta - rate * curvature) / 2
    root = torch.tensor(half**2 - beta, dtype=torch.complex128).sqrt()
    expected = torch.stack([half + root, half - root])
    order = expected.abs().argsort(descending=True)
    got = sorted(found.tolist(), key=lambda z: (round(abs(z), 9), z.imag))
    want = sorted(expected[order].tolist(), key=lambda z: (round(abs(z), 9), z.imag))
    assert got == pytest.approx(want, abs=1e-9)


def test_the_krylov_space_of_a_long_vector_finds_the_rim():
    eigenvalues = [20.0, *torch.linspace(0, 1, 199).tolist()]
    found, residuals = values(quadratic(*eigenvalues), SGD(constant(0.1)), 200, 12)
    left = found.real.argmin()
    assert found[left].real.item() == pytest.approx(-1.0, abs=1e-8)
    assert residuals[left] < 1e-6


def test_units_do_not_matter():
    """A step in units from 1e-8 to 1e8, whose derivative has a norm of 1e15."""
    gen = torch.Generator().manual_seed(0)
    plain = torch.randn(60, 60, generator=gen, dtype=torch.float64) / 60**0.5
    plain[0, 0] += 3
    units = torch.logspace(-8, 8, 60, dtype=torch.float64)
    units = units[torch.randperm(60, generator=gen)]
    scaled = units[:, None] * plain / units
    at = torch.zeros(60, dtype=torch.float64)
    d = spectra.balanced(lambda x: scaled @ x, at)
    assert scaled.norm() > 1e14 and (scaled * d / d[:, None]).norm() < 10 * plain.norm()
    found, _ = spectra.ritz_values(lambda x: scaled @ x, at, 30)
    expected = torch.linalg.eigvals(plain)
    largest = expected[expected.abs().argmax()]
    assert (found[0] - largest).abs() < 1e-6


def test_an_exhausted_space_leaves_nan():
    found, residuals = values(quadratic(2.0, 2.0), SGD(constant(0.3)), 2, 4)
    assert found[0].real.item() == pytest.approx(0.4)
    assert found[1:].isnan().all() and residuals[1:].isnan().all()


def test_a_step_without_a_derivative_is_refused():
    params = torch.tensor([1.0, 0.0], dtype=torch.float64)
    task = Quadratic(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    with pytest.raises(ValueError, match="no derivative here: choose"):
        values(task, Adam(constant(1e-3)), 2, 3, params)
    smooth = AdamW(constant(1e-3), eps_root=1e-8)
    assert values(task, smooth, 2, 3, params)[0].isfinite().any()


def test_a_training_records_the_hessians_largest_eigenvalue():
    """Against the dense Hessian of a network small enough to have one."""
    rate = 0.5
    work = spectra.Linearised(
        optimizee=MLP((2, 4, 2)),
        data="moons",
        method=Alone(SGD(constant(rate))),
        steps=20,
        seeds=(3,),
        segment=10,
        batch=64,
        evaluations=2,
        sample=256,
        size=12,
    )
    job = work.job("cpu", False, {"optimizer": {}})
    state = job.start()
    for _ in range(2):
        state = job.advance(state)
    task = Task(work.optimizee, load("moons"))
    params = state["method"]["params"][0].double()
    hessian = torch.func.hessian(task.loss)(params, torch.arange(256))
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    arrays = job.finish(state)
    left = arrays["ritz"][0, -1, :, 0].nan_to_num(math.inf).min().item()
    assert left == pytest.approx(1 - rate * largest, abs=1e-5)
    assert arrays["ritz"].shape == (1, 2, 12, 2)


def test_a_training_that_blows_up_has_no_spectrum_there():
    """Its parameters are infinite after the first step."""
    work = spectra.Linearised(
        optimizee=MLP((2, 4, 2)), data="moons", method=Alone(Step(math.inf)),
        steps=20, seeds=(0,), segment=10, batch=32, evaluations=2, sample=64, size=3,
    )  # fmt: skip
    job = work.job("cpu", False, {"optimizer": {}})
    arrays, _ = drive(job)
    assert arrays["ritz"].isnan().all() and arrays["loss"].isfinite().sum() == 1


def test_a_guard_has_no_single_step():
    guard = LGL2O(SGD(constant(0.1)), SGD(constant(0.1)))
    with pytest.raises(ValueError, match="one optimizer alone, not a guard"):
        spectra.Linearised(MLP((2, 4, 2)), "moons", guard, 10, (0,), segment=10)


def test_several_replicas_are_refused():
    with pytest.raises(ValueError, match="replicas must be 1"):
        spectra.Linearised(
            optimizee=MLP((2, 4, 2)),
            data="moons",
            method=Alone(SGD(constant(0.1))),
            steps=10,
            seeds=(0, 1),
            replicas=2,
            segment=10,
        )
