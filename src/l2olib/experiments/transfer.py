"""STAR on tasks other than that of its meta-training, beside tuned baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..language import LSTMLanguageModel, TransformerLanguageModel
from ..looks import Norms
from ..optimizees import MLP, ResNet, conv_star
from ..train import Alone
from ..tuning import MIDDLE, Chosen, adam_at, adam_ladder, nadamw_draws, tuned
from .runs import BEST, PROFILES, Experiment, trainings
from .star import STAR_FIG3, star_optimizer, star_weights, stopped

PICTURES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}
"""Channels, height, width of data sets with ten classes."""

Build = Callable[[tuple[int, int, int]], Any]


@dataclass(frozen=True)
class GeneralizationTask:
    """One of the tasks of STAR's reference code: a network, its data, a batch.

    ``setting`` gives, for each profile, optimizee, data and batch of a
    :class:`~l2olib.train.Training`. ``steps`` and ``seeds`` are those of the laptop
    (paper: ``LONG`` and at least five), ``sample`` how many items held-out losses take.
    """

    setting: dict[str, dict[str, Any]]
    steps: int = 2_000
    seeds: int = 3
    sample: int = 2_048

    @classmethod
    def of(cls, build: Build, data: str, **size: int) -> GeneralizationTask:
        """A network for pictures of ``data``; digits at smoke."""
        full = {"optimizee": build(PICTURES[data]), "data": data, "batch": 128}
        smoke = {"optimizee": build(PICTURES["digits"]), "data": "digits", "batch": 16}
        return cls({"smoke": smoke, "laptop": full, "paper": full}, **size)


def _mlp(*hidden: int, activation: str = "relu", **options: Any) -> Build:
    """An MLP that starts as STAR's tasks do; ``loss="reconstruction"``: autoencoder."""

    def build(image: tuple[int, int, int]) -> MLP:
        pixels = math.prod(image)
        last = pixels if options.get("loss") == "reconstruction" else 10
        sizes = (pixels, *hidden, last)
        return MLP(sizes, activation, start="truncated normal", **options)

    return build


def _by_profile(
    *works: tuple[Any, str, int],
) -> dict[str, dict[str, Any]]:
    keys = ("optimizee", "data", "batch")
    return {
        profile: dict(zip(keys, work, strict=True))
        for profile, work in zip(PROFILES, works, strict=True)
    }


LONG = 10_000
"""Steps of the MLP tasks: five times the horizon of the meta-training."""

_IMAGE = (3, 32, 32)
_SMOKE_TEXT = "descriptions-256x16"

FIG4 = {
    "MLP layer norm": GeneralizationTask.of(
        _mlp(128, 128, 128, norm="layer"), "cifar10", steps=LONG, seeds=10
    ),
    "ResNet": GeneralizationTask(
        _by_profile(
            (ResNet((1, 8, 8), 3, (8, 16), 10), "digits", 16),
            (ResNet(_IMAGE, 5, (128, 256, 512, 512), 50), "tiny-imagenet-50-32", 128),
            (ResNet(_IMAGE, 5, (128, 256, 512, 512), 50), "tiny-imagenet-50-32", 128),
        ),
        seeds=2,
    ),
    "LSTM": GeneralizationTask(
        _by_profile(
            (LSTMLanguageModel(256, 16, 8, 8), _SMOKE_TEXT, 4),
            (LSTMLanguageModel(4_096, 32), "wikitext-2-4096x32", 16),
            (LSTMLanguageModel(32_100, 32), "wikitext-2-32100x32", 128),
        ),
        seeds=2,
        sample=512,
    ),
    "Transformer": GeneralizationTask(
        _by_profile(
            (TransformerLanguageModel(256, 16, 1, 8, 2), _SMOKE_TEXT, 4),
            (TransformerLanguageModel(4_096, 64), "wikitext-2-4096x64", 8),
            (TransformerLanguageModel(32_100, 128), "wikitext-2-32100x128", 32),
        ),
        seeds=1,
        sample=256,
    ),
}
"""The tasks that the text of STAR describes for Fig. 4: (a) the layer-norm MLP; (b) a
ResNet on ImageNet at 32x32, here Tiny-ImageNet-50; (c) an LSTM and (d) a transformer
language model on LM1B, here WikiText-2. At the paper's scale the language models have
its sizes, 12.75 and 20.42 million parameters; at the laptop's 1.97 and 6.05 million and
batches of 512 words. ``--compile`` pays for the learned optimizers on (a) and on (c),
whose step takes two minutes to compile and half the time then; that of STAR on all 85
tensors of the transformer takes more than ten."""

