"""Per-parameter MLP optimizers against golden vectors of the public reference code.

The files ``golden/star/star_golden_SET_CASE.npz`` are outputs of
google/learned_optimization (Apache-2.0, snapshot 32186aa4) on random inputs, with runs
in float32 and float64. A file of another set that is put beside them is tested, too.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import (
    batches,
    blobs,
    expect_resumable,
    make_toy_data,  # noqa: F401
    random_numbers,
    start_of,
)
from torch.utils.flop_counter import FlopCounterMode

from l2olib import records
from l2olib.learned import mlp
from l2olib.learned.mlp import (
    MLPOptimizer,
    MomentumMLP,
    blackbox,
    factored,
    features,
    hyperparam,
    inverse_rms,
    network,
    star,
    star_as_described,
)
from l2olib.metatrain.truncated import (
    MetaTraining,
    meta_gradient,
)
from l2olib.optimizees import MLP, ConvNet, Layout
from l2olib.optimizers import AdamW, CosineDecay, NAdamW, constant
from l2olib.train import Alone, Training, TrainingJob, drive, inner_steps

GOLDEN = Path(__file__).parent / "golden" / "star"


def extras(layout):
    return replace(
        star(layout),
        decay_controller=True,
        weight_decay=0.02,
        aggregate_magnitude=True,
        aggregate_nominal=True,
        self_normalize=True,
    )


def towards(direction):
    return lambda layout: replace(star(layout), nominal_direction=direction)


LEARNED = {
    "blackbox_init": blackbox,
    "blackbox": blackbox,
    "star_paper_init": star,
    "star_paper": star,
    "hyperparam_init": hyperparam,
    "hyperparam": hyperparam,
    "star_default": MLPOptimizer,
    "star_noprecond": lambda layout: replace(star(layout), precondition=False),
    "star_nonominal": lambda layout: MLPOptimizer(layout, precondition=True),
    "star_edge_decays": star,
    "star_extras": extras,
    "star_nom_SGD": towards("SGD"),
    "star_nom_SGDM": towards("SGDM"),
    "star_nom_AggMo": towards("AggMo"),
    "star_nom_Adam": towards("Adam"),
    "mlp_lopt": MomentumMLP,
}
COSINE = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-5, "weight_decay": 0.01, "l2": 0.01}
BASELINES = {
    "nadamw_const": NAdamW(constant(0.01), 0.9, 0.99, 1e-6),
    "nadamw_defaults": NAdamW(constant(1e-4)),
    "nadamw_nonest_wd_l2": NAdamW(
        constant(0.02), 0.8, 0.95, 1e-3, 0.05, 0.03, nesterov=False
    ),
    "nadamw_cosine_warm": NAdamW(CosineDecay(0.03, 25, 0.05, 0.4, 0.1), **COSINE),
    "nadamw_cosine_nowarm": NAdamW(CosineDecay(0.03, 25, 0.0, 0.4, 0.1), **COSINE),
    "adam_baseline": AdamW(constant(0.01), eps_root=1e-8),
    "outer_adamw_clip1": AdamW(constant(0.01), weight_decay=0.5),
}


def files(cases):
    """The files of these cases, of every set; at least one each."""
    found = [sorted(GOLDEN.glob(f"star_golden_?_{case}.npz")) for case in cases]
    assert all(found)
    return [pytest.param(p, id=p.stem[12:]) for paths in found for p in paths]


def case_of(path):
    return path.stem[14:]


PRECISIONS = {"64": torch.float64, "32": torch.float32}


class Golden:
    """One file of golden vectors, read in one precision."""

    def __init__(self, path, bits):
        self.z = np.load(path)
        self.bits, self.dtype = bits, PRECISIONS[bits]
        names = [k.partition("/")[2] for k in self.z if k.startswith("params0/")]
        shapes = {n: self.z[f"params0/{n}"].shape for n in names}
        self.layout = Layout(shapes)
        self.meta = {
            k.partition("/")[2]: self.tensor(k) for k in self.z if k.startswith("theta")
        }

    def tensor(self, key):
        return torch.tensor(self.z[key], dtype=self.dtype)

    def flat(self, kind, step=None):
        rows = {n: self.tensor(f"{kind}/{n}") for n in self.layout.shapes}
        if step is not None:
            rows = {n: v[step] for n, v in rows.items()}
        return self.layout.flatten(rows)

    @property
    def tolerance(self):
        """As its README asks: three times the reference's own spread in float32."""
        if self.bits == "64":
            return 1e-10
        runs = (f"traj32/{n}" for n in self.layout.shapes)
        spread = max(
            np.abs(self.z[k].astype(float) - self.z[k.replace("32", "64")]).max()
            for k in runs
        )
        return max(3 * spread, 3e-6)

    def run(self, optimizer, steps=None, clip=math.inf):
        """Yield (step, gradient, parameters before, state before, after, delta)."""
        params = self.flat("params0")
        state = optimizer.init(params)
        for k in range(steps or len(self.z["losses"])):
            grad = self.flat("grads", k).clamp(-clip, clip)
            delta, new = optimizer.update(self.meta, grad, state, params)
            yield k, grad, params, state, new, delta
            params, state = params + delta, new

    def check(self, optimizer, clip=math.inf):
        tolerance = self.tolerance
        for k, _, params, _, _, delta in self.run(optimizer, clip=clip):
            for trajectory in {"traj64", f"traj{self.bits}"}:
                expected = self.flat(trajectory, k + 1)
                worst = (params + delta - expected).abs().max().item()
                assert worst <= tolerance, (trajectory, k)


