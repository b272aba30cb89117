"""The table of experiments: states of runs, weights, record mode, joined curves."""

import math
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import make_toy_data, make_toy_table  # noqa: F401

from l2olib import claims, experiments, records
from l2olib.claims import kinds
from l2olib.experiments import EXPERIMENTS, PROFILES, ExperimentError, find, results
from l2olib.experiments.runs import learned_roles, weights_of
from l2olib.guards import LGL2O
from l2olib.learned.lstm import LSTMOptimizer
from l2olib.metatrain.estimates import NetworkEstimates
from l2olib.metatrain.evolution import Evolution
from l2olib.metatrain.quadratic import QuadraticMetaTraining
from l2olib.metatrain.truncated import LearningCurve, MetaTraining
from l2olib.optimizees import MLP, conv_star
from l2olib.optimizers import SGD, constant
from l2olib.records import Record, RecordError
from l2olib.train import Alone, Training, Unfinished
from l2olib.tuning import FIRST_SEED


def runs(name: str, profile: str = "laptop", **options):
    return find(name)[0].runs(profile, **options)


def record_all(*names: str) -> None:
    for name in names:
        for run in runs(name):
            run.execute(checkpoint=False).save(run.path)


# ---- the book's own table ------------------------------------------------------------


def test_every_entry_builds_its_runs():
    """Names are unique, groups cover the seeds, and everything can be described."""
    paths: dict = {}
    for entry in EXPERIMENTS.values():
        for profile in entry.profiles:
            found = entry.runs(profile)
            assert found, entry.id
            for run in found:
                spec = records.canonical(records.spec(run.work))
                own = (entry.id, run.name, spec)  # a record has one owner
                assert paths.setdefault((profile, run.path), own) == own
                assert run.work.seconds() > 0
                if isinstance(run.work, Training):
                    assert run.work.digests == {}
                    assert set(run.work.weights) == set(learned_roles(run.work.method))


@pytest.mark.parametrize("profile", PROFILES)
def test_methods_of_a_figure_are_paired(profile):
    """All methods of figure 3 share data, optimizee, batch, steps and seeds."""
    settings = {}
    for run in runs("lgl2o.fig3", profile):
        w = run.work
        key = (w.optimizee, w.data, w.batch, w.steps, w.replicas)
        settings.setdefault(key, {}).setdefault(run.label, []).extend(w.seeds)
    (by_method,) = settings.values()
    assert len({tuple(seeds) for seeds in by_method.values()}) == 1
    assert {"L2O", "LGL2O", "SGD", "SGD+momentum", "Adam"} <= set(by_method)


def test_the_papers_settings():
    """The settings of the issue and of the spec card, as the table has them."""
    first = runs("lgl2o.metatrain")[0].work
    assert (first.data, first.rollouts, first.rollout) == ("mnist", 2_000, 100)
    assert (first.truncation, first.batch, first.seed) == (20, 128, 0)
    assert first.optimizee.layout.n == 15_910
    rollouts = {
        profile: [r.work.rollouts for r in runs("lgl2o.metatrain", profile)]
        for profile in ("laptop", "paper")
    }
    assert rollouts == {"laptop": [2_000, 500, 500], "paper": [2_000] * 5}
    assert {r.work.data for r in runs("lgl2o.fig2")} == {
        "mnist", "fashion-mnist", "cifar10", "circles", "moons", "spirals"
    }  # fmt: skip
    guard = next(r.work.method for r in runs("lgl2o.fig3") if r.label == "LGL2O")
    assert isinstance(guard, LGL2O)
    assert (guard.n_t, guard.n_c, guard.validation) == (10, 10, "disjoint")
    schedule = guard.fallback.lr
    assert (schedule.lr0, schedule.tau, schedule.power) == (3.0, 50_000.0, 1.5)
    laptop = runs("lgl2o.fig3")
    assert all(r.work.data == "mnist" and r.work.steps >= 10_000 for r in laptop)
    assert len({s for r in laptop for s in r.work.seeds}) >= 5


def test_tuning_has_seeds_of_its_own():
    searches = runs("lgl2o.grids") + runs("lgl2o.conv3")
    tuned = {s for r in searches for s in r.work.seeds}
    assert tuned == set(range(FIRST_SEED, FIRST_SEED + 5))
    for entry in find("lgl2o.fig*") + find("lgl2o.m*") + find("ours.*"):
        for run in entry.runs("laptop"):
            if isinstance(run.work, NetworkEstimates):
                continue  # its seeds are those of meta-training, another stream
            assert not tuned & set(getattr(run.work, "seeds", ()))


