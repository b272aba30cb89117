"""Language models: optimizees whose items are runs of words.

A model reads the words ``x [B, T]`` of its items and predicts the next word at each of
the ``T`` places, ``y [B, T]``. Its per-item loss is the mean over the places, so a
batch's loss is in nats a word. Both models are those of STAR's tasks (Harrison, Metz,
Sohl-Dickstein, NeurIPS 2022; sizes and initial distributions from the public code
google/learned_optimization).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .optimizees import Classifier, Layout, normalized, truncated_start


@dataclass(frozen=True)
class _LanguageModel(Classifier):
    """Shared: an embedding before, a linear layer after, the mean over places.

    ``length`` is the number of words in an item.
    """

    vocabulary: int
    length: int


@dataclass(frozen=True)
class LSTMLanguageModel(_LanguageModel):
    """One layer of LSTM cells with a learned initial state (RNNLM of STAR's tasks).

    The weight reads embedding and hidden state side by side; gates in the order input,
    candidate, forget, output, and 1 is added to the forget gate.
    """

    embedding: int = 128
    hidden: int = 256

    @cached_property
    def layout(self) -> Layout:
        return Layout(
            {
                "embedding": (self.vocabulary, self.embedding),
                "hidden": (self.hidden,),
                "cell": (self.hidden,),
                "gates": (self.embedding + self.hidden, 4 * self.hidden),
                "gates_bias": (4 * self.hidden,),
                "w": (self.hidden, self.vocabulary),
                "b": (self.vocabulary,),
            }
        )

    def init(self, seed: int) -> Tensor:
        return truncated_start(self.layout, seed, {"embedding": 1.0})

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        p = self.layout.views(params)
        reads, recurs = p["gates"].split([self.embedding, self.hidden])
        inputs = F.embedding(x, p["embedding"]) @ reads + p["gates_bias"]
        h = p["hidden"].expand(len(x), -1)
        c = p["cell"].expand(len(x), -1)
        states = []
        for read in inputs.unbind(1):
            i, g, f, o = torch.addmm(read, h, recurs).chunk(4, 1)
            c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, 1) @ p["w"] + p["b"]

    def flops(self, items: int, gradient: bool = False) -> int:
        """Every input gradient is needed: embedding and initial state are learned."""
        shapes = self.layout.shapes
        word = math.prod(shapes["gates"]) + math.prod(shapes["w"])
        return 2 * items * self.length * word * (3 if gradient else 1)


@dataclass(frozen=True)
class TransformerLanguageModel(_LanguageModel):
    """A decoder with the norm before each block, as STAR's: no encoding of positions,
    tanh-GELU, four times ``width`` inside.

    Their dropout of 0.1 is left out: a loss here is a pure function of parameters and
    batch.
    """

    layers: int = 5
    width: int = 256
    heads: int = 8

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"the width, {self.width}, must be a multiple of the {self.heads} heads"
            )

    @cached_property
    def layout(self) -> Layout:
        d = self.width
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, d)}
        for k in range(self.layers):
            shapes[f"{k}attend_scale"] = shapes[f"{k}attend_offset"] = (d,)
            for name in ("query", "key", "value", "out"):
                shapes[f"{k}{name}"] = (d, d)
                shapes[f"{k}{name}_bias"] = (d,)
            shapes[f"{k}dense_scale"] = shapes[f"{k}dense_offset"] = (d,)
            shapes[f"{k}up"] = (d, 4 * d)
            shapes[f"{k}up_bias"] = (4 * d,)
            shapes[f"{k}down"] = (4 * d, d)
            shapes[f"{k}down_bias"] = (d,)
        shapes["last_scale"] = shapes["last_offset"] = (d,)
        return Layout(shapes | {"w": (d, self.vocabulary), "b": (self.vocabulary,)})

    def init(self, seed: int) -> Tensor:
        """Inside the layers variance 2 / layers / fan-in, after the cut."""
        deviations = {"embedding": 1.0}
        for name, shape in self.layout.shapes.items():
            if name[0].isdigit() and len(shape) > 1:
                s = math.sqrt(2 / self.layers / shape[0])
                deviations[name] = s / CUT
        return truncated_start(self.layout, seed, deviations)

    def logits(self, params: Tensor, x: Tensor) -> Tensor:
        p = self.layout.views(params)

        def norm(h: Tensor, name: str) -> Tensor:
            return normalized(h, -1, p[f"{name}_scale"], p[f"{name}_offset"])

        def linear(h: Tensor, name: str) -> Tensor:
            return h @ p[name] + p[f"{name}_bias"]

        place = torch.arange(x.shape[1], device=x.device)
        later = place > place[:, None]
        h = F.embedding(x, p["embedding"])
        for k in range(self.layers):
            a = norm(h, f"{k}attend")
            q, key, v = (
                linear(a, f"{k}{name}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            scores = q @ key.transpose(-1, -2) / math.sqrt(self.width // self.heads)
            mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
            h = h + linear(mixed.transpose(1, 2).flatten(2), f"{k}out")
            a = F.gelu(linear(norm(h, f"{k}dense"), f"{k}up"), approximate="tanh")
            h = h + linear(a, f"{k}down")
        return norm(h, "last") @ p["w"] + p["b"]

    def flops(self, items: int, gradient: bool = False) -> int:
        """Counts the scores of later words too, which are computed and masked."""
        inside = self.layers * (12 * self.width**2 + 2 * self.length * self.width)
        word = inside + self.width * self.vocabulary
        return 2 * items * self.length * word * (3 if gradient else 1)


CUT = 0.87962566103423978
"""Deviation of a standard normal that is cut at two deviations."""