@pytest.mark.parametrize("bits", PRECISIONS)
@pytest.mark.parametrize("path", files(LEARNED))
def test_learned_optimizers_take_the_references_steps(path, bits):
    golden = Golden(path, bits)
    golden.check(LEARNED[case_of(path)](golden.layout))


@pytest.mark.parametrize("bits", PRECISIONS)
@pytest.mark.parametrize("path", files(BASELINES))
def test_baselines_take_the_references_steps(path, bits):
    optimizer, golden = BASELINES[case_of(path)], Golden(path, bits)
    golden.check(optimizer, 1.0 if "clip" in case_of(path) else math.inf)
    for k, rate in enumerate(golden.z["lr64"] if "lr64" in golden.z else ()):
        found = optimizer.lr(torch.tensor(k + 1), golden.dtype).item()
        assert found == pytest.approx(rate, rel=1e-6, abs=1e-9)


def matrix(blocks, shape):
    """Features of one tensor as the rows of ``[elements, channels]``."""
    whole = [b.expand(len(b), *shape).flatten(1) for b in blocks]
    return torch.cat(whole).T


@pytest.mark.parametrize("bits", PRECISIONS)
@pytest.mark.parametrize("path", files([c for c in LEARNED if c != "mlp_lopt"]))
def test_features_heads_and_averages_are_the_references(path, bits):
    case, golden = case_of(path), Golden(path, bits)
    optimizer = LEARNED[case](golden.layout)
    z, at = golden.z, int(golden.z["feat_step"])
    *_, (k, grad, params, before, after, _) = golden.run(optimizer, at + 1)
    assert k == at
    loose = bits == "32" and case == "star_edge_decays"
    close = {"rtol": 1e-11, "atol": 1e-11}
    if bits == "32":  # the reference's float32 is off by up to 3e-4 there, 9e-6 else
        close = {"rtol": 1e-3, "atol": 1e-3} if loose else {"rtol": 1e-4, "atol": 3e-5}

    def same(found, key, scale=1.0):
        expected = torch.tensor(z[f"{key}"], dtype=found.dtype)
        worst = {**close, "atol": close["atol"] * scale}
        assert torch.allclose(found, expected, **worst), key

    for name, rate in optimizer.rates(golden.meta).items():
        decays = torch.tensor(z[f"decay64/{name}_decays"], dtype=golden.dtype)
        decays = decays if name == "momentum" else decays.clamp(0, 1)
        assert torch.allclose(1 - rate, decays, atol=1e-6 if bits == "32" else 1e-14)
    layouts = {
        "g": (optimizer.tensors, grad),
        "p": (optimizer.tensors, params),
        "m": (optimizer.tensors, after["m"]),
        "r": (optimizer.tensors, after["r"]),
        "row": (optimizer.rows, after["row"]),
        "col": (optimizer.columns, after["col"]),
    }
    views = {k: layout.views(flat) for k, (layout, flat) in layouts.items()}
    t = before["step"].to(golden.dtype)
    time = torch.tanh(t / torch.tensor(mlp.HORIZONS) - 1).to(golden.dtype)
    for name, shape in optimizer.tensors.shapes.items():
        x = [views[k][name] for k in layouts]
        blocks = list(features(*x).values())
        raw = matrix(blocks, shape)
        if bits == "64":
            same(raw, f"feat_raw64/{name}")
        fed = raw * torch.cat([inverse_rms(b) for b in blocks])
        fed = torch.cat([fed, time.expand(len(fed), -1)], 1)
        same(fed, f"feat{bits}/{name}")
        heads = torch.stack(network(golden.meta, blocks, before["step"]), -1)
        # Heads of the large random theta reach hundreds.
        big = torch.tensor(z[f"mlp_out64/{name}"]).abs().max().clamp(min=1).item()
        same(heads.flatten(0, -2), f"mlp_out{bits}/{name}", big)
        whole = golden.layout.shapes[name]
        same(x[2].movedim(0, -1).reshape(*whole, 3), f"state_mom{bits}/{name}")
        same(x[3].reshape(*whole, 1), f"state_rms{bits}/{name}")
        kinds = ("vrow", "vcol") if factored(shape) else ("vdiag",)
        for kind, value in zip(kinds, x[4:], strict=False):
            stored = z[f"state_{kind}{bits}/{name}"].shape
            same(value.movedim(0, -1).reshape(stored), f"state_{kind}{bits}/{name}")


