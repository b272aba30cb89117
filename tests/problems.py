"""Tiny optimizees and optimizers that several test modules share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l2olib import data, experiments, records
from l2olib.data import DataSet, Split
from l2olib.guards import LGL2O
from l2olib.learned.lstm import LSTMOptimizer
from l2olib.metatrain.truncated import MetaTraining
from l2olib.optimizees import MLP, Quadratic, Task
from l2olib.optimizers import SGD, constant
from l2olib.train import Alone, drive

SRC = str(Path(__file__).parents[1] / "src")


class Clock:
    """In place of a module's ``time``: each clock goes on a second when it is read."""

    def __init__(self, start: float = 0.0) -> None:
        self.now, self.worked = start, 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    def process_time(self) -> float:
        self.worked += 1.0
        return self.worked


def random_numbers(seed: int, *shape: int) -> Tensor:
    """Draw standard normal float64 numbers."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64)


def data_set(x: Tensor, y: Tensor, classes: int = 2) -> DataSet:
    """Make a data set whose test split is its training split."""
    return DataSet("test", Split(x, y), Split(x, y), classes, "0")


def quadratic(eigenvalues: list[float], start: list[float], items: int = 8) -> Task:
    """Make f(w) = sum_i eigenvalue_i w_i^2 / 2, the same on every batch."""
    n = len(start)
    hessian = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)).tolist()
    task = Quadratic(tuple(map(tuple, hessian)), tuple(start))
    zeros = torch.zeros(items, n, dtype=torch.float64)
    return Task(task, data_set(zeros, torch.zeros(items, dtype=torch.int64)))


def blobs(items: int = 48, seed: int = 0, hidden: int = 4) -> Task:
    """Make a 2-`hidden`-2 network on two overlapping blobs, in float64."""
    y = torch.arange(items) % 2
    x = random_numbers(seed, items, 2) + 1.5 * y[:, None]
    return Task(MLP((2, hidden, 2)), data_set(x, y))


def start_of(task: Task, seed: int = 0) -> Tensor:
    """Draw the float64 initial parameters of a task's optimizee."""
    return task.optimizee.init(seed).double()


