"""Runs: groups of replicas, traces, checkpoints, time limit, what a record keeps."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from problems import (
    SRC,
    Clock,
    Noise,
    Stateless,
    Step,
    expect_resumable,
    make_toy_data,  # noqa: F401
    random_numbers,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from l2olib import records, train
from l2olib.data import DataError, find_root, load, train_indices, valid_indices
from l2olib.experiments import L2O
from l2olib.guards import LGL2O, Sequential, Shadow, Switch
from l2olib.learned.lstm import LSTMOptimizer
from l2olib.learned.mlp import MomentumMLP, blackbox, hyperparam, star
from l2olib.optimizees import MLP
from l2olib.optimizers import SGD, Adam, NAdamW, PowerDecay, constant
from l2olib.records import RecordError
from l2olib.train import (
    Alone,
    Released,
    Training,
    Unfinished,
    compiled,
    drive,
    log_spaced,
    shares,
    summarize,
)

LSTM = LSTMOptimizer()
SMALL = LSTMOptimizer(hidden=4)
TOY = MLP((2, 4, 2))
GD = SGD(constant(0.5))
WEIGHTS = find_root() / "data" / "optimizers" / f"{L2O}.safetensors.gz"


def trained_lstm() -> dict[str, torch.Tensor]:
    """The book's meta-trained weights, or fresh ones before they exist."""
    if not WEIGHTS.exists():
        return LSTM.init_meta(0)
    arrays, _ = records.read(WEIGHTS)
    return {k[5:]: v for k, v in arrays.items() if k.startswith("meta.")}


def metas_of(method, lstm=None):
    return {
        role: lstm if lstm is not None and optimizer == LSTM else optimizer.init_meta(0)
        for role, optimizer in method.optimizers.items()
    }


def work(method, **changes) -> Training:
    base = Training(TOY, "toy", method, 40, (0, 1), 2, 8, segment=10, audit_every=2)
    return replace(base, **changes)


def outcome(config: Training, lstm=None, **options):
    return drive(config.job("cpu", False, metas_of(config.method, lstm)), **options)[0]


def content(config: Training, arrays) -> str:
    return records.digest(records.spec(config), arrays)


METHODS = {
    "alone": Alone(Adam(PowerDecay(0.1, 5.0))),
    "guard": LGL2O(SMALL, SGD(PowerDecay(0.5, 10.0), 0.9), n_t=5, n_c=2),
    "algorithm 1": LGL2O(SMALL, GD, n_t=1, validation="full"),
    "shadow": Shadow(SMALL, GD, n_t=5, n_c=2, test=Sequential()),
    "iid": LGL2O(Noise(0.1), GD, n_t=10, n_c=9, validation="iid"),
    "fixed": LGL2O(Noise(0.1), GD, n_t=5, n_c=2, validation="fixed"),
    "no state": LGL2O(Stateless(0.3), Stateless(0.5), n_t=2, n_c=2),
    "switch": Switch(SMALL, SGD(PowerDecay(0.5, 10.0), 0.9), 25),
    "star": LGL2O(star(TOY.layout), GD, n_t=5, n_c=2),
    "huge": LGL2O(Step(1e38), Step(-1e38), n_t=2, n_c=2),
}
every_method = pytest.mark.parametrize("name", METHODS)


# ---- the same bits -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "steps"),
    [(Alone(LSTM), 1000), (LGL2O(LSTM, SGD(PowerDecay(3.0))), 100)],
)
def test_one_seed_alone_is_bit_identical(method, steps):
    """1,000 steps of an L2O: one seed asked for alone, and with its whole group."""
    lstm = trained_lstm()
    group = Training(MLP((2, 20, 2)), "circles", method, steps, (0, 1, 2), 3, 32)
    together = outcome(group, lstm)
    single = outcome(replace(group, seeds=(2,)), lstm)
    for name in ("loss", "bin_mean", "smooth", "full_loss", "test_loss", "test_error"):
        assert torch.equal(together[name][2:], single[name]), name
        assert not torch.equal(together[name][:1], single[name]), name


def test_a_short_last_group_is_padded(toy_data):
    """Seed 4 of the group 3, 4, 5, which is computed whole."""
    config = work(METHODS["guard"], seeds=(4,), replicas=3)
    assert list(config.group) == [3, 4, 5]
    whole = outcome(replace(config, seeds=(3, 4, 5)))
    assert torch.equal(outcome(config)["loss"], whole["loss"][1:2])