# ---- what the golden vectors do not say ----------------------------------------------

SMALL = Layout({"w": (4, 3), "b": (3,), "k": (2, 2, 3, 3), "s": ()})
FAMILY = {
    "blackbox": blackbox(SMALL),
    "star": star(SMALL),
    "hyperparam": hyperparam(SMALL),
    "as described": star_as_described(SMALL),
    "extras": extras(SMALL),
    "momentum": MomentumMLP(SMALL, hidden=5),
}


def middle(optimizer, steps=3, seed=0):
    """Double meta-parameters, parameters and state after a few steps."""
    meta = {
        k: v.double() + 0.05 * random_numbers(9, *v.shape)
        for k, v in optimizer.init_meta(seed).items()
    }
    params = random_numbers(seed, optimizer.layout.n)
    state = optimizer.init(params)
    for k in range(steps):
        grad = 0.1 * random_numbers(50 + k, len(params))
        delta, state = optimizer.update(meta, grad, state, params)
        params = params + delta
    return meta, params, state


@pytest.mark.parametrize("dtype", PRECISIONS.values())
def test_a_rate_is_what_the_rounding_of_its_decay_leaves(dtype):
    """Close to a decay of 1, where the reference forms the decay first (float: NumPy).

    The rate itself, without that rounding, would be another.
    """
    kind = np.float64 if dtype == torch.float64 else np.float32
    offset = -1.5 if dtype == torch.float64 else -0.5
    meta = star(SMALL).init_meta(0)
    meta = {k: (v + offset * k.endswith("decays")).to(dtype) for k, v in meta.items()}
    found = star(SMALL).rates(meta)["rms"].numpy()
    logit = np.log(1 - kind(0.999)) / kind(10) + kind(offset)
    decay = 1 - np.exp(kind(10) * logit)
    assert found == 1 - decay
    exact = 0.001 * math.exp(10 * offset)
    assert abs(found - exact) > 1e-9 * exact


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (blackbox, 197),
        (star, 207),
        (hyperparam, 207),
        (star_as_described, 203),
        (MomentumMLP, 1_762),
    ],
)
def test_meta_parameters(make, count):
    meta = make(SMALL).init_meta(0)
    assert sum(v.numel() for v in meta.values()) == count
    other = make(SMALL).init_meta(1)
    for name, value in meta.items():
        if name.startswith("w"):
            bound = 2 / math.sqrt(len(value))
            assert value.abs().max() <= bound and not torch.equal(value, other[name])
        else:
            assert not value.any()
    many = torch.cat([star(SMALL).init_meta(s)["w0"].flatten() for s in range(50)])
    # A normal cut at two deviations has 0.8796 of its deviation; 7,800 draws.
    assert many.std().item() * math.sqrt(39) == pytest.approx(0.8796, abs=0.02)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((784, 128), (-1, -2)),
        ((128, 784), (-2, -1)),
        ((128, 128), (-2, -1)),
        ((3, 3, 3, 32), (-2, -1)),
        ((3, 3, 64, 64), (-2, -1)),
        ((7,), None),
    ],
)
def test_rows_and_columns_are_chosen_by_size_then_position(shape, axes):
    assert factored(shape) == axes


