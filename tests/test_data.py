"""Data sets and batch streams."""

import math
import shutil
import subprocess
import sys
import urllib.error
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l2olib import data
from l2olib.data import DataError, train_indices, valid_indices

SHAPES = {
    "mnist": (60000, 10000, (1, 28, 28), 10),
    "fashion-mnist": (60000, 10000, (1, 28, 28), 10),
    "cifar10": (50000, 10000, (3, 32, 32), 10),
    "tiny-imagenet-50": (25000, 2500, (3, 64, 64), 50),
    "tiny-imagenet-50-32": (25000, 2500, (3, 32, 32), 50),
    "wikitext-2-4096x32": (65269, 7674, (32,), 4096),
    "wikitext-2-4096x64": (32634, 3837, (64,), 4096),
    "wikitext-2-32100x32": (65269, 7674, (32,), 32100),
    "wikitext-2-32100x128": (16317, 1918, (128,), 32100),
    "circles": (5000, 5000, (2,), 2),
    "moons": (5000, 5000, (2,), 2),
    "spirals": (5000, 5000, (2,), 2),
    "normals": (5000, 5000, (2,), 1),
    "digits": (1437, 360, (1, 8, 8), 10),
    "digits28": (1437, 360, (1, 28, 28), 10),
    "digits64": (1437, 360, (1, 64, 64), 10),
    "descriptions-256x16": (320, 80, (16,), 256),
}
TEXTS = [name for name in SHAPES if name.startswith(("wikitext", "descriptions"))]
# Only arrays made of integers: the last bit of a sine may differ between machines.
CHECKSUMS = {
    "mnist": "161dcace219dfb88ab6f7453772016287aca31a8e383c4e7092f4db60aad5f66",
    "fashion-mnist": "0547ee30173247dea0fe230d2eb0d0ae6baf4d83e3c3f9cc2ae179f9f863c77f",
    "cifar10": "7fe3b7e5240380a5e9b18cb8387acdbf55cb6e7e22945ce80790286cae454f98",
    "digits": "f1af8eb648deac8e802551163d1b41f5e12ff59b07e22aec2242c876f179d483",
    "digits28": "ef8d574d95737e5be761921b3f610a4494514739f6c271271e90e8758f19fd34",
    "digits64": "257a6916d2e0b912d01e5f89c0ef46d00ab28fd07bd0f5204c34acc6f12182b0",
}
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="no CUDA device"
            ),
        ),
    ],
)


def real(name: str) -> data.DataSet:
    """Load a data set, or skip the test visibly where its files are absent."""
    try:
        return data.load(name, download=False)
    except DataError as error:
        if "is missing" in str(error):
            pytest.skip(str(error))
        raise


