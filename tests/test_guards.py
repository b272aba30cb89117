"""LGL2O: guarantees, an independent re-implementation, counted work."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from problems import (
    PATHOLOGICAL,
    Ascent,
    BrokenMemory,
    Leap,
    Noise,
    Stateless,
    Step,
    batches,
    blobs,
    quadratic,
    random_numbers,
    start_of,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from l2olib.guards import LGL2O, Coin, Lazy, Margin, Sequential, Shadow, Switch
from l2olib.learned.lstm import LSTMOptimizer
from l2olib.learned.mlp import star
from l2olib.optimizees import MLP
from l2olib.optimizers import SGD, Adam, PowerDecay, constant
from l2olib.train import Alone

LSTM = LSTMOptimizer(hidden=4)
GD = SGD(constant(0.5))


def metas_of(method, seed: int = 0) -> dict[str, Any]:
    return {
        role: {k: v.double() for k, v in optimizer.init_meta(seed).items()}
        for role, optimizer in method.optimizers.items()
    }


def held_out(task, method, decisions: int, batch: int = 6, seed: int = 9):
    """Draw validation items [decisions, n_c, batch], or None for the full loss."""
    if method.batches is None:
        return None
    return batches(task, decisions * method.n_c, batch, seed).view(
        decisions, method.n_c, batch
    )


# ---- what is promised ----------------------------------------------------------------


@pytest.mark.parametrize("n_t", [1, 3])
@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_full_loss_never_ends_above_the_fallback(name, n_t):
    """f(x+) <= f(z) at every decision, z computed here from the same x (float64)."""
    task = blobs()
    guard = LGL2O(PATHOLOGICAL[name], GD, n_t=n_t, validation="full")
    state = guard.init(start_of(task))
    everything = torch.arange(task.items)
    for k in range(12):
        idx = batches(task, n_t, 8, seed=k)
        z = state["params"]
        for batch in idx:
            z = z - 0.5 * torch.func.grad(task.loss)(z, batch)
        state, trace = guard.segment(task, metas_of(guard), state, idx, None)
        below = task.loss(state["params"], everything) - task.loss(z, everything)
        assert below <= 1e-14
        assert state["params"].isfinite().all()
        assert trace["use_l2o"].item() == (below.item() < 0)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 1.9])
@pytest.mark.parametrize("n_t", [1, 4])
@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_contraction_on_strongly_convex_quadratics(name, n_t, alpha):
    """E+ <= q^n_t E with q = 1 - (mu/L) alpha (2 - alpha): dossier, entries 6, 15."""
    mu, smooth = 0.5, 4.0
    task = quadratic([mu, 1.0, smooth], [1.0, -2.0, 0.5])
    q = 1 - mu / smooth * alpha * (2 - alpha)
    fallback = SGD(constant(alpha / smooth))
    guard = LGL2O(PATHOLOGICAL[name], fallback, n_t=n_t, validation="full")
    state = guard.init(start_of(task))
    before = task.full_loss(state["params"])
    for k in range(12):
        idx = batches(task, n_t, 2, seed=k)
        state, _ = guard.segment(
            task, {"proposal": {}, "fallback": {}}, state, idx, None
        )
        after = task.full_loss(state["params"])
        assert after <= q**n_t * before * (1 + 1e-12)
        before = after


@pytest.mark.parametrize("name", PATHOLOGICAL)
@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
def test_lazy_keeps_the_rate_of_one_fallback_step(name, alpha):
    """Dossier, entry 38: E+ <= [1 - (mu / L) alpha (2 - alpha)] E, whoever proposes."""
    mu, smooth = 0.2, 2.0
    task = quadratic([smooth, 0.7, mu], [1.0, -2.0, 0.5])
    guard = Lazy(
        PATHOLOGICAL[name],
        SGD(constant(alpha / smooth)),
        n_t=2,
        validation="full",
        decrease=1 - alpha / 2,
    )
    state = guard.init(task.optimizee.init(0).double())
    before = task.full_loss(state["params"]).item()
    for _ in range(20):
        idx = torch.zeros(2, 1, dtype=torch.int64)
        state, _ = guard.segment(task, metas_of(guard), state, idx, None)
        after = task.full_loss(state["params"]).item()
        rate = 1 - mu / smooth * alpha * (2 - alpha)
        assert after <= rate * before * (1 + 1e-12) + 1e-300
        before = after


@pytest.mark.parametrize("slack", [0.0, 0.1])
@pytest.mark.parametrize("n_t", [1, 3])
@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_with_a_shadow_it_never_ends_above_the_fallback_alone(name, n_t, slack):
    """f(x^k) <= (1 + slack) f(s^k), s run here from the start (float64), whoever
    proposes; LGL2O itself does not promise that (dossier, entry 8)."""
    task = blobs()
    late = SGD(PowerDecay(0.5, 5.0), momentum=0.9)
    guard = Shadow(PATHOLOGICAL[name], late, n_t=n_t, validation="full", slack=slack)
    metas, state = metas_of(guard), guard.init(start_of(task))
    alone = Alone(late)
    other = alone.init(start_of(task))
    for k in range(12):
        idx = batches(task, n_t, 8, seed=k)
        other, _ = alone.segment(task, {"optimizer": {}}, other, idx, None)
        state, trace = guard.segment(task, metas, state, idx, None)
        bar = (1 + slack) * task.full_loss(other["params"])
        loss = task.full_loss(state["params"])
        assert loss <= bar + 1e-14
        same = torch.equal(state["params"], other["params"])
        assert same if trace["use_shadow"] else loss < bar


def test_contraction_is_attained_when_all_curvatures_are_equal():
    """mu = L and an inert proposal: exactly (1 - alpha)^2 a step (entry 6)."""
    task = quadratic([2.0, 2.0], [1.0, -3.0])
    guard = LGL2O(Step(0.0), SGD(constant(0.25)), n_t=1, validation="full")
    state = guard.init(start_of(task))
    before = task.full_loss(state["params"])
    for _ in range(5):
        idx = torch.zeros(1, 1, dtype=torch.int64)
        state, _ = guard.segment(task, metas_of(guard), state, idx, None)
        after = task.full_loss(state["params"])
        assert after.item() == pytest.approx(0.25 * before.item(), rel=1e-14)
        before = after


def test_the_guard_can_lose_to_its_fallback_alone():
    """Dossier, entry 8: a proposal that is rightly accepted, and a slow valley."""
    task = quadratic([1.0, 0.01], [1.0, 0.0])
    fallback = SGD(constant(0.5))
    x = start_of(task)
    idx = torch.zeros(6, 1, dtype=torch.int64)
    guard = LGL2O(Leap(0.0, (0.0, 4.9)), fallback, n_t=1, validation="full")
    state, first = guard.segment(task, metas_of(guard), guard.init(x), idx[:1], None)
    assert first["use_l2o"].all()
    assert first["valid_l2o"].item() == pytest.approx(2401 / 20000)
    assert first["valid_fallback"].item() == pytest.approx(1 / 8)
    # From here the same proposal is never better: the guard follows its fallback.
    state, rest = guard.segment(task, metas_of(guard), state, idx[1:], None)
    assert not rest["use_l2o"].any()
    alone = Alone(fallback)
    ended, _ = alone.segment(task, metas_of(alone), alone.init(x), idx, None)
    assert task.full_loss(ended["params"]).item() == pytest.approx(1 / 8192)
    guarded = task.full_loss(state["params"]).item()
    assert guarded == pytest.approx(0.01 * 4.9**2 / 2 * 0.995**10)
    assert guarded > 900 / 8192


# ---- not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("validation", ["disjoint", "full"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_x_stays_when_neither_side_is_finite(bad, validation):
    task = blobs()
    guard = LGL2O(Step(bad), Step(bad), n_t=2, validation=validation)
    x = start_of(task)
    state = guard.init(x)
    state["proposal"] = state["fallback"] = {"count": torch.tensor(7)}
    idx = batches(task, 2, 8)
    state, trace = guard.segment(
        task, metas_of(guard), state, idx, held_out(task, guard, 1)
    )
    assert torch.equal(state["params"], x)
    assert not trace["use_l2o"].any()
    # The proposal starts afresh; the fallback goes back to where it was.
    assert (state["proposal"]["count"], state["fallback"]["count"]) == (0, 7)
    # The recorded loss is that of the iterate, which is finite.
    assert torch.equal(trace["loss"], task.loss(x, idx[0]).expand(2))


@pytest.mark.parametrize(("clock", "steps"), [("global", 2), ("accepted", 0)])
@pytest.mark.parametrize("proposal", [Step(math.nan), Step(0.0)])
def test_fallback_steps_that_are_not_kept(proposal, clock, steps):
    """A diverged fallback goes back to its moments; only a global clock goes on."""
    task = blobs()
    guard = LGL2O(proposal, Adam(constant(math.inf)), n_t=2, clock=clock)
    idx = batches(task, 2, 8)
    state, _ = guard.segment(
        task,
        metas_of(guard),
        guard.init(start_of(task)),
        idx,
        held_out(task, guard, 1),
    )
    assert state["fallback"]["step"] == steps
    assert state["fallback"]["count"] == 0
    assert state["fallback"]["m"].eq(0).all()


@pytest.mark.parametrize(
    ("proposal", "fallback", "use"),
    [(Step(math.nan), GD, False), (Step(0.0), Step(math.nan), True)],
)
def test_a_finite_side_beats_one_that_is_not(proposal, fallback, use):
    task = blobs()
    guard = LGL2O(proposal, fallback, n_t=2)
    state, trace = guard.segment(
        task,
        metas_of(guard),
        guard.init(start_of(task)),
        batches(task, 2, 8),
        held_out(task, guard, 1),
    )
    assert trace["use_l2o"].item() is use
    assert state["params"].isfinite().all()


@pytest.mark.parametrize("proposes", [True, False])
def test_a_finite_loss_at_parameters_that_are_not_finite_does_not_win(proposes):
    """A coordinate that the loss does not see may be infinite without showing."""
    task = quadratic([1.0, 0.0], [1.0, 0.0])
    dead = replace(task.optimizee, hessian=((1.0,),), start=(1.0,))

    class Blind:
        layout = task.optimizee.layout

        def losses(self, params, batch):
            return dead.losses(params[:1], (batch[0][:, :1], batch[1]))

    blind = replace(task, optimizee=Blind())
    sides = (Leap(0.0, (0.0, math.inf)), GD)
    sides = sides if proposes else sides[::-1]
    guard = LGL2O(*sides, n_t=1, validation="full")
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    idx = torch.zeros(1, 1, dtype=torch.int64)
    state, trace = guard.segment(blind, metas_of(guard), guard.init(x), idx, None)
    assert (trace["valid_l2o"] < trace["valid_fallback"]) == proposes
    assert trace["use_l2o"].item() is not proposes
    assert state["params"].tolist() == [0.5, 0.0]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_fallback_leads_back_from_where_the_loss_is_not_finite(lazy):
    """A lazy guard looks at the loss where it stands, which says nothing of z."""
    task, x = quadratic([2.0], [1.0]), torch.tensor([1e156], dtype=torch.float64)
    kind = Lazy if lazy else LGL2O
    guard = kind(Step(math.inf), SGD(constant(0.25)), n_t=10, validation="full")
    assert task.full_loss(x).isinf()
    idx = torch.zeros(10, 1, dtype=torch.int64)
    state, trace = guard.segment(task, metas_of(guard), guard.init(x), idx, None)
    assert not trace["use_l2o"].any()
    assert state["params"].item() == pytest.approx(1e156 * 0.5**10)


@pytest.mark.parametrize("option", ["carry", "revert", "reset"])
def test_a_hidden_state_that_is_not_finite_is_never_carried(option):
    task = blobs()
    guard = LGL2O(BrokenMemory(0.0), GD, n_t=2, proposal_state=option)
    state = guard.init(start_of(task))
    for k in range(4):
        idx = batches(task, 2, 8, seed=k)
        state, _ = guard.segment(
            task, metas_of(guard), state, idx, held_out(task, guard, 1)
        )
        assert state["proposal"]["hidden"]["count"].isfinite().all()


def test_a_fallback_state_that_is_not_finite_is_never_carried():
    """The broken side wins, for it does not move and the other is worse."""
    task = blobs()
    guard = LGL2O(Step(math.nan), BrokenMemory(0.0), n_t=2)
    state = guard.init(start_of(task))
    for k in range(4):
        idx = batches(task, 2, 8, seed=k)
        state, _ = guard.segment(
            task, metas_of(guard), state, idx, held_out(task, guard, 1)
        )
        assert state["fallback"]["hidden"]["count"].isfinite().all()


@pytest.mark.parametrize(
    ("proposal", "fallback", "scale", "tossed"),
    [
        (Step(0.1), GD, 1.0, [True, True]),
        (Step(math.nan), GD, 1.0, [False, True]),
        (Step(0.1), Step(math.nan), 1.0, [False, False]),
        # No loss is finite where the guard stands: the shadow leads back.
        (Step(0.1), GD, math.nan, [False, False]),
    ],
)
def test_a_test_learns_nothing_beside_a_side_that_is_not_finite(
    proposal, fallback, scale, tossed
):
    """Neither the guard's coin nor its shadow's is tossed where there is no choice."""
    task = blobs()
    guard = Shadow(proposal, fallback, n_t=2, n_c=2, test=Coin())
    start = guard.init(start_of(task))
    start["params"] = scale * start["params"]
    state, _ = guard.segment(
        task, metas_of(guard), start, batches(task, 2, 8), held_out(task, guard, 1)
    )
    assert state["params"].isfinite().all()
    coins = [[s["test"]["toss"], s["shadow"]["test"]["toss"]] for s in (start, state)]
    assert [bool(a != b) for a, b in zip(*coins, strict=True)] == tossed


# ---- Algorithm 2, written again with plain loops -------------------------------------


@dataclass
class Plain:
    """Algorithm 2 with Python numbers, torch.autograd and no shared code paths."""

    task: Any
    guard: LGL2O
    metas: dict[str, Any]
    x: Tensor

    def __post_init__(self) -> None:
        self.h = self.guard.proposal.init(self.x)
        self.o = self.guard.fallback.init(self.x)
        self.noise = {"guard": math.nan, "shadow": math.nan}
        self.s, self.o_s = self.x, self.guard.fallback.init(self.x)
        self.returns = 0
        self.log: list[tuple[bool, float, float, float]] = []
        self.losses: list[float] = []

    def gradient(self, x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        data = self.task.data.train
        loss = self.task.optimizee.losses(x, (data.x[batch], data.y[batch])).mean()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def branch(self, role: str, state: Any, idx: Tensor, x: Tensor):
        optimizer, losses = self.guard.optimizers[role], []
        for batch in idx:
            loss, g = self.gradient(x, batch)
            step, state = optimizer.update(self.metas[role], g, state, x, loss=loss)
            x = x + step
            losses.append(loss.item())
        return x, state, losses

    def value(self, x: Tensor, held: Tensor | None) -> tuple[float, list[float]]:
        data = self.task.data.train
        which = torch.arange(len(data)) if held is None else held.flatten()
        items = self.task.optimizee.losses(x, (data.x[which], data.y[which])).tolist()
        return math.fsum(items) / len(items), items

    def walk(self, who: str, d: list[float], size: int, apart: float) -> bool:
        """Batch after batch until the sum is outside; the noise is the past's."""
        test = self.guard.test
        if apart == 0:  # one and the same point: nothing is learned, nothing wins
            return False
        mean = math.fsum(d) / len(d)
        variance = math.fsum((v - mean) ** 2 for v in d) / (len(d) - 1) / size
        seen = variance / apart**2
        known = seen if math.isnan(self.noise[who]) else self.noise[who]
        self.noise[who] = test.memory * known + (1 - test.memory) * seen
        total = 0.0
        for k in range(0, len(d), size):
            total += math.fsum(d[k : k + size]) / size
            if abs(total) > test.c * math.sqrt(known) * apart:
                return total < 0
        return False

    def wins(self, who: str, a: list[float], b: list[float], apart: float, held):
        """Whether items' losses ``a`` beat ``b`` by the guard's test; the error."""
        d = [u - v for u, v in zip(a, b, strict=True)]
        mean = math.fsum(d) / len(d)
        spread = math.fsum((v - mean) ** 2 for v in d) / (len(d) - 1) / len(d)
        error = 0.0 if held is None else math.sqrt(spread)
        if self.guard.test is None:
            return mean < 0, error
        if isinstance(self.guard.test, Margin):
            return mean < -self.guard.test.z * error, error
        return self.walk(who, d, len(d) // self.guard.n_c, apart), error

    def decide(self, idx: Tensor, held: Tensor | None) -> None:
        guard = self.guard
        y, h_y, losses_y = self.branch("proposal", self.h, idx, self.x)
        z, o_z, losses_z = self.branch("fallback", self.o, idx, self.x)
        (f_y, items_y), (f_z, items_z) = self.value(y, held), self.value(z, held)
        if isinstance(guard, Lazy):
            f_z, items_z = self.value(self.x, held)
            step, _ = guard.fallback.update(
                self.metas["fallback"], self.gradient(self.x, idx[0])[1], self.o, self.x
            )
            gain = -math.fsum((self.gradient(self.x, idx[1])[1] * step).tolist())
            ask = guard.decrease * max(gain, 0.0)
            f_z, items_z = f_z - ask, [v - ask for v in items_z]
        apart, way = math.dist(y, z), math.dist(z, self.x)
        between = math.dist(y, self.x) if isinstance(guard, Lazy) else apart
        won, error = self.wins("guard", items_y, items_z, between, held)
        if guard.radius is not None:
            won = won and apart <= guard.radius * way
        losses, h_x = losses_y if won else losses_z, self.h
        clock = self.o.get("step")
        if won:
            self.h = h_y
            if guard.fallback_state == "keep":
                self.o = dict(o_z)
            elif guard.fallback_state == "reset":
                self.o = guard.fallback.init(self.x)
            else:
                self.o = dict(self.o)
        else:
            self.o = dict(o_z)
            if guard.proposal_state == "carry":
                self.h = h_y
            elif guard.proposal_state == "reset":
                self.h = guard.proposal.init(self.x)
        if clock is not None:
            counts = guard.clock == "global" or not won
            self.o["step"] = clock + (guard.n_t if counts else 0)
        self.x = y if won else z
        if isinstance(guard, Shadow):
            self.s, self.o_s, losses_s = self.branch("fallback", self.o_s, idx, self.s)
            kept, alone = items_y if won else items_z, self.value(self.s, held)[1]
            apart = math.dist(self.x, self.s)
            bar = [(1 + guard.slack) * v for v in alone]
            if not self.wins("shadow", kept, bar, apart, held)[0]:
                won, losses = False, losses_s
                self.x, self.o = self.s, dict(self.o_s)
                fresh = guard.proposal.init(self.x)
                self.h = {"carry": self.h, "revert": h_x, "reset": fresh}[
                    guard.proposal_state
                ]
                self.returns += 1
        self.log.append((won, f_y, f_z, error))
        self.losses += losses


def leaves(state: dict[str, Any]):
    for value in state.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def compare(guard: LGL2O, decisions: int = 8, per_segment: int = 2) -> list[bool]:
    """Run guard and re-implementation side by side; return the decisions."""
    task = blobs()
    metas = metas_of(guard)
    plain = Plain(task, guard, metas, start_of(task))
    state = guard.init(start_of(task))
    idx = batches(task, decisions * guard.n_t, 8)
    held = held_out(task, guard, decisions)
    found: dict[str, list[Tensor]] = {}
    for first in range(0, decisions, per_segment):
        last = first + per_segment
        state, trace = guard.segment(
            task,
            metas,
            state,
            idx[first * guard.n_t : last * guard.n_t],
            None if held is None else held[first:last],
        )
        for key, value in trace.items():
            found.setdefault(key, []).append(value)
    for k in range(decisions):
        plain.decide(
            idx[k * guard.n_t : (k + 1) * guard.n_t], None if held is None else held[k]
        )
    if isinstance(guard, Shadow):
        assert torch.allclose(state["shadow"]["params"], plain.s, rtol=1e-9)
        assert int(torch.cat(found["use_shadow"]).sum()) == plain.returns
        assert 0 < plain.returns < decisions, "both outcomes must occur"
    if isinstance(guard.test, Sequential):
        for who, at in (("guard", state), ("shadow", state.get("shadow"))):
            if at:
                noise = at["test"]["noise"].item()
                assert noise == pytest.approx(plain.noise[who], rel=1e-9)
    assert torch.allclose(state["params"], plain.x, rtol=1e-9, atol=1e-12)
    for role, expected in (("proposal", plain.h), ("fallback", plain.o)):
        assert state[role].keys() == expected.keys()
        for ours, theirs in zip(leaves(state[role]), leaves(expected), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    names = ("use_l2o", "valid_l2o", "valid_fallback", "standard_error")
    for name, column in zip(names, zip(*plain.log, strict=True), strict=True):
        ours = torch.cat(found[name]).double()
        expected = torch.tensor(column, dtype=torch.float64)
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12), name
    expected = torch.tensor(plain.losses, dtype=torch.float64)
    assert torch.allclose(torch.cat(found["loss"]), expected, rtol=1e-9)
    return [won for won, *_ in plain.log]


OPTIONS = list(
    itertools.product(
        ["carry", "revert", "reset"],
        ["keep", "revert", "reset"],
        ["global", "accepted"],
    )
)


@pytest.mark.parametrize(("proposal_state", "fallback_state", "clock"), OPTIONS)
def test_every_option_equals_the_plain_algorithm(proposal_state, fallback_state, clock):
    """Adam under a fast schedule against a proposal that wins about half the time."""
    guard = LGL2O(
        SGD(PowerDecay(1.0, 10.0), momentum=0.7),
        Adam(PowerDecay(0.3, 5.0)),
        n_t=3,
        n_c=2,
        proposal_state=proposal_state,
        fallback_state=fallback_state,
        clock=clock,
    )
    won = compare(guard)
    assert 0 < sum(won) < len(won), "both outcomes must occur"


@pytest.mark.parametrize("n_t", [1, 4])
@pytest.mark.parametrize("validation", ["disjoint", "iid", "fixed", "full"])
def test_every_criterion_equals_the_plain_algorithm(validation, n_t):
    """A learned proposal; n_t = 1 with the full loss is Algorithm 1."""
    compare(LGL2O(LSTM, GD, n_t=n_t, n_c=3, validation=validation))


@pytest.mark.parametrize(
    "options",
    [
        {"test": Margin(0.0)},
        {"test": Margin(1.0)},
        {"test": Sequential(0.7)},
        {"test": Sequential(2.0, memory=0.5), "n_c": 5},
        {"radius": 1.0},
        {"test": Margin(0.5), "radius": 1.0, "proposal_state": "reset"},
    ],
    ids=str,
)
def test_every_test_of_noise_equals_the_plain_algorithm(options):
    guard = LGL2O(
        SGD(PowerDecay(1.0, 10.0), momentum=0.7),
        Adam(PowerDecay(0.3, 5.0)),
        **{"n_t": 3, "n_c": 4, **options},
    )
    won = compare(guard, 12)
    assert 0 < sum(won) < len(won), "both outcomes must occur"


@pytest.mark.parametrize(
    "options",
    [{}, {"validation": "full"}, {"test": Margin(0.5)}, {"test": Sequential(0.5)}],
    ids=str,
)
def test_lazy_equals_the_plain_algorithm(options):
    guard = Lazy(
        SGD(PowerDecay(1.0, 10.0), momentum=0.7),
        SGD(PowerDecay(1.0, 10.0)),
        n_t=3,
        n_c=4,
        **options,
    )
    won = compare(guard, 12)
    assert 0 < sum(won) < len(won), "both outcomes must occur"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": "full"},
        {"test": Margin(0.3), "proposal_state": "reset"},
        {"test": Sequential(0.5), "proposal_state": "revert"},
        {"slack": 0.02},
        {"test": Margin(0.3), "slack": 0.01},
    ],
    ids=str,
)
def test_shadow_equals_the_plain_algorithm(options):
    """It beats its shadow at some decisions and returns to it at others."""
    guard = Shadow(
        SGD(PowerDecay(1.0, 10.0), momentum=0.7),
        Adam(PowerDecay(0.3, 5.0)),
        **{"n_t": 3, "n_c": 4, **options},
    )
    won = compare(guard, 12)
    assert 0 < sum(won) < len(won), "both outcomes must occur"