APPFIG5 = {
    "MLP ReLU": GeneralizationTask.of(_mlp(128, 128, 128), "cifar10", steps=LONG),
    "MLP tanh": GeneralizationTask.of(
        _mlp(128, 128, 128, activation="tanh"), "cifar10", steps=LONG
    ),
    "MLP batch norm": GeneralizationTask.of(
        _mlp(128, 128, 128, norm="batch"), "cifar10", steps=LONG
    ),
    "MLP wide": GeneralizationTask.of(_mlp(256, 256), "cifar10", steps=LONG),
    "MLP MNIST": GeneralizationTask.of(_mlp(128, 128, 128), "mnist", steps=LONG),
}
"""Other MLP classifiers of the reference code."""

_CODE = {"loss": "reconstruction"}

APPFIG6 = {
    "MLP squared error": GeneralizationTask.of(
        _mlp(128, 128, 128, loss="squared error"), "cifar10", steps=LONG
    ),
    "Autoencoder MNIST": GeneralizationTask.of(
        _mlp(128, 32, 128, **_CODE), "mnist", steps=LONG
    ),
    "Autoencoder Fashion-MNIST": GeneralizationTask.of(
        _mlp(128, 32, 128, **_CODE), "fashion-mnist", steps=LONG
    ),
    "Autoencoder CIFAR-10": GeneralizationTask.of(
        _mlp(32, 32, 32, **_CODE), "cifar10", steps=LONG
    ),
    "ConvNet": GeneralizationTask.of(lambda image: conv_star(image, 10), "cifar10"),
}
"""Other losses and another kind of network."""

GENERALIZATION = {"star.fig4": FIG4, "star.appfig5": APPFIG5, "star.appfig6": APPFIG6}
"""All tasks by experiment."""

TUNING: dict[str, dict[str, Any]] = {
    "smoke": {"draws": 2, "share": 1.0, "finalists": 1},
    "laptop": {"draws": 20, "share": 0.2, "finalists": 4},
    "paper": {"draws": 100, "seeds": 5},
}
"""Tuning of the baselines: settings of NAdamW that are tried, seeds, and the length of
its trials as a share of the run. A laptop cannot afford the whole for all: the best
four are tried again over the whole run, their schedules stretched. Adam's trials are as
long as the run; its rates are bracketed from three in the middle of the ladder. At the
paper's scale all 15 are tried."""


def _sized(
    task: GeneralizationTask, profile: str, seeds: int | None = None
) -> dict[str, Any]:
    """Arguments of :func:`trainings` that all methods on a task share.

    All seeds are one group: a step is compiled once for all of them.
    """
    size = {
        "smoke": {"steps": 5, "segment": 5, "seeds": 1, "sample": 32},
        "laptop": {"steps": task.steps, "seeds": task.seeds, "sample": task.sample},
        "paper": {"steps": LONG, "seeds": max(5, task.seeds), "sample": task.sample},
    }[profile]
    size["replicas"] = size["seeds"]
    size |= {"seeds": seeds} if seeds else {}
    return size | {"evaluations": 10} | task.setting[profile]


