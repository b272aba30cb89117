"""Meta Guard: an independent re-implementation, guarantees, counted work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from problems import (
    batches,
    blobs,
    expect_resumable,
    make_toy_data,  # noqa: F401
    quadratic,
    start_of,
)
from test_guards import Counted
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from l2olib.data import load
from l2olib.guards import LGL2O
from l2olib.learned.lstm import LSTMOptimizer
from l2olib.meta_guard import AMG, SMG, Adapted, Compared
from l2olib.metatrain.truncated import MetaTraining
from l2olib.optimizees import MLP, Task
from l2olib.optimizers import SGD, Restarted, constant
from l2olib.train import Alone, Training, drive

LSTM = LSTMOptimizer(hidden=3, learned_start=True)


def theta_of(optimizer: Any, seed: int = 1) -> dict[str, Tensor]:
    """Meta-parameters whose steps matter: large outputs, a memory that is not zero."""
    gen = torch.Generator().manual_seed(seed)
    meta = {k: v.double() for k, v in optimizer.init_meta(seed).items()}
    for name in meta:
        if name[0] in "hc":
            meta[name] = 0.5 * torch.randn(meta[name].shape, generator=gen).double()
    meta["w_out"] = 5 * meta["w_out"]
    return meta


def held_out(task: Any, method: Any, decisions: int, batch: int = 6) -> Tensor | None:
    if method.batches is None:
        return None
    count = method.batches[0]
    return batches(task, decisions * count, batch, 9).view(decisions, count, batch)


# ---- written from the card, with autograd and state [n, hidden] ----------------------


def cell(
    x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (torch.cat([x, h], 1) @ w.T + b.T).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def g_T(loss, eta, theta, steps, scale=0.1, p=10.0, full=False):
    """Unroll: one mini-batch loss of ``steps`` for each step."""
    n, hidden = len(eta), len(theta["h0"])
    memory = {k: theta[k].T.expand(n, hidden) for k in ("h0", "c0", "h1", "c1")}
    path = []
    if full and not eta.requires_grad:
        eta = eta.clone().requires_grad_()
    for batch in steps:
        at = eta if full else eta.detach().requires_grad_()
        value = loss(at, batch)
        (grad,) = torch.autograd.grad(value, at, create_graph=full)
        grad = grad if full else grad.detach()
        path.append(value.detach())
        large = grad.abs() >= math.exp(-p)
        safe = torch.where(large, grad.abs(), torch.ones_like(grad))
        x = torch.stack(
            [
                torch.where(large, safe.log() / p, -torch.ones_like(grad)),
                torch.where(large, grad.sign(), math.exp(p) * grad),
            ],
            1,
        )
        for k in ("0", "1"):
            memory[f"h{k}"], memory[f"c{k}"] = cell(
                x, memory[f"h{k}"], memory[f"c{k}"], theta[f"w{k}"], theta[f"b{k}"]
            )
            x = memory[f"h{k}"]
        eta = eta + scale * (x @ theta["w_out"].T + theta["b_out"])[:, 0]
    after = {k: v.mean(0)[:, None] for k, v in memory.items()}
    return eta, {**theta, **after}, torch.stack(path)


def plain_meta_guard(method, task, theta, x, train, valid):
    """One decision after the other, as in the paper's two algorithms."""
    full = method.order == "full"
    losses, choices, t = [], [], method.steps
    for k in range(len(train) // t):
        steps = train[k * t : (k + 1) * t]
        probe, judges = valid[k, 0], valid[k, 1:].flatten()

        def judge(eta, judges=judges):
            value = task.loss(eta.detach(), judges).item()
            return value if math.isfinite(value) else math.inf

        def run(eta, theta, steps=steps):
            return g_T(task.loss, eta, theta, steps, full=full)

        eta = x.clone().requires_grad_()
        leaves = {name: v.clone().requires_grad_() for name, v in theta.items()}
        end, after, path = run(eta, leaves)
        ge, *gt = torch.autograd.grad(
            task.loss(end, probe), [eta, *leaves.values()], allow_unused=True
        )
        ge = ge.detach()
        stepped = {
            name: v - method.meta_lr * g
            for (name, v), g in zip(theta.items(), gt, strict=False)
        }
        y, theta_y = end.detach(), {name: v.detach() for name, v in after.items()}
        z, theta_z = x - method.lr * ge, stepped
        first = x.clone().requires_grad_()
        (g1,) = torch.autograd.grad(task.loss(first, steps[0]), first)
        if isinstance(method, SMG):
            options = [(y, theta_y, path), (z, theta_z, None)]
            a, b = (judge(run(p, m)[0]) for p, m, _ in options)
            pick = 1 if a > b else 0
        else:
            if judge(x) <= judge(y):
                z, theta_z = x - method.lr * g1, theta
            far, theta_far, far_path = run(z, theta_z)
            far, theta_far = far.detach(), {m: v.detach() for m, v in theta_far.items()}
            options = [
                (y, theta_y, path),
                (z, theta_z, None),
                (far, theta_far, far_path),
                (x, theta, None),
            ]
            if method.plain:
                options.append((x - method.lr * g1, theta, None))
            values = [judge(p) for p, *_ in options]
            pick = values.index(min(values))
        before = task.loss(x, steps[0])
        x, theta, kept = options[pick]
        if kept is None:
            rest = [task.loss(x, batch) for batch in steps[1:]]
            kept = torch.stack([before, *rest])
        losses.append(kept.detach())
        choices.append(pick)
    return x, theta, torch.cat(losses), choices


METHODS = [
    SMG(LSTM, steps=3, lr=0.3, n_c=2),
    SMG(LSTM, steps=3, lr=0.3, n_c=2, order="full"),
    SMG(LSTM, steps=1, lr=1.0, meta_lr=1.0, n_c=2),
    AMG(LSTM, steps=3, lr=0.3, n_c=2),
    AMG(LSTM, steps=3, lr=0.3, n_c=2, order="full"),
    AMG(LSTM, steps=2, lr=1.0, n_c=3, plain=True),
]


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_plain_algorithms(method):
    """Twelve decisions in float64; every kind of candidate is kept at least once."""
    task = blobs(items=40)
    seen = set()
    for seed in (1, 2, 3):
        theta = theta_of(LSTM, seed)
        train = batches(task, 4 * method.steps, 8, seed)
        valid = held_out(task, method, 4)
        state, trace = method.segment(
            task, {"proposal": theta}, method.init(start_of(task, seed)), train, valid
        )
        x, after, losses, choices = plain_meta_guard(
            method, task, theta, start_of(task, seed), train, valid
        )
        assert trace["choice"].tolist() == choices
        assert torch.allclose(trace["loss"], losses, rtol=1e-10)
        assert torch.allclose(state["params"], x, rtol=1e-9, atol=1e-11)
        for name, value in after.items():
            found = theta[name] + state["change"][name]
            assert torch.allclose(found, value, rtol=1e-9, atol=1e-11), name
        weights = [(after[k] - theta[k]).flatten() for k in theta.keys() - LSTM.memory]
        drift = torch.cat(weights).norm()
        assert trace["drift"][-1].item() == pytest.approx(drift.item(), rel=1e-9)
        seen |= set(choices)
    assert len(seen) > 1


def test_the_full_gradient_is_that_of_the_loss_at_the_end():
    """Against central differences, in x and in every part of theta."""
    task, guard = blobs(items=40), SMG(LSTM, steps=4, n_c=1, order="full")
    theta, x, train = theta_of(LSTM), start_of(task), batches(task, 4, 8)
    valid = held_out(task, guard, 1)[0]

    def fork(x, theta):
        state = guard.init(x) | {"params": x}
        return guard.fork(task, theta, state, train, valid)

    found, h = fork(x, theta), 1e-6
    for name, value in [("x", x), *theta.items()]:
        v = torch.randn_like(value)
        ends = []
        for sign in (1, -1):
            moved = value + sign * h * v
            at = fork(moved, theta) if name == "x" else fork(x, theta | {name: moved})
            ends.append(task.loss(at.end, valid[0]))
        grad = found.in_params if name == "x" else found.in_theta[name]
        expected = (ends[0] - ends[1]) / (2 * h)
        assert (grad * v).sum() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)


