"""Trainings that look, at their marks, at more than losses.

At weights that no gradient reaches (:class:`Idle`), at the size of the weights
(:class:`Norms`), and at what the network of a learned optimizer answers there, now and
at other steps (:class:`Heads`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .data import train_batches
from .learned.mlp import MLPOptimizer
from .optimizers import State, check_least
from .train import Trace, Training, TrainingJob


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
        check_least(self, seen=1)

    def measure(self, job: TrainingJob, method: State, end: int) -> Trace:
        task, params = job.task, method["params"]
        idx = torch.arange(min(self.seen, task.items), device=job.device)
        reached = torch.func.vmap(lambda at: task.loss_and_grad(at, idx)[1])
        idle = reached(params) == 0
        first = torch.stack([self.optimizee.init(s) for s in self.group]).to(params)
        pruned = params.masked_fill(idle, 0.0)
        found = {f"pruned.{k}": look(pruned) for k, look in job.looks.items()}
        found["idle"] = idle.float().mean(1)
        now, before = (v.masked_fill(~idle, 0.0).norm(dim=1) for v in (params, first))
        found["growth"] = now / before
        return super().measure(job, method, end) | found


@dataclass(frozen=True)
class Norms(Training):
    """A training that looks, at every mark, at the size of its weights.

    Its record also holds ``norms [R, marks, P]``: of each of the P tensors of the
    optimizee, in its layout's order, the Euclidean norm.
    """

    def measure(self, job: TrainingJob, method: State, end: int) -> Trace:
        parts = self.optimizee.layout.views(method["params"]).values()
        norms = torch.stack([part.flatten(1).norm(dim=1) for part in parts], 1)
        return super().measure(job, method, end) | {"norms": norms}


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

    def measure(self, job: TrainingJob, method: State, end: int) -> Trace:
        task, optimizer, device = job.task, self.method.optimizer, job.device
        batches = train_batches(task.items, self.batch, self.group, end, 1, device)
        clocks = [torch.tensor(at, device=device) for at in self.clocks]

        def read(params: Tensor, state: State, idx: Tensor) -> Tensor:
            grad = task.loss_and_grad(params, idx)[1]
            look = (job.metas["optimizer"], grad, state, params)
            heads = torch.stack(
                [optimizer.heads_at(*look, at) for at in (state["step"], *clocks)]
            )
            spread = (heads.mean(-1), heads.std(-1), heads.amin(-1), heads.amax(-1))
            return torch.stack(spread, -1)

        state = method["optimizer"]
        found = torch.func.vmap(read)(method["params"], state, batches[:, 0])
        reached, r = state["r"] > 0, state["r"]
        small = ((r < 1e-6) & reached).sum(1) / reached.sum(1)
        return super().measure(job, method, end) | {"heads": found, "small": small}
