"""Records: what the digest covers, atomic files, refusals that name file and reason."""

import json
import math
import random
from dataclasses import dataclass

import pytest
import torch
from problems import random_numbers

from l2olib import records
from l2olib.optimizers import SGD, PowerDecay
from l2olib.records import Record, RecordError, digest, flatten, spec, unflatten

CONFIG = {"experiment": "test", "seeds": [0, 1], "work": {"lr": 0.1, "name": "ü"}}
FACTS = {"device": "cpu", "seconds": 1.5, "claims": {"B2": "abc"}}


def arrays() -> dict[str, torch.Tensor]:
    return {
        "loss": random_numbers(0, 3, 4).float(),
        "double": random_numbers(1, 5),
        "use": torch.tensor([[0, 1, 1]], dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "steps": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "bad": torch.tensor([math.nan, math.inf]),
    }


@pytest.fixture(params=["run.safetensors", "run.safetensors.gz"])
def saved(request, tmp_path):
    path = tmp_path / "folder" / request.param
    Record(CONFIG, arrays(), FACTS).save(path)
    return path


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and torch.equal(a[k].nan_to_num(7.0), b[k].nan_to_num(7.0))
        for k in a
    )


def test_round_trip(saved):
    record = Record.load(saved, CONFIG)
    assert same(record.arrays, arrays())
    assert (record.config, record.provenance) == (CONFIG, FACTS)
    assert record.digest == digest(CONFIG, arrays())


# ---- the digest ----------------------------------------------------------------------


def test_the_digest_covers_configuration_and_arrays():
    base = Record(CONFIG, arrays(), FACTS).digest
    assert Record(CONFIG, arrays(), {"device": "cuda"}).digest == base
    reordered = dict(reversed(CONFIG.items()))
    assert Record(reordered, dict(reversed(arrays().items())), FACTS).digest == base
    strided = arrays() | {"loss": arrays()["loss"].T.contiguous().T}
    assert Record(CONFIG, strided, FACTS).digest == base
    one, column = torch.tensor([2.5]), torch.tensor([[1.0, 2.5]])[:, -1]
    assert digest(CONFIG, {"x": column}) == digest(CONFIG, {"x": one})


@pytest.mark.parametrize(
    "change",
    [
        {"loss": random_numbers(0, 3, 4).float().nextafter(torch.tensor(9.0))},
        {"loss": random_numbers(0, 3, 4).float().reshape(4, 3)},
        {"double": random_numbers(1, 5).view(torch.int64)},
        {"scalar": torch.tensor([2.5])},
        {"scalar": torch.tensor(-2.5)},
        {"new": torch.zeros(0)},
    ],
)
def test_the_digest_sees_every_change_of_an_array(change):
    assert digest(CONFIG, arrays() | change) != digest(CONFIG, arrays())


def test_the_digest_sees_every_change_of_the_configuration():
    others = [
        CONFIG | {"seeds": [1, 0]},
        CONFIG | {"experiment": "tesu"},
        CONFIG | {"work": CONFIG["work"] | {"lr": 0.1 + 1e-17 + 2e-17}},
        CONFIG | {"more": None},
    ]
    digests = {digest(c, arrays()) for c in [*others, CONFIG]}
    assert len(digests) == len(others) + 1


def test_names_and_bytes_cannot_be_exchanged():
    one = {"a": torch.tensor([1, 2], dtype=torch.uint8)}
    two = {"a": torch.tensor([1], dtype=torch.uint8), "b": torch.tensor(2).byte()}
    assert digest({}, one) != digest({}, two)


# ---- configurations ------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    numbers: tuple[int, ...]
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner
    table: dict[str, Inner]
    none: None = None


def test_spec_names_types_and_fields():
    inner = {"type": "Inner", "numbers": [1, 2], "rate": 0.5}
    value = spec(Outer(Inner((1, 2)), {"x": Inner((1, 2))}))
    assert value == {
        "type": "Outer",
        "inner": inner,
        "table": {"x": inner},
        "none": None,
    }
    assert json.loads(records.canonical(value)) == value


