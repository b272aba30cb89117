"""Tune a baseline: trials on seeds of their own, the best of them by a fixed rule.

A :class:`Tuning` is a training repeated with each of its ``candidates``; its record
holds their scores. :class:`Chosen` stands, in the table of experiments, for the method
that a recorded tuning chooses: such a run "needs" that record, and its own
configuration then names the choice in full. So no tuned number is typed by hand, and a
tuning that changes makes what rests on it stale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .optimizers import AdamW, CosineDecay, NAdamW, Optimizer, State, constant
from .records import RecordError, later
from .train import Alone, Cost, Metas, Training, TrainingJob

FIRST_SEED = 1_000
"""Seeds of tunings start here; those of figures are below."""


@dataclass(frozen=True)
class Tuning(Training):
    """A training to be repeated with each of ``candidates`` (methods) as its method.

    Without ``bracket`` all are tried. With it the candidates are a ladder, such as
    learning rates in ascending order: those at the positions ``bracket`` are tried
    first, then, while the best so far is at an end of what was tried, the next one
    beyond that end.

    With ``finalists`` the trials of ``steps`` only choose so many candidates; these are
    tried again in runs of ``final`` steps, which decide.
    """

    candidates: tuple[Any, ...] = ()
    bracket: tuple[int, ...] = ()
    finalists: int = later(0)
    final: int = later(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.finalists <= len(self.candidates):
            raise ValueError(
                f"of {len(self.candidates)} candidates {self.finalists} cannot be "
                "finalists"
            )
        if bool(self.finalists) != bool(self.final):
            raise ValueError("finalists and the final's steps come together")
        if self.finalists:
            self.trial(0, final=True)  # complains of a length that does not fit
        if self.candidates[:1] != (self.method,):
            raise ValueError("the method of a tuning is its first candidate")
        if not all(0 <= k < len(self.candidates) for k in self.bracket):
            raise ValueError(
                f"a bracket names candidates 0 to {len(self.candidates) - 1}, "
                f"not {self.bracket}"
            )

    def trial(self, k: int, final: bool = False) -> Training:
        """The training with candidate ``k``."""
        method = self.candidates[k]
        if not final:
            return Training.of(self, method=method)
        method = stretched(method, self.final)
        return Training.of(self, method=method, steps=self.final)

    def left(self, scores: Tensor) -> list[int]:
        """Candidates still to be tried (of a ladder, as far as that is known).

        ``scores [R, K]`` are those found so far, NaN where there is none.
        """
        tried = [k for k in range(len(self.candidates)) if not scores[0, k].isnan()]
        wanted = self.bracket or range(len(self.candidates))
        untried = [k for k in wanted if k not in tried]
        if untried or not self.bracket:
            return untried
        k = best(scores)
        beyond = {min(tried): k - 1, max(tried): k + 1}.get(k, -1)
        return [beyond] if 0 <= beyond < len(self.candidates) else []

    def left_in_final(self, scores: Tensor, final: Tensor) -> list[int]:
        """Finalists still to be tried at length; ``final [R, K]`` like ``scores``.

        Not those that were not tried before, or in vain, so there may be fewer.
        """
        mean = scores.double().mean(0).nan_to_num(torch.inf, torch.inf)
        chosen = mean.argsort(stable=True)[: self.finalists].tolist()
        return [k for k in chosen if mean[k].isfinite() and final[0, k].isnan()]

    def job(self, device: str, compile: bool, metas: Metas) -> TuningJob:
        return TuningJob(self, metas, device, compile)

    def seconds(self) -> float:
        """Estimated time on one CPU core; a ladder is taken to go one step beyond."""
        trials = len(self.bracket) + 1 if self.bracket else len(self.candidates)
        return (trials + self.finalists * self.final / self.steps) * super().seconds()


def best(scores: Tensor) -> int:
    """The candidate of lowest mean score over the seeds; the first of equals.

    ``scores [R, K]``; NaN: not tried, infinite: a loss was not finite.
    """
    mean = scores.double().mean(0)  # tried on all seeds or on none; not tried is last
    return int(mean.nan_to_num(nan=torch.inf).argmin())


def choose(arrays: dict[str, Tensor]) -> int:
    """The candidate that the record of a tuning chooses."""
    return best(arrays.get("final", arrays["scores"]))


def stretched(method: Any, steps: int) -> Any:
    """The method with schedules that have an end stretched to ``steps``."""
    changed = {}
    for role, optimizer in method.optimizers.items():
        schedule = getattr(optimizer, "lr", None)
        if isinstance(schedule, CosineDecay):
            changed[role] = replace(optimizer, lr=replace(schedule, steps=steps))
    return replace(method, **changed)


@dataclass
class TuningJob:
    """The resumable computation of a :class:`Tuning`; a piece is one of a trial."""

    config: Tuning
    metas: Metas
    device: str = "cpu"
    compile: bool = False

    def __post_init__(self) -> None:
        self.trial = lru_cache(maxsize=1)(self._trial)

    def _trial(self, k: int, final: bool) -> TrainingJob:
        trial = self.config.trial(k, final)
        return TrainingJob(trial, self.metas, self.device, self.compile)

    def start(self) -> State:
        c = self.config
        blank = torch.full((len(c.seeds), len(c.candidates)), torch.nan)
        return {"scores": blank} | ({"final": blank.clone()} if c.finalists else {})

    def advance(self, state: State) -> State:
        c, name = self.config, "scores"
        left = c.left(state["scores"])
        if not left:
            name, left = "final", c.left_in_final(state["scores"], state["final"])
        trial = self.trial(left[0], name == "final")
        inner = trial.advance(state.get("trial") or trial.start())
        if int(inner["step"]) < trial.config.steps:
            return state | {"trial": inner}
        found = state[name].clone()
        keep = [seed - c.group[0] for seed in c.seeds]
        found[:, left[0]] = score(inner["trace"]["loss"][keep])
        return {k: v for k, v in state.items() if k != "trial"} | {name: found}

    def position(self, state: State) -> tuple[int, int]:
        c, current = self.config, int(state.get("trial", {}).get("step", 0))
        tried, finals = (
            int((~state[name][0].isnan()).sum()) if name in state else 0
            for name in ("scores", "final")
        )
        done = tried * c.steps + finals * c.final
        left = len(c.left(state["scores"])) * c.steps
        if left:
            left += c.finalists * c.final
        elif c.finalists:
            left = len(c.left_in_final(state["scores"], state["final"])) * c.final
        return done + current, done + left

    def finish(self, state: State) -> dict[str, Tensor]:
        """The record: ``scores`` and, with finalists, ``final``, ``[R, K]`` in nats."""
        return {name: state[name] for name in ("scores", "final") if name in state}


def score(losses: Tensor) -> Tensor:
    """Mean training loss over the last tenth of the steps of ``[R, T]``: ``[R]``.

    Infinite where a loss is not finite.
    """
    last = losses[:, -max(losses.shape[1] // 10, 1) :].double().mean(1)
    last = torch.where(losses.isfinite().all(1), last, torch.inf)
    return last.float()


@dataclass(frozen=True)
class Chosen:
    """Stands for the method that the recorded ``tuning`` chooses.

    ``experiment`` and ``name`` say where in the table the tuning is. Until the record
    is read the first candidate answers what the table asks of a method.
    """

    experiment: str
    name: str
    tuning: Tuning

    @property
    def interval(self) -> int:
        return self.tuning.method.interval

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return self.tuning.method.optimizers

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        return self.tuning.method.cost(optimizee, batch, items, accepted)

    def settle(self, arrays: dict[str, Tensor], steps: int) -> Any:
        """The candidate that the tuning's record chooses, :func:`stretched`.

        RecordError if no trial stayed finite.
        """
        scores = arrays.get("final", arrays["scores"])
        if not scores.double().mean(0).isfinite().any():
            raise RecordError(
                f"no trial of {self.experiment} {self.name} stayed finite: give it "
                "other candidates"
            )
        return stretched(self.tuning.candidates[choose(arrays)], steps)


# ---- candidates ----------------------------------------------------------------------

RATES = tuple(
    float(f"{lead}e{power}") for power in range(-7, 1) for lead in (1, 3)
)[:-1]  # fmt: skip
"""STAR's 15 learning rates for Adam, 1e-7, 3e-7, ..., 1 (its reference code)."""
MIDDLE = tuple(RATES.index(rate) for rate in (3e-4, 1e-3, 3e-3))
"""Where a search that brackets the best of them starts."""


