"""Truncated meta-training: meta-gradients, the carried state, selection, resuming."""

import math
from dataclasses import replace

import pytest
import torch
from problems import batches, blobs, expect_resumable, make_toy_data, start_of  # noqa: F401

from l2olib.data import DataError, train_indices
from l2olib.learned.lstm import LSTMOptimizer
from l2olib.metatrain import truncated
from l2olib.metatrain.truncated import (
    LearningCurve,
    LearningCurveJob,
    MetaTraining,
    MetaTrainingJob,
    meta_gradient,
)
from l2olib.optimizees import MLP
from l2olib.train import drive, inner_steps

LSTM = LSTMOptimizer(hidden=3, p=5.0, scale=0.5)
STEPS = 6


def setting(seed=0):
    """A task, float64 meta-parameters, and a state in the middle of a rollout."""
    task = blobs()
    meta = {k: v.double() for k, v in LSTM.init_meta(seed).items()}
    params = start_of(task)
    with torch.no_grad():
        params, state, _ = inner_steps(
            task, LSTM.update, meta, params, LSTM.init(params), batches(task, 3, 8, 9)
        )
    return task, meta, params, state, batches(task, STEPS, 8)


def objective_with_fixed_gradients(task, meta, params, state, idx, recorded, losses):
    """The unroll whose inner gradients are the recorded ones, to first order in x.

    The loss at step i is replaced by its tangent at the recorded iterate.
    """
    total, x = 0.0, params
    for g, (f, anchor) in zip(recorded, losses, strict=True):
        total = total + f + g @ (x - anchor)
        step, state = LSTM.update(meta, g, state, x)
        x = x + step
    return total