EITHER_SIDE = {
    "sgd": GD,
    "momentum": SGD(PowerDecay(0.2, 10.0), momentum=0.9),
    "adam": Adam(constant(0.05)),
    "lstm": LSTM,
    "noise": Noise(0.3),
    "ascent": Ascent(0.5),
    "no state": Stateless(0.5),
    "no step": Step(0.0),
}
PAIRS = list(itertools.product(EITHER_SIDE, EITHER_SIDE))


@pytest.mark.parametrize(("proposal", "fallback"), PAIRS)
def test_any_pair_of_optimizers(proposal, fallback):
    """Any Optimizer on either side follows the algorithm."""
    compare(LGL2O(EITHER_SIDE[proposal], EITHER_SIDE[fallback], n_t=2, n_c=2), 4)


@pytest.mark.parametrize("segment", [1, 2, 4])
def test_segments_are_only_a_grouping(segment):
    compare(LGL2O(LSTM, GD, n_t=2, n_c=2), decisions=4, per_segment=segment)


def test_equal_sides_tie_and_the_fallback_wins():
    guard = LGL2O(GD, GD, n_t=2, n_c=2)
    assert not any(compare(guard, 4))


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_replicas_do_not_see_each_other(name):
    """Under vmap each replica decides for itself, whatever happens to the others."""
    task = blobs()
    guard = LGL2O(PATHOLOGICAL[name], SGD(PowerDecay(0.5, 10.0), 0.9), n_t=2, n_c=2)
    starts = torch.stack([start_of(task, k) for k in range(3)])
    starts[1] *= 1e150  # one whose loss overflows
    idx = torch.stack([batches(task, 4, 8, seed=k) for k in range(3)])
    held = torch.stack([held_out(task, guard, 2, seed=k) for k in range(3)])

    def segment(state, train, valid):
        return guard.segment(task, metas_of(guard), state, train, valid)

    states = torch.func.vmap(guard.init)(starts)
    together, traces = torch.func.vmap(segment)(states, idx, held)
    for k in range(3):
        alone, trace = segment(guard.init(starts[k]), idx[k], held[k])
        assert torch.allclose(together["params"][k], alone["params"], equal_nan=True)
        assert torch.equal(traces["use_l2o"][k], trace["use_l2o"])


