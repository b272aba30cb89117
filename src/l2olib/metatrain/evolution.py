"""Meta-training by evolution strategies: ES and persistent ES (PES).

Back-propagation differentiates one unroll exactly; through long or chaotic unrolls that
derivative is useless. Evolution strategies differentiate the meta-loss *smoothed* over
Gaussian perturbations of the meta-parameters theta, from loss values alone: with
antithetic pairs theta +- eps, eps ~ N(0, sigma^2 I),

    gradient ~ mean over pairs of (L(theta + eps) - L(theta - eps)) eps / (2 sigma^2).

ES needs a whole unroll for one estimate. PES (Vicol, Metz, Sohl-Dickstein, ICML 2021)
gives one every *truncation*, of pairs that go on training: a loss now depends on all
perturbations since the unroll began, so it is multiplied by their sum. That sum is what
truncated ES lacks and why it is biased. ES is PES whose truncation is the horizon.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from ..data import train_batches
from ..optimizees import check_built_for
from ..optimizers import AdamW, Optimizer, State, check_literals, constant
from ..train import OVERHEAD, RATE, accelerated, inner_steps, ranks
from .truncated import TRAINING, MetaJob, MetaWork, cut, too_short

Step = Callable[[Tensor, Tensor, State, Tensor], tuple[Tensor, Tensor, State]]
"""One inner step: (meta [d], params [n], state, batch) -> (loss, params, state)."""
Begin = Callable[[int, int], tuple[Tensor, State]]
"""(pair, episode) -> fresh parameters [n] and optimizer state."""


class Estimate(NamedTuple):
    """What one truncation of N pairs found; ``per_pair [N, d]`` estimates each.

    ``losses [N, K, M]`` of the members of each pair (theta + eps, theta - eps); where
    ``trained [N, K]`` is False a pair was re-initialised instead, and its losses are
    zero.
    """

    per_pair: Tensor
    losses: Tensor
    trained: Tensor

    @property
    def gradient(self) -> Tensor:
        """The estimate ``[d]``: the mean over pairs, in their order."""
        return self.per_pair.mean(0)

    @property
    def loss(self) -> Tensor:
        """The meta-loss: the mean over members of their mean losses."""
        count = self.trained.sum(1).clamp(min=1).to(self.losses)
        return (self.losses.sum((1, 2)) / (self.losses.shape[2] * count)).mean()


class Online:
    """What the estimators share: unrolls that go on from truncation to truncation.

    They are frozen dataclasses with the fields of :class:`PES` that are read here;
    ``members`` unrolls make a pair and share initial parameters and batches, and an
    estimate costs ``passes`` times their steps. The state of N pairs of M members:
    ``params [N, M, n]``, ``optimizer`` (leaves [N, M, ...]), ``steps`` and ``episodes``
    ``[N]``.
    """

    members: int
    passes: int = 1
    pairs: Any
    truncation: Any
    horizon: Any
    offset: Any
    resets: Any

    def __post_init__(self) -> None:
        if min(self.truncation, self.horizon) < 1:
            raise ValueError(
                "truncation and horizon must be at least 1, not "
                f"{self.truncation} and {self.horizon}"
            )
        if not 0 <= self.offset <= self.horizon:
            raise ValueError(
                f"offset must be from 0 to the horizon, {self.horizon}, "
                f"not {self.offset}"
            )

    def start(self, meta: Tensor, begin: Begin, seed: int = 0) -> State:
        """State of all pairs before the first estimate; ``meta [d]``."""
        places = torch.arange(self.pairs)
        if self.offset:
            places = places + torch.rand(
                self.pairs, generator=generator("offset", seed), dtype=torch.float64
            )
        steps = (places * self.offset / self.pairs).long()
        first = [begin(pair, 0) for pair in range(self.pairs)]
        fresh = tree_map(lambda *x: torch.stack(x), first[0], *first[1:])
        params, inner = tree_map(lambda x: torch.stack([x] * self.members, 1), fresh)
        return {
            "params": params,
            "optimizer": inner,
            "steps": steps,
            "episodes": torch.zeros(self.pairs, dtype=torch.int64),
        }

    def unroll(
        self, step: Step, begin: Begin, metas: Tensor, state: State, batches: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Train all pairs in ``state`` for one truncation, restarting those due.

        ``metas [N, M, d]``; ``batches [N, K, ...]`` has one entry for each of K steps.
        Returns losses ``[N, K, M]``, whether a step was trained (else its loss is zero)
        and whether it belongs to the unroll with which the truncation began, both ``[N,
        K]``, and the new state.
        """
        steps, episodes = state["steps"].tolist(), state["episodes"].tolist()
        params, inner = state["params"], state["optimizer"]
        done = torch.zeros(len(metas), dtype=torch.bool)
        losses, trained, credited = [], [], []

        def restart(due: list[int]) -> tuple[Tensor, State]:
            values = (params, inner)
            for pair in due:
                episodes[pair] += 1
                steps[pair] = 0
                fresh = begin(pair, episodes[pair])
                values = tree_map(lambda x, y, n=pair: put(x, n, y), values, fresh)
            return values

        for batch in batches.unbind(1):
            due = [n for n, k in enumerate(steps) if k >= self.horizon]
            if self.resets == "free":
                params, inner = restart(due)
                done[due] = True
                due = []
            loss, params, inner = step(metas, params, inner, batch)
            steps = [k + 1 for k in steps]
            params, inner = restart(due)
            active = torch.ones(len(metas), dtype=torch.bool)
            active[due] = False
            if self.resets == "slot":
                done = done | (active & (torch.tensor(steps) >= self.horizon))
            losses.append(torch.where(active[:, None].to(loss.device), loss, 0.0))
            trained.append(active)
            credited.append(~done)

        new = {
            "params": params,
            "optimizer": inner,
            "steps": torch.tensor(steps),
            "episodes": torch.tensor(episodes),
        }
        mask, old = torch.stack(trained, 1), torch.stack(credited, 1)
        return torch.stack(losses, 1), mask, old, new


