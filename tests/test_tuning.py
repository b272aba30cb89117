"""Tuning: which trials are run, which one wins, and runs that wait for the choice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import Clock, make_toy_data, make_toy_table  # noqa: F401

from l2olib import experiments, records, train, tuning
from l2olib.__main__ import main
from l2olib.guards import LGL2O
from l2olib.learned.lstm import LSTMOptimizer
from l2olib.optimizees import MLP
from l2olib.optimizers import SGD, CosineDecay, NAdamW, constant
from l2olib.records import Record, RecordError
from l2olib.train import Alone, Training, Unfinished, drive
from l2olib.tuning import Chosen, Tuning, adam_ladder, best, nadamw_draws, score, tuned

LADDER = tuple(Alone(SGD(constant(lr))) for lr in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e9))
SETTING = {
    "optimizee": MLP((2, 4, 2)),
    "data": "toy",
    "steps": 20,
    "batch": 8,
    "segment": 5,
}


def toy(bracket: tuple[int, ...] = (), seeds: int = 1, candidates=LADDER) -> Tuning:
    return tuned("toy.tune", "T/0", candidates, bracket, seeds=seeds, **SETTING).tuning


def scores_of(work: Tuning, **options) -> torch.Tensor:
    job = work.job("cpu", False, {"optimizer": {}})
    return drive(job, **options)[0]["scores"]


# ---- trials --------------------------------------------------------------------------


def test_scores_are_those_of_separate_runs(toy_data):
    """Each trial is the ordinary run of its candidate, on the tuning's own seeds."""
    work = toy(seeds=2)
    assert work.seeds == (1000, 1001)
    assert toy(seeds=3).seeds == (1002, 1003, 1004)  # a whole group of three
    scores = scores_of(work)
    assert scores.shape == (2, 6)
    for k, method in enumerate(LADDER):
        alone = Training(method=method, seeds=(1000, 1001), replicas=2, **SETTING)
        arrays, _ = drive(alone.job("cpu", False, {"optimizer": {}}))
        last = arrays["loss"][:, -2:].double().mean(1).float()  # 20 steps, all recorded
        if k < 5:
            assert torch.equal(scores[:, k], last)
    assert best(scores) == int(scores.mean(0).argmin()) in (2, 3, 4)


def test_a_ladder_is_climbed_to_where_the_best_is_inside(toy_data):
    """From a bracket at the low end: one step beyond the best, no further."""
    scores, whole = scores_of(toy((0, 1))), scores_of(toy())
    top = best(whole)
    tried = [k for k in range(6) if not scores[0, k].isnan()]
    assert tried == list(range(top + 2))
    assert best(scores) == top
    down = scores_of(toy((4, 5)))
    assert (
        best(down) == top and min(k for k in range(6) if down[0, k] == down[0, k]) < top
    )


@pytest.mark.parametrize(
    ("found", "left"),
    [
        ({}, [2, 3]),
        ({2: 1.0}, [3]),
        ({2: 1.0, 3: 2.0}, [1]),
        ({2: 1.0, 3: 0.5}, [4]),
        ({1: 3.0, 2: 1.0, 3: 2.0}, []),
        ({2: 2.0, 3: 1.0, 4: 0.5}, [5]),
        ({2: 3.0, 3: 2.0, 4: 1.0, 5: 0.5}, []),
        ({0: 0.5, 1: 1.0, 2: 2.0, 3: 3.0}, []),
        ({2: torch.inf, 3: torch.inf}, [1]),
    ],
)
def test_what_a_bracket_tries_next(found, left):
    scores = torch.full((1, 6), torch.nan)
    for k, value in found.items():
        scores[0, k] = value
    assert toy((2, 3)).left(scores) == left
    if found:
        assert toy().left(scores) == [k for k in range(6) if k not in found]


