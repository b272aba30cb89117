"""Optimizees: layout, initial distribution, losses, gradients and counted work."""

import math

import pytest
import torch
from problems import blobs, data_set, random_numbers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from l2olib.optimizees import (
    MLP,
    ConvNet,
    Layout,
    Quadratic,
    Task,
    TruncatedMLP,
    conv3,
    conv5,
)

NETWORKS = {
    "mlp": (MLP((784, 20, 10)), (1, 28, 28)),
    "deep mlp": (MLP((6, 5, 4, 3), "tanh"), (6,)),
    "conv3": (conv3((1, 28, 28), 10), (1, 28, 28)),
    "conv3 relu": (conv3((3, 32, 32), 10, "relu"), (3, 32, 32)),
    "not square": (ConvNet((2, 9, 7), (3, 4), (3, 2), (1, 2), 5), (2, 9, 7)),
    "conv5": (conv5((3, 64, 64), 50), (3, 64, 64)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def items(shape: tuple[int, ...], classes: int, count: int = 3):
    return random_numbers(1, count, *shape), torch.arange(count) % classes


def module_of(optimizee, params) -> nn.Module:
    """Build the same network from torch.nn layers, each weight put in by hand."""
    activation = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}
    act = activation[optimizee.activation]
    p = optimizee.layout.views(params)
    layers: list[nn.Module] = []
    if isinstance(optimizee, MLP):
        layers.append(nn.Flatten())
        depth = len(optimizee.sizes) - 1
        weights = [(f"w{i}", f"b{i}") for i in range(depth)]
    else:
        fan = optimizee.image[0]
        for i, (c, k, s) in enumerate(
            zip(optimizee.channels, optimizee.kernels, optimizee.strides, strict=True)
        ):
            conv = nn.Conv2d(fan, c, k, stride=s).double()
            # [kh, kw, in, out] -> [out, in, kh, kw]
            conv.weight.data = p[f"k{i}"].movedim((3, 2), (0, 1)).contiguous()
            conv.bias.data = p[f"b{i}"].clone()
            layers += [conv, act()]
            fan = c
        layers.append(nn.Flatten())
        weights = [("w", "b")]
    for k, (w, b) in enumerate(weights):
        linear = nn.Linear(*p[w].shape).double()
        linear.weight.data, linear.bias.data = p[w].T.contiguous(), p[b].clone()
        layers += [linear] if k == len(weights) - 1 else [linear, act()]
    return nn.Sequential(*layers, nn.LogSoftmax(1))


def test_layout_round_trip():
    layout = Layout({"a": (2, 3), "b": (), "c": (4,)})
    flat = torch.arange(11.0)
    views = layout.views(flat)
    assert layout.n == 11
    assert {k: tuple(v.shape) for k, v in views.items()} == layout.shapes
    assert torch.equal(layout.flatten(views), flat)
    # Names decide, not the order of the dict that is given.
    assert torch.equal(layout.flatten(dict(reversed(views.items()))), flat)
    views["a"].zero_()
    assert flat[:6].eq(0).all(), "views must share memory with the vector"


@pytest.mark.parametrize(
    ("optimizee", "n"),
    [
        (MLP((784, 20, 10)), 15_910),
        (conv3((1, 28, 28), 10), 7_306),
        (conv3((3, 32, 32), 10), 7_706),
        (MLP((2, 20, 2)), 102),
    ],
)
def test_parameter_counts(optimizee, n):
    assert optimizee.layout.n == n
    assert optimizee.init(0).shape == (n,)


def test_spatial_sizes():
    assert conv3((1, 28, 28), 10).spatial == ((12, 12), (5, 5), (2, 2))
    assert conv3((3, 32, 32), 10).spatial == ((14, 14), (6, 6), (2, 2))
    sizes = [h for h, _ in conv5((3, 64, 64), 50).spatial]
    assert sizes == [31, 15, 7, 5, 5]
    assert conv5((3, 64, 64), 50).layout.shapes["w"] == (1600, 50)


@every_network
def test_loss_and_gradient_equal_those_of_torch_modules(name):
    optimizee, shape = NETWORKS[name]
    params = optimizee.init(3).double()
    x, y = items(shape, 3)
    task = Task(optimizee, data_set(x, y))
    loss, grad = task.loss_and_grad(params, torch.arange(3))
    module = module_of(optimizee, params)
    expected = nn.NLLLoss()(module(x), y)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-13, atol=0)
    # The same order as the layout: (weight, bias) of each layer in turn.
    parts = []
    for parameter in module.parameters():
        g = parameter.grad
        order = (2, 3, 1, 0) if g.ndim == 4 else tuple(reversed(range(g.ndim)))
        parts.append(g.permute(order).reshape(-1))
    assert torch.allclose(grad, torch.cat(parts), rtol=1e-11, atol=1e-15)


