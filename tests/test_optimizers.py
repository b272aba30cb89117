"""Hand-crafted optimizers against torch.optim, and the schedule's exact values."""

import itertools
import math
from functools import partial

import pytest
import torch
from problems import batches, blobs, start_of

from l2olib.learned.lstm import LSTMOptimizer
from l2olib.optimizers import (
    SGD,
    Adam,
    AdamW,
    CosineDecay,
    Held,
    NAdamW,
    PowerDecay,
    StoppedClock,
    constant,
)

STEPS = 12


def ours(optimizer, task, idx):
    """Return the iterates [STEPS, n] of an optimizer on its own."""
    params, found = start_of(task), []
    state = optimizer.init(params)
    for batch in idx:
        loss, grad = task.loss_and_grad(params, batch)
        delta, state = optimizer.update({}, grad, state, params, loss=loss)
        params = params + delta
        found.append(params)
    return torch.stack(found), state


def theirs(make, rate, task, idx):
    """Return the iterates of a torch.optim optimizer whose rate is set each step."""
    params, found = start_of(task).requires_grad_(), []
    optimizer = make([params])
    for t, batch in enumerate(idx, start=1):
        optimizer.param_groups[0]["lr"] = rate(t)
        optimizer.zero_grad()
        task.loss(params, batch).backward()
        optimizer.step()
        found.append(params.detach().clone())
    return torch.stack(found)


def schedule(lr0, tau, power):
    """Write the formula of LGL2O, Algorithm 2, in plain numbers; t starts at 1."""
    return lambda t: lr0 / (t / tau + 1) ** power


SCHEDULES = [(0.3, 1.0, 0.0), (1.5, 4.0, 1.5), (0.5, 50_000.0, 1.5)]


@pytest.mark.parametrize(
    ("momentum", "numbers"), list(itertools.product([0.0, 0.5, 0.9], SCHEDULES))
)
def test_sgd_equals_torch(momentum, numbers):
    task = blobs()
    idx = batches(task, STEPS, 8)
    found, state = ours(SGD(PowerDecay(*numbers), momentum), task, idx)
    expected = theirs(
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=momentum),
        schedule(*numbers),
        task,
        idx,
    )
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert state["step"].item() == STEPS


@pytest.mark.parametrize(
    ("betas", "eps", "numbers"),
    list(itertools.product([(0.9, 0.999), (0.0, 0.5)], [1e-8, 1e-3], SCHEDULES)),
)
def test_adam_equals_torch(betas, eps, numbers):
    task = blobs()
    idx = batches(task, STEPS, 8)
    found, state = ours(Adam(PowerDecay(*numbers), *betas, eps), task, idx)
    expected = theirs(
        lambda p: torch.optim.Adam(p, lr=1.0, betas=betas, eps=eps, foreach=False),
        schedule(*numbers),
        task,
        idx,
    )
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-13)
    assert state["step"].item() == state["count"].item() == STEPS


@pytest.mark.parametrize("t", [1, 2, 7, 50_000, 10**6])
def test_power_decay_is_the_formula(t):
    rate = PowerDecay(3.0)(torch.tensor(t), torch.float64).item()
    assert rate == pytest.approx(3.0 / (t / 50_000 + 1) ** 1.5, rel=1e-15)


def test_power_decay_at_chosen_points():
    at = PowerDecay(3.0, tau=4.0, power=0.5)
    # (t / 4 + 1) is 4 at t = 12 and 9 at t = 32: exact square roots.
    assert at(torch.tensor(12), torch.float64).item() == 1.5
    assert at(torch.tensor(32), torch.float64).item() == 1.0
    assert constant(0.7)(torch.tensor(10**6), torch.float64).item() == 0.7
    with pytest.raises(ValueError, match="^tau must be positive, not 0"):
        PowerDecay(3.0, tau=0.0)
    for rate in (-1.0, math.nan):
        with pytest.raises(ValueError, match="^lr0 must be at least 0"):
            constant(rate)
        with pytest.raises(ValueError, match="^lr0 must be at least 0"):
            CosineDecay(rate, 10)
    with pytest.raises(ValueError, match=r"^lr must be a schedule, such as constant"):
        SGD(0.1)