@dataclass(frozen=True)
class PES(Online):
    """An estimator of the meta-gradient from ``pairs`` antithetic pairs.

    Each estimate takes ``truncation`` inner steps of every pair, and a pair starts
    afresh after ``horizon`` steps. Both members of a pair share initial parameters and
    batches. With an ``offset``, usually the horizon, pair n is first counted as having
    done a random number of steps below it, each pair in a stretch of its own (the
    reference code draws freely, from more pairs), so that they restart at all times.

    ``resets="free"`` restarts a pair just before a step and credits what follows to the
    perturbation of the restart alone: unbiased, as the paper of PES has it. ``"slot"``
    does what the reference code of STAR does: restarting takes the place of a step, and
    the last step of an unroll is credited like those after it, which biases the
    estimate (by that step's part in the unroll, little at long horizons). Where it
    takes the place of a truncation's only step that pair's estimate is zero (in the
    reference that of all pairs).
    ``accumulate=False`` forgets earlier perturbations: truncated ES, for comparison.

    The state has also ``noise [N, d]``, the sum of perturbations.
    """

    members = 2
    pairs: int = 4
    truncation: int = 50
    horizon: int = 2_000
    sigma: float = 0.01
    resets: Literal["free", "slot"] = "free"
    offset: int = 0
    accumulate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1 or not self.sigma > 0:
            raise ValueError(
                f"an estimate needs pairs and a positive sigma, not {self.pairs} and "
                f"{self.sigma}"
            )
        check_literals(self)

    def start(self, meta: Tensor, begin: Begin, seed: int = 0) -> State:
        noise = meta.new_zeros(self.pairs, len(meta))
        return super().start(meta, begin, seed) | {"noise": noise}

    def perturbations(self, meta: Tensor, seed: int, iteration: int) -> Tensor:
        """Draw eps ``[pairs, d]`` of an iteration: the same on every device."""
        gen = generator("noise", seed, iteration)
        eps = torch.randn(self.pairs, len(meta), generator=gen)
        return self.sigma * eps.to(meta)

    def estimate(
        self,
        step: Step,
        begin: Begin,
        meta: Tensor,
        eps: Tensor,
        state: State,
        batches: Tensor,
    ) -> tuple[Estimate, State]:
        """Run one truncation of the N pairs in ``state``.

        ``step`` is vectorised (:func:`over_pairs`), ``meta [d]``, ``eps [N, d]``,
        ``batches [N, K, ...]`` one entry for each of K steps.
        """
        metas = torch.stack([meta + eps, meta - eps], 1)
        losses, trained, credited, new = self.unroll(step, begin, metas, state, batches)
        old, count = credited.to(losses), trained.sum(1).clamp(min=1).to(losses)
        difference = losses[..., 0] - losses[..., 1]
        noise = state["noise"] + eps if self.accumulate else eps
        a, b = (
            (difference * old).sum(1) / count,
            (difference * (1 - old)).sum(1) / count,
        )
        per_pair = (a[:, None] * noise + b[:, None] * eps) / (2 * self.sigma**2)
        going = credited[:, -1:].to(eps.device)
        new["noise"] = torch.where(going, noise, eps)
        return Estimate(per_pair, losses, trained.to(losses.device)), new