def _baselines(name: str, task: GeneralizationTask, profile: str) -> dict[str, Chosen]:
    """Adam and NAdamW as ``star.tune`` chooses them for a task."""
    plan = TUNING[profile]
    setting = _sized(task, profile, plan.get("seeds", 1))
    setting |= {"evaluations": 1, "sample": setting["batch"]}  # only training decides
    setting.pop("replicas", None)
    bracket = () if profile == "paper" else MIDDLE
    short = setting | {"steps": round(setting["steps"] * plan.get("share", 1.0))}
    if finalists := plan.get("finalists", 0):
        short |= {"finalists": finalists, "final": setting["steps"]}
    draws = nadamw_draws(plan["draws"], short["steps"])
    return {
        "Adam": tuned(
            "star.tune", f"{name}, Adam/0", adam_ladder(), bracket, **setting
        ),
        "NAdamW": tuned("star.tune", f"{name}, NAdamW/0", draws, **short),
    }


def _star_tune(profile: str) -> Iterable[tuple[str, Any]]:
    for name, task in (FIG4 | APPFIG5 | APPFIG6).items():
        for chosen in _baselines(name, task, profile).values():
            yield chosen.name, chosen.tuning


def _generalization(tasks: dict[str, GeneralizationTask]) -> Callable[..., Any]:
    """Learned optimizers (near their best validation) and tuned baselines.

    A run's label is "task, method". Smoke runs, of which nothing is recorded, take the
    first candidate of a tuning.
    """

    def build(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
        for name, task in tasks.items():
            setting = _sized(task, profile, seeds)
            layout = setting["optimizee"].layout
            for variant in STAR_FIG3:
                yield from trainings(
                    {f"{name}, {variant}": Alone(star_optimizer(variant, layout))},
                    star_weights("mlp", variant, 0, profile) + BEST,
                    **setting,
                )
            baselines = {
                f"{name}, {label}": c.tuning.method if profile == "smoke" else c
                for label, c in _baselines(name, task, profile).items()
            }
            yield from trainings(baselines, "", **setting)

    return build


NETWORKS = {
    name: GeneralizationTask.of(
        _mlp(128, 128, 128, **options), "mnist", steps=LONG, seeds=5
    )
    for name, options in {
        "ReLU": {},
        "tanh": {"activation": "tanh"},
        "batch norm": {"norm": "batch"},
        "layer norm": {"norm": "layer"},
    }.items()
}
"""*MLP MNIST*, and with what Blackbox did not diverge on CIFAR-10 (ours)."""


def _star_networks(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    """Blackbox on one data set, the network changed; how large do its weights grow?"""
    for name, task in NETWORKS.items():
        setting = _sized(task, profile, seeds)
        layout = setting["optimizee"].layout
        box = Alone(star_optimizer("Blackbox", layout))
        by = {"Blackbox": {"Adam 0.001": adam_at(1e-3), "Blackbox": box}}
        if name == "ReLU":
            by["Blackbox"]["Blackbox stopped"] = stopped(box, profile)
            by["STAR 0.5"] = {"STAR 0.5": Alone(star_optimizer("STAR 0.5", layout))}
        for variant, methods in by.items():
            named = {f"{name}, {label}": method for label, method in methods.items()}
            weights = star_weights("mlp", variant, 0, profile) + BEST
            for label, work in trainings(named, weights, **setting):
                yield label, Norms.of(work)


ENTRIES = [
    Experiment(
        "star.tune",
        "Adam and NAdamW on each generalization task: trials, on other seeds",
        "10c-other-tasks",
        _star_tune,
    ),
    *(
        Experiment(
            name, title, "10c-other-tasks", _generalization(GENERALIZATION[name])
        )
        for name, title in {
            "star.fig4": "STAR's four generalization tasks: learned optimizers, tuned "
            "baselines",
            "star.appfig5": "The same optimizers on other MLP classifiers",
            "star.appfig6": "The same optimizers on other losses and on a ConvNet",
        }.items()
    ),
    Experiment(
        "star.networks",
        "MNIST: which networks Blackbox diverges on, and the size of the weights",
        "10c-other-tasks",
        _star_networks,
    ),
]