@every_method
def test_vmapped_and_plain_steps_agree(name, toy_data):
    """20 steps in float64, to 1e-9 relative."""
    method = METHODS[name]
    config = work(method, steps=20, segment=20)
    job = config.job("cpu", False, metas_of(method))
    metas = {
        role: {k: v.double() for k, v in meta.items()}
        for role, meta in job.metas.items()
    }
    starts = torch.stack([config.optimizee.init(s).double() for s in config.group])
    idx, held = job.batches(0)

    def segment(state, train, valid):
        return method.segment(job.task, metas, state, train, valid)

    together, traces = torch.func.vmap(
        segment, in_dims=(0, 0, None if held is None else 0)
    )(torch.func.vmap(method.init)(starts), idx, held)
    for k in range(2):
        alone, trace = segment(
            method.init(starts[k]), idx[k], None if held is None else held[k]
        )
        for ours, theirs in (
            (together["params"][k], alone["params"]),
            (traces["loss"][k], trace["loss"]),
        ):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@every_method
def test_a_segment_is_its_pieces(name, toy_data, monkeypatch):
    """Joined, they are one call of the method, bit for bit; what is traced for the
    compiler is a piece but for rounding."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    method = METHODS[name]
    job = work(method, steps=20, segment=20).job("cpu", False, metas_of(method))
    state = job.start()["method"]
    batches, held = job.batches(0)
    with torch.no_grad():
        whole_state, whole = job.piece(state, batches, held)
        after, trace = job.segment(0, state, batches, held)
        traced = compiled(job.piece, True)
        one = (batches[:, : method.interval], None if held is None else held[:, :1])
        found, _ = traced(state, *one)
        plain, _ = job.piece(state, *one)
    assert set(trace) == set(whole)
    exact = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(trace, whole, **exact)
    torch.testing.assert_close(after, whole_state, **exact)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6, equal_nan=True)


class Graph:
    """What CUDA's graphs do, on the CPU: run again on the same memory."""

    capturing = None

    def __init__(self):
        self.calls = []

    def __enter__(self):
        Graph.capturing = self

    def __exit__(self, *error):
        Graph.capturing = None

    def replay(self):
        for function, args, result in self.calls:
            for old, new in zip(result, function(*args), strict=True):
                old.copy_(new)


def capturable(function):
    def recorded(*args):
        result = function(*args)
        if Graph.capturing is not None:
            Graph.capturing.calls.append((function, args, result))
        return result

    return recorded


@pytest.fixture
def graphs(monkeypatch):
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)


def test_a_graph_reads_its_arguments_and_keeps_its_results(graphs):
    """One graph for each shape; a result is not overwritten by the next call."""

    def function(x, more):
        return x + 1, (x * 2 if more is None else x * more)

    fast = train.Captured(capturable(function), "cuda")
    xs = [torch.full((n,), float(v)) for n, v in ((2, 1), (2, 5), (3, 7), (2, 9))]
    with torch.no_grad():
        found = [fast(x, more) for x in xs for more in (None, torch.tensor(3.0))]
    expected = [
        (x + 1, x * (2 if more is None else 3)) for x in xs for more in (None, 3)
    ]
    torch.testing.assert_close(found, expected)
    assert len(fast.graphs) == 4
    x = xs[0].clone().requires_grad_()
    fast(x, None)[1].sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("broken", ["refuses", "differs"])
def test_what_makes_no_graph_runs_as_it_is(broken, graphs):
    def function(x):
        if Graph.capturing is not None:
            if broken == "refuses":
                raise RuntimeError("operation not permitted when stream is capturing")
            return (x,)
        return (x + 1,)

    fast = train.Captured(function, "cuda")
    said = "^no CUDA graph: (operation not|it computes)"
    with torch.no_grad(), pytest.warns(UserWarning, match=said):
        found = [fast(torch.tensor([v]))[0].item() for v in (1.0, 2.0)]
    assert found == [2.0, 3.0]


def test_a_piece_is_compiled_once(toy_data, monkeypatch):
    """The first piece starts from tensors of the strides that later ones have."""
    compilations, real = [], torch.compile

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda f, **options: real(f, backend=backend, **options)
    )
    config = work(METHODS["guard"])
    arrays, _ = drive(config.job("cpu", True, metas_of(config.method)))
    assert len(compilations) == 1
    torch.testing.assert_close(arrays["loss"], outcome(config)["loss"])