# ---- a learned optimizer in the loop -------------------------------------------------


def test_hidden_state_survives_a_bad_gradient():
    """A NaN gradient poisons the LSTM's memory; the guard gives it a fresh one."""
    task = blobs()
    guard = LGL2O(LSTM, Step(0.0), n_t=1, n_c=2)
    state = guard.init(start_of(task))
    state["proposal"] = {
        k: torch.full_like(v, 0.3) for k, v in state["proposal"].items()
    }
    state["proposal"]["c0"][0, 0] = math.nan
    state, trace = guard.segment(
        task, metas_of(guard), state, batches(task, 1, 8), held_out(task, guard, 1)
    )
    assert not trace["use_l2o"].any()
    assert all(v.eq(0).all() for v in state["proposal"].values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_t", 0),
        ("n_c", 0),
        ("n_c", -3),
        ("validation", "half"),
        ("proposal_state", "keep"),
        ("fallback_state", "carry"),
        ("clock", "wall"),
        ("radius", 0.0),
    ],
)
def test_wrong_options_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*{value}"):
        LGL2O(LSTM, GD, **{field: value})


def test_batches_that_do_not_fit_a_segment_are_refused():
    """Without validation batches a guard would decide on the full loss, silently."""
    task = blobs()
    train = torch.zeros(10, 8, dtype=torch.int64)
    for guard, steps, held in (
        (LGL2O(LSTM, GD, n_t=5, n_c=2), 10, None),
        (LGL2O(LSTM, GD, n_t=5, n_c=2), 10, torch.zeros(2, 3, 8)),
        (LGL2O(LSTM, GD, n_t=5, n_c=2), 10, torch.zeros(1, 2, 8)),
        (LGL2O(LSTM, GD, n_t=5, n_c=2), 9, torch.zeros(2, 2, 8)),
        (Shadow(LSTM, GD, n_t=5, validation="full"), 10, torch.zeros(2, 2, 8)),
    ):
        with pytest.raises(
            ValueError, match="must be a multiple of the 5 of a decision, with v"
        ):
            guard.segment(task, {}, {}, train[:steps], held)


