"""Guards: run a learned optimizer beside a fallback and keep what a test allows.

:class:`LGL2O` is the loss guard of Prémont-Schwarz, Vitku and Feyereisl, "A Simple
Guard for Learned Optimizers" (ICML 2022). With ``n_t=1`` and ``validation="full"`` it
is their Algorithm 1, with the defaults their Algorithm 2; a noise-aware ``test``
(:class:`Margin`, :class:`Sequential`; ours) makes it demand evidence, :class:`Lazy`
spares the fallback's branch, and :class:`Shadow` also watches the fallback run alone.
Either side may be any :class:`~l2olib.optimizers.Optimizer`; NaN and infinity are
ordinary inputs.
:class:`GL2O` is the residual guard that it was compared with; :class:`Switch` and a
:class:`Coin` are controls, which guard nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .optimizees import Task
from .optimizers import Optimizer, State, check_least, check_literals
from .records import later
from .train import Cost, Metas, Trace, inner_steps

Memory = Literal["carry", "revert", "reset"]


def select(condition: Any, a: Any, b: Any) -> Any:
    """Choose between two states (nested dicts of tensors) by a scalar condition."""
    return tree_map(lambda x, y: torch.where(condition, x, y), a, b)


def finite(state: Any) -> Any:
    """Whether every number of a state is finite (a scalar bool; True of no numbers)."""
    leaves = [x.isfinite().all() for x in tree_leaves(state)]
    return torch.stack(leaves).all() if leaves else True


def in_decisions(
    method: Any,
    task: Task,
    metas: Metas,
    state: State,
    train: Tensor,
    valid: Tensor | None,
) -> tuple[State, Trace]:
    """A segment of a method that can ``decide``: one decision after the other.

    ``train [S, B]``, ``valid [S / interval, batches, B]``. The trace joins those of the
    decisions: losses ``[S]``, the method's ``traces``, the last ``candidates``.
    """
    each = method.interval
    decisions = len(train) // each
    needed = None if method.batches is None else (decisions, method.batches[0])
    given = None if valid is None else tuple(valid.shape[:2])
    if len(train) % each or given != needed:
        raise ValueError(
            f"a segment of {len(train)} steps must be a multiple of the {each} of a "
            f"decision, with validation batches {needed or 'None'} (decisions, "
            f"batches), not {given or 'None'}"
        )
    traces = []
    for d, batches in enumerate(train.split(each)):
        held_out = None if valid is None else valid[d]
        state, trace = method.decide(task, metas, state, batches, held_out)
        traces.append(trace)
    joined = {key: torch.stack([t[key] for t in traces]) for key in method.traces}
    joined["loss"] = torch.cat([t["loss"] for t in traces])
    joined["candidates"] = traces[-1]["candidates"]
    return state, joined


def _standard_error(delta: Tensor) -> Tensor:
    """That of the mean of all of ``delta``."""
    return delta.std() / delta.numel() ** 0.5


# ---- tests of a noisy criterion ------------------------------------------------------


@runtime_checkable
class NoiseTest(Protocol):
    """How a loss guard judges a proposal by differences that are only estimated.

    ``traces``: what it records of each decision; ``init`` gives its state. A call takes
    the differences in loss of each validation item, ``delta [n_c, B]``, and how far
    ``apart`` the candidates are; it returns whether to accept, the state, the traces.
    """

    @property
    def traces(self) -> tuple[str, ...]: ...

    def init(self, params: Tensor) -> State: ...

    def __call__(
        self, delta: Tensor, apart: Tensor, state: State
    ) -> tuple[Tensor, State, Trace]: ...


@dataclass(frozen=True)
class Margin:
    """Accept when the mean paired difference is below -``z`` standard errors.

    With a known standard error a wrong acceptance has a probability of at most
    1 / (1 + z^2), exp(-z^2 / 2) for sub-Gaussian differences, and an expected harm of
    at most SE / (4 z) (Theorem N of the book; ours). Here it is estimated from the same
    differences: then only SE / 2 is proved, which rare large ones can come near.
    ``z = 0`` is the plain comparison.
    """

    z: float = 3.0

    def __post_init__(self) -> None:
        check_least(self, z=0)

    traces = ()

    def init(self, params: Tensor) -> State:
        return {}

    def __call__(
        self, delta: Tensor, apart: Tensor, state: State
    ) -> tuple[Tensor, State, Trace]:
        """Judge per-item differences ``delta [n_c, B]`` of candidates ``apart``."""
        return delta.mean() < -self.z * _standard_error(delta), state, {}


@dataclass(frozen=True)
class Sequential:
    """Add validation batches until the sum of their differences leaves (-cs, cs).

    Below: accept; above, or after all ``n_c``: the fallback. ``s`` is the standard
    deviation of one batch's difference, so that the expected harm of a decision is at
    most s / (2c), or s / (2ec) if differences are sub-Gaussian, for a known s and
    independent batches, ``validation="iid"`` (Theorem S of the book; ours). The theorem
    wants the threshold fixed before looking: s = sigma |y - z| with sigma pooled over
    PAST decisions by a moving average of weight ``memory`` (only the first decision
    must use its own).
    """

    c: float = 3.0
    memory: float = 0.9

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c must be positive, not {self.c}")
        _inside("memory", self.memory)

    traces = ("batches_used",)

    def init(self, params: Tensor) -> State:
        return {"noise": params.new_full((), torch.nan)}

    def __call__(
        self, delta: Tensor, apart: Tensor, state: State
    ) -> tuple[Tensor, State, Trace]:
        """Judge per-item differences ``delta [n_c, B]`` of candidates ``apart``."""
        n_c, size = delta.shape
        seen = delta.var() / size / apart**2
        noise = torch.where(state["noise"].isnan(), seen, state["noise"])
        bar = self.c * noise.sqrt() * apart
        # As cumsum, which CUDA has in no deterministic version.
        sums = itertools.accumulate(delta.mean(1).double().unbind())
        walk = torch.stack(list(sums)).to(delta)
        outside = walk.abs() > bar
        count = torch.arange(n_c, device=delta.device)
        first = torch.where(outside, count, n_c).min()
        favours = ((walk < -bar) & (count == first)).any()
        pooled = self.memory * noise + (1 - self.memory) * seen
        after = torch.where(seen.isfinite(), pooled, state["noise"])
        used = torch.clamp(first + 1, max=n_c)
        return favours, {"noise": after}, {"batches_used": used}


_MINSTD = 2**31 - 1
"""The modulus of Park and Miller's generator."""


