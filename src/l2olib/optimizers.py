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

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

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


def check_least(config: Any, **lowest: int) -> None:
    """Refuse a configuration of which a field is below its ``lowest`` value, or NaN."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if not value >= low:
            raise ValueError(f"{name} must be at least {low}, not {value}")


def check_among(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse a value that is none of the ``allowed`` ones."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")


def check_literals(config: Any) -> None:
    """Refuse a configuration of which a field has none of its Literal type's values."""
    kind: Any = type(config)
    for name, allowed in _literals(kind).items():
        check_among(name, getattr(config, name), allowed)


@cache
def _literals(kind: Any) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind)
    return {name: get_args(t) for name, t in hints.items() if get_origin(t) is Literal}


@dataclass(frozen=True)
class PowerDecay:
    """lr(t) = lr0 / (t / tau + 1)^power, t = 1, 2, ... (LGL2O, Algorithm 2, App. D).

    ``power = 0`` is a constant rate.
    """

    lr0: float
    tau: float = 50_000.0
    power: float = 1.5

    def __post_init__(self) -> None:
        check_least(self, lr0=0)
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, not {self.tau}")

    def __call__(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.lr0 * (t.to(dtype) / self.tau + 1) ** -self.power


def constant(lr: float) -> PowerDecay:
    """A constant learning rate."""
    return PowerDecay(lr, 1.0, 0.0)


@dataclass(frozen=True)
class CosineDecay:
    """Warm-up, then a cosine from ``lr0`` to ``floor * lr0`` (STAR's reference code).

    With s = t - 1 the number of steps done, of ``steps``: linear in s during the first
    ``max(warmup, hold)`` of the run if ``warmup`` is positive (so that the warm-up
    leaves no plateau), and a half cosine from ``hold`` to the end; constant after it.
    """

    lr0: float
    steps: int
    warmup: float = 0.0
    hold: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, lr0=0, steps=1)
        if not (0 <= self.hold < 1 and 0 <= self.warmup <= 1):
            raise ValueError(
                "hold must lie in [0, 1) and warmup in [0, 1], not "
                f"{self.hold} and {self.warmup}"
            )

    def __call__(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        s = (t.to(dtype) - 1).clamp(max=self.steps)
        start, low = self.hold * self.steps, self.floor * self.lr0
        done = (s.clamp(min=start) - start) / (self.steps - start)
        value = (self.lr0 - low) * (torch.cos(math.pi * done) + 1) / 2 + low
        if self.warmup:
            end = self.steps * max(self.warmup, self.hold)
            value = torch.where(s < end, self.lr0 * s / end, value)
        return value


Schedule = PowerDecay | CosineDecay


@dataclass(frozen=True)
class _HandCrafted:
    """Shared: no meta-parameters, a schedule clock ``step``, element-wise work."""

    lr: Schedule

    def __post_init__(self) -> None:
        if not callable(self.lr):
            raise ValueError(
                f"lr must be a schedule, such as constant({self.lr}), not {self.lr!r}"
            )

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
    guard restores them; ``step`` is the schedule's clock, which a guard may let run on
    (LGL2O's ``clock``).
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
        m_hat, v_hat, new = self._moments(grad, state)
        lr = self.lr(new["step"], grad.dtype)
        return -lr * m_hat / (v_hat.sqrt() + self.eps), new

    def _averages(self, grad: Tensor, state: State) -> State:
        """Advance the state."""
        return {
            "step": state["step"] + 1,
            "count": state["count"] + 1,
            "m": self.beta1 * state["m"] + (1 - self.beta1) * grad,
            "v": self.beta2 * state["v"] + (1 - self.beta2) * grad * grad,
        }

    def _moments(self, grad: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Advance the state; return the bias-corrected moments and the new state."""
        new = self._averages(grad, state)
        t = new["count"].to(grad.dtype)
        m_hat = new["m"] / (1 - self.beta1**t)
        v_hat = new["v"] / (1 - self.beta2**t)
        return m_hat, v_hat, new


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay and a second epsilon, inside the root.

    x -= lr (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay x), Loshchilov & Hutter
    2019, in optax's form. Two of its settings matter here: the outer optimizer of
    evolution strategies (``eps_root = 0``), and the "tuned Adam" of STAR's baselines,
    ``eps_root = 1e-8`` without decay, which is not torch's Adam where |g| < 1e-4.
    """

    weight_decay: float = 0.0
    eps_root: float = 0.0

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        m_hat, v_hat, new = self._moments(grad, state)
        direction = m_hat / ((v_hat + self.eps_root).sqrt() + self.eps)
        lr = self.lr(new["step"], grad.dtype)
        return -lr * (direction + self.weight_decay * params), new


@dataclass(frozen=True)
class NAdamW(Adam):
    """Nesterov's Adam with weight decay, the tuned baseline of STAR (reference code).

    Unlike :class:`AdamW` it corrects the rate for both biases, and compares ``eps``
    with the root that is not corrected; ``weight_decay`` is multiplied by that rate.
    ``l2`` enters the gradient with a MINUS, as in the reference: positive values grow
    the parameters.
    """

    weight_decay: float = 0.0
    l2: float = 0.0
    nesterov: bool = True

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        grad = grad - self.l2 * params
        new = self._averages(grad, state)
        m, v, t = new["m"], new["v"], new["count"].to(grad.dtype)
        lr = self.lr(new["step"], grad.dtype)
        lr = lr * (1 - self.beta2**t).sqrt() / (1 - self.beta1**t)
        if self.nesterov:
            m = self.beta1 * m + (1 - self.beta1) * grad
        return -lr * (m / (v.sqrt() + self.eps) + self.weight_decay * params), new


@dataclass(frozen=True)
class Wrapped:
    """Another optimizer, changed in one respect; its weights are those of that one."""

    optimizer: Any

    @property
    def layout(self) -> Any:
        return self.optimizer.layout

    def init_meta(self, seed: int) -> Meta:
        return self.optimizer.init_meta(seed)

    def init(self, params: Tensor) -> State:
        return self.optimizer.init(params)

    def flops(self, n: int) -> int:
        return self.optimizer.flops(n)


@dataclass(frozen=True)
class Held(Wrapped):
    """An optimizer under which weights without a gradient stay where they are.

    A weight moves for ``patience`` steps from its last gradient that is not exactly
    zero, that step included, and then no more until it has one again (one that never
    had any: for the first ``patience`` - 1 steps). Ours: a learned
    optimizer may let such weights grow (see :class:`l2olib.looks.Idle`). The
    optimizer itself goes on with its own memory.
    """

    patience: int = 100

    def __post_init__(self) -> None:
        check_least(self, patience=1)

    def init(self, params: Tensor) -> State:
        quiet = torch.zeros_like(params, dtype=torch.int32)
        return super().init(params) | {"quiet": quiet}

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        inner = {name: value for name, value in state.items() if name != "quiet"}
        delta, inner = self.optimizer.update(meta, grad, inner, params, loss=loss)
        quiet = torch.where(grad == 0, state["quiet"] + 1, 0)
        held = torch.where(quiet < self.patience, delta, 0.0)
        return held, inner | {"quiet": quiet}


@dataclass(frozen=True)
class StoppedClock(Wrapped):
    """An optimizer to which every step after the first ``at`` is the same step.

    What it reads of the number of the step, which begins at 0, stays within what it has
    met in unrolls of ``at`` + 1 steps. Ours.
    """

    at: int

    def __post_init__(self) -> None:
        check_least(self, at=0)

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        if "step" not in state:
            raise ValueError(f"{self.optimizer!r} reads no clock that could be stopped")
        state = state | {"step": state["step"].clamp(max=self.at)}
        return self.optimizer.update(meta, grad, state, params, loss=loss)


@dataclass(frozen=True)
class Restarted(Wrapped):
    """An optimizer whose memory starts again every ``every`` steps.

    From its beginning or, with ``average``, from the mean of the memory over all
    coordinates, the last axis of its tensors: so Meta Guard chains its unrolls (Wang
    et al. 2023). Its clock, if it reads one, starts again as well.
    """

    every: int = 10
    average: bool = False

    def __post_init__(self) -> None:
        check_least(self, every=1)

    def init(self, params: Tensor) -> State:
        return {"memory": super().init(params), "steps": _count(params)}

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        memory, steps = state["memory"], state["steps"]
        again = mean_memory(memory) if self.average else self.optimizer.init(params)
        now = steps % self.every == 0
        memory = tree_map(lambda a, b: torch.where(now, a, b), again, memory)
        delta, memory = self.optimizer.update(meta, grad, memory, params, loss=loss)
        return delta, {"memory": memory, "steps": steps + 1}


def mean_memory(state: State) -> State:
    """The memory that all coordinates share on average: tensors ``[..., n]`` of means.

    Numbers that are none of a coordinate (counters) stay.
    """
    return tree_map(
        lambda x: x.mean(-1, keepdim=True).expand_as(x) if x.dim() else x, state
    )