def raw(*needs: str) -> Path:
    """Return the data folder that holds all `needs`, or skip."""
    for folder in data._folders(None):
        if all((folder / need).exists() for need in needs):
            return folder.resolve()  # for links, wherever the tests were started
    pytest.skip(f"{', '.join(needs)} not in the data folder")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Forget loaded sets and hide the shared folder and the data folders."""
    monkeypatch.setattr(data, "_loaded", {})
    monkeypatch.setenv("L2OLIB_SHARED_DATA", str(tmp_path / "no-shared"))
    monkeypatch.setenv("L2OLIB_DATA", str(tmp_path / "from-env"))
    (tmp_path / "repository").mkdir()
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path / "repository"))
    return tmp_path


# ---------------------------------------------------------------- the hash


def slow_hash(item: int, stream: int, seed: int, epoch: int) -> int:
    """Recompute the item hash with unbounded integers and the published constants."""
    word = 0
    for value in (stream, seed, epoch):
        word = ((word ^ value) + 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
    h = item ^ (word % 2**32)
    for add in (word >> 32, None):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        h ^= h >> 16
        if add is not None:
            h = (h + add) % 2**32
    return h


def test_hash_equals_unbounded_integers_at_the_ends_of_its_range() -> None:
    items = [0, 1, 2, 59999, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
    for seed, epoch in [(0, 0), (7, 3), (2**63 - 1, 2**40)]:
        fast = data._hash(torch.tensor(items), data._key(1, seed, epoch))
        assert fast.tolist() == [slow_hash(i, 1, seed, epoch) for i in items]


def test_hash_is_one_to_one() -> None:
    h = data._hash(torch.arange(1 << 20), data._key(1, 2, 3))
    assert h.unique().numel() == 1 << 20
    assert h.min() >= 0 and h.max() < 1 << 32


@devices
def test_streams_equal_a_slow_independent_definition(device: str) -> None:
    n, batch, seed = 103, 10, 5
    for epoch in (0, 4):
        order = sorted(range(n), key=lambda i: slow_hash(i, 1, seed, epoch))
        got = train_indices(n, batch, seed, 10 * epoch, 10, device=device)
        assert got.flatten().tolist() == order[:100]
    used = [3, 50, 77]
    order = sorted(range(n), key=lambda i: slow_hash(i, 2, seed, 9))
    got = valid(n, batch, seed, 9, 4, torch.tensor(used), device=device)
    assert got.flatten().tolist() == [i for i in order if i not in used][:40]
    got = valid(n, batch, seed, 9, 4, None, "iid", device=device)
    draws = [slow_hash(j, 3, seed, 9) * n >> 32 for j in range(40)]
    assert got.flatten().tolist() == draws


@devices
def test_golden_indices(device: str) -> None:
    """A change of the hash would silently change every result: notice it here."""

    def first(got: Tensor) -> list[int]:
        assert got.dtype == torch.int64 and got.device.type == device
        return got[0].tolist()

    def train(*args: int) -> list[int]:
        return first(train_indices(*args, device=device))

    assert train(60000, 8, 0, 0, 1) == [
        *(11792, 14191, 21745, 12259, 33692, 42579, 20288, 21933)
    ]
    assert train(60000, 8, 0, 15003, 1) == [
        *(9293, 25395, 42384, 25082, 54909, 25043, 49219, 14108)
    ]
    assert train(100, 8, 7, 27, 1) == [14, 1, 42, 32, 84, 85, 31, 54]
    assert first(valid(60000, 8, 0, 5, 1, None, device=device)) == [
        *(48429, 4593, 46767, 18435, 32338, 47620, 11389, 43440)
    ]
    assert first(valid(60000, 8, 0, 5, 1, None, "iid", device=device)) == [
        *(55407, 27183, 32066, 44585, 3174, 23556, 47513, 39088)
    ]


def valid(n, batch, seed, decision, n_c, used, mode="disjoint", device="cpu") -> Tensor:
    """Return the validation batches of one decision."""
    used = None if used is None else used[None]
    draws = [(seed, decision)]
    return valid_indices(n, batch, draws, n_c, used, mode, device=device)[0]


# ---------------------------------------------------------------- training stream


def test_an_epoch_is_a_shuffle_without_its_remainder() -> None:
    n, batch = 1003, 25
    epochs = [train_indices(n, batch, 1, 40 * e, 40) for e in range(3)]
    for epoch in epochs:
        assert epoch.shape == (40, 25)
        assert epoch.unique().numel() == 1000
        assert epoch.min() >= 0 and epoch.max() < n
    assert not torch.equal(epochs[0], epochs[1])
    assert set(epochs[0].flatten().tolist()) != set(epochs[1].flatten().tolist())


def test_training_batches_do_not_depend_on_how_they_are_asked_for() -> None:
    n, batch, seed = 500, 32, 3
    whole = train_indices(n, batch, seed, 0, 50)
    data._epoch.cache_clear()
    for cuts in [(0, 1, 50), (0, 14, 15, 16, 31, 50), (0, 49, 50)]:
        pieces = [train_indices(n, batch, seed, a, b - a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(train_indices(n, batch, seed, 47, 2), whole[47:49])
    assert train_indices(n, batch, seed, 5, 0).shape == (0, 32)


def test_writing_into_a_result_leaves_the_stream_alone() -> None:
    first = train_indices(500, 32, 3, 0, 1)
    first.zero_()
    assert train_indices(500, 32, 3, 0, 1).any()


def test_seeds_epochs_and_streams_differ() -> None:
    n = 2000
    orders = {
        "train 0": train_indices(n, n, 0, 0, 1),
        "train 0, epoch 1": train_indices(n, n, 0, 1, 1),
        "train 1": train_indices(n, n, 1, 0, 1),
        "valid 0": valid(n, n, 0, 0, 1, None),
        "valid 0, decision 1": valid(n, n, 0, 1, 1, None),
        "valid 1": valid(n, n, 1, 0, 1, None),
    }
    ranks = torch.stack([o[0].argsort().double() for o in orders.values()])
    correlation = torch.corrcoef(ranks) - torch.eye(len(orders))
    assert correlation.abs().max() < 4 / math.sqrt(n)


def chi_square(counts: Tensor) -> float:
    """Return the statistic's distance from its mean in standard deviations."""
    expected = counts.double().mean()
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def test_every_item_is_equally_likely_at_every_position() -> None:
    n, epochs = 40, 4000
    orders = train_indices(n, n, 11, 0, epochs)
    cells = (torch.arange(n) * n + orders).flatten().bincount(minlength=n * n)
    assert abs(chi_square(cells)) < 4
    # Neighbours too: a fixed mixing of item and key would make pairs recur.
    pairs = (orders[:, :-1] * n + orders[:, 1:]).flatten().bincount(minlength=n * n)
    off_diagonal = ~torch.eye(n, dtype=torch.bool).flatten()
    assert abs(chi_square(pairs[off_diagonal])) < 4


