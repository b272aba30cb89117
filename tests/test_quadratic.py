"""Works on the noisy quadratic: what they compute, against slow and plain versions."""

from dataclasses import replace

import pytest
import torch
from problems import arrays_of, expect_resumable, random_numbers

from l2olib.experiments import HORIZONS, STAR_SHARES, find
from l2olib.metatrain.evolution import clipped, es
from l2olib.metatrain.quadratic import (
    HESSIAN,
    GradientVariance,
    QuadraticMetaTraining,
    Spectrum,
    literal_shares,
    lowest_loss,
    problem_of,
    unroll_losses,
)

START = 10 * torch.eye(2, dtype=torch.float64)


def test_a_run_is_that_of_the_model():
    problem = problem_of(HESSIAN)
    assert problem.hessian.tolist() == [list(row) for row in HESSIAN]
    dynamics, phi = 0.5 * random_numbers(0, 3, 2, 2), random_numbers(1, 3, 2)
    minima = random_numbers(2, 8, 3, 2)
    path = problem.simulate(dynamics, phi, minima[:-1])
    expected = problem.loss(path[1:], minima[1:]).mean(0)
    torch.testing.assert_close(unroll_losses(problem, dynamics, phi, minima), expected)


# ---- eigenvalues ---------------------------------------------------------------------


def test_spectra_share_their_problems():
    """Interventions are compared on the same H and P."""
    plain = Spectrum((0, 1, 2), size=6)
    base = [plain.eigenvalues(s) for s in plain.seeds]
    decayed = [replace(plain, decay=0.5).eigenvalues(s) for s in plain.seeds]
    for a, b in zip(base, decayed, strict=True):
        half = 1 - 0.5 * (1 - a)
        torch.testing.assert_close(
            torch.view_as_real(half).sort(0).values,
            torch.view_as_real(b).sort(0).values,
        )
    found = arrays_of(plain)
    assert found["eigenvalues"].shape == (3, 6, 2)
    torch.testing.assert_close(
        found["radius"], torch.stack([x.abs().max() for x in base])
    )
    torch.testing.assert_close(
        found["real"], torch.stack([x.real.mean() for x in base])
    )
    # The seeds differ, and the nominal term moves the mean by alpha tr H / n exactly.
    assert len(set(found["radius"].tolist())) == 3
    curvatures = torch.logspace(-1.3, 0.9, 6, dtype=torch.float64)
    moved = arrays_of(replace(plain, nominal=0.2))
    torch.testing.assert_close(
        found["real"] - moved["real"], (0.2 * curvatures.mean()).expand(3)
    )


# ---- variance of the meta-gradient ---------------------------------------------------


def test_the_variance_is_that_of_back_propagated_gradients():
    work = GradientVariance(tuple(range(6)), points=4, horizons=(1, 3), batches=3)
    job, found = work.job("cpu", False, {}), arrays_of(work)
    problem = problem_of(HESSIAN)

    def loss(blackbox, alpha, phi, minima):
        path = problem.simulate(problem.dynamics(blackbox, alpha), phi, minima[:-1])
        return problem.loss(path[1:], minima[1:]).mean()

    zero = torch.zeros(2, 2, dtype=torch.float64)
    for k, horizon in enumerate(work.horizons):
        for p, alpha in enumerate(job.alphas):
            gradients = torch.stack(
                [
                    torch.func.grad(loss)(
                        zero, alpha, job.first[s], job.minima[: horizon + 1, s]
                    )
                    for s in range(6)
                ]
            )
            total = gradients.var(0).sum().item()
            measured = found["deviation"][:, k, p]
            assert measured.mean().item() == pytest.approx(total, rel=1e-5)
            gap = (gradients - gradients.mean(0)).square().sum((1, 2)) * 6 / 5
            expected = gap.unflatten(0, (3, 2)).mean(1)
            torch.testing.assert_close(measured, expected)
    assert job.alphas[-1].item() == pytest.approx(2 / problem.sharpness)


def test_es_is_the_antithetic_estimator():
    work = GradientVariance(tuple(range(4)), "es", 3, (1, 3), batches=2)
    job, found = work.job("cpu", False, {}), arrays_of(work)
    problem = problem_of(HESSIAN)
    for p, alpha in enumerate(job.alphas):
        up, down = (
            unroll_losses(
                problem, problem.dynamics(sign * job.eps, alpha), job.first,
                job.minima[:4],
            )
            for sign in (1, -1)
        )  # fmt: skip
        each = (up - down)[:, None, None] * job.eps / (2 * work.sigma**2)
        total = each.var(0).sum().item()
        assert found["deviation"][:, 1, p].mean().item() == pytest.approx(total)