def test_spec_tells_optimizers_apart():
    specs = [
        spec(SGD(PowerDecay(1.0))),
        spec(SGD(PowerDecay(1.0), 0.9)),
        spec(SGD(PowerDecay(1.0, tau=2.0))),
    ]
    assert len({records.canonical(s) for s in specs}) == 3


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, object(), {"a": {1, 2}}, torch.zeros(1), Inner]
)
def test_spec_refuses_what_json_cannot_say(value):
    with pytest.raises(TypeError, match="cannot be part of a configuration"):
        spec(value)


def test_a_field_added_later_leaves_older_configurations_as_they_were():
    @dataclass(frozen=True)
    class Work:
        steps: int

    old = spec(Work(3))

    @dataclass(frozen=True)
    class Work:  # noqa: F811
        steps: int
        sample: int = records.later(0)

    assert spec(Work(3)) == spec(Work(3, 0)) == old
    assert spec(Work(3, 2)) == old | {"sample": 2}
    assert Work(3) != Work(3, 2)


# ---- states --------------------------------------------------------------------------


def test_flatten_round_trip():
    state = {
        "a": torch.tensor(1),
        "b": {"c": {"d": torch.zeros(2)}, "e": torch.ones(1)},
        "empty": {},
        "deep": {"empty": {}, "also": {"empty": {}}},
        "looks": {"full_loss": torch.ones(1), "pruned.full_loss": torch.ones(2)},
    }
    flat = flatten(state)
    assert {"a", "b.c.d", "b.e"} < set(flat)
    back = unflatten(flat)

    def names(node):
        return {
            k: names(v) if isinstance(v, dict) else tuple(v.shape)
            for k, v in node.items()
        }

    assert names(back) == names(state)
    assert unflatten(flatten({})) == {}


def test_a_checkpoint_keeps_empty_states(tmp_path):
    path = tmp_path / "state"
    records.write(path, flatten({"a": torch.ones(2), "memory": {}}), {"key": "k"})
    found, metadata = records.read(path)
    assert unflatten(found)["memory"] == {} and metadata == {"key": "k"}


# ---- files ---------------------------------------------------------------------------


def test_outside_of_a_repository(saved, monkeypatch):
    """Files are then named whole, and of the commit nothing is known."""
    monkeypatch.setenv("L2OLIB_ROOT", str(saved / "nowhere"))
    with pytest.raises(RecordError, match=f"{saved.parent}/none.gz does not exist"):
        Record.load(saved.parent / "none.gz")
    assert records.commit.__wrapped__() == "?"


def test_a_missing_file(tmp_path):
    with pytest.raises(RecordError, match="none.safetensors does not exist"):
        Record.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 1, 8, 200, -1])
def test_a_truncated_file_is_refused_by_name(saved, keep):
    damaged = saved.read_bytes()[:keep]
    saved.write_bytes(damaged)
    with pytest.raises(RecordError, match=f"{saved.name} is damaged"):
        Record.load(saved)
    assert saved.read_bytes() == damaged, "it must stay for whoever wants to look"