def test_rows_of_a_square_layer_are_not_its_columns():
    """Else a layer in (out, in) order would do as well."""
    g = random_numbers(0, 5, 5)
    optimizer = star(Layout({"w": (5, 5)}))
    meta = {k: v.double() for k, v in optimizer.init_meta(0).items()}
    p = torch.zeros(25, dtype=torch.float64)
    one, _ = optimizer.update(meta, g.flatten(), optimizer.init(p), p)
    two, _ = optimizer.update(meta, g.T.flatten(), optimizer.init(p), p)
    assert (one.view(5, 5) - two.view(5, 5).T).abs().max() > 1e-3 * one.abs().max()


def test_every_architecture_stores_input_before_output():
    shapes = MLP((784, 128, 10)).layout.shapes
    assert shapes["w0"] == (784, 128)
    shapes = ConvNet((3, 32, 32), (8, 16), (3, 3), (2, 2), 10).layout.shapes
    assert shapes["k1"] == (3, 3, 8, 16)


@pytest.mark.parametrize("name", FAMILY)
def test_tensors_see_each_other_only_through_shared_weights(name):
    """The same tensors in another order, and a NaN that stays in its tensor."""
    optimizer = FAMILY[name]
    meta, params, state = middle(optimizer, 0)
    grad = random_numbers(1, len(params))
    delta, _ = optimizer.update(meta, grad, state, params)
    turned = Layout(dict(reversed(SMALL.shapes.items())))
    other = replace(optimizer, layout=turned)
    again, _ = other.update(
        meta,
        turned.flatten(SMALL.views(grad)),
        other.init(params),
        turned.flatten(SMALL.views(params)),
    )
    expected = turned.flatten(SMALL.views(delta))
    assert torch.allclose(again, expected, rtol=1e-12, atol=1e-15)
    grad[0] = math.nan
    hurt = SMALL.views(optimizer.update(meta, grad, state, params)[0])
    assert hurt.pop("w").isnan().all()
    assert all(torch.equal(v, SMALL.views(delta)[k]) for k, v in hurt.items())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15, -1e15])
@pytest.mark.parametrize("name", FAMILY)
def test_extreme_gradients_give_finite_steps(name, value):
    optimizer = FAMILY[name]
    meta, params = optimizer.init_meta(0), torch.zeros(SMALL.n)
    state = optimizer.init(params)
    for _ in range(3):
        grad = torch.full_like(params, value)
        delta, state = optimizer.update(meta, grad, state, params)
        assert delta.isfinite().all()
        assert all(v.isfinite().all() for v in state.values())


