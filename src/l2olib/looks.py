"""Trainings that look, at their marks, at more than losses.

At weights that no gradient reaches (:class:`Idle`), at the size of the weights
(:class:`Norms`), and at what the network of a learned optimizer answers there, now and
at other steps (:class:`Heads`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .data import train_indices
from .learned.mlp import MLPOptimizer
from .optimizers import State
from .train import Metas, Trace, Training, TrainingJob


@dataclass(frozen=True)
class Idle(Training):
    """A training that looks, at every mark, at the weights that no gradient reaches.

    Idle are the weights whose gradient on the first ``seen`` training items is exactly
    zero at that mark: in a network of ReLUs those of units that none of these items
    activates, and those between two that are never on together. Its record also holds,
    ``[R, marks]`` each, the share of weights that are ``idle``; the ``growth`` of
    these, their norm over the norm of the same weights at the start (NaN if there are
    none); and full and held-out losses and held-out error of the network with its idle
    weights set to zero, ``pruned.full_loss`` and so on. On the items seen that network
    has the same outputs, but for units that an idle weight had kept off, and where
    losses are so large that a gradient rounds to zero.
    """

    seen: int = 2_048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seen < 1:
            raise ValueError(f"seen must be at least 1 item, not {self.seen}")

    def job(self, device: str, compile: bool, metas: Metas) -> IdleJob:
        return IdleJob(self, metas, device, compile)


@dataclass
class IdleJob(TrainingJob):
    """The resumable computation of an :class:`Idle`."""

    config: Idle

    def measure(self, method: State, end: int) -> Trace:
        c, params = self.config, method["params"]
        idx = torch.arange(min(c.seen, self.task.items), device=self.device)
        reached = torch.func.vmap(lambda at: self.task.loss_and_grad(at, idx)[1])
        idle = reached(params) == 0
        first = torch.stack([c.optimizee.init(s) for s in c.group]).to(params)
        pruned = params.masked_fill(idle, 0.0)
        found = {f"pruned.{k}": look(pruned) for k, look in self.looks.items()}
        found["idle"] = idle.float().mean(1)
        now, before = (v.masked_fill(~idle, 0.0).norm(dim=1) for v in (params, first))
        found["growth"] = now / before
        return super().measure(method, end) | found


@dataclass(frozen=True)
class Norms(Training):
    """A training that looks, at every mark, at the size of its weights.

    Its record also holds ``norms [R, marks, P]``: of each of the P tensors of the
    optimizee, in its layout's order, the Euclidean norm.
    """

    def job(self, device: str, compile: bool, metas: Metas) -> NormsJob:
        return NormsJob(self, metas, device, compile)


@dataclass
class NormsJob(TrainingJob):
    """The resumable computation of a :class:`Norms`."""

    def measure(self, method: State, end: int) -> Trace:
        parts = self.config.optimizee.layout.views(method["params"]).values()
        norms = torch.stack([part.flatten(1).norm(dim=1) for part in parts], 1)
        return super().measure(method, end) | {"norms": norms}


@dataclass(frozen=True)
class Heads(Training):
    """A training by a per-parameter MLP that looks, at every mark, at its heads.

    They are read for the gradient of the next batch: at the step that it is, and with
    the features of time as they are at each of the steps ``clocks``, all others held.
    Its record also holds ``heads [R, marks, 1 + clocks, heads, 4]``: over all weights
    the mean, the deviation, the smallest and the largest of each head; and ``small [R,
    marks]``: of the weights that a gradient has reached, the share whose mean square
    gradient is below the 1e-6 that the optimizer adds to it under the root.
    """

    clocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        optimizer = getattr(self.method, "optimizer", None)
        if not isinstance(optimizer, MLPOptimizer):
            raise ValueError("the method must be one MLPOptimizer alone: it has heads")

    def job(self, device: str, compile: bool, metas: Metas) -> HeadsJob:
        return HeadsJob(self, metas, device, compile)


@dataclass
class HeadsJob(TrainingJob):
    """The resumable computation of a :class:`Heads`."""

    config: Heads

    def measure(self, method: State, end: int) -> Trace:
        c, optimizer = self.config, self.config.method.optimizer
        batches = [
            train_indices(
                self.task.items, c.batch, seed, end, 1, device=self.device
            )[0]
            for seed in c.group
        ]  # fmt: skip
        clocks = [torch.tensor(at, device=self.device) for at in c.clocks]

        def read(params: Tensor, state: State, idx: Tensor) -> Tensor:
            grad = self.task.loss_and_grad(params, idx)[1]
            look = (self.metas["optimizer"], grad, state, params)
            heads = torch.stack(
                [optimizer.heads_at(*look, at) for at in (state["step"], *clocks)]
            )
            spread = (heads.mean(-1), heads.std(-1), heads.amin(-1), heads.amax(-1))
            return torch.stack(spread, -1)

        state = method["optimizer"]
        found = torch.func.vmap(read)(method["params"], state, torch.stack(batches))
        reached, r = state["r"] > 0, state["r"]
        small = ((r < 1e-6) & reached).sum(1) / reached.sum(1)
        return super().measure(method, end) | {"heads": found, "small": small}