@dataclass(frozen=True)
class BackPropagation(Online):
    """Truncated back-propagation, in the place of an estimator by perturbations.

    Each of ``unrolls`` is differentiated through one truncation, second derivatives of
    the optimizee included; parameters and state at its start are taken for given. That
    costs three times the steps themselves. A truncation as long as the horizon is
    back-propagation through the whole unroll. Derivatives of an unroll that are not
    finite count as zero, as PES's cut-off losses do. Restarts (``"free"``) as with
    :class:`PES`, whose interface this is; its perturbations are zero.
    """

    members = 1
    passes = 3
    resets = "free"
    unrolls: int = 4
    truncation: int = 50
    horizon: int = 2_000
    offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unrolls < 1:
            raise ValueError(f"an estimate needs unrolls, not {self.unrolls}")
        if self.truncation < 2:
            raise ValueError(too_short(self.truncation))

    @property
    def pairs(self) -> int:
        """An unroll is a pair with one member."""
        return self.unrolls

    def perturbations(self, meta: Tensor, seed: int, iteration: int) -> Tensor:
        return meta.new_zeros(self.unrolls, len(meta))

    def estimate(
        self,
        step: Step,
        begin: Begin,
        meta: Tensor,
        eps: Tensor,
        state: State,
        batches: Tensor,
    ) -> tuple[Estimate, State]:
        """As :meth:`PES.estimate`."""
        with torch.enable_grad():
            metas = (meta + eps)[:, None].detach().requires_grad_()
            losses, trained, _, new = self.unroll(step, begin, metas, state, batches)
            (per_unroll,) = torch.autograd.grad(losses.mean(1).sum(), metas)
        new = tree_map(Tensor.detach, new)
        finite = per_unroll[:, 0].nan_to_num(0.0, 0.0, 0.0)
        return Estimate(finite, losses.detach(), trained), new


def es(pairs: int = 4, horizon: int = 50, sigma: float = 0.01) -> PES:
    """Plain ES: every estimate is a whole unroll of fresh pairs."""
    return PES(pairs, horizon, horizon, sigma)


def over_pairs(step: Step) -> Step:
    """Vectorise an inner step over N pairs, whose members share their batch."""
    members = torch.func.vmap(step, in_dims=(0, 0, 0, None))
    return torch.func.vmap(members)


def put(x: Tensor, at: int, value: Tensor) -> Tensor:
    """Set one entry (both members of a pair); a copy, what ``x`` was is kept."""
    x = x.clone()
    x[at] = value.to(x)
    return x


def clipped(gradient: Tensor, bound: float) -> Tensor:
    """Cut every entry off at +-bound; entries that are not finite count as zero."""
    return gradient.nan_to_num(0.0, 0.0, 0.0).clamp(-bound, bound)


def generator(*key: Any) -> torch.Generator:
    """Return a generator whose numbers depend on all of ``key`` and nothing else."""
    word = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(word, "big"))


# ---- the meta-training ---------------------------------------------------------------


@dataclass(frozen=True)
class Evolution(MetaWork):
    """Everything that determines a meta-training by ES or PES (its configuration).

    ``iterations`` outer steps of AdamW at ``meta_lr`` with ``weight_decay`` on all
    meta-parameters (a multiple of the rate), each with one estimate, whose entries are
    clipped to +-``clip`` and set to zero where not finite. The meta-loss is the
    mini-batch loss before each inner step, cut off at ``ceiling`` times ln(classes)
    (and there, too, where not finite) unless ``ceiling`` is None. STAR, section 5 and
    App. B, and its reference code; ``iterations`` and pairs are ours.

    Pairs are computed in vectorised groups of ``group`` (or all, if fewer). Under
    ``torchrun`` the ranks take whole groups in turn: the result is that of one process.

    Validation and snapshots as in :class:`~l2olib.metatrain.truncated.MetaTraining`,
    over ``horizon`` steps and of the same cut-off losses; an iteration is there called
    a rollout. Nothing is selected: the result is where the last iteration ends. Of each
    gradient, norm and share of clipped entries are recorded.
    """

    selects = False

    optimizer: Optimizer
    optimizee: Any
    data: str
    batch: int = 128
    iterations: int = 2_000
    estimator: PES | BackPropagation = PES()
    meta_lr: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    ceiling: float | None = 1.5
    seed: int = 0
    validate_every: int = 100
    validation_seeds: int = 1
    patience: int | None = None
    group: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        ceiling = 1.0 if self.ceiling is None else self.ceiling
        if self.group < 1 or not (self.clip > 0 and ceiling > 0):
            raise ValueError(
                "group must be at least 1, and clip and ceiling positive, not "
                f"{self.group}, {self.clip} and {self.ceiling}"
            )
        if self.patience is not None:
            raise ValueError(
                "patience must be None: this meta-training selects nothing"
            )
        if self.estimator.pairs % min(self.group, self.estimator.pairs):
            raise ValueError(
                f"pairs must be whole groups of {self.group}, "
                f"not {self.estimator.pairs}"
            )
        check_built_for(self.optimizee, self.optimizer)

    @property
    def rollouts(self) -> int:
        return self.iterations

    @property
    def rollout(self) -> int:
        return self.estimator.horizon

    @property
    def outer(self) -> Optimizer:
        return AdamW(constant(self.meta_lr), weight_decay=self.weight_decay)

    def job(self, device: str, compile: bool, metas: Any) -> EvolutionJob:
        return EvolutionJob(self, device, compile)

    def seconds(self) -> float:
        """Estimated time on one CPU core."""
        n, e = self.optimizee.layout.n, self.estimator
        flops = self.optimizer.flops(n) + self.optimizee.flops(self.batch, True)
        steps = self.iterations * e.pairs * e.members * e.passes * e.truncation
        steps += self.iterations // self.validate_every * self.rollout
        return steps * (flops / RATE + OVERHEAD)