def test_every_item_is_equally_likely_for_every_seed() -> None:
    n, seeds = 1000, 500
    first = torch.cat([train_indices(n, 20, seed, 0, 1) for seed in range(seeds)])
    assert abs(chi_square(first.flatten().bincount(minlength=n))) < 4


# ---------------------------------------------------------------- validation stream


def test_validation_items_are_distinct_and_unused() -> None:
    n, batch, n_t, n_c = 1437, 32, 10, 10
    for decision in range(5):
        used = train_indices(n, batch, 0, n_t * decision, n_t)
        got = valid(n, batch, 0, decision, n_c, used)
        assert got.shape == (n_c, batch)
        assert got.unique().numel() == n_c * batch
        assert not torch.isin(got, used).any()


def test_used_items_are_only_removed_from_the_validation_order() -> None:
    n, batch = 900, 30
    used = train_indices(n, batch, 4, 0, 10)
    everything = valid(n, batch, 4, 2, 30, None).flatten()
    kept = everything[~torch.isin(everything, used)]
    got = valid(n, batch, 4, 2, 20, used)
    assert torch.equal(got.flatten(), kept)
    again = torch.cat([used, used]).flatten().flip(0)
    assert torch.equal(valid(n, batch, 4, 2, 20, again), got)
    assert torch.equal(valid(n, batch, 4, 2, 3, used), got[:3])
    nothing = torch.empty(0, 30, dtype=torch.int64)
    assert torch.equal(valid(n, batch, 4, 2, 30, nothing).flatten(), everything)


def test_validation_items_are_uniform_over_the_unused() -> None:
    n = 200
    used = torch.arange(0, n, 2)
    draws = torch.cat([valid(n, 5, 8, d, 2, used) for d in range(2000)])
    counts = draws.flatten().bincount(minlength=n)
    assert counts[used].sum() == 0
    assert abs(chi_square(counts[1::2])) < 4