def adam_at(rate: float) -> Alone:
    """The "tuned Adam" of STAR's baselines at one of its rates."""
    return Alone(AdamW(constant(rate), eps_root=1e-8))


def adam_ladder() -> tuple[Alone, ...]:
    """It at each of the 15."""
    return tuple(adam_at(rate) for rate in RATES)


def nadamw_draws(count: int, steps: int) -> tuple[Alone, ...]:
    """Random settings of NAdamW with a cosine schedule over ``steps`` steps.

    STAR takes the best of 1,000 fixed settings; what is known of them here is how often
    an option is in use (l2 641, weight decay 686, warm-up 516, Nesterov 502 times: spec
    card, section 7). Those are the probabilities of the draws; the ranges are ours. A
    longer list begins with the shorter ones.
    """
    gen = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> float:
        draw = torch.rand((), generator=gen, dtype=torch.float64).item()
        return float(f"{low + (high - low) * draw:.3g}")

    def log_uniform(low: float, high: float) -> float:
        return float(f"{10 ** uniform(math.log10(low), math.log10(high)):.3g}")

    def sometimes(share: float, low: float, high: float) -> float:
        value = log_uniform(low, high)
        return value if uniform(0, 1) < share else 0.0

    found = []
    for _ in range(count):
        schedule = CosineDecay(
            log_uniform(1e-5, 1e-1),
            steps,
            warmup=sometimes(0.516, 1e-3, 1e-1),
            hold=uniform(0, 0.9),
            floor=log_uniform(1e-4, 1),
        )
        found.append(
            NAdamW(
                schedule,
                beta1=round(1 - log_uniform(1e-2, 1), 6),
                beta2=round(1 - log_uniform(1e-4, 1), 6),
                eps=log_uniform(1e-10, 1e-2),
                weight_decay=sometimes(0.686, 1e-5, 1e-1),
                l2=sometimes(0.641, 1e-6, 1e-2),
                nesterov=uniform(0, 1) < 0.502,
            )
        )
    return tuple(map(Alone, found))


def tuned(
    experiment: str,
    name: str,
    candidates: Sequence[Any],
    bracket: tuple[int, ...] = (),
    *,
    seeds: int = 1,
    **setting: Any,
) -> Chosen:
    """The best of ``candidates``, tuned on ``seeds`` seeds of their own.

    ``setting`` are the arguments of :class:`~l2olib.train.Training` for the trials.
    """
    first = -(-FIRST_SEED // seeds) * seeds  # a group of so many begins there
    tuning = Tuning(
        method=candidates[0],
        candidates=tuple(candidates),
        bracket=bracket,
        seeds=tuple(range(first, first + seeds)),
        replicas=seeds,
        **setting,
    )
    return Chosen(experiment, name, tuning)
