"""Run resumable jobs; train a method on an optimizee, in segments, over replicas.

:func:`drive` is the one loop behind every long computation of the book: it advances a
job in small pieces, writes a checkpoint now and then, continues a killed one to the
bit-identical end, and stops cleanly at a time limit. :class:`Training` configures a
method (an optimizer alone, a guard, ...) on an optimizee; :class:`TrainingJob` runs it.
"""

from __future__ import annotations

import ctypes
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from . import records
from .data import DataError, load, train_batches, valid_indices
from .optimizees import Layout, Task, check_built_for
from .optimizers import Meta, Optimizer, State, check_least

RATE, OVERHEAD = 1.6e10, 6e-4
"""FLOP a second and seconds a step of one CPU core, to estimate the cost of a run."""

PIECE, LARGE = 10, 50_000
"""Inner steps, about, that are one compiled function: it is unrolled, so longer ones
take minutes to compile; shorter ones are called too often. A network of more than
``LARGE`` parameters is worth a call for every decision."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Names of glibc's mallopt: memory never goes back, and none is mapped by itself."""

Trace = dict[str, Tensor]
Metas = dict[str, Meta]


def repeatable() -> None:
    """Set this process up so that the same run gives the same bits.

    Summation order, and with it every digit of a long run, depends on the number of
    threads: one thread is the setting of the records.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it writes it: filling it costs 7% of a run.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore


def keep_memory() -> None:
    """Let this process keep the memory that it frees (with glibc; else do nothing).

    Blocks of some megabytes otherwise go back to the kernel when they are freed and are
    fetched again, page by page, for the next tensor: up to half the time of an LSTM
    update without compilation where everything above 128 KiB goes back
    (``benchmarks/speed.md``), less with glibc's default, which adapts.
    """
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    )
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


class Job(Protocol):
    """A computation that is a sequence of states (nested dicts of tensors).

    ``advance`` may run any piece of work, but the state after it must be a function of
    the state before it alone: that is what makes a resumed run bit-identical.
    """

    def start(self) -> State: ...

    def advance(self, state: State) -> State: ...

    def position(self, state: State) -> tuple[int, int]:
        """(done, total), in units that mean something to a reader."""
        ...

    def finish(self, state: State) -> dict[str, Tensor]: ...


class Unfinished(Exception):
    """The time limit was reached; the checkpoint holds everything done so far."""


def ranks() -> tuple[int, int]:
    """This process among those that torchrun started, and their number; (0, 1)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def agreed(value: Any) -> Any:
    """The first rank's ``value``, on every rank; the others wait for it here.

    The ranks of torchrun must take the same turns, so what depends on a clock or on a
    file is for the first to say. It alone writes.
    """
    if ranks()[1] == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def drive(
    job: Job,
    *,
    key: str = "",
    checkpoint: Path | str | None = None,
    save_every: float = 60.0,
    time_limit: float | None = None,
    device: str = "cpu",
    report: Callable[[int, int], None] | None = None,
    origins: list[dict[str, Any]] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Run ``job`` to its end; return its arrays and the seconds it took in all.

    On a CPU these are seconds of processor time (a busy machine does not count against
    a run), on a GPU of the clock, resumed pieces included, of the first rank if there
    are several.

    ``key`` names the configuration, and a checkpoint needs one: a checkpoint of another
    one, or a damaged one, is refused with :class:`records.RecordError`. The file stays
    when all is done. ``save_every`` and ``time_limit`` are in
    seconds. What was done until an interrupt (Ctrl-C) is saved, too.
    ``origins``, facts about this process, are kept in the checkpoint; those of the
    processes that it has been through are put before them.
    """
    if checkpoint is not None:
        if not key:
            raise ValueError(
                "a checkpoint needs a key that names the configuration, or a run of "
                "another one would go on from it"
            )
        checkpoint = Path(checkpoint)
    keep_memory()
    origins = [] if origins is None else origins
    clock = time.monotonic if device.startswith("cuda") else time.process_time
    began, worked, earlier = time.monotonic(), clock(), 0.0
    if checkpoint is not None and agreed(checkpoint.exists()):
        arrays, metadata = records.read(checkpoint, device)
        if metadata.get("key") != key:
            raise records.RecordError(
                f"{records.short(checkpoint)} is the checkpoint of another "
                "configuration: delete it to start afresh"
            )
        if metadata.get("digest") != records.digest(key, arrays):
            raise records.RecordError(
                f"{records.short(checkpoint)} is damaged (its content does not match "
                "its digest): delete it to start afresh"
            )
        # in the order of the saved state, for which functions have been compiled
        state = records.unflatten({k: arrays[k] for k in metadata.get("order", arrays)})
        earlier = metadata["seconds"]
        origins[:0] = metadata.get("origins", [])
    else:
        state = job.start()

    def elapsed() -> float:
        return earlier + clock() - worked

    def save() -> None:
        if checkpoint is not None and ranks()[0] == 0:
            arrays = records.flatten(state)
            metadata = {"key": key, "seconds": elapsed(), "origins": origins}
            metadata |= {"order": list(arrays), "digest": records.digest(key, arrays)}
            records.write(checkpoint, arrays, metadata)

    saved = time.monotonic()
    while True:
        done, total = job.position(state)
        if report is not None:
            report(done, total)
        if done >= total:
            # of a resumed run all is on the device, of another one not all
            return job.finish(tree_map(Tensor.cpu, state)), elapsed()
        late = time_limit is not None and time.monotonic() - began >= time_limit
        if agreed(late):
            save()
            raise Unfinished(f"stopped at {done} of {total} by the time limit")
        if time.monotonic() - saved >= save_every:
            save()
            saved = time.monotonic()
        try:
            state = job.advance(state)
        except KeyboardInterrupt:  # ``state`` is still that before the piece
            save()
            raise


def _signature(given: list[Any], form: Any) -> tuple[Any, ...]:
    """What a graph is made for: arguments of these shapes and types."""
    return form, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in given)


def compiled(function: Callable[..., Any], on: bool) -> Callable[..., Any]:
    """``torch.compile`` as a flag: the same function, its element-wise work fused.

    It is traced before, once for all tensors of these shapes and types and these other
    arguments: what ``vmap`` and ``torch.func.grad`` come to, as plain operations. To
    see through these itself takes the compiler twice as long, and where the result is
    differentiated it does not come to an end.
    """
    if not on:
        return function
    graphs: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any, **named: Any) -> Any:
        given, form = tree_flatten((args, named))
        key = _signature(given, form)
        if key not in graphs:

            def flat(*given: Any) -> Any:
                args, named = tree_unflatten(given, form)
                return function(*args, **named)

            with torch.no_grad():
                graphs[key] = torch.compile(make_fx(flat)(*given), dynamic=False)
        return graphs[key](*given)

    return call


class Captured:
    """A function of tensors on a GPU, launched as one CUDA graph.

    A step of a small network is hundreds of kernels of some microseconds, which Python
    takes longer to launch than they run. A graph is captured at the first call with
    arguments of these shapes and types, and its results are compared with that call's.
    A function that cannot be captured, or differs, runs as it is, with a warning; so
    does, without one, a call with gradients on. It must change none of its arguments.
    """

    def __init__(self, function: Callable[..., Any], device: str) -> None:
        self.function, self.device = function, device
        self.graphs: dict[Any, tuple[Any, list[Any], Any]] | None = {}

    def __call__(self, *args: Any) -> Any:
        if self.graphs is None or torch.is_grad_enabled():
            return self.function(*args)
        given, form = tree_flatten(args)
        key = _signature(given, form)
        if key not in self.graphs:
            with torch.cuda.device(self.device):
                return self._capture(key, given, form)
        graph, held, result = self.graphs[key]
        for mine, new in zip(held, given, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        graph.replay()
        return tree_map(torch.clone, result)  # the next replay writes to the same place

    def _capture(self, key: Any, given: list[Any], form: Any) -> Any:
        """Keep a graph for ``key``; return the results without it."""
        assert self.graphs is not None
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):  # libraries set themselves up in a first call
            # of the same strides as captured below, or a compiled function starts over
            held = [x.clone() if isinstance(x, Tensor) else x for x in given]
            for _ in range(2):
                plain = self.function(*tree_unflatten(held, form))
        main.wait_stream(side)
        graph, why = torch.cuda.CUDAGraph(), "it computes something else"
        try:
            with torch.cuda.graph(graph):
                result = self.function(*tree_unflatten(held, form))
            graph.replay()
            if alike(plain, result):
                self.graphs[key], why = (graph, held, result), ""
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
        if why:
            self.graphs = None
            warnings.warn(f"no CUDA graph: {why}", stacklevel=3)
        return plain


def alike(a: Any, b: Any) -> bool:
    """Whether two results agree but for rounding."""
    return all(
        torch.allclose(x, y, rtol=1e-3, atol=1e-5, equal_nan=True)
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


def accelerated(
    function: Callable[..., Any], compile: bool, device: str
) -> Callable[..., Any]:
    """:func:`compiled` if asked for, and on a GPU :class:`Captured`."""
    function = compiled(function, compile)
    return Captured(function, device) if device.startswith("cuda") else function


# ---- methods -------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Work of one inner step: what a comparison of methods is drawn against.

    ``gradients`` and ``forwards`` count mini-batch passes, ``depth`` those that must
    follow one another, ``flops`` matrix work (2 FLOP a multiply-add) of everything.
    """

    gradients: float
    forwards: float
    depth: float
    flops: float


class Method(Protocol):
    """One way to train: an optimizer alone, or a guard over two.

    Written for one replica, without reading tensors back to Python, so that ``vmap``
    adds replicas and a segment can be compiled. ``interval`` divides a segment. Where a
    method has a step ``at``, its ``turn(state)`` is the state from there on.
    """

    @property
    def interval(self) -> int: ...

    @property
    def batches(self) -> tuple[int, str] | None:
        """Validation batches that a decision needs: number and mode."""
        ...

    @property
    def traces(self) -> tuple[str, ...]:
        """What a segment's trace holds for each decision (none: nothing is decided).

        If anything, ``use_l2o`` is among it, and the trace also has ``candidates``
        ``[2, n]``, proposal and fallback of its last decision, for audits.
        """
        ...

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by role; learned ones take their weights by the same role."""
        ...

    def init(self, params: Tensor) -> State:
        """Start at ``params [n]``; the state holds the iterate as ``"params"``."""
        ...

    def segment(
        self,
        task: Task,
        metas: Metas,
        state: State,
        train: Tensor,
        valid: Tensor | None,
    ) -> tuple[State, Trace]:
        """Take the ``S`` steps of a segment; ``S / interval`` decisions.

        ``metas``: meta-parameters by role ({} for a hand-crafted optimizer). ``train
        [S, B]``: items of the batch of each step. ``valid [S / interval, batches, B]``,
        or None. The trace has the losses before each step, ``loss [S]``, and each of
        ``traces``, ``[S / interval]``. :func:`l2olib.guards.in_decisions` makes a
        segment of a method that says how it decides once.
        """
        ...

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        """Mean work of a step, where that share of the proposals was accepted."""
        ...


Order = Literal["first", "full"]


def inner_steps(
    task: Task,
    update: Callable[..., Any],
    meta: Meta,
    params: Tensor,
    state: State,
    batches: Tensor,
    first: tuple[Tensor, Tensor] | None = None,
    order: Order = "full",
) -> tuple[Tensor, State, Tensor]:
    """Take one step of an optimizer's ``update`` on each of ``batches [T, B]``.

    ``first``: loss and gradient of the first batch at ``params`` where already known.
    Returns parameters, optimizer state and the losses before each step ``[T]``.

    ``order="first"`` treats the gradient that enters the optimizer as data (no second
    derivatives of the optimizee, as both public code bases do); ``"full"``
    differentiates through it.
    """
    losses = []
    for i in range(len(batches)):
        at = params.detach() if order == "first" else params
        known = first if i == 0 else None
        loss, grad = known or task.loss_and_grad(at, batches[i])
        # Value f(at); its derivative in params is the same recorded gradient.
        losses.append(loss + grad @ (params - at) if order == "first" else loss)
        delta, state = update(meta, grad, state, params, loss=loss)
        params = params + delta
    return params, state, torch.stack(losses)


@dataclass(frozen=True)
class Alone:
    """An optimizer with nobody watching: the unguarded L2O, and every baseline."""

    optimizer: Optimizer

    interval = 1
    batches = None
    traces = ()

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"optimizer": self.optimizer}

    def init(self, params: Tensor) -> State:
        return {"params": params, "optimizer": self.optimizer.init(params)}

    def segment(
        self,
        task: Task,
        metas: Metas,
        state: State,
        train: Tensor,
        valid: Tensor | None,
    ) -> tuple[State, Trace]:
        """Take ``len(train)`` steps; the trace holds the losses before each."""
        params, inner, losses = inner_steps(
            task,
            self.optimizer.update,
            metas["optimizer"],
            state["params"],
            state["optimizer"],
            train,
        )
        return {"params": params, "optimizer": inner}, {"loss": losses}

    def cost(
        self, optimizee: Any, batch: int, items: int, accepted: float = 0.0
    ) -> Cost:
        flops = optimizee.flops(batch, gradient=True)
        return Cost(1.0, 0.0, 1.0, flops + self.optimizer.flops(optimizee.layout.n))


# ---- the training job ----------------------------------------------------------------


def log_spaced(first: int, last: int, count: int, step: int = 1) -> list[int]:
    """About ``count`` log-spaced multiples of ``step`` in [first, last], ends kept."""
    ratio = (last / first) ** (1 / max(count - 1, 1))
    points = {round(first * ratio**k / step) * step for k in range(count)}
    return sorted({p for p in points if first <= p <= last} | {first, last})


@dataclass(frozen=True)
class Training:
    """Everything that determines one run: a method on an optimizee, for a group of
    seeds.

    ``seeds`` are the replicas that are reported. They belong to one group of
    ``replicas`` seeds, ``replicas * k ... replicas * (k + 1) - 1``, which is always
    computed whole: a seed has the same bits whichever of its neighbours are asked for.
    ``weights`` names the meta-trained weights of the learned optimizers by role;
    ``digests`` are filled in from those files. Both enter the record.

    ``segment`` inner steps are the unit of checkpoints. Held-out and full-data losses
    are taken at about ``evaluations`` log-spaced segment ends; an audit of a guard's
    last decision every ``audit_every`` segments (0: never). With ``sample`` both take
    that many items of each split, in batches of ``batch``, where all of them would cost
    more than the run.
    """

    optimizee: Any
    data: str
    method: Any
    steps: int
    seeds: tuple[int, ...]
    replicas: int = 1
    batch: int = 128
    segment: int = 50
    evaluations: int = 20
    audit_every: int = 4
    weights: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    sample: int = records.later(0)

    def __post_init__(self) -> None:
        if not hasattr(self.method, "interval"):
            raise ValueError(
                f"{self.method!r} is no method of training: wrap an optimizer in Alone"
            )
        check_least(self, replicas=1, segment=1, evaluations=1, audit_every=0, sample=0)
        traces = getattr(self.method, "traces", ())  # what a search chooses comes later
        if traces and "use_l2o" not in traces:
            raise ValueError(
                f"the traces of {self.method!r} lack use_l2o, which says who was chosen"
            )
        if self.steps < 1 or self.steps % self.segment:
            raise ValueError(
                f"steps must be a positive multiple of the segment, {self.segment}, "
                f"not {self.steps}"
            )
        if self.segment % self.method.interval:
            raise ValueError(
                f"the segment must be a multiple of the decision interval, "
                f"{self.method.interval}, not {self.segment}"
            )
        for optimizer in self.method.optimizers.values():
            check_built_for(self.optimizee, optimizer)
        if unknown := set(self.weights) - set(self.method.optimizers):
            raise ValueError(
                f"the method has no {', '.join(sorted(unknown))}: give weights to "
                f"{' or '.join(self.method.optimizers)}"
            )
        if not hasattr(self.seeds, "__iter__"):
            raise ValueError(f"seeds must be several, such as ({self.seeds},)")
        groups = {seed // self.replicas for seed in self.seeds}
        twice = len(set(self.seeds)) != len(self.seeds)
        if len(groups) != 1 or min(self.seeds) < 0 or twice:
            raise ValueError(
                "seeds must be non-negative, distinct and of one group of "
                f"{self.replicas} (replicas says how many), not {self.seeds}"
            )

    @classmethod
    def of(cls, training: Training, **changes: Any) -> Self:
        """The same training as one of this class, with what that adds."""
        same = {f.name: getattr(training, f.name) for f in fields(Training)}
        return cls(**same | changes)

    def job(self, device: str, compile: bool, metas: Metas) -> Job:
        return TrainingJob(self, metas, device, compile)

    def measure(self, job: TrainingJob, method: State, end: int) -> Trace:
        """What is recorded at a mark, from the method's state there: [R, ...] each."""
        return {name: look(method["params"]) for name, look in job.looks.items()}

    def seconds(self) -> float:
        """Estimated time on one CPU core."""
        cost = self.method.cost(self.optimizee, self.batch, 50_000)
        work = self.replicas * cost.flops / RATE + cost.depth * OVERHEAD
        return self.steps * work

    @property
    def group(self) -> range:
        """All seeds of the group, reported or not."""
        first = self.seeds[0] // self.replicas * self.replicas
        return range(first, first + self.replicas)

    @property
    def marks(self) -> list[int]:
        """Steps at which full-data and held-out losses are taken."""
        return log_spaced(self.segment, self.steps, self.evaluations, self.segment)


CANDIDATES = ("full_proposal", "full_fallback")
"""The true losses of an audited decision's two candidates."""


@dataclass
class TrainingJob:
    """The resumable computation of a :class:`Training`; one segment a piece."""

    config: Training
    metas: Metas
    device: str = "cpu"
    compile: bool = False
    task: Task = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        for role, optimizer in c.method.optimizers.items():
            wanted, given = optimizer.init_meta(0), self.metas.get(role, {})
            if wanted and not given:
                raise ValueError(
                    f"the {role} is a learned optimizer without weights: give it those "
                    "of a meta-training, or optimizer.init_meta(seed)"
                )
            own, other = Layout.of(wanted).shapes, Layout.of(given).shapes
            if own != other:
                raise ValueError(
                    f"these weights are not for the {role}: it has {own}, they have "
                    f"{other}"
                )
        self.task = Task(c.optimizee, load(c.data, device=self.device))
        if c.batch > self.task.items:
            raise DataError(
                f"a batch of {c.batch} is larger than the {self.task.items} training "
                f"items of {c.data}"
            )
        self.metas = {
            role: {k: v.to(self.device) for k, v in self.metas.get(role, {}).items()}
            for role in c.method.optimizers
        }

        def piece(state: State, train: Tensor, valid: Tensor | None) -> Any:
            return c.method.segment(self.task, self.metas, state, train, valid)

        dims = (0, 0, None if c.method.batches is None else 0)
        vectorised = torch.func.vmap(piece, in_dims=dims)
        self.piece = accelerated(vectorised, self.compile, self.device)
        seen = self.task
        if c.sample:
            seen = Task(c.optimizee, self.task.data, c.batch, c.sample)
        self.looks = {
            name: torch.func.vmap(getattr(seen, name))
            for name in ("full_loss", "test_loss", "test_error")
        }

    def start(self) -> State:
        c, r = self.config, self.config.replicas
        params = torch.stack([c.optimizee.init(s) for s in c.group]).to(self.device)
        decisions = c.steps // c.method.interval
        empty = {"loss": torch.full((r, c.steps), torch.nan)}
        for name in c.method.traces:
            empty[name] = torch.full((r, decisions), torch.nan)
        state: State = {
            "step": torch.zeros((), dtype=torch.int64),
            # vmap repeats counters without copying: with strides of their own a
            # compiled piece would be compiled twice, as a view they cannot be saved
            "method": tree_map(torch.clone, torch.func.vmap(c.method.init)(params)),
            "trace": empty,
            "looks": {n: torch.full((r, len(c.marks)), torch.nan) for n in self.looks},
        }
        if c.method.traces and c.audit_every:
            audits = c.steps // c.segment // c.audit_every
            blank = torch.full((r, audits), torch.nan, dtype=torch.float64)
            state["audit"] = {
                name: blank.clone() for name in (*CANDIDATES, *c.method.traces)
            }
        return state

    def position(self, state: State) -> tuple[int, int]:
        return int(state["step"]), self.config.steps

    def batches(self, start: int) -> tuple[Tensor, Tensor | None]:
        """Item numbers of the segment at ``start``: training and validation."""
        c, n = self.config, self.task.items
        train = train_batches(n, c.batch, c.group, start, c.segment, self.device)
        if c.method.batches is None:
            return train, None
        n_c, mode = c.method.batches
        first, count = start // c.method.interval, c.segment // c.method.interval
        draws = [
            (seed, 0 if mode == "fixed" else first + d)
            for seed in c.group
            for d in range(count)
        ]
        used = None if mode == "fixed" else train.view(len(draws), -1)
        kind = "iid" if mode == "iid" else "disjoint"
        valid = valid_indices(n, c.batch, draws, n_c, used, kind, device=self.device)
        return train, valid.view(len(train), count, n_c, c.batch)

    def segment(
        self, start: int, state: State, train: Tensor, valid: Tensor | None
    ) -> tuple[State, Trace]:
        """Take the steps from ``start`` on, in pieces of a few decisions each.

        A piece begins where a method turns (:class:`~l2olib.guards.Switch`).
        """
        method, total = self.config.method, train.shape[1]
        turn = getattr(method, "at", -1) - start
        small = self.config.optimizee.layout.n <= LARGE
        width = method.interval * (max(1, PIECE // method.interval) if small else 1)
        cuts, traces = {*range(0, total, width), total}, []
        if 0 < turn < total:
            cuts.add(turn)
        for first, end in pairwise(sorted(cuts)):
            if first == turn:
                state = torch.func.vmap(method.turn)(state)
            held = slice(first // method.interval, end // method.interval)
            part = None if valid is None else valid[:, held]
            state, trace = self.piece(state, train[:, first:end], part)
            traces.append(trace)
        last = {k: v for k, v in traces[-1].items() if k == "candidates"}
        series = [k for k in traces[-1] if k not in last]
        return state, {k: torch.cat([t[k] for t in traces], 1) for k in series} | last

    @torch.no_grad()
    def advance(self, state: State) -> State:
        c, start = self.config, int(state["step"])
        end = start + c.segment
        train, valid = self.batches(start)
        method, trace = self.segment(start, state["method"], train, valid)
        for name, values in state["trace"].items():
            width = trace[name].shape[1]
            at = start // c.segment * width
            values[:, at : at + width] = trace[name].cpu()
        if end in c.marks:
            for name, value in c.measure(self, method, end).items():
                shape = (c.replicas, len(c.marks), *value.shape[1:])
                held = state["looks"].setdefault(name, torch.full(shape, torch.nan))
                held[:, c.marks.index(end)] = value.cpu()
        if "audit" in state and end % (c.segment * c.audit_every) == 0:
            at = end // (c.segment * c.audit_every) - 1
            for side, name in enumerate(CANDIDATES):
                value = self.looks["full_loss"](trace["candidates"][:, side])
                state["audit"][name][:, at] = value.cpu()
            for name in c.method.traces:
                state["audit"][name][:, at] = trace[name][:, -1].cpu().double()
        return state | {"method": method, "step": torch.tensor(end)}

    def finish(self, state: State) -> dict[str, Tensor]:
        c = self.config
        keep = [seed - c.group[0] for seed in c.seeds]
        arrays = summarize(state["trace"]["loss"][keep])
        if c.method.traces:
            decisions = log_spaced(1, c.steps // c.method.interval, 300)
            arrays["decisions"] = torch.tensor(decisions)
            for name in c.method.traces:
                arrays[name] = state["trace"][name][keep][:, arrays["decisions"] - 1]
            arrays |= shares(state["trace"]["use_l2o"][keep], arrays["decisions"])
        arrays["marks"] = torch.tensor(c.marks)
        arrays |= {name: values[keep] for name, values in state["looks"].items()}
        for name, values in state.get("audit", {}).items():
            arrays[f"audit.{name}"] = values[keep].float()
        share = (
            float(state["trace"]["use_l2o"][keep].mean()) if c.method.traces else 0.0
        )
        cost = c.method.cost(c.optimizee, c.batch, self.task.items, share)
        for name, value in vars(cost).items():
            arrays[name] = torch.tensor([value], dtype=torch.float64)
        return arrays


@dataclass(frozen=True)
class Released(Training):
    """A training that asks, at every mark, what its point is worth as a start.

    ``after``, an optimizer without weights, goes on alone from there: ``ahead`` steps
    from a fresh state, its schedule at the step of the mark, on the batches that come
    next. The record also holds the full losses where it ends: ``released [R, marks]``.
    """

    after: Any = None
    ahead: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead < 1 or self.ahead % self.segment:
            raise ValueError(
                f"ahead must be a positive multiple of the segment, {self.segment}, "
                f"not {self.ahead}"
            )
        if self.after is None or self.after.init_meta(0):
            raise ValueError("after must be an optimizer without weights, such as SGD")

    def measure(self, job: TrainingJob, method: State, end: int) -> Trace:
        alone = Alone(self.after)

        def piece(inner: State, batches: Tensor) -> State:
            metas: Metas = {"optimizer": {}}
            return alone.segment(job.task, metas, inner, batches, None)[0]

        inner = torch.func.vmap(alone.init)(method["params"])
        inner["optimizer"]["step"].fill_(end)
        for first in range(end, end + self.ahead, self.segment):
            batches = train_batches(
                job.task.items, self.batch, self.group, first, self.segment, job.device
            )
            inner = torch.func.vmap(piece)(inner, batches)
        found = job.looks["full_loss"](inner["params"])
        return super().measure(job, method, end) | {"released": found}


def shares(use: Tensor, ends: Tensor) -> Trace:
    """Who decided: over the decisions after the previous of ``ends [P]`` up to it.

    From choices ``use [R, D]`` (1: the proposal): their mean ``use_l2o [R, P]`` and the
    number of changes from the decision before, ``switches [R, P]``.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    changed = torch.diff(use, dim=1, prepend=use[:, :1]) != 0

    def sums(values: Tensor) -> Tensor:
        total = torch.nn.functional.pad(values.double().cumsum(1), (1, 0))
        return total[:, ends] - total[:, starts]

    share = sums(use) / (ends - starts)
    return {"use_l2o": share.float(), "switches": sums(changed).int()}


BURN_IN = 300
"""The step from which on a loss is smoothed (LGL2O, App. E)."""


def summarize(loss: Tensor, points: int = 300) -> Trace:
    """Thin losses ``[R, K]`` to curves at about ``points`` log-spaced steps.

    ``steps [P]`` (1-based), ``loss [R, P]`` at exactly these steps, ``bin_mean [R, P]``
    over the steps after the previous point up to this one (the whole run without gaps,
    so means over windows between points stay exact), and ``smooth [R, P]``, the
    trailing mean of 100 steps from step ``BURN_IN`` on, before it the loss as it is
    (LGL2O, App. E; window ours).
    """
    steps = log_spaced(1, loss.shape[1], points)
    ends = torch.tensor(steps)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    trailing = torch.where(ends >= BURN_IN, ends - 100, ends - 1)

    def means(first: Tensor) -> Tensor:
        spans = zip(first.tolist(), steps, strict=True)
        return torch.stack([loss[:, a:b].double().mean(1) for a, b in spans], 1).float()

    return {
        "steps": ends,
        "loss": loss[:, ends - 1],
        "bin_mean": means(starts),
        "smooth": means(trailing),
    }
