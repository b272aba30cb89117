"""Meta Guard: its Fig. 1 in four panels, with the controls that could explain it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..guards import LGL2O, Switch
from ..learned.lstm import LSTMOptimizer
from ..meta_guard import AMG, SMG, Adapted, Compared
from ..metatrain.truncated import MetaTraining
from ..optimizers import SGD, Restarted, constant
from ..train import Alone
from .lgl2o import CONV3, META_LR, SMALL_MLP
from .runs import Experiment, trainings

LSTM = LSTMOptimizer(learned_start=True)
"""The L2O of the Meta Guard chapter: its memory has a learned beginning."""

SGD_3 = SGD(constant(3.0))
"""The paper's fallback (App. B); its step size is the meta guards' default."""


def meta_guard_methods() -> dict[str, Any]:
    """The methods of Meta Guard's Fig. 1 by their names in the book, then ours.

    LGL2O's two variants differ in the memory that an unroll of ten steps begins with:
    the mean over coordinates of where the last one ended ("with update"), or the
    meta-trained one. Ours are AMG with the plain gradient step among its candidates
    (Theorem R), the guard without adaptation, adaptation without a guard, and the L2O
    for as long as it is said to lead, then SGD.
    """
    return {
        "SGD": Alone(SGD_3),
        "L2O": Alone(LSTM),
        "LGL2O with update": LGL2O(Restarted(LSTM, average=True), SGD_3),
        "LGL2O without update": LGL2O(Restarted(LSTM), SGD_3),
        "SMG": SMG(LSTM),
        "AMG": AMG(LSTM),
        "AMG plain": AMG(LSTM, plain=True),
        "AMG frozen": AMG(LSTM, meta_lr=0.0),
        "Adapted": Adapted(LSTM),
        "L2O, then SGD": Switch(LSTM, SGD_3, 200),
    }


@dataclass(frozen=True)
class Panel:
    """A panel of Fig. 1: what the L2O was meta-trained on, and what it trains."""

    trained_on: str
    data: str
    network: str


NETWORKS: dict[str, dict[str, Any]] = {"conv3": CONV3, "mlp": SMALL_MLP}

PANELS = {
    "a": Panel("conv3", "fashion-mnist", "conv3"),
    "b": Panel("conv3", "fashion-mnist", "mlp"),
    "c": Panel("conv3", "mnist", "conv3"),
    "d": Panel("mlp", "fashion-mnist", "conv3"),
}
"""Unseen in meta-training: in b the network, in c the data, in d both."""

META_TRAINED = {"conv3": "fashion-mnist", "mlp": "mnist"}
"""The two settings of meta-training."""

SIZE: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": "digits28",
        "batch": 32,
        "steps": 20,
        "seeds": 1,
        "segment": 10,
        "audit_every": 1,
        "sample": 200,
    },
    "laptop": {"steps": 5_000, "seeds": 8, "audit_every": 10, "sample": 10_000},
    "paper": {"steps": 10_000, "seeds": 25, "replicas": 25},
}


def weights(network: str, profile: str = "laptop") -> str:
    """The name of the weights that were meta-trained on a network."""
    return f"metaguard-{network}-0" + "-paper" * (profile == "paper")


def _metatrain(profile: str) -> Iterable[tuple[str, Any]]:
    for network, data in META_TRAINED.items():
        smoke = profile == "smoke"
        data = "digits28" if smoke else data
        work = MetaTraining(LSTM, NETWORKS[network][data], data, meta_lr=META_LR)
        if smoke:
            work = replace(work, batch=32, rollouts=2, rollout=20, validate_every=2)
        elif profile == "laptop":
            work = replace(work, patience=200)
        yield weights(network, profile), work


def _panel(
    name: str, only: Iterable[str], profile: str, **changes: Any
) -> Iterable[tuple[str, Any]]:
    """Some of the methods on a panel, "panel, method"."""
    panel = PANELS[name]
    setting = {"data": panel.data, **SIZE[profile], **changes}
    methods = meta_guard_methods()
    return trainings(
        {f"{name}, {label}": methods[label] for label in only},
        weights(panel.trained_on, profile),
        optimizee=NETWORKS[panel.network][setting["data"]],
        **setting,
    )


def _fig1(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    for name in PANELS:
        few = {} if seeds is None else {"seeds": seeds}
        yield from _panel(name, meta_guard_methods(), profile, **few)


COMPARED: dict[str, dict[str, Any]] = {
    "smoke": {"evaluations": 2},
    "laptop": {"steps": 2_000, "evaluations": 30, "sample": 0},
    "paper": {"steps": 5_000, "evaluations": 30},
}


def _compared(profile: str) -> Iterable[tuple[str, Any]]:
    """From where AMG is: what LGL2O and SMG would keep there (claim D9)."""
    methods = meta_guard_methods()
    others = {"LGL2O": methods["LGL2O without update"], "SMG": methods["SMG"]}
    for name in ("a", "b"):
        for run, work in _panel(name, ("AMG",), profile, **COMPARED[profile]):
            yield run, Compared.of(work, others=others)


ENTRIES = [
    Experiment(
        "metaguard.metatrain",
        "Meta-training of the LSTM optimizer with a learned memory",
        "06-meta-guard",
        _metatrain,
    ),
    Experiment(
        "metaguard.fig1",
        "L2O, its guards and SGD where network and data are seen or not",
        "06-meta-guard",
        _fig1,
    ),
    Experiment(
        "metaguard.compared",
        "What LGL2O and SMG would keep from where AMG is",
        "06-meta-guard",
        _compared,
    ),
]