def test_the_settings_of_stars_meta_training():
    """Those of the paper, of the issue, and ours, as the spec card tells them apart."""
    laptop = {r.name: r.work for r in runs("star.metatrain")}
    assert list(laptop) == [
        "mlp-star-0.1-0", "mlp-star-0.5-0", "mlp-blackbox-0", "mlp-hyperparam-0"
    ]  # fmt: skip
    assert [w.weight_decay for w in laptop.values()] == [0.1, 0.5, 0.0, 0.0]
    assert [w.optimizer.heads for w in laptop.values()] == [4, 4, 2, 4]
    paper = [r.work for r in runs("star.metatrain", "paper")]
    assert len(paper) == 20 and {w.seed for w in paper} == set(range(5))
    for works, iterations, rate in (
        (laptop.values(), 2_000, 1e-3),
        (paper, 20_000, 1e-4),
    ):
        for w in works:
            assert (w.data, w.batch, w.optimizee.layout.n) == (
                "fashion-mnist", 128, 118_282
            )  # fmt: skip
            assert (w.iterations, w.meta_lr, w.clip) == (iterations, rate, 1.0)
            e = w.estimator
            assert (e.pairs, e.truncation, e.horizon, e.sigma) == (4, 50, 2_000, 0.01)
            assert (e.resets, e.offset, w.validate_every) == ("slot", 2_000, 100)
    pilot = [r.work for r in runs("star.beta3")]
    assert [w.optimizer.step_mult for w in pilot] == [1e-3, 1e-5]
    assert {(w.iterations, w.seed) for w in pilot} == {(200, 100)}
    steps = {
        name: {r.work.steps for r in runs(name)} for name in ("star.fig3", "star.long")
    }
    assert steps == {"star.fig3": {20_000}, "star.long": {200_000}}


def test_what_always_runs_on_the_cpu_says_so():
    """Small work in double precision ignores device and compilation."""
    for name in ("star.fig1", "star.fig2a", "star.fig2c", "ours.bias", "ours.rate"):
        run = runs(name, "smoke")[0]
        assert run.work.on_cpu
    made = runs("star.fig1", "smoke")[0].execute(device="cuda", compile=True)
    assert (
        made.provenance["device"].startswith("cpu") and not made.provenance["compiled"]
    )


def test_why_a_test_cannot_be_run(monkeypatch, tmp_path):
    """No record is one thing, a record of another configuration another."""
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))
    with pytest.raises(claims.NotTestable, match="star.fig1 is not recorded in full"):
        experiments.evidence("star.fig1")
    for run in runs("star.fig1"):
        made = run.execute(checkpoint=False)
        Record({**made.config, "version": 0}, made.arrays, made.provenance).save(
            run.path
        )
    with pytest.raises(claims.NotTestable, match="belongs to another configuration"):
        experiments.evidence("star.fig1")


def test_stars_convnet_is_for_a_gpu():
    """The second task of Fig. 3: same settings, other network; no laptop profile."""
    (entry,) = find("star.convnet")
    assert entry.profiles == ("paper",)
    for ours, theirs in zip(
        entry.runs("paper"), runs("star.metatrain", "paper"), strict=True
    ):
        assert ours.name == theirs.name.replace("mlp", "conv")
        assert ours.work.data == "cifar10" and ours.work.optimizee == conv_star(
            (3, 32, 32), 10
        )
        # STAR's normaliser and so its configuration depend on the network's layout.
        same = replace(
            ours.work, data=theirs.work.data, optimizee=theirs.work.optimizee,
            optimizer=theirs.work.optimizer,
        )  # fmt: skip
        assert same == theirs.work
    for name in ("star.fig3b", "star.fig3d"):
        labels = {r.label for r in runs(name, "paper")}
        mlp = name.replace("3b", "3a").replace("3d", "3")
        assert labels == {r.label for r in runs(mlp, "paper")}
        works = [r.work for r in runs(name, "paper")]
        read = {w for work in works for w in getattr(work, "weights", {}).values()}
        trained = {r.name for r in entry.runs("paper")}
        assert {w.removesuffix("@best") for w in read} == trained
    for profile in ("record", "laptop"):
        assert not experiments.ready("star.fig3b", profile)
    assert experiments.pending("star.fig3b", "laptop") == "Only at profile paper."
    (entry,) = find("star.appfig1")  # which has no profile paper
    made = [run.path.exists() for run in entry.runs("laptop")]
    assert experiments.ready(entry.id, "record") == any(made)
    assert (experiments.pending(entry.id, "record") == "") == all(made)


def test_many_that_wait_are_a_number(monkeypatch, tmp_path):
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))  # a book without records
    labels = {r.label for r in runs("star.fig4", "laptop")}
    many = f"Not recorded yet: {len(labels)} of {len(labels)}."
    assert experiments.pending("star.fig4", "record") == many and len(labels) == 24
    work = experiments.star_training("smoke", "STAR 0.5", "conv")
    run = experiments.Run("star.x", 1, "smoke", "conv-x-0", work)
    assert run.execute(checkpoint=False).arrays["validation"].isfinite().all()