@pytest.mark.parametrize("order", ["first", "full"])
def test_meta_gradient_equals_finite_differences(order):
    task, meta, params, state, idx = setting()
    grads, losses, *_ = meta_gradient(
        task, LSTM.update, meta, params, state, idx, order
    )

    recorded, anchors, x, h = [], [], params, state
    for batch in idx:
        f, g = task.loss_and_grad(x, batch)
        recorded.append(g)
        anchors.append((f, x))
        step, h = LSTM.update(meta, g, h, x)
        x = x + step
    assert torch.allclose(losses, torch.stack([f for f, _ in anchors]), rtol=1e-13)

    def objective(m):
        if order == "full":
            return inner_steps(task, LSTM.update, m, params, state, idx)[2].sum()
        return objective_with_fixed_gradients(
            task, m, params, state, idx, recorded, anchors
        )

    eps = 1e-6
    for name in meta:
        for k in range(0, meta[name].numel(), max(1, meta[name].numel() // 3)):
            sides = []
            for sign in (1, -1):
                moved = meta[name].clone()
                moved.view(-1)[k] += sign * eps
                sides.append(objective(meta | {name: moved}))
            slope = ((sides[0] - sides[1]) / (2 * eps)).item()
            assert grads[name].view(-1)[k].item() == pytest.approx(
                slope, rel=1e-5, abs=1e-8
            ), name


def test_the_two_orders_differ():
    """Else the test above could not tell one from the other."""
    task, meta, params, state, idx = setting()
    first, full = (
        meta_gradient(task, LSTM.update, meta, params, state, idx, order)[0]
        for order in ("first", "full")
    )
    gap = max((first[k] - full[k]).abs().max() for k in first)
    assert gap > 1e-3 * max(v.abs().max() for v in full.values())


@pytest.mark.parametrize("order", ["first", "full"])
def test_unroll_takes_the_optimizers_steps(order):
    task, meta, params, state, idx = setting()
    ended, final, losses = inner_steps(
        task, LSTM.update, meta, params, state, idx, order=order
    )
    x = params
    for k, batch in enumerate(idx):
        f, g = task.loss_and_grad(x, batch)
        assert losses[k].item() == pytest.approx(f.item(), rel=1e-13)
        step, state = LSTM.update(meta, g, state, x)
        x = x + step
    assert torch.allclose(ended, x, rtol=1e-13)
    assert all(torch.allclose(final[k], state[k], rtol=1e-13) for k in state)


def test_history_ends_at_a_truncation():
    task, meta, params, state, idx = setting()
    for _ in range(2):
        _, losses, params, state = meta_gradient(
            task, LSTM.update, meta, params, state, idx, "full"
        )
        for value in (losses, params, *state.values()):
            assert value.grad_fn is None and not value.requires_grad


# ---- the job -------------------------------------------------------------------------


def small(**changes) -> MetaTraining:
    base = MetaTraining(LSTM, MLP((2, 4, 2)), "toy", 8, 6, 6, 3, 1e-2, validate_every=2)
    return replace(base, **changes)


@pytest.mark.parametrize("order", ["first", "full"])
def test_equals_a_plain_loop_with_torch_adam(toy_data, order):
    """Two rollouts again, with torch.optim.Adam and an unroll by torch.autograd."""
    config = small(rollouts=2, order=order, validate_every=1, meta_lr=3e-3)
    job = MetaTrainingJob(config)
    arrays, _ = drive(job)
    leaves = {k: v.clone().requires_grad_() for k, v in LSTM.init_meta(0).items()}
    adam = torch.optim.Adam(leaves.values(), lr=3e-3)
    for rollout in range(2):
        seed = 1_000_000 + rollout
        x = config.optimizee.init(seed).requires_grad_()
        h = LSTM.init(x)
        idx = train_indices(64, 8, 1_000_000, 6 * rollout, 6)
        seen = []
        for part in idx.split(3):
            total = 0.0
            for batch in part:
                loss = job.task.loss(x, batch)
                seen.append(loss.item())
                total = total + loss
                (g,) = torch.autograd.grad(
                    loss, x, create_graph=order == "full", retain_graph=True
                )
                step, h = LSTM.update(leaves, g, h, x)
                x = x + step
            adam.zero_grad()
            total.backward()
            adam.step()
            x = x.detach().requires_grad_()
            h = {k: v.detach() for k, v in h.items()}
        expected = sum(seen) / len(seen)
        assert arrays["training"][rollout].item() == pytest.approx(expected, rel=1e-5)
    final = job.layout.flatten(leaves)
    assert torch.allclose(arrays["snapshots"][-1], final, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("order", ["first", "full"])
def test_what_is_traced_for_the_compiler_is_the_update(toy_data, monkeypatch, order):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    config = small(order=order)
    plain, traced = (
        drive(MetaTrainingJob(config, compile=compile))[0] for compile in (False, True)
    )
    torch.testing.assert_close(traced, plain)


def test_a_gradient_that_is_not_finite_is_not_taken(toy_data, monkeypatch):
    """One of six, in the second rollout: before and after it Adam moves them."""
    real, calls = truncated.meta_gradient, []

    def sometimes(*args):
        grads, *rest = real(*args)
        calls.append(1)
        if len(calls) == 3:
            grads = {k: v * torch.inf for k, v in grads.items()}
        return grads, *rest

    monkeypatch.setattr(truncated, "meta_gradient", sometimes)
    arrays, _ = drive(MetaTrainingJob(small(rollouts=3)))
    assert arrays["snapshots"].isfinite().all() and len(calls) == 6
    first, *later = arrays["snapshots"]
    assert later and not any(torch.equal(first, other) for other in later)
    assert not torch.equal(later[0], later[-1])


def test_the_lowest_validation_value_is_selected(toy_data, monkeypatch):
    values = iter([3.0, 2.0, math.inf, 1.0, 1.0, 1.5, 2.5])
    config = small(validate_every=1)
    monkeypatch.setattr(
        MetaTrainingJob,
        "validate",
        lambda self, meta: torch.tensor(next(values), dtype=torch.float64),
    )
    job = MetaTrainingJob(config)
    state, after = job.start(), []
    while job.position(state)[0] < config.rollouts:
        after.append(state["meta"])
        state = job.advance(state)
    # 1.0 came first after rollout 3; the equal value after rollout 4 does not count.
    assert torch.equal(state["best"], after[3])
    arrays = job.finish(state)
    assert arrays["validation"].tolist() == [3.0, 2.0, math.inf, 1.0, 1.0, 1.5, 2.5]
    best = job.layout.flatten({k: arrays[f"meta.{k}"] for k in job.layout.shapes})
    assert torch.equal(best, after[3])


def test_a_meta_training_ends_when_its_patience_does(toy_data, monkeypatch):
    """The best value comes after rollout 3; two rollouts later it is over."""
    values = iter([3.0, 2.0, math.inf, 1.0, 1.0, 1.5, 0.5])
    monkeypatch.setattr(
        MetaTrainingJob,
        "validate",
        lambda self, meta: torch.tensor(next(values), dtype=torch.float64),
    )
    arrays, _ = drive(MetaTrainingJob(small(validate_every=1, patience=2)))
    assert arrays["validation"].tolist() == [3.0, 2.0, math.inf, 1.0, 1.0, 1.5]
    assert len(arrays["training"]) == 5 and arrays["training"].isfinite().all()
    assert arrays["snapshot_rollouts"].tolist() == [0, 1, 2, 3, 4]
    at = arrays["snapshot_rollouts"].tolist().index(3)
    views = MetaTrainingJob(small()).layout.views(arrays["snapshots"][at])
    assert all(torch.equal(arrays[f"meta.{k}"], v) for k, v in views.items())


def test_validation_is_the_mean_loss_of_its_own_rollouts(toy_data):
    job = MetaTrainingJob(small(validation_seeds=2))
    meta = job.layout.flatten(LSTM.init_meta(4))
    total = 0.0
    for seed in (900_000, 900_001):
        x = job.config.optimizee.init(seed)
        idx = train_indices(64, 8, seed, 0, 6)
        h = LSTM.init(x)
        *_, losses = inner_steps(job.task, LSTM.update, LSTM.init_meta(4), x, h, idx)
        total += losses.double().mean().item()
    assert job.validate(meta).item() == pytest.approx(total / 2, rel=1e-6)
    assert job.validate(meta * math.nan).item() == math.inf


def test_snapshots_are_the_meta_parameters_at_their_rollouts(toy_data):
    config = small()
    assert config.snapshots() == [0, 1, 2, 3, 4, 6]
    job = MetaTrainingJob(config)
    state, seen = job.start(), {}
    while True:
        seen[int(state["rollouts"])] = state["meta"].clone()
        if int(state["rollouts"]) == config.rollouts:
            break
        state = job.advance(state)
    arrays = job.finish(state)
    for k, count in enumerate(arrays["snapshot_rollouts"].tolist()):
        assert torch.equal(arrays["snapshots"][k], seen[count])


def test_a_resumed_meta_training_is_bit_identical(toy_data, tmp_path):
    expect_resumable(small(), tmp_path / "checkpoint")


def test_meta_training_lowers_the_validation_loss(toy_data):
    config = small(rollouts=40, rollout=12, meta_lr=1e-2, validate_every=10)
    arrays, _ = drive(MetaTrainingJob(config))
    assert arrays["validation"].min() < arrays["validation"][0] - 0.1


def test_impossible_meta_trainings_are_refused():
    with pytest.raises(ValueError, match="order must be one of 'first', 'full', not"):
        small(order="second")
    with pytest.raises(ValueError, match="multiple of truncation, not 7 and 3"):
        small(rollout=7)
    with pytest.raises(ValueError, match="positive multiple of truncation, not 0"):
        small(rollout=0)
    with pytest.raises(ValueError, match="at least 2, not 0: its first loss"):
        small(truncation=0)
    with pytest.raises(ValueError, match="at least 2, not 1: its first loss"):
        small(truncation=1)
    for name, low in (("validate_every", 1), ("validation_seeds", 1), ("seed", 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least {low}, not -1"):
            small(**{name: -1})
    for rate in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"meta_lr must be positive, not {rate}"):
            small(meta_lr=rate)
    with pytest.raises(ValueError, match="patience must be None or at least 1, not -1"):
        small(patience=-1)


def test_a_batch_larger_than_the_data_is_refused(toy_data):
    with pytest.raises(DataError, match="65 does not fit into 64"):
        drive(MetaTrainingJob(small(batch=65)))


# ---- learning curves -----------------------------------------------------------------


def test_learning_curve_evaluates_snapshots_and_the_selected_one(toy_data):
    trained, _ = drive(MetaTrainingJob(small()))
    config = LearningCurve(
        LSTM, MLP((2, 5, 2), "tanh"), "toy", {"optimizer": "x"}, (0, 3), 8, 4
    )
    job = LearningCurveJob(config, trained)
    arrays, _ = drive(job)
    assert torch.equal(arrays["rollouts"], trained["snapshot_rollouts"])
    best = {k: trained[f"meta.{k}"] for k in job.layout.shapes}
    points = [*trained["snapshots"], job.layout.flatten(best)]
    found = {
        name: torch.cat([arrays[name], arrays[f"selected.{name}"][:, None]], 1)
        for name in ("objective", "last")
    }
    for k, snapshot in enumerate(points):
        for j, seed in enumerate(config.seeds):
            x = config.optimizee.init(seed)
            *_, losses = inner_steps(
                job.task,
                LSTM.update,
                job.layout.views(snapshot),
                x,
                LSTM.init(x),
                train_indices(64, 8, seed, 0, 4),
            )
            mean, last = losses.mean().item(), losses[-1].item()
            assert found["objective"][j, k].item() == pytest.approx(mean, rel=1e-6)
            assert found["last"][j, k].item() == pytest.approx(last, rel=1e-6)
