"""Meta-training by truncated back-propagation through the unrolled optimization.

A rollout trains one freshly drawn optimizee for ``rollout`` inner steps. It is cut into
truncations: after each, the meta-loss (the sum of the optimizee's mini-batch losses
along it) is differentiated with respect to the meta-parameters, one Adam step is made
on them, and parameters and hidden state are carried on without their history
(Andrychowicz et al. 2016; LGL2O, App. D: rollout 100, truncation 20).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..data import load, train_batches, train_indices
from ..optimizees import Layout, Task, check_built_for
from ..optimizers import (
    Adam,
    Meta,
    Optimizer,
    State,
    check_least,
    check_literals,
    constant,
)
from ..records import later
from ..train import OVERHEAD, RATE, Order, accelerated, compiled, inner_steps

TRAINING, VALIDATION = 1_000_000, 900_000
"""Where meta-training and its validation take optimizee seeds; figures use 0, 1, ..."""


def meta_gradient(
    task: Task,
    update: Callable[..., Any],
    meta: Meta,
    params: Tensor,
    state: State,
    idx: Tensor,
    order: Order = "first",
) -> tuple[Meta, Tensor, Tensor, State]:
    """Differentiate the sum of one truncation's losses; cut the history behind it.

    Returns the meta-gradient, the losses ``[T]``, and detached parameters and state.
    """
    leaves = {k: v.detach().requires_grad_() for k, v in meta.items()}
    params, state, losses = inner_steps(
        task, update, leaves, params, state, idx, order=order
    )
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
    cut = {k: v.detach() for k, v in state.items()}
    return dict(zip(leaves, grads, strict=True)), losses.detach(), params.detach(), cut


def cut(losses: Tensor, ceiling: float | None, classes: int) -> Tensor:
    """Cut losses off below 0 and above ``ceiling`` times ln(classes).

    Normalised, in the words of STAR's reference code. NaN becomes the ceiling (in the
    reference for MLPs only; a NaN of its ConvNets makes the whole estimate zero). None
    leaves losses as they are.
    """
    if ceiling is None:
        return losses
    top = ceiling * math.log(classes)
    return losses.clamp(0, top).nan_to_num(nan=top)


def too_short(truncation: int) -> str:
    """Why a truncation of one step cannot be differentiated."""
    return (
        f"truncation must be at least 2, not {truncation}: its first loss does not "
        "depend on the meta-parameters"
    )


class MetaWork:
    """What the configurations of all meta-trainings share.

    They are frozen dataclasses with the fields below, and ``rollouts``, the number of
    pieces they are done in, ``rollout``, the length of a validation, ``outer``, the
    optimizer of the meta-parameters; see :class:`MetaTraining`.
    """

    optimizer: Any
    seed: Any
    rollouts: Any
    meta_lr: Any
    validate_every: Any
    validation_seeds: Any
    selects = True
    """Whether the result is what validated best, or what came last."""

    def __post_init__(self) -> None:
        """Check what all meta-trainings share: ValueError."""
        # seeds below 0 are those of trainings and validations
        check_least(self, seed=0, rollouts=0, validate_every=1, validation_seeds=1)
        if not 0 < self.meta_lr < math.inf:
            raise ValueError(f"meta_lr must be positive, not {self.meta_lr}")

    @property
    def layout(self) -> Layout:
        """Layout of the meta-parameters as one vector."""
        return Layout.of(self.optimizer.init_meta(self.seed))

    @property
    def seeds(self) -> tuple[int]:
        return (self.seed,)

    def snapshots(self) -> list[int]:
        """Rollout counts (0 included, about two a doubling) of the kept snapshots."""
        counts, k = {0, self.rollouts}, 1.0
        while k < self.rollouts:
            counts.add(round(k))
            k *= 2**0.5
        return sorted(counts)


@dataclass(frozen=True)
class MetaTraining(MetaWork):
    """Everything that determines a truncated meta-training (its configuration).

    ``rollouts`` of ``rollout`` inner steps, one meta-update each ``truncation`` steps
    with Adam at ``meta_lr``. Every ``validate_every`` rollouts the optimizer trains
    ``validation_seeds`` fixed optimizees for ``rollout`` steps; the meta-parameters of
    lowest mean loss are the result. Training ends early when ``patience`` rollouts have
    brought no better ones. Meta-parameters are also kept after those rollouts that
    ``snapshots()`` lists, so that a learning curve can be evaluated later.
    """

    optimizer: Optimizer
    optimizee: Any
    data: str
    batch: int = 128
    rollouts: int = 2_000
    rollout: int = 100
    truncation: int = 20
    meta_lr: float = 1e-3
    order: Order = "first"
    seed: int = 0
    validate_every: int = 20
    validation_seeds: int = 2
    patience: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncation < 2:
            raise ValueError(too_short(self.truncation))
        if self.rollout < 1 or self.rollout % self.truncation:
            raise ValueError(
                "rollout must be a positive multiple of truncation, not "
                f"{self.rollout} and {self.truncation}"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f"patience must be None or at least 1, not {self.patience}"
            )
        check_literals(self)
        check_built_for(self.optimizee, self.optimizer)

    @property
    def outer(self) -> Optimizer:
        return Adam(constant(self.meta_lr))

    def job(self, device: str, compile: bool, metas: Any) -> MetaTrainingJob:
        return MetaTrainingJob(self, device, compile)

    def seconds(self) -> float:
        """Estimated time on one CPU core."""
        n = self.optimizee.layout.n
        flops = 3 * self.optimizer.flops(n) + self.optimizee.flops(self.batch, True)
        return self.rollouts * self.rollout * (flops / RATE + OVERHEAD)


@dataclass
class MetaJob:
    """The resumable computation of a :class:`MetaWork`, but for one thing: a subclass
    gives ``advance``, which makes a rollout and its meta-updates, then looks.
    """

    config: Any
    device: str = "cpu"
    compile: bool = False
    task: Task = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.task = Task(c.optimizee, load(c.data, device=self.device))
        self.layout = c.layout
        self.outer = c.outer
        self.update = compiled(c.optimizer.update, self.compile)
        self.marks = c.snapshots()

    def start(self) -> State:
        c = self.config
        meta = self.layout.flatten(c.optimizer.init_meta(c.seed)).to(self.device)
        validations = c.rollouts // c.validate_every + 1
        nan = float("nan")
        state: State = {
            "rollouts": torch.zeros((), dtype=torch.int64),
            "meta": meta,
            "adam": self.outer.init(meta),
            "best": meta.clone(),
            "best_value": torch.tensor(float("inf"), dtype=torch.float64),
            "training": torch.full((c.rollouts,), nan, dtype=torch.float64),
            "validation": torch.full((validations,), nan, dtype=torch.float64),
            "snapshots": torch.zeros(len(self.marks), self.layout.n),
        }
        return self._look(state)

    def position(self, state: State) -> tuple[int, int]:
        c, done = self.config, int(state["rollouts"])
        best = int(state["validation"].nan_to_num(torch.inf).argmin())
        exhausted = c.patience and done - best * c.validate_every >= c.patience
        return done, done if exhausted else c.rollouts

    def _look(self, state: State) -> State:
        """Keep a snapshot, and validate, at the rollout counts where that is due."""
        c, done = self.config, int(state["rollouts"])
        if done in self.marks:
            state["snapshots"][self.marks.index(done)] = state["meta"].cpu()
        if done % c.validate_every == 0:
            value = self.validate(state["meta"])
            state["validation"][done // c.validate_every] = value
            if value < state["best_value"]:
                state |= {"best": state["meta"].clone(), "best_value": value}
        return state

    @torch.no_grad()
    def validate(self, meta: Tensor) -> Tensor:
        """Mean loss along validation rollouts; infinite if any loss is not finite."""
        c, total = self.config, torch.zeros((), dtype=torch.float64)
        for j in range(c.validation_seeds):
            seed = VALIDATION + j
            idx = train_indices(self.task.items, c.batch, seed, 0, c.rollout)
            params = c.optimizee.init(seed).to(self.device)
            hidden = c.optimizer.init(params)
            views = self.layout.views(meta)
            *_, losses = inner_steps(
                self.task, self.update, views, params, hidden, idx.to(self.device)
            )
            total += self.meta_loss(losses).double().mean().cpu()
        value = total / c.validation_seeds
        return torch.where(value.isfinite(), value, torch.inf)

    def meta_loss(self, losses: Tensor) -> Tensor:
        """What is minimized, of the losses along an unroll; here these themselves."""
        return losses

    def finish(self, state: State) -> dict[str, Tensor]:
        meta = state["best" if self.config.selects else "meta"].cpu()
        result, done = self.layout.views(meta), int(state["rollouts"])
        kept = [k for k, mark in enumerate(self.marks) if mark <= done]
        return {f"meta.{k}": v.clone() for k, v in result.items()} | {
            "training": state["training"][:done].float(),
            "validation": state["validation"][
                : done // self.config.validate_every + 1
            ].float(),
            "snapshots": state["snapshots"][kept],
            "snapshot_rollouts": torch.tensor(self.marks)[kept],
        }


@dataclass
class MetaTrainingJob(MetaJob):
    """The resumable computation of a :class:`MetaTraining`; one rollout a piece."""

    config: MetaTraining

    def advance(self, state: State) -> State:
        c, done = self.config, int(state["rollouts"])
        base = TRAINING * (c.seed + 1)
        idx = train_indices(
            self.task.items, c.batch, base, done * c.rollout, c.rollout
        ).to(self.device)
        params = c.optimizee.init(base + done).to(self.device)
        hidden = c.optimizer.init(params)
        meta, adam, total = state["meta"], state["adam"], 0.0
        for part in idx.split(c.truncation):
            grads, losses, params, hidden = meta_gradient(
                self.task, self.update, self.layout.views(meta), params, hidden, part,
                c.order,
            )  # fmt: skip
            gradient = self.layout.flatten(grads)
            if gradient.isfinite().all():  # else Adam's averages would never recover
                step, adam = self.outer.update({}, gradient, adam, meta)
                meta = meta + step
            total += losses.double().sum().item()
        training = state["training"].clone()
        training[done] = total / c.rollout
        state = state | {"meta": meta, "adam": adam, "training": training}
        state["rollouts"] = state["rollouts"] + 1
        return self._look(state)


@dataclass(frozen=True)
class LearningCurve:
    """How well every snapshot of a meta-training trains some optimizee (LGL2O Fig. 2).

    Every ``stride``-th snapshot, counted from the last, takes ``steps`` steps on each
    seed's optimizee, and so do the resulting ("selected") meta-parameters; the
    meta-objective is the mean mini-batch loss along the way, cut off by :func:`cut` at
    the ``ceiling`` of the meta-training that ``weights`` names. With no weights it is
    that of the optimizer before any meta-training: every seed draws its own (from
    another stream than its optimizee's parameters).
    """

    optimizer: Optimizer
    optimizee: Any
    data: str
    weights: dict[str, str]
    seeds: tuple[int, ...]
    batch: int = 128
    steps: int = 100
    stride: int = 1
    digests: dict[str, str] = field(default_factory=dict)
    ceiling: float | None = later(None)

    def job(self, device: str, compile: bool, metas: Any) -> LearningCurveJob:
        return LearningCurveJob(self, metas.get("optimizer"), device, compile)

    def seconds(self) -> float:
        flops = self.optimizer.flops(self.optimizee.layout.n)
        flops += self.optimizee.flops(self.batch, True)
        curve = 24 / self.stride if self.weights else 1
        return curve * len(self.seeds) * self.steps * (flops / RATE + OVERHEAD)


def strided_snapshots(stride: int, trained: Mapping[str, Tensor]) -> list[int]:
    """Which of a meta-training's snapshots: each ``stride``-th, and the last."""
    last = len(trained["snapshots"]) - 1
    return list(range(last % stride, last + 1, stride))


@dataclass
class LearningCurveJob:
    """The resumable computation of a :class:`LearningCurve`; one snapshot a piece.

    ``trained`` are the arrays of the meta-training's record, or None. All seeds are
    computed at once.
    """

    config: LearningCurve
    trained: dict[str, Tensor] | None = None
    device: str = "cpu"
    compile: bool = False

    def __post_init__(self) -> None:
        c = self.config
        self.task = Task(c.optimizee, load(c.data, device=self.device))
        drawn = [c.optimizer.init_meta(TRAINING + seed) for seed in c.seeds]
        self.layout = Layout.of(drawn[0])
        if self.trained is None:
            self.rollouts = torch.tensor([0])
            metas = torch.stack([self.layout.flatten(meta) for meta in drawn])[None]
        else:
            chosen = strided_snapshots(c.stride, self.trained)
            self.rollouts = self.trained["snapshot_rollouts"][chosen]
            result = {k: self.trained[f"meta.{k}"] for k in self.layout.shapes}
            metas = torch.cat(
                [self.trained["snapshots"][chosen], self.layout.flatten(result)[None]]
            )[:, None].expand(-1, len(c.seeds), -1)
        self.metas = metas  # [looks, seeds, d]

        def step(meta: Tensor, params: Tensor, state: State, idx: Tensor) -> Any:
            params, state, losses = inner_steps(
                self.task, c.optimizer.update, self.layout.views(meta), params, state,
                idx[None],
            )  # fmt: skip
            return losses[0], params, state

        self.step = accelerated(torch.func.vmap(step), self.compile, self.device)

    def start(self) -> State:
        shape = len(self.config.seeds), len(self.metas)
        return {
            "done": torch.zeros((), dtype=torch.int64),
            "objective": torch.full(shape, torch.nan),
            "last": torch.full(shape, torch.nan),
        }

    def position(self, state: State) -> tuple[int, int]:
        return int(state["done"]), len(self.metas)

    @torch.no_grad()
    def advance(self, state: State) -> State:
        c, k = self.config, int(state["done"])
        params = torch.stack([c.optimizee.init(s).to(self.device) for s in c.seeds])
        hidden = tree_map(lambda *x: torch.stack(x), *map(c.optimizer.init, params))
        batches = train_batches(
            self.task.items, c.batch, c.seeds, 0, c.steps, self.device
        )
        meta = self.metas[k].to(self.device)
        total = meta.new_zeros(len(c.seeds), dtype=torch.float64)
        for idx in batches.unbind(1):
            loss, params, hidden = self.step(meta, params, hidden, idx)
            total = total + cut(loss, c.ceiling, self.task.data.classes).double()
        state["objective"][:, k] = (total / c.steps).cpu()
        state["last"][:, k] = loss.cpu()
        return state | {"done": state["done"] + 1}

    def finish(self, state: State) -> dict[str, Tensor]:
        found = {"rollouts": self.rollouts}
        for name in ("objective", "last"):
            found[name] = state[name][:, : len(self.rollouts)]
            if self.trained is not None:
                found[f"selected.{name}"] = state[name][:, -1]
        return found