def test_wrong_lazy_guards_are_refused():
    with pytest.raises(ValueError, match="^n_t must be at least 2, not 1"):
        Lazy(LSTM, GD, n_t=1)
    with pytest.raises(ValueError, match="^decrease must be positive, not 0"):
        Lazy(LSTM, GD, decrease=0.0)
    heavy = SGD(constant(0.1), momentum=0.9)
    with pytest.raises(ValueError, match="set fallback_state to"):
        Lazy(LSTM, heavy)
    assert Lazy(LSTM, heavy, fallback_state="revert").fallback == heavy
    with pytest.raises(ValueError, match="leave radius None"):
        Lazy(LSTM, GD, radius=1.0)
    learned = star(MLP((2, 3, 2)).layout)
    with pytest.raises(ValueError, match="set fallback_state to"):
        Lazy(LSTM, learned)
    assert Lazy(LSTM, learned, fallback_state="reset").fallback == learned


@dataclass(frozen=True)
class Never:
    """A test of noise of one's own: it counts, and accepts nothing."""

    traces = ("asked",)

    def init(self, params: Tensor) -> dict[str, Tensor]:
        return {"asked": params.new_zeros(())}

    def __call__(self, delta: Tensor, apart: Tensor, state: dict[str, Tensor]):
        asked = state["asked"] + 1
        return (delta > delta).any(), {"asked": asked}, {"asked": asked}