def test_the_clock_starts_at_one():
    """The first step uses lr(1), not lr(0)."""
    optimizer = SGD(PowerDecay(1.0, tau=1.0, power=1.0))
    x = torch.zeros(2, dtype=torch.float64)
    delta, _ = optimizer.update({}, torch.ones_like(x), optimizer.init(x), x)
    assert delta.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("kind", [Adam, AdamW, partial(NAdamW, nesterov=False)])
def test_adam_with_two_clocks(kind):
    """`step` is the schedule's clock alone, `count` the bias correction's alone."""
    optimizer = kind(PowerDecay(1.0, tau=1.0, power=1.0), beta1=0.5, beta2=0.5, eps=0.0)
    x = torch.zeros(1, dtype=torch.float64)
    state = optimizer.init(x) | {"step": torch.tensor(3)}
    delta, state = optimizer.update({}, torch.ones_like(x), state, x)
    # Bias correction at count 1 makes the direction exactly 1; the rate is lr(4).
    assert delta.item() == pytest.approx(-1 / 5, rel=1e-15)
    assert (state["step"].item(), state["count"].item()) == (4, 1)


@pytest.mark.parametrize("optimizer", [SGD(constant(0.1), 0.9), Adam(constant(0.1))])
def test_updates_are_pure(optimizer):
    x = torch.ones(3, dtype=torch.float64)
    state = optimizer.init(x)
    before = {k: v.clone() for k, v in state.items()}
    first, _ = optimizer.update({}, x, state, x)
    second, _ = optimizer.update({}, x, state, x)
    assert torch.equal(first, second)
    assert all(torch.equal(state[k], before[k]) for k in before)


def test_one_replica_is_enough_code():
    """The same code under vmap gives each replica its own clock and result."""
    optimizer = Adam(PowerDecay(0.1, tau=2.0))
    grads = torch.tensor([[1.0, -2.0], [0.5, math.pi]], dtype=torch.float64)
    params = torch.zeros_like(grads)
    state = torch.func.vmap(optimizer.init)(params)
    state["step"] = torch.tensor([0, 9])

    def update(grad, state, params):
        return optimizer.update({}, grad, state, params)

    deltas, _ = torch.func.vmap(update)(grads, state, params)
    for k in range(2):
        alone, _ = update(grads[k], {n: v[k] for n, v in state.items()}, params[k])
        assert torch.allclose(deltas[k], alone, rtol=1e-14)


# ---- holding what no gradient reaches ------------------------------------------------


def test_a_weight_is_held_while_it_has_no_gradient():
    """Momentum moves it on after its gradient has gone, for as long as is allowed."""
    inner = SGD(constant(0.1), momentum=0.9)
    held = Held(inner, patience=3)
    free_state, state = inner.init(torch.zeros(2)), held.init(torch.zeros(2))
    grads = torch.tensor([[1.0, 1.0], *[[1.0, 0.0]] * 5, [1.0, 2.0], [1.0, 0.0]])
    for t, grad in enumerate(grads):
        free, free_state = inner.update({}, grad, free_state, torch.zeros(2))
        delta, state = held.update({}, grad, state, torch.zeros(2))
        assert (free != 0).all()
        assert delta[0] == free[0]
        assert delta[1] == (0.0 if t in (3, 4, 5) else free[1]), t
    assert torch.equal(state["velocity"], free_state["velocity"])


def test_holding_forever_is_refused():
    with pytest.raises(ValueError, match="patience must be at least 1, not 0"):
        Held(SGD(constant(0.1)), patience=0)


def test_a_clock_that_stops_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="at must be at least 0, not -1"):
        StoppedClock(SGD(constant(0.1)), -1)
    without = StoppedClock(LSTMOptimizer(hidden=2), 3)
    state = without.init(torch.zeros(1))
    with pytest.raises(ValueError, match="reads no clock that could be stopped"):
        without.update(without.init_meta(0), torch.ones(1), state, torch.zeros(1))


def test_a_stopped_clock_repeats_its_last_step():
    rate = PowerDecay(1.0, 1.0, 1.0)  # 1 / (t + 1), t = 1, 2, ...
    stopped = StoppedClock(SGD(rate), at=2)
    state, found = stopped.init(torch.zeros(1)), []
    for _ in range(5):
        delta, state = stopped.update({}, torch.ones(1), state, torch.zeros(1))
        found.append(-delta.item())
    assert found == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4])