@every_network
def test_initial_parameters_are_uniform_within_the_fan_in(name):
    """U(+-1/sqrt(fan_in)) for weights and biases, as the torch.nn layers draw them."""
    optimizee, _ = NETWORKS[name]
    views = optimizee.layout.views(optimizee.init(0))
    module = module_of(optimizee, optimizee.init(0).double())
    layers = [m for m in module if isinstance(m, nn.Linear | nn.Conv2d)]
    fans = [m.weight[0].numel() for m in layers for _ in ("weight", "bias")]
    for ours, fan_in in zip(views.values(), fans, strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert ours.abs().max() <= bound
        if ours.numel() >= 400:  # enough to see both ends and the flat middle
            assert ours.max() > 0.98 * bound and ours.min() < -0.98 * bound
            deviation = ours.double().std().item() / bound
            assert deviation == pytest.approx(1 / math.sqrt(3), rel=0.05)


@every_network
def test_initial_parameters_depend_on_the_seed_alone(name):
    optimizee, _ = NETWORKS[name]
    torch.manual_seed(1)
    a = optimizee.init(7)
    torch.manual_seed(2)
    assert torch.equal(a, optimizee.init(7))
    assert a.dtype == torch.float32
    assert not torch.equal(a, optimizee.init(8))


def test_errors_count_wrong_answers():
    task = blobs(items=30)
    params = task.optimizee.init(0).double()
    logits = task.optimizee.logits(params, task.data.train.x)
    wrong = (logits[:, 1] > logits[:, 0]).long() != task.data.train.y
    assert task.test_error(params).item() == pytest.approx(wrong.double().mean().item())


@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_full_loss_is_the_mean_over_all_items(chunk):
    task = blobs()
    task.chunk = chunk
    params = task.optimizee.init(0).double()
    expected = task.loss(params, torch.arange(48))
    assert torch.allclose(task.full_loss(params), expected, rtol=1e-14)


def test_quadratic():
    hessian = ((2.0, 0.5), (0.5, 1.0))
    quadratic = Quadratic(hessian, (1.0, -2.0), (0.25, 0.0))
    noise = random_numbers(0, 4, 2)
    task = Task(quadratic, data_set(noise, torch.zeros(4, dtype=torch.int64)))
    w = random_numbers(1, 2)
    d = w - torch.tensor([0.25, 0.0])
    h = torch.tensor(hessian, dtype=torch.float64)
    idx = torch.tensor([0, 3])
    loss, grad = task.loss_and_grad(w, idx)
    xi = noise[idx].mean(0)
    assert loss.item() == pytest.approx((0.5 * d @ h @ d + xi @ d).item(), rel=1e-14)
    assert torch.allclose(grad, h @ d + xi, rtol=1e-13)
    assert torch.equal(quadratic.init(0), torch.tensor([1.0, -2.0]))


@every_network
def test_work_equals_what_torch_counts(name):
    optimizee, shape = NETWORKS[name]
    params = optimizee.init(0).double()
    task = Task(optimizee, data_set(*items(shape, 3, 4)))
    idx = torch.arange(4)
    with FlopCounterMode(display=False) as forward:
        task.losses(params, idx)
    assert optimizee.flops(4) == forward.get_total_flops()
    with FlopCounterMode(display=False) as both:
        task.loss_and_grad(params, idx)
    assert optimizee.flops(4, gradient=True) == both.get_total_flops()


def test_a_truncated_start():
    """Normal numbers of deviation 1/sqrt(fan-in) cut at two of these, biases zero."""
    net = TruncatedMLP((400, 100, 5), "relu")
    p = net.layout.views(net.init(0))
    assert net.layout == MLP((400, 100, 5)).layout
    assert not p["b0"].any() and not p["b1"].any()
    for name, fan_in in (("w0", 400), ("w1", 100)):
        scaled = p[name] * fan_in**0.5
        assert scaled.abs().max() <= 2
        assert abs(scaled.mean().item()) < 0.1
        assert scaled.std().item() == pytest.approx(0.8796, rel=0.05)
    assert torch.equal(net.init(3), net.init(3))
    assert not torch.equal(net.init(3), net.init(4))
    x, _ = items((400,), 5)
    same = MLP((400, 100, 5), "relu").logits(net.init(0).double(), x)
    assert torch.equal(net.logits(net.init(0).double(), x), same)