# ---- what is promised ----------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """Moves every coordinate by ``value``, with a memory that is its step count."""

    value: float

    def init_meta(self, seed: int) -> dict[str, Tensor]:
        return {"shift": torch.zeros(1), "count": torch.zeros(1, 1)}

    def init(self, params: Tensor) -> dict[str, Tensor]:
        return {"count": torch.zeros_like(params)[None]}

    def update(self, meta, grad, state, params, *, loss=None):
        step = torch.full_like(grad, self.value) + meta["shift"]
        return step, {"count": state["count"] + 1}

    def flops(self, n: int) -> int:
        return 0


@dataclass(frozen=True)
class Forgetful(Odd):
    """Goes down the gradient, in steps of ``value``, with a memory that is NaN."""

    def update(self, meta, grad, state, params, *, loss=None):
        return meta["shift"] - self.value * grad, {"count": state["count"] * math.nan}


PROPOSALS = {
    "nan": Odd(math.nan),
    "inf": Odd(math.inf),
    "huge": Odd(1e200),
    "zero": Odd(0.0),
    "drift": Odd(0.3),
    "forgetful": Forgetful(0.5),
    "lstm": LSTM,
}


def run(method, task, decisions: int = 12, seed: int = 0):
    """Yield the loss of all items at every decision, and what was kept."""
    metas = {"proposal": {k: v.double() for k, v in theta_of(LSTM).items()}}
    if isinstance(method.proposal, Odd):
        zeros = method.proposal.init_meta(0)
        metas = {"proposal": {k: v.double() for k, v in zeros.items()}}
    state = method.init(start_of(task))
    everything = torch.arange(task.items)
    for _k in range(decisions):
        before = state
        train = everything.expand(method.steps, -1)  # no noise in any of its losses
        state, trace = method.segment(task, metas, state, train, None)
        yield before, state, trace


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", PROPOSALS)
def test_amg_never_goes_up_and_with_the_plain_step_not_above_it(name, plain):
    """f(x+) <= f(x), and with ``plain`` <= f(x - lr grad f(x)); theta stays finite."""
    task = blobs()
    guard = AMG(PROPOSALS[name], 2, 0.5, validation="full", plain=plain)
    everything = torch.arange(task.items)
    for before, after, _ in run(guard, task):
        x = before["params"]
        bars = [x]
        if plain:
            bars.append(x - 0.5 * torch.func.grad(task.loss)(x, everything))
        for bar in bars:
            end = task.full_loss(after["params"])
            assert end <= task.full_loss(bar) + 1e-14
        assert all(v.isfinite().all() for v in after["change"].values())