def test_stars_ablations_compare_everything_that_was_meta_trained():
    """Each short meta-training is in one entry, and has its curve."""
    for profile, zetas in (("laptop", 2), ("paper", 5)):
        entries = [*experiments.APPENDIX]
        if profile == "paper":  # where those of metatrain are no longer, and read
            entries[0] = "star.metatrain"
        made = [run for name in entries for run in runs(name, profile)]
        assert {run.work.seed for run in made} == set(range(zetas))
        read = [r.work.weights["optimizer"] for r in runs("star.ablations", profile)]
        assert sorted(read) == sorted(run.name for run in made)
        assert len(set(read)) == 12 * zetas
    decays = {r.name: r.work.weight_decay for r in runs("star.appfig2")}
    assert sorted(set(decays.values())) == [0.0, 0.1, 1.0]
    plain, bare = (runs(f"star.appfig{k}")[0].work.optimizer for k in (3, 4))
    assert not plain.precondition and plain.step_mult == 1e-3
    assert bare.nominal_stepsize == 0 and bare.precondition


def test_claims_about_star_read_what_is_recorded():
    """Labels and iterations of the tests are those of the table."""
    labels = {}
    for one in claims.LEDGER:
        for test in one.tests:
            if test.experiment.startswith(("star.", "ours.")):
                if test.experiment not in labels:
                    (entry,) = find(test.experiment)
                    profile = "laptop" if "laptop" in entry.profiles else "paper"
                    labels[entry.id] = {r.label for r in entry.runs(profile)}
                named = {getattr(test, k, None) for k in ("method", "reference")}
                named -= {None}
                named |= {
                    *getattr(test, "methods", ()),
                    *getattr(test, "references", ()),
                }
                if hasattr(test, "tasks"):
                    named = {f"{t}, {name}" for t in test.tasks for name in named}
                assert named <= labels[test.experiment], (one.id, test)
    for name, iterations in (("star.fig3a", 512), ("star.ablations", 64)):
        work = runs(name)[0].work
        marks = experiments.star_training("laptop").snapshots()
        if name == "star.ablations":
            marks = runs("star.appfig1")[0].work.snapshots()
        assert iterations in marks[(len(marks) - 1) % work.stride :: work.stride]


def test_star_from_meta_training_to_curves(monkeypatch, tmp_path):
    """At smoke size: weights, then what reads them; without weights they are needed."""
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))
    assert runs("star.fig3", "smoke")[0].state() == "needs mlp-star-0.1-0"
    for name in ("star.metatrain", "star.appfig1"):
        for run in runs(name, "smoke"):
            folder = tmp_path / "data" / "optimizers"
            run.execute(checkpoint=False).save(folder / f"{run.name}.safetensors.gz")
    found, stopped = (
        r.execute(checkpoint=False).arrays for r in runs("star.long", "smoke")[:2]
    )
    assert found["steps"][-1] == 50 and found["loss"].isfinite().all()
    # the same weights, and the same steps up to where the clock stops
    last = experiments.star_training("smoke").rollout
    same = found["steps"] <= last + 1
    assert torch.equal(found["loss"][:, same], stopped["loss"][:, same])
    assert (found["loss"][:, ~same] != stopped["loss"][:, ~same]).any(1).all()
    curves = experiments.curves(
        [(r, r.execute(checkpoint=False)) for r in runs("star.fig3a", "smoke")]
    )
    assert set(curves) == {f"{v} #0" for v in experiments.STAR_FIG3}
    for arrays in curves.values():
        assert arrays["selected.objective"].shape == (2,)
        assert arrays["rollouts"][-1] == 3
    work = runs("star.ablations", "smoke")[0].work
    assert isinstance(work, LearningCurve) and work.steps == 10


def test_smoke_runs_need_no_download():
    for entry in EXPERIMENTS.values():
        for run in entry.runs("smoke") if "smoke" in entry.profiles else ():
            assert getattr(run.work, "data", None) in (
                None,
                "digits",
                "digits28",
                "digits64",
                "moons",
                "circles",
                "spirals",
                "normals",
                "descriptions-256x16",
            )


def test_unknown_ids_and_profiles_are_refused():
    with pytest.raises(
        ExperimentError, match="no experiment 'lgl2o.fig33': choose from"
    ):
        find("lgl2o.fig33")
    with pytest.raises(ExperimentError, match="no profile 'huge': use smoke, laptop"):
        runs("lgl2o.fig3", "huge")
    families = ("lgl2o.*", "metaguard.*", "star.*", "ours.*")
    assert {e.id for f in families for e in find(f)} == set(EXPERIMENTS)


# ---- STAR's generalization tasks -----------------------------------------------------

GENERALIZATION = ("star.fig4", "star.appfig5", "star.appfig6")