def test_a_loss_that_was_not_finite_never_wins(toy_data):
    losses = torch.ones(3, 20)
    losses[0, 5], losses[1, -2:] = torch.nan, 0.5
    assert score(losses).tolist() == [torch.inf, 0.5, 1.0]
    assert best(torch.tensor([[0.1, 2.0, 3.0], [torch.inf, 2.0, 1.0]])) == 1
    assert best(torch.tensor([[2.0, 1.0, 1.0]])) == 1, "the first of equals"
    assert best(torch.tensor([[torch.nan, 3.0, 4.0]])) == 1, "not tried"
    assert best(torch.tensor([[torch.nan, torch.inf]] * 2)) == 1, "tried, and in vain"


RATES = (1e-3, 1e9, 0.3, 3.0, 0.03)
COSINES = tuple(Alone(SGD(CosineDecay(lr, 20, floor=0.5))) for lr in RATES)


def longer(finalists: int = 2, final: int = 40) -> Tuning:
    return replace(toy(candidates=COSINES), finalists=finalists, final=final)


def test_the_finalists_decide_in_runs_of_full_length(toy_data):
    """Each is the ordinary run of its candidate with its schedule stretched."""
    work = longer()
    arrays = drive(work.job("cpu", False, {"optimizer": {}}))[0]
    scores, final = arrays["scores"], arrays["final"]
    assert torch.equal(scores, scores_of(toy(candidates=COSINES)))
    best_two = scores[0].argsort()[:2].tolist()
    assert [k for k in range(5) if not final[0, k].isnan()] == sorted(best_two)
    for k in best_two:
        alone = Training(
            method=Alone(SGD(CosineDecay(RATES[k], 40, floor=0.5))),
            seeds=(1000,), replicas=1, **SETTING | {"steps": 40},
        )  # fmt: skip
        losses = drive(alone.job("cpu", False, {"optimizer": {}}))[0]["loss"]
        assert final[0, k] == losses[0, -4:].double().mean().float()
    chosen = Chosen("toy.tune", "T/0", work)
    won = min(best_two, key=lambda k: final[0, k].item())
    assert chosen.settle(arrays, 80) == Alone(
        SGD(CosineDecay(RATES[won], 80, floor=0.5))
    )
    # the finals decide, whatever the first trials said
    arrays["final"] = final.masked_fill(final == final[0, won], 9.0)
    other = SGD(CosineDecay(RATES[sum(best_two) - won], 80, floor=0.5))
    assert chosen.settle(arrays, 80) == Alone(other)


def test_who_failed_in_a_first_trial_is_no_finalist(toy_data):
    work = longer(3)
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[3.0, inf, 1.0, nan, inf]])
    blank = torch.full((1, 5), nan)
    assert work.left_in_final(scores, blank) == [2, 0]
    blank[0, 2] = inf
    assert work.left_in_final(scores, blank) == [0]
    with pytest.raises(RecordError, match="no trial of toy.tune T/0 stayed finite"):
        Chosen("toy.tune", "T/0", work).settle({"scores": scores, "final": blank}, 40)


def test_a_final_resumes_and_counts_its_steps(toy_data, tmp_path: Path, monkeypatch):
    work, seen = longer(), []

    def job():
        return work.job("cpu", False, {"optimizer": {}})

    whole, _ = drive(job(), report=lambda *at: seen.append(at))
    assert seen[0] == (0, 180) and seen[-1] == (180, 180)
    monkeypatch.setattr(train, "time", Clock())
    for _ in range(100):
        try:
            found, _ = drive(
                job(),
                key="k",
                checkpoint=tmp_path / "c",
                time_limit=4.0,
                save_every=0.0,
            )
            break
        except Unfinished:
            pass
    for name, value in whole.items():
        assert torch.equal(found[name].nan_to_num(-1), value.nan_to_num(-1))


