"""Hand-crafted optimizers and the interface that learned ones share.

An optimizer is a frozen dataclass (its hyperparameters, hence its identity in a
record) with pure functions on flat vectors::

    meta  = optimizer.init_meta(seed)            # {} for a hand-crafted one
    state = optimizer.init(params)               # nested dict of tensors
    delta, state = optimizer.update(meta, grad, state, params, loss=None)
    params = params + delta

States are pytrees of tensors, step counters included, so that ``vmap``, checkpoints
and ``torch.where`` treat every optimizer alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Meta = dict[str, Tensor]
State = dict[str, Any]


class Optimizer(Protocol):
    """The interface: ``grad``, ``params``, ``delta`` are ``[n]``, ``loss`` a scalar."""

    def init_meta(self, seed: int) -> Meta: ...

    def init(self, params: Tensor) -> State: ...

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]: ...

    def flops(self, n: int) -> int:
        """Matrix work (2 FLOP a multiply-add) of one update of ``n`` coordinates."""
        ...


def _count(params: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=params.device)


@dataclass(frozen=True)
class PowerDecay:
    """lr(t) = lr0 / (t / tau + 1)^power, t = 1, 2, ... (LGL2O, Algorithm 2, App. D).

    ``power = 0`` is a constant rate.
    """

    lr0: float
    tau: float = 50_000.0
    power: float = 1.5

    def __call__(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.lr0 * (t.to(dtype) / self.tau + 1) ** -self.power


def constant(lr: float) -> PowerDecay:
    """A constant learning rate."""
    return PowerDecay(lr, 1.0, 0.0)


@dataclass(frozen=True)
class _HandCrafted:
    """Shared: no meta-parameters, a schedule clock ``step``, element-wise work."""

    lr: PowerDecay

    def init_meta(self, seed: int) -> Meta:
        return {}

    def init(self, params: Tensor) -> State:
        return {"step": _count(params)}

    def flops(self, n: int) -> int:
        return 0


@dataclass(frozen=True)
class SGD(_HandCrafted):
    """Gradient descent, optionally with heavy-ball momentum: v = m v + g, x -= lr v.

    The form of ``torch.optim.SGD`` (the learning rate multiplies the whole velocity).
    """

    momentum: float = 0.0

    def init(self, params: Tensor) -> State:
        state: State = {"step": _count(params)}
        if self.momentum:
            state["velocity"] = torch.zeros_like(params)
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
        step = state["step"] + 1
        new: State = {"step": step}
        direction = grad
        if self.momentum:
            direction = new["velocity"] = self.momentum * state["velocity"] + grad
        return -self.lr(step, grad.dtype) * direction, new


@dataclass(frozen=True)
class Adam(_HandCrafted):
    """Adam (Kingma & Ba 2015) with bias correction, as ``torch.optim.Adam``.

    ``count`` (bias correction) belongs to the moments and goes back with them when a
    guard restores them; ``step`` is the schedule's clock and does not.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def init(self, params: Tensor) -> State:
        return {
            "step": _count(params),
            "count": _count(params),
            "m": torch.zeros_like(params),
            "v": torch.zeros_like(params),
        }

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        step, count = state["step"] + 1, state["count"] + 1
        m = self.beta1 * state["m"] + (1 - self.beta1) * grad
        v = self.beta2 * state["v"] + (1 - self.beta2) * grad * grad
        t = count.to(grad.dtype)
        m_hat = m / (1 - self.beta1**t)
        v_hat = v / (1 - self.beta2**t)
        delta = -self.lr(step, grad.dtype) * m_hat / (v_hat.sqrt() + self.eps)
        return delta, {"step": step, "count": count, "m": m, "v": v}
