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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import DataSet, Split

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Named views into a flat vector: ``shapes`` maps a name to its (in, out) shape."""

    shapes: dict[str, tuple[int, ...]]

    # Not cached properties: in Python 3.11 these take a lock when first read, and code
    # under torch.compile that takes a lock is not compiled.

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

    def flops(self, items: int, gradient: bool = False) -> int:
        """Matrix work (2 FLOP a multiply-add) of a forward pass over ``items`` items.

        With ``gradient``, of loss and gradient together: three times the forward pass
        less the input gradient of the first layer, which nobody asks for.
        """
        ...


def _uniform_fan_in(
    shape: tuple[int, ...], fan_in: int, gen: torch.Generator
) -> Tensor:
    """PyTorch's default for Linear and Conv, weight and bias: U(-1/sqrt(fan_in), +)."""
    bound = 1 / math.sqrt(fan_in)
    return (torch.rand(shape, generator=gen, dtype=torch.float64) * 2 - 1).mul_(bound)


def truncated_normal(
    shape: tuple[int, ...], fan_in: int, gen: torch.Generator
) -> Tensor:
    """Normal numbers of deviation 1/sqrt(fan_in), cut at two deviations, float64.

    As the public reference code of STAR starts optimizees and learned optimizers: the
    deviation is not corrected for the cut, so it is 0.88 of that.
    """
    w, s = torch.empty(shape, dtype=torch.float64), 1 / math.sqrt(fan_in)
    return torch.nn.init.trunc_normal_(w, 0.0, s, -2 * s, 2 * s, generator=gen)


ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}


@dataclass(frozen=True)
class _Classifier:
    """Shared by networks that end in log-softmax and negative log-likelihood."""

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        raise TypeError("a classifier defines logits")

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.logits(params, x), y, reduction="none")

    def errors(self, params: Tensor, batch: Batch) -> Tensor:
        """Per-item 0/1 errors ``[B]``."""
        x, y = batch
        logits = self.logits(params, x)
        return (logits.argmax(-1) != y).to(logits.dtype)


