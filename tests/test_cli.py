"""The command line: what it does, and how it refuses."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from problems import SRC, Clock, make_toy_data, make_toy_table  # noqa: F401

from l2olib import claims, data, experiments, records, train
from l2olib.__main__ import duration, main
from l2olib.claims import kinds
from l2olib.records import Record


@pytest.fixture
def cli(capsys):
    """Run one command; return its status, and the lines of stdout and stderr."""

    def call(*argv: str) -> tuple[int, list[str], list[str]]:
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


def refused(result, *words: str) -> None:
    """Status 2, one sentence on stderr with these words, nothing on stdout after it."""
    status, _, err = result
    assert status == 2
    assert len(err) == 1 or err[0].startswith("usage:"), err
    assert all(word in err[-1] for word in words), err[-1]
    assert "Traceback" not in "".join(err)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


# ---- what it does --------------------------------------------------------------------


def test_run_computes_what_is_missing_and_skips_what_is_done(toy_table, cli):
    status, out, err = cli("run", "toy.*")
    assert (status, err) == (0, [])
    assert [line for line in out if line[0] != " "][:2] == [
        "toy.train toy-lstm (laptop)",
        "toy.fig L2O/0 (laptop)",
    ]
    made = files(toy_table)
    assert len(made) == 7 and not any("scratch" in name for name in made)
    assert cli("run", "toy.*") == (
        0,
        ["nothing to do: 7 of 7 runs have their record"],
        [],
    )
    assert files(toy_table) == made


def test_run_redoes_what_is_stale(toy_table, cli):
    cli("run", "toy.*")
    run = experiments.find("toy.fig")[0].runs("laptop")[0]
    old = Record.load(run.path)
    Record(old.config | {"version": 0}, old.arrays, old.provenance).save(run.path)
    assert run.state() == "stale"
    status, out, _ = cli("run", "toy.*")
    assert status == 0 and out[0] == "toy.fig L2O/0 (laptop)" and len(out) == 3
    assert "is of another configuration and will be replaced" in out[1]
    assert Record.load(run.path).digest == old.digest


def test_run_only_some_and_redo(toy_table, cli):
    cli("run", "toy.train")
    status, out, _ = cli("run", "toy.fig", "--only", "*/1")
    assert status == 0 and len(out) == 6
    assert cli("run", "toy.fig", "--only", "SGD/1")[1] == [
        "nothing to do: 1 of 1 runs have their record"
    ]
    assert [
        line.split()[1] for line in cli("run", "toy.fig", "--only", "SGD")[1][::2]
    ] == ["SGD/0"], "a label stands for its groups"
    run = next(r for r in experiments.find("toy.fig")[0].runs("laptop")
               if r.name == "SGD/1")  # fmt: skip
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run.checkpoint.write_text("begun by somebody")
    assert len(cli("run", "toy.fig", "--only", "SGD/1", "--redo")[1]) == 2
    assert not run.checkpoint.exists()
    refused(
        cli("run", "toy.fig", "--only", "SDG*"),
        "toy.fig has no run 'SDG*' at profile laptop",
    )
    before = files(toy_table)
    both = "--redo", "--time-limit", "8m"
    refused(cli("run", "toy.fig", *both), "never ends under --time-limit")
    assert files(toy_table) == before


def test_list(toy_table, cli):
    cli("run", "toy.*")
    status, out, _ = cli("list", "toy.*", "--runs")
    assert status == 0
    assert out[0].startswith("toy.train") and "1/1" in out[0] and "A toy" in out[0]
    assert "6/6" in next(line for line in out if line.startswith("toy.fig"))
    assert sum("done" in line and line.startswith("    ") for line in out) == 7
    everything = cli("list")[1]
    assert len(everything) == len(experiments.EXPERIMENTS)
    (only,) = cli("list", "star.fig3b")[1]
    assert only.startswith("star.fig3b ") and "only at profile paper" in only


def test_claims(toy_table, cli):
    status, out, _ = cli("claims", "B1*")
    assert status == 0
    rows = sorted(line.split()[0] for line in out if line[0] != " ")
    assert rows == ["B1", *(f"B{k}" for k in range(10, 20))]
    assert all("not testable yet" in line for line in out if line[0] != " ")


def test_data(toy_table, cli, monkeypatch):
    monkeypatch.setenv("L2OLIB_DATA", str(toy_table))
    assert cli("data", "moons") == (0, [f"data sets are in {toy_table}"], [])


def test_a_time_limit_is_no_failure(toy_table, cli, monkeypatch):
    """Stopped by the limit, status 0; the same commands later end with one digest."""
    cli("run", "toy.*")
    path = experiments.find("toy.fig")[0].runs("laptop")[2].path
    expected = Record.load(path).digest
    path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(train, "time", Clock())
        # One piece fits between the first reading of the clock and the third.
        status, out, _ = cli("run", "toy.fig", "--time-limit", "4s")
    assert status == 0
    assert out[-1].startswith("stopped at 10 of 20 by the time limit; run the same")
    assert not path.exists()
    status, out, _ = cli("run", "toy.fig")
    assert status == 0 and len(out) == 2
    assert Record.load(path).digest == expected
    assert not list((toy_table / "data" / "scratch").rglob("*.checkpoint"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(how, toy_table, cli, monkeypatch):
    """By Ctrl-C or by ``kill``: what was done is kept, and the digest is the same."""
    cli("run", "toy.*")
    run = experiments.find("toy.fig")[0].runs("laptop")[2]
    expected = Record.load(run.path).digest
    run.path.unlink()

    advance = train.TrainingJob.advance

    def interrupted(job, state):
        if int(state["step"]):
            os.kill(os.getpid(), how)
        return advance(job, state)

    handlers = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)
    }
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in background: ignored
    with monkeypatch.context() as patch:
        patch.setattr(train.TrainingJob, "advance", interrupted)
        status, _, err = cli("run", "toy.fig")
    for each, handler in handlers.items():
        signal.signal(each, handler)
    assert status == 130
    assert err == ["l2olib: interrupted; the same command goes on from what was done"]
    assert int(records.read(run.checkpoint)[0]["step"]) == 10
    assert cli("run", "toy.fig")[0] == 0
    assert Record.load(run.path).digest == expected


def test_interrupted_redo(toy_table, cli, monkeypatch):
    """Without --redo there is nothing to go on with: the old record is still there."""
    cli("run", "toy.*")

    def interrupted(job, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.TrainingJob, "advance", interrupted)
        status, _, err = cli("run", "toy.fig", "--redo")
    assert status == 130
    assert err[0].startswith(
        "l2olib: interrupted; a run that had a record still has it"
    )
    assert cli("run", "toy.fig")[1][0].startswith("nothing to do")


def test_the_module_can_be_run():
    environment = os.environ | {"PYTHONPATH": SRC}
    command = [sys.executable, "-m", "l2olib", "run", "lgl2o.fig33"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "l2olib: there is no experiment 'lgl2o.fig33': choose"
    )
    assert len(done.stderr.splitlines()) == 1


# ---- how it refuses ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["command"]),
        (["fly"], ["invalid choice: 'fly'"]),
        (["run"], ["pattern"]),
        (["run", "x", "--profile", "huge"], ["'huge'", "smoke", "laptop", "paper"]),
        (["run", "nothing"], ["no experiment 'nothing'", "lgl2o.fig3"]),
        (["list", "nothing"], ["no experiment 'nothing'"]),
        (["claims", "B99"], ["no claim 'B99'"]),
        (["data", "mnits"], ["no data set 'mnits'", "mnist"]),
        (["run", "x", "--time-limit", "soon"], ["'soon' is no duration", "8m"]),
        (["run", "x", "--time-limit", "0m"], ["'0m' is no duration"]),
        (["run", "x", "--device", "tpu"], ["no device 'tpu'", "cpu"]),
        (["run", "x", "--device", "cuda:99"], ["no device 'cuda:99'"]),
        (["run", "x", "--speed"], ["--speed"]),
    ],
)
def test_wrong_arguments(argv, words, cli):
    refused(cli(*argv), *words)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("8m", 480), ("2h", 7200), ("0.5h", 1800)],
)
def test_durations(text, seconds):
    assert duration(text) == seconds


def test_missing_weights(toy_table, cli):
    """What needs none is computed all the same."""
    status, out, errors = cli("run", "toy.fig")
    assert status == 2 and len(errors) == 1
    assert "4 of these runs need records that are not there: first make" in errors[0]
    assert "toy-lstm: python -m l2olib run toy.train --profile" in errors[0]
    assert errors[0].endswith("--only 'toy-lstm'")
    assert [line.split()[1] for line in out if "laptop" in line] == ["SGD/0", "SGD/1"]


def test_what_a_run_needs_may_come_after_it(toy_table, cli, monkeypatch):
    """One command computes all, in whatever order the table has it."""
    backwards = dict(reversed(experiments.EXPERIMENTS.items()))
    monkeypatch.setattr(experiments.runs, "EXPERIMENTS", backwards)
    status, out, _ = cli("run", "toy.*")
    assert status == 0 and "toy.train" in out[4] and len(out) == 14
    assert cli("run", "toy.*")[1] == ["nothing to do: 7 of 7 runs have their record"]


def test_weights_of_another_architecture(toy_table, cli, monkeypatch):
    """Of weights that the table knows another sentence is said: they are stale."""
    cli("run", "toy.train")
    (run,) = experiments.find("toy.train")[0].runs("laptop")
    monkeypatch.delitem(experiments.EXPERIMENTS, "toy.train")
    old = Record.load(run.path)
    config = old.config | {"work": old.config["work"] | {"optimizer": {"hidden": 9}}}
    Record(config, old.arrays, old.provenance).save(run.path)
    before = files(toy_table)
    refused(cli("run", "toy.fig"), "weights of the same architecture")
    assert files(toy_table) == before


def test_an_entry_of_the_table_that_cannot_be(toy_table, cli, monkeypatch):
    entry = experiments.EXPERIMENTS["toy.fig"]
    broken = replace(entry, build=partial(entry.build, steps=25))
    monkeypatch.setitem(experiments.EXPERIMENTS, "toy.fig", broken)
    for command in ("run", "list"):
        refused(cli(command, "toy.fig"), "toy.fig at laptop: steps must be a positive")


def test_a_profile_that_an_experiment_has_not(toy_table, cli):
    refused(cli("run", "star.fig3b"), "no profile laptop", "--profile paper")


def test_what_a_glob_leaves_out_is_named(toy_table, cli, monkeypatch):
    entry = replace(experiments.EXPERIMENTS["toy.fig"], id="toy.big")
    big = replace(entry, profiles=("paper",))
    monkeypatch.setitem(experiments.EXPERIMENTS, "toy.big", big)
    status, out, err = cli("run", "toy.*")
    assert status == 0 and len(out) == 14
    assert err == ["l2olib: left out, having no profile laptop: toy.big"]


@pytest.mark.parametrize("folder", ["records/laptop", "scratch"])
def test_a_folder_that_cannot_be_written(folder, toy_table, cli):
    """It is found before the run is begun, whose work would be lost."""
    place = toy_table / "data" / folder
    place.parent.mkdir(parents=True)
    place.write_text("a file in the place of the folder")
    result = cli("run", "toy.fig", "--only", "SGD/0")
    refused(result, f"data/{folder}", "SGD/0", "Not a directory")
    assert result[1] == []


def test_a_damaged_record_is_not_overwritten(toy_table, cli):
    cli("run", "toy.*")
    run = experiments.find("toy.fig")[0].runs("laptop")[2]
    whole = run.path.read_bytes()
    run.path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = files(toy_table)
    refused(cli("run", "toy.fig"), "LGL2O/0.safetensors.gz is damaged", "delete it")
    assert files(toy_table) == before
    assert cli("run", "toy.fig", "--redo", "--only", "LGL2O/0")[0] == 0
    assert run.state() == "done"


def test_a_record_that_cannot_be_read_is_left_alone(toy_table, cli):
    cli("run", "toy.*")
    run = experiments.find("toy.fig")[0].runs("laptop")[2]
    run.path.unlink()
    run.path.mkdir()
    refused(cli("run", "toy.fig"), "0.safetensors.gz cannot be read: Is a directory")
    status, out, _ = cli("list", "toy.fig", "--runs")
    assert status == 0 and "5/6" in out[0] and "unreadable" in out[3]


def test_a_claim_on_a_damaged_record_is_judged_and_refused(toy_table, cli, monkeypatch):
    """What else can be judged is; a record that is only stale is no failure."""
    cli("run", "toy.*")
    low = kinds.Lower("toy.fig", "SGD", "SGD", (0, 20))
    row = claims.Claim("T1", "x", "s", "t", (low, replace(low, experiment="none")))
    monkeypatch.setattr(claims, "LEDGER", (row,))
    run = experiments.find("toy.fig")[0].runs("laptop")[4]
    old, whole = Record.load(run.path), run.path.read_bytes()
    run.path.write_bytes(whole[:-3])
    result = cli("claims", "T1")
    refused(result, "SGD/0.safetensors.gz is damaged")
    assert len(result[1]) == 4 and "SGD/0.safetensors.gz is damaged" in result[1][2]
    Record(old.config | {"version": 0}, old.arrays, old.provenance).save(run.path)
    assert cli("claims", "T1")[0] == 0


def test_damaged_weights(toy_table, cli):
    cli("run", "toy.*")
    path = toy_table / "data" / "optimizers" / "toy-lstm.safetensors.gz"
    path.write_bytes(path.read_bytes()[:-3])
    before = files(toy_table)
    for pattern in ("toy.train", "toy.fig"):
        refused(cli("run", pattern), "toy-lstm.safetensors.gz is damaged")
    assert files(toy_table) == before
    status, out, _ = cli("list", "toy.fig")
    assert status == 0 and "2/6" in out[0]
    states = [run.state() for run in experiments.find("toy.fig")[0].runs("laptop")]
    assert sorted(set(states)) == ["damaged", "done"]


def test_a_checkpoint_of_another_configuration(toy_table, cli):
    cli("run", "toy.train")
    figure = experiments.find("toy.fig")[0].runs("laptop")
    records.write(figure[0].checkpoint, {}, {"key": "of something else"})
    before = files(toy_table)
    refused(
        cli("run", "toy.fig"),
        "data/scratch/laptop/toy.fig/L2O/0.checkpoint",
        "another configuration",
        "delete it",
    )
    assert files(toy_table) == before


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """MNIST is neither here nor to be had."""

    def download(folder):
        raise OSError("no network")

    entry = data._FILES["mnist"]
    fields = {"unpack": "mnist", "needs": entry.needs, "read": entry.read}
    monkeypatch.setitem(data._FILES, "mnist", data._Files(**fields, download=download))
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("L2OLIB_DATA", str(tmp_path / "raw"))
    monkeypatch.setenv("L2OLIB_SHARED_DATA", str(tmp_path / "none"))
    loaded = dict(data._loaded)
    data._loaded.clear()
    yield tmp_path / "raw"
    data._loaded.clear()
    data._loaded.update(loaded)


def test_missing_data(toy_table, cli, no_network):
    result = cli("run", "lgl2o.metatrain", "--only", "*-0")
    refused(result, "mnist", "missing", "python -m l2olib data mnist")
    assert not list((toy_table / "data").rglob("*"))
    refused(cli("data", "mnist"), "mnist", "no network")


def test_a_truncated_data_file(toy_table, cli, no_network):
    for name in data._FILES["mnist"].needs:
        file = no_network / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\x00\x00\x08\x03")
    before = files(toy_table)
    result = cli("run", "lgl2o.metatrain", "--only", "*-0")
    refused(result, "train-images-idx3-ubyte is damaged", "sha256")
    assert files(toy_table) == before
