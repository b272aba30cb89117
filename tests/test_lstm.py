"""The LSTM optimizer against torch.nn.LSTMCell in the textbook layout."""

import math

import pytest
import torch
from problems import random_numbers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from l2olib.learned.lstm import LSTMOptimizer, log_and_sign

N = 17


def doubles(optimizer, seed=0):
    return {k: v.double() for k, v in optimizer.init_meta(seed).items()}


def textbook_features(g, p):
    """Andrychowicz et al. 2016, appendix A, one coordinate at a time: [n, 2]."""
    rows = []
    for value in g.tolist():
        if abs(value) >= math.exp(-p):
            rows.append([math.log(abs(value)) / p, math.copysign(1.0, value)])
        else:
            rows.append([-1.0, math.exp(p) * value])
    return torch.tensor(rows, dtype=torch.float64)


def textbook(optimizer, meta):
    """The same network of torch.nn layers, with state [n, hidden]."""
    cells = []
    for layer, inputs in enumerate(optimizer.inputs):
        cell = nn.LSTMCell(inputs, optimizer.hidden).double()
        w, b = meta[f"w{layer}"], meta[f"b{layer}"]
        cell.weight_ih.data, cell.weight_hh.data = w[:, :inputs], w[:, inputs:]
        cell.bias_ih.data, cell.bias_hh.data = 0.25 * b[:, 0], 0.75 * b[:, 0]
        cells.append(cell)
    output = nn.Linear(optimizer.hidden, 1).double()
    output.weight.data, output.bias.data = meta["w_out"], meta["b_out"][0]
    return cells, output


@pytest.mark.parametrize(
    "optimizer", [LSTMOptimizer(), LSTMOptimizer(hidden=3, layers=3, p=5.0, scale=0.01)]
)
def test_equals_torch_lstm_cells(optimizer):
    meta = doubles(optimizer)
    cells, output = textbook(optimizer, meta)
    params = torch.zeros(N, dtype=torch.float64)
    state = optimizer.init(params)
    hidden = [(torch.zeros(N, optimizer.hidden).double(),) * 2 for _ in cells]
    for step in range(8):
        grad = random_numbers(step, N) * 10.0 ** -(step + 1)
        delta, state = optimizer.update(meta, grad, state, params)
        x = textbook_features(grad, optimizer.p)
        for layer, cell in enumerate(cells):
            hidden[layer] = cell(x, hidden[layer])
            x = hidden[layer][0]
        expected = optimizer.scale * output(x)[:, 0]
        assert torch.allclose(delta, expected, rtol=1e-12, atol=1e-14)
        for layer, (h, c) in enumerate(hidden):
            assert torch.allclose(state[f"h{layer}"], h.T, rtol=1e-12, atol=1e-14)
            assert torch.allclose(state[f"c{layer}"], c.T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", [5.0, 10.0])
def test_features(p):
    small = math.exp(-p)
    values = [0.0, 1.0, -1.0, 2.5, -1e-30, 1e30, small / 2, -small / 2]
    values += [small, -small, math.nextafter(small, 0), math.nextafter(small, 1)]
    g = torch.tensor(values, dtype=torch.float64)
    found = log_and_sign(g, p)
    assert torch.allclose(found.T, textbook_features(g, p), rtol=1e-12, atol=1e-12)
    # The two branches meet: (-1, +-1) on both sides of the threshold.
    edge = found[:, -4:]
    assert torch.allclose(edge[0], torch.tensor(-1.0).double(), atol=1e-12)
    assert torch.allclose(edge[1].abs(), torch.tensor(1.0).double(), atol=1e-12)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-300, 1e300, math.exp(-10)])
def test_features_have_finite_derivatives(value):
    g = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    for row in log_and_sign(g, 10.0):
        (derivative,) = torch.autograd.grad(row.sum(), g, retain_graph=True)
        assert derivative.isfinite().all()


def test_derivatives_of_features_by_finite_differences():
    g = torch.tensor([0.3, -2.0, 1e-6, -1e-6], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: log_and_sign(x, 10.0), g.requires_grad_(), eps=1e-9, rtol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, 1e-30])
def test_extreme_gradients_give_bounded_steps(value):
    """|h| < 1, so a step is at most scale * (|w_out|_1 + |b_out|), in float32 too."""
    optimizer = LSTMOptimizer()
    meta = optimizer.init_meta(0)
    params = torch.zeros(N)
    delta, state = optimizer.update(
        meta, torch.full((N,), value), optimizer.init(params), params
    )
    bound = optimizer.scale * (meta["w_out"].abs().sum() + meta["b_out"].abs().sum())
    assert delta.abs().max() <= bound
    assert all(v.isfinite().all() for v in state.values())


def test_a_nan_gradient_stays_in_its_coordinate():
    optimizer = LSTMOptimizer()
    meta, params = optimizer.init_meta(0), torch.zeros(N)
    grad = random_numbers(0, N).float()
    clean, _ = optimizer.update(meta, grad, optimizer.init(params), params)
    grad[3] = math.nan
    delta, state = optimizer.update(meta, grad, optimizer.init(params), params)
    others = torch.arange(N) != 3
    assert torch.equal(delta[others], clean[others])
    assert delta[3].isnan() and state["h0"][:, 3].isnan().all()


def test_coordinates_do_not_see_each_other():
    optimizer = LSTMOptimizer(hidden=5)
    meta = doubles(optimizer)
    grad, order = random_numbers(0, N), torch.randperm(N)
    zero = torch.zeros(N, dtype=torch.float64)
    delta, _ = optimizer.update(meta, grad, optimizer.init(zero), zero)
    shuffled, _ = optimizer.update(meta, grad[order], optimizer.init(zero), zero)
    assert torch.allclose(delta[order], shuffled, rtol=1e-12)


def test_initial_meta_parameters():
    optimizer = LSTMOptimizer()
    meta = optimizer.init_meta(0)
    count = sum(v.numel() for v in meta.values())
    # 80 (2 + 20) + 80 + 80 (20 + 20) + 80 + 20 + 1
    assert count == 5_141
    bound = 1 / math.sqrt(20)
    for name, value in meta.items():
        # A bias of a cell is the sum of torch's two.
        assert value.abs().max() <= bound * (2 if name in ("b0", "b1") else 1)
    assert torch.equal(meta["w0"], optimizer.init_meta(0)["w0"])
    assert not torch.equal(meta["w0"], optimizer.init_meta(1)["w0"])


@pytest.mark.parametrize("optimizer", [LSTMOptimizer(), LSTMOptimizer(7, 3)])
def test_work_equals_what_torch_counts(optimizer):
    meta, params = optimizer.init_meta(0), torch.zeros(N)
    with FlopCounterMode(display=False) as counter:
        optimizer.update(meta, params, optimizer.init(params), params)
    assert optimizer.flops(N) == counter.get_total_flops()


def test_a_step_of_the_standard_network_costs_9960_flop_a_coordinate():
    assert LSTMOptimizer().flops(1) == 9_960


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, not 0"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"p": 0.0}, "p must be above 0 and at most 88, not 0"),
        ({"p": 100.0}, "p must be above 0 and at most 88, not 100"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LSTMOptimizer(**options)


def test_every_allowed_p_is_finite_for_every_gradient():
    grad = torch.tensor([0.0, 1e-45, 1e-38, -1.0, 3e38])
    for p in (0.1, 10.0, 88.0):
        assert log_and_sign(grad, p).isfinite().all()