def test_a_tuning_without_a_finite_trial_chooses_nothing():
    chosen = Chosen("toy.tune", "T/0", toy())
    scores = torch.full((1, 6), torch.inf)
    with pytest.raises(RecordError, match="no trial of toy.tune T/0 stayed finite"):
        chosen.settle({"scores": scores}, 20)
    scores[0, 2] = 9.0
    assert chosen.settle({"scores": scores}, 20) == LADDER[2]


def test_a_tuning_resumes_to_the_same_scores(toy_data, tmp_path: Path, monkeypatch):
    work, path = toy((1, 2)), tmp_path / "c"
    whole = scores_of(work)
    monkeypatch.setattr(train, "time", Clock())
    pieces = 0
    while True:
        try:
            found = scores_of(
                work, key="k", checkpoint=path, time_limit=4.0, save_every=0.0
            )
            break
        except Unfinished:
            pieces += 1
    assert pieces > 1
    assert torch.equal(found.nan_to_num(-1), whole.nan_to_num(-1))


def test_progress_counts_steps(toy_data):
    seen = []
    scores_of(toy((0, 1)), report=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 40) and seen[-1][0] == seen[-1][1]
    assert all(a[0] < b[0] for a, b in zip(seen, seen[1:], strict=False))


def test_impossible_tunings_are_refused():
    with pytest.raises(ValueError, match="bracket names candidates 0 to 5, not"):
        toy((3, 6))
    with pytest.raises(ValueError, match="finalists and the final's steps come"):
        longer(2, 0)
    with pytest.raises(ValueError, match="of 5 candidates 6 cannot be finalists"):
        longer(6)
    with pytest.raises(ValueError, match="steps must be a positive multiple"):
        longer(2, 41)
    with pytest.raises(ValueError, match="is its first candidate"):
        replace(toy(), method=Alone(SGD(constant(7.0))))


# ---- candidates ----------------------------------------------------------------------


def test_adams_rates_are_the_papers():
    rates = [method.optimizer.lr.lr0 for method in adam_ladder()]
    assert len(rates) == 15 and rates[0] == 1e-7 and rates[-1] == 1.0
    assert rates[1::2] == [3e-7, 3e-6, 3e-5, 3e-4, 3e-3, 3e-2, 3e-1]
    assert [rates[k] for k in tuning.MIDDLE] == [3e-4, 1e-3, 3e-3]
    assert {method.optimizer.eps_root for method in adam_ladder()} == {1e-8}


def test_random_settings_of_nadamw():
    draws = [method.optimizer for method in nadamw_draws(1_000, 500)]
    assert draws[:20] == [method.optimizer for method in nadamw_draws(20, 500)]
    assert len(set(draws)) == 1_000
    for share, on in (
        (0.641, [d.l2 > 0 for d in draws]),
        (0.686, [d.weight_decay > 0 for d in draws]),
        (0.516, [d.lr.warmup > 0 for d in draws]),
        (0.502, [d.nesterov for d in draws]),
    ):
        assert sum(on) / 1_000 == pytest.approx(share, abs=0.05)
    for low, high, values in (
        (1e-5, 1e-1, [d.lr.lr0 for d in draws]),
        (0.0, 0.99, [d.beta1 for d in draws]),
        (0.0, 0.9999, [d.beta2 for d in draws]),
    ):
        assert low <= min(values) and max(values) <= high
    records.canonical(records.spec(draws))


# ---- runs that wait for a tuning -----------------------------------------------------


