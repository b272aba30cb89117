"""Meta Guard: guards that go on training the learned optimizer while they guard it.

Wang, Kirsch, Faccio, Zhuge and Schmidhuber, "Continually Adapting Optimizers Improve
Meta-Generalization" (2023). An *unroll* takes the iterate x and the meta-parameters
theta (weights of the learned optimizer, and the memory that all coordinates begin with)
T steps on: to y and to theta', which differs from theta in the memory alone, now the
mean over all coordinates of what they ended with. The fallback is one gradient step on
the loss where the unroll ends, in x and in theta together.

:class:`SMG` is their Algorithm 1, :class:`AMG` their Algorithm 2, with ``plain`` as
repaired in this book (Theorem R). :class:`Adapted` is a control, which goes on training
and guards nothing. NaN and infinity are ordinary inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .guards import finite, in_decisions
from .optimizees import Layout, Task
from .optimizers import Meta, Optimizer, State, check_least, check_literals, mean_memory
from .train import Cost, Metas, Order, Trace, Training, TrainingJob, inner_steps


class Point(NamedTuple):
    """What a decision may keep: ``params [n]``, its ``theta``, the ``value`` by which
    it is judged, and the losses ``[T]`` along the unroll that led to it, if one did."""

    params: Tensor
    theta: Meta
    value: Tensor
    path: Tensor | None = None


class Fork(NamedTuple):
    """What all candidates of a decision are made from.

    The iterate x and theta, with loss and gradient on the first batch; the end of the
    unroll from there; and the gradients, in x and in theta, of the loss at that end.
    ``loss`` judges a point, ``unroll`` starts another unroll, on the same batches.
    """

    params: Tensor
    theta: Meta
    first: tuple[Tensor, Tensor]
    end: Tensor
    after: Meta
    path: Tensor
    in_params: Tensor
    in_theta: Meta
    loss: Callable[[Tensor], Tensor]
    unroll: Callable[[Tensor, Meta], tuple[Tensor, Meta, Tensor]]


def choose(which: Tensor, options: list[Any]) -> Any:
    """The option (nested dicts of tensors) of that number, an index tensor."""

    def pick(*leaves: Tensor) -> Tensor:
        def step(kept: Tensor, k: int) -> Tensor:
            return torch.where(which == k, leaves[k], kept)

        return reduce(step, range(1, len(leaves)), leaves[0])

    return tree_map(pick, *options)


@dataclass(frozen=True)
class _MetaGuard(ABC):
    """What the methods of this module share.

    ``proposal``: a learned optimizer whose memory has a learned start
    (``LSTMOptimizer(learned_start=True)``); ``steps``: T; ``lr``, ``meta_lr``: of the
    fallback in x and in theta. Their values are the paper's (App. B).

    What the paper leaves open: all candidates are judged on the same ``n_c`` batches of
    items that the decision's T training batches did not use; all its unrolls take these
    T; the gradient of the loss at the end of an unroll is taken on a batch of its own,
    so that no candidate is judged on what it was made from. (``validation="iid"``: with
    replacement, ``"full"``: judge and gradient on the whole training set.)
    ``order="first"`` holds what enters the learned optimizer fixed, so that the
    gradient in x is that at the end of the unroll; ``"full"`` differentiates through
    it, which takes second derivatives of the optimizee.

    A candidate that is not finite, in itself, its theta or its value, is never kept; if
    none is finite x and theta stay.
    """

    proposal: Any
    steps: int = 10
    lr: float = 3.0
    meta_lr: float = 0.1
    n_c: int = 10
    order: Order = "first"
    validation: Literal["disjoint", "iid", "full"] = "disjoint"

    def __post_init__(self) -> None:
        check_least(self, steps=1, n_c=1, lr=0, meta_lr=0)
        check_literals(self)
        if not self.memory:
            raise ValueError(
                "Meta Guard trains the memory that unrolls begin with: the proposal "
                f"must be an LSTMOptimizer(learned_start=True), not {self.proposal!r}"
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of theta (of which nothing can be drawn under ``vmap``)."""
        return Layout.of(self.proposal.init_meta(0)).shapes

    @cached_property
    def memory(self) -> set[str]:
        """The parts of theta that are the start of the proposal's memory."""
        return self.shapes.keys() & self.proposal.init(torch.zeros(1)).keys()

    @property
    def interval(self) -> int:
        return self.steps

    @property
    def batches(self) -> tuple[int, str] | None:
        """One for the gradient at the end, then those that judge."""
        return None if self.validation == "full" else (self.n_c + 1, self.validation)

    traces: ClassVar[tuple[str, ...]] = (
        "use_l2o",
        "choice",
        "valid_l2o",
        "valid_fallback",
        "drift",
    )

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"proposal": self.proposal}

    def init(self, params: Tensor) -> State:
        """``change``: how far theta has come from the weights that were given."""
        zeros = {name: params.new_zeros(shape) for name, shape in self.shapes.items()}
        return {"params": params, "change": zeros}

    def segment(
        self,
        task: Task,
        metas: Metas,
        state: State,
        train: Tensor,
        valid: Tensor | None,
    ) -> tuple[State, Trace]:
        """Take ``len(train)`` steps: ``train [S, B]``, ``valid [S / T, n_c + 1, B]``.

        T steps count for a decision, whichever candidate is kept. The trace holds, of
        each decision, the number of that candidate (``choice``), whether it is the
        unroll (``use_l2o``), the values of unroll and fallback, and ``drift``, the norm
        of the change of theta's weights; ``loss [S]`` is the mini-batch loss along the
        unroll that was kept. Where none was, the iterate makes its step and rests for
        the others.
        """
        return in_decisions(self, task, metas, state, train, valid)

    def decide(
        self,
        task: Task,
        metas: Metas,
        state: State,
        batches: Tensor,
        held_out: Tensor | None,
    ) -> tuple[State, Trace]:
        """Make the candidates from ``batches [T, B]`` and keep the best."""
        given, x = metas["proposal"], state["params"]
        fork = self.fork(task, given, state, batches, held_out)
        points = self.candidates(fork)
        points.append(Point(x, fork.theta, torch.full_like(points[0].value, torch.inf)))
        sound = [finite([p.params, p.theta, p.value]) for p in points]
        values = torch.stack([p.value for p in points])
        values = torch.where(torch.stack(sound), values, torch.inf)
        order = torch.arange(len(points), device=values.device)
        best = torch.where(values == values.min(), order, len(points)).min()
        best = torch.where(values.min().isfinite(), best, len(points) - 1)
        kept: Tensor = choose(best, [p.params for p in points])
        theta: Meta = choose(best, [p.theta for p in points])
        later = batches[1:]
        rest = task.losses(kept, later.flatten()).view(later.shape).mean(1)
        resting = torch.cat([fork.first[0][None], rest])
        paths = [resting if p.path is None else p.path for p in points]
        change = {name: theta[name] - given[name] for name in given}
        weights = [c.flatten() for k, c in change.items() if k not in self.memory]
        return {"params": kept, "change": change}, {
            "loss": choose(best, paths),
            "use_l2o": best == 0,
            "choice": best,
            "valid_l2o": points[0].value,
            "valid_fallback": points[1].value,
            "drift": torch.cat(weights).norm(),
            "candidates": torch.stack([points[0].params, points[1].params]),
        }

    def fork(
        self,
        task: Task,
        given: Meta,
        state: State,
        batches: Tensor,
        held_out: Tensor | None,
    ) -> Fork:
        """Unroll from the iterate and differentiate the loss at the end."""
        x = state["params"]
        theta = {name: given[name] + state["change"][name] for name in given}
        first = task.loss_and_grad(x, batches[0])

        def unroll(
            params: Tensor, theta: Meta, first: tuple[Tensor, Tensor] | None = None
        ) -> tuple[Tensor, Meta, Tensor]:
            end, memory, losses = inner_steps(
                task,
                self.proposal.update,
                theta,
                params,
                self.proposal.init(params),
                batches,
                first,
                self.order,
            )
            mean = mean_memory(memory)
            shared = {k: mean[k][:, :1] for k in self.memory}
            return end, theta | shared, losses

        def loss(params: Tensor, batches: slice) -> Tensor:
            if held_out is None:
                return task.full_loss(params)
            return task.loss(params, held_out[batches].flatten())

        def adapted(params: Tensor, theta: Meta) -> tuple[Tensor, Any]:
            known = first if self.order == "first" else None
            end, after, path = unroll(params, theta, known)
            return loss(end, slice(1)), (end, after, path)

        (in_params, in_theta), (_, (end, after, path)) = torch.func.grad_and_value(
            adapted, argnums=(0, 1), has_aux=True
        )(x, theta)
        return Fork(
            x,
            theta,
            first,
            end,
            after,
            path,
            in_params,
            in_theta,
            lambda params: loss(params, slice(1, None)),
            unroll,
        )

    @abstractmethod
    def candidates(self, fork: Fork) -> list[Point]:
        """What x may become, the unroll first; x itself comes last, for want of all."""

    @abstractmethod
    def effort(self) -> tuple[int, int]:
        """Unrolls of a decision after the first, and points where it takes losses."""

    def trained(self, fork: Fork, theta: Meta) -> Meta:
        """A gradient step on ``theta``, of the loss at the end of the unroll."""
        return {k: w - self.meta_lr * fork.in_theta[k] for k, w in theta.items()}

    def fallback(self, fork: Fork) -> tuple[Tensor, Meta]:
        """SMG's: that step in theta and in x."""
        x = fork.params - self.lr * fork.in_params
        return x, self.trained(fork, fork.theta)

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        """Work of one inner step, averaged over a decision."""
        t, n = self.steps, optimizee.layout.n
        unrolls, judged = self.effort()
        whole = self.validation == "full"
        judging = judged * (items if whole else self.n_c * batch)
        probe = items if whole else batch
        again = self.order == "full"  # the first gradient, and each differentiated
        gradients = t * (1 + unrolls) + again
        return Cost(
            gradients=(gradients + probe / batch) / t,
            forwards=(judging / batch + t - 1) / t,
            depth=(t * (1 + bool(unrolls)) + 1 + bool(judged)) / t,
            flops=(
                (gradients + 2 * t * again) * optimizee.flops(batch, gradient=True)
                + optimizee.flops(probe, gradient=True)
                + optimizee.flops(judging + (t - 1) * batch)
                # back-propagation through the proposal is twice the way forward
                + t * (3 + unrolls) * self.proposal.flops(n)
            )
            / t,
        )