def test_a_test_of_noise_of_ones_own():
    task, guard = blobs(), LGL2O(LSTM, GD, n_t=2, n_c=3, test=Never())
    idx, start = batches(task, 8, 8), start_of(task)
    judges, metas = held_out(task, guard, 4), metas_of(guard)
    state, trace = guard.segment(task, metas, guard.init(start), idx, judges)
    assert trace["asked"].tolist() == [1, 2, 3, 4] and not trace["use_l2o"].any()
    alone = Alone(GD)
    expected, _ = alone.segment(task, {"optimizer": {}}, alone.init(start), idx, None)
    assert torch.allclose(state["params"], expected["params"], rtol=1e-12)


def test_wrong_tests_of_noise_are_refused():
    with pytest.raises(ValueError, match="^z must be at least 0, not -1"):
        Margin(-1.0)
    with pytest.raises(ValueError, match="^z must be at least 0, not nan"):
        Margin(math.nan)
    with pytest.raises(ValueError, match="^c must be positive, not 0"):
        Sequential(0.0)
    with pytest.raises(ValueError, match="^memory must lie strictly between"):
        Sequential(memory=1.0)
    with pytest.raises(
        ValueError, match=r"^test must be None or .* Margin.*, not 3\.0"
    ):
        LGL2O(LSTM, GD, test=3.0)
    with pytest.raises(ValueError, match="^the full loss has no noise"):
        LGL2O(LSTM, GD, validation="full", test=Margin())
    with pytest.raises(ValueError, match="^slack must be at least 0, not -1"):
        Shadow(LSTM, GD, slack=-1.0)
    with pytest.raises(ValueError, match="^slack goes with a Margin or no test, not"):
        Shadow(LSTM, GD, test=Sequential(), slack=0.01)


