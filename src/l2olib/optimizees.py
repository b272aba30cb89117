"""What is optimized: an initial flat vector and a loss on it.

An optimizee keeps all its parameters in ONE tensor ``[n]``; a :class:`Layout`, bound
at construction, gives the named views. Code is written for one replica and
``torch.func.vmap`` adds seeds, so nothing here reads a value back to Python.

Weights are stored (in, out): a linear layer is ``x @ W + b`` with ``W [in, out]`` and a
convolution kernel is ``[kh, kw, in, out]``. PyTorch's own order is restored in one
place, where the convolution is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import DataSet, Split
from .optimizers import check_among, check_literals
from .records import later

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Named views into a flat vector: ``shapes`` maps a name to its (in, out) shape."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of these tensors, in their order."""
        return cls({name: tuple(value.shape) for name, value in tensors.items()})

    @property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def n(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Split ``flat [..., n]`` into named tensors ``[..., *shape]`` (no copy)."""
        parts = flat.split(list(self.sizes.values()), -1)
        return {
            name: part.view((*flat.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """Join named tensors into one vector ``[n]``, in the layout's order."""
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])


def check_built_for(optimizee: Any, optimizer: Any) -> None:
    """Refuse an optimizer that holds the layout of an optimizee with other tensors.

    That layout is no part of a configuration's identity, so nothing else would notice.
    """
    there = optimizee.layout
    built = getattr(optimizer, "layout", there)
    if list(built.shapes.items()) != list(there.shapes.items()):
        raise ValueError(
            "the optimizer was built for another optimizee: give it the layout of "
            "this one"
        )


class Optimizee(Protocol):
    """A loss on a flat vector. Implementations are frozen dataclasses."""

    @property
    def layout(self) -> Layout: ...

    def init(self, seed: int) -> Tensor:
        """Draw the initial parameters, float32 ``[n]`` on the CPU."""
        ...

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        """Per-item losses ``[B]`` (natural-log units, "nats", for classifiers)."""
        ...

    def errors(self, params: Tensor, batch: Batch) -> Tensor:
        """Which items are misclassified ``[B]``; NaN where nothing is classified."""
        ...

    def flops(self, items: int, gradient: bool = False) -> int:
        """Matrix work (2 FLOP a multiply-add) of a forward pass over ``items`` items.

        With ``gradient``, of loss and gradient together: three times the forward pass
        less the input gradient of the first layer, which nobody asks for.
        """
        ...


# ---- what several networks share -----------------------------------------------------

Start = Literal["uniform", "truncated normal"]
Norm = Literal["none", "layer", "batch"]
Loss = Literal["cross entropy", "squared error", "reconstruction"]

ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}


def uniform_start(layout: Layout, seed: int) -> Tensor:
    """PyTorch's default for Linear and Conv, weight and bias: U(-1/sqrt(fan_in), +).

    A vector is the bias of the weight before it.
    """
    gen = torch.Generator().manual_seed(seed)
    tensors, bound = {}, 1.0
    for name, shape in layout.shapes.items():
        if len(shape) > 1:
            bound = 1 / math.sqrt(math.prod(shape[:-1]))
        draw = torch.rand(shape, generator=gen, dtype=torch.float64)
        tensors[name] = (draw * 2 - 1).mul_(bound)
    return layout.flatten(tensors).float()


def truncated_normal(shape: Sequence[int], s: float, gen: torch.Generator) -> Tensor:
    """Draw a normal of deviation ``s`` cut at two of them, float64 (the cut lowers the
    deviation to 0.88 s)."""
    w = torch.empty(*shape, dtype=torch.float64)
    return torch.nn.init.trunc_normal_(w, 0.0, s, -2 * s, 2 * s, generator=gen)


def truncated_start(
    layout: Layout, seed: int, deviations: Mapping[str, float] | None = None
) -> Tensor:
    """STAR's tasks (Haiku's defaults): weights :func:`truncated_normal`, biases zero.

    A weight has the deviation 1/sqrt(fan-in) unless ``deviations`` names another; the
    scales of normalisations, whose names end in "scale", start at one.
    """
    gen = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout.shapes.items():
        if len(shape) > 1:
            s = (deviations or {}).get(name, 1 / math.sqrt(math.prod(shape[:-1])))
            tensors[name] = truncated_normal(shape, s, gen) if s else torch.zeros(shape)
        else:
            tensors[name] = torch.full(shape, float(name.endswith("scale")))
    return layout.flatten({k: v.double() for k, v in tensors.items()}).float()