@dataclass(frozen=True)
class SMG(_MetaGuard):
    """Simple Meta Guard: unroll or fallback, whose own unroll ends lower (Algorithm 1).

    Candidates: 0 the unroll, 1 the gradient step. Each is judged by the loss at the end
    of another unroll from it; the unroll wins a tie.
    """

    def candidates(self, fork: Fork) -> list[Point]:
        z, theta = self.fallback(fork)
        return [
            Point(p, meta, fork.loss(fork.unroll(p, meta)[0]), path)
            for p, meta, path in [(fork.end, fork.after, fork.path), (z, theta, None)]
        ]

    def effort(self) -> tuple[int, int]:
        return 2, 2


@dataclass(frozen=True)
class AMG(_MetaGuard):
    """Advanced Meta Guard: the best of four by their own loss (Algorithm 2).

    Where the iterate x is no worse than the end of the unroll, the fallback is the
    plain gradient step on the loss at x, and theta stays; else it is SMG's.
    Candidates: 0 the unroll, 1 the fallback, 2 an unroll from the fallback, 3 x itself;
    the first wins a tie. With ``plain`` (ours) the plain gradient step is a candidate
    in either case, number 4: without it AMG can stall where gradient descent converges
    (the book, Theorem R).
    """

    plain: bool = False

    def candidates(self, fork: Fork) -> list[Point]:
        at_x, at_end = fork.loss(fork.params), fork.loss(fork.end)
        plain = fork.params - self.lr * fork.first[1], fork.theta
        case1 = ~at_end.isfinite() | (at_x <= at_end)
        z, theta = choose(case1, [self.fallback(fork), plain])
        end, after, path = fork.unroll(z, theta)
        points = [
            Point(fork.end, fork.after, at_end, fork.path),
            Point(z, theta, fork.loss(z)),
            Point(end, after, fork.loss(end), path),
            Point(fork.params, fork.theta, at_x),
        ]
        if self.plain:
            points.append(Point(*plain, fork.loss(plain[0])))
        return points

    def effort(self) -> tuple[int, int]:
        return 1, 4 + self.plain