@pytest.mark.parametrize("name", PROPOSALS)
def test_smg_lowers_its_own_objective(name):
    """The loss at the end of an unroll does not rise, with small steps (entry 19)."""
    task = blobs()
    guard = SMG(PROPOSALS[name], 2, 0.02, 0.001, validation="full", order="full")
    last = math.inf
    for _before, after, trace in run(guard, task):
        kept = trace["valid_l2o"] if trace["use_l2o"] else trace["valid_fallback"]
        if kept.isfinite():
            assert kept.item() <= last + 1e-12
            last = kept.item()
        assert after["params"].isfinite().all()
    assert name in ("nan", "inf", "huge") or last < math.inf


def test_amg_stalls_where_the_plain_step_does_not():
    """An unroll that always lands a little nearer to a trap (the book, Example 1)."""

    @dataclass(frozen=True)
    class Trap(Odd):
        def update(self, meta, grad, state, params, *, loss=None):
            target = 1 + (params.detach() - 1) / 2
            return target + 0 * params - params, {"count": state["count"] + 1}

    ends = {}
    for plain in (False, True):
        task = quadratic([1.0], [1.9])
        guard = AMG(Trap(0.0), 1, 1.0, validation="full", order="full", plain=plain)
        *_, (_, after, _) = run(guard, task, 40)
        ends[plain] = after["params"].item()
    assert ends[False] == pytest.approx(1.0, abs=1e-9)
    assert ends[True] == 0.0