STARTS = {"uniform": uniform_start, "truncated normal": truncated_start}


def normalized(
    x: Tensor, axes: int | tuple[int, ...], scale: Tensor, offset: Tensor
) -> Tensor:
    """Shift and scale ``x`` to mean 0, variance 1 over ``axes``, then by parameters.

    Over the feature axis this is layer norm; over all but the features it is batch norm
    with the statistics of the batch (running ones would be state, which a loss that is
    a pure function of parameters and batch cannot have).
    """
    centered = x - x.mean(axes, keepdim=True)
    variance = centered.square().mean(axes, keepdim=True)
    return centered * (variance + 1e-5).rsqrt() * scale + offset


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after so that ``ceil(size / stride)`` positions come out.

    The odd one goes after (as in TensorFlow and JAX).
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def padded(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad images ``[B, C, H, W]`` as :func:`same_padding` says."""
    high, wide = (same_padding(size, kernel, stride) for size in x.shape[2:])
    return F.pad(x, (*wide, *high), value=value)


def convolved(
    x: Tensor, kernel: Tensor, stride: int, bias: Tensor | None = None
) -> Tensor:
    """Convolve padded ``x [B, C, H, W]`` with ``kernel [kh, kw, in, out]``."""
    return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride=stride)


def work(items: int, layers: Sequence[int], gradient: bool) -> int:
    """FLOP of layers of so many multiply-adds an item; see :meth:`Optimizee.flops`."""
    return 2 * items * (3 * sum(layers) - layers[0] if gradient else sum(layers))


# ---- networks for pictures and points ------------------------------------------------


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """0/1 errors of the likeliest of the last axis; NaN where a score is not finite."""
    missed = (logits.argmax(-1) != y).to(logits.dtype)
    return torch.where(logits.isfinite().all(-1), missed, torch.nan)


@dataclass(frozen=True)
class Classifier:
    """Shared by networks that end in log-softmax and negative log-likelihood.

    Of items with a label, ``y [B]``, or with one at each place, ``y [B, T]``: losses
    and errors are then means over the places.
    """

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        raise TypeError("a classifier defines logits")

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        x, y = batch
        logits = self.logits(params, x)
        each = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
        return _over_places(each.view(y.shape))

    def errors(self, params: Tensor, batch: Batch) -> Tensor:
        """Per-item 0/1 errors, or shares of places, ``[B]``."""
        x, y = batch
        return _over_places(wrong(self.logits(params, x), y))


def _over_places(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.mean(1)


@dataclass(frozen=True)
class MLP(Classifier):
    """Fully connected network, e.g. ``MLP((784, 20, 10))`` (LGL2O, App. D).

    Inputs of any shape ``[B, ...]`` are flattened to ``[B, sizes[0]]``. STAR's tasks
    start ``truncated normal``, may normalise before each activation, and may have
    another loss than the classifier's: ``squared error`` is the mean over classes of
    the squared distance to the one-hot label; ``reconstruction``, of an autoencoder
    whose last size is its first, the mean over pixels of the squared distance between
    the input and the sigmoid of the output.
    """

    sizes: tuple[int, ...]
    activation: str = "sigmoid"
    norm: Norm = later("none")
    loss: Loss = later("cross entropy")
    start: Start = later("uniform")

    def __post_init__(self) -> None:
        check_literals(self)
        check_among("activation", self.activation, ACTIVATIONS)
        if self.norm != "none" and self.start == "uniform":
            raise ValueError("a network with norms starts 'truncated normal'")
        if self.loss == "reconstruction" and self.sizes[0] != self.sizes[-1]:
            raise ValueError("an autoencoder's last size must equal its first")

    @cached_property
    def layout(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (a, b) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            shapes[f"w{i}"] = (a, b)
            shapes[f"b{i}"] = (b,)
            if self.norm != "none" and i < len(self.sizes) - 2:
                shapes[f"n{i}scale"] = shapes[f"n{i}offset"] = (b,)
        return Layout(shapes)

    def init(self, seed: int) -> Tensor:
        return STARTS[self.start](self.layout, seed)

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        p = self.layout.views(params)
        h = x.flatten(1)
        depth = len(self.sizes) - 1
        for i in range(depth):
            h = torch.addmm(p[f"b{i}"], h, p[f"w{i}"])
            if i < depth - 1:
                if self.norm != "none":
                    axis = 0 if self.norm == "batch" else -1
                    h = normalized(h, axis, p[f"n{i}scale"], p[f"n{i}offset"])
                h = ACTIVATIONS[self.activation](h)
        return h

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        if self.loss == "cross entropy":
            return super().losses(params, batch)
        x, y = batch
        out = self.logits(params, x)
        if self.loss == "reconstruction":
            out, target = torch.sigmoid(out), x.flatten(1)
        else:
            classes = torch.arange(self.sizes[-1], device=y.device)
            target = (y[:, None] == classes).to(out.dtype)
        return (out - target).square().mean(1)

    def errors(self, params: Tensor, batch: Batch) -> Tensor:
        if self.loss == "reconstruction":  # nothing is classified
            return torch.full_like(self.losses(params, batch), torch.nan)
        return super().errors(params, batch)

    def flops(self, items: int, gradient: bool = False) -> int:
        layers = [a * b for a, b in zip(self.sizes, self.sizes[1:], strict=False)]
        return work(items, layers, gradient)


@dataclass(frozen=True)
class ConvNet(Classifier):
    """Strided convolutions, then one linear layer.

    LGL2O's Conv3 and Conv5 (section 4 and App. D; padding, batch norm and activation
    are open in the paper: none, none and sigmoid here, see the spec in the book).
    STAR's networks have ``same`` padding, the mean over all positions (``pool``) before
    the linear layer, and start ``truncated normal``.
    """

    image: tuple[int, int, int]
    """Channels, height, width of the input."""
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int
    activation: str = "sigmoid"
    same: bool = later(False)
    pool: bool = later(False)
    start: Start = later("uniform")

    def __post_init__(self) -> None:
        check_literals(self)
        check_among("activation", self.activation, ACTIVATIONS)

    @cached_property
    def spatial(self) -> tuple[tuple[int, int], ...]:
        """Height and width after each convolution."""
        h, w = self.image[1:]
        out = []
        for k, s in zip(self.kernels, self.strides, strict=True):
            if self.same:
                h, w = -(-h // s), -(-w // s)
            else:
                h, w = (h - k) // s + 1, (w - k) // s + 1
            out.append((h, w))
        return tuple(out)

    @cached_property
    def layout(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        fan = self.image[0]
        for i, (c, k) in enumerate(zip(self.channels, self.kernels, strict=True)):
            shapes[f"k{i}"] = (k, k, fan, c)
            shapes[f"b{i}"] = (c,)
            fan = c
        positions = 1 if self.pool else math.prod(self.spatial[-1])
        shapes["w"] = (fan * positions, self.classes)
        shapes["b"] = (self.classes,)
        return Layout(shapes)

    def init(self, seed: int) -> Tensor:
        return STARTS[self.start](self.layout, seed)

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        p = self.layout.views(params)
        for i, (size, stride) in enumerate(
            zip(self.kernels, self.strides, strict=True)
        ):
            x = padded(x, size, stride) if self.same else x
            x = convolved(x, p[f"k{i}"], stride, p[f"b{i}"])
            x = ACTIVATIONS[self.activation](x)
        x = x.mean((2, 3)) if self.pool else x.flatten(1)
        return torch.addmm(p["b"], x, p["w"])

    def flops(self, items: int, gradient: bool = False) -> int:
        layers, fan = [], self.image[0]
        for c, k, (h, w) in zip(self.channels, self.kernels, self.spatial, strict=True):
            layers.append(h * w * c * fan * k * k)
            fan = c
        layers.append(math.prod(self.layout.shapes["w"]))
        return work(items, layers, gradient)


def conv3(image: tuple[int, int, int], classes: int) -> ConvNet:
    """LGL2O's Conv3: channels 8, 16, 32; kernels 5, 3, 3; strides 2, 2, 2."""
    return ConvNet(image, (8, 16, 32), (5, 3, 3), (2, 2, 2), classes)


