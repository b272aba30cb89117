"""The coordinate-wise LSTM optimizer (Andrychowicz et al. 2016; LGL2O, section 4).

One small LSTM, its weights shared by all coordinates, reads each coordinate's gradient
and writes its step; the hidden state is the coordinate's own memory.

Recurrent state is feature-major, ``[hidden, n]``: a layer is then ONE ``addmm`` of its
``[4 hidden, inputs + hidden]`` weights with all coordinates, and every gate is a
contiguous slice. The textbook layout ``[n, hidden]`` gives the same numbers, slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optimizers import Meta, State, check_least
from ..records import later


def log_and_sign(grad: Tensor, p: float) -> Tensor:
    """Split a gradient ``[n]`` of any scale into two moderate features ``[2, n]``.

    (log|g| / p, sign g) where |g| >= exp(-p), else (-1, exp(p) g): Andrychowicz et al.
    2016, appendix A. Both branches of the ``where`` are finite for finite ``g``, so
    that second derivatives are too.
    """
    small = math.exp(-p)
    magnitude = grad.abs()
    large = magnitude >= small
    log = torch.where(large, magnitude, torch.ones_like(grad)).log() / p
    return torch.stack(
        [
            torch.where(large, log, -torch.ones_like(grad)),
            torch.where(large, grad.sign(), grad * math.exp(p)),
        ]
    )


@dataclass(frozen=True)
class LSTMOptimizer:
    """Two-layer coordinate-wise LSTM with a linear output.

    ``p``: preprocessing constant; ``scale``: factor on the output. Both are open in the
    LGL2O paper. Meta-parameters, for layer l:
    ``w{l} [4 hidden, inputs + hidden]`` (gates i, f, g, o), ``b{l} [4 hidden, 1]``,
    then ``w_out [1, hidden]`` and ``b_out [1, 1]``.

    ``learned_start``: the memory that every coordinate begins with is learned, too
    (Meta Guard): meta-parameters ``h{l}`` and ``c{l} [hidden, 1]``, zero at first and
    named like the entries of the state that they start.
    """

    hidden: int = 20
    layers: int = 2
    p: float = 10.0
    scale: float = 0.1
    learned_start: bool = later(False)

    def __post_init__(self) -> None:
        check_least(self, hidden=1, layers=1)
        if not 0 < self.p <= 88:  # exp(p) is a number in float32
            raise ValueError(f"p must be above 0 and at most 88, not {self.p}")

    @property
    def inputs(self) -> tuple[int, ...]:
        """Input features of each layer."""
        return (2,) + (self.hidden,) * (self.layers - 1)

    def init_meta(self, seed: int) -> Meta:
        """Draw float32 meta-parameters: U(-1/sqrt(hidden), +), PyTorch's LSTM default.

        The two bias vectors of ``torch.nn.LSTMCell`` enter only through their sum,
        which is what is drawn and kept here.
        """
        gen = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.hidden)

        def uniform(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=gen) * 2 - 1) * bound

        meta: Meta = {}
        for layer, inputs in enumerate(self.inputs):
            meta[f"w{layer}"] = uniform(4 * self.hidden, inputs + self.hidden)
            meta[f"b{layer}"] = uniform(4 * self.hidden, 1) + uniform(
                4 * self.hidden, 1
            )
        meta["w_out"] = uniform(1, self.hidden)
        meta["b_out"] = uniform(1, 1)
        if self.learned_start:
            meta |= {name: torch.zeros(self.hidden, 1) for name in self.memory}
        return meta

    @property
    def memory(self) -> list[str]:
        """Entries of the state with a number for each unit and coordinate."""
        return [f"{kind}{k}" for k in range(self.layers) for kind in ("h", "c")]

    def init(self, params: Tensor) -> State:
        zero = params.new_zeros(self.hidden, params.shape[-1])
        state: State = {name: zero.clone() for name in self.memory}
        if self.learned_start:
            state["begun"] = params.new_zeros((), dtype=torch.bool)
        return state

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        x = log_and_sign(grad, self.p)
        new: State = {}
        if self.learned_start:
            began = state["begun"]
            state = {k: torch.where(began, state[k], meta[k]) for k in self.memory}
            new["begun"] = torch.ones_like(began)
        for layer in range(self.layers):
            h, c = state[f"h{layer}"], state[f"c{layer}"]
            gates = torch.addmm(meta[f"b{layer}"], meta[f"w{layer}"], torch.cat([x, h]))
            i, f, g, o = gates.split(self.hidden)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            new[f"h{layer}"], new[f"c{layer}"] = x, c
        out = torch.addmm(meta["b_out"], meta["w_out"], x)
        return self.scale * out[0], new

    def flops(self, n: int) -> int:
        per = sum(4 * self.hidden * (i + self.hidden) for i in self.inputs)
        return 2 * n * (per + self.hidden)