@pytest.mark.parametrize("kind", [SMG, AMG])
def test_nothing_finite_leaves_all_as_it_is(kind):
    """From a point where no loss is finite the guard does not move, nor theta."""
    task = blobs()
    guard = kind(LSTM, 2, n_c=2)
    state = guard.init(torch.full((task.optimizee.layout.n,), math.inf).double())
    after, trace = guard.segment(
        task,
        {"proposal": theta_of(LSTM)},
        state,
        batches(task, 2, 8),
        held_out(task, guard, 1),
    )
    assert not trace["use_l2o"].any()
    assert after["params"].isinf().all()
    assert all(v.eq(0).all() for v in after["change"].values())


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_of_an_idle_or_broken_unroll_gradient_descent_with_rejection_is_left(value):
    """AMG over a proposal that does nothing (card, D6), or nothing finite."""
    task = blobs()
    guard = AMG(Odd(value), 3, 0.5, 0.0, validation="full")
    everything = torch.arange(task.items)
    for before, after, _ in run(guard, task):
        x = before["params"]
        step = x - 0.5 * torch.func.grad(task.loss)(x, everything)
        down = task.full_loss(step) < task.full_loss(x)
        assert torch.equal(after["params"], step if down else x)


def test_adapted_keeps_every_unroll_and_trains_the_weights():
    task, method = blobs(items=40), Adapted(LSTM, 3, n_c=2)
    theta, x, train = theta_of(LSTM), start_of(task), batches(task, 6, 8)
    valid = held_out(task, method, 2)
    state, trace = method.segment(
        task, {"proposal": theta}, method.init(x), train, valid
    )
    assert trace["use_l2o"].all()
    for k in range(2):
        steps = train[3 * k : 3 * k + 3]
        leaves = {name: v.clone().requires_grad_() for name, v in theta.items()}
        end, after, _ = g_T(task.loss, x, leaves, steps)
        loss = task.loss(end, valid[k, 0])
        grads = torch.autograd.grad(loss, list(leaves.values()))
        x = end.detach()
        theta = {
            name: after[name].detach() - 0.1 * g
            for name, g in zip(theta, grads, strict=True)
        }
    assert torch.allclose(state["params"], x, rtol=1e-9, atol=1e-11)
    first = theta_of(LSTM)
    for name, value in theta.items():
        assert torch.allclose(first[name] + state["change"][name], value, atol=1e-10)


# ---- in the loop ---------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]])
def test_replicas_do_not_see_each_other(method):
    task, metas = blobs(), {"proposal": theta_of(LSTM)}
    starts = torch.stack([start_of(task, k) for k in range(3)])
    starts[1] = math.inf
    idx = torch.stack([batches(task, 6, 8, seed=k) for k in range(3)])
    held = torch.stack([held_out(task, method, 2) for k in range(3)])

    def segment(state, train, valid):
        return method.segment(task, metas, state, train, valid)

    states = torch.func.vmap(method.init)(starts)
    together, traces = torch.func.vmap(segment)(states, idx, held)
    for k in range(3):
        alone, trace = segment(method.init(starts[k]), idx[k], held[k])
        assert torch.allclose(together["params"][k], alone["params"], equal_nan=True)
        assert torch.equal(traces["choice"][k], trace["choice"])


def digits(method: Any, **changes: Any) -> Training:
    """A training of two seeds for twenty steps."""
    base = Training(
        MLP((64, 6, 10)),
        "digits",
        method,
        steps=20,
        seeds=(0, 1),
        replicas=2,
        batch=16,
        segment=10,
        weights={"proposal": "none"},
    )
    return replace(base, **changes)


def test_a_training_resumes(tmp_path):
    work = digits(AMG(LSTM, 5, n_c=2), evaluations=2, audit_every=1)
    metas = {"proposal": LSTM.init_meta(0)}
    arrays = expect_resumable(work, tmp_path / "state", metas)
    assert arrays["choice"].shape == (2, 4)
    assert arrays["drift"].isfinite().all()