@dataclass(frozen=True)
class Adapted(_MetaGuard):
    """A learned optimizer that goes on training, and nobody watches (a control, ours).

    It always keeps the end of the unroll, the weights in theta a gradient step further.
    """

    traces: ClassVar[tuple[str, ...]] = ("use_l2o", "drift")

    def candidates(self, fork: Fork) -> list[Point]:
        theta = self.trained(fork, fork.after)
        anything = torch.zeros_like(fork.first[0])
        return [Point(fork.end, theta, anything, fork.path)]

    def effort(self) -> tuple[int, int]:
        return 0, 0


@dataclass(frozen=True)
class Compared(Training):
    """A training of a method of this module that asks what other guards would do.

    At every mark it and each of ``others``, guards of the same learned optimizer, make
    one decision from its point and its theta, on the same batches. The record holds the
    full losses of what they keep: ``kept`` and ``kept.NAME`` ``[R, marks]``. The run
    itself goes on as if nobody had asked.
    """

    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.method
        for name, other in self.others.items():
            if other.interval != own.interval or other.validation != own.validation:
                raise ValueError(
                    f"{name} must decide every {own.interval} steps, by "
                    f"{own.validation} validation, as the method does"
                )

    def measure(self, job: TrainingJob, method: State, end: int) -> Trace:
        change, given = method["change"], job.metas["proposal"]
        theta = {name: given[name] + change[name] for name in given}
        found = super().measure(job, method, end)
        guards = {f"kept.{name}": other for name, other in self.others.items()}
        for name, guard in {"kept": self.method, **guards}.items():
            point = self.decision(job, guard, method["params"], theta, end)
            found[name] = job.looks["full_loss"](point)
        return found

    def decision(
        self, job: TrainingJob, guard: Any, params: Tensor, theta: Meta, end: int
    ) -> Tensor:
        """What ``guard`` keeps, ``[R, n]``, on the batches from step ``end`` on."""
        train, held_out = job.batches(end)
        if held_out is not None:
            # the batch that comes first is for a gradient, which not all take
            held_out = held_out[:, :1, -guard.batches[0] :]

        def decide(
            params: Tensor, theta: Meta, train: Tensor, held_out: Tensor | None
        ) -> Tensor:
            begun = guard.init(params)
            metas: Metas = {"fallback": {}, "proposal": theta}
            state, _ = guard.segment(job.task, metas, begun, train, held_out)
            kept: Tensor = state["params"]
            return kept

        dims = (0, 0, 0, None if held_out is None else 0)
        turn = train[:, : guard.interval]
        return torch.func.vmap(decide, in_dims=dims)(params, theta, turn, held_out)