@pytest.mark.parametrize("estimator", ["exact", "es"])
def test_the_prediction_is_met_by_many_seeds(estimator):
    """Within 5 standard errors over batches, and these are small enough to tell."""
    work = GradientVariance(tuple(range(20_000)), estimator, 5, (1, 4, 10), batches=50)
    found = arrays_of(work)
    values = found["deviation"].double()
    error = values.std(0) / 50**0.5
    assert ((values.mean(0) - found["predicted"]).abs() < 5 * error).all()
    assert (error / found["predicted"]).median() < 0.1


def test_a_resumed_variance_is_bit_identical(tmp_path):
    for estimator in ("exact", "es"):
        work = GradientVariance(tuple(range(4)), estimator, 3, (1, 2, 6), batches=2)
        expect_resumable(work, tmp_path / f"{estimator}.checkpoint")


def test_seeds_come_in_whole_batches():
    with pytest.raises(ValueError, match="whole batches: 7 are not a multiple of 5"):
        GradientVariance(tuple(range(7)), batches=5)


def test_an_estimator_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="^estimator must be one of .*, not 'foo'"):
        GradientVariance((0, 1), "foo", batches=1)


@pytest.mark.parametrize("horizons", [(5, 2), (1, 1), (0, 2)])
def test_horizons_ascend(horizons):
    with pytest.raises(ValueError, match="must be ascending, from 1 on"):
        GradientVariance((0, 1), batches=1, horizons=horizons)


# ---- meta-training -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iterations", "horizon", "pairs"])
def test_nothing_to_do_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        QuadraticMetaTraining(0.1, (0,), **{"iterations": 10, name: 0})