def test_a_coin_is_fair_knows_no_loss_and_is_each_seeds_own():
    coin, tosses = Coin(), []
    starts = torch.stack([blobs().optimizee.init(seed) for seed in range(50)])
    state = torch.func.vmap(coin.init)(starts)
    toss = torch.func.vmap(lambda d, s: coin(d, d, s)[:2])
    for losses in torch.tensor([[math.nan], [-1.0], [1.0]] * 20).expand(-1, 50):
        heads, state = toss(losses, state)
        tosses.append(heads)
    tosses = torch.stack(tosses, 1)
    assert len({tuple(row) for row in tosses.tolist()}) == 50
    for loss in (math.nan, -1.0, 1.0):
        assert toss(torch.full((50,), loss), state)[0].equal(
            toss(torch.zeros(50), state)[0]
        )
    assert abs(tosses.float().mean() - 0.5) < 3 * 0.5 / math.sqrt(tosses.numel())
    # C++ has this generator as minstd_rand and states its 10,000th number.
    state = {"toss": torch.tensor(1)}
    for _ in range(10_000):
        state = coin(torch.zeros(1), torch.zeros(()), state)[1]
    assert state["toss"] == 399_268_537


def test_lazy_knows_how_far_it_has_come():
    """Two equal optimizers: their ends are one point, but not that of the start."""
    same = SGD(constant(0.3))
    task = blobs()
    guard = Lazy(same, same, n_t=3, n_c=4, test=Sequential(1.0))
    state, trace = guard.segment(
        task, metas_of(guard), guard.init(start_of(task)), batches(task, 30, 8),
        held_out(task, guard, 10),
    )  # fmt: skip
    assert trace["use_l2o"].any() and state["test"]["noise"].isfinite()