@pytest.mark.parametrize("name", FAMILY)
def test_vmap_equals_a_loop(name):
    optimizer = FAMILY[name]
    runs = [middle(optimizer, 3, seed) for seed in range(3)]
    grads = [random_numbers(7 + k, SMALL.n) for k in range(3)]
    stacked = [
        {k: torch.stack([r[i][k] for r in runs]) for k in runs[0][i]}
        if i != 1
        else torch.stack([r[1] for r in runs])
        for i in range(3)
    ]
    together, states = torch.func.vmap(optimizer.update)(
        stacked[0], torch.stack(grads), stacked[2], stacked[1]
    )
    for k, (meta, params, state) in enumerate(runs):
        delta, new = optimizer.update(meta, grads[k], state, params)
        assert torch.allclose(together[k], delta, rtol=1e-12, atol=1e-15)
        for key, value in new.items():
            assert torch.allclose(states[key][k], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", FAMILY)
def test_the_form_that_is_compiled_gives_the_same_steps(name, monkeypatch):
    """Sums in place of matrix products."""
    optimizer = FAMILY[name]
    meta, params, state = middle(optimizer)
    grad = random_numbers(3, SMALL.n)
    delta, _ = optimizer.update(meta, grad, state, params)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, _ = optimizer.update(meta, grad, state, params)
    assert torch.allclose(found, delta, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", FAMILY)
def test_work_equals_what_torch_counts(name):
    optimizer = FAMILY[name]
    meta, params = optimizer.init_meta(0), torch.zeros(SMALL.n)
    with FlopCounterMode(display=False) as counter:
        optimizer.update(meta, params, optimizer.init(params), params)
    assert optimizer.flops(SMALL.n) == counter.get_total_flops()


def test_what_is_constant_along_an_axis_saves_a_third_of_the_work():
    layout = MLP((784, 128, 128, 10)).layout
    assert layout.n == 118_282
    work = star(layout).flops(layout.n) / (2 * layout.n)
    assert 96 <= work < 97  # 28 * 4 + 4 * 4 + 4 * 4 = 144 without


@pytest.mark.parametrize("spike", [1e2, 1e6, 1e12])
def test_a_decay_learned_to_zero_forgets_everything(spike):
    """An offset of 0.75 clips the decay of squares to 0: r is the last square alone."""
    optimizer = star(Layout({"v": (1,)}))
    meta = optimizer.init_meta(0)
    meta["rms_decays"] = torch.full_like(meta["rms_decays"], 0.75)
    params = torch.ones(1)
    state = optimizer.init(params)
    for value in (spike, 1e-2):
        grad = torch.tensor([value])
        _, state = optimizer.update(meta, grad, state, params)
    assert torch.equal(state["r"], grad.square())


def test_the_learned_nominal_scale_multiplies_the_nominal_term():
    optimizer = replace(hyperparam(SMALL), learn_nominal=True)
    meta, params, state = middle(optimizer)
    grad = random_numbers(3, SMALL.n)
    meta["nominal_scale"] = torch.zeros(1, dtype=torch.float64)
    one, _ = optimizer.update(meta, grad, state, params)
    meta["nominal_scale"] = torch.full((1,), 0.1, dtype=torch.float64)
    two, _ = optimizer.update(meta, grad, state, params)
    assert torch.allclose(two, math.e * one, rtol=1e-12)


def test_without_normalization_the_network_reads_raw_features():
    """Against torch.nn on the stored features of one matrix, time appended."""
    layout = Layout({"w": (4, 3)})
    optimizer = replace(blackbox(layout), normalize=False)
    meta, params, before = middle(optimizer)
    grad = 1e3 * random_numbers(60, 12)  # far from the scale of normalised features
    delta, after = optimizer.update(meta, grad, before, params)
    m, r = after["m"].view(3, 4, 3), after["r"].view(4, 3)
    row, col = after["row"].view(3, 3), after["col"].view(3, 4)
    found = features(grad.view(4, 3), params.view(4, 3), m, r, row, col)
    x = matrix(list(found.values()), (4, 3))
    time = torch.tanh(before["step"] / torch.tensor(mlp.HORIZONS).double() - 1)
    x = torch.cat([x, time.expand(12, -1)], 1)
    for layer in range(3):
        x = torch.nn.functional.linear(x, meta[f"w{layer}"].T, meta[f"b{layer}"])
        x = x.relu() if layer < 2 else x
    expected = -1e-3 * x[:, 0] * (1e-3 * x[:, 1]).exp()
    assert torch.allclose(delta, expected, rtol=1e-9)
    divided, _ = blackbox(layout).update(meta, grad, before, params)
    assert not torch.allclose(delta, divided, rtol=0.1)


def test_the_layout_is_no_part_of_the_identity():
    one, two = star(SMALL), star(MLP((5, 2)).layout)
    assert one == two and records.spec(one) == records.spec(two)
    assert hash(one) == hash(two)
    assert records.spec(one) != records.spec(blackbox(SMALL))
    assert "layout" not in records.spec(one)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="need 3 to 4 heads, not 2"):
        MLPOptimizer(SMALL, heads=2, nominal_controller=True)
    with pytest.raises(ValueError, match="need 2 to 4 heads, not 5"):
        MLPOptimizer(SMALL, heads=5)
    with pytest.raises(ValueError, match="^nominal_direction must be .*, not 'Adan'"):
        MLPOptimizer(SMALL, nominal_direction="Adan")
    with pytest.raises(ValueError, match="give the nominal term a step size"):
        MLPOptimizer(SMALL, learn_nominal=True)
    for steps in (0, -5):
        with pytest.raises(ValueError, match=f"steps must be at least 1, not {steps}"):
            CosineDecay(0.1, steps)
    for other in (MLP((5, 2)), MLP((2, 5))):  # of 12 parameters and of 15
        with pytest.raises(ValueError, match="built for another optimizee"):
            Training(other, "toy", Alone(star(MLP((2, 4)).layout)), 50, (0,))
    with pytest.raises(ValueError, match="built for 52 parameters, not 7"):
        star(SMALL).init(torch.zeros(7))
    with pytest.raises(ValueError, match="built for 52 parameters, not 7"):
        MomentumMLP(SMALL).init(torch.zeros(7))
    for wrong in {"hold": 1.0}, {"warmup": -0.1}:
        with pytest.raises(ValueError, match=r"^hold must lie in \[0, 1\) and warmup"):
            CosineDecay(0.1, 10, **wrong)


# ---- in training and in truncated meta-training --------------------------------------


def run_of(make):
    task = blobs()
    optimizer = make(task.optimizee.layout)
    meta, _, _ = middle(optimizer, 0)
    meta = {k: v / 2 for k, v in meta.items()}
    params = start_of(task)
    idx = batches(task, 5, 8)
    return task, optimizer, meta, params, optimizer.init(params), idx


@pytest.mark.parametrize("make", [blackbox, star_as_described, extras, MomentumMLP])
def test_meta_gradient_equals_finite_differences(make):
    task, optimizer, meta, params, state, idx = run_of(make)
    grads, *_ = meta_gradient(task, optimizer.update, meta, params, state, idx, "full")

    def objective(m):
        return inner_steps(task, optimizer.update, m, params, state, idx)[2].sum()

    eps, biggest = 1e-5, max(g.abs().max() for g in grads.values())
    assert biggest > 0
    for name in meta:
        for k in range(0, meta[name].numel(), max(1, meta[name].numel() // 3)):
            moved = torch.zeros_like(meta[name])
            moved.view(-1)[k] = eps
            up = objective(meta | {name: meta[name] + moved})
            down = objective(meta | {name: meta[name] - moved})
            slope = ((up - down) / (2 * eps)).item()
            assert grads[name].view(-1)[k].item() == pytest.approx(
                slope, rel=1e-3, abs=1e-6 * biggest.item()
            ), (name, k)


@pytest.mark.parametrize("order", ["first", "full"])
@pytest.mark.parametrize("make", [blackbox, star, hyperparam])
def test_meta_gradients_are_finite_where_gradients_vanish(make, order):
    """A network of dead units: most gradients are exactly zero."""
    task = blobs()
    task.optimizee = MLP((2, 4, 2), "relu")
    optimizer = make(task.optimizee.layout)
    params = torch.zeros(task.optimizee.layout.n)
    grads, losses, *_ = meta_gradient(
        task, optimizer.update, optimizer.init_meta(0), params,
        optimizer.init(params), batches(task, 4, 8), order,
    )  # fmt: skip
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


def test_star_is_meta_trained_by_back_propagation(toy_data, tmp_path):
    """And continues bit-identically from any checkpoint."""
    net = MLP((2, 4, 2))
    config = MetaTraining(star(net.layout, 1e-4), net, "toy", 8, 4, 6, 3)
    whole = expect_resumable(config, tmp_path / "checkpoint")
    assert whole["training"].isfinite().all() and "meta.w0" in whole


def test_star_trains_replicas_as_any_other_optimizer(toy_data):
    net = MLP((2, 4, 2))
    optimizer = hyperparam(net.layout)
    config = Training(
        net, "toy", Alone(optimizer), 200, (0, 1, 2), 3, batch=8, segment=50
    )
    arrays, _ = drive(TrainingJob(config, {"optimizer": optimizer.init_meta(0)}))
    assert arrays["loss"].shape[0] == 3
    assert (arrays["full_loss"][:, -1] < arrays["full_loss"][:, 0]).all()
