"""Optimizees: layout, initial distribution, losses, gradients and counted work."""

import math
from dataclasses import replace

import pytest
import torch
from problems import blobs, data_set, random_numbers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from l2olib.language import LSTMLanguageModel, TransformerLanguageModel
from l2olib.optimizees import (
    MLP,
    ConvNet,
    Layout,
    Quadratic,
    ResNet,
    Task,
    conv3,
    conv5,
    conv_star,
    same_padding,
)

CUT_NORMAL = {"start": "truncated normal"}
STAR_NETWORKS = {
    "layer norm": (MLP((6, 5, 4, 3), "tanh", norm="layer", **CUT_NORMAL), (6,)),
    "batch norm": (MLP((6, 5, 4, 3), "relu", norm="batch", **CUT_NORMAL), (6,)),
    "squared error": (MLP((6, 5, 3), "relu", loss="squared error"), (6,)),
    "autoencoder": (MLP((6, 2, 6), "relu", loss="reconstruction"), (6,)),
    "conv star": (conv_star((3, 9, 10), 3), (3, 9, 10)),
    "resnet": (ResNet((2, 15, 16), 5, (8, 12), 3), (2, 15, 16)),
}

NETWORKS = {
    "mlp": (MLP((784, 20, 10)), (1, 28, 28)),
    "deep mlp": (MLP((6, 5, 4, 3), "tanh"), (6,)),
    "conv3": (conv3((1, 28, 28), 10), (1, 28, 28)),
    "conv3 relu": (replace(conv3((3, 32, 32), 10), activation="relu"), (3, 32, 32)),
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
    assert task.test_error(params * math.nan).isnan()


@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_full_loss_is_the_mean_over_all_items(chunk):
    task = blobs()
    task.chunk = chunk
    params = task.optimizee.init(0).double()
    expected = task.loss(params, torch.arange(48))
    assert torch.allclose(task.full_loss(params), expected, rtol=1e-14)


def test_a_sample_is_the_first_items():
    task = blobs()
    params = task.optimizee.init(0).double()
    first = task.loss(params, torch.arange(20))
    for chunk in (1, 7, 1000):
        part = Task(task.optimizee, task.data, chunk, sample=20)
        assert torch.allclose(part.full_loss(params), first, rtol=1e-14)
    whole = Task(task.optimizee, task.data, sample=1000)
    assert torch.equal(whole.full_loss(params), task.full_loss(params))


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


def test_a_quadratic_whose_minimum_moves():
    hessian = ((2.0, 0.5), (0.5, 1.0))
    quadratic = Quadratic(hessian, (1.0, -2.0), (0.25, 0.0), spread=3.0, moves=True)
    inputs = random_numbers(0, 4, 2)
    task = Task(quadratic, data_set(inputs, torch.zeros(4, dtype=torch.int64)))
    w, idx = random_numbers(1, 2), torch.tensor([0, 3])
    minima = torch.tensor([0.25, 0.0]) + inputs[idx]
    h = torch.tensor(hessian, dtype=torch.float64)
    loss, grad = task.loss_and_grad(w, idx)
    each = [0.5 * (w - m) @ h @ (w - m) for m in minima]
    assert loss.item() == pytest.approx(sum(each).item() / 2, rel=1e-14)
    assert torch.allclose(grad, h @ (w - minima.mean(0)), rtol=1e-13)
    assert task.test_error(w).isnan()
    starts = torch.stack([quadratic.init(seed) for seed in range(400)])
    assert torch.equal(quadratic.init(7), starts[7])
    assert (starts.mean(0) - torch.tensor([1.0, -2.0])).abs().max() < 0.5
    assert (starts.std(0) - 3.0).abs().max() < 0.4


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


# ---- the networks of STAR's tasks ----------------------------------------------------


@pytest.mark.parametrize(
    ("optimizee", "n"),
    [
        (MLP((784, 128, 128, 10), "relu", **CUT_NORMAL), 118_282),
        (MLP((3072, 128, 128, 128, 10), "relu", norm="layer", **CUT_NORMAL), 428_426),
        (MLP((3072, 128, 128, 128, 10), "relu", norm="batch", **CUT_NORMAL), 428_426),
        (MLP((3072, 128, 128, 128, 10), "tanh", **CUT_NORMAL), 427_658),
        (MLP((3072, 256, 256, 10), "relu"), 855_050),
        (conv_star((3, 32, 32), 10), 56_970),
        (conv_star((3, 32, 32), 100), 62_820),
        (ResNet((3, 32, 32), 5, (128, 256, 512, 512), 1000), 1_557_416),
        (ResNet((3, 32, 32), 3, (128, 256, 512, 512), 1000), 1_554_344),
        (ResNet((3, 32, 32), 5, (256, 512, 512, 1024), 1000), 3_535_400),
        (LSTMLanguageModel(32_100, 32), 12_753_252),
        (LSTMLanguageModel(259, 32), 494_467),
        (LSTMLanguageModel(259, 32, embedding=64, hidden=128), 149_059),
        (TransformerLanguageModel(32_100, 128), 20_416_612),
    ],
)
def test_parameter_counts_of_stars_tasks(optimizee, n):
    """As the spec card lists them (there rounded: 1.56M, 12.75M, 20.42M, ...)."""
    assert optimizee.layout.n == n


class TorchMLP(nn.Module):
    """An MLP of torch.nn layers, norms included, that takes a layout's tensors."""

    def __init__(self, optimizee: MLP, p: dict[str, torch.Tensor]):
        super().__init__()
        sizes, norm = optimizee.sizes, optimizee.norm
        act = {"relu": nn.ReLU, "tanh": nn.Tanh}[optimizee.activation]
        kinds = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        parts: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            linear = nn.Linear(sizes[i], sizes[i + 1])
            linear.weight.data, linear.bias.data = p[f"w{i}"].T, p[f"b{i}"]
            parts.append(linear)
            if i < len(sizes) - 2:
                if norm in kinds:
                    layer = kinds[norm](sizes[i + 1])
                    layer.weight.data = p[f"n{i}scale"]
                    layer.bias.data = p[f"n{i}offset"]
                    parts.append(layer)
                parts.append(act())
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


def conv_of(kernel: torch.Tensor, stride: int, size: tuple[int, int]) -> nn.Module:
    """A torch convolution with TensorFlow's padding at this input size."""
    k, _, a, b = kernel.shape
    conv = nn.Conv2d(a, b, k, stride, bias=False)
    conv.weight.data = kernel.movedim((3, 2), (0, 1))
    pads = [same_padding(s, k, stride) for s in reversed(size)]
    return nn.Sequential(nn.ZeroPad2d([x for pair in pads for x in pair]), conv)


def torch_conv(optimizee, p, x):
    for i, stride in enumerate(optimizee.strides):
        x = conv_of(p[f"k{i}"], stride, x.shape[2:])(x) + p[f"b{i}"][:, None, None]
        x = x.relu()
    return nn.AdaptiveAvgPool2d(1)(x).flatten(1) @ p["w"] + p["b"]


def torch_resnet(optimizee, p, x):
    """The same network from torch.nn modules in training mode."""

    def active(x, name):
        norm = nn.BatchNorm2d(x.shape[1]).double().train()
        norm.weight.data, norm.bias.data = p[f"{name}scale"], p[f"{name}offset"]
        return norm(x).relu()

    x = conv_of(p["first"], 2, x.shape[2:])(x)
    assert tuple(x.shape[2:]) == (8, 8), "even: the odd zero comes after"
    x = nn.MaxPool2d(3, 2, ceil_mode=True)(x)
    for k in range(len(optimizee.channels)):
        stride = 2 if k else 1
        h = active(x, f"g{k}n0")
        short = conv_of(p[f"g{k}shortcut"], stride, h.shape[2:])(h)
        h = active(conv_of(p[f"g{k}k0"], 1, h.shape[2:])(h), f"g{k}n1")
        h = active(conv_of(p[f"g{k}k1"], stride, h.shape[2:])(h), f"g{k}n2")
        x = short + conv_of(p[f"g{k}k2"], 1, h.shape[2:])(h)
    return active(x, "last").mean((2, 3)) @ p["w"] + p["b"]


def perturbed(optimizee, seed: int = 3) -> torch.Tensor:
    """Initial parameters, moved so that scales and zeros show."""
    start = optimizee.init(seed).double()
    return start + 0.1 * random_numbers(seed, len(start))


@pytest.mark.parametrize("name", STAR_NETWORKS)
def test_stars_networks_equal_torch_modules(name):
    optimizee, shape = STAR_NETWORKS[name]
    x, y = items(shape, 3, 7)
    params = perturbed(optimizee)
    p = optimizee.layout.views(params)
    if isinstance(optimizee, MLP):
        out = TorchMLP(optimizee, p).double()(x)
    else:
        build = torch_resnet if isinstance(optimizee, ResNet) else torch_conv
        out = build(optimizee, p, x)
    if name == "autoencoder":
        expected = nn.MSELoss(reduction="none")(out.sigmoid(), x).mean(1)
        assert optimizee.errors(params, (x, y)).isnan().all()
    else:
        if name == "squared error":
            hot = torch.eye(3, dtype=torch.float64)[y]
            expected = nn.MSELoss(reduction="none")(out, hot).mean(1)
        else:
            expected = nn.CrossEntropyLoss(reduction="none")(out, y)
        wrong = (out.argmax(1) != y).double()
        assert torch.equal(optimizee.errors(params, (x, y)), wrong)
    assert torch.allclose(
        optimizee.losses(params, (x, y)), expected, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", STAR_NETWORKS)
def test_gradients_of_stars_networks_equal_finite_differences(name):
    optimizee, shape = STAR_NETWORKS[name]
    check_gradient(optimizee, items(shape, 3, 7))


def check_gradient(optimizee, batch) -> None:
    """Along random directions, central differences of the loss in float64."""
    params = perturbed(optimizee)
    task = Task(optimizee, data_set(*batch))
    idx = torch.arange(len(batch[0]))
    _, grad = task.loss_and_grad(params, idx)
    for k in range(4):
        v, h = random_numbers(k, len(params)) / len(params) ** 0.5, 1e-6
        up, down = (task.loss(params + s * h * v, idx) for s in (1, -1))
        assert grad @ v == pytest.approx((up - down).item() / (2 * h), rel=1e-5)


@pytest.mark.parametrize("name", STAR_NETWORKS)
def test_stars_networks_under_vmap_equal_a_loop(name):
    optimizee, shape = STAR_NETWORKS[name]
    check_vmap(optimizee, items(shape, 3, 7))


def check_vmap(optimizee, batch) -> None:
    task = Task(optimizee, data_set(*batch))
    params = torch.stack([perturbed(optimizee, seed) for seed in (1, 2)])
    idx = torch.tensor([[0, 1, 2, 3], [6, 5, 1, 0]])
    together = torch.func.vmap(task.loss_and_grad)(params, idx)
    alone = [task.loss_and_grad(*one) for one in zip(params, idx, strict=True)]
    for values, separate in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(values, torch.stack(separate), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", STAR_NETWORKS)
def test_work_of_stars_networks_equals_what_torch_counts(name):
    optimizee, shape = STAR_NETWORKS[name]
    check_work(optimizee, items(shape, 3, 4))


def check_work(optimizee, batch) -> None:
    params, idx = optimizee.init(0).double(), torch.arange(len(batch[0]))
    task = Task(optimizee, data_set(*batch))
    with FlopCounterMode(display=False) as forward:
        task.losses(params, idx)
    assert optimizee.flops(len(idx)) == forward.get_total_flops()
    with FlopCounterMode(display=False) as both:
        task.loss_and_grad(params, idx)
    assert optimizee.flops(len(idx), gradient=True) == both.get_total_flops()


def test_truncated_start():
    """Deviation 0.88/sqrt(fan-in), cut at two; biases 0, scales 1, ResNet's end 0."""
    net = MLP((400, 50, 10), "relu", norm="layer", **CUT_NORMAL)
    views = net.layout.views(net.init(0))
    for name, fan_in, near in (("w0", 400, 0.02), ("w1", 50, 0.1)):
        scaled = views[name] * fan_in**0.5
        assert 1.9 < scaled.abs().max() <= 2
        assert abs(scaled.mean().item()) < near
        assert scaled.std().item() == pytest.approx(0.8796, rel=near)
    assert views["n0scale"].eq(1).all()
    for name in ("b0", "n0offset", "b1"):
        assert views[name].eq(0).all()
    assert torch.equal(net.init(3), net.init(3))
    assert not torch.equal(net.init(3), net.init(4))
    resnet = ResNet((3, 32, 32), 3, (8,), 10)
    x = random_numbers(0, 2, 3, 32, 32)
    assert resnet.logits(resnet.init(0).double(), x).eq(0).all()


def test_padding_that_keeps_the_size():
    assert same_padding(32, 3, 1) == (1, 1)
    assert same_padding(32, 3, 2) == (0, 1)
    assert same_padding(32, 5, 2) == (1, 2)
    assert same_padding(15, 3, 2) == (1, 1)
    assert same_padding(8, 1, 2) == (0, 0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MLP((2, 2), "swish"), "^activation must be .*, not 'swish'"),
        (lambda: MLP((2, 2), norm="rms"), "^norm must be one of 'none', .*, not 'rms'"),
        (lambda: MLP((2, 2), norm="layer"), "with norms starts 'truncated normal'"),
        (lambda: MLP((2, 3), loss="reconstruction"), "must equal its first"),
        (lambda: MLP((2, 3), loss="hinge"), "^loss must be one of 'cross"),
        (lambda: TransformerLanguageModel(9, 4, width=6, heads=4), "multiple of the 4"),
    ],
)
def test_impossible_networks_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_losses_must_be_one_an_item():
    """A mean in their place would be a loss of the right size, and wrong."""

    class Mean(MLP):
        def losses(self, params, batch):
            return super().losses(params, batch).mean()

    task = Task(Mean((2, 3, 2)), blobs(8).data)
    with pytest.raises(ValueError, match=r"one for each of the 4 items .* shape \(\)"):
        task.loss_and_grad(task.optimizee.init(0), torch.arange(4))