def batches(task: Task, count: int, batch: int, seed: int = 0) -> Tensor:
    """Draw item numbers [count, batch], with replacement."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(task.items, (count, batch), generator=gen)


def arrays_of(work: Any, metas: Any = None, **options: Any) -> dict[str, Tensor]:
    """Run a work to its end; what it records."""
    return drive(work.job("cpu", False, metas or {}), **options)[0]


def expect_resumable(work: Any, path: Path, metas: Any = None) -> dict[str, Tensor]:
    """Every piece in a fresh job that knows nothing but the checkpoint: the same bits.

    Returns what the run in one go records.
    """
    whole, job = arrays_of(work, metas), work.job("cpu", False, metas or {})
    state, done, total = job.start(), 0, 1
    while done < total:
        records.write(path, records.flatten(state), {})
        job = work.job("cpu", False, metas or {})
        state = job.advance(records.unflatten(records.read(path)[0]))
        done, total = job.position(state)
    parts = job.finish(state)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert value.numpy().tobytes() == parts[name].numpy().tobytes(), name
    return whole


def complaints_of(page: Any) -> list[str]:
    """What a browser's page is going to complain of, requests to the net included."""
    complaints: list[str] = []
    own = ("file:", "data:", "blob:")

    def requested(request: Any) -> None:
        if not request.url.startswith(own):
            complaints.append(f"request to {request.url}")

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"console: {message.text}")

    page.on("request", requested)
    page.on("requestfailed", lambda r: complaints.append(f"failed: {r.url}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("console", said)
    return complaints


# ---- optimizers without meta-parameters, as pathological as they come ----------------


@dataclass(frozen=True)
class Step:
    """Add `value` to every coordinate; the state counts the steps."""

    value: float

    def init_meta(self, seed: int) -> dict[str, Tensor]:
        return {}

    def init(self, params: Tensor) -> dict[str, Any]:
        return {"count": torch.zeros((), dtype=torch.int64, device=params.device)}

    def update(self, meta, grad, state, params, *, loss=None):
        new = {"count": state["count"] + 1}
        return torch.full_like(grad, self.value), new

    def flops(self, n: int) -> int:
        return 0


@dataclass(frozen=True)
class Noise(Step):
    """Add pseudo-random numbers of scale `value`, other ones at every step."""

    def update(self, meta, grad, state, params, *, loss=None):
        k = torch.arange(len(params), dtype=params.dtype, device=params.device)
        x = (12.9898 * k + 78.233 * (state["count"] + 1)).sin() * 43758.5453
        return self.value * (2 * (x - x.floor()) - 1), {"count": state["count"] + 1}


@dataclass(frozen=True)
class Ascent(Step):
    """Go up the gradient."""

    def update(self, meta, grad, state, params, *, loss=None):
        return self.value * grad, {"count": state["count"] + 1}


@dataclass(frozen=True)
class Leap(Step):
    """Replace the parameters by `target` in one step, whatever the gradient."""

    target: tuple[float, ...] = ()

    def update(self, meta, grad, state, params, *, loss=None):
        target = torch.tensor(self.target, dtype=params.dtype)
        return target - params, {"count": state["count"] + 1}


@dataclass(frozen=True)
class Stateless(Step):
    """Gradient descent that remembers nothing: its state is empty."""

    def init(self, params: Tensor) -> dict[str, Any]:
        return {}

    def update(self, meta, grad, state, params, *, loss=None):
        return -self.value * grad, {}


@dataclass(frozen=True)
class BrokenMemory(Step):
    """Do nothing, with a hidden state that turns to NaN after two steps."""

    def init(self, params: Tensor) -> dict[str, Any]:
        return {"hidden": {"count": torch.zeros_like(params)}}

    def update(self, meta, grad, state, params, *, loss=None):
        count = state["hidden"]["count"] + 1
        hidden = torch.where(count > 2, torch.nan, count)
        return torch.zeros_like(params), {"hidden": {"count": hidden}}


PATHOLOGICAL = {
    "nan": Step(math.nan),
    "inf": Step(math.inf),
    "huge": Step(1e200),
    "random": Noise(3.0),
    "ascent": Ascent(0.5),
    "zero": Step(0.0),
    "broken memory": BrokenMemory(0.0),
}


# ---- fixtures: a test module that uses one imports its make_... ----------------------


@pytest.fixture(name="toy_data")
def make_toy_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Register a small data set of two blobs (64 items) and return its name."""
    y = torch.arange(64) % 2
    x = (random_numbers(5, 64, 2) + 1.5 * y[:, None]).float()
    monkeypatch.setitem(data._MADE, "toy", lambda: (Split(x, y), Split(x, y), 2))
    yield "toy"
    data._loaded.pop(("toy", "cpu", ""), None)


@pytest.fixture(name="toy_table")
def make_toy_table(
    toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Two small experiments in an empty repository, whose root is returned.

    ``toy.train`` meta-trains an LSTM, ``toy.fig`` compares it with its guard and SGD.
    """
    lstm, mlp = LSTMOptimizer(hidden=3), MLP((2, 4, 2))
    sgd = SGD(constant(0.5))

    def meta(profile: str, seeds: int = 1) -> Any:
        yield "toy-lstm", MetaTraining(lstm, mlp, toy_data, 8, 4, 6, 3)

    def figure(profile: str, seeds: int = 6, steps: int = 20) -> Any:
        methods = {
            "L2O": Alone(lstm),
            "LGL2O": LGL2O(lstm, sgd, 5, 2),
            "SGD": Alone(sgd),
        }
        setting = {"replicas": 3, "batch": 8, "segment": 10, "audit_every": 1}
        return experiments.trainings(
            methods,
            "toy-lstm",
            seeds,
            optimizee=mlp,
            data=toy_data,
            steps=steps,
            **setting,
        )

    for name, build in (("toy.train", meta), ("toy.fig", figure)):
        entry = experiments.Experiment(name, "A toy", "02-loss-guard", build)
        monkeypatch.setitem(experiments.EXPERIMENTS, name, entry)
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))
    yield tmp_path
