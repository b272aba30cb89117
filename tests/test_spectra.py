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


@pytest.mark.parametrize("kind", [spectra.Linearised, spectra.Idle, spectra.Norms])
def test_a_resumed_training_has_the_same_bits(kind, tmp_path):
    """Stopped after every piece, by way of its checkpoint."""
    more = {spectra.Linearised: {"size": 5}, spectra.Idle: {"seen": 64}}.get(kind, {})
    work = kind(
        optimizee=MLP((2, 4, 2)),
        data="moons",
        method=Alone(AdamW(constant(1e-2), eps_root=1e-8)),
        steps=30,
        seeds=(0,),
        segment=10,
        batch=32,
        sample=64,
        **more,
    )

    def job(pieces):
        """Interrupted after some pieces."""
        made = work.job("cpu", False, {"optimizer": {}})
        advance, left = made.advance, [None] * pieces

        def interrupted(state):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return advance(state)

        made.advance = interrupted
        return made

    whole, _ = drive(job(3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            drive(job(1), checkpoint=tmp_path / "half")
    arrays, _ = drive(job(1), checkpoint=tmp_path / "half")
    for name, value in whole.items():
        assert torch.equal(value.nan_to_num(7), arrays[name].nan_to_num(7)), name


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


def test_idle_weights_are_those_of_inputs_that_are_never_lit():
    """A sigmoid network has no dead units: what is idle can be told from the data."""
    work = spectra.Idle(
        optimizee=MLP((64, 8, 10), "sigmoid"), data="digits",
        method=Alone(SGD(constant(0.1))), steps=20, seeds=(2, 3), replicas=2,
        segment=10, batch=32, evaluations=2, seen=200,
    )  # fmt: skip
    job = work.job("cpu", False, {"optimizer": {}})
    state = job.advance(job.advance(job.start()))
    arrays = job.finish(state)
    data = load("digits")
    pictures = data.train.items(torch.arange(len(data.train)), torch.float32)[0]
    unlit = (pictures[:200].flatten(1) == 0).all(0)
    assert 0 < unlit.sum() < 64 and not (pictures.flatten(1)[:, unlit] == 0).all()
    share = 8 * unlit.sum().item() / work.optimizee.layout.n
    assert arrays["idle"].tolist() == [[pytest.approx(share)] * 2] * 2
    # SGD meets them in later pictures only, and hardly moves them
    assert ((arrays["growth"] - 1).abs() < 1e-2).all()
    for row, params in enumerate(state["method"]["params"]):
        without = work.optimizee.layout.views(params.clone())
        without["w0"][unlit] = 0.0
        flat = torch.cat([v.flatten() for v in without.values()])
        assert not torch.equal(flat, params)
        task = Task(work.optimizee, data)
        for name in ("full_loss", "test_loss", "test_error"):
            value = getattr(task, name)(flat).item()
            assert arrays[f"pruned.{name}"][row, -1].item() == pytest.approx(value)


def test_weights_that_nothing_reaches_can_grow():
    """Under an optimizer that moves by a share of the weights themselves."""
    work = spectra.Idle(
        optimizee=MLP((64, 8, 10), "sigmoid"), data="digits",
        method=Alone(AdamW(constant(0.01), weight_decay=-5.0)), steps=20, seeds=(0,),
        segment=10, batch=32, evaluations=2,
    )  # fmt: skip
    arrays, _ = drive(work.job("cpu", False, {"optimizer": {}}))
    assert arrays["growth"][0].tolist() == pytest.approx([1.05**10, 1.05**20])


def test_a_look_at_no_items_is_refused():
    with pytest.raises(ValueError, match="seen must be at least 1 item, not 0"):
        spectra.Idle(
            optimizee=MLP((2, 4, 2)), data="moons", method=Alone(SGD(constant(0.1))),
            steps=10, seeds=(0,), segment=10, seen=0,
        )  # fmt: skip


def test_weights_of_a_dead_unit_are_idle_and_cutting_them_changes_little():
    """All items are seen; what changes is a unit that an idle weight had kept off."""
    work = spectra.Idle(
        optimizee=MLP((64, 8, 10), "relu"), data="digits",
        method=Alone(SGD(constant(0.1))), steps=10, seeds=(0,), segment=10, batch=32,
        evaluations=1,
    )  # fmt: skip
    job = work.job("cpu", False, {"optimizer": {}})
    method = job.start()["method"]
    before = job.measure(method, 10)
    layout = work.optimizee.layout
    views = layout.views(method["params"][0].clone())
    views["b0"][3] = -100.0
    views["w1"][3] *= 50.0  # it would speak loudly
    dead = torch.cat([v.flatten() for v in views.values()])[None]
    found = job.measure(method | {"params": dead}, 10)
    added = (64 + 1 + 10) / layout.n  # some of them may have been idle before
    assert 0.5 * added < (found["idle"] - before["idle"]).item() <= added
    assert found["growth"] > 10
    views["b1"][0] = math.inf  # some other weight has diverged
    torn = torch.cat([v.flatten() for v in views.values()])[None]
    assert job.measure(method | {"params": torn}, 10)["growth"].isfinite()
    for look in (before, found):
        full, pruned = look["full_loss"].item(), look["pruned.full_loss"].item()
        assert pruned == pytest.approx(full, rel=1e-3)


def test_norms_are_those_of_each_tensor_at_each_mark():
    """Under pure weight decay each tensor shrinks by the same factor a step."""
    network = MLP((64, 8, 10), "sigmoid")
    zero = {"eps": 1e30}  # Adam's own part vanishes
    work = spectra.Norms(
        optimizee=network, data="digits", method=Alone(AdamW(
            constant(0.01), weight_decay=5.0, **zero)), steps=20, seeds=(2, 3),
        replicas=2, segment=10, batch=32, evaluations=2,
    )  # fmt: skip
    arrays, _ = drive(work.job("cpu", False, {"optimizer": {}}))
    for row, seed in zip(arrays["norms"], work.seeds, strict=True):
        start = network.layout.views(network.init(seed))
        for column, tensor in zip(row.T, start.values(), strict=True):
            size = tensor.square().sum().sqrt().item()
            assert column.tolist() == pytest.approx(
                [size * 0.95**10, size * 0.95**20], rel=1e-5
            )
