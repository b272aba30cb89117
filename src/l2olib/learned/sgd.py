"""SGD whose learning rate, and momentum, are meta-parameters.

The smallest learned optimizer: on a quadratic its meta-gradient is known exactly, which
makes it the test piece of meta-training methods. As LearnableSGD and LearnableSGDM of
the public reference code (google/learned_optimization).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optimizers import Meta, State


@dataclass(frozen=True)
class LearnableSGD:
    """v <- g + momentum v, x <- x - lr v, from initial values ``lr`` and ``momentum``.

    Meta-parameters ``log_lr [1]`` and, unless ``momentum`` is None (plain SGD),
    ``log_one_minus_momentum [1]``.
    """

    lr: float = 0.01
    momentum: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, not {self.lr}")
        if self.momentum is not None and not self.momentum < 1:
            raise ValueError(f"momentum must be below 1, not {self.momentum}")

    def init_meta(self, seed: int) -> Meta:
        meta = {"log_lr": torch.tensor([math.log(self.lr)])}
        if self.momentum is not None:
            start = math.log(1 - self.momentum)
            meta["log_one_minus_momentum"] = torch.tensor([start])
        return meta

    def init(self, params: Tensor) -> State:
        return {} if self.momentum is None else {"velocity": torch.zeros_like(params)}

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        lr = meta["log_lr"].exp()
        if self.momentum is None:
            return -lr * grad, {}
        momentum = 1 - meta["log_one_minus_momentum"].exp()
        velocity = grad + momentum * state["velocity"]
        return -lr * velocity, {"velocity": velocity}

    def flops(self, n: int) -> int:
        return 0
