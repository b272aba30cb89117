"""ES and PES: golden vectors, unbiasedness, restarts, the resumable meta-training."""

import itertools
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import SRC, Clock, expect_resumable, make_toy_data, random_numbers  # noqa: F401
from test_star import GOLDEN, PRECISIONS
from torch.utils.flop_counter import FlopCounterMode

from l2olib import records, train
from l2olib.data import train_indices
from l2olib.experiments.star import ESTIMATORS, star_training
from l2olib.learned.mlp import star
from l2olib.learned.sgd import LearnableSGD
from l2olib.metatrain.evolution import (
    PES,
    BackPropagation,
    Estimate,
    Evolution,
    EvolutionJob,
    clipped,
    es,
    over_pairs,
)
from l2olib.metatrain.truncated import (
    TRAINING,
    VALIDATION,
    LearningCurve,
    LearningCurveJob,
    MetaTraining,
)
from l2olib.optimizees import MLP
from l2olib.optimizers import SGD, constant
from l2olib.records import Record
from l2olib.train import Unfinished, drive, inner_steps

HESSIAN = torch.tensor([[1.11, 0.596], [0.596, 0.486]], dtype=torch.float64)
START = torch.tensor([2.0, -1.5], dtype=torch.float64)


def quadratic_step(meta, params, state, center, hessian=HESSIAN):
    """Inner step of SGD with learnable log rate (and log of 1 - momentum)."""
    h, d = hessian.to(params), params - center
    sgd = LearnableSGD(momentum=0.0 if len(meta) == 2 else None)
    names = {"log_lr": meta[:1], "log_one_minus_momentum": meta[1:]}
    delta, state = sgd.update(names, h @ d, state, params)
    return 0.5 * d @ h @ d, params + delta, state


# ---- golden vectors ------------------------------------------------------------------


ESTIMATED = sorted(GOLDEN.glob("*_pes_*"))
assert len(ESTIMATED) >= 4, "without its files the next test would test nothing"


@pytest.mark.parametrize("bits", PRECISIONS)
@pytest.mark.parametrize("path", ESTIMATED, ids=lambda p: p.stem)
def test_estimates_are_the_references(path, bits):
    z, moves = np.load(path), path.stem.endswith("outer")
    pairs = [(k, k.replace("32/", "64/")) for k in z if k.startswith("grad32/")]
    assert pairs
    spread = max(np.abs(z[a] - z[b]).max() for a, b in pairs)
    tolerance = 1e-10 if bits == "64" else 3 * max(spread, 1e-6)

    def tensor(value):
        return torch.tensor(np.asarray(value), dtype=PRECISIONS[bits])

    names = [k.partition("/")[2] for k in z if k.startswith("eps/")]
    sgd = LearnableSGD(momentum=0.0 if len(names) == 2 else None)
    config = Evolution(sgd, MLP((2, 2)), "", meta_lr=1e-2, weight_decay=0.5)
    start = tensor(z["x0"])
    lengths = (int(z[k]) for k in ("num_tasks", "trunc_length", "total_length"))
    pes = PES(*lengths, float(z["std"]), "slot")
    step = over_pairs(partial(quadratic_step, hessian=tensor(z["H"])))

    def begin(pair, episode):
        return start, sgd.init(start)

    def expect(found, key, k=slice(None)):
        expected = np.stack([z[f"{key}{bits}/{n}"][k] for n in names], -1)
        assert torch.allclose(found, tensor(expected), rtol=0, atol=tolerance), key

    meta = tensor([z[f"theta{bits}/{n}"][0] for n in names])
    state = pes.start(meta, begin)
    state["steps"] = torch.tensor(z["init_inner_step"]).long()
    outer = config.outer.init(meta)
    for k in range(len(z["xi"])):
        expect(meta, "theta", k)
        eps = torch.stack([tensor(z[f"eps/{n}"][k]) for n in names], 1)
        xi = tensor(z["xi"][k]).transpose(0, 1)
        found, state = pes.estimate(step, begin, meta, eps, state, xi)
        expect(found.gradient, "grad", k)
        expect(state["noise"], "accum_after", k)
        assert np.array_equal(found.trained.T, z["mask"][k])
        assert np.array_equal(state["steps"], z["inner_step_end"][k])
        for sign, side in enumerate(("pos", "neg")):
            losses = tensor(z[f"loss_{side}{bits}"][k])
            assert torch.allclose(found.losses[..., sign].T, losses, atol=tolerance)
            ends = tensor(z[f"x_{side}_end{bits}"][k])
            assert torch.allclose(state["params"][:, sign], ends, atol=tolerance)
        assert found.loss.item() == pytest.approx(
            z[f"mean_loss{bits}"][k], abs=tolerance
        )
        if moves:
            gradient = clipped(found.gradient, config.clip)
            move, outer = config.outer.update({}, gradient, outer, meta)
            meta = meta + move
    if moves:
        expect(meta, "theta_final", ())


