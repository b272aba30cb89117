"""GL2O: its theory where it holds, its rules by hand, and bad proposals."""

import math
from dataclasses import replace

import pytest
import torch
from problems import PATHOLOGICAL, Step, make_toy_data, quadratic  # noqa: F401

from l2olib.data import load
from l2olib.guards import GL2O, ArithmeticAverage, Geometric, MovingAverage, RecentMax
from l2olib.optimizees import MLP, Task
from l2olib.optimizers import SGD, PowerDecay, constant

RULES = [
    Geometric(0.1),
    MovingAverage(0.9),
    MovingAverage(1.0),
    MovingAverage(0.1),
    ArithmeticAverage(),
    RecentMax(3),
]
METAS = {"proposal": {}, "fallback": {}}


def run(guard, task, start, steps):
    """Return the final state and the trace on the deterministic problem."""
    idx = torch.zeros(steps, 1, dtype=torch.int64)
    return guard.segment(task, METAS, guard.init(start), idx, None)


@pytest.mark.parametrize("rule", [MovingAverage(0.9), RecentMax(3)], ids=str)
def test_residual_goes_to_zero_whatever_is_proposed(rule):
    """On a strongly convex quadratic the guarded residual vanishes (Heaton et al.).

    Only slowly: each acceptance need lower the bar by 1% and no more. Random proposals
    are left out: one may pass the bar in the last steps by chance.
    """
    task = quadratic([1.0, 0.3], [1.0, -2.0])
    start = task.optimizee.init(0).double()
    for name, proposal in PATHOLOGICAL.items():
        if name == "random":
            continue
        state, _ = run(GL2O(proposal, SGD(constant(1.5)), rule), task, start, 600)
        _, grad = task.loss_and_grad(state["params"], torch.zeros(1, dtype=torch.int64))
        assert grad.norm() < 1e-6, name


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_bar_never_rises_and_accepted_residuals_are_below_it(rule):
    task = quadratic([1.0, 0.5], [4.0, 1.0])
    start = task.optimizee.init(0).double()
    good = SGD(constant(1.2))  # a proposal worth accepting
    _, trace = run(GL2O(good, SGD(constant(0.5)), rule), task, start, 40)
    use, bar, residual = trace["use_l2o"], trace["bar"], trace["residual"]
    assert use.any()
    assert (bar.diff() <= 0).all()
    assert (residual[use] < 0.99 * bar[use]).all()
    assert (residual[~use] >= 0.99 * bar[~use]).all()
    assert (bar.diff()[~use[:-1]] == 0).all()  # only acceptances move it
    assert bar[0] == pytest.approx(0.5 * torch.tensor([4.0, 0.5]).norm().item())


def test_rules_by_hand():
    """Two acceptances with residuals 1/2 and 1/4, from a bar of 1."""
    residuals = [torch.tensor(0.5), torch.tensor(0.25)]
    expected = {
        Geometric(0.1): [0.9, 0.81],
        MovingAverage(0.9): [0.55, 0.28],
        MovingAverage(1.0): [0.5, 0.25],
        ArithmeticAverage(): [0.75, (0.5 + 0.25 + 1) / 3],
        RecentMax(1): [0.5, 0.25],
        RecentMax(2): [1.0, 0.5],
    }
    for rule, bars in expected.items():
        state = rule.init(torch.tensor(1.0))
        for residual, bar in zip(residuals, bars, strict=True):
            state = rule.accept(state, residual)
            assert state["bar"].item() == pytest.approx(bar), rule


def test_rejection_steps_from_the_current_point():
    task = quadratic([1.0], [2.0])
    start = task.optimizee.init(0).double()
    state, trace = run(GL2O(Step(100.0), SGD(constant(0.5))), task, start, 3)
    assert not trace["use_l2o"].any()
    assert state["params"].item() == 2.0 * 0.5**3
    assert state["fallback"]["step"] == 3


def test_residual_with_and_without_the_learning_rate():
    task = quadratic([2.0], [3.0])
    start = task.optimizee.init(0).double()
    late = SGD(PowerDecay(0.2, 1.0, 1.0))  # 0.1 at the first step
    for scaled, rate in [(True, 0.1), (False, 1.0)]:
        _, trace = run(GL2O(Step(-0.5), late, scaled=scaled), task, start, 1)
        assert trace["residual"].item() == pytest.approx(rate * 2 * 2.5)
        assert trace["bar"].item() == pytest.approx(rate * 2 * 3)


def test_a_fresh_residual_is_taken_on_another_batch(toy_data):
    """At the proposal, by the fallback's gradient on the validation batch."""
    task = Task(MLP((2, 3, 2)), load("toy"))
    guard = GL2O(Step(0.1), SGD(constant(0.1)), fresh=True)
    assert guard.batches == (1, "disjoint")
    start = task.optimizee.init(0)
    train, valid = torch.arange(8)[None], torch.arange(8, 16)[None, None]
    _, trace = guard.segment(task, METAS, guard.init(start), train, valid)
    _, gradient = task.loss_and_grad(start + 0.1, valid[0, 0])
    assert trace["residual"].item() == pytest.approx(0.1 * gradient.norm().item())
    for wrong in (None, valid[:, :0]):
        with pytest.raises(
            ValueError, match=r"fresh=True takes .* \(1, 1\) \(steps, 1"
        ):
            guard.segment(task, METAS, guard.init(start), train, wrong)
    with pytest.raises(ValueError, match="fresh=False takes validation batches None"):
        replace(guard, fresh=False).segment(
            task, METAS, guard.init(start), train, valid
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GL2O(Step(0.0), Step(0.0), alpha=1.0), "alpha must lie"),
        (lambda: GL2O(Step(0.0), Step(0.0), alpha=math.nan), "alpha must lie"),
        (lambda: GL2O(Step(0.0), Step(0.0), sequence="EMA"), "sequence must be"),
        (lambda: GL2O(Step(0.0), Step(0.0), proposal_state="keep"), "proposal_state"),
        (lambda: Geometric(0.0), "theta must lie"),
        (lambda: MovingAverage(1.5), "theta must lie"),
        (lambda: RecentMax(0), "m must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