@dataclass(frozen=True)
class Coin:
    """Toss a fair coin and look at no loss: a guard without its choice.

    The control for what it is worth to mix two optimizers (ours). The tosses are those
    of Park and Miller's generator, which the initial parameters seed.
    """

    traces = ()

    def init(self, params: Tensor) -> State:
        digits = (2.0**30 * params.double()).long().sum()
        return {"toss": digits % (_MINSTD - 1) + 1}

    def __call__(
        self, delta: Tensor, apart: Tensor, state: State
    ) -> tuple[Tensor, State, Trace]:
        """Whatever the differences ``delta`` of candidates ``apart`` are."""
        toss = 48_271 * state["toss"] % _MINSTD
        return toss <= _MINSTD // 2, {"toss": toss}, {}


# ---- LGL2O ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _OverTwo:
    """What all methods of this module share."""

    proposal: Optimizer
    fallback: Optimizer

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"proposal": self.proposal, "fallback": self.fallback}


@dataclass(frozen=True)
class LGL2O(_OverTwo):
    """Loss-guarded L2O: n_t steps of both, then keep the one of lower validation loss.

    From the same point x, ``proposal`` and ``fallback`` each take ``n_t`` steps on the
    SAME training batches, to y and z. Both are evaluated on the same ``n_c`` batches of
    training data, and x becomes y iff F(y) < F(z), else z.

    ``validation``: ``"disjoint"`` (fresh batches of items that the decision's training
    batches did not use), ``"iid"`` (fresh, with replacement), ``"fixed"`` (one draw for
    the whole run) or ``"full"`` (the whole training set; ``n_c`` is not used).

    What the paper leaves open (chapter 02c-one-at-a-time varies the first):

    * ``proposal_state`` after the fallback won: ``"carry"`` the state that the
      losing branch ended with, ``"revert"`` to the decision's start, or ``"reset"``.
    * ``fallback_state`` after the proposal won: ``"keep"`` what the losing
      branch ended with, ``"revert"`` or ``"reset"``.
    * ``clock`` of the fallback's learning-rate schedule: ``"global"`` counts
      every step, ``"accepted"`` only those that were kept.

    Beyond the paper (ours): ``test`` replaces the plain comparison F(y) < F(z) by one
    that knows the noise of its estimate (:class:`Coin`: that ignores it), and a
    proposal further than ``radius`` times the fallback's own way |z - x| from z is
    rejected.

    A candidate counts as finite when its validation loss and all its parameters are. A
    finite one beats one that is not; if neither is finite x stays and the
    proposal's state is reset. A state that is not finite is never carried on.
    """

    n_t: int = 10
    n_c: int = 10
    validation: Literal["disjoint", "iid", "fixed", "full"] = "disjoint"
    proposal_state: Memory = "carry"
    fallback_state: Literal["keep", "revert", "reset"] = "keep"
    clock: Literal["global", "accepted"] = "global"
    test: NoiseTest | None = None
    radius: float | None = None

    # What a subclass traces besides.
    also: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_least(self, n_t=1, n_c=1)
        check_literals(self)
        if not isinstance(self.test, NoiseTest | None):
            raise ValueError(
                "test must be None or a test of noise such as Margin(3.0), with "
                f"traces, init and a call (see NoiseTest), not {self.test!r}"
            )
        if self.test is not None and self.validation == "full":
            raise ValueError(
                "the full loss has no noise to test: use test=None or other validation"
            )
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius must be positive or None, not {self.radius}")

    @property
    def interval(self) -> int:
        return self.n_t

    @property
    def batches(self) -> tuple[int, str] | None:
        """Validation batches that a decision needs: their number and mode."""
        return None if self.validation == "full" else (self.n_c, self.validation)

    @property
    def traces(self) -> tuple[str, ...]:
        more = () if self.test is None else self.test.traces
        names = ("use_l2o", "valid_l2o", "valid_fallback", "standard_error")
        return (*names, *more, *self.also)

    def init(self, params: Tensor) -> State:
        states = {role: opt.init(params) for role, opt in self.optimizers.items()}
        if self.test is not None:
            states["test"] = self.test.init(params)
        return {"params": params, **states}

    def segment(
        self,
        task: Task,
        metas: Metas,
        state: State,
        train: Tensor,
        valid: Tensor | None,
    ) -> tuple[State, Trace]:
        """Take ``len(train)`` steps: ``train [S, B]``, ``valid [S / n_t, n_c, B]``.

        The trace holds ``loss [S]`` (mini-batch loss along the accepted branches), and
        for each decision ``use_l2o``, both validation losses and the standard error of
        their difference; ``candidates`` are y and z of the last decision, for audits.
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
        """Run both branches over ``batches [n_t, B]`` and keep one of them."""
        x = state["params"]
        first = task.loss_and_grad(x, batches[0])  # both branches start from it
        ends, states, losses = {}, {}, {}
        for role, optimizer in self.optimizers.items():
            ends[role], states[role], losses[role] = inner_steps(
                task, optimizer.update, metas[role], x, state[role], batches, first
            )
        y, z = ends["proposal"], ends["fallback"]
        l_y = self.losses(task, y, held_out)
        l_z, rival, z_ok = self.bar(task, metas, state, batches, first, z, held_out)
        f_y, f_z, delta = l_y.mean(), l_z.mean(), l_y - l_z
        y_ok = f_y.isfinite() & finite(y)
        after: State = {}
        more: Trace = {}
        if self.test is None:
            better = f_y < f_z
        else:
            better, tested, more = self.test(delta, (y - rival).norm(), state["test"])
            after["test"] = select(z_ok & y_ok, tested, state["test"])
        if self.radius is not None:
            better &= (y - z).norm() <= self.radius * (z - x).norm()
        use = y_ok & (~z_ok | better)
        stay = ~y_ok & ~z_ok
        trace = {
            "loss": torch.where(
                stay, first[0], torch.where(use, losses["proposal"], losses["fallback"])
            ),
            "use_l2o": use,
            "valid_l2o": f_y,
            "valid_fallback": f_z,
            "standard_error": self.error(delta),
            "candidates": torch.stack([y, z]),
            "kept": torch.where(use, l_y, l_z),
            **more,
        }
        return after | {
            "params": torch.where(stay, x, torch.where(use, y, z)),
            "proposal": self._proposal_after(
                use, stay, state["proposal"], states["proposal"], x
            ),
            "fallback": self._fallback_after(
                use, z_ok, state["fallback"], states["fallback"], x
            ),
        }, trace

    def losses(self, task: Task, params: Tensor, held_out: Tensor | None) -> Tensor:
        """Losses of every validation item ``[n_c, B]``, or the full one ``[1]``."""
        if held_out is None:
            return task.full_loss(params)[None]
        return task.losses(params, held_out.flatten()).view(held_out.shape)

    def bar(
        self,
        task: Task,
        metas: Metas,
        state: State,
        batches: Tensor,
        first: tuple[Tensor, Tensor],
        z: Tensor,
        held_out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses that the proposal must beat, where, and whether z is finite.

        They are those of the fallback's end z.
        """
        losses = self.losses(task, z, held_out)
        return losses, z, losses.mean().isfinite() & finite(z)

    def error(self, delta: Tensor) -> Tensor:
        """Standard error of the mean of ``delta`` (0 for the full loss)."""
        if self.validation == "full":
            return torch.zeros_like(delta[0])
        return _standard_error(delta)

    def _proposal_after(
        self, use: Tensor, stay: Tensor, start: State, end: State, x: Tensor
    ) -> State:
        fresh = self.proposal.init(x)
        lost = {"carry": end, "revert": start, "reset": fresh}[self.proposal_state]
        state = select(use, end, select(stay, fresh, lost))
        return select(finite(state), state, fresh)

    def _fallback_after(
        self, use: Tensor, z_ok: Tensor, start: State, end: State, x: Tensor
    ) -> State:
        end_state = select(z_ok & finite(end), end, start)
        lost = {
            "keep": end_state,
            "revert": start,
            "reset": self.fallback.init(x),
        }[self.fallback_state]
        state = select(use, lost, end_state)
        if "step" in state:
            accepted = z_ok & ~use
            counted = torch.where(accepted, end["step"], start["step"])
            state["step"] = end["step"] if self.clock == "global" else counted
        return state

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        """Work of one inner step, averaged over a decision."""
        evaluated = 2 * (items if self.validation == "full" else self.n_c * batch)
        n = optimizee.layout.n
        return Cost(
            gradients=(2 * self.n_t - 1) / self.n_t,
            forwards=evaluated / batch / self.n_t,
            depth=1 + 1 / self.n_t,  # branches and evaluations run side by side
            flops=(
                (2 * self.n_t - 1) * optimizee.flops(batch, gradient=True)
                + optimizee.flops(evaluated)
                + self.n_t * (self.proposal.flops(n) + self.fallback.flops(n))
            )
            / self.n_t,
        )