# ---- what is estimated ---------------------------------------------------------------

TRUNCATION, HORIZON, SIGMA = 4, 12, 0.1
CENTERS = random_numbers(3, HORIZON, 2)
LOG_LR = torch.tensor([math.log(0.3)], dtype=torch.float64)


def smoothed_gradient():
    """Exact derivative of the mean loss of an unroll, averaged over perturbations.

    Each truncation has a perturbation of its own; Gauss-Hermite quadrature over all.
    """
    parts = HORIZON // TRUNCATION
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    grid = torch.tensor(list(itertools.product(nodes, repeat=parts)))
    weight = torch.tensor(list(itertools.product(weights, repeat=parts))).prod(1)

    def objective(meta):
        def mean_loss(eps):
            params, total = START, 0.0
            for t, center in enumerate(CENTERS):
                here = meta + SIGMA * eps[t // TRUNCATION]
                loss, params, _ = quadratic_step(here, params, {}, center)
                total = total + loss
            return total / HORIZON

        return (weight * torch.func.vmap(mean_loss)(grid)).sum() / weight.sum()

    return torch.func.grad(objective)(LOG_LR).item()


def estimates(pes, truncations):
    """One estimate of the gradient of the mean loss from each pair of one unroll."""

    def begin(pair, episode):
        return START, {}

    state, total = pes.start(LOG_LR, begin), 0.0
    for k in range(truncations):
        eps = pes.perturbations(LOG_LR, 0, k)
        part = CENTERS[k * pes.truncation : (k + 1) * pes.truncation]
        found, state = pes.estimate(
            over_pairs(quadratic_step), begin, LOG_LR, eps, state,
            part.expand(pes.pairs, *part.shape),
        )  # fmt: skip
        total = total + found.per_pair[:, 0] / truncations
    return total


def error_and_deviation(pes):
    """Distance of the mean from the exact value in standard errors, and these."""
    exact = smoothed_gradient()
    draws = estimates(pes, HORIZON // TRUNCATION)
    deviation = draws.std().item() / math.sqrt(len(draws))
    return (draws.mean().item() - exact) / deviation, deviation / abs(exact)


def test_pes_is_unbiased():
    error, deviation = error_and_deviation(PES(20_000, TRUNCATION, HORIZON, SIGMA))
    assert abs(error) < 3 and deviation < 0.03


def test_truncated_es_is_not():
    pes = PES(20_000, TRUNCATION, HORIZON, SIGMA, accumulate=False)
    error, deviation = error_and_deviation(pes)
    assert abs(error) > 5 and deviation < 0.03


def test_the_restarts_of_the_reference_code_cost_a_bias():
    """The last loss of an unroll is credited to the last perturbation alone."""
    pes = PES(20_000, TRUNCATION, HORIZON, SIGMA, "slot")
    error, deviation = error_and_deviation(pes)
    assert abs(error) > 5 and deviation < 0.03


def test_es_is_the_formula():
    """A whole unroll for each estimate, pair by pair in a plain loop, twice."""
    pes = es(3, HORIZON, SIGMA)

    def begin(pair, episode):
        return START + pair + 10 * episode, {}

    state = pes.start(LOG_LR, begin)
    for k in range(2):
        eps = pes.perturbations(LOG_LR, 5, k)
        found, state = pes.estimate(
            over_pairs(quadratic_step), begin, LOG_LR, eps, state,
            CENTERS.expand(3, HORIZON, 2),
        )  # fmt: skip
        for pair in range(3):
            means = []
            for sign in (1, -1):
                params, losses = begin(pair, k)[0], []
                for center in CENTERS:
                    loss, params, _ = quadratic_step(
                        LOG_LR + sign * eps[pair], params, {}, center
                    )
                    losses.append(loss)
                means.append(sum(losses) / HORIZON)
            slope = (means[0] - means[1]) * eps[pair] / (2 * SIGMA**2)
            assert torch.allclose(found.per_pair[pair], slope, rtol=1e-10)
        assert torch.allclose(found.gradient, found.per_pair.mean(0), rtol=1e-14)


# ---- restarts and perturbations ------------------------------------------------------


@pytest.mark.parametrize("resets", ["free", "slot"])
def test_pairs_restart_after_the_horizon(resets):
    """A rate of zero keeps parameters where they began: they name their episode."""
    pes = PES(3, 4, 6, SIGMA, resets)
    begun = []

    def begin(pair, episode):
        begun.append((pair, episode))
        return torch.full((2,), 10.0 * episode + pair).double(), {}

    def still(meta, params, state, batch):
        return params[0] + 0.0 * meta[0], params, state

    state = pes.start(LOG_LR, begin)
    state["steps"] = torch.tensor([0, 3, 5])
    shown, trained = [], []
    for k in range(5):
        eps = pes.perturbations(LOG_LR, 0, k)
        before = records.flatten(state)
        kept = {name: v.clone() for name, v in before.items()}
        found, state = pes.estimate(
            over_pairs(still), begin, LOG_LR, eps, state, torch.zeros(3, 4, 1)
        )
        assert all(torch.equal(before[name], kept[name]) for name in kept)
        assert torch.equal(found.losses[..., 0], found.losses[..., 1])
        shown.append(found.losses[..., 0])
        trained.append(found.trained)
    for pair, first in enumerate([0, 3, 5]):
        expected, count, episode = [], first, 0
        for _ in range(20):
            if count == 6:
                episode, count = episode + 1, 0
                if resets == "slot":
                    expected.append(None)
                    continue
            count += 1
            expected.append(10.0 * episode + pair)
        expected = (expected + [None] * 20)[:20]
        mask = [v is not None for v in expected]
        assert torch.cat(trained, 1)[pair].tolist() == mask
        assert torch.cat(shown, 1)[pair].tolist() == [v or 0.0 for v in expected]
    assert len(set(begun)) == len(begun)


def test_perturbations_depend_on_seed_and_iteration():
    pes, meta = PES(5, 10, 20), torch.zeros(7)
    first = pes.perturbations(meta, 0, 0)
    assert first.shape == (5, 7) and first.dtype == torch.float32
    assert torch.equal(first, pes.perturbations(meta, 0, 0))
    others = [pes.perturbations(meta, *k) for k in ((0, 1), (1, 0), (1, 1))]
    assert all(not torch.equal(first, other) for other in others)
    many = PES(1_000, 10, 20, 0.02).perturbations(meta, 0, 0)
    assert many.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(many.mean().item()) < 0.001


def test_an_offset_spreads_the_restarts():
    def begin(pair, episode):
        return torch.zeros(1), {}

    steps = PES(200, 10, 50, offset=50).start(torch.zeros(1), begin, 3)["steps"]
    assert steps.min() >= 0 and steps.max() < 50 and len(set(steps.tolist())) > 40
    assert not PES(200, 10, 50).start(torch.zeros(1), begin, 3)["steps"].any()
    for seed in range(20):  # few pairs, too: one in each quarter of the horizon
        four = PES(4, 50, 2_000, offset=2_000).start(torch.zeros(1), begin, seed)
        assert (four["steps"] // 500).tolist() == [0, 1, 2, 3]


def test_clipping():
    found = clipped(torch.tensor([0.5, -3.0, math.nan, math.inf, -math.inf]), 1.0)
    assert found.tolist() == [0.5, -1.0, 0.0, 0.0, 0.0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="must be at least 1, not 0 and 10"):
        PES(4, 0, 10)
    with pytest.raises(ValueError, match="must be at least 1, not 20 and 0"):
        BackPropagation(4, 20, 0)
    with pytest.raises(ValueError, match="needs unrolls, not 0"):
        BackPropagation(0)
    with pytest.raises(ValueError, match="at least 2, not 1: its first loss"):
        BackPropagation(4, 1, 10)
    with pytest.raises(ValueError, match="not 4 and 0"):
        PES(4, 5, 10, 0.0)
    with pytest.raises(ValueError, match="not 0 and 0.01"):
        PES(0, 5, 10)
    with pytest.raises(ValueError, match="^resets must be one of 'free', 'slot', not"):
        PES(4, 5, 10, resets="hard")
    with pytest.raises(ValueError, match="horizon, 10, not 11"):
        PES(4, 5, 10, offset=11)
    for wrong in {"group": 0}, {"clip": -1.0}, {"ceiling": -1.0}, {"ceiling": 0.0}:
        with pytest.raises(ValueError, match="clip and ceiling positive, not"):
            small(**wrong)
    with pytest.raises(ValueError, match="validate_every must be at least 1, not 0"):
        small(validate_every=0)
    with pytest.raises(ValueError, match="patience must be None"):
        small(patience=3)
    with pytest.raises(ValueError, match="whole groups of 4, not 6"):
        small(estimator=PES(6, 4, 9))
    with pytest.raises(ValueError, match="built for another optimizee"):
        Evolution(star(MLP((2, 4, 2)).layout), MLP((2, 5, 2)), "toy")
    with pytest.raises(ValueError, match="built for another optimizee"):
        MetaTraining(star(MLP((2, 4, 2)).layout), MLP((2, 5, 2)), "toy")


def test_learnable_sgd_is_sgd():
    params, grads = random_numbers(0, 4), [random_numbers(k, 4) for k in (1, 2, 3)]
    for momentum in (None, 0.8):
        ours, hand = LearnableSGD(0.2, momentum), SGD(constant(0.2), momentum or 0.0)
        meta = {k: v.double() for k, v in ours.init_meta(0).items()}
        state, other = ours.init(params), hand.init(params)
        for g in grads:
            delta, state = ours.update(meta, g, state, params)
            expected, other = hand.update({}, g, other, params)
            assert torch.allclose(delta, expected, rtol=1e-6)
        assert ours.flops(4) == 0
    with pytest.raises(ValueError, match="lr must be positive, not 0"):
        LearnableSGD(0.0)
    with pytest.raises(ValueError, match="momentum must be below 1, not 1"):
        LearnableSGD(0.1, 1.0)


# ---- the meta-training ---------------------------------------------------------------

NET = MLP((2, 4, 2))


def small(**changes) -> Evolution:
    base = Evolution(
        star(NET.layout, 1e-4),
        NET,
        "toy",
        batch=8,
        iterations=6,
        estimator=PES(3, 4, 9, 0.01, offset=9),
        meta_lr=1e-3,
        weight_decay=0.1,
        validate_every=2,
    )
    return replace(base, **changes)


def test_no_two_episodes_share_their_start(toy_data):
    job = EvolutionJob(small())
    starts = [job.begin(n, k)[0] for n, k in itertools.product(range(3), range(3))]
    assert len(torch.stack(starts).unique(dim=0)) == 9
    first, second = job.start()["pairs"]["params"].unbind(1)
    assert torch.equal(first, second) and torch.equal(first, torch.stack(starts[::3]))


@pytest.mark.parametrize("horizon", [9, 3])
def test_an_estimate_equals_a_plain_loop(toy_data, horizon):
    """Two truncations of every member alone, its own steps, sums and restarts.

    With a horizon of 3 a truncation of 4 steps restarts once or twice.
    """
    config = small(estimator=PES(3, 4, horizon, 0.01, offset=horizon))
    job = EvolutionJob(config)
    e, meta = config.estimator, job.layout.flatten(config.optimizer.init_meta(0))
    state = e.start(meta, job.begin, config.seed)
    counts = state["steps"].tolist()
    runs = {(n, s): job.begin(n, 0) for n, s in itertools.product(range(3), (1, -1))}
    noise = torch.zeros(3, len(meta))
    episodes = [0] * 3
    for k in range(2):
        eps = e.perturbations(meta, config.seed, k)
        batches = job.batches(k)
        found, state = e.estimate(job.step, job.begin, meta, eps, state, batches)
        expected = []
        for n in range(3):
            stream = train_indices(64, 8, 1_000_000 + n, 4 * k, 4)
            assert torch.equal(batches[n], stream)
            old, new, fresh = 0.0, 0.0, False
            for idx in stream:
                if counts[n] == horizon:
                    episodes[n], counts[n], fresh = episodes[n] + 1, 0, True
                    runs[n, 1] = runs[n, -1] = job.begin(n, episodes[n])
                counts[n] += 1
                losses = []
                for sign in (1, -1):
                    views = job.layout.views(meta + sign * eps[n])
                    params, inner, loss = inner_steps(
                        job.task,
                        config.optimizer.update,
                        views,
                        *runs[n, sign],
                        idx[None],
                    )
                    runs[n, sign] = params, inner
                    losses.append(loss[0].clamp(0, 1.5 * math.log(2)))
                difference = (losses[0] - losses[1]).item() / 4
                old, new = (old, new + difference) if fresh else (old + difference, new)
            noise[n] += eps[n]
            expected.append((old * noise[n] + new * eps[n]) / (2 * 0.01**2))
            if fresh:
                noise[n] = eps[n]
        assert torch.allclose(
            found.per_pair, torch.stack(expected), rtol=1e-3, atol=1e-4
        )
        assert torch.allclose(state["noise"], noise, atol=1e-8)
        for (n, sign), (params, inner) in runs.items():
            side = (1 - sign) // 2
            assert torch.allclose(state["params"][n, side], params, atol=1e-5)
            for key, value in inner.items():
                assert torch.allclose(
                    state["optimizer"][key][n, side], value, atol=1e-5
                )
    assert sum(episodes) > 0


@pytest.mark.parametrize(
    "estimator", [PES(2, 3, 6), BackPropagation(2, 3, 6)], ids=["PES", "backward"]
)
def test_what_is_traced_for_the_compiler_is_the_step(estimator, toy_data, monkeypatch):
    """Its derivative, too."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    net = MLP((2, 2))
    config = small(optimizer=star(net.layout), optimizee=net, estimator=estimator)
    jobs = [EvolutionJob(config, compile=compile) for compile in (False, True)]
    state = jobs[0].start()
    eps = estimator.perturbations(state["meta"], 0, 0)
    with torch.no_grad():
        plain, traced = (
            job.estimate(state["meta"], eps, state["pairs"], job.batches(0))[0]
            for job in jobs
        )
    assert plain.gradient.norm() > 0
    assert torch.allclose(traced.gradient, plain.gradient, rtol=1e-3)
    assert torch.allclose(traced.losses, plain.losses, rtol=1e-4)


def test_an_unroll_that_explodes_counts_as_zero():
    """The others of an estimate by back-propagation keep their share."""
    backward = BackPropagation(2, 2, 6)

    def step(meta, params, state, idx):
        return (meta * params).sum(), params, state

    def begin(pair, episode):
        return torch.tensor([math.inf if pair else 3.0]), {"x": torch.zeros(1)}

    meta = torch.tensor([2.0])
    state = backward.start(meta, begin)
    found, _ = backward.estimate(
        over_pairs(step), begin, meta, torch.zeros(2, 1), state, torch.zeros(2, 2, 1)
    )
    assert found.per_pair.tolist() == [[3.0], [0.0]]


def test_an_iteration_is_one_step_of_torch_adamw(toy_data):
    config = small(iterations=3, clip=0.02)
    job = EvolutionJob(config)
    state = job.start()
    leaf = state["meta"].clone().requires_grad_()
    adamw = torch.optim.AdamW([leaf], lr=1e-3, weight_decay=0.1)
    for k in range(3):
        eps = config.estimator.perturbations(leaf.detach(), 0, k)
        with torch.no_grad():
            found, _ = config.estimator.estimate(
                job.step, job.begin, leaf.detach(), eps, state["pairs"], job.batches(k)
            )
        leaf.grad = found.gradient.clamp(-0.02, 0.02)
        cut_off = (found.gradient.abs() > 0.02).double().mean().item()
        assert 0 < cut_off < 1
        adamw.step()
        state = job.advance(state)
        norm = found.gradient.norm().item()
        assert state["norm"][k].item() == pytest.approx(norm, rel=1e-3)
        assert state["clipped"][k].item() == pytest.approx(cut_off, abs=0.01)
        assert torch.allclose(state["meta"], leaf.detach(), atol=1e-6)
        assert state["training"][k].item() == pytest.approx(found.loss.item())
    arrays = job.finish(state)
    assert torch.equal(arrays["snapshots"][-1], state["meta"])
    assert len(arrays["gradient.norm"]) == len(arrays["gradient.clipped"]) == 3
    assert arrays["snapshot_rollouts"].tolist() == [0, 1, 2, 3]
    assert len(arrays["training"]) == 3 and len(arrays["validation"]) == 2


def test_entries_that_are_not_finite_count_as_clipped(toy_data, monkeypatch):
    """And one at the bound does not, which is left as it is."""
    job = EvolutionJob(small(clip=1.0))
    state = job.start()
    gradient = torch.zeros(1, len(state["meta"]))
    gradient[0, :6] = torch.tensor(
        [-1.0, -3.0, math.nan, math.nan, math.inf, -math.inf]
    )
    found = Estimate(gradient, torch.zeros(1, 4, 2), torch.ones(1, 4))
    monkeypatch.setattr(job, "estimate", lambda *_: (found, state["pairs"]))
    state = job.advance(state)
    assert state["clipped"][0].item() == pytest.approx(5 / gradient.numel())
    assert state["meta"].isfinite().all()


def test_the_result_is_the_last_and_its_curve_cuts_losses_off(toy_data):
    """Nothing is selected; the objective of a learning curve is the meta-training's."""
    config = small(ceiling=0.9, validation_seeds=2)  # ln 2 is 0.69, so 0.62 nat
    job = EvolutionJob(config)
    state = job.start()
    for _ in range(2):
        state = job.advance(state)
    state["best"] += 1.0
    arrays = job.finish(state)
    result = job.layout.flatten({k: arrays[f"meta.{k}"] for k in job.layout.shapes})
    assert torch.equal(result, state["meta"])
    seeds = (VALIDATION, VALIDATION + 1)
    curve = LearningCurve(
        config.optimizer, NET, "toy", {}, seeds, 8, config.rollout, ceiling=0.9
    )
    found, _ = drive(LearningCurveJob(curve, arrays))
    objective = found["objective"].double().mean(0)
    assert objective[-1].item() == pytest.approx(arrays["validation"][1].item())
    raw, _ = drive(LearningCurveJob(replace(curve, ceiling=None), arrays))
    assert (raw["objective"] > found["objective"]).all()


@pytest.mark.parametrize("resets", ["free", "slot"])
def test_a_resumed_meta_training_is_bit_identical(toy_data, tmp_path, resets):
    config = small(estimator=PES(3, 4, 9, 0.01, resets, 9))
    whole = expect_resumable(config, tmp_path / "checkpoint")
    other, _ = drive(EvolutionJob(replace(config, seed=1)))
    assert not torch.equal(other["training"], whole["training"])


RANK = """
import sys
import torch.distributed as dist
from test_evolution import distributed
from l2olib import records
from l2olib.train import drive, repeatable
repeatable()
config = distributed()
arrays, _ = drive(config.job("cpu", False, {}))
print(records.digest(records.spec(config), arrays))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def distributed() -> Evolution:
    return small(data="moons", estimator=PES(4, 4, 9, 0.01, offset=9), group=1)


def two_ranks(script: str, **more: str) -> list[str] | None:
    """What each of two processes prints, started as by torchrun; None if they hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        there = {
            "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
            "PYTHONPATH": f"{SRC}{os.pathsep}{Path(__file__).parent}",
        }  # fmt: skip
        environment = os.environ | {k: str(v) for k, v in there.items()} | more
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        return [process.communicate(timeout=120)[0].strip() for process in running]
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_ranks_share_the_pairs_and_change_nothing():
    """Two processes, as torchrun starts them, against one."""
    config = distributed()
    arrays, _ = drive(EvolutionJob(config))
    alone = records.digest(records.spec(config), arrays)
    # Between being found and used, a free port can be taken by another process.
    assert (two_ranks(RANK) or two_ranks(RANK)) == [alone, alone]


COMMAND = """
import os, sys
import torch.distributed as dist
from problems import Clock
from test_evolution import distributed
from l2olib import experiments, train
from l2olib.__main__ import main
experiments.EXPERIMENTS["toy.ranks"] = experiments.Experiment(
    "toy.ranks", "A toy", "x", lambda profile: [("toy/0", distributed())]
)

# A limit of 4 s is reached after a few pieces; by the second rank's clock, at once.
real, train.time = train.time, Clock(1e9 * int(os.environ["RANK"]))
assert main(["run", "toy.ranks", "--time-limit", "4s"]) == 0
train.time = real
assert main(["run", "toy.ranks"]) == 0
dist.destroy_process_group()
"""


def test_ranks_stop_together_and_the_first_writes(tmp_path):
    """Two processes on one experiment, by the command line: stopped, and gone on."""
    there = {"L2OLIB_ROOT": str(tmp_path), "L2OLIB_DATA": str(tmp_path / "raw")}
    found = two_ranks(COMMAND, **there) or two_ranks(COMMAND, **there)
    assert found is not None
    first, second = found
    lines = first.splitlines()
    assert second == ""
    assert lines[0] == lines[2] == "toy.ranks toy/0 (laptop)"
    assert "by the time limit; run the same command again to go on" in lines[1]
    record = Record.load(tmp_path / "data" / "optimizers" / "toy" / "0.safetensors.gz")
    arrays, _ = drive(EvolutionJob(distributed()))
    assert torch.equal(record.arrays["training"], arrays["training"])
    assert record.digest.startswith(lines[3].split()[0])
    assert not list(tmp_path.rglob("*.checkpoint"))


def test_back_propagation_is_the_slope_of_a_truncation(toy_data):
    """Against central differences in double precision, through gradients and state;
    one unroll restarts within the truncation, at whose start nothing is credited."""
    smooth = MLP((2, 4, 2), "tanh")
    config = small(
        optimizer=replace(star(smooth.layout, 1e-3), precondition=False),
        optimizee=smooth,
        estimator=BackPropagation(2, 4, 10),
        ceiling=None,
    )
    job, e = EvolutionJob(config), config.estimator

    def begin(pair, episode):
        params = job.begin(pair, episode)[0].double()
        return params, config.optimizer.init(params)

    meta = job.layout.flatten(config.optimizer.init_meta(0)).double()
    eps = e.perturbations(meta, 0, 0)
    state = e.start(meta, begin)
    _, state = e.estimate(job.step, begin, meta, eps, state, job.batches(0))
    assert not state["params"].requires_grad and not eps.any()
    state["steps"] = torch.tensor([4, 8])
    found, after = e.estimate(job.step, begin, meta, eps, state, job.batches(1))
    assert after["episodes"].tolist() == [0, 1] and after["steps"].tolist() == [8, 2]

    def loss(where):
        with torch.no_grad():
            metas = where.expand(2, 1, -1)
            return e.unroll(job.step, begin, metas, state, job.batches(1))[0].mean()

    gen = torch.Generator().manual_seed(0)
    for _ in range(3):
        v = torch.randn(len(meta), generator=gen, dtype=torch.float64)
        slope = (loss(meta + 1e-5 * v) - loss(meta - 1e-5 * v)) / 2e-5
        assert (found.gradient @ v).item() == pytest.approx(slope.item(), rel=1e-5)
    assert found.loss.item() == pytest.approx(loss(meta).item(), rel=1e-12)


def test_back_propagation_meta_trains_and_resumes(toy_data, tmp_path, monkeypatch):
    config = Evolution(
        LearnableSGD(0.01), NET, "toy", batch=8, iterations=60,
        estimator=BackPropagation(4, 10, 40, offset=40), meta_lr=0.1, validate_every=20,
    )  # fmt: skip
    arrays, _ = drive(config.job("cpu", False, {}))
    assert arrays["validation"].min() < arrays["validation"][0] - 0.05
    path = tmp_path / "x.checkpoint"
    monkeypatch.setattr(train, "time", Clock())
    with pytest.raises(Unfinished, match="^stopped at [1-9]"):
        drive(config.job("cpu", False, {}), checkpoint=path, key="k", time_limit=9.0)
    resumed, _ = drive(config.job("cpu", False, {}), checkpoint=path, key="k")
    assert all(torch.equal(arrays[k], resumed[k]) for k in arrays)


def test_the_estimators_compared_on_digits_cost_alike():
    """Matrix products counted as they are made, the backward pass included."""
    spent = {}
    for name in ("PES", "back-propagation"):
        e = replace(ESTIMATORS[name], truncation=20)
        changes = {"data": "digits", "batch": 32, "estimator": e}
        job = EvolutionJob(star_training("laptop", "Blackbox", **changes))
        meta = job.layout.flatten(job.config.optimizer.init_meta(0))
        state, eps = e.start(meta, job.begin), e.perturbations(meta, 0, 0)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            e.estimate(job.step, job.begin, meta, eps, state, job.batches(0))
        spent[name] = counter.get_total_flops()
    assert spent["back-propagation"] == pytest.approx(spent["PES"], rel=0.05)


def test_without_weights_every_seed_draws_an_optimizer(toy_data):
    """Seed by seed the curve is that of its own random meta-parameters."""
    optimizer = star(NET.layout)
    curve = LearningCurve(optimizer, NET, "toy", {}, (3, 5), 8, 6)
    found, _ = drive(curve.job("cpu", False, {}))
    assert set(found) == {"rollouts", "objective", "last"}
    assert found["rollouts"].tolist() == [0] and found["objective"].shape == (2, 1)
    task = EvolutionJob(small()).task
    for j, seed in enumerate((3, 5)):
        params = NET.init(seed)
        state, losses = optimizer.init(params), []
        for idx in train_indices(64, 8, seed, 0, 6):
            meta = optimizer.init_meta(TRAINING + seed)  # not the network's stream
            params, state, loss = inner_steps(
                task, optimizer.update, meta, params, state, idx[None]
            )
            losses.append(loss.item())
        assert found["objective"][j].item() == pytest.approx(sum(losses) / 6, rel=1e-5)
        assert found["last"][j].item() == pytest.approx(losses[-1], rel=1e-5)


def test_groups_of_pairs_agree(toy_data):
    """Not to the bit: products of other sizes sum in another order."""
    runs = [
        drive(EvolutionJob(small(estimator=PES(6, 4, 9), group=k)))[0] for k in (2, 6)
    ]
    for name in ("training", "validation", "snapshots"):
        assert torch.allclose(runs[0][name], runs[1][name], atol=1e-4)


def test_losses_are_cut_off(toy_data):
    """A diverging optimizer costs the ceiling, not a NaN, and so does NaN itself."""
    top = 1.5 * math.log(2)
    job = EvolutionJob(small())
    losses = torch.tensor([0.3, 5.0, math.inf, math.nan])
    assert job.meta_loss(losses).tolist() == pytest.approx([0.3, top, top, top])
    free = EvolutionJob(small(ceiling=None))
    assert free.meta_loss(losses)[1] == 5.0
    wild = replace(small(), optimizer=LearnableSGD(1e30), iterations=3)
    arrays, _ = drive(EvolutionJob(wild))
    assert arrays["training"].isfinite().all() and arrays["validation"].isfinite().all()
    assert arrays["training"].max() <= top * (1 + 1e-6)
    assert arrays["meta.log_lr"].isfinite().all()


def test_pes_finds_a_better_learning_rate(toy_data):
    config = Evolution(
        LearnableSGD(0.01), NET, "toy", batch=8, iterations=60,
        estimator=PES(8, 10, 40, 0.1), meta_lr=0.1, validate_every=20,
    )  # fmt: skip
    arrays, _ = drive(config.job("cpu", False, {}))
    assert arrays["validation"].min() < arrays["validation"][0] - 0.05
    assert arrays["meta.log_lr"].item() > math.log(0.03)


def test_the_cost_of_a_meta_training_grows_with_its_pairs():
    few, many = (small(estimator=PES(n, 4, 8)).seconds() for n in (1, 12))
    assert 0 < few < many < 12 * few