def test_tasks_and_methods_of_star():
    """The issue's sizes; labels are those that the claims read."""
    tasks, kinds = {}, set()
    for name in GENERALIZATION:
        labels = {r.label for r in runs(name)}
        methods = {label.split(", ")[1] for label in labels}
        assert methods == {
            "STAR 0.1", "STAR 0.5", "Blackbox", "Hyperparam", "Adam", "NAdamW"
        }  # fmt: skip
        found = {label.split(", ")[0] for label in labels}
        assert found == set(claims.star._TASKS[name])
        assert labels == {f"{t}, {m}" for t in found for m in methods}
        for run in runs(name):
            task = tasks.setdefault(run.label.split(", ")[0], run.work)
            # Methods of a task are paired, but for what they are.
            own = {"method": task.method, "weights": {}, "seeds": task.seeds}
            assert replace(run.work, **own) == replace(task, **own)
            kinds.add(type(task.optimizee))
    assert len(tasks) >= 12 and len(kinds) >= 4
    assert [w.steps for w in tasks.values()].count(10_000) == 10
    assert {w.steps for w in tasks.values()} == {2_000, 10_000}
    assert tasks["Transformer"].optimizee.layout.n == 6_050_560
    for work in tasks.values():
        if hasattr(work.optimizee, "vocabulary"):
            size = f"{work.optimizee.vocabulary}x{work.optimizee.length}"
            assert work.data == f"wikitext-2-{size}"
    paper = {r.label: r.work for r in runs("star.fig4", "paper")}
    assert paper["Transformer, Adam"].optimizee.layout.n == 20_416_612
    assert {w.steps for w in paper.values()} == {10_000}
    assert set(paper["LSTM, Blackbox"].weights.values()) == {
        "mlp-blackbox-0-paper@best"
    }
    read = [
        (t.experiment, t.method, t.reference)
        for c in claims.LEDGER
        for t in c.tests
        if isinstance(t, claims.kinds.Lower) and t.experiment in GENERALIZATION
    ]
    for name, *labels in read:
        assert set(labels) <= {r.label for r in runs(name)}


@pytest.mark.parametrize("profile", ["laptop", "paper"])
def test_baselines_are_tuned_on_other_seeds(profile):
    tunings = {r.name: r for r in runs("star.tune", profile)}
    for name in GENERALIZATION:
        for run in runs(name, profile):
            if run.tuning is None:
                assert run.label.split(", ")[1] not in ("Adam", "NAdamW")
                continue
            there, work = tunings[run.tuning.name], run.tuning.work
            assert there.work == work and there.path == run.tuning.path
            assert (work.optimizee, work.data) == (run.work.optimizee, run.work.data)
            assert work.batch == run.work.batch
            assert not set(work.group) & set(run.work.group)
            assert run.state() in (f"needs star.tune {there.name}", "missing", "done")
            trials = len(work.candidates)
            assert trials == (15 if "NAdamW" not in there.name else
                              20 if profile == "laptop" else 100)  # fmt: skip


@pytest.fixture
def fresh_weights(tmp_path, monkeypatch):
    """STAR and its neighbours as they are before meta-training."""
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))
    for variant in experiments.STAR_FIG3:
        optimizer = experiments.star_optimizer(variant, MLP((2, 2)).layout)
        name = experiments.star_weights("mlp", variant, 0, "laptop")
        meta = torch.cat([v.flatten() for v in optimizer.init_meta(0).values()])
        arrays = {
            "validation": torch.zeros(1),
            "snapshot_rollouts": torch.tensor([0]),
            "snapshots": meta[None],
        }
        spec = records.spec(optimizer)
        config = {"work": {"optimizer": spec, "validate_every": 100}}
        path = tmp_path / "data" / "optimizers" / f"{name}.safetensors.gz"
        Record(config, arrays, {}).save(path)


def test_every_kind_of_task_runs_offline(fresh_weights):
    """Smoke, with STAR as it is before meta-training, and one tuned baseline."""
    chosen = {
        "star.fig4": ["ResNet", "LSTM", "Transformer", "MLP layer norm"],
        "star.appfig6": ["Autoencoder MNIST", "ConvNet", "MLP squared error"],
    }
    for name, tasks in chosen.items():
        labels = [f"{t}, {m}" for t in tasks for m in ("STAR 0.5", "NAdamW")]
        found = results(name, "smoke", only=labels)
        assert {run.label for run, _ in found} == set(labels)
        for run, record in found:
            assert record.arrays["loss"].shape == (1, run.work.steps)
            assert record.arrays["loss"][0, 0].isfinite()
            nothing = run.label.startswith("Autoencoder")
            assert record.arrays["test_error"].isnan().all() == nothing
    ((_, trials),) = results("star.tune", "smoke", only=["MLP wide, Adam"])
    assert trials.arrays["scores"].isfinite().sum() >= 3


# ---- states of a run -----------------------------------------------------------------


def test_states(toy_table):
    (train,), figure = runs("toy.train"), runs("toy.fig")
    assert train.state() == "missing"
    assert train.path == toy_table / "data" / "optimizers" / "toy-lstm.safetensors.gz"
    assert [r.state() for r in figure if r.label != "SGD"] == ["needs toy-lstm"] * 4
    assert [r.state() for r in figure if r.label == "SGD"] == ["missing"] * 2
    record_all("toy.train", "toy.fig")
    assert {r.state() for r in runs("toy.fig")} == {"done"}
    # Everything that determines a result makes it stale.
    run = runs("toy.fig")[0]
    for other in (
        replace(run, version=2),
        replace(run, work=replace(run.work, batch=9)),
        replace(run, work=replace(run.work, seeds=(0, 1))),
        replace(
            run, work=replace(run.work, method=Alone(LSTMOptimizer(hidden=3, p=9.0)))
        ),
    ):
        assert other.state() == "stale"
    content = run.path.read_bytes()
    run.path.write_bytes(content[:-1])
    assert run.state() == "damaged"