@dataclass(frozen=True)
class MLP(_Classifier):
    """Fully connected classifier, e.g. ``MLP((784, 20, 10))`` (LGL2O, App. D).

    Inputs of any shape ``[B, ...]`` are flattened to ``[B, sizes[0]]``.
    """

    sizes: tuple[int, ...]
    activation: str = "sigmoid"

    @cached_property
    def layout(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (a, b) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            shapes[f"w{i}"] = (a, b)
            shapes[f"b{i}"] = (b,)
        return Layout(shapes)

    def init(self, seed: int) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        tensors = {
            name: _uniform_fan_in(shape, self.sizes[int(name[1:])], gen)
            for name, shape in self.layout.shapes.items()
        }
        return self.layout.flatten(tensors).float()

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        p = self.layout.views(params)
        h = x.flatten(1)
        depth = len(self.sizes) - 1
        for i in range(depth):
            h = torch.addmm(p[f"b{i}"], h, p[f"w{i}"])
            if i < depth - 1:
                h = ACTIVATIONS[self.activation](h)
        return h

    def flops(self, items: int, gradient: bool = False) -> int:
        layers = [a * b for a, b in zip(self.sizes, self.sizes[1:], strict=False)]
        return 2 * items * (3 * sum(layers) - layers[0] if gradient else sum(layers))


@dataclass(frozen=True)
class TruncatedMLP(MLP):
    """An MLP that starts as in STAR's experiments: truncated normal, biases zero."""

    def init(self, seed: int) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        tensors = {
            name: truncated_normal(shape, shape[0], gen)
            if name.startswith("w")
            else torch.zeros(shape)
            for name, shape in self.layout.shapes.items()
        }
        return self.layout.flatten(tensors).float()


@dataclass(frozen=True)
class ConvNet(_Classifier):
    """Strided convolutions without pooling or padding, then one linear layer.

    LGL2O's Conv3 and Conv5 (section 4 and App. D; padding, batch norm and activation
    are open in the paper: none, none and sigmoid here, see the spec in the book).
    """

    image: tuple[int, int, int]
    """Channels, height, width of the input."""
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int
    activation: str = "sigmoid"

    @cached_property
    def spatial(self) -> tuple[tuple[int, int], ...]:
        """Height and width after each convolution."""
        h, w = self.image[1:]
        out = []
        for k, s in zip(self.kernels, self.strides, strict=True):
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
        shapes["w"] = (fan * math.prod(self.spatial[-1]), self.classes)
        shapes["b"] = (self.classes,)
        return Layout(shapes)

    def init(self, seed: int) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        tensors, fan_in = {}, 0
        for name, shape in self.layout.shapes.items():
            if len(shape) > 1:  # a bias shares the fan-in of the weight before it
                fan_in = math.prod(shape[:-1])
            tensors[name] = _uniform_fan_in(shape, fan_in, gen)
        return self.layout.flatten(tensors).float()

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        p = self.layout.views(params)
        for i, stride in enumerate(self.strides):
            kernel = p[f"k{i}"].permute(3, 2, 0, 1)
            x = F.conv2d(x, kernel, p[f"b{i}"], stride=stride)
            x = ACTIVATIONS[self.activation](x)
        return torch.addmm(p["b"], x.flatten(1), p["w"])

    def flops(self, items: int, gradient: bool = False) -> int:
        layers, fan = [], self.image[0]
        for c, k, (h, w) in zip(self.channels, self.kernels, self.spatial, strict=True):
            layers.append(h * w * c * fan * k * k)
            fan = c
        layers.append(math.prod(self.layout.shapes["w"]))
        return 2 * items * (3 * sum(layers) - layers[0] if gradient else sum(layers))


def conv3(
    image: tuple[int, int, int], classes: int, activation: str = "sigmoid"
) -> ConvNet:
    """LGL2O's Conv3: channels 8, 16, 32; kernels 5, 3, 3; strides 2, 2, 2."""
    return ConvNet(image, (8, 16, 32), (5, 3, 3), (2, 2, 2), classes, activation)


def conv5(
    image: tuple[int, int, int], classes: int, activation: str = "sigmoid"
) -> ConvNet:
    """LGL2O's Conv5: channels 8 to 64; kernels 3, 3, 3, 3, 1; strides 2, 2, 2, 1, 1."""
    return ConvNet(
        image,
        (8, 16, 32, 32, 64),
        (3, 3, 3, 3, 1),
        (2, 2, 2, 1, 1),
        classes,
        activation,
    )


@dataclass(frozen=True)
class Quadratic:
    """f(w) = (w - c)' H (w - c) / 2 + xi' (w - c), xi the batch's mean input.

    With inputs of mean zero this is a noisy quadratic whose gradient noise is the mean
    of the batch; with zero inputs it is the deterministic quadratic of the theory.
    ``hessian`` is ``n`` rows of ``n`` numbers, ``start`` and ``center`` have length n.
    """

    hessian: tuple[tuple[float, ...], ...]
    start: tuple[float, ...]
    center: tuple[float, ...] | None = None

    @cached_property
    def layout(self) -> Layout:
        return Layout({"w": (len(self.start),)})

    def init(self, seed: int) -> Tensor:
        return torch.tensor(self.start)

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        h = torch.tensor(self.hessian, dtype=params.dtype, device=params.device)
        c = torch.tensor(
            self.center or (0.0,) * self.layout.n,
            dtype=params.dtype,
            device=params.device,
        )
        d = params - c
        return 0.5 * d @ h @ d + batch[0].to(params.dtype) @ d

    def flops(self, items: int, gradient: bool = False) -> int:
        forward = 2 * (self.layout.n**2 + self.layout.n + items * self.layout.n)
        return 2 * forward if gradient else forward


@dataclass
class Task:
    """An optimizee on a data set: loss and gradient at indices of training items.

    This is all that a method sees. Indices are ``[B]`` int64; parameters ``[n]``.
    """

    optimizee: Any
    data: DataSet
    chunk: int = 2_000
    """Items a full-data pass handles at once (memory only, the value is a sum)."""
    _value_and_grad: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._value_and_grad = torch.func.grad_and_value(self.loss)
        _ = self.optimizee.layout  # cached now, not under torch.compile: see Layout

    @property
    def items(self) -> int:
        """Number of training items."""
        return len(self.data.train)

    def losses(self, params: Tensor, idx: Tensor) -> Tensor:
        """Per-item losses ``[B]`` of the training items ``idx [B]``."""
        batch = self.data.train.items(idx, params.dtype)
        return self.optimizee.losses(params, batch)

    def loss(self, params: Tensor, idx: Tensor) -> Tensor:
        """Mean loss over the training items ``idx [B]``."""
        return self.losses(params, idx).mean()

    def loss_and_grad(self, params: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and its gradient ``[n]``."""
        grad, value = self._value_and_grad(params, idx)
        return value, grad

    def full_loss(self, params: Tensor) -> Tensor:
        """Loss over the whole training set."""
        return self._over(self.data.train, params, self.optimizee.losses)

    def test_loss(self, params: Tensor) -> Tensor:
        return self._over(self.data.test, params, self.optimizee.losses)

    def test_error(self, params: Tensor) -> Tensor:
        return self._over(self.data.test, params, self.optimizee.errors)

    def _over(self, split: Split, params: Tensor, per_item: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=params.device)
        for start in range(0, len(split), self.chunk):
            stop = min(start + self.chunk, len(split))
            idx = torch.arange(start, stop, device=params.device)
            values = per_item(params, split.items(idx, params.dtype))
            total = total + values.double().sum()
        return total / len(split)