def conv5(image: tuple[int, int, int], classes: int) -> ConvNet:
    """LGL2O's Conv5: channels 8 to 64; kernels 3, 3, 3, 3, 1; strides 2, 2, 2, 1, 1."""
    return ConvNet(
        image, (8, 16, 32, 32, 64), (3, 3, 3, 3, 1), (2, 2, 2, 1, 1), classes
    )


def conv_star(image: tuple[int, int, int], classes: int) -> ConvNet:
    """STAR's ConvNet: 3x3 kernels, 32, 64, 64 channels, strides 2, 1, 1, ReLU."""
    return ConvNet(
        image,
        (32, 64, 64),
        (3, 3, 3),
        (2, 1, 1),
        classes,
        "relu",
        same=True,
        pool=True,
        start="truncated normal",
    )


@dataclass(frozen=True)
class ResNet(Classifier):
    """A residual network, version 2, with one bottleneck block a group (STAR's tasks).

    A convolution of 64 channels and stride 2 and a max-pool of stride 2; then for each
    number of ``channels`` a block (He et al. 2016: normalise, ReLU, convolve, three
    times, with a quarter of the channels inside), of stride 2 but for the first, whose
    shortcut is a 1x1 convolution of its first activation; then batch norm, ReLU, the
    mean over positions, and a linear layer that starts at zero. Batch norms use the
    statistics of the batch, so a loss depends on the items it is taken with.
    """

    image: tuple[int, int, int]
    """Channels, height, width of the input."""
    kernel: int
    channels: tuple[int, ...]
    classes: int

    @cached_property
    def blocks(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, channels in and out, stride of each block."""
        fans = (64, *self.channels[:-1])
        pairs = enumerate(zip(fans, self.channels, strict=True))
        return tuple((f"g{i}", a, b, 2 if i else 1) for i, (a, b) in pairs)

    @cached_property
    def layout(self) -> Layout:
        k = self.kernel
        shapes: dict[str, tuple[int, ...]] = {}

        def norm(name: str, channels: int) -> None:
            shapes[f"{name}scale"] = shapes[f"{name}offset"] = (channels,)

        shapes["first"] = (k, k, self.image[0], 64)
        for name, fan, c, _ in self.blocks:
            shapes[f"{name}shortcut"] = (1, 1, fan, c)
            inner = c // 4
            for i, (size, a, b) in enumerate(
                ((1, fan, inner), (3, inner, inner), (1, inner, c))
            ):
                norm(f"{name}n{i}", a)
                shapes[f"{name}k{i}"] = (size, size, a, b)
        norm("last", self.channels[-1])
        shapes["w"] = (self.channels[-1], self.classes)
        shapes["b"] = (self.classes,)
        return Layout(shapes)

    def init(self, seed: int) -> Tensor:
        return truncated_start(self.layout, seed, {"w": 0.0})

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        p = self.layout.views(params)

        def active(x: Tensor, name: str) -> Tensor:
            scale, offset = p[f"{name}scale"], p[f"{name}offset"]
            by_channel = scale[:, None, None], offset[:, None, None]
            return torch.relu(normalized(x, (0, 2, 3), *by_channel))

        x = convolved(padded(x, self.kernel, 2), p["first"], 2)
        x = F.max_pool2d(padded(x, 3, 2, -math.inf), 3, 2)
        for name, _, _, stride in self.blocks:
            h = active(x, f"{name}n0")
            shortcut = convolved(h, p[f"{name}shortcut"], stride)
            h = active(convolved(h, p[f"{name}k0"], 1), f"{name}n1")
            h = convolved(padded(h, 3, stride), p[f"{name}k1"], stride)
            h = active(h, f"{name}n2")
            x = shortcut + convolved(h, p[f"{name}k2"], 1)
        x = active(x, "last").mean((2, 3))
        return torch.addmm(p["b"], x, p["w"])

    def flops(self, items: int, gradient: bool = False) -> int:
        area = math.prod(-(-size // 2) for size in self.image[1:])
        layers = [area * math.prod(self.layout.shapes["first"])]
        sides = [-(-size // 4) for size in self.image[1:]]
        for name, _, _, stride in self.blocks:
            before = math.prod(sides)
            sides = [-(-size // stride) for size in sides]
            for part in ("shortcut", "k0", "k1", "k2"):
                area = before if part == "k0" else math.prod(sides)
                layers.append(area * math.prod(self.layout.shapes[name + part]))
        layers.append(math.prod(self.layout.shapes["w"]))
        return work(items, layers, gradient)


# ---- quadratics ----------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """f(w) = (w - c)' H (w - c) / 2 + xi' (w - c), xi the batch's mean input.

    With inputs of mean zero this is a noisy quadratic whose gradient noise is the mean
    of the batch; with zero inputs it is the deterministic quadratic of the theory. If
    it ``moves``, each item has its minimum at c plus its input instead, as in STAR's
    section 4. ``hessian`` is ``n`` rows of ``n`` numbers, ``start`` and ``center`` have
    length n; starts are normal about ``start``, with standard deviation ``spread``.
    """

    hessian: tuple[tuple[float, ...], ...]
    start: tuple[float, ...]
    center: tuple[float, ...] | None = None
    spread: float = 0.0
    moves: bool = False

    @cached_property
    def layout(self) -> Layout:
        return Layout({"w": (len(self.start),)})

    def init(self, seed: int) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.layout.n, generator=gen)
        return torch.tensor(self.start) + self.spread * drawn

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        h = torch.tensor(self.hessian, dtype=params.dtype, device=params.device)
        c = torch.tensor(
            self.center or (0.0,) * self.layout.n,
            dtype=params.dtype,
            device=params.device,
        )
        d, x = params - c, batch[0].to(params.dtype)
        if self.moves:
            d = d - x  # [B, n]
            return 0.5 * ((d @ h) * d).sum(1)
        return 0.5 * d @ h @ d + x @ d

    def errors(self, params: Tensor, batch: Batch) -> Tensor:
        """NaN ``[B]``: a quadratic classifies nothing."""
        return torch.full_like(batch[1], torch.nan, dtype=params.dtype)

    def flops(self, items: int, gradient: bool = False) -> int:
        forward = 2 * (self.layout.n**2 + self.layout.n + items * self.layout.n)
        return 2 * forward if gradient else forward


# ---- an optimizee and its data -------------------------------------------------------


@dataclass
class Task:
    """An optimizee on a data set: losses and gradients at indices of training items,
    and losses of whole splits.

    This is all that a method sees. Indices are ``[B]`` int64; parameters ``[n]``.
    """

    optimizee: Any
    data: DataSet
    chunk: int = 2_000
    """Items a full-data pass handles at once. Memory only, the value is a sum; but with
    batch norm it is also the batch whose statistics are used."""
    sample: int = 0
    """Full-data passes take this many items of a split, its first ones (0: all)."""
    _value_and_grad: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._value_and_grad = torch.func.grad_and_value(self.loss)

    @property
    def items(self) -> int:
        """Number of training items."""
        return len(self.data.train)

    def losses(self, params: Tensor, idx: Tensor) -> Tensor:
        """Per-item losses ``[B]`` of the training items ``idx [B]``."""
        batch = self.data.train.items(idx, params.dtype)
        losses = self.optimizee.losses(params, batch)
        if losses.shape != idx.shape:
            raise ValueError(
                f"losses must be one for each of the {len(idx)} items of a batch, not "
                f"of shape {tuple(losses.shape)}"
            )
        return losses

    def loss(self, params: Tensor, idx: Tensor) -> Tensor:
        """Mean loss over the training items ``idx [B]``."""
        return self.losses(params, idx).mean()

    def loss_and_grad(self, params: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and its gradient ``[n]``."""
        grad, value = self._value_and_grad(params, idx)
        return value, grad

    def full_loss(self, params: Tensor) -> Tensor:
        """Mean loss over the training set (or ``sample`` items of it), float64."""
        return self._over(self.data.train, params, self.optimizee.losses)

    def test_loss(self, params: Tensor) -> Tensor:
        return self._over(self.data.test, params, self.optimizee.losses)

    def test_error(self, params: Tensor) -> Tensor:
        return self._over(self.data.test, params, self.optimizee.errors)

    def _over(self, split: Split, params: Tensor, per_item: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=params.device)
        count = min(self.sample or len(split), len(split))
        for start in range(0, count, self.chunk):
            stop = min(start + self.chunk, count)
            idx = torch.arange(start, stop, device=params.device)
            values = per_item(params, split.items(idx, params.dtype))
            total = total + values.double().sum()
        return total / count