OPTIMIZERS = {
    "LSTM": SMALL,
    "SGD": SGD(PowerDecay(0.5, 10.0), 0.9),
    "Adam": Adam(constant(0.1)),
    "NAdamW": NAdamW(constant(0.1)),
    "Blackbox": blackbox(TOY.layout),
    "STAR": star(TOY.layout),
    "Hyperparam": hyperparam(TOY.layout),
    "MomentumMLP": MomentumMLP(TOY.layout),
    "Noise": Noise(0.1),
}


class FromHost(TorchDispatchMode):
    """Notes the operations that take tensors of the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        of, to = (
            {x.device.type for x in tree_leaves(each) if isinstance(x, torch.Tensor)}
            for each in ((args, kwargs), result)
        )
        if of == {"cpu"} and "cuda" in to:
            self.noted.append(str(func))
        return result


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_takes_nothing_from_the_host(name):
    """Such a copy cannot be captured in a graph; fake tensors show it without a GPU."""
    optimizer = OPTIMIZERS[name]
    meta = optimizer.init_meta(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, FromHost() as from_host:
        meta = {k: fake.from_tensor(v).to("cuda") for k, v in meta.items()}
        assert bool(from_host.noted) == bool(meta)  # it does see them
        params = torch.zeros(TOY.layout.n, device="cuda")
        state = optimizer.init(params)
        from_host.noted.clear()
        step, _ = optimizer.update(meta, params, state, params, loss=params.sum())
    assert step.device.type == "cuda" and not from_host.noted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_method
def test_a_graph_computes_what_eager_steps_do(name, toy_data):
    """50 steps in float64 on a GPU, with and without graphs."""
    method = METHODS[name]
    job = work(method, steps=50, segment=50).job("cuda", False, metas_of(method))
    job.metas = tree_map(torch.Tensor.double, job.metas)
    start = tree_map(
        lambda x: x.double() if x.is_floating_point() else x, job.start()["method"]
    )
    batches, held = job.batches(0)
    with torch.no_grad():
        fast = [job.segment(0, start, batches, held) for _ in range(2)]
        assert job.piece.graphs
        job.piece = job.piece.function
        plain = job.segment(0, start, batches, held)
    for found in fast:
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12, equal_nan=True)


@every_method
def test_two_runs_have_one_digest(name, toy_data):
    config = work(METHODS[name])
    first, second = (content(config, outcome(config)) for _ in range(2))
    assert first == second
    other = replace(config, seeds=(2, 3))
    assert content(other, outcome(other)) != first


@pytest.mark.parametrize("at", [4, 10, 25, 40, 41])
def test_switch_is_one_optimizer_and_then_the_other(at, toy_data):
    """The fallback starts afresh, at the right place of its schedule."""
    config = work(Switch(SMALL, SGD(PowerDecay(0.3, 5.0), momentum=0.9), at))
    method, found = config.method, outcome(config)["loss"]
    job = config.job("cpu", False, metas_of(method))
    for row, seed in enumerate(config.group):
        x = config.optimizee.init(seed)
        opt, state = method.proposal, method.proposal.init(x)
        for k in range(config.steps):
            if k == at:
                opt, state = method.fallback, method.fallback.init(x)
                state["step"] = torch.tensor(at)
            batch = job.batches(k // 10 * 10)[0][row, k % 10]
            loss, g = job.task.loss_and_grad(x, batch)
            assert found[row, k] == pytest.approx(loss.item(), rel=1e-4)
            meta = job.metas["proposal" if k < at else "fallback"]
            move, state = opt.update(meta, g, state, x)
            x = x + move
    with pytest.raises(ValueError, match="^at must be at least 1, not 0"):
        Switch(SMALL, GD, 0)


def test_after_the_switch_the_proposal_costs_nothing(toy_data, monkeypatch):
    asked = []
    update = LSTMOptimizer.update
    monkeypatch.setattr(
        LSTMOptimizer,
        "update",
        lambda self, *args, **more: asked.append(1) or update(self, *args, **more),
    )
    outcome(work(Switch(SMALL, GD, 14)))
    assert len(asked) == 14


# ---- checkpoints ---------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("limit", [2.5, 5.0])
def test_a_time_limit_stops_cleanly(name, limit, toy_data, tmp_path, monkeypatch):
    """Stopped again and again, a run still ends with the same digest."""
    config = work(METHODS[name])
    expected = content(config, outcome(config))
    path = tmp_path / "run.checkpoint"
    monkeypatch.setattr(train, "time", Clock())
    stops, spent = 0, []
    while True:
        try:
            arrays, seconds = drive(
                config.job("cpu", False, metas_of(config.method)),
                key="k",
                checkpoint=path,
                time_limit=limit if stops else 0.0,  # first before the first piece
                save_every=1e9,
            )
            break
        except Unfinished as stop:
            assert str(stop).startswith("stopped at " if stops else "stopped at 0 of")
            stops += 1
            spent.append(records.read(path)[1]["seconds"])
    assert stops >= 1 and spent == sorted(spent) and seconds > spent[-1]
    assert content(config, arrays) == expected


def test_a_killed_run_ends_with_the_same_digest(tmp_path):
    """SIGKILL at a random moment, then to the end in another process."""
    script = """