@pytest.fixture
def tuned_table(toy_table: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`toy.tune` tries two rates, alone and guarded; `toy.tuned` runs the better."""
    candidates = tuple(Alone(NAdamW(CosineDecay(lr, 20))) for lr in (1e-6, 1e-1))
    guards = tuple(
        LGL2O(LSTMOptimizer(hidden=3), c.optimizer, 5, 2) for c in candidates
    )
    chosen = {
        "NAdamW": tuned("toy.tune", "NAdamW/0", candidates, **SETTING),
        "guard": tuned(
            "toy.tune", "guard/0", guards, weights={"proposal": "toy-lstm"}, **SETTING
        ),
    }

    def tune(profile: str):
        return ((c.name, c.tuning) for c in chosen.values())

    def figure(profile: str):
        setting = SETTING | {"steps": 40}
        return experiments.trainings(chosen, "toy-lstm", 1, **setting)

    for name, build in (("toy.tune", tune), ("toy.tuned", figure)):
        entry = experiments.Experiment(name, "A toy", "02-loss-guard", build)
        monkeypatch.setitem(experiments.EXPERIMENTS, name, entry)
    return toy_table


def runs(name: str):
    return experiments.find(name)[0].runs("laptop")


def test_a_tuned_run_needs_its_tuning_and_names_the_choice(tuned_table):
    alone, guard = runs("toy.tuned")
    assert alone.state() == "needs toy.tune NAdamW/0"
    assert guard.state() == "needs toy-lstm, toy.tune guard/0"
    assert alone.work.seconds() > 0 and guard.work.weights == {"proposal": "toy-lstm"}
    with pytest.raises(RecordError, match="does not exist"):
        alone.execute(checkpoint=False)
    for run in [*runs("toy.train"), *runs("toy.tune")]:
        run.execute(checkpoint=False).save(run.path)
    for run in runs("toy.tuned"):
        assert run.state() == "missing"
        run.execute(checkpoint=False).save(run.path)
        assert run.state() == "done"
    alone, guard = runs("toy.tuned")
    method = alone.config["work"]["method"]
    # The schedule of a trial of 20 steps is stretched to the run's 40.
    assert method == records.spec(Alone(NAdamW(CosineDecay(0.1, 40))))
    assert guard.resolved.method.fallback == NAdamW(CosineDecay(0.1, 40))
    assert set(experiments.curves([(alone, alone.load())])) == {"NAdamW"}


def test_another_choice_makes_the_run_stale(tuned_table):
    for run in [*runs("toy.train"), *runs("toy.tune"), *runs("toy.tuned")]:
        run.execute(checkpoint=False).save(run.path)
    (run, _) = runs("toy.tune")
    old = run.load()
    swapped = {"scores": old.arrays["scores"].flip(1)}
    Record(old.config, swapped, old.provenance).save(run.path)
    assert [run.state() for run in runs("toy.tuned")] == ["stale", "done"]
    # A tuning of other trials is stale itself, so the run needs it anew.
    other = replace(runs("toy.tuned")[0].work.method, tuning=toy())
    assert isinstance(other, Chosen)
    again = replace(
        runs("toy.tuned")[0], work=replace(runs("toy.tuned")[0].work, method=other)
    )
    assert again.state() == "needs toy.tune NAdamW/0"


def test_what_a_search_chooses_is_not_computed_twice(tuned_table, monkeypatch):
    """The same method under two names has one result; with --redo it has two."""
    tuned_figure = experiments.find("toy.tuned")[0]
    same = Alone(NAdamW(CosineDecay(0.1, 40)))
    plain = experiments.trainings({"plain": same}, "", 2, **SETTING | {"steps": 40})

    def figure(profile: str):
        return [*works, *tuned_figure.build(profile)]

    works, entry = list(plain), replace(tuned_figure, build=figure)
    monkeypatch.setitem(experiments.EXPERIMENTS, "toy.tuned", entry)
    assert main(["run", "toy.*"]) == 0
    plain, other, alone, _ = runs("toy.tuned")
    assert alone.load().digest == plain.load().digest != other.load().digest
    made = plain.load()
    Record(made.config, made.arrays, made.provenance | {"commit": "it"}).save(
        plain.path
    )
    alone.path.unlink()
    assert main(["run", "toy.tuned"]) == 0
    assert alone.load().provenance["commit"] == "it"
    assert main(["run", "toy.tuned", "--only", "NAdamW/0", "--redo"]) == 0
    assert alone.load().provenance["commit"] != "it"
    assert alone.load().digest == made.digest