def test_a_comparison_says_what_the_next_decision_keeps():
    """Of the method itself: where its own run is ten steps later, theta adapted."""
    method, sgd = SMG(LSTM, n_c=2, lr=0.5), SGD(constant(0.5))
    lgl2o, work = LGL2O(Restarted(LSTM), sgd, n_c=2), digits(method)
    metas = {"proposal": {k: v.float() for k, v in theta_of(LSTM).items()}}
    others = {"LGL2O": lgl2o, "AMG": AMG(LSTM, n_c=2, lr=0.5), "SMG": method}
    compared = Compared.of(work, others=others)
    found, _ = drive(compared.job("cpu", False, metas))
    plain, _ = drive(work.job("cpu", False, metas))
    assert torch.equal(found["full_loss"], plain["full_loss"])
    assert torch.allclose(found["kept"][:, :-1], found["full_loss"][:, 1:], rtol=1e-4)
    assert torch.equal(found["kept.SMG"], found["kept"])
    assert found["drift"].max() > 0  # or theta would not matter
    # LGL2O with the theta that the run has by then, from its point, by hand
    task = Task(work.optimizee, load("digits"))
    job = replace(work, steps=10).job("cpu", False, metas)
    state = job.advance(job.start())
    train, valid = job.batches(10)
    for k in range(2):
        change, begun = (
            state["method"]["change"],
            lgl2o.init(state["method"]["params"][k]),
        )
        theta = {n: metas["proposal"][n] + change[n][k] for n in change}
        given = {"proposal": theta, "fallback": {}}
        then, _ = lgl2o.segment(task, given, begun, train[k], valid[k][:, 1:])
        expected = task.full_loss(then["params"]).float()
        assert torch.allclose(found["kept.LGL2O"][k, 0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (AMG(LSTM, 5), "must decide every 10 steps, by disjoint validation"),
        (AMG(LSTM, validation="full"), "must decide every 10 steps, by disjoint"),
    ],
)
def test_only_like_guards_are_compared(other, why):
    work = digits(AMG(LSTM))
    with pytest.raises(ValueError, match=why):
        Compared.of(work, others={"other": other})


@pytest.mark.parametrize(
    "method",
    [
        SMG(LSTM, steps=5, n_c=3),
        AMG(LSTM, steps=5, n_c=3),
        AMG(LSTM, steps=2, n_c=4, validation="iid", plain=True),
        AMG(LSTM, steps=2, validation="full"),
        Adapted(LSTM, steps=5, n_c=3),
    ],
)
def test_stated_cost_equals_counted_cost(method):
    """Passes counted inside the optimizee, matrix work counted by torch, a step."""
    steps, batch = 10, 8
    task = blobs(items=40)
    cost = method.cost(task.optimizee, batch, task.items)
    counted = replace(task, optimizee=Counted(task.optimizee))
    with FlopCounterMode(display=False) as counter:
        method.segment(
            counted,
            {"proposal": theta_of(LSTM)},
            method.init(start_of(task)),
            batches(task, steps, batch),
            held_out(task, method, steps // method.interval, batch),
        )
    assert counted.optimizee.gradients == pytest.approx(cost.gradients * batch * steps)
    assert counted.optimizee.forwards == pytest.approx(cost.forwards * batch * steps)
    assert counter.get_total_flops() == pytest.approx(cost.flops * steps, rel=0.02)


class Deep(Counted):
    """Notice the furthest point, of one coordinate, at which a loss was asked for."""

    furthest = 0.0

    def losses(self, params, batch):
        point = params
        while torch._C._functorch.is_gradtrackingtensor(point):
            point = torch._C._functorch.get_unwrapped(point)
        self.furthest = max(self.furthest, point.item())
        return super().losses(params, batch)


@pytest.mark.parametrize("kind", [SMG, AMG, Adapted])
def test_stated_depth_is_that_of_the_longest_chain_of_passes(kind):
    """On -x^2 / 2 from 1 a loss at x is the x-th pass in its chain: the unroll's steps
    are 1, the fallback goes from 1 to 1 + x for the gradient at x."""
    task = quadratic([-1.0], [1.0])
    guard = kind(Odd(1.0), 3, 1.0, 0.0, n_c=2)
    counted = replace(task, optimizee=Deep(task.optimizee))
    metas = {"proposal": guard.proposal.init_meta(0)}
    guard.segment(
        counted,
        metas,
        guard.init(start_of(task)),
        batches(task, 3, 4),
        held_out(task, guard, 1),
    )
    depth = guard.cost(task.optimizee, 4, task.items).depth
    assert counted.optimizee.furthest == pytest.approx(3 * depth)


def test_amg_is_cheaper_than_smg_at_the_papers_setting():
    """D10, counted: 2 unrolls and 4 losses against 3 unrolls and 2 losses."""
    lstm, mlp = LSTMOptimizer(learned_start=True), MLP((784, 20, 10))
    smg, amg = (kind(lstm).cost(mlp, 128, 60_000) for kind in (SMG, AMG))
    assert (10 * smg.gradients, 10 * amg.gradients) == pytest.approx((31, 21))
    assert (10 * smg.forwards, 10 * amg.forwards) == pytest.approx((29, 49))
    assert amg.flops < smg.flops


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("n_c", 0), ("lr", -1.0), ("order", "second"), ("validation", "no")],
)
def test_wrong_options_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*{value}"):
        SMG(LSTM, **{field: value})


