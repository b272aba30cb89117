"""What trainings look at besides losses: idle weights, norms, heads."""

import math

import pytest
import torch
from problems import expect_resumable

from l2olib import looks
from l2olib.data import load, train_indices
from l2olib.learned.mlp import star
from l2olib.optimizees import MLP, Task
from l2olib.optimizers import SGD, AdamW, constant
from l2olib.spectra import Linearised
from l2olib.train import Alone, drive


@pytest.mark.parametrize("kind", [Linearised, looks.Idle, looks.Norms, looks.Heads])
def test_a_resumed_training_has_the_same_bits(kind, tmp_path):
    """Stopped after every piece, by way of its checkpoint."""
    more = {
        Linearised: {"size": 5},
        looks.Idle: {"seen": 64},
        looks.Heads: {"clocks": (100,)},
    }.get(kind, {})
    network = MLP((2, 4, 2))
    optimizer = AdamW(constant(1e-2), eps_root=1e-8)
    metas = {"optimizer": {}}
    if kind is looks.Heads:
        optimizer = star(network.layout)
        metas = {"optimizer": optimizer.init_meta(0)}
    work = kind(
        optimizee=network,
        data="moons",
        method=Alone(optimizer),
        steps=30,
        seeds=(0,),
        segment=10,
        batch=32,
        sample=64,
        **more,
    )
    expect_resumable(work, tmp_path / "half", metas)


def test_idle_weights_are_those_of_inputs_that_are_never_lit():
    """A sigmoid network has no dead units: what is idle can be told from the data."""
    work = looks.Idle(
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
    work = looks.Idle(
        optimizee=MLP((64, 8, 10), "sigmoid"), data="digits",
        method=Alone(AdamW(constant(0.01), weight_decay=-5.0)), steps=20, seeds=(0,),
        segment=10, batch=32, evaluations=2,
    )  # fmt: skip
    arrays, _ = drive(work.job("cpu", False, {"optimizer": {}}))
    assert arrays["growth"][0].tolist() == pytest.approx([1.05**10, 1.05**20])


def test_a_look_at_no_items_is_refused():
    with pytest.raises(ValueError, match="seen must be at least 1, not 0"):
        looks.Idle(
            optimizee=MLP((2, 4, 2)), data="moons", method=Alone(SGD(constant(0.1))),
            steps=10, seeds=(0,), segment=10, seen=0,
        )  # fmt: skip


def test_weights_of_a_dead_unit_are_idle_and_cutting_them_changes_little():
    """All items are seen; what changes is a unit that an idle weight had kept off."""
    work = looks.Idle(
        optimizee=MLP((64, 8, 10), "relu"), data="digits",
        method=Alone(SGD(constant(0.1))), steps=10, seeds=(0,), segment=10, batch=32,
        evaluations=1,
    )  # fmt: skip
    job = work.job("cpu", False, {"optimizer": {}})
    method = job.start()["method"]
    before = work.measure(job, method, 10)
    layout = work.optimizee.layout
    views = layout.views(method["params"][0].clone())
    views["b0"][3] = -100.0
    views["w1"][3] *= 50.0  # it would speak loudly
    dead = torch.cat([v.flatten() for v in views.values()])[None]
    found = work.measure(job, method | {"params": dead}, 10)
    added = (64 + 1 + 10) / layout.n  # some of them may have been idle before
    assert 0.5 * added < (found["idle"] - before["idle"]).item() <= added
    assert found["growth"] > 10
    views["b1"][0] = math.inf  # some other weight has diverged
    torn = torch.cat([v.flatten() for v in views.values()])[None]
    assert work.measure(job, method | {"params": torn}, 10)["growth"].isfinite()
    for look in (before, found):
        full, pruned = look["full_loss"].item(), look["pruned.full_loss"].item()
        assert pruned == pytest.approx(full, rel=1e-3)


def test_norms_are_those_of_each_tensor_at_each_mark():
    """Under pure weight decay each tensor shrinks by the same factor a step."""
    network = MLP((64, 8, 10), "sigmoid")
    zero = {"eps": 1e30}  # Adam's own part vanishes
    work = looks.Norms(
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


def test_heads_are_what_the_network_answers_at_each_clock():
    """Against updates of a training of one seed after the other, without a record."""
    network = MLP((64, 8, 10), "relu")
    optimizer = star(network.layout)
    meta = {k: 3 * v for k, v in optimizer.init_meta(1).items()}
    work = looks.Heads(
        optimizee=network, data="digits", method=Alone(optimizer), steps=20,
        seeds=(2, 3), replicas=2, segment=10, batch=32, evaluations=1,
        clocks=(7, 5_000), weights={"optimizer": "w"},
    )  # fmt: skip
    job = work.job("cpu", False, {"optimizer": meta})
    state = job.advance(job.advance(job.start()))
    arrays = job.finish(state)
    assert arrays["heads"].shape == (2, 2, 3, 4, 4)
    task = Task(network, load("digits"))
    for row, seed in enumerate(work.seeds):
        own = {k: v[row] for k, v in state["method"]["optimizer"].items()}
        params = state["method"]["params"][row]
        batch = train_indices(task.items, 32, seed, 20, 1)[0]
        grad = task.loss_and_grad(params, batch)[1]
        for column, clock in enumerate((20, 7, 5_000)):
            at = torch.tensor(clock)
            heads = optimizer.heads_at(meta, grad, own, params, at)
            mean, deviation, low, high = arrays["heads"][row, -1, column].T
            torch.testing.assert_close(mean, heads.mean(1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(deviation, heads.std(1), rtol=1e-4, atol=1e-5)
            assert (low <= mean).all() and (mean <= high).all()
            torch.testing.assert_close(high - low, heads.max(1)[0] - heads.min(1)[0])
            # and they are those that the step is made of
            step, new = optimizer.update(meta, grad, own | {"step": at}, params)
            d, q, n, _ = heads
            inverse = (new["r"] + 1e-6).rsqrt()
            blackbox = optimizer.step_mult * d * (1e-3 * q).exp() * inverse
            nominal = 1e-3 * (1e-3 * n).exp() * new["m"].mean(0) * inverse
            torch.testing.assert_close(
                step, -(blackbox + nominal), rtol=1e-4, atol=1e-6
            )
        reached = own["r"] > 0
        share = (reached & (own["r"] < 1e-6)).sum() / reached.sum()
        assert arrays["small"][row, -1].item() == pytest.approx(share.item())
        assert 0 < share < 1


def test_only_a_per_parameter_network_has_heads():
    with pytest.raises(ValueError, match="must be one MLPOptimizer alone"):
        looks.Heads(
            MLP((2, 4, 2)), "moons", Alone(SGD(constant(0.1))), 10, (0,), segment=10
        )