def test_new_weights_make_a_figure_stale(toy_table):
    record_all("toy.train", "toy.fig")
    (train,) = runs("toy.train")
    old = Record.load(train.path)
    arrays = old.arrays | {"meta.b_out": old.arrays["meta.b_out"] + 1e-3}
    Record(old.config, arrays, old.provenance).save(train.path)
    for run in runs("toy.fig"):
        assert run.state() == ("done" if run.label == "SGD" else "stale")


def test_the_same_run_twice_gives_one_digest_and_its_provenance(toy_table):
    record_all("toy.train")
    run = runs("toy.fig")[2]
    first, second = (run.execute(checkpoint=False) for _ in range(2))
    assert first.digest == second.digest
    facts = first.provenance
    assert facts["profile"] == "laptop" and facts["data"] == "toy"
    assert len(facts["data_sha256"]) == 64 and facts["device"].startswith("cpu")


# ---- weights -------------------------------------------------------------------------


def test_weights_of_another_architecture_are_refused(toy_table):
    record_all("toy.train")
    run = runs("toy.fig")[0]
    for other in (LSTMOptimizer(hidden=4), LSTMOptimizer(hidden=3, scale=0.01)):
        changed = replace(run, work=replace(run.work, method=Alone(other)))
        with pytest.raises(RecordError, match="weights of the same architecture"):
            changed.execute(checkpoint=False)


def test_weights_belong_to_their_role(toy_table):
    """Weights that would fit the fallback are no weights for the proposal."""
    record_all("toy.train")
    guard = LGL2O(LSTMOptimizer(hidden=5), LSTMOptimizer(hidden=3), 5, 2)
    run = runs("toy.fig")[0]
    work = replace(run.work, method=guard, weights={"proposal": "toy-lstm"})
    with pytest.raises(RecordError, match="which is not the proposal of this run"):
        replace(run, work=work).execute(checkpoint=False)


def test_best_weights_are_the_snapshot_that_validated_lowest(tmp_path, monkeypatch):
    """A meta-training whose second half ruins it, by hand; its result is the last."""
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))
    work = experiments.star_training("smoke", "Blackbox")
    work = replace(work, iterations=40, validate_every=10)
    run = experiments.Run("star.x", 1, "laptop", "mlp-x-0", work)
    d = sum(v.numel() for v in work.optimizer.init_meta(0).values())
    marks = torch.tensor(work.snapshots())
    arrays = {f"meta.{k}": v + 7 for k, v in work.optimizer.init_meta(0).items()}
    arrays |= {
        "validation": torch.tensor([0.5, 0.4, 0.3, 0.45, math.inf]),
        "snapshot_rollouts": marks,
        "snapshots": marks[:, None].float().expand(-1, d).contiguous(),
    }
    Record(run.config, arrays, {}).save(run.path)
    record = experiments.load_weights("mlp-x-0@best")
    nearest = min(work.snapshots(), key=lambda k: abs(k - 20))
    assert nearest not in (0, 40)
    setting = {"optimizee": work.optimizee, "data": "digits", "steps": 20, "seeds": 1}
    method = {"x": Alone(work.optimizer)}
    for name, value in (("mlp-x-0@best", nearest), ("mlp-x-0", None)):
        ((_, reads),) = experiments.trainings(method, name, **setting, segment=10)
        found = weights_of(record, reads, "optimizer")
        expected = work.optimizer.init_meta(0)
        assert list(found) == list(expected) or value is None
        for key, start in expected.items():
            full = start + 7 if value is None else torch.full_like(start, value)
            assert torch.equal(found[key], full)


def test_a_trained_optimizer_is_that_of_its_meta_training(toy_table):
    """By its name alone: with the settings and for the tensors that are asked for."""
    record_all("toy.train")
    optimizer, meta = experiments.trained("toy-lstm")
    (run,) = runs("toy.train")
    assert optimizer == run.work.optimizer
    expected = weights_of(run.load(), runs("toy.fig")[0].work, "optimizer")
    assert meta.keys() == expected.keys() == optimizer.init_meta(0).keys()
    assert all(torch.equal(meta[k], expected[k]) for k in meta)


def test_a_broken_entry_is_no_matter_of_other_weights(toy_table, monkeypatch):
    """Those that it may make itself are not taken for somebody's own, unchecked."""
    record_all("toy.train")
    Record({}, {}, {}).save(experiments.runs.weights_path("other"))
    entry = EXPERIMENTS["toy.fig"]
    broken = replace(entry, build=partial(entry.build, steps=25))
    monkeypatch.setitem(EXPERIMENTS, "toy.fig", broken)
    assert experiments.trained("toy-lstm")[0] == LSTMOptimizer(hidden=3)
    with pytest.raises(ExperimentError, match="toy.fig at laptop: steps must be"):
        experiments.trained("other")