# ---- what tests of noise promise -----------------------------------------------------

TRIALS, N_C, SIZE, APART = 20_000, 10, 4, 0.5


def accepted(test, mean: float, noise: float) -> tuple[float, float]:
    """Share of acceptances, and batches used, at a true difference ``mean``.

    Items are Gaussian with a standard deviation of 2, so one of a batch is 1.
    """
    delta = mean + random_numbers(int(100 * mean), TRIALS * N_C * SIZE) * 2.0
    state = {"noise": torch.tensor(noise).double()} if noise else {}
    apart = torch.tensor(APART).double()

    def one(d):
        favours, _, trace = test(d, apart, state)
        return favours.double(), trace.get("batches_used", torch.tensor(N_C))

    favours, used = torch.func.vmap(one)(delta.view(TRIALS, N_C, SIZE))
    return favours.mean().item(), used.double().mean().item()


@pytest.mark.parametrize("mean", [0.05, 0.15, 0.3, 0.6])
def test_expected_harm_stays_below_its_bound(mean):
    """Theorem N with estimated noise, and Theorem S with noise known from the past."""
    z, c, nu = 2.0, 3.0, N_C * SIZE - 1
    error, room = (1 / N_C) ** 0.5, 3 * mean / TRIALS**0.5
    bound = error * (1 + z**2 / nu) ** (-nu / 2) / (2 * math.sqrt(math.e))
    assert mean * accepted(Margin(z), mean, 0.0)[0] < bound + room
    share, used = accepted(Sequential(c), mean, 1 / APART**2)
    assert mean * share < 1 / (2 * math.e * c) + room
    assert used < N_C


def test_a_clear_gain_passes_and_costs_few_batches():
    assert accepted(Margin(3.0), -2.0, 0.0)[0] > 0.99
    share, used = accepted(Sequential(3.0), -2.0, 1 / APART**2)
    assert share > 0.99
    assert used < 3


@pytest.mark.parametrize(
    ("differences", "favours", "used"),
    [
        ([-4.0, 0.0, 0.0, 0.0], True, 1),
        ([-2.0, -2.0, 9.0, 0.0], True, 2),
        ([-2.0, 1.0, 9.0, 0.0], False, 3),
        ([0.0, -1.0, -1.0, -2.0], True, 4),
        ([-1.0, -1.0, -1.0, 0.0], False, 4),
    ],
)
def test_a_walk_ends_with_the_batch_that_takes_it_outside(differences, favours, used):
    """One batch after the other, until their sum is not in [-3, 3]."""
    one = torch.ones(()).double()
    delta = torch.tensor(differences).double()[:, None].expand(-1, 2)
    found, _, trace = Sequential(3.0)(delta, one, {"noise": one})
    assert (found.item(), trace["batches_used"].item()) == (favours, used)