def test_iid_is_uniform_and_repeats_items() -> None:
    n = 300
    got = torch.cat([valid(n, 50, 2, d, 40, None, "iid") for d in range(30)])
    assert abs(chi_square(got.flatten().bincount(minlength=n))) < 4
    assert got.min() == 0 and got.max() == n - 1
    distinct = got.view(-1, n)[:200].sort(1).values.diff(dim=1).ne(0).sum(1) + 1
    # n draws with replacement hit n (1 - 1/e) distinct items on average.
    assert abs(distinct.double().mean() / n - (1 - math.exp(-1))) < 0.005
    neighbours = (got[:, :-1] // 30 * 10 + got[:, 1:] // 30).flatten().bincount()
    assert neighbours.numel() == 100 and abs(chi_square(neighbours)) < 4


def test_iid_ignores_what_was_used_and_may_exceed_the_set() -> None:
    used = torch.arange(100)
    free = valid(100, 100, 0, 3, 7, None, "iid")
    assert free.shape == (7, 100)
    assert torch.equal(valid(100, 100, 0, 3, 7, used, "iid"), free)


@devices
@pytest.mark.parametrize("mode", ["disjoint", "iid"])
def test_several_decisions_at_once_are_drawn_as_one_by_one(mode, device) -> None:
    n, draws = 1437, [(0, 0), (0, 7), (3, 7), (3, 0)]
    used = torch.stack([train_indices(n, 32, s, 10 * d, 10) for s, d in draws])
    got = valid_indices(n, 32, draws, 4, used, mode, device=device).cpu()
    for row, (seed, decision), own in zip(got, draws, used, strict=True):
        assert torch.equal(row, valid(n, 32, seed, decision, 4, own, mode))
    assert len({tuple(row.flatten().tolist()) for row in got}) == 4


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: train_indices(10, 11, 0, 0, 1), "batch of 11 does not fit into 10"),
        (lambda: train_indices(10, 0, 0, 0, 1), "batch is 0"),
        (lambda: train_indices(0, 1, 0, 0, 1), "n is 0"),
        (lambda: train_indices(10, 5, -1, 0, 1), "seed is -1"),
        (lambda: train_indices(10, 5, 0.5, 0, 1), "seed is 0.5"),
        (lambda: train_indices(10, 5, 0, -1, 1), "start is -1"),
        (lambda: train_indices(10, 5, 0, 0, -2), "count is -2"),
        (lambda: valid(10, 5, 0, 0, 0, None), "n_c is 0"),
        (lambda: valid(10, 5, 0, -1, 1, None), "decision is -1"),
        (lambda: valid(10, 5, 0, 0, 1, None, "fresh"), "mode is 'fresh'"),
        (lambda: valid(10, 5, 0, 0, 3, None), 'draw with replacement, mode "iid"'),
        (
            lambda: valid(10, 5, 0, 0, 2, torch.tensor([4])),
            "need 10 unused items, but only 9 of 10",
        ),
        (lambda: valid(10, 5, 0, 0, 1, torch.tensor([10])), "outside 0 .. 9"),
        (lambda: valid(10, 5, 0, 0, 1, torch.tensor([-1])), "outside 0 .. 9"),
        (
            lambda: valid(10, 5, 0, 0, 1, torch.ones(10, dtype=torch.bool)),
            "used is torch.bool",
        ),
        (
            lambda: valid_indices(10, 5, [(0, 0)] * 3, 1, torch.ones(2, 1).long()),
            "used has 2 rows: it must have one for each of the 3 draws",
        ),
        (lambda: data.load("imagenet"), "no data set 'imagenet': choose from mnist"),
        (lambda: data.fetch(["imagenet"]), "no data set 'imagenet' to fetch"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(call, says: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- data sets


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.realdata) if name in data._FILES else name
        for name in SHAPES
    ],
)
def test_shapes_ranges_and_classes(name: str) -> None:
    assert data.names() == list(SHAPES)
    loaded = real(name)
    n_train, n_test, item, classes = SHAPES[name]
    assert (loaded.name, loaded.classes) == (name, classes)
    assert (len(loaded.train), len(loaded.test)) == (n_train, n_test)
    for split in (loaded.train, loaded.test):
        assert split.x.shape == (len(split), *item)
        assert split.x.is_contiguous() and split.y.dtype == torch.int64
        if name in TEXTS:
            assert split.x.dtype == torch.int64 and split.y.shape == split.x.shape
            assert 0 == split.x.min() and split.x.max() < classes
            continue
        counts = split.y.bincount()
        assert counts.numel() == classes
        if name == "mnist" or "digits" in name:  # the only unbalanced ones
            assert counts.min() > 0.85 * len(split) / classes
        else:
            assert counts.unique().numel() == 1
        if len(item) == 3:
            assert split.x.dtype == torch.uint8
            assert split.x.min() == 0 and split.x.max() == 255
        else:
            assert split.x.dtype == torch.float32 and split.x.isfinite().all()
    if name in TEXTS:  # no word of the vocabulary is missing from the training text
        assert loaded.train.y.unique().numel() == classes
    assert data.load(name, download=False) is loaded
    if name in CHECKSUMS:
        assert loaded.checksum == CHECKSUMS[name]


@pytest.mark.realdata
def test_channels_come_first_in_cifar10() -> None:
    """Compare with the stored rows: 1,024 red, then green, then blue values."""
    loaded = real("cifar10")
    folder = raw("cifar-10-batches-py/test_batch")
    stored = (folder / "cifar-10-batches-py" / "test_batch").read_bytes()
    assert loaded.test.x[0].numpy().tobytes() in stored