def test_a_trained_star_keeps_its_settings_on_another_network():
    net = MLP((784, 20, 10))
    optimizer, meta = experiments.trained("mlp-star-0.5-0@best", net.layout)
    assert optimizer.step_mult == 1e-5 and optimizer.layout == net.layout
    record = experiments.load_weights("mlp-star-0.5-0")
    assert record.config["work"]["optimizer"] == records.spec(optimizer)
    assert {k: v.shape for k, v in meta.items()} == {
        k: v.shape for k, v in optimizer.init_meta(0).items()
    }
    with pytest.raises(RecordError, match="there are no weights nobody"):
        experiments.trained("nobody")


def test_weights_that_no_experiment_makes_have_no_optimizer(toy_table, monkeypatch):
    record_all("toy.train")
    monkeypatch.delitem(experiments.EXPERIMENTS, "toy.train")
    with pytest.raises(RecordError, match="no experiment makes the weights toy-lstm"):
        experiments.trained("toy-lstm")


def test_an_unknown_optimizer_of_star_is_refused():
    with pytest.raises(
        experiments.ExperimentError, match="no optimizer 'STAR': choose"
    ):
        experiments.star_training("laptop", "STAR")


def test_labels_that_no_run_has_are_refused(toy_table):
    record_all("toy.train")
    record_all("toy.fig")
    with pytest.raises(experiments.ExperimentError, match="toy.fig has none of Adam"):
        experiments.results("toy.fig", "record", ["Adam"])


def test_missing_weights_name_those_that_are_there(toy_table):
    with pytest.raises(RecordError, match=r"no weights x: .* one of \(none yet\)"):
        experiments.load_weights("x")
    record_all("toy.train")
    with pytest.raises(RecordError, match="no weights x: .* one of toy-lstm"):
        experiments.load_weights("x")


def test_weights_of_another_meta_training_are_not_used(toy_table):
    """Those that the table calls so, with all their settings, or none."""
    record_all("toy.train")
    (train,), fig = runs("toy.train"), runs("toy.fig")[0]
    record = train.load()
    changed = record.config | {"version": 2}
    Record(changed, record.arrays, record.provenance).save(train.path)
    assert (train.state(), fig.state()) == ("stale", "needs toy-lstm")
    with pytest.raises(RecordError, match="toy-lstm.* another configuration"):
        fig.execute(checkpoint=False)


def test_a_resumed_run_remembers_where_it_began(toy_table, monkeypatch):
    record_all("toy.train")
    run = runs("toy.fig")[0]
    begun = {"commit": "abc", "source": "older code", "claims": {"B2": "older test"}}
    monkeypatch.setattr(claims, "hashes_for", lambda name: {"B2": "test", "B3": "t"})
    with pytest.raises(Unfinished):
        run.execute(time_limit=0.0)
    arrays, metadata = records.read(run.checkpoint)
    (here,) = metadata["origins"]
    assert here["claims"] == {"B2": "test", "B3": "t"}
    origins = [begun | {"claims": {"B2": "older test", "B3": "t"}}]
    records.write(run.checkpoint, arrays, metadata | {"origins": origins})
    facts = run.execute().provenance
    assert facts["begun"] == ["abc"] and facts["claims"] == {"B3": "t"}
    assert "begun" not in runs("toy.fig")[0].execute(checkpoint=False).provenance


def test_a_run_that_is_no_meta_training_has_no_weights(toy_table, monkeypatch):
    record_all("toy.train", "toy.fig")
    sgd = next(r for r in runs("toy.fig") if r.label == "SGD")
    (train,) = runs("toy.train")
    monkeypatch.delitem(EXPERIMENTS, "toy.train")  # else they count as stale
    train.path.write_bytes(sgd.path.read_bytes())
    with pytest.raises(RecordError, match="weights of the same architecture"):
        runs("toy.fig")[0].execute(checkpoint=False)


def test_smoke_never_replaces_the_books_weights(toy_table):
    (smoke,), (laptop,) = runs("toy.train", "smoke"), runs("toy.train")
    assert isinstance(smoke.work, MetaTraining)
    assert smoke.path != laptop.path
    assert "optimizers" not in smoke.path.parts


def test_weights_of_every_meta_training_have_a_folder_of_their_own(toy_table):
    """By evolution strategies as well as by back-propagation; other works' do not."""
    mlp = MLP((2, 4, 2))
    for work, folder in (
        (MetaTraining(SGD(constant(0.1)), mlp, "moons"), "optimizers"),
        (Evolution(SGD(constant(0.1)), mlp, "moons"), "optimizers"),
        (QuadraticMetaTraining(0.1, (0,), 10), "records/laptop/x"),
    ):
        run = experiments.Run("x", 1, "laptop", "w", work)
        assert run.path == toy_table / "data" / folder / "w.safetensors.gz"


# ---- record mode ---------------------------------------------------------------------


def test_record_mode_loads_what_was_recorded(toy_table):
    with pytest.raises(RecordError, match="no weights toy-lstm"):
        results("toy.fig", "record")
    record_all("toy.train")
    with pytest.raises(RecordError, match="does not exist"):
        results("toy.fig", "record")
    record_all("toy.fig")
    found = results("toy.fig", "record", seeds=6)
    assert [r.name for r, _ in found] == [
        f"{m}/{k}" for m in ("L2O", "LGL2O", "SGD") for k in (0, 1)
    ]
    for run, record in found:
        assert record.digest == Record.load(run.path).digest