@dataclass
class EvolutionJob(MetaJob):
    """The resumable computation of an :class:`Evolution`; one estimate a piece."""

    config: Evolution

    def __post_init__(self) -> None:
        super().__post_init__()

        def step(meta: Tensor, params: Tensor, state: State, idx: Tensor) -> Any:
            params, state, losses = inner_steps(
                self.task,
                self.config.optimizer.update,
                self.layout.views(meta),
                params,
                state,
                idx[None],
            )
            return self.meta_loss(losses[0]), params, state

        self.step = accelerated(over_pairs(step), self.compile, self.device)

    def meta_loss(self, losses: Tensor) -> Tensor:
        return cut(losses, self.config.ceiling, self.task.data.classes)

    def begin(self, pair: int, episode: int) -> tuple[Tensor, State]:
        """Fresh parameters and optimizer state; no two episodes share them."""
        c = self.config
        base = TRAINING * (c.seed + 1)
        params = c.optimizee.init(base + episode * c.estimator.pairs + pair)
        params = params.to(self.device)
        return params, c.optimizer.init(params)

    def start(self) -> State:
        state, e = super().start(), self.config.estimator
        blank = torch.full((self.config.iterations,), torch.nan)
        return state | {
            "pairs": e.start(state["meta"], self.begin, self.config.seed),
            "norm": blank,
            "clipped": blank.clone(),
        }

    def batches(self, iteration: int) -> Tensor:
        """Item numbers ``[N, K, B]``; every pair reads a stream of its own."""
        c, k = self.config, self.config.estimator.truncation
        first = TRAINING * (c.seed + 1)
        streams = range(first, first + c.estimator.pairs)
        return train_batches(
            self.task.items, c.batch, streams, iteration * k, k, self.device
        )

    def estimate(
        self, meta: Tensor, eps: Tensor, state: State, batches: Tensor
    ) -> tuple[Estimate, State]:
        """As :meth:`PES.estimate` of all pairs, group by group, on all ranks."""
        e, size = (
            self.config.estimator,
            min(self.config.group, self.config.estimator.pairs),
        )
        rank, count = ranks()
        found = {}
        for first in range(rank * size, e.pairs, count * size):
            part = slice(first, first + size)

            def begin(pair: int, episode: int, first: int = first) -> Any:
                return self.begin(first + pair, episode)

            own = tree_map(lambda x, part=part: x[part], state)
            found[first] = e.estimate(
                self.step, begin, meta, eps[part], own, batches[part]
            )
        if count > 1:
            shared: list[Any] = [None] * count
            dist.all_gather_object(shared, tree_map(Tensor.cpu, found))
            found = {first: part for one in shared for first, part in one.items()}
            found = tree_map(lambda x: x.to(self.device), found)
        return tree_map(lambda *x: torch.cat(x), *(found[k] for k in sorted(found)))

    @torch.no_grad()
    def advance(self, state: State) -> State:
        c, done, meta = self.config, int(state["rollouts"]), state["meta"]
        eps = c.estimator.perturbations(meta, c.seed, done)
        found, pairs = self.estimate(meta, eps, state["pairs"], self.batches(done))
        gradient = clipped(found.gradient, c.clip)
        move, adam = self.outer.update({}, gradient, state["adam"], meta)
        seen = {
            "training": found.loss,
            "norm": found.gradient.norm(),
            "clipped": (gradient != found.gradient).float().mean(),
        }
        for name, value in seen.items():
            state = state | {name: put(state[name], done, value)}
        state |= {"meta": meta + move, "adam": adam, "pairs": pairs}
        return self._look(state | {"rollouts": state["rollouts"] + 1})

    def finish(self, state: State) -> dict[str, Tensor]:
        done = int(state["rollouts"])
        traces = {f"gradient.{k}": state[k][:done] for k in ("norm", "clipped")}
        return super().finish(state) | traces
