"""Estimates of a known meta-gradient: the exact recursion, statistics, training."""

import math
from dataclasses import replace

import pytest
import torch
from problems import arrays_of, expect_resumable, random_numbers
from torch.utils._pytree import tree_map

from l2olib.experiments import find
from l2olib.learned.mlp import star
from l2olib.metatrain.estimates import (
    EstimateStatistics,
    NetworkEstimates,
    RateTraining,
    meta_gradient,
    meta_loss,
    minima_of,
    rate_step,
    stationary,
)
from l2olib.metatrain.evolution import (
    PES,
    BackPropagation,
    Evolution,
    EvolutionJob,
    clipped,
    es,
    over_pairs,
)
from l2olib.metatrain.quadratic import HESSIAN, problem_of
from l2olib.optimizees import MLP
from l2olib.optimizers import Adam, constant
from l2olib.train import drive

PROBLEM = problem_of(HESSIAN)
THETA = math.log(0.2)


# ---- the exact meta-loss -------------------------------------------------------------


def simulated(theta, runs: int, horizon: int, truncation: int, sigma: float, cut: bool):
    """Mean loss of many simulated runs: plain loops, nothing of the recursion."""
    phi = 10**0.5 * random_numbers(0, runs, 2)
    minima = random_numbers(1, horizon, runs, 2)
    eps = sigma * random_numbers(2, horizon // truncation, runs, 1)
    total = 0.0
    for t in range(horizon):
        if cut and t % truncation == 0:
            phi = phi.detach()
        gap = phi - minima[t]
        grad = gap @ PROBLEM.hessian
        total = total + 0.5 * (gap * grad).sum(1).mean()
        phi = phi - (theta + eps[t // truncation]).exp() * grad
    return total / horizon


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_recursion_is_the_mean_of_simulated_runs(sigma, carried):
    """Value and derivative, each within one percent for 400,000 runs."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    value = simulated(theta, 400_000, 12, 4, sigma, not carried)
    (slope,) = torch.autograd.grad(value, theta)
    exact = meta_loss(PROBLEM, torch.tensor(THETA), 12, 10.0, 4, sigma)
    assert value.item() == pytest.approx(exact.item(), rel=0.01)
    found = meta_gradient(PROBLEM, THETA, 12, 10.0, 4, sigma, carried)
    assert slope.item() == pytest.approx(found, rel=0.01)


def test_the_recursion_equals_the_closed_form_of_the_model():
    """The model averages over t = 1..T, this meta-loss over t = 0..T - 1."""
    start, theta = 10 * torch.eye(2).double(), torch.tensor(THETA).double()
    dynamics = PROBLEM.dynamics(torch.zeros(2, 2).double(), theta.exp())
    later = PROBLEM.step_losses(dynamics, start, 20).sum()
    first = 0.5 * (PROBLEM.hessian * (start + PROBLEM.noise)).sum()
    expected = (first + later) / 21
    assert meta_loss(PROBLEM, theta, 21, 10.0).item() == pytest.approx(expected.item())


def test_a_truncation_longer_than_the_rest_ends_with_the_horizon():
    values = [
        meta_loss(PROBLEM, torch.tensor(THETA), 7, 10.0, k) for k in (7, 20, None)
    ]
    assert values[0] == values[1] == values[2]


def test_the_derivative_is_that_of_differences():
    at, h = torch.tensor(THETA).double(), 1e-6
    up, down = (meta_loss(PROBLEM, at + s * h, 30, 10.0, 5, 0.1) for s in (1, -1))
    found = meta_gradient(PROBLEM, THETA, 30, 10.0, 5, 0.1)
    assert found == pytest.approx((up - down).item() / (2 * h), rel=1e-6)


def test_the_stationary_rate_is_a_minimum():
    best = stationary(PROBLEM, -8.0, 0.2, 100, 10.0)
    near = [
        meta_loss(PROBLEM, torch.tensor(best + d), 100, 10.0) for d in (-0.01, 0.01)
    ]
    assert meta_loss(PROBLEM, torch.tensor(best), 100, 10.0) < min(near)
    with pytest.raises(ValueError, match="different signs"):
        stationary(PROBLEM, -10.0, -8.0, 100, 10.0)


def test_the_step_is_gradient_descent():
    phi, xi, meta = random_numbers(0, 2), random_numbers(1, 2), torch.tensor([THETA])
    loss, new, state = rate_step(PROBLEM, meta.double(), phi, {}, xi)
    gap = (phi - xi)[:, None]
    assert loss.item() == pytest.approx((0.5 * gap.T @ PROBLEM.hessian @ gap).item())
    expected = phi - math.exp(meta.item()) * PROBLEM.hessian @ gap[:, 0]
    assert torch.allclose(new, expected) and state == {}


# ---- statistics ----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [True, False])
def test_the_mean_of_the_estimates_is_the_expected_one(accumulate):
    pes = PES(2_000, 4, 12, 0.1, accumulate=accumulate)
    found = arrays_of(EstimateStatistics(pes, tuple(range(10)), 0.03))
    mean, error = found["estimate"].mean(), found["estimate"].std() / 10**0.5
    assert abs(mean - found["expected"][0]) < 3 * error
    apart = (found["expected"] - found["exact"]).abs().item()
    assert apart == 0 if accumulate else apart > 10 * error


def test_statistics_are_those_of_the_estimates():
    work = EstimateStatistics(PES(30, 5, 20, 0.1), (3, 7), 0.2)
    found = arrays_of(work)
    each = work.job("cpu", False, {}).unroll(7)
    assert each.shape == (4, 30)
    torch.testing.assert_close(found["estimate"][1], each.mean())
    torch.testing.assert_close(found["whole"][1], each.mean(0).var())
    torch.testing.assert_close(found["online"][1], each.var(1).float())
    torch.testing.assert_close(found["late"][1], each[-1].var())
    assert len(found["exact"]) == len(found["expected"]) == 1


def test_resumed_works_are_bit_identical(tmp_path):
    for work in (
        EstimateStatistics(PES(5, 5, 10, 0.1), (0, 1, 2), 0.2),
        RateTraining(PES(2, 5, 10), (0, 1), steps=60, points=6),
        RateTraining(PES(2, 5, 10), (0, 1), "back-propagation", 60, points=6),
        along(PES(2, 3, 6, offset=6), 2)[0],
    ):
        metas = {"optimizer": along(PES(2, 3, 6, offset=6), 2)[1]}
        expect_resumable(work, tmp_path / "checkpoint", metas)


# ---- through networks ----------------------------------------------------------------


def along(estimator, count) -> tuple[NetworkEstimates, dict[str, torch.Tensor]]:
    """Estimates at two of the three snapshots of a meta-training, which has moved."""
    net = MLP((64, 4, 10))
    of = Evolution(
        star(net.layout, 1e-4), net, "digits", batch=4, iterations=2,
        estimator=estimator, clip=0.01, seed=3,
    )  # fmt: skip
    metas = 0.1 * random_numbers(0, 3, of.layout.n).float()
    trained = {"snapshots": metas, "snapshot_rollouts": torch.tensor([0, 1, 2])}
    return NetworkEstimates(of, {"optimizer": "w"}, count, stride=2), trained


def test_estimates_along_a_training_are_the_means_of_its_own():
    """Against the estimator in a plain loop, at the last snapshot."""
    estimator = PES(2, 3, 6, offset=6)
    work, trained = along(estimator, 4)
    found, _ = drive(work.job("cpu", False, {"optimizer": trained}))
    assert found["rollouts"].tolist() == [0, 2]
    job, meta = EvolutionJob(work.training), trained["snapshots"][2]
    pairs, seen = estimator.start(meta, job.begin, 3), []
    with torch.no_grad():
        for k in range(6):  # two of them until all have begun anew
            eps = estimator.perturbations(meta, 3, k)
            one, pairs = job.estimate(meta, eps, pairs, job.batches(k))
            seen.append(one.gradient.double())
    for name, kept in (("", seen), ("clipped.", [v.clamp(-0.01, 0.01) for v in seen])):
        kept = torch.stack(kept[2:])
        torch.testing.assert_close(found[f"{name}mean"][0, 1], kept.mean(0))
        squares = (kept**2).sum(1).mean()
        torch.testing.assert_close(found[f"{name}square"][0, 1], squares)
    assert found["clipped.square"][0, 1] < found["square"][0, 1]


def test_whole_unrolls_differentiated_are_the_derivative_of_their_loss():
    """Of one meta-parameter, by a difference in place of back-propagation."""
    work, trained = along(BackPropagation(1, 6, 6), 1)
    found, _ = drive(work.job("cpu", False, {"optimizer": trained}))
    job, meta = EvolutionJob(work.training), trained["snapshots"][2].double()
    step, of, (begin, _) = job.step, work.training, job.begin(0, 0)
    at = int(found["mean"][0, 1].abs().argmax())

    def mean_loss(change):
        params, total = begin.double()[None, None], 0.0
        state = tree_map(lambda v: v[None, None], of.optimizer.init(begin.double()))
        moved = meta + change * torch.eye(len(meta)).double()[at]
        for batch in job.batches(0).unbind(1):
            loss, params, state = step(moved[None, None], params, state, batch)
            total += loss.item() / 6
        return total

    slope = (mean_loss(1e-4) - mean_loss(-1e-4)) / 2e-4
    assert found["mean"][0, 1, at].item() == pytest.approx(slope, rel=1e-2)


# ---- meta-training -------------------------------------------------------------------


def small(by="evolution", **changes) -> RateTraining:
    base = RateTraining(PES(3, 4, 8), (0, 1), by, steps=40, points=20, start=0.1)
    return replace(base, **changes)


def test_meta_training_by_back_propagation_is_a_plain_loop():
    """Of truncations of 4 in runs of 8 steps: torch's own derivative and Adam."""
    work = small("back-propagation", seeds=(1,))
    job, found = work.job("cpu", False, {}), arrays_of(work)
    theta = torch.tensor([work.start], dtype=torch.float64).log().requires_grad_()
    outer = torch.optim.Adam([theta], lr=work.meta_lr)
    rates, phi = [theta.exp().item()], None

    for k in range(10):
        if k % 2 == 0:
            phi = torch.stack([job.begin(run, k // 2)[0] for run in range(6)])
        minima, total = minima_of(PROBLEM, 6, 4, 1, k), 0.0
        for t in range(4):
            gap = phi - minima[:, t]
            grad = gap @ PROBLEM.hessian
            total = total + 0.5 * (gap * grad).sum(1).mean() / 4
            phi = phi - theta.exp() * grad
        (theta.grad,) = torch.autograd.grad(total, theta)
        theta.grad.clamp_(-1, 1)
        outer.step()
        phi = phi.detach()
        rates.append(theta.exp().item())
    assert found["steps"].tolist() == list(range(0, 44, 4))
    assert found["rate"][0].tolist() == pytest.approx(rates, rel=1e-5)


def test_meta_training_by_evolution_is_pes_and_adam():
    work = small(seeds=(1,))
    job, e, found = work.job("cpu", False, {}), work.estimator, arrays_of(work)

    def step(*args):
        return rate_step(PROBLEM, *args)

    meta = torch.tensor([work.start], dtype=torch.float64).log()
    pairs, outer = e.start(meta, job.begin), Adam(constant(work.meta_lr))
    adam = outer.init(meta)
    for k in range(10):
        one, pairs = e.estimate(
            over_pairs(step), job.begin, meta, e.perturbations(meta, 1, k), pairs,
            minima_of(PROBLEM, 3, 4, 1, k),
        )  # fmt: skip
        move, adam = outer.update({}, clipped(one.gradient, work.clip), adam, meta)
        meta = meta + move
        assert found["rate"][0, k + 1].item() == pytest.approx(meta.exp().item())


@pytest.mark.parametrize("by", ["evolution", "back-propagation"])
def test_a_seed_has_the_same_bits_in_any_company(by):
    both, alone = arrays_of(small(by)), arrays_of(small(by, seeds=(1,)))
    assert torch.equal(both["rate"][1], alone["rate"][0])
    assert not torch.equal(both["rate"][0], both["rate"][1])


def test_what_is_said_about_the_end():
    found = arrays_of(small())
    lowest = meta_loss(PROBLEM, found["best"].log()[0], 8, 10.0)
    last = found["rate"][:, -1].double().log()
    for k, theta in enumerate(last):
        expected = meta_loss(PROBLEM, theta, 8, 10.0) / lowest - 1
        assert found["excess"][k, -1].item() == pytest.approx(expected.item(), rel=1e-3)
    late = found["steps"] > 20
    assert torch.allclose(found["final"].float(), found["excess"][:, late].mean(1))
    assert (found["excess"] >= 0).all()


def test_training_approaches_the_best_rate():
    work = RateTraining(es(8, 20), (0, 1), steps=6_000, start=0.1)
    found = arrays_of(work)
    assert (found["rate"][:, -1] / found["best"] - 1).abs().max() < 0.3


def test_mistakes_are_named():
    for wrong in (PES(2, 4, 10), PES(2, 4, 8, offset=8)):
        with pytest.raises(ValueError, match="go through an unroll together"):
            EstimateStatistics(wrong, (0,), 0.1)
    for wrong in (PES(2, 4, 10), PES(2, 4, 8, resets="slot"), PES(2, 4, 8, offset=8)):
        with pytest.raises(ValueError, match="restart together"):
            small(estimator=wrong)
    with pytest.raises(ValueError, match="at least 2 pairs, not 1"):
        EstimateStatistics(PES(1, 4, 8), (0,), 0.1)
    with pytest.raises(ValueError, match="steps must be at least a truncation"):
        small(steps=1)
    with pytest.raises(ValueError, match="'back-propagation', not 'magic'"):
        small("magic")


def test_the_table_compares_at_equal_cost():
    """The methods of one figure see as many inner steps, of as many runs."""
    works = [r.work for r in find("ours.rate")[0].runs("laptop")]
    assert len({(w.steps, w.estimator.pairs, w.seeds, w.meta_lr) for w in works}) == 1
    assert {w.estimator.horizon for w in works} == {100}
