"""LGL2O: its figures, searches and ablations, and our guards in the same places."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..guards import (
    GL2O,
    LGL2O,
    ArithmeticAverage,
    Coin,
    Geometric,
    Lazy,
    Margin,
    Memory,
    MovingAverage,
    RecentMax,
    Sequential,
    Shadow,
    Switch,
)
from ..learned.lstm import LSTMOptimizer
from ..metatrain.truncated import LearningCurve, MetaTraining
from ..optimizees import ACTIVATIONS, MLP, conv3, conv5
from ..optimizers import SGD, Adam, PowerDecay, constant
from ..train import Alone, Released
from ..tuning import FIRST_SEED, Chosen, tuned
from .runs import Experiment, ExperimentError, learned_roles, trainings

LSTM = LSTMOptimizer()
"""The L2O of the LGL2O chapters; p and output scale are open in the paper."""

TAU = 50_000.0

SMALL_MLP = {
    "mnist": MLP((784, 20, 10)),
    "fashion-mnist": MLP((784, 20, 10)),
    "digits28": MLP((784, 20, 10)),
    "digits": MLP((64, 20, 10)),
    "cifar10": MLP((3072, 20, 10)),
    "moons": MLP((2, 20, 2)),
    "circles": MLP((2, 20, 2)),
    "spirals": MLP((2, 20, 2)),
}
"""The MLP with 20 sigmoid units of LGL2O, fitted to each data set."""


def lgl2o_methods(
    lr: float = 3.0, adam: float = 1e-3, tau: float = TAU, full_loss: bool = False
) -> dict[str, Any]:
    """The methods of LGL2O Figs. 3 to 8 by their names in the book.

    ``tau`` is the baselines' (and GL2O's); LGL2O's own is 50,000 (App. D). The last
    ones are ours: the memory reset after a rejection (open detail 1), guards that know
    the noise of their criterion, and controls that could explain a guard's success;
    ``full_loss``, where the data are few, adds the criterion without noise.
    """
    sgd, fallback = SGD(PowerDecay(lr, tau)), SGD(PowerDecay(lr, TAU))
    by_adam = Adam(constant(adam))
    methods: dict[str, Any] = {
        "L2O": Alone(LSTM),
        "GL2O": GL2O(LSTM, sgd),
        "LGL2O": LGL2O(LSTM, fallback),
        "SGD": Alone(sgd),
        "SGD+momentum": Alone(SGD(PowerDecay(lr, tau), momentum=0.9)),
        "Adam": Alone(by_adam),
        "LGL2O reset": LGL2O(LSTM, fallback, proposal_state="reset"),
        "LGL2O margin": LGL2O(LSTM, fallback, test=Margin(3.0)),
        "LGL2O reset, margin": LGL2O(
            LSTM, fallback, proposal_state="reset", test=Margin(3.0)
        ),
        "LGL2O reset, sequential": LGL2O(
            LSTM, fallback, n_c=20, proposal_state="reset", test=Sequential(3.0)
        ),
        "LGL2O reset, lazy": Lazy(
            LSTM, fallback, proposal_state="reset", test=Margin(3.0)
        ),
        "LGL2O shadow": Shadow(
            LSTM, fallback, proposal_state="reset", test=Margin(3.0)
        ),
        "LGL2O shadow 1%": Shadow(LSTM, fallback, slack=0.01),
        "L2O, then SGD": Switch(LSTM, fallback, 100),
        "LGL2O of Adam": LGL2O(by_adam, fallback),
    }
    if full_loss:
        methods["LGL2O full loss"] = LGL2O(LSTM, fallback, validation="full")
    return methods


META_LR = 1e-3
"""Adam's rate in meta-training. The paper does not state it. 1e-2 is ahead over the
first 100 rollouts and then stops improving (``lgl2o.pilot``)."""

L2O = "lgl2o-lstm-0"
"""The meta-trained weights of all LGL2O figures."""


METATRAIN: dict[str, list[tuple[int, int | None]]] = {
    "laptop": [(2_000, 200), (500, 200), (500, 200)],
    "paper": [(2_000, None)] * 5,
}
"""Rollouts at most, and rollouts without a better validation before it ends."""


def _metatrain(profile: str) -> Iterable[tuple[str, Any]]:
    base = MetaTraining(LSTM, SMALL_MLP["mnist"], "mnist", meta_lr=META_LR)
    if profile == "smoke":
        plan = [
            replace(
                base,
                optimizee=SMALL_MLP["digits"],
                data="digits",
                batch=32,
                rollouts=8,
                validate_every=4,
            )
        ]
    else:
        # The first at laptop is the L2O of all figures; Fig. 2 shows several.
        plan = [
            replace(base, rollouts=rollouts, patience=patience, seed=k)
            for k, (rollouts, patience) in enumerate(METATRAIN[profile])
        ]
    suffix = "-paper" if profile == "paper" else ""
    for work in plan:
        yield f"lgl2o-lstm-{work.seed}{suffix}", work


def _pilot(profile: str) -> Iterable[tuple[str, Any]]:
    (_, base), *_ = _metatrain(profile)
    work = base if profile == "smoke" else replace(base, rollouts=259, patience=None)
    yield "lgl2o-lstm-0-rate-0.01", replace(work, meta_lr=1e-2)


def _fig2(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    smoke = profile == "smoke"
    zetas = [L2O] if smoke else [name for name, _ in _metatrain(profile)]
    for zeta in zetas:
        for name in ("digits", "moons") if smoke else FIG2_DATA:
            yield (
                f"{zeta}/{name}/0",
                LearningCurve(
                    LSTM,
                    SMALL_MLP[name],
                    name,
                    {"optimizer": zeta},
                    tuple(range(seeds or (1 if smoke else 5))),
                    batch=32 if smoke else 128,
                    steps=10 if smoke else 100,
                    stride=4 if smoke else 2,
                ),
            )


FIG2_DATA = ("mnist", "fashion-mnist", "moons", "circles", "spirals", "cifar10")


@dataclass(frozen=True)
class Figure:
    """One of LGL2O's Figs. 3 to 8: the problem, a run's size, options of the methods.

    ``size`` gives, for each profile, what of :class:`~l2olib.train.Training` differs:
    steps, seeds, replicas, and at ``smoke`` a small data set. ``tuned`` names the
    figure in the searches of :func:`_tuned`; one without has none.
    """

    data: str
    optimizees: dict[str, Any]
    size: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    tuned: str = ""

    def setting(
        self, profile: str, seeds: int | None = None, data: str | None = None
    ) -> dict[str, Any]:
        """What all methods share, as arguments of :func:`trainings`."""
        setting = {"data": self.data, **self.size[profile]}
        setting |= {
            k: v for k, v in {"seeds": seeds, "data": data}.items() if v is not None
        }
        if setting["data"] not in self.optimizees:
            raise ExperimentError(
                f"this figure has no network for {setting['data']!r}: choose from "
                + ", ".join(self.optimizees)
            )
        return setting | {"optimizee": self.optimizees[setting["data"]]}

    def __call__(
        self, profile: str, seeds: int | None = None, data: str | None = None
    ) -> Iterable[tuple[str, Any]]:
        methods = lgl2o_methods(**self.options)
        if self.tuned and data is None:
            methods |= {
                f"{label} tuned": c.tuning.method if profile == "smoke" else c
                for label, c in _tuned(self, profile).items()
            }
        return trainings(methods, L2O, **self.setting(profile, seeds, data))


CONV3 = {
    "mnist": conv3((1, 28, 28), 10),
    "fashion-mnist": conv3((1, 28, 28), 10),
    "digits28": conv3((1, 28, 28), 10),
    "cifar10": conv3((3, 32, 32), 10),
}
CONV5 = {
    "tiny-imagenet-50": conv5((3, 64, 64), 50),
    "digits64": conv5((1, 64, 64), 10),
}

_SMALL = {"batch": 32, "steps": 50, "seeds": 5, "replicas": 5, "audit_every": 1}
_FEW = _SMALL | {"seeds": 1, "replicas": 1, "segment": 10, "sample": 200}
_PAPER = {"steps": 100_000, "seeds": 25, "replicas": 25}
_TEN = {"steps": 100_000, "seeds": 10, "replicas": 10}

FIGURES: dict[str, Figure] = {
    "lgl2o.fig3": Figure(
        "mnist",
        SMALL_MLP,
        {
            "smoke": {"data": "digits", **_SMALL},
            "laptop": {"steps": 10_000, "seeds": 8},
            "paper": _PAPER,
        },
        tuned="Fig. 3",
    ),
    "lgl2o.fig4": Figure(
        "circles",
        SMALL_MLP,
        {"smoke": _SMALL, "laptop": _TEN, "paper": _PAPER},
        {"adam": 1e-2, "full_loss": True},
        "Fig. 4",
    ),
    "lgl2o.fig5": Figure(
        "spirals",
        SMALL_MLP,
        {"smoke": _SMALL, "laptop": _TEN, "paper": _PAPER},
        {"adam": 1e-2, "full_loss": True},
        "Fig. 5",
    ),
    "lgl2o.fig6": Figure(
        "mnist",
        CONV3,
        {
            "smoke": _FEW | {"data": "digits28", "steps": 20},
            "laptop": {"steps": 10_000, "seeds": 5, "audit_every": 10},
            "paper": _PAPER,
        },
        {"lr": 1.0, "tau": 20_000.0, "adam": 1e-2},
        "Fig. 6",
    ),
    "lgl2o.fig7": Figure(
        "cifar10",
        CONV3,
        {
            "smoke": _FEW | {"data": "digits28", "steps": 20},
            "laptop": {"steps": 10_000, "seeds": 5, "audit_every": 10},
            "paper": _PAPER,
        },
        {"lr": 1.0, "tau": 20_000.0, "adam": 1e-3},
        "Fig. 7",
    ),
    "lgl2o.fig8": Figure(
        "tiny-imagenet-50",
        CONV5,
        {
            "smoke": _FEW | {"data": "digits64", "steps": 10},
            "laptop": {"steps": 2_000, "seeds": 5, "audit_every": 10},
            "paper": _PAPER,
        },
        {"lr": 0.01, "adam": 1e-3},
    ),
}
"""Options are those of :func:`lgl2o_methods`; rates: appendix a2-settings."""


LADDERS: dict[str, tuple[float, ...]] = {
    "SGD": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    "SGD+momentum": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "Adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
    "L2O, then SGD": (10, 30, 100, 300, 1_000, 3_000),
}
"""Step sizes, and steps before the switch, of which a search takes the best. It starts
from the third to the fifth and goes on while the best lies at an end."""


def _tuned(figure: Figure, profile: str) -> dict[str, Chosen]:
    """A figure's baselines, tuned over its whole horizon on seeds of their own.

    All else, such as the decay of SGD's step size, is as in the figure.
    """
    setting = figure.setting(profile)
    setting |= {
        "seeds": setting.pop("replicas", 2),
        "evaluations": 1,
        "sample": setting.get("batch", 128),  # only the training loss decides
    }

    def candidate(label: str, value: float) -> Any:
        if label == "L2O, then SGD":
            return replace(lgl2o_methods(**figure.options)[label], at=int(value))
        option = {"adam" if label == "Adam" else "lr": value}
        return lgl2o_methods(**figure.options | option)[label]

    found = {}
    for label, ladder in LADDERS.items():
        candidates = [candidate(label, value) for value in ladder]
        weights = dict.fromkeys(learned_roles(candidates[0]), L2O)
        name = f"{figure.tuned}, {label}/0"
        found[label] = tuned(
            "lgl2o.tune", name, candidates, (2, 3, 4), weights=weights, **setting
        )
    return found


def _tune(profile: str) -> Iterable[tuple[str, Any]]:
    figures = [f for f in FIGURES.values() if f.tuned]
    for figure in figures[1:2] if profile == "smoke" else figures:
        for chosen in _tuned(figure, profile).values():
            yield chosen.name, chosen.tuning


def _over(
    figure: str, fallbacks: tuple[str, ...], alone: tuple[str, ...] = ()
) -> Callable[..., Iterable[tuple[str, Any]]]:
    """LGL2O over each of a figure's hand-crafted optimizers; some of these alone."""

    def build(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
        methods = lgl2o_methods(**FIGURES[figure].options)
        guards: dict[str, Any] = {
            f"LGL2O over {k}": LGL2O(LSTM, methods[k].optimizer) for k in fallbacks
        }
        guards |= {k: methods[k] for k in alone}
        return trainings(guards, L2O, **FIGURES[figure].setting(profile, seeds))

    return build


FIG10 = [(lr, tau) for lr in (0.01, 0.1, 1.0) for tau in (2_000.0, 10_000.0, TAU)]
"""Rates and decays of SGD on Conv5. The paper gives its choice, not its grid."""


def _fig10(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    grid = {
        f"SGD lr={lr:g}, tau={tau:g}": Alone(SGD(PowerDecay(lr, tau)))
        for lr, tau in (FIG10[-2:] if profile == "smoke" else FIG10)
    }
    setting = FIGURES["lgl2o.fig8"].setting(profile, seeds)
    return trainings(grid, L2O, **setting | {"evaluations": 2})


TAUS = (2_000.0, 5_000.0, 10_000.0, 20_000.0, 50_000.0)
RATES = (1e-4, 1e-3, 1e-2, 1e-1)


def _grids(profile: str) -> Iterable[tuple[str, Any]]:
    """The baselines' searches of 300 steps (App. D): tau of SGD, the rate of Adam."""
    smoke = profile == "smoke"
    for name in ["lgl2o.fig4"] if smoke else list(FIGURES)[:5]:
        figure = FIGURES[name]
        methods = {
            f"{name} tau={tau:g}": lgl2o_methods(**figure.options | {"tau": tau})["SGD"]
            for tau in TAUS
        } | {
            f"{name} adam={rate:g}": lgl2o_methods(adam=rate)["Adam"] for rate in RATES
        }
        setting = figure.setting(profile, 5) | {"replicas": 5}
        setting["steps"] = 50 if smoke else 300
        yield from trainings(methods, L2O, first=FIRST_SEED, **setting)


def _conv3(profile: str) -> Iterable[tuple[str, Any]]:
    """Does SGD train Conv3 at all? The paper leaves its activation open."""
    figure = FIGURES["lgl2o.fig6"]
    setting = figure.setting(profile, 1 if profile == "smoke" else 3)
    setting["steps"] = 50 if profile == "smoke" else 2_000
    for activation, lr in itertools.product(ACTIVATIONS, (3.0, 1.0, 0.3)):
        optimizee = replace(setting["optimizee"], activation=activation)
        sgd = lgl2o_methods(**figure.options | {"lr": lr})["SGD"]
        yield from trainings(
            {f"{activation}, lr={lr:g}": sgd},
            L2O,
            first=FIRST_SEED,
            **setting | {"optimizee": optimizee},
        )


MOMENTUM = (0.03, 0.1, 0.3, 1.0)


def _momentum(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    """Fig. 7's SGD with momentum at other rates, over the whole horizon."""
    figure = FIGURES["lgl2o.fig7"]
    methods = {"SGD": lgl2o_methods(**figure.options)["SGD"]} | {
        f"SGD+momentum {lr:g}": lgl2o_methods(**figure.options | {"lr": lr})[
            "SGD+momentum"
        ]
        for lr in (MOMENTUM[:1] if profile == "smoke" else MOMENTUM)
    }
    return trainings(methods, L2O, **figure.setting(profile, seeds))


def _million(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    figure = FIGURES["lgl2o.fig4"]
    setting = figure.setting(profile, seeds)
    if profile != "smoke":
        setting |= {"steps": 1_000_000, "audit_every": 100}
    methods = lgl2o_methods(**figure.options)
    chosen = {k: methods[k] for k in ("LGL2O", "SGD", "LGL2O reset, sequential")}
    return trainings(chosen, L2O, **setting)


RULES: dict[str, Any] = {
    "geometric": Geometric(0.1),
    "average, weight 0.9": MovingAverage(0.9),
    "average, weight 0.1": MovingAverage(0.1),
    "recent term": MovingAverage(1.0),
    "arithmetic": ArithmeticAverage(),
    "recent maximum": RecentMax(30),
}
"""GL2O's rules for its bar (chapter 04-gradient-guard)."""

CONVEX_RATE = 1.0
"""Step size on the convex problem; its gradient's Lipschitz constant is below 1."""


def _convex(profile: str) -> Iterable[tuple[str, Any]]:
    """Softmax regression with the whole of Moons as its batch: convex, without noise.

    There the bound of each decision and GL2O's theorem apply.
    """
    setting: dict[str, Any] = {
        "optimizee": MLP((2, 2)),
        "data": "moons",
        "batch": 5_000,
        "steps": 20 if profile == "smoke" else 2_000,
        "segment": 10,
        "audit_every": 1,
        "seeds": 10,
        "replicas": 10,
    }
    gd = SGD(constant(CONVEX_RATE))
    methods: dict[str, Any] = {
        "L2O": Alone(LSTM),
        "GD": Alone(gd),
        "LGL2O exact": LGL2O(LSTM, gd, n_t=1, validation="full"),
    }
    methods |= {f"GL2O {name}": GL2O(LSTM, gd, rule) for name, rule in RULES.items()}
    return trainings(methods, L2O, **setting)


ZETAS = {
    "smoke": (L2O,),
    "laptop": ("lgl2o-lstm-1", "lgl2o-lstm-2"),
    "paper": tuple(f"lgl2o-lstm-{k}-paper" for k in range(1, 5)),
}
"""The meta-trained optimizers that are not the one of the figures."""


def _failures(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    """Fig. 4 with the other meta-trained weights: does what it shows depend on them?"""
    figure = FIGURES["lgl2o.fig4"]
    setting, methods = figure.setting(profile, seeds), lgl2o_methods(**figure.options)
    if profile != "smoke":
        setting |= {"audit_every": 40}  # audits are most of a record's bytes
    yield from trainings({"SGD": methods["SGD"]}, L2O, **setting)
    for zeta in ZETAS[profile]:
        chosen = {
            f"{name}, {zeta}": methods[name]
            for name in (
                "L2O",
                "LGL2O",
                "LGL2O reset",
                "LGL2O margin",
                "LGL2O reset, sequential",
                "LGL2O reset, lazy",
                "LGL2O shadow",
                "LGL2O full loss",
                "L2O, then SGD",
            )
        }
        yield from trainings(chosen, zeta, **setting)


ABLATIONS: dict[str, dict[str, Any]] = {
    "smoke": {"steps": 100},
    "laptop": {"steps": 10_000},
    "paper": {},
}
ABLATIONS_CONV3: dict[str, dict[str, Any]] = {
    "smoke": {"steps": 100},
    "laptop": {"steps": 2_000, "audit_every": 4},
    "paper": {},
}


def _ablations(
    name: str,
    size: dict[str, dict[str, Any]],
    without: tuple[str, ...] = (),
    smoke: tuple[str, ...] = (),
) -> Callable[..., Iterable[tuple[str, Any]]]:
    """One factor at a time from a figure's LGL2O. ``smoke``: all that is left there.

    With n_t or n_c of 100 batches are ``iid``: Circles has too few items for disjoint
    ones (Conv3's MNIST would have enough). "iid" is the control for that, on Circles
    only."""
    figure = FIGURES[name]
    default = lgl2o_methods(**figure.options)["LGL2O"]
    rate = default.fallback.lr.lr0
    changes: dict[str, dict[str, Any]] = {
        "LGL2O": {},
        "n_t=1": {"n_t": 1},
        "n_t=100": {"n_t": 100, "validation": "iid"},
        "n_c=1": {"n_c": 1},
        "n_c=100": {"n_c": 100, "validation": "iid"},
        "iid": {"validation": "iid"},
        "fixed": {"validation": "fixed"},
        "full loss": {"validation": "full"},
        "coin": {"test": Coin()},
        "revert": {"proposal_state": "revert"},
        "reset": {"proposal_state": "reset"},
        "power 1": {"fallback": SGD(PowerDecay(rate, TAU, 1.0))},
        "power 0.5": {"fallback": SGD(PowerDecay(rate, TAU, 0.5))},
        # The other of the paper's two rates.
        f"rate {4 - rate:g}": {"fallback": SGD(PowerDecay(4 - rate, TAU))},
    }
    methods: dict[str, Any] = {
        k: replace(default, **c) for k, c in changes.items() if k not in without
    }
    methods |= {"L2O": Alone(LSTM), "SGD": Alone(default.fallback)}

    def build(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
        setting = figure.setting(profile, seeds) | size[profile] | {"segment": 100}
        few = smoke if profile == "smoke" else ()
        chosen = {k: m for k, m in methods.items() if k in (few or methods)}
        return trainings(chosen, L2O, **setting)

    return build


DETAILS: dict[str, dict[str, Any]] = {
    "smoke": {"data": "digits", "batch": 32, "steps": 50, "seeds": 2, "replicas": 2},
    "laptop": {"data": "mnist", "steps": 5_000, "seeds": 2},
    "paper": {"data": "mnist", "steps": 100_000, "seeds": 25, "replicas": 25},
}


def _details(profile: str) -> Iterable[tuple[str, Any]]:
    setting = dict(DETAILS[profile])
    setting["optimizee"] = SMALL_MLP[setting["data"]]
    memories: tuple[Memory, ...] = ("carry", "reset")
    sgd = SGD(PowerDecay(1.0, TAU))
    methods: dict[str, Any] = {"SGD 1": Alone(sgd)}
    for memory in memories:
        methods[f"LGL2O 1 {memory}"] = LGL2O(LSTM, sgd, proposal_state=memory)
    return trainings(methods, L2O, **setting)


def _readings(profile: str, seeds: int | None = None) -> Iterable[tuple[str, Any]]:
    """The first thousand steps of Fig. 3, with the other reading of GL2O's constant and
    with LGL2O's criterion free of noise."""
    figure = FIGURES["lgl2o.fig3"]
    methods = lgl2o_methods(**figure.options, full_loss=True)
    names = ("L2O", "SGD", "LGL2O", "LGL2O full loss", "GL2O")
    chosen = {name: methods[name] for name in names}
    chosen["GL2O weight 0.1"] = replace(chosen["GL2O"], sequence=MovingAverage(0.1))
    setting = figure.setting(profile, seeds)
    if profile == "laptop":
        setting["steps"] = 1_000
    return trainings(chosen, L2O, **setting)


RELEASED: dict[str, dict[str, Any]] = {
    "smoke": {"steps": 100, "segment": 10, "evaluations": 4},
    "laptop": {"steps": 3_000, "replicas": 8},
    "paper": {"steps": 10_000},
}


def _released(profile: str) -> Iterable[tuple[str, Any]]:
    """From where the methods of Figs. 3 and 5 are: the guards' fallback alone.

    On Spirals for longer, since there SGD needs thousands of steps to begin with.
    """
    fig3, fig5 = FIGURES["lgl2o.fig3"], FIGURES["lgl2o.fig5"]
    whole = fig3.setting(profile) | RELEASED[profile]
    small = whole | fig3.setting("smoke") | {"segment": 50, "steps": 1_000}
    spirals = fig5.setting(profile) | {"steps": 16_000, "evaluations": 16}
    parts = [
        (fig3, "", whole, ("LGL2O", "LGL2O reset", "SGD"), 300),
        (fig3, "digits, ", small, ("LGL2O", "SGD"), 300),
        (fig5, "spirals, ", spirals, ("LGL2O", "SGD"), 6_000),
    ]
    if profile == "smoke":
        parts = [(*parts[0][:-1], 20)]
    for figure, prefix, setting, names, ahead in parts:
        methods = lgl2o_methods(**figure.options)
        chosen = {f"{prefix}{name}": methods[name] for name in names}
        for name, work in trainings(chosen, L2O, **setting):
            after = methods["LGL2O"].fallback
            yield name, Released.of(work, after=after, ahead=ahead)


def settings(profile: str) -> str:
    """LGL2O's Table 1 and the tables of its App. D, from the table of experiments.

    Markdown: data, network, which of both the L2O has not met in meta-training, and
    rates of the hand-crafted optimizers. ``profile`` gives steps and seeds.
    """
    lines = [
        "| figure | data | network (parameters) | other than in meta-training | "
        "SGD: rate, decay τ | fallback: τ | Adam | steps × seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figure in FIGURES.items():
        setting = figure.setting(profile)
        network, methods = setting["optimizee"], lgl2o_methods(**figure.options)
        if isinstance(network, MLP):
            shape = f"MLP {'-'.join(map(str, network.sizes))}"
        else:
            shape = f"Conv{len(network.channels)}"
        new = [] if figure.data == "mnist" else ["data"]
        new += [] if isinstance(network, MLP) else ["network"]
        sgd, fallback = methods["SGD"].optimizer.lr, methods["LGL2O"].fallback.lr
        cells = (
            f"`{name}`",
            setting["data"],
            f"{shape} ({network.layout.n:,})",
            ", ".join(new),
            f"{sgd.lr0:g}, {sgd.tau:,.0f}",
            f"{fallback.tau:,.0f}",
            f"{methods['Adam'].optimizer.lr.lr0:g}",
            f"{setting['steps']:,} × {setting['seeds']}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


ENTRIES = [
    Experiment(
        "lgl2o.pilot",
        "Meta-training at the higher of two candidate rates",
        "01-learning-to-optimize",
        _pilot,
    ),
    Experiment(
        "lgl2o.metatrain",
        "Meta-training of the LSTM optimizer on MNIST",
        "01-learning-to-optimize",
        _metatrain,
    ),
    Experiment(
        "lgl2o.fig2",
        "Meta-training curves evaluated on six data sets",
        "01-learning-to-optimize",
        _fig2,
    ),
    Experiment(
        "lgl2o.fig3",
        "MNIST, MLP 784-20-10: L2O, its guards and hand-crafted optimizers",
        "02-loss-guard",
        FIGURES["lgl2o.fig3"],
    ),
    Experiment(
        "lgl2o.fig4",
        "Circles, MLP 2-20-2: the same methods",
        "02b-out-of-distribution",
        FIGURES["lgl2o.fig4"],
    ),
    Experiment(
        "lgl2o.fig5",
        "Spirals, MLP 2-20-2: the same methods",
        "02b-out-of-distribution",
        FIGURES["lgl2o.fig5"],
    ),
    Experiment(
        "lgl2o.fig6",
        "MNIST, Conv3: the same methods",
        "02d-convolutional-networks",
        FIGURES["lgl2o.fig6"],
    ),
    Experiment(
        "lgl2o.fig7",
        "CIFAR-10, Conv3: the same methods",
        "02d-convolutional-networks",
        FIGURES["lgl2o.fig7"],
    ),
    Experiment(
        "lgl2o.fig8",
        "Tiny-ImageNet-50, Conv5: the same methods",
        "02d-convolutional-networks",
        FIGURES["lgl2o.fig8"],
    ),
    Experiment(
        "lgl2o.fig9",
        "Spirals: LGL2O over three fallbacks",
        "02b-out-of-distribution",
        _over("lgl2o.fig5", ("SGD", "SGD+momentum", "Adam")),
    ),
    Experiment(
        "lgl2o.fig10",
        "Tiny-ImageNet-50, Conv5: SGD over rates and decays",
        "02d-convolutional-networks",
        _fig10,
    ),
    Experiment(
        "lgl2o.adam",
        "Circles: LGL2O over Adam beside Adam",
        "02b-out-of-distribution",
        _over("lgl2o.fig4", ("Adam",), alone=("Adam",)),
    ),
    Experiment(
        "lgl2o.million",
        "Circles: a million steps",
        "02b-out-of-distribution",
        _million,
    ),
    Experiment(
        "lgl2o.grids",
        "The baselines' searches of 300 steps, seeds of their own",
        "a2-settings",
        _grids,
    ),
    Experiment(
        "lgl2o.tune",
        "The baselines' searches over the whole horizon, seeds of their own",
        "a2-settings",
        _tune,
    ),
    Experiment(
        "lgl2o.conv3",
        "MNIST, Conv3: SGD over activations and rates",
        "a2-settings",
        _conv3,
    ),
    Experiment(
        "lgl2o.momentum",
        "CIFAR-10, Conv3: SGD with momentum at four rates",
        "02d-convolutional-networks",
        _momentum,
    ),
    Experiment(
        "lgl2o.convex",
        "Softmax regression on Moons, whole batches: convex and without noise",
        "04-gradient-guard",
        _convex,
    ),
    Experiment(
        "ours.guard_failures",
        "Circles: guards of two other meta-trained optimizers",
        "05-noisy-criterion",
        _failures,
    ),
    Experiment(
        "lgl2o.ablations",
        "Circles: LGL2O with one thing changed at a time",
        "02c-one-at-a-time",
        _ablations("lgl2o.fig4", ABLATIONS),
    ),
    Experiment(
        "lgl2o.ablations-conv3",
        "MNIST, Conv3: the same, fewer things, shorter",
        "02c-one-at-a-time",
        _ablations(
            "lgl2o.fig6",
            ABLATIONS_CONV3,
            ("iid", "full loss", "power 1"),
            ("LGL2O", "n_t=100", "n_c=1", "reset", "SGD"),
        ),
    ),
    Experiment(
        "lgl2o.details",
        "MNIST, MLP: LGL2O over a fallback with the paper's other step size",
        "02-loss-guard",
        _details,
    ),
    Experiment(
        "lgl2o.readings",
        "MNIST, MLP: GL2O's other constant, and LGL2O on the whole training set",
        "04-gradient-guard",
        _readings,
    ),
    Experiment(
        "ours.released",
        "MNIST, Digits, Spirals: how far SGD alone gets from where LGL2O is",
        "02-loss-guard",
        _released,
    ),
]