def test_a_figure_shows_what_its_weights_allow(toy_table):
    assert not experiments.ready("toy.fig", "record")
    assert experiments.ready("toy.fig", "smoke")
    assert (
        experiments.pending("toy.fig", "smoke")
        == "Wanting weights or a search: L2O; LGL2O."
    )
    assert {r.label for r, _ in results("toy.fig", "smoke")} == {"SGD"}
    with pytest.raises(RecordError, match="no weights toy-lstm"):
        results("toy.fig", "smoke", only=["LGL2O"])
    record_all("toy.train")
    assert experiments.pending("toy.fig", "smoke") == ""
    assert not experiments.ready("toy.fig", "record")
    record_all("toy.fig")
    assert experiments.ready("toy.fig", "record")


def test_record_mode_shows_what_is_whole_and_names_the_rest(toy_table):
    """A method waits until all its seeds are there; a stale record is no excuse."""
    record_all("toy.train", "toy.fig")
    found = runs("toy.fig")
    (guard,) = [r for r in found if r.name == "LGL2O/1"]
    assert experiments.pending("toy.fig", "record") == ""
    guard.path.unlink()
    shown = {r.label for r, _ in results("toy.fig", "record")}
    assert shown == {"L2O", "SGD"}
    few = results("toy.fig", "record", only=["SGD", "LGL2O"])
    assert [r.name for r, _ in few] == ["SGD/0", "SGD/1"]
    assert experiments.pending("toy.fig", "record") == "Not recorded yet: LGL2O."
    with pytest.raises(claims.NotTestable, match="no record of LGL2O"):
        kinds.Switching("toy.fig", "LGL2O")(experiments.evidence("toy.fig")[0])
    assert experiments.pending("toy.fig", "smoke") == ""
    (stale,) = [r for r in found if r.name == "SGD/1"]
    stale.path.write_bytes(found[0].path.read_bytes())
    with pytest.raises(RecordError, match="another configuration"):
        results("toy.fig", "record")


@pytest.mark.parametrize("options", [{"seeds": 3}, {"steps": 30}, {"seeds": 7}])
def test_record_mode_refuses_other_parameters(toy_table, options):
    record_all("toy.train", "toy.fig")
    (name,) = options
    message = f"made with other parameters: leave {name} at the default"
    with pytest.raises(ExperimentError, match=message):
        results("toy.fig", "record", **{"data": None, **options})  # None: not given


def test_record_mode_takes_paper_only_when_it_is_whole(toy_table):
    record_all("toy.train", "toy.fig")
    paper = runs("toy.fig", "paper")
    for run in paper[:-1]:
        run.execute(checkpoint=False).save(run.path)
    assert {r.profile for r, _ in results("toy.fig", "record")} == {"laptop"}
    paper[-1].execute(checkpoint=False).save(paper[-1].path)
    assert {r.profile for r, _ in results("toy.fig", "record")} == {"paper"}


def test_other_profiles_compute_afresh_and_save_nothing(toy_table):
    record_all("toy.train")
    found = results("toy.fig", "smoke", seeds=2, steps=10)
    assert all(len(r.arrays["loss"]) == 2 for _, r in found)
    (alone,) = results("toy.fig", "smoke", only=["SGD"], seeds=2, steps=10)
    assert alone[0].label == "SGD"
    assert not (toy_table / "data" / "records").exists()
    assert not (toy_table / "data" / "scratch").exists()


# ---- curves and evidence -------------------------------------------------------------


def test_curves_join_groups_along_seeds(toy_table):
    record_all("toy.train", "toy.fig")
    found = results("toy.fig", "record")
    curves = experiments.curves(found)
    assert list(curves) == ["L2O", "LGL2O", "SGD"]
    guard = curves["LGL2O"]
    parts = [r.arrays for run, r in found if run.label == "LGL2O"]
    assert torch.equal(guard["loss"], torch.cat([p["loss"] for p in parts]))
    assert guard["use_l2o"].shape == (6, 4)
    for name in ("steps", "marks", "decisions"):
        assert torch.equal(guard[name], parts[0][name])
    seeds = [s for run, _ in found if run.label == "LGL2O" for s in run.work.seeds]
    assert seeds == list(range(6))
    assert guard["seconds"].numel() == 2 and (guard["seconds"] >= 0).all()


def test_summary_reads_the_last_values(toy_table):
    record_all("toy.train", "toy.fig")
    curves = experiments.curves(results("toy.fig", "record"))
    _, _, *rows, _, note = experiments.summary(curves).splitlines()
    assert note.startswith("*After 20 steps: medians over seeds")
    cells = {r.split(" | ")[0][2:]: r[:-2].split(" | ")[1:] for r in rows}
    assert list(cells) == list(curves)
    for name, a in curves.items():
        last = statistics.median(a["full_loss"][:, -1].tolist())
        assert float(cells[name][0]) == pytest.approx(last, rel=6e-3)
    guard = curves["LGL2O"]
    ends = torch.cat([torch.zeros(1), guard["decisions"]])
    share = (guard["use_l2o"] * ends.diff()).sum(1).mean() / ends[-1]
    assert cells["LGL2O"][4] == f"{share:.1%}"
    assert cells["SGD"][4:] == ["", ""]
    head, *_ = experiments.summary({"SGD": curves["SGD"]}).splitlines()
    assert "accepted" not in head, "nobody decides"