@pytest.mark.realdata
def test_tiny_imagenet_pictures_and_labels_match_their_files() -> None:
    from PIL import Image

    loaded = real("tiny-imagenet-50")
    folder = raw("tiny-imagenet-50/val") / "tiny-imagenet-50"
    wnids = sorted(p.name for p in (folder / "val").iterdir())
    for split, name in ((loaded.train, "train"), (loaded.test, "val")):
        for item in (0, len(split) // 3, len(split) - 1):
            label = int(split.y[item])
            files = sorted((folder / name / wnids[label]).glob("*.JPEG"))
            position = item - int((split.y < label).sum())
            with Image.open(files[position]) as picture:
                expected = np.asarray(picture.convert("RGB"))
            assert (split.x[item].permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.realdata
def test_the_smaller_tiny_imagenet_holds_means_of_four_pixels() -> None:
    """The same pictures, of one class at least, in an order that mixes the classes."""
    large, small = real(data._TINY), real(f"{data._TINY}-32")
    for whole, half in ((large.train, small.train), (large.test, small.test)):
        assert torch.equal(whole.y.bincount(), half.y.bincount())
        assert len(half.y[:200].unique()) > 40 > len(whole.y[:200].unique())
        mean = F.avg_pool2d(whole.x[whole.y == 7].double(), 2)
        expected = (mean + 0.5).floor().to(torch.uint8).flatten(1).unique(dim=0)
        assert torch.equal(half.x[half.y == 7].flatten(1).unique(dim=0), expected)


def test_words_are_numbered_by_frequency_and_cut_into_items() -> None:
    words = data._words("b a <unk> a\n\nc b  a\n")
    assert words == ["b", "a", "<unk>", "a", "<eos>", "<eos>", "c", "b", "a", "<eos>"]
    train, test, classes = data._language(words, ["a", "d", "c", "a"], 4, 2)
    # <eos> and a: three times; b: twice; c does not fit into four words.
    number = {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 0}
    tokens = [number[word] for word in words]
    assert classes == 4
    assert train.x.flatten().tolist() == tokens[:8]
    assert train.y.flatten().tolist() == tokens[1:9]
    assert train.x.shape == train.y.shape == (4, 2)
    assert (test.x.tolist(), test.y.tolist()) == ([[2, 0]], [[0, 0]])


@pytest.mark.realdata
def test_wikitext_is_the_published_text() -> None:
    """Counts of the set's readme, and its first words."""
    loaded = real("wikitext-2-32100x128")
    folder = raw("text/wikitext-2") / "text" / "wikitext-2"
    words = data._words((folder / "train.txt").read_text(encoding="utf-8"))
    assert len(words) == 2_051_910 + 36_718
    assert len(set(words)) == 33_277 + 1  # and the end of a line
    assert words[:7] == ["<eos>", "=", "Valkyria", "Chronicles", "III", "=", "<eos>"]
    [(first, count)] = Counter(words).most_common(1)
    assert first == "the" and count == (loaded.train.y == 1).sum().item()


@pytest.mark.realdata
def test_damaged_text_is_refused_by_name(tmp_path: Path) -> None:
    source = raw("text/wikitext-2") / "text" / "wikitext-2"
    shutil.copytree(source, tmp_path / "text" / "wikitext-2")
    flip(tmp_path / "text" / "wikitext-2" / "test.txt", 1000)
    with pytest.raises(DataError, match=r"test\.txt is damaged \(sha256") as caught:
        data.load("wikitext-2-4096x32", root=tmp_path, download=False)
    assert "python -m l2olib data wikitext-2-4096x32" in str(caught.value)


def test_a_download_that_is_damaged_is_refused_with_advice(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(folder: Path) -> None:
        (folder / "text" / "wikitext-2").mkdir(parents=True)
        for file in data._WIKITEXT_FILES:
            (folder / "text" / "wikitext-2" / file).write_text("half of it")

    (fresh / "from-env").mkdir()
    name = "wikitext-2-4096x32"
    broken = replace(data._FILES[name], download=download)
    monkeypatch.setitem(data._FILES, name, broken)
    with pytest.raises(DataError, match=r"train\.txt is damaged") as caught:
        data.load(name)
    assert f"delete it and run `python -m l2olib data {name}`" in str(caught.value)


def test_point_sets_have_the_published_geometry() -> None:
    circles, moons, spirals = map(data.load, ("circles", "moons", "spirals"))
    for split in (circles.train, circles.test):
        radius = split.x.norm(dim=1)
        for label, expected in ((0, 1.0), (1, 0.5)):
            assert abs(radius[split.y == label].mean() - expected) < 0.01
            assert abs(radius[split.y == label].std() - 0.05) < 0.005
    for split in (moons.train, moons.test):
        centre = torch.where(
            split.y[:, None] == 0, torch.zeros(2), torch.tensor([1.0, 0.5])
        )
        distance = (split.x - centre).norm(dim=1)
        assert abs(distance.mean() - 1) < 0.02 and abs(distance.std() - 0.1) < 0.01
    for split in (spirals.train, spirals.test):
        assert split.x.abs().max() < 1.1
        # Turning each item back by its angle t = 4 pi r must lay each arm on a ray.
        radius = split.x.double().norm(dim=1)
        angle = torch.atan2(split.x[:, 1], split.x[:, 0]) - 4 * torch.pi * radius
        outer = radius > 0.5
        for label, side in ((0, 1.0), (1, -1.0)):
            along = torch.cos(angle[outer & (split.y == label)])
            assert (side * along).mean() > 0.9
        # t = 4 pi sqrt(u) spreads the items evenly over the disc's area.
        assert abs((radius**2).mean() - 0.5) < 0.02
    normals = data.load("normals")
    for split in (normals.train, normals.test):
        assert split.x.mean(0).abs().max() < 1e-6
        assert (split.x.T @ split.x / 5000 - torch.eye(2)).abs().max() < 0.05
    for loaded in (circles, moons, spirals, normals):
        assert not torch.equal(loaded.train.x, loaded.test.x)


@pytest.mark.parametrize("size", [28, 64])
def test_digits_keep_their_grey_levels_and_resample_bilinearly(size: int) -> None:
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images)
    small, large = data.load("digits"), data.load(f"digits{size}")
    joined = torch.cat([small.train.x, small.test.x])[:, 0]
    assert torch.equal(joined, (grey * 255 / 16 + 0.5).floor().to(torch.uint8))
    assert torch.equal(large.test.y, small.test.y)
    expected = F.interpolate(
        grey[:, None] * 255 / 16,
        size=(size, size),
        mode="bilinear",
        align_corners=False,
    )
    joined = torch.cat([large.train.x, large.test.x])
    assert (joined.double() - expected).abs().max() <= 0.5 + 1e-9


# ---------------------------------------------------------------- items


def test_items_are_scaled_images_of_any_index_shape() -> None:
    split = data.load("digits").train
    idx = train_indices(len(split), 4, 0, 0, 6).view(2, 3, 4)
    x, y = split.items(idx)
    assert x.shape == (2, 3, 4, 1, 8, 8) and x.dtype == torch.float32
    assert x.min() == 0 and x.max() == 1
    assert torch.equal(y, split.y[idx])
    exact, _ = split.items(idx, torch.float64)
    assert torch.equal(exact, split.x[idx].double() / 255)
    assert split.items(torch.tensor(3))[0].shape == (1, 8, 8)


def test_items_leave_points_unscaled_and_text_whole() -> None:
    points = data.load("circles").train
    x, _ = points.items(torch.tensor([5, 2]), torch.float64)
    assert torch.equal(x, points.x[[5, 2]].double())
    text = data.Split(torch.arange(12).view(4, 3), torch.arange(1, 13).view(4, 3))
    x, y = text.items(torch.tensor([3]))
    assert x.dtype == torch.int64 and x.tolist() == [[9, 10, 11]]
    assert y.tolist() == [[10, 11, 12]] and len(text) == 4


@devices
@pytest.mark.parametrize("name", ["digits", "spirals", "descriptions-256x16"])
def test_batched_indices_under_vmap_equal_a_loop(name: str, device: str) -> None:
    split = data.load(name, device=device).train
    idx = torch.stack(
        [train_indices(len(split), 16, s, 0, 1, device=device)[0] for s in range(5)]
    )
    x, y = torch.func.vmap(split.items)(idx)
    loop = [split.items(one) for one in idx]
    assert torch.equal(x, torch.stack([a for a, _ in loop]))
    assert torch.equal(y, torch.stack([b for _, b in loop]))
    assert x.device.type == device


def test_moving_a_data_set_keeps_its_name_and_checksum() -> None:
    loaded = data.load("digits")
    moved = loaded.to("meta")
    assert moved.train.x.device.type == moved.test.y.device.type == "meta"
    assert (moved.name, moved.classes) == (loaded.name, loaded.classes)
    assert moved.checksum == loaded.checksum and len(moved.train) == 1437
    assert loaded.train.x.device.type == "cpu"


def test_the_checksum_notices_values_labels_shape_and_order() -> None:
    split = data.load("digits").train
    changed = split.x.clone()
    changed[700, 0, 3, 3] ^= 1
    variants = [
        (split, split),
        (data.Split(changed, split.y), split),
        (data.Split(split.x.view(-1, 1, 64), split.y), split),
        (data.Split(split.x, split.y.flip(0)), split),
        (split, data.Split(changed, split.y)),
    ]
    assert len({data._checksum(*v) for v in variants}) == len(variants)


# ---------------------------------------------------------------- files


def copy_idx(name: str, to: Path) -> Path:
    source = raw(*(f"{name}/raw/{file}" for file in data._IDX[name])) / name / "raw"
    target = to / name / "raw"
    target.mkdir(parents=True)
    for file in data._IDX[name]:
        shutil.copy(source / file, target / file)
    return target


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def truncate(path: Path, _: int) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.realdata
@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("mnist", "MNIST", "train-images-idx3-ubyte"),
        ("mnist", "MNIST", "t10k-labels-idx1-ubyte"),
        ("fashion-mnist", "FashionMNIST", "train-labels-idx1-ubyte"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(
    tmp_path: Path, name, folder, file, damage
) -> None:
    target = copy_idx(folder, tmp_path)
    damage(target / file, 5000)
    with pytest.raises(DataError) as caught:
        data.load(name, root=tmp_path, download=False)
    said = str(caught.value)
    assert str(target / file) in said and data._IDX[folder][file] in said
    assert f"python -m l2olib data {name}" in said and "\n" not in said


@pytest.mark.realdata
def test_an_intact_copy_is_read_and_an_old_format_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_idx("MNIST", tmp_path)
    (tmp_path / "MNIST" / "processed").mkdir()
    with pytest.raises(DataError, match="processed is an old format"):
        data.load("mnist", root=tmp_path, download=False)
    (tmp_path / "MNIST" / "processed").rmdir()
    loaded = data.load("mnist", root=tmp_path, download=False)
    assert loaded.checksum == CHECKSUMS["mnist"]
    # The environment's folder comes before the repository's.
    monkeypatch.setattr(data, "_loaded", {})
    monkeypatch.setenv("L2OLIB_DATA", str(tmp_path))
    flip(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte", 99)
    with pytest.raises(DataError, match="t10k-images"):
        data.load("mnist", download=False)


@pytest.mark.realdata
def test_a_damaged_cifar10_file_is_refused_by_name(tmp_path: Path) -> None:
    source = raw("cifar-10-batches-py/batches.meta") / "cifar-10-batches-py"
    target = tmp_path / "cifar-10-batches-py"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    bad = target / "data_batch_3"
    content = bytearray(bad.read_bytes())
    content[10**7] ^= 1
    bad.unlink()
    bad.write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.load("cifar10", root=tmp_path, download=False)
    assert f"{bad} is damaged" in str(caught.value)


@pytest.mark.slow
@pytest.mark.realdata
def test_damaged_tiny_imagenet_pictures_are_refused(tmp_path: Path) -> None:
    source = raw("tiny-imagenet-50/train", "tiny-imagenet-50/val") / "tiny-imagenet-50"
    folder = tmp_path / "tiny-imagenet-50"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for wnid in (source / split).iterdir():
            (folder / split / wnid.name).symlink_to(wnid)
    first = min((folder / "train").iterdir())
    first.unlink()
    shutil.copytree(source / "train" / first.name, first)
    victim = min(first.iterdir())
    original = victim.read_bytes()

    def said() -> str:
        with pytest.raises(DataError) as caught:
            data.load("tiny-imagenet-50", root=tmp_path, download=False)
        return str(caught.value)

    victim.unlink()
    assert "train holds 24999 pictures instead of 25000" in said()
    victim.write_bytes(original[:500])
    assert f"{victim} is damaged" in said()
    victim.write_bytes(original + b"\0")  # still decodes to the same picture
    assert "damaged or foreign picture" in said()
    assert not (folder / "pixels.npz").exists()


def test_decoded_pictures_are_kept_only_if_intact(tmp_path: Path) -> None:
    arrays = {"val_x": np.arange(6, dtype=np.uint8), "val_y": np.arange(6)}
    cache = tmp_path / "pixels.npz"
    assert data._read_pixels(cache) is None
    np.savez(cache, digest=np.asarray(data._pixel_digest(arrays)), **arrays)
    assert (data._read_pixels(cache)["val_x"] == arrays["val_x"]).all()
    wrong = {**arrays, "val_y": arrays["val_y"] + 1}
    np.savez(cache, digest=np.asarray(data._pixel_digest(arrays)), **wrong)
    assert data._read_pixels(cache) is None
    np.savez(cache, **arrays)
    assert data._read_pixels(cache) is None
    cache.write_bytes(cache.read_bytes()[:200])
    assert data._read_pixels(cache) is None


def test_the_full_tiny_imagenet_archive_gives_fifty_classes(tmp_path: Path) -> None:
    top = "tiny-imagenet-200"
    wnids = [f"n{k:08d}" for k in range(200)]
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr(f"{top}/wnids.txt", "\n".join(reversed(wnids)) + "\n")
        rows = []
        for k, wnid in enumerate(wnids):
            z.writestr(f"{top}/train/{wnid}/images/{wnid}_0.JPEG", f"train {wnid}")
            z.writestr(f"{top}/train/{wnid}/{wnid}_boxes.txt", "")
            z.writestr(f"{top}/val/images/val_{k}.JPEG", f"val {wnid}")
            z.writestr(f"{top}/test/images/test_{k}.JPEG", "test")
            rows.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t9\t9\n")
        z.writestr(f"{top}/val/val_annotations.txt", "".join(rows))
    data._extract_tiny(archive, tmp_path / "out")
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(written) == 100
    assert {p.parts[-3] for p in written} == {"train", "val"}
    assert len({p.parent.name for p in written}) == 50
    assert all(p.read_text() == f"{p.parts[-3]} {p.parent.name}" for p in written)


# ---------------------------------------------------------------- fetching


@pytest.mark.parametrize(
    "name", ["mnist", "fashion-mnist", "cifar10", data._TINY, "wikitext-2-4096x32"]
)
def test_missing_data_says_what_to_do(fresh: Path, name: str) -> None:
    (fresh / "from-env").mkdir()
    with pytest.raises(DataError) as caught:
        data.load(name, download=False)
    said = str(caught.value)
    assert f"data set {name!r} is missing" in said
    assert data._FILES[name].needs[0] in said
    assert f"python -m l2olib data {name}" in said
    assert str(fresh / "from-env") in said
    assert str(fresh / "repository" / "data" / "raw") in said
    texts = dict.fromkeys(TEXTS, "descriptions-256x16")
    stand_in = (texts | {data._TINY: "digits64"}).get(name, "digits28")
    assert f"{stand_in!r}" in said and "\n" not in said


def test_a_mistyped_data_folder_is_not_made(fresh: Path) -> None:
    """Nor is the download begun that would fill it."""
    with pytest.raises(DataError, match="no folder: create it, or unset L2OLIB_DATA"):
        data.load("mnist")
    assert not (fresh / "from-env").exists()


def test_an_explicit_folder_is_the_only_one_looked_in(fresh: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.load("mnist", root=fresh / "here", download=False)
    assert str(fresh / "here") in str(caught.value)
    assert "from-env" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["mnist", "fashion-mnist", "cifar10", data._TINY, "wikitext-2-4096x32"]
)
def test_without_a_network_nothing_stands_in(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(DataError) as caught:
        data.load(name, root=fresh / "here")
    said = str(caught.value)
    assert "is missing" in said and f"downloading {name!r} failed" in said
    assert "name or service not known" in said and "\n" not in said
    with pytest.raises(DataError, match="failed"):
        data.fetch([name], fresh / "here")


def fake_shared(folder: Path, body: str) -> None:
    folder.mkdir(parents=True)
    (folder / "unpack.py").write_text(
        f"import pathlib, sys\nout = pathlib.Path(sys.argv[2])\n{body}"
    )


def test_fetch_unpacks_from_a_shared_folder_beside_the_repository(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("L2OLIB_SHARED_DATA")
    fake_shared(
        fresh / "shared" / "data",
        "out.mkdir(parents=True)\n(out / 'asked').write_text(' '.join(sys.argv[3:]))",
    )
    assert data.fetch(["fashion-mnist", data._TINY], fresh / "a") == fresh / "a"
    assert (fresh / "a" / "asked").read_text() == "fashion tiny"
    assert data.fetch() == fresh / "from-env"
    assert (
        fresh / "from-env" / "asked"
    ).read_text() == "mnist fashion cifar10 tiny text"
    # Sets that are computed need no files.
    data.fetch(["spirals"], fresh / "b")
    assert not (fresh / "b").exists()


def test_a_failing_unpack_says_why(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2OLIB_SHARED_DATA", str(fresh / "elsewhere"))
    fake_shared(fresh / "elsewhere", "sys.exit('MD5 mismatch: data_batch_1')")
    with pytest.raises(DataError, match=r"unpack\.py failed: MD5 mismatch"):
        data.load("cifar10", root=fresh / "here")


@pytest.mark.realdata
def test_missing_files_are_unpacked_on_first_use(tmp_path: Path) -> None:
    if data._shared() is None:
        pytest.skip("no shared/data folder beside the repository")
    loaded = data.load("mnist", root=tmp_path / "new")
    assert loaded.checksum == CHECKSUMS["mnist"]


def test_the_root_is_found_from_the_working_folder_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))
    assert data.find_root() == tmp_path.resolve()
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path / "none"))
    with pytest.raises(DataError, match="none, where there is no folder"):
        data.find_root()
    monkeypatch.delenv("L2OLIB_ROOT")
    repository = tmp_path / "repository"
    (repository / "src" / "l2olib").mkdir(parents=True)
    (repository / "book").mkdir()
    monkeypatch.setattr(data, "__file__", str(tmp_path / "site" / "data.py"))
    monkeypatch.chdir(repository / "book")
    with pytest.raises(DataError, match="set L2OLIB_ROOT"):
        data.find_root()
    (repository / "_toc.yml").touch()
    assert data.find_root() == repository.resolve()


def test_importing_the_module_is_cheap() -> None:
    """Data-set libraries are imported by the loaders that need them."""
    code = (
        "import sys, l2olib.data;"
        "print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