# ---- counted work --------------------------------------------------------------------


class Counted:
    """Count the items that pass through an optimizee, with and without gradient."""

    def __init__(self, optimizee):
        self.optimizee, self.layout = optimizee, optimizee.layout
        self.gradients = self.forwards = 0

    def losses(self, params, batch):
        if torch._C._functorch.is_gradtrackingtensor(params):
            self.gradients += len(batch[1])
        else:
            self.forwards += len(batch[1])
        return self.optimizee.losses(params, batch)


@pytest.mark.parametrize(
    "method",
    [
        Alone(LSTM),
        Alone(GD),
        LGL2O(LSTM, GD, n_t=5, n_c=3),
        LGL2O(LSTM, LSTMOptimizer(hidden=3), n_t=2, n_c=4, validation="iid"),
        LGL2O(LSTM, GD, n_t=1, validation="full"),
        LGL2O(LSTM, GD, n_t=5, n_c=3, test=Sequential()),
        Lazy(LSTM, GD, n_t=5, n_c=3),
        Shadow(LSTM, GD, n_t=5, n_c=3),
        Shadow(LSTM, GD, n_t=2, validation="full"),
    ],
)
def test_stated_cost_equals_counted_cost(method):
    """Passes counted inside the optimizee, matrix work counted by torch, a step."""
    steps, batch = 10, 8
    task = blobs(items=40)
    optimizee = task.optimizee
    cost = method.cost(optimizee, batch, task.items)
    counted = replace(task, optimizee=Counted(optimizee))
    valid = None
    if method.batches is not None:
        valid = held_out(task, method, steps // method.interval, batch)
    with FlopCounterMode(display=False) as counter:
        method.segment(
            counted,
            metas_of(method),
            method.init(start_of(task)),
            batches(task, steps, batch),
            valid,
        )
    assert counter.get_total_flops() == pytest.approx(cost.flops * steps)
    assert counted.optimizee.gradients == pytest.approx(cost.gradients * batch * steps)
    assert counted.optimizee.forwards == pytest.approx(cost.forwards * batch * steps)


def test_cost_of_the_papers_setting():
    """Dossier, entry 17: 19 gradients and 20 forwards a decision; depth 10 + 1."""
    method = LGL2O(LSTMOptimizer(), SGD(PowerDecay(3.0)))
    mlp = MLP((784, 20, 10))
    cost = method.cost(mlp, 128, 60_000)
    assert (10 * cost.gradients, 10 * cost.forwards) == pytest.approx((19, 20))
    assert 10 * cost.depth == pytest.approx(11)
    expected = 19 * mlp.flops(128, True) + 20 * mlp.flops(128) + 10 * 9_960 * 15_910
    assert 10 * cost.flops == pytest.approx(expected)


def test_work_of_a_switch():
    """Each of its steps costs what the optimizer at work costs alone."""
    mlp = MLP((784, 20, 10))
    method = Switch(LSTMOptimizer(), SGD(PowerDecay(3.0)), 100)
    early, late, mean = (
        method.cost(mlp, 128, 60_000, share) for share in (1.0, 0.0, 0.01)
    )
    assert late == Alone(SGD(PowerDecay(3.0))).cost(mlp, 128, 60_000)
    assert early == Alone(LSTMOptimizer()).cost(mlp, 128, 60_000)
    assert early.flops / late.flops == pytest.approx(20.5, abs=0.5)
    total = 100 * early.flops + 9_900 * late.flops
    assert 10_000 * mean.flops == pytest.approx(total)


def test_work_of_a_lazy_decision():
    """n_t + 1 gradients where it accepts, n_t - 1 more where it does not."""
    mlp = MLP((784, 20, 10))
    method = Lazy(LSTMOptimizer(), SGD(PowerDecay(3.0)))
    yes, no = (method.cost(mlp, 128, 60_000, share) for share in (1.0, 0.0))
    assert (10 * yes.gradients, 10 * no.gradients) == pytest.approx((11, 20))
    assert (10 * yes.forwards, 10 * no.forwards) == pytest.approx((20, 20))
    assert (10 * yes.depth, 10 * no.depth) == pytest.approx((11, 20))
    saved = 9 * mlp.flops(128, True)
    assert 10 * (no.flops - yes.flops) == pytest.approx(saved)


def test_a_random_start_is_not_special():
    """The invariant again, from far away and with a noisy criterion switched off."""
    task = blobs(seed=3)
    guard = LGL2O(Noise(50.0), GD, n_t=1, validation="full")
    state = guard.init(10 * random_numbers(1, task.optimizee.layout.n))
    values = []
    for k in range(15):
        idx = torch.arange(task.items)[None]
        state, _ = guard.segment(task, metas_of(guard), state, idx, None)
        values.append(task.full_loss(state["params"]).item())
        assert k == 0 or values[-1] <= values[-2] + 1e-12