@dataclass(frozen=True)
class Lazy(LGL2O):
    """A loss guard that runs the fallback's branch only when it needs it (ours).

    The proposal y must bring a sufficient decrease from the CURRENT point: accept iff
    F(y) < F(x) - ``decrease`` * d, where d is the decrease that ONE fallback step from
    x promises to first order. It is estimated without bias from two batches: the step
    is made on the first, its product with the gradient taken on the second. Below zero
    it counts as zero: where gradients are small beside their noise the guard asks for
    more than is promised. With the full loss, d = lr |grad f|^2 for gradient descent,
    and ``decrease`` = 1 - lr L / 2 gives each decision the proved rate of that one step
    (the book, "The lazy guard"). Otherwise x becomes z, the end of ``n_t`` fallback
    steps.

    Under ``vmap`` both branches are computed; the work that is counted is what a
    sequential program would do.
    """

    decrease: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_t < 2:
            raise ValueError(
                f"n_t must be at least 2, not {self.n_t}: the promised decrease takes "
                "two batches"
            )
        if not self.decrease > 0:
            raise ValueError(f"decrease must be positive, not {self.decrease}")
        if self.radius is not None:
            raise ValueError(
                "a lazy guard does not know how far a fallback goes that it did not "
                "run: leave radius None"
            )
        layout = getattr(self.fallback, "layout", None)
        start = torch.zeros(layout.n if layout else 1)
        memory = self.fallback.init(start).keys() - {"step"}
        if memory and self.fallback_state == "keep":
            raise ValueError(
                "a lazy guard has no state of a fallback that it did not run: with a "
                'fallback that has a memory set fallback_state to "revert" or "reset"'
            )

    def bar(
        self,
        task: Task,
        metas: Metas,
        state: State,
        batches: Tensor,
        first: tuple[Tensor, Tensor],
        z: Tensor,
        held_out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses at the current point, less the decrease that is asked for.

        These are what the trace ``valid_fallback`` of a lazy guard shows. Whether z
        counts as finite is not for its loss to say, at which nobody looks.
        """
        x, loss, grad = state["params"], *first
        step, _ = self.fallback.update(
            metas["fallback"], grad, state["fallback"], x, loss=loss
        )
        promised = -(task.loss_and_grad(x, batches[1])[1] @ step)
        asked = self.decrease * promised.clamp(min=0)
        return self.losses(task, x, held_out) - asked, x, z.isfinite().all()

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        """As the loss guard's, one gradient more and no fallback where ``accepted``."""
        both, n = super().cost(optimizee, batch, items), optimizee.layout.n
        spared = accepted * (self.n_t - 1) - 1
        flops = spared * optimizee.flops(batch, gradient=True)
        flops += accepted * (self.n_t - 1) * self.fallback.flops(n)
        return Cost(
            gradients=both.gradients - spared / self.n_t,
            forwards=both.forwards,
            depth=both.depth + (1 - accepted) * (self.n_t - 1) / self.n_t,
            flops=both.flops - flops / self.n_t,
        )


@dataclass(frozen=True)
class Shadow(LGL2O):
    """A loss guard that also runs its fallback alone, as a shadow, and returns to it.

    LGL2O compares n_t steps from where it stands; a place from which the learned
    optimizer is better for n_t steps, again and again, may still be a bad one (the
    book, Spirals). The shadow s is the fallback from x^1, on the same batches, never
    moved by anything else. After each decision of the guard x+ stays only if it beats
    s on the decision's validation batches, by the same ``test``; else x becomes s, the
    fallback takes over the state of the shadow's, and the proposal has lost.

    With the full loss therefore f(x^k) <= f(s^k) at every decision: the guarded run is
    never worse than its fallback ALONE, for any optimizers and any f. With a noisy
    criterion the excess over f(s^k) is at most the harm of two tests at this decision;
    it does not add up, because s^k is on offer again each time (ours; the book, Theorem
    V). Nothing is promised of the steps between two decisions.

    With ``slack``, for a loss that is not negative, x+ has to beat only 1 + slack times
    the loss of s: below that LGL2O decides alone, and f(x^k) <= (1 + slack) f(s^k). Not
    with a `Sequential` test, whose barrier shrinks with the distance from s, as those
    differences do not.
    """

    slack: float = later(0.0)

    also = ("use_shadow",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, slack=0)
        if self.slack and isinstance(self.test, Sequential):
            raise ValueError("slack goes with a Margin or no test, not with Sequential")

    def init(self, params: Tensor) -> State:
        shadow: State = {"params": params, "optimizer": self.fallback.init(params)}
        if self.test is not None:
            shadow["test"] = self.test.init(params)
        return super().init(params) | {"shadow": shadow}

    def decide(
        self,
        task: Task,
        metas: Metas,
        state: State,
        batches: Tensor,
        held_out: Tensor | None,
    ) -> tuple[State, Trace]:
        """Let LGL2O decide, then hold what it kept against the shadow."""
        shadow: State = {}
        s, shadow["optimizer"], losses = inner_steps(
            task,
            self.fallback.update,
            metas["fallback"],
            state["shadow"]["params"],
            state["shadow"]["optimizer"],
            batches,
        )
        shadow["params"] = s
        after, trace = super().decide(task, metas, state, batches, held_out)
        x, l_x, l_s = after["params"], trace["kept"], self.losses(task, s, held_out)
        bar = (1 + self.slack) * l_s
        x_ok = l_x.mean().isfinite() & finite(x)
        s_ok = l_s.mean().isfinite() & finite(s)
        if self.test is None:
            better = l_x.mean() < bar.mean()
        else:
            past = state["shadow"]["test"]
            better, tested, _ = self.test(l_x - bar, (x - s).norm(), past)
            shadow["test"] = select(x_ok & s_ok, tested, past)
        back = s_ok & ~(x_ok & better)
        return after | {
            "params": torch.where(back, s, x),
            "proposal": self._proposal_after(
                ~back,
                torch.zeros_like(back),
                state["proposal"],
                after["proposal"],
                x,
            ),
            "fallback": select(back, shadow["optimizer"], after["fallback"]),
            "shadow": shadow,
        }, trace | {
            "loss": torch.where(back, losses, trace["loss"]),
            "use_l2o": trace["use_l2o"] & ~back,
            "use_shadow": back,
        }

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        """As the loss guard's, with a third branch beside its two."""
        both = super().cost(optimizee, batch, items)
        evaluated = items if self.validation == "full" else self.n_c * batch
        return Cost(
            gradients=both.gradients + 1,
            forwards=both.forwards + evaluated / batch / self.n_t,
            depth=both.depth,
            flops=both.flops
            + optimizee.flops(batch, gradient=True)
            + self.fallback.flops(optimizee.layout.n)
            + optimizee.flops(evaluated) / self.n_t,
        )


# ---- GL2O ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometric:
    """mu <- (1 - theta) mu at each acceptance (GS; authors' code)."""

    theta: float = 0.1

    def __post_init__(self) -> None:
        _inside("theta", self.theta)

    def init(self, bar: Tensor) -> State:
        return {"bar": bar}

    def accept(self, state: State, residual: Tensor) -> State:
        return {"bar": (1 - self.theta) * state["bar"]}


@dataclass(frozen=True)
class MovingAverage:
    """mu <- theta r + (1 - theta) mu (EMA; authors' code: theta weighs the new r).

    ``theta = 1`` is the recent-term rule (RT), mu <- r. The other reading of a quoted
    "theta = 0.9", weight 0.1 on the new residual, is ``theta = 0.1``.
    """

    theta: float = 0.9

    def __post_init__(self) -> None:
        if self.theta != 1.0:
            _inside("theta", self.theta)

    def init(self, bar: Tensor) -> State:
        return {"bar": bar}

    def accept(self, state: State, residual: Tensor) -> State:
        return {"bar": self.theta * residual + (1 - self.theta) * state["bar"]}


@dataclass(frozen=True)
class ArithmeticAverage:
    """mu <- (r + c mu) / (c + 1), c counting mu_1 and the acceptances so far (AA)."""

    def init(self, bar: Tensor) -> State:
        return {"bar": bar, "count": torch.ones_like(bar)}

    def accept(self, state: State, residual: Tensor) -> State:
        c = state["count"]
        return {"bar": (residual + c * state["bar"]) / (c + 1), "count": c + 1}


@dataclass(frozen=True)
class RecentMax:
    """mu <- the largest of the last m accepted residuals, mu_1 before those (RM)."""

    m: int = 30

    def __post_init__(self) -> None:
        check_least(self, m=1)

    def init(self, bar: Tensor) -> State:
        return {"bar": bar, "last": bar.expand(self.m).clone()}

    def accept(self, state: State, residual: Tensor) -> State:
        last = torch.cat([state["last"][1:], residual[None]])
        return {"bar": last.max(), "last": last}


def _inside(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, not {value}")


@dataclass(frozen=True)
class GL2O(_OverTwo):
    """Residual-guarded L2O (Heaton et al., "Safeguarded Learned Convex Optimization").

    A proposal y is accepted when the fallback would hardly move it: with T(y) the
    fallback's step from y and S(y) = y - T(y), accept iff ||S(y)|| < alpha mu, where
    mu follows the accepted residuals by ``sequence`` and starts at ||S(x^1)||.
    Otherwise the fallback steps from x. One decision a step, one extra gradient, at y,
    which must wait for the proposal.

    For mini-batch training LGL2O (section 3) fixes the fallback and one decision a step
    for all weights; the norm over all of them is our reading, other open details are
    arguments:

    * ``scaled``: S includes the learning rate, or is the gradient alone.
    * ``fresh``: the residual's batch is the step's own, or a fresh one.
    * ``proposal_state`` after a rejection: ``"carry"`` on or ``"revert"``.

    A proposal or residual that is not finite is rejected, and a state of the
    learned optimizer that is not finite is never carried on.
    """

    sequence: Any = MovingAverage()
    alpha: float = 0.99
    scaled: bool = True
    fresh: bool = False
    proposal_state: Literal["carry", "revert"] = "carry"

    def __post_init__(self) -> None:
        _inside("alpha", self.alpha)
        if not hasattr(self.sequence, "accept"):
            raise ValueError(
                f"sequence must be Geometric, MovingAverage, ArithmeticAverage or "
                f"RecentMax, not {self.sequence!r}"
            )
        check_literals(self)

    interval = 1
    traces = ("use_l2o", "residual", "bar")

    @property
    def batches(self) -> tuple[int, str] | None:
        return (1, "disjoint") if self.fresh else None

    def init(self, params: Tensor) -> State:
        states = {role: opt.init(params) for role, opt in self.optimizers.items()}
        bar = self.sequence.init(params.new_full((), torch.inf))
        return {"params": params, "sequence": bar, **states}

    def segment(
        self,
        task: Task,
        metas: Metas,
        state: State,
        train: Tensor,
        valid: Tensor | None,
    ) -> tuple[State, Trace]:
        """Take ``len(train)`` steps; the trace holds loss, choice, residual and bar."""
        given = None if valid is None else tuple(valid.shape[:2])
        if given != (needed := (len(train), 1) if self.fresh else None):
            raise ValueError(
                f"a segment of {len(train)} steps with fresh={self.fresh} takes "
                f"validation batches {needed} (steps, 1), not {given}"
            )
        traces = []
        for i, batch in enumerate(train):
            other = batch if valid is None else valid[i, 0]
            state, trace = self.step(task, metas, state, batch, other)
            traces.append(trace)
        names = ("loss", *self.traces)
        joined = {name: torch.stack([t[name] for t in traces]) for name in names}
        return state, joined | {"candidates": traces[-1]["candidates"]}

    def step(
        self, task: Task, metas: Metas, state: State, batch: Tensor, other: Tensor
    ) -> tuple[State, Trace]:
        """Propose, test the residual on batch ``other``, accept or fall back."""
        x = state["params"]
        loss, grad = task.loss_and_grad(x, batch)
        move, hidden = self.proposal.update(
            metas["proposal"], grad, state["proposal"], x, loss=loss
        )
        fall, clock = self.fallback.update(
            metas["fallback"], grad, state["fallback"], x, loss=loss
        )
        y, z = x + move, x + fall
        grad_y = task.loss_and_grad(y, other)[1]
        residual = self._residual(metas, grad_y, state["fallback"], y)
        first = state["sequence"]["bar"].isinf()
        start = self.sequence.init(self._residual(metas, grad, state["fallback"], x))
        sequence = select(first, start, state["sequence"])
        bar = sequence["bar"]
        use = finite(y) & residual.isfinite() & (residual < self.alpha * bar)
        after = hidden
        if self.proposal_state == "revert":
            after = select(use, hidden, state["proposal"])
        return {
            "params": torch.where(use, y, z),
            "sequence": select(use, self.sequence.accept(sequence, residual), sequence),
            "proposal": select(finite(after), after, self.proposal.init(x)),
            "fallback": clock,
        }, {
            "loss": loss,
            "use_l2o": use,
            "residual": residual,
            "bar": bar,
            "candidates": torch.stack([y, z]),
        }

    def _residual(
        self, metas: Metas, grad: Tensor, state: State, point: Tensor
    ) -> Tensor:
        """||S(point)||: how far the fallback would move, or the gradient's norm."""
        if not self.scaled:
            return grad.norm()
        return self.fallback.update(metas["fallback"], grad, state, point)[0].norm()

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        """Work of one step: two gradients, the second after the proposal."""
        n = optimizee.layout.n
        return Cost(
            gradients=2.0,
            forwards=0.0,
            depth=2.0,
            flops=2 * optimizee.flops(batch, gradient=True)
            + self.proposal.flops(n)
            + 3 * self.fallback.flops(n),
        )


# ---- a control -----------------------------------------------------------------------


@dataclass(frozen=True)
class Switch(_OverTwo):
    """The proposal for ``at`` steps, then the fallback for good; nothing is compared.

    A guard that does not beat it owes its success to the change of optimizer and not
    to its test. The fallback starts with a fresh state at step ``at``, its schedule's
    clock set to that step.
    """

    at: int = 100

    interval = 1
    batches = None
    traces = ()

    def __post_init__(self) -> None:
        check_least(self, at=1)

    def init(self, params: Tensor) -> State:
        """Start with the proposal: the state names the optimizer at work."""
        return {"params": params, "proposal": self.proposal.init(params)}

    def turn(self, state: State) -> State:
        """What a training makes of the state at step ``at``."""
        fresh = self.fallback.init(state["params"])
        if "step" in fresh:
            fresh["step"] = fresh["step"] + self.at
        return {"params": state["params"], "fallback": fresh}

    def segment(
        self,
        task: Task,
        metas: Metas,
        state: State,
        train: Tensor,
        valid: Tensor | None,
    ) -> tuple[State, Trace]:
        """Take ``len(train)`` steps; the trace holds the losses before each."""
        (role,) = state.keys() - {"params"}
        params, inner, losses = inner_steps(
            task,
            self.optimizers[role].update,
            metas[role],
            state["params"],
            state[role],
            train,
        )
        return {"params": params, role: inner}, {"loss": losses}

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        """Work of a step of the fallback; ``accepted`` is the proposal's share of it.

        A long run consists of the fallback's steps, but the first ``at`` are not cheap.
        """
        own = (o.flops(optimizee.layout.n) for o in (self.proposal, self.fallback))
        flops = sum(x * w for x, w in zip(own, (accepted, 1 - accepted), strict=True))
        return Cost(1.0, 0.0, 1.0, optimizee.flops(batch, gradient=True) + flops)
