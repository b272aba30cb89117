"""Runs and experiments: what is computed, stored, read back and judged."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import chapters, claims, records
from ..data import find_root, load
from ..metatrain.estimates import NetworkEstimates
from ..metatrain.truncated import LearningCurve, MetaWork
from ..optimizees import Layout
from ..optimizers import Meta, Wrapped
from ..records import Record, RecordError, elapsed
from ..train import Training, drive, repeatable
from ..tuning import Chosen

PROFILES = chapters.PROFILES[1:]
"""What can be computed: all that a chapter can do but load what is committed."""


class ExperimentError(Exception):
    """A request that cannot be met; the message says what is allowed."""


# ---- runs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One computation of an experiment: its name, its work, and its record's place."""

    experiment: str
    version: int
    profile: str
    name: str
    work: Any

    @property
    def label(self) -> str:
        """What the run shows (a method, a data set, ...): its name less the group."""
        return self.name.rpartition("/")[0] or self.name

    @property
    def path(self) -> Path:
        """Where the record lies: meta-trained weights have a folder of their own."""
        data = find_root() / "data"
        if isinstance(self.work, MetaWork) and self.profile != "smoke":
            return weights_path(self.name)
        folder = data / "records" / self.profile / self.experiment
        return folder / f"{self.name}{records.SUFFIX}"

    @property
    def checkpoint(self) -> Path:
        return find_root() / "data" / "scratch" / self.profile / self.experiment / (
            f"{self.name}.checkpoint"
        )  # fmt: skip

    @cached_property
    def trained(self) -> dict[str, Record]:
        """The meta-training records whose weights the work needs, by role."""
        names = getattr(self.work, "weights", {})
        kept = self.profile != "smoke"
        return {role: load_weights(name, kept) for role, name in names.items()}

    @cached_property
    def tuning(self) -> Run | None:
        """The run whose record says which method this one takes, if one does."""
        chosen = getattr(self.work, "method", None)
        if not isinstance(chosen, Chosen):
            return None
        version = EXPERIMENTS[chosen.experiment].version
        return Run(chosen.experiment, version, self.profile, chosen.name, chosen.tuning)

    @cached_property
    def resolved(self) -> Any:
        """The work with a tuned method, and the digests of its weights, filled in."""
        work = self.work
        if self.tuning is not None:
            found = self.tuning.load().arrays
            work = replace(work, method=work.method.settle(found, work.steps))
        if self.trained:
            digests = {role: r.digest for role, r in self.trained.items()}
            work = replace(work, digests=digests)
        return work

    @property
    def config(self) -> dict[str, Any]:
        """The JSON that determines the result and enters the content digest."""
        return {
            "experiment": self.experiment,
            "version": self.version,
            "seeds": list(self.work.seeds),
            "work": records.spec(self.resolved),
        }

    def load(self) -> Record:
        """Read the committed record; RecordError if absent, damaged or stale."""
        return Record.load(self.path, self.config)

    def state(self) -> str:
        """``done``, ``missing``, ``stale``, ``damaged``, ``unreadable``, ``needs ...``.

        Stale: of another configuration. Weights or a search that the run reads are
        needed if they are missing or stale; if they are damaged or unreadable, so is
        the run.
        """
        try:
            config = self.config
        except (records.Missing, records.Stale):
            return "needs " + ", ".join(sorted(self.needs()))
        except RecordError as error:
            return error.state
        try:
            Record.load(self.path, config)
        except RecordError as error:
            return error.state
        return "done"

    def needs(self) -> dict[str, str]:
        """What this run reads that is missing or stale, and the command that makes it.

        For weights that no entry of the table makes the command is empty.
        """
        found = {}
        for name in getattr(self.work, "weights", {}).values():
            try:
                load_weights(name, self.profile != "smoke")
            except (records.Missing, records.Stale):
                made = meta_training(name)
                found[name.removesuffix(BEST)] = made.command if made else ""
        if self.tuning is not None and self.tuning.state() != "done":
            there = f"{self.tuning.experiment} {self.tuning.name}"
            found[there] = self.tuning.command
        return found

    @property
    def command(self) -> str:
        """What to type to compute it."""
        return (
            f"python -m l2olib run {self.experiment} --profile {self.profile} "
            f"--only '{self.name}'"
        )

    def twin(self) -> Record | None:
        """Read the record of a run of this experiment that has the same configuration.

        A search may choose what the figure has already: then nothing is left to
        compute.
        """
        if self.tuning is None:
            return None
        (entry,) = find(self.experiment)
        done = (r for r in entry.runs(self.profile) if r.state() == "done")
        return next((r.load() for r in done if r.config == self.config), None)

    def execute(
        self,
        *,
        device: str = "cpu",
        compile: bool = False,
        checkpoint: bool = True,
        time_limit: float | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> Record:
        """Compute the record (resuming a checkpoint); it is not saved.

        Raises :class:`l2olib.train.Unfinished` at ``time_limit`` seconds.
        """
        if getattr(self.work, "on_cpu", False):  # small, in double precision
            device, compile = "cpu", False
        repeatable()
        # Before the run: of what runs, not of what is edited meanwhile.
        tests, source = claims.hashes_for(self.experiment), records.source_digest()
        here = {"commit": records.commit(), "source": source, "claims": tests}
        origins: list[dict[str, Any]] = [here]
        metas = {k: weights_of(r, self.work, k) for k, r in self.trained.items()}
        arrays, seconds = drive(
            self.resolved.job(device, compile, metas),
            key=records.digest(self.config),
            checkpoint=self.checkpoint if checkpoint else None,
            time_limit=time_limit,
            device=device,
            report=report,
            origins=origins,
        )
        facts = records.provenance(
            device=device,
            seconds=seconds,
            compiled=compile,
            profile=self.profile,
            **self._data_facts(),
        )
        # A test counts as older than a record if it is older than all its pieces.
        facts["claims"] = {
            name: text
            for name, text in tests.items()
            if all(piece["claims"].get(name) == text for piece in origins)
        }
        earlier = {p["commit"] for p in origins if p["source"] != source}
        if earlier:
            facts["begun"] = sorted(earlier)  # by other code than that which ended it
        return Record(self.config, arrays, facts)

    def _data_facts(self) -> dict[str, str]:
        name = getattr(self.work, "data", None)
        return {"data": name, "data_sha256": load(name).checksum} if name else {}


BEST = "@best"
"""Behind the name of weights: of a meta-training that selects nothing itself, the kept
snapshot nearest to the iteration of lowest validation, in place of its last iterate."""


def weights_path(name: str) -> Path:
    """Where the weights of that name lie, or will."""
    folder = find_root() / "data" / "optimizers"
    return folder / f"{name.removesuffix(BEST)}{records.SUFFIX}"


@lru_cache(maxsize=1)
def _meta_trainings(
    table: tuple[Experiment, ...],
) -> tuple[dict[str, Run], list[ExperimentError]]:
    """The runs of a table whose records are weights, by their names.

    And why entries could not be built, which is no matter of the others.
    """
    made: dict[str, Run] = {}
    broken = []
    for entry in table:
        for profile in entry.profiles:
            if profile == "smoke":
                continue
            try:
                runs = entry.runs(profile)
            except ExperimentError as error:
                broken.append(error)
                continue
            made |= {r.name: r for r in runs if isinstance(r.work, MetaWork)}
    return made, broken


def meta_training(name: str) -> Run | None:
    """Return the run of the table whose record these weights are, if there is one.

    Raises ExperimentError if none is found while there is an entry that cannot be
    built: it may be that one's.
    """
    made, broken = _meta_trainings(tuple(EXPERIMENTS.values()))
    run = made.get(name.removesuffix(BEST))
    if run is None and broken:
        raise broken[0]
    return run


def load_weights(name: str, current: bool = True) -> Record:
    """Read meta-trained weights ``data/optimizers/NAME.safetensors.gz``.

    RecordError if they are absent or damaged, or stale: from another meta-training than
    the one which the table calls so (unless any are welcome: ``current=False``). Names
    that the table does not have are read as they are.
    """
    path = weights_path(name)
    name = name.removesuffix(BEST)
    if not path.exists():
        known = sorted(
            p.name.removesuffix(records.SUFFIX)
            for p in path.parent.glob(f"*{records.SUFFIX}")
        )
        raise records.Missing(
            f"there are no weights {name}: meta-train them first, or choose one of "
            f"{', '.join(known) or '(none yet)'}"
        )
    made = meta_training(name) if current else None
    return Record.load(path, made.config if made else None)


def trained(name: str, layout: Layout | None = None) -> tuple[Any, Meta]:
    """Return a learned optimizer of the table and its meta-trained parameters.

    ``name``: of weights in ``data/optimizers``, with :data:`BEST` behind it or without.
    ``layout``: of the optimizee that it shall train, for optimizers that know tensors
    (STAR's; default: the optimizee of meta-training). Raises RecordError as
    :func:`load_weights` does, and for weights that no entry of the table makes.
    """
    record, made = load_weights(name), meta_training(name)
    if made is None:
        raise RecordError(
            f"no experiment makes the weights {name}, so that nothing says which "
            "optimizer they belong to: read them with load_weights"
        )
    optimizer = made.work.optimizer
    if layout is not None and hasattr(optimizer, "layout"):
        optimizer = replace(optimizer, layout=layout)
    return optimizer, _meta(record, optimizer, name.endswith(BEST))


def _meta(record: Record, optimizer: Any, best: bool) -> Meta:
    """Take meta-parameters from a record, of its end or of its best snapshot."""
    if best:
        layout = Layout.of(optimizer.init_meta(0))
        return layout.views(record.arrays["snapshots"][best_snapshot(record)])
    return {
        k.removeprefix("meta."): v
        for k, v in record.arrays.items()
        if k.startswith("meta.")
    }


def best_snapshot(record: Record) -> int:
    """Which of a meta-training's snapshots :data:`BEST` stands for."""
    a, work = record.arrays, record.config["work"]
    at = work["validate_every"] * int(a["validation"].argmin())
    return int((a["snapshot_rollouts"] - at).abs().argmin())


def weights_of(record: Record, work: Any, role: str) -> dict[str, torch.Tensor]:
    """Take from a meta-training's record what ``work`` needs, and check it fits."""
    whole = isinstance(work, LearningCurve | NetworkEstimates)
    optimizer = work.optimizer if whole else work.method.optimizers[role]
    learned = optimizer
    while isinstance(learned, Wrapped):
        learned = learned.optimizer
    trained = record.config["work"].get("optimizer")
    if trained != records.spec(learned):
        raise RecordError(
            f"the weights were trained for {records.canonical(trained)}, which is not "
            f"the {role} of this run: choose weights of the same architecture"
        )
    if whole:
        return record.arrays
    return _meta(record, optimizer, work.weights[role].endswith(BEST))


# ---- experiments ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Experiment:
    """A figure or table: its title, the chapter that shows it, and its runs.

    ``version`` is raised when an algorithm behind it changes; older records are then
    stale. ``build(profile, **options)`` makes the named works; the options, if it has
    any (such as ``seeds``), are what a chapter may let its reader change.
    """

    id: str
    title: str
    chapter: str
    build: Callable[..., Iterable[tuple[str, Any]]]
    version: int = 1
    profiles: tuple[str, ...] = PROFILES

    def runs(self, profile: str, **options: Any) -> list[Run]:
        if profile not in self.profiles:
            raise ExperimentError(
                f"{self.id} has no profile {profile!r}: use {', '.join(self.profiles)}"
            )
        chosen = {k: v for k, v in options.items() if v is not None}
        try:
            made = list(self.build(profile, **chosen))
        except ValueError as error:
            raise ExperimentError(f"{self.id} at {profile}: {error}") from error
        return [Run(self.id, self.version, profile, n, w) for n, w in made]


EXPERIMENTS: dict[str, Experiment] = {}
"""All by id. Each module beside this one has its own; the package joins them."""


def find(pattern: str) -> list[Experiment]:
    """Experiments whose id matches a glob; ExperimentError if none does."""
    found = [EXPERIMENTS[k] for k in fnmatch.filter(EXPERIMENTS, pattern)]
    if not found:
        raise ExperimentError(
            f"there is no experiment {pattern!r}: choose from {', '.join(EXPERIMENTS)}"
        )
    return found


def table() -> str:
    """All experiments as a Markdown table: recorded runs and cost at each profile.

    The cost is the measured time where every run has its record, else an estimate, for
    one CPU core, of what is left; a dash where there is no such profile.
    """
    lines = [
        "| experiment | what it shows | chapter | laptop | paper |",
        "|---|---|---|---|---|",
    ]
    for entry in EXPERIMENTS.values():
        cells = []
        for profile in ("laptop", "paper"):
            if profile not in entry.profiles:
                cells.append("–")
                continue
            runs = entry.runs(profile)
            done = [run for run in runs if run.state() == "done"]
            spent = sum(run.load().provenance["seconds"] for run in done)
            if len(done) == len(runs):
                cells.append(f"recorded, {elapsed(spent)}")
                continue
            estimated = sum(run.work.seconds() for run in done)
            left = sum(run.work.seconds() for run in runs) - estimated
            left *= spent / estimated if done else 1.0
            rest = "the rest about" if done else "about"
            cells.append(f"{len(done)} of {len(runs)} runs; {rest} {elapsed(left)}")
        chapter = f"{{doc}}`{entry.chapter}`"
        lines.append(
            f"| `{entry.id}` | {entry.title} | {chapter} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def results(
    experiment: str, profile: str, only: Iterable[str] = (), **options: Any
) -> list[tuple[Run, Record]]:
    """What a chapter plots: committed records (``profile="record"``) or fresh ones.

    Fresh ones, at another profile, are made of the runs whose weights exist. ``record``
    takes profile ``paper`` only if every run of the figure has its record,
    else those labels of ``laptop`` whose runs are all recorded (RecordError if there
    are none; :func:`pending` names the others). An option that does not fit the
    records fails. ``only``: labels to which a chapter restricts itself (none: all).
    """
    (entry,) = find(experiment)
    if profile != "record":
        runs = entry.runs(profile, **options)
        chosen = [r for r in runs if not only or r.label in only]
        able = [r for r in chosen if not _needs(r)]
        return [(r, r.execute(checkpoint=False)) for r in able or chosen[:1]]
    candidate = _recorded(entry)
    runs = entry.runs(candidate)
    if [r.work for r in entry.runs(candidate, **options)] != [r.work for r in runs]:
        given = [name for name, value in options.items() if value is not None]
        raise ExperimentError(
            f"the records of {experiment} were made with other parameters: leave "
            f"{', '.join(given)} at the default, or recompute with profile smoke, "
            "laptop or paper"
        )
    runs = [r for r in runs if not only or r.label in only]
    if not runs:
        raise ExperimentError(f"{experiment} has none of {', '.join(only)}")
    waiting = _waiting(runs)
    ready = [r for r in runs if r.label not in waiting]
    missing = [r for r in runs if not r.path.exists()]
    return [(r, r.load()) for r in ready or missing[:1]]  # the latter raises


def _recorded(entry: Experiment) -> str:
    """The profile whose records are shown."""
    if "laptop" not in entry.profiles:
        return "paper"
    whole = "paper" in entry.profiles and all(
        r.state() == "done" for r in entry.runs("paper")
    )
    return "paper" if whole else "laptop"


def _needs(run: Run) -> bool:
    """Whether weights or a search that the run reads are missing."""
    return run.state().startswith("needs ")


def _waiting(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(r.label for r in runs if not r.path.exists()))


def pending(experiment: str, profile: str) -> str:
    """A sentence on what has no record yet (their number if many); "" if all have.

    At other profiles than ``record``: on what cannot be computed for want of weights,
    or of a search that chooses its settings.
    """
    (entry,) = find(experiment)
    if profile not in ("record", *entry.profiles):
        return f"Only at profile {' or '.join(entry.profiles)}."
    if profile != "record":
        found = dict.fromkeys(r.label for r in entry.runs(profile) if _needs(r))
        return f"Wanting weights or a search: {'; '.join(found)}." if found else ""
    runs = entry.runs(_recorded(entry))
    waiting = _waiting(runs)
    if len(waiting) > 8:
        return f"Not recorded yet: {len(waiting)} of {len({r.label for r in runs})}."
    return f"Not recorded yet: {'; '.join(waiting)}." if waiting else ""


def ready(experiment: str, profile: str) -> bool:
    """Whether :func:`results` has anything to give."""
    (entry,) = find(experiment)
    if profile != "record":
        made = entry.runs(profile) if profile in entry.profiles else []
        return not all(_needs(r) for r in made)
    runs = entry.runs(_recorded(entry))
    return len(_waiting(runs)) < len({r.label for r in runs})


def curves(found: Iterable[tuple[Run, Record]]) -> dict[str, dict[str, torch.Tensor]]:
    """Join the records of each label along their seeds (first axis).

    To the recorded arrays come ``seconds`` (measured, a step and replica), a number for
    the ``conditions`` under which, and :func:`hyperparameters`. Where a method changes
    for good at a step, ``flops`` becomes the mean over the run, and ``turn [1, 3]`` has
    that step and the work of a step before and after it.
    """
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for run, record in found:
        arrays = dict(record.arrays)
        if isinstance(run.work, Training):
            per_step = record.provenance["seconds"] / run.work.steps / run.work.replicas
            arrays["seconds"] = torch.tensor([per_step])
            arrays["conditions"] = torch.tensor([_conditions(record)])
            method, work = run.resolved.method, run.work
            arrays["hyperparameters"] = torch.tensor([hyperparameters(method)])
            if at := min(getattr(method, "at", 0), work.steps):
                before, after, mean = (
                    method.cost(work.optimizee, work.batch, 1, share).flops
                    for share in (1.0, 0.0, at / work.steps)
                )
                arrays["turn"] = torch.tensor([[at, before, after]]).double()
                arrays["flops"] = torch.tensor([mean]).double()
        if run.label not in joined:
            joined[run.label] = arrays
            continue
        for name, value in arrays.items():
            if name not in SHARED:
                both = [joined[run.label][name], value]
                joined[run.label][name] = torch.cat(both)
    return joined


def _conditions(record: Record) -> int:
    """A number for what a measured time depends on besides the work itself."""
    keys = ("source", "device", "cpu", "torch", "threads", "compiled")
    facts = {key: record.provenance.get(key) for key in keys}
    return int(records.digest(facts)[:12], 16)


def summary(curves: claims.Curves) -> str:
    """Tabulate (Markdown) where each method ends.

    Medians over seeds of the losses and the error, work of a step, the share of
    proposals accepted in the whole run, seeds that diverge.
    """
    guards = any("use_l2o" in a for a in curves.values())
    head = ["method", "training loss", "test loss", "test error", "MFLOP a step"]
    head += ["accepted"] * guards + ["diverges"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, a in curves.items():
        cells = [
            f"{claims.median(a[k][:, -1]):.3g}" for k in ("full_loss", "test_loss")
        ]
        error = claims.median(a["test_error"][:, -1]).item()
        cells += [f"{error:.1%}" if math.isfinite(error) else ""]
        cells += [f"{a['flops'].mean() / 1e6:.3g}"]
        accepted = ""
        if "use_l2o" in a:
            everything = (0, int(a["decisions"][-1]))
            share = claims.window_mean(a, everything, "use_l2o", "decisions").mean()
            accepted = f"{share:.1%}"
        cells += [accepted] * guards + [claims.diverging(a, since=False)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    end = int(a["steps"][-1])
    note = f"After {end:,} steps: medians over seeds, losses in nat"
    note += "; accepted: the mean." if guards else "."
    return "\n".join(lines) + f"\n\n*{note}*"


def hyperparameters(method: Any) -> int:
    """Choices that are a guard's own: its numbers, and a rule with the rule's numbers.

    Its two optimizers, with step size, schedule and weights, are not counted.
    """
    own = {k: v for k, v in vars(method).items() if k not in method.optimizers}
    rules = [v for v in own.values() if is_dataclass(v)]
    numbers = [v for part in [method, *rules] for v in vars(part).values()]
    return len(rules) + sum(type(v) in (int, float) for v in numbers)


SHARED = ("steps", "marks", "decisions", "rollouts")
"""Arrays without a seed axis: the same in every record of a label."""


def evidence(experiment: str) -> tuple[claims.Curves, dict[str, str]]:
    """What a claim is judged on: curves of committed records, tests known when made."""
    if experiment not in EXPERIMENTS:
        raise claims.NotRecorded(f"{experiment} is not in the table yet")
    profiles = EXPERIMENTS[experiment].profiles
    if not {"laptop", "paper"} & {*profiles}:
        raise claims.NotTestable(f"{experiment} is only at profile {profiles[0]}")
    try:
        found = results(experiment, "record")
    except records.Missing:
        raise claims.NotRecorded(f"{experiment} is not recorded in full") from None
    except RecordError as why:
        raise claims.NotTestable(str(why)) from why
    known = [r.provenance["claims"] for _, r in found]
    return curves(found), {k: v for k, v in known[0].items() if all(
        other.get(k) == v for other in known)}  # fmt: skip


def learned_roles(method: Any) -> list[str]:
    """The roles of a method that take meta-trained weights."""
    return [k for k, o in method.optimizers.items() if o.init_meta(0)]


def trainings(
    methods: dict[str, Any], weights: str, seeds: int, first: int = 0, **setting: Any
) -> Iterable[tuple[str, Training]]:
    """One work for each method and replica group; learned roles take ``weights``.

    The seeds are ``first``, ``first + 1``, ... (``first``: a multiple of ``replicas``).
    """
    replicas = setting.get("replicas", 1)
    for label, method in methods.items():
        roles = learned_roles(method)
        for start in range(first, first + seeds, replicas):
            group = tuple(range(start, min(start + replicas, first + seeds)))
            yield (
                f"{label}/{(start - first) // replicas}",
                Training(
                    method=method,
                    seeds=group,
                    weights=dict.fromkeys(roles, weights),
                    **setting,
                ),
            )