def test_meta_trainings_of_different_length_stay_apart():
    """Figure 2 has one curve for each pair of meta-training and data set."""
    labels = [r.label for r in runs("lgl2o.fig2")]
    assert len(labels) == len(set(labels))
    read = [t for c in claims.LEDGER for t in c.tests if isinstance(t, kinds.Learns)]
    assert read and {f"{t.zeta}/{t.data}" for t in read} <= set(labels)


def test_evidence_remembers_only_tests_that_all_records_know(toy_table):
    with pytest.raises(claims.NotTestable):
        experiments.evidence("toy.fig")
    record_all("toy.train", "toy.fig")
    chosen = runs("toy.fig")
    for k, run in enumerate(chosen):
        old = Record.load(run.path)
        known = {"B1": "same", "B2": "old" if k == 0 else "new"}
        Record(old.config, old.arrays, old.provenance | {"claims": known}).save(
            run.path
        )
    curves, known = experiments.evidence("toy.fig")
    assert set(curves) == {"L2O", "LGL2O", "SGD"} and known == {"B1": "same"}
    with pytest.raises(claims.NotRecorded, match="is not in the table yet"):
        experiments.evidence("not.there")


def test_an_entry_without_evidence_says_why(toy_table, monkeypatch):
    """One that cannot be built is an error, not something that is yet to come."""
    entry = EXPERIMENTS["toy.fig"]
    broken = replace(entry, build=partial(entry.build, steps=25))
    monkeypatch.setitem(EXPERIMENTS, "toy.fig", broken)
    with pytest.raises(ExperimentError, match="toy.fig at paper: steps must be"):
        experiments.evidence("toy.fig")
    monkeypatch.setitem(EXPERIMENTS, "toy.fig", replace(entry, profiles=("smoke",)))
    with pytest.raises(claims.NotTestable, match="toy.fig is only at profile smoke"):
        experiments.evidence("toy.fig")


def test_claims_are_judged_on_recorded_curves(toy_table):
    """From records to a verdict: an optimizer compared with itself, and a guard."""
    record_all("toy.train", "toy.fig")
    tie = claims.Claim(
        "T1", "x", "s", "t", (kinds.Lower("toy.fig", "SGD", "SGD", (0, 20)),)
    )
    (verdict,) = claims.judge([tie], experiments.evidence)
    assert verdict.verdict == "not reproduced"
    assert verdict.post_hoc, "the records were made before this test was written"


@pytest.mark.parametrize("figure", ["fig3", "fig4", "fig5", "fig6", "fig7"])
def test_a_search_tries_the_papers_choice_on_other_seeds(figure):
    """A tuned baseline must not lose for want of the setting it is compared with."""
    (entry,) = find(f"lgl2o.{figure}")
    works = {r.label: r.work for r in entry.runs("laptop")}
    for label in ("SGD", "SGD+momentum", "Adam", "L2O, then SGD"):
        own, chosen = works[label], works[f"{label} tuned"].method
        assert own.method in chosen.tuning.candidates
        assert chosen.tuning.steps == own.steps
        assert min(chosen.tuning.seeds) >= 1_000 > max(own.seeds)
        assert set(chosen.tuning.weights) == set(own.weights)
        (run,) = (
            r for r in find("lgl2o.tune")[0].runs("laptop") if r.name == chosen.name
        )
        assert run.work == chosen.tuning


def test_a_label_is_not_shown_before_all_its_runs_are_recorded(toy_table):
    """Not even where nothing else is: half of the seeds are not the figure."""
    (train,) = find("toy.train")[0].runs("laptop")
    train.execute().save(train.path)
    first, second, *_ = find("toy.fig")[0].runs("laptop")
    assert first.label == second.label
    first.execute().save(first.path)
    with pytest.raises(RecordError):
        results("toy.fig", "record")
    second.execute().save(second.path)
    assert {r.label for r, _ in results("toy.fig", "record")} == {first.label}


def test_the_work_of_a_switch_is_that_of_both_its_parts():
    """Of a recorded one on Circles, whose learned steps cost twenty times SGD's."""
    names = ["L2O", "SGD", "L2O, then SGD"]
    found = experiments.curves(experiments.results("lgl2o.fig4", "record", names))
    l2o, sgd, switch = (found[name]["flops"].mean().item() for name in names)
    steps = int(found["SGD"]["steps"][-1])
    assert switch * steps == pytest.approx(100 * l2o + (steps - 100) * sgd)
    at, before, after = found["L2O, then SGD"]["turn"][0].tolist()
    assert (at, before, after) == pytest.approx((100, l2o, sgd))
    assert "turn" not in found["SGD"]