def test_an_iteration_is_es_and_a_step_of_torch_adamw():
    """Against ES whose truncation is the horizon, step by step, seed by seed."""
    work = QuadraticMetaTraining(0.2, (3, 5), 4, pairs=3, init=0.1, horizon=6)
    job = work.job("cpu", False, {})
    problem, alpha = job.problem, job.alpha
    state = job.start()
    assert not torch.equal(state["meta"][0], state["meta"][1])
    estimator = es(3, 6, work.sigma)
    for r, _ in enumerate(work.seeds):
        meta = torch.nn.Parameter(job.start()["meta"][r].clone())
        outer = torch.optim.AdamW([meta], lr=work.meta_lr, weight_decay=0.0)
        for iteration in range(4):
            eps, phi, minima = (
                x[..., 3 * r : 3 * r + 3, :] for x in job.draws(iteration)
            )

            def step(members, params, inner, batch):
                before, now = batch[:, None, :2], batch[:, None, 2:]
                dynamics = problem.dynamics(members.unflatten(-1, (2, 2)), alpha)
                gap = (params - before)[..., None]
                params = before + (dynamics @ gap)[..., 0]
                return problem.loss(params, now), params, inner

            def begin(pair, episode, phi=phi):
                return phi[pair], {}

            batches = torch.cat([minima[:-1], minima[1:]], -1).movedim(0, 1)
            found, _ = estimator.estimate(
                step, begin, meta.data, eps, estimator.start(meta.data, begin), batches
            )
            meta.grad = clipped(found.gradient, work.clip)
            outer.step()
        while int(state["done"]) < 4:
            state = job.advance(state)
        torch.testing.assert_close(state["meta"][r], meta.data, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_nominal_term_is_a_start_of_the_blackbox_term(decay):
    """Only alpha I + P enters a run, and neither ES nor AdamW without decay knows where
    the origin is: from P = 0 beside alpha, or from P = alpha I beside nothing, M takes
    the same way. With decay it does not."""
    beside, alone = (
        QuadraticMetaTraining(share, (0, 1), 8, weight_decay=decay).job("cpu", False, 0)
        for share in (0.3, 0.0)
    )
    shift = beside.alpha * torch.eye(2).double().flatten()
    one, two = beside.start(), alone.start()
    two["meta"] = two["meta"] + shift
    for _ in range(8):
        one, two = (
            beside._iterate(one, int(one["done"])),
            alone._iterate(two, int(two["done"])),
        )
    apart = (one["meta"] + shift - two["meta"]).abs().max()
    assert apart > 1e-3 if decay else apart < 1e-9
    assert (one["meta"].abs() > 0.01).any()


def test_a_seed_has_the_same_bits_in_any_company():
    alone = arrays_of(QuadraticMetaTraining(0.2, (3,), 20))
    both = arrays_of(QuadraticMetaTraining(0.2, (1, 3), 20))
    assert torch.equal(alone["blackbox"][0], both["blackbox"][1])
    assert torch.equal(alone["loss"][0, 1:], both["loss"][1, 1:])


def test_what_is_noted_along_the_way():
    work = QuadraticMetaTraining(0.1, (0, 1), 30, meta_lr=1e-2)
    found, problem = arrays_of(work), problem_of(HESSIAN)
    assert found["steps"][0] == 0 and found["steps"][-1] == 30
    assert (found["blackbox"][:, 0] == 0).all()
    alpha = 0.1 * 2 / problem.sharpness
    p = found["blackbox"][1, -1].double().unflatten(0, (2, 2))
    dynamics = problem.dynamics(p, alpha)
    exact = problem.step_losses(dynamics, START, 50).mean()
    assert found["exact"][1, -1].item() == pytest.approx(exact.item(), rel=1e-5)
    moduli = torch.linalg.eigvals(dynamics).abs().sort().values.float()
    torch.testing.assert_close(found["moduli"][1, -1], moduli, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["radius"], found["moduli"][..., -1])
    _, variances = problem.meta_gradient_moments(p, alpha, START, 50)
    assert found["single"][1, -1].item() == pytest.approx(
        variances[-1].sum().item(), rel=1e-4
    )


def test_averages_begin_at_the_first_value():
    job = QuadraticMetaTraining(0.1, (0,), 5).job("cpu", False, {})
    first, second = torch.tensor([4.0]), torch.tensor([2.0])
    start = job._average(torch.tensor([torch.nan]), first)
    assert start == first
    assert job._average(start, second).item() == pytest.approx(0.95 * 4 + 0.05 * 2)


def test_a_resumed_meta_training_is_bit_identical(tmp_path):
    work = QuadraticMetaTraining(0.1, (0, 1), 40)
    expect_resumable(work, tmp_path / "run.checkpoint")


def test_the_lowest_loss_is_a_minimum():
    """Its gradient vanishes there, no optimizer nearby is better, and in one dimension
    it is the best of a fine grid."""
    problem = problem_of(HESSIAN)
    lowest = lowest_loss(HESSIAN, 10.0, 50)
    gains = 0.3 * torch.eye(2).double() + 0.3 * random_numbers(0, 4_000, 2, 2)
    losses = problem.step_losses(problem.dynamics(gains), START, 50).mean(-1)
    assert lowest < losses.min()
    single = problem_of(curved := ((2.0,),))
    grid = torch.linspace(0, 1, 20_001).double()[:, None, None]
    one = 10 * torch.eye(1).double()
    best = single.step_losses(single.dynamics(grid), one, 50).mean(-1).min()
    assert lowest_loss(curved, 10.0, 50).item() == pytest.approx(best.item(), rel=1e-7)


def test_meta_training_approaches_the_optimum():
    work = QuadraticMetaTraining(0.2, (0, 1), 600, meta_lr=1e-2)
    found = arrays_of(work)
    excess = found["exact"] - found["optimum"]
    assert (excess[:, -1] < 0.2 * excess[:, 0]).all()
    assert (excess > 0).all()


# ---- the table -----------------------------------------------------------------------


def test_the_papers_settings():
    """Scale of the figures: laptop is the paper's own."""
    exact, _ = (r.work for r in find("star.fig2a")[0].runs("laptop"))
    assert (len(exact.seeds), exact.points, exact.spread) == (500, 50, 10.0)
    assert exact.horizons == HORIZONS and len(HORIZONS) == 20
    assert (HORIZONS[0], HORIZONS[-1]) == (1, 1_000)
    works = [r.work for r in find("star.fig2c")[0].runs("laptop")]
    assert [w.share for w in works] == list(STAR_SHARES)
    for w in works:
        assert (w.horizon, w.sigma, w.clip, w.smoothing) == (50, 0.01, 1.0, 0.95)
        assert len(w.seeds) == 5 and w.init == 0.0
    for name in ("star.fig1", "star.fig2a", "star.fig2c", "star.fig2c-details"):
        laptop, paper = (
            [r.work for r in find(name)[0].runs(p)] for p in ("laptop", "paper")
        )
        assert laptop == paper


def test_two_readings_of_the_caption():
    """2 alpha / lambda_max = c read literally, against alpha lambda_max / 2 = c."""
    sharpness = problem_of(HESSIAN).sharpness
    (share,) = literal_shares([0.3])
    alpha = share * 2 / sharpness
    assert 2 * alpha / sharpness == pytest.approx(0.3)