import sys
from pathlib import Path
from unittest.mock import MagicMock
from test_train import killed_work, metas_of
from l2olib.train import drive
config = killed_work()
drive(
    config.job("cpu", False, metas_of(config.method)),
    key="k",
    checkpoint=Path(sys.argv[1]),
    save_every=0,
    report=lambda done, total: print(done, flush=True),
)
"""
    path, config = tmp_path / "run.checkpoint", killed_work()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([SRC, str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        enough = random.randrange(20, 150)
        while int(process.stdout.readline()) < enough:
            pass
        time.sleep(random.random() / 50)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run must not end before"
    job = config.job("cpu", False, metas_of(config.method))
    done, total = job.position(records.unflatten(records.read(path)[0]))
    assert 0 < done < total
    resumed, _ = drive(job, key="k", checkpoint=path)
    assert content(config, resumed) == content(config, outcome(config))


def killed_work() -> Training:
    """A guarded run with an LSTM and momentum, in many pieces."""
    guard = LGL2O(SMALL, SGD(PowerDecay(3.0), 0.9), n_t=5, n_c=2)
    return Training(MLP((2, 5, 2)), "moons", guard, 400, (0, 1), 2, 16, 10)


def test_a_resumed_state_has_the_order_of_the_saved_one(toy_data, tmp_path):
    """Functions are compiled for a state as it is, its order included."""
    config, path = work(METHODS["alone"]), tmp_path / "run.checkpoint"
    job = config.job("cpu", False, metas_of(config.method))
    seen, advance = [], job.advance
    job.advance = lambda state: (seen.append(state), advance(state))[1]
    with pytest.raises(Unfinished):
        drive(job, key="k", checkpoint=path, time_limit=0.0)
    started = records.flatten(job.start())
    drive(job, key="k", checkpoint=str(path))
    assert list(records.flatten(seen[0])) == list(started) != sorted(started)


def test_a_checkpoint_without_a_key_is_refused(toy_data, tmp_path):
    """It could not be told from that of another configuration."""
    config, path = work(METHODS["alone"]), tmp_path / "run.checkpoint"
    with pytest.raises(ValueError, match="a checkpoint needs a key that names the con"):
        drive(config.job("cpu", False, metas_of(config.method)), checkpoint=path)
    assert not path.exists()


def test_a_checkpoint_of_another_configuration_is_refused(toy_data, tmp_path):
    config, path = work(METHODS["alone"]), tmp_path / "run.checkpoint"
    outcome(config, key="one", checkpoint=path, save_every=0)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="run.checkpoint .* another configuration"):
        outcome(config, key="two", checkpoint=path)
    flipped = before[:-10] + bytes([before[-10] ^ 1]) + before[-9:]
    for damaged in (before[:-10], flipped):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match="run.checkpoint is damaged"):
            outcome(config, key="one", checkpoint=path)
        assert path.read_bytes() == damaged, "nothing may be overwritten"


def test_progress_is_reported(toy_data):
    seen = []
    outcome(work(METHODS["alone"]), report=lambda *at: seen.append(at))
    assert seen == [(k, 40) for k in (0, 10, 20, 30, 40)]


# ---- what is recorded ----------------------------------------------------------------


def test_recorded_losses_are_those_before_each_step(toy_data):
    """An optimizer that does not move shows which batch and which seed is used."""
    config = work(Alone(Step(0.0)), seeds=(2, 3))
    arrays = outcome(config)
    job = config.job("cpu", False, metas_of(config.method))
    for row, seed in enumerate(config.seeds):
        x = config.optimizee.init(seed)
        idx = train_indices(64, 8, seed, 0, 40)
        expected = torch.stack([job.task.loss(x, batch) for batch in idx])
        assert torch.allclose(
            arrays["loss"][row], expected[arrays["steps"] - 1], rtol=1e-6
        )
        full = job.task.full_loss(x).item()
        assert arrays["full_loss"][row].tolist() == pytest.approx([full] * 4, rel=1e-6)
    assert arrays["marks"].tolist() == [10, 20, 30, 40]


def test_looks_may_take_a_sample(toy_data):
    """The first items of each split, in batches of the training's size; nothing else
    changes."""
    config = work(METHODS["alone"])
    whole, some = outcome(config), outcome(replace(config, sample=20))
    for name in ("loss", "bin_mean", "smooth"):
        assert torch.equal(whole[name], some[name])
    job = replace(config, sample=20, steps=10).job("cpu", False, {"optimizer": {}})
    params = job.advance(job.start())["method"]["params"]
    for row, x in enumerate(params):
        first = job.task.loss(x, torch.arange(20)).item()
        assert some["full_loss"][row, 0].item() == pytest.approx(first, rel=1e-6)
    assert not torch.equal(whole["full_loss"], some["full_loss"])


def test_full_losses_are_those_after_the_marked_step(toy_data):
    config = work(Alone(GD), seeds=(0,), replicas=1)
    arrays = outcome(config)
    job = config.job("cpu", False, {})
    x = config.optimizee.init(0)
    for batch in train_indices(64, 8, 0, 0, 20):
        x = x - 0.5 * job.task.loss_and_grad(x, batch)[1]
    at = arrays["marks"].tolist().index(20)
    for name in ("full_loss", "test_loss", "test_error"):
        expected = getattr(job.task, name)(x).item()
        assert arrays[name][0, at].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["guard", "algorithm 1", "iid", "fixed"])
def test_every_guard_leaves_its_decisions(name, toy_data):
    method = METHODS[name]
    arrays = outcome(work(method))
    decisions = 40 // method.n_t
    assert arrays["decisions"].tolist() == list(range(1, decisions + 1))
    chosen = arrays["valid_l2o"] < arrays["valid_fallback"]
    assert torch.equal(chosen.float(), arrays["use_l2o"])
    changes = chosen[:, 1:] != chosen[:, :-1]
    assert torch.equal(changes.int(), arrays["switches"][:, 1:])
    assert not arrays["switches"][:, 0].any()


def test_shares_of_decisions_in_bins():
    use = torch.tensor([[1.0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]])
    found = shares(use, torch.tensor([1, 3, 6]))
    assert found["use_l2o"].tolist() == [[1, 0.5, pytest.approx(1 / 3)],
                                         [0, 0, pytest.approx(1 / 3)]]  # fmt: skip
    assert found["switches"].tolist() == [[0, 1, 2], [0, 0, 1]]


def test_audits_are_true_losses_of_the_last_decision(toy_data):
    """With the full loss as criterion the audit must find what the guard found."""
    arrays = outcome(work(METHODS["algorithm 1"]))
    assert arrays["audit.full_proposal"].shape == (2, 2)
    for ours, theirs in (
        ("full_proposal", "valid_l2o"),
        ("full_fallback", "valid_fallback"),
    ):
        audit = arrays[f"audit.{ours}"]
        assert torch.allclose(audit, arrays[f"audit.{theirs}"], rtol=1e-6)
        # After every second segment of 10 decisions: decisions 20 and 40.
        columns = [arrays["decisions"].tolist().index(k) for k in (20, 40)]
        assert torch.allclose(audit, arrays[theirs][:, columns], rtol=1e-6)


def test_an_optimizer_released_from_its_own_run_repeats_it(toy_data):
    """SGD has no memory but its clock: 20 steps on it is where its run is then."""
    sgd = SGD(PowerDecay(0.5, 10.0))
    config = Released.of(
        work(Alone(sgd), evaluations=40, seeds=(1,)), after=sgd, ahead=20
    )
    arrays, _ = drive(config.job("cpu", False, {"optimizer": {}}))
    assert arrays["marks"].tolist() == [10, 20, 30, 40]
    own, after = arrays["full_loss"][0], arrays["released"][0]
    assert torch.equal(after[:2], own[2:]) and (after[2:] < own[2:]).all()


def test_a_released_run_resumes_to_the_same_bits(toy_data, tmp_path):
    method = LGL2O(SMALL, GD, n_t=5, n_c=2)
    config = Released.of(work(method), after=GD, ahead=10)
    whole = expect_resumable(config, tmp_path / "checkpoint", metas_of(method))
    assert whole["released"].isfinite().all()


def test_no_audit_when_none_is_asked_for(toy_data):
    arrays = outcome(work(METHODS["guard"], audit_every=0))
    assert not [name for name in arrays if name.startswith("audit")]


def test_validation_batches_of_each_mode(toy_data):
    for mode in ("disjoint", "iid", "fixed"):
        method = LGL2O(SMALL, GD, n_t=5, n_c=2, validation=mode)
        config = work(method, segment=20)
        idx, held = config.job("cpu", False, metas_of(method)).batches(20)
        assert held.shape == (2, 4, 2, 8)
        for row, seed in enumerate(config.group):
            assert torch.equal(idx[row], train_indices(64, 8, seed, 20, 20))
            for d in range(4):
                used = set(idx[row, 5 * d : 5 * d + 5].flatten().tolist())
                own = held[row, d]
                if mode == "fixed":
                    expected = valid_indices(64, 8, [(seed, 0)], 2, None)
                else:
                    train = idx[row, None, 5 * d : 5 * d + 5]
                    expected = valid_indices(64, 8, [(seed, 4 + d)], 2, train, mode)
                assert torch.equal(own, expected[0])
                if mode == "disjoint":
                    assert not used & set(own.flatten().tolist())


def test_methods_are_paired(toy_data):
    """Every method gets the same initial parameters and training batches."""
    jobs = [
        work(method).job("cpu", False, metas_of(method)) for method in METHODS.values()
    ]
    first, *others = jobs
    for job in others:
        assert torch.equal(
            job.start()["method"]["params"], first.start()["method"]["params"]
        )
        assert torch.equal(job.batches(30)[0], first.batches(30)[0])


# ---- bad requests --------------------------------------------------------------------


class Nameless(Alone):
    """A method that decides something and does not say whom it chose."""

    traces = ("chosen",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 45}, "multiple of the segment, 10, not 45"),
        ({"steps": 0}, "positive multiple of the segment, 10, not 0"),
        ({"segment": 8}, "multiple of the decision interval, 5, not 8"),
        ({"seeds": (1, 2)}, "one group of 2"),
        ({"seeds": (-1,), "replicas": 1}, "non-negative"),
        ({"seeds": ()}, "one group of 2"),
        ({"seeds": (1, 1)}, "distinct"),
        ({"method": GD}, "is no method of training: wrap an optimizer in Alone"),
        ({"method": Nameless(GD)}, "^the traces of .* lack use_l2o"),
        ({"seeds": 3}, r"^seeds must be several, such as \(3,\)"),
        ({"replicas": 0}, "^replicas must be at least 1, not 0"),
        ({"segment": 0}, "^segment must be at least 1, not 0"),
        ({"sample": -5}, "^sample must be at least 0, not -5"),
        ({"evaluations": 0}, "^evaluations must be at least 1, not 0"),
        ({"audit_every": -1}, "^audit_every must be at least 0, not -1"),
    ],
)
def test_impossible_runs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        work(**{"method": METHODS["guard"]} | changes)


def test_a_release_is_whole_segments():
    with pytest.raises(ValueError, match="multiple of the segment, 10, not 15"):
        Released.of(work(METHODS["alone"]), after=GD, ahead=15)
    for after in (None, LSTM):
        with pytest.raises(ValueError, match="after must be an optimizer without"):
            Released.of(work(METHODS["alone"]), after=after, ahead=10)


def test_a_learned_optimizer_needs_weights(toy_data):
    with pytest.raises(ValueError, match="^the optimizer is a learned optimizer with"):
        work(Alone(SMALL)).job("cpu", False, {"optimizer": {}})
    with pytest.raises(ValueError, match="has no proposer: give weights to proposal"):
        work(LGL2O(SMALL, GD), weights={"proposer": "x"})


def test_weights_of_another_architecture_are_refused(toy_data):
    with pytest.raises(ValueError, match="^these weights are not for the optimizer"):
        work(Alone(SMALL)).job("cpu", False, {"optimizer": LSTM.init_meta(0)})


def test_a_batch_larger_than_the_data_is_refused(toy_data):
    config = work(METHODS["alone"], batch=65)
    with pytest.raises(DataError, match="batch of 65 is larger than the 64 .* of toy"):
        outcome(config)


def test_too_few_items_for_validation_are_refused(toy_data):
    config = work(LGL2O(SMALL, GD, n_t=5, n_c=4))
    with pytest.raises(DataError, match="need 32 unused items, but only 24"):
        outcome(config)


# ---- thinning ------------------------------------------------------------------------


def test_log_spaced():
    assert log_spaced(1, 8, 4) == [1, 2, 4, 8]
    assert log_spaced(50, 400, 4, step=50) == [50, 100, 200, 400]
    assert log_spaced(1, 1, 10) == [1]
    points = log_spaced(1, 10_000, 300)
    assert points[0] == 1 and points[-1] == 10_000
    assert points == sorted(set(points)) and 200 <= len(points) <= 300


def test_summaries_of_a_ramp():
    """Losses 1, 2, 3, ... make every mean a number that can be said in advance."""
    loss = torch.arange(1.0, 1001).repeat(2, 1)
    loss[1] *= 2
    found = summarize(loss, points=20)
    steps = found["steps"]
    before = torch.cat([torch.zeros(1), steps[:-1]])
    assert torch.equal(found["loss"], loss[:, steps - 1])
    # The mean of a + 1 .. b is (a + 1 + b) / 2.
    assert torch.equal(found["bin_mean"][0], (before + 1 + steps) / 2)
    assert torch.equal(found["bin_mean"][1], before + 1 + steps)
    late = steps >= 300
    assert torch.equal(found["smooth"][0, late], (2 * steps[late] - 99) / 2.0)
    assert torch.equal(found["smooth"][0, ~late], steps[~late].float())
    for last, smooth in ((299, 299.0), (300, 250.5)):
        assert summarize(loss[:, :last])["smooth"][0, -1] == smooth


def test_bins_partition_the_run():
    loss = random_numbers(0, 3, 777).float()
    found = summarize(loss)
    width = torch.diff(found["steps"], prepend=torch.zeros(1, dtype=torch.int64))
    total = (found["bin_mean"].double() * width).sum(1)
    assert torch.allclose(total, loss.double().sum(1), rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_stays_in_its_own_bin(bad):
    loss = torch.ones(2, 1000)
    loss[0, 500] = bad
    found = summarize(loss)
    own = int((found["steps"] >= 501).int().argmax())
    good = torch.ones_like(found["bin_mean"], dtype=torch.bool)
    good[0, own] = False
    assert found["bin_mean"][good].eq(1).all()
    assert not found["bin_mean"][0, own].isfinite()
    seen = (found["steps"] >= 501) & (found["steps"] < 601)
    assert not found["smooth"][0, seen].isfinite().any()
    assert found["smooth"][0, ~seen].eq(1).all()
    assert found["smooth"][1].eq(1).all()


@pytest.mark.parametrize("steps", [1, 2, 99, 300])
def test_short_runs_can_be_summarized(steps):
    found = summarize(torch.ones(1, steps))
    assert found["steps"][-1] == steps
    assert all(found[k].eq(1).all() for k in ("loss", "bin_mean", "smooth"))


def test_data_is_loaded_once(toy_data):
    assert load("toy") is load("toy")


def test_estimates_grow_with_the_work():
    short = work(METHODS["guard"]).seconds()
    assert work(METHODS["guard"], steps=80).seconds() == pytest.approx(2 * short)
    assert work(METHODS["guard"], replicas=4).seconds() > short


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch
def test_a_process_can_compile_one_job_after_another():
    """Each is a new function of the same code: Dynamo counts these and gives up."""

    def job(k):
        return compiled(lambda x: x + k, True)

    limits = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(**limits):
        for k in range(3):
            assert torch.equal(job(k)(torch.ones(3)), torch.full((3,), 1.0 + k))
