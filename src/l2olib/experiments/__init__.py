"""The table of experiments: figure id x profile -> everything that determines a result.

An experiment is a list of :class:`Run`; a run is what is executed, checkpointed,
resumed, timed and stored, as one record. What differs between the profiles ``smoke``,
``laptop`` and ``paper`` is data in this table, never an ``if`` in an algorithm. A run's
``work`` is a frozen dataclass (:class:`~l2olib.train.Training`,
:class:`~l2olib.metatrain.truncated.MetaTraining`, ...) that names its whole
configuration and makes the job that computes it.

``runs`` has the mechanism; ``lgl2o``, ``meta_guard``, ``star`` and ``transfer`` have
the entries, each with what they are made of.
"""

from . import lgl2o, meta_guard, star, transfer
from .lgl2o import (
    CONV3,
    FIGURES,
    L2O,
    LADDERS,
    RULES,
    SMALL_MLP,
    lgl2o_methods,
    settings,
)
from .meta_guard import meta_guard_methods
from .runs import (
    EXPERIMENTS,
    PROFILES,
    Experiment,
    ExperimentError,
    Run,
    curves,
    evidence,
    find,
    hyperparameters,
    load_weights,
    pending,
    ready,
    results,
    summary,
    table,
    trained,
    trainings,
)
from .star import (
    APPENDIX,
    HORIZONS,
    INTERVENTIONS,
    STAR_FIG3,
    STAR_MLP,
    STAR_SHARES,
    star_optimizer,
    star_training,
    star_weights,
)
from .transfer import GENERALIZATION

__all__ = [
    "APPENDIX",
    "CONV3",
    "EXPERIMENTS",
    "FIGURES",
    "GENERALIZATION",
    "HORIZONS",
    "INTERVENTIONS",
    "L2O",
    "LADDERS",
    "PROFILES",
    "RULES",
    "SMALL_MLP",
    "STAR_FIG3",
    "STAR_MLP",
    "STAR_SHARES",
    "Experiment",
    "ExperimentError",
    "Run",
    "curves",
    "evidence",
    "find",
    "hyperparameters",
    "lgl2o_methods",
    "load_weights",
    "meta_guard_methods",
    "pending",
    "ready",
    "results",
    "settings",
    "star_optimizer",
    "star_training",
    "star_weights",
    "summary",
    "table",
    "trained",
    "trainings",
]

for _module in (lgl2o, meta_guard, star, transfer):
    EXPERIMENTS.update({entry.id: entry for entry in _module.ENTRIES})