def test_a_file_that_cannot_be_read_is_not_called_damaged(saved, monkeypatch):
    """What the system withholds may be good: nobody is told to delete it."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    below = saved / "below.safetensors"  # a file where its folder should be
    for path, why in ((saved.parent, "Is a directory"), (below, "Not a directory")):
        with pytest.raises(records.Unreadable, match=f"cannot be read: {why}; check"):
            Record.load(path)
    monkeypatch.setattr(type(saved), "read_bytes", refuse)
    with pytest.raises(RecordError) as refusal:
        Record.load(saved)
    said = str(refusal.value)
    assert f"{saved.name} cannot be read: Permission denied; check its perm" in said
    assert "damaged" not in said and "delete" not in said


def test_a_flipped_bit_never_changes_what_is_read(saved):
    """Anywhere in the file: refused by name, or (in the provenance) no content lost."""
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    if saved.suffix == ".gz":  # its header and checksums cover the whole
        header = len(whole)
    places = [*range(0, header, 3), *range(header, len(whole))]
    refused = 0
    for place in places:
        bit = 1 << random.Random(place).randrange(8)
        saved.write_bytes(
            whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
        )
        try:
            record = Record.load(saved)
        except RecordError as error:
            assert "run.safetensors" in str(error)
            refused += 1
        else:
            assert place < header, "every bit of the arrays is covered"
            assert same(record.arrays, arrays()) and record.config == CONFIG
    assert refused > 0.7 * len(places)


@pytest.mark.parametrize("number", [math.nan, -math.inf])
@pytest.mark.parametrize("part", ["config", "provenance"])
def test_a_number_that_json_has_not_is_damage(part, number, tmp_path):
    path = tmp_path / "run.safetensors"
    record = {"config": CONFIG, "provenance": FACTS, "digest": "0"}
    wrong = record | {part: {"lr": number}}
    with pytest.raises(ValueError, match="JSON"):
        records.write(path, {}, wrong)
    text = {k: json.dumps(v) for k, v in wrong.items()}
    path.write_bytes(records.to_bytes({}, metadata=text))
    with pytest.raises(RecordError, match="run.safetensors is damaged"):
        Record.load(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    records.write(path, arrays(), {"key": "k"})
    with pytest.raises(RecordError, match="other.safetensors is not a record"):
        Record.load(path)
    path.write_text("hello")
    with pytest.raises(RecordError, match="other.safetensors is damaged"):
        Record.load(path)


def test_another_configuration_is_refused_with_the_difference(saved):
    other = CONFIG | {"seeds": [0], "work": CONFIG["work"] | {"lr": 0.2}}
    with pytest.raises(RecordError) as refusal:
        Record.load(saved, other)
    message = str(refusal.value)
    assert f"{saved.name} belongs to another configuration" in message
    assert "differs in seeds, work.lr)" in message
    with pytest.raises(RecordError, match="differs in extra"):
        Record.load(saved, CONFIG | {"extra": 1})
    # Equal numbers of different types are different configurations, too.
    with pytest.raises(RecordError, match=r"differs in seeds\)"):
        Record.load(saved, CONFIG | {"seeds": [0.0, 1]})


def test_writing_is_atomic(saved, monkeypatch):
    """A write that fails half-way leaves the old file, and nothing beside it."""
    before = saved.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(records.os, "fsync", full_disk)
    why = f"{saved.name} cannot be written: no space.*; make its folder writable or"
    with pytest.raises(RecordError, match=why):
        Record(CONFIG, {"loss": torch.zeros(9)}, FACTS).save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_whether_a_file_can_be_written_is_known_before(tmp_path, monkeypatch):
    path = tmp_path / "new" / "deep" / "run.safetensors.gz"
    records.check_writable(path)
    assert not list(tmp_path.iterdir()), "asking leaves nothing behind"
    with pytest.raises(RecordError, match="a folder has this name"):
        records.check_writable(tmp_path)

    def refuse(dir):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(records.tempfile, "TemporaryFile", refuse)
    with pytest.raises(RecordError, match=r"gz cannot be written: Permission denied"):
        records.check_writable(path)


# ---- provenance ----------------------------------------------------------------------


def test_provenance_says_how_a_record_was_made():
    facts = records.provenance(device="cpu", seconds=1.26, compiled=True, profile="x")
    assert facts["seconds"] == 1.3 and facts["compiled"] is True
    assert facts["profile"] == "x" and facts["torch"] == torch.__version__
    assert len(facts["source"]) == 64 and facts["peak_bytes"] > 1e7
    model, _, capability = facts["cpu"].rpartition(", ")
    assert model and capability == torch.backends.cpu.get_cpu_capability()
    json.dumps(facts)


def test_the_provenance_line_joins_records():
    facts = {"profile": "laptop", "commit": "abc", "device": "cpu", "torch": "2"}
    found = [
        Record({"seeds": [k]}, {}, facts | {"seconds": 1800.0, "date": "2026-01-01"})
        for k in (0, 1, 2)
    ]
    line = records.provenance_line(found)
    assert "profile laptop" in line and "3 seeds (0–2)" in line
    assert "3 runs, 1.5 h" in line and line.count("abc") == 1


def test_a_long_provenance_line_counts_commits():
    """And what took seconds does not read as 0 h."""
    found = [Record({}, {}, {"commit": f"c{k}", "seconds": 1.25}) for k in range(8)]
    line = records.provenance_line(found)
    assert "commit c0, c1, c2, c3, c4, c5 and 2 more" in line
    assert "8 runs, 10 s" in line
    assert "1 run, 1.2 s" in records.provenance_line(found[:1])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (90, "1.5 min"),
        (5_400, "1.5 h"),
        (3.6e6, "1,000 h"),
        (6e7, "1.9 years"),
    ],
)
def test_durations(seconds, text):
    assert records.elapsed(seconds) == text