def test_a_proposal_without_a_learned_start_is_refused():
    with pytest.raises(ValueError, match="learned_start=True"):
        AMG(LSTMOptimizer())
    train, valid = torch.zeros(9, 8).long(), torch.zeros(2, 11, 8).long()
    with pytest.raises(
        ValueError, match="must be a multiple of the 5 of a decision, with v"
    ):
        SMG(LSTM, 5).segment(blobs(), {}, {}, train, valid)


# ---- memories ------------------------------------------------------------------------


def test_a_learned_start_is_where_every_coordinate_begins():
    """As the LSTM that is given this memory; from then on as the one that has none."""
    theta, plain = theta_of(LSTM), LSTMOptimizer(hidden=3)
    params = torch.zeros(7).double()
    learned, given = LSTM.init(params), plain.init(params)
    given = {name: theta[name].expand_as(v) for name, v in given.items()}
    for k in range(4):
        grad = torch.randn(7, generator=torch.Generator().manual_seed(k)).double()
        ours, learned = LSTM.update(theta, grad, learned, params)
        theirs, given = plain.update(theta, grad, given, params)
        assert torch.equal(ours, theirs)
    assert LSTM.init_meta(3).keys() - plain.init_meta(3).keys() == set(plain.memory)


@pytest.mark.parametrize("average", [False, True])
def test_restarted_chains_unrolls_as_meta_guard_does(average):
    """Six steps are two unrolls of three; the second begins at the mean or anew."""
    task, theta, x = blobs(items=40), theta_of(LSTM), start_of(blobs(items=40))
    train = batches(task, 6, 8)
    alone = Alone(Restarted(LSTM, 3, average))
    state, trace = alone.segment(task, {"optimizer": theta}, alone.init(x), train, None)
    middle, after, first = g_T(task.loss, x, theta, train[:3])
    end, _, second = g_T(
        task.loss, middle.detach(), after if average else theta, train[3:]
    )
    assert torch.allclose(state["params"], end.detach(), rtol=1e-10)
    assert torch.allclose(trace["loss"], torch.cat([first, second]), rtol=1e-10)


def test_the_start_is_meta_trained(toy_data):
    """Its gradient comes from the first truncation of a rollout."""
    work = MetaTraining(LSTM, MLP((2, 4, 2)), toy_data, 8, 4, 6, 3)
    job = work.job("cpu", False, {})
    state = job.start()
    meta = job.layout.views(job.advance(state)["meta"])
    assert all(meta[name].ne(0).any() for name in LSTM.memory)
