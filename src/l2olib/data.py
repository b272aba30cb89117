"""Data sets on a device, and the order in which their items are used.

Data sets that come as files are read from the unpacked layout below one data folder and
verified; the others are made here, or come with an installed package.
Batch indices are pure integer functions of their arguments: the same on every device,
after a resume and in any grouping.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import random
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Device = torch.device | str


class DataError(Exception):
    """Say in one sentence which data is missing, damaged or impossible to draw."""


class _Damaged(DataError):
    """Name the file or folder that is not what its publisher gave out."""


class _Unobtainable(DataError):
    """Say why a data set could not be fetched."""


@dataclass(frozen=True, eq=False)
class Split:
    """Hold one split of a data set.

    x: uint8 [N, C, H, W] for images, float32 [N, d] for point sets, int64 [N, T] for
    text; y: int64, classes [N] or, for text, the word after each word of x [N, T].
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.y.shape[0]

    def items(
        self, idx: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Gather the items `idx` [...] as inputs [..., *item] and labels [..., *label].

        Images become `dtype` in [0, 1] (x / 255), point sets `dtype`; text stays
        int64. `idx` may be batched by `torch.func.vmap`.
        """
        x, y = self.x[idx], self.y[idx]
        if x.dtype == torch.uint8:
            return x.to(dtype) / 255, y
        return (x.to(dtype) if x.is_floating_point() else x), y


@dataclass(frozen=True, eq=False)
class DataSet:
    """Hold a data set: two splits, the number of classes, a sha256 over its arrays."""

    name: str
    train: Split
    test: Split
    classes: int
    checksum: str

    def to(self, device: Device) -> DataSet:
        """Return the data set with its arrays on `device`."""
        train, test = (
            Split(split.x.to(device), split.y.to(device))
            for split in (self.train, self.test)
        )
        return replace(self, train=train, test=test)


# ---------------------------------------------------------------- folders


def find_root() -> Path:
    """Return the repository's root: `L2OLIB_ROOT`, else the nearest one above.

    Searches upwards from this file, then from the working folder, for a folder with
    `src/l2olib` and a `pyproject.toml` or `_toc.yml`. Raises DataError if none
    is found, or if `L2OLIB_ROOT` is no folder.
    """
    if os.environ.get("L2OLIB_ROOT"):
        root = Path(os.environ["L2OLIB_ROOT"]).expanduser().resolve()
        if root.is_dir():
            return root
        raise DataError(f"L2OLIB_ROOT is {root}, where there is no folder")
    for start in (Path(__file__).resolve().parent, Path.cwd()):
        for folder in (start, *start.parents):
            marked = any((folder / m).exists() for m in ("pyproject.toml", "_toc.yml"))
            if marked and (folder / "src" / "l2olib").is_dir():
                return folder
    raise DataError(
        "the repository was not found above this module or the working folder: "
        "set L2OLIB_ROOT to its path"
    )


def _folders(root: str | Path | None) -> list[Path]:
    """List the data folders to look in, best first; an explicit one stands alone."""
    if root is not None:
        return [Path(root).expanduser()]
    folders = []
    if os.environ.get("L2OLIB_DATA"):
        folders.append(Path(os.environ["L2OLIB_DATA"]).expanduser())
    try:
        folders.append(find_root() / "data" / "raw")
    except DataError:
        if not folders:
            raise
    return folders


def _shared() -> Path | None:
    """Return the shared data folder that stands beside the repository, if any."""
    candidates = []
    if os.environ.get("L2OLIB_SHARED_DATA"):
        candidates.append(Path(os.environ["L2OLIB_SHARED_DATA"]).expanduser())
    else:
        with suppress(DataError):
            candidates.append(find_root().parent / "shared" / "data")
    return next((c for c in candidates if (c / "unpack.py").is_file()), None)


# ---------------------------------------------------------------- files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Give up on a silent network (the downloaders set no limit of their own)."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _tensors(x: np.ndarray, y: np.ndarray) -> Split:
    labels = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
    return Split(torch.from_numpy(np.ascontiguousarray(x)), labels)


def _torchvision(name: str) -> Any:
    return getattr(importlib.import_module("torchvision.datasets"), name)


# sha256 of the decompressed IDX files, which torchvision does not verify.
_IDX = {
    "MNIST": {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
}


def _download_idx(name: str, root: Path) -> None:
    _torchvision(name)(str(root), train=True, download=True)


def _read_idx(name: str, root: Path) -> tuple[Split, Split, int]:
    folder = root / name
    if (folder / "processed").exists():
        raise _Damaged(f"{folder / 'processed'} is an old format without checksums")
    for file, expected in _IDX[name].items():
        found = _sha256(folder / "raw" / file)
        if found != expected:
            raise _Damaged(
                f"{folder / 'raw' / file} is damaged (sha256 {found}, expected "
                f"{expected})"
            )
    train, test = (
        _torchvision(name)(str(root), train=train, download=False)
        for train in (True, False)
    )
    return (
        Split(train.data[:, None].contiguous(), train.targets.long()),
        Split(test.data[:, None].contiguous(), test.targets.long()),
        10,
    )


def _download_cifar10(root: Path) -> None:
    _torchvision("CIFAR10")(str(root), train=True, download=True)


def _read_cifar10(root: Path) -> tuple[Split, Split, int]:
    cifar10 = _torchvision("CIFAR10")
    try:
        train, test = (
            cifar10(str(root), train=train, download=False) for train in (True, False)
        )
    except RuntimeError:  # its check failed, but does not say for which file
        intact = importlib.import_module("torchvision.datasets.utils").check_integrity
        meta = (cifar10.meta["filename"], cifar10.meta["md5"])
        for file, md5 in (*cifar10.train_list, *cifar10.test_list, meta):
            path = root / cifar10.base_folder / file
            if not intact(str(path), md5):
                raise _Damaged(f"{path} is damaged (its md5 is not {md5})") from None
        raise
    return (
        _tensors(train.data.transpose(0, 3, 1, 2), np.asarray(train.targets)),
        _tensors(test.data.transpose(0, 3, 1, 2), np.asarray(test.targets)),
        10,
    )


# ---------------------------------------------------------------- Tiny-ImageNet, 50

_TINY = "tiny-imagenet-50"
_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_TINY_COUNTS = {"train": 500, "val": 50}
# Over the sorted relative paths and the sha256 of each file's bytes.
_TINY_JPEGS = "c75908abfd17c024b852490560d25d2abafc1af4c33fcb79966ae4ac91a3a2bf"


def _download_tiny(root: Path) -> None:
    utils = importlib.import_module("torchvision.datasets.utils")
    utils.download_url(_TINY_URL, str(root), md5=_TINY_MD5)
    archive = root / "tiny-imagenet-200.zip"
    _extract_tiny(archive, root / _TINY)
    archive.unlink()


def _extract_tiny(archive: Path, folder: Path) -> None:
    """Write the 50 classes of the 200-class archive in the ImageFolder layout."""
    top = "tiny-imagenet-200"
    with zipfile.ZipFile(archive) as z:
        wnids = sorted(z.read(f"{top}/wnids.txt").decode().split())
        chosen = set(random.Random(0).sample(wnids, 50))
        rows = z.read(f"{top}/val/val_annotations.txt").decode().splitlines()
        wnid_of = dict(row.split("\t")[:2] for row in rows)
        for name in z.namelist():
            part, file = name.split("/")[1:2], name.rsplit("/", 1)[1]
            if not file.endswith(".JPEG") or part[0] not in _TINY_COUNTS:
                continue
            wnid = wnid_of[file] if part[0] == "val" else file.split("_")[0]
            if wnid in chosen:
                path = folder / part[0] / wnid / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(z.read(name))


def _read_tiny(root: Path) -> tuple[Split, Split, int]:
    """Return the pictures, decoded on first use and then kept in `pixels.npz`."""
    folder = root / _TINY
    arrays = _read_pixels(folder / "pixels.npz")
    if arrays is None:
        arrays = _decode_tiny(folder)
        part = folder / f"pixels.{os.getpid()}.part.npz"
        with suppress(OSError):  # a folder that cannot be written only costs time
            stored: dict[str, Any] = {"digest": _pixel_digest(arrays), **arrays}
            np.savez(part, **stored)
            part.replace(folder / "pixels.npz")
    return (
        _tensors(arrays["train_x"], arrays["train_y"]),
        _tensors(arrays["val_x"], arrays["val_y"]),
        50,
    )


def _decode_tiny(folder: Path) -> dict[str, np.ndarray]:
    """Decode every picture and verify counts and combined digest; classes by wnid."""
    image = importlib.import_module("PIL.Image")
    pictures = {
        split: sorted((folder / split).glob("*/*.JPEG"), key=lambda p: p.as_posix())
        for split in _TINY_COUNTS
    }
    for split, count in _TINY_COUNTS.items():
        found = len(pictures[split])
        if found != 50 * count:
            raise _Damaged(
                f"{folder / split} holds {found} pictures instead of {50 * count}"
            )
    digest = hashlib.sha256()
    arrays: dict[str, np.ndarray] = {}
    for split, files in pictures.items():
        wnids = sorted({path.parent.name for path in files})
        x = np.empty((len(files), 3, 64, 64), dtype=np.uint8)
        for i, path in enumerate(files):
            content = path.read_bytes()
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(content).digest())
            try:
                picture = image.open(io.BytesIO(content)).convert("RGB")
                x[i] = np.asarray(picture).transpose(2, 0, 1)
            except (OSError, ValueError) as error:
                raise _Damaged(f"{path} is damaged ({error})") from error
        arrays[f"{split}_x"] = x
        arrays[f"{split}_y"] = np.searchsorted(wnids, [p.parent.name for p in files])
    if digest.hexdigest() != _TINY_JPEGS:
        raise _Damaged(
            f"{folder} holds a damaged or foreign picture (combined sha256 "
            f"{digest.hexdigest()}, expected {_TINY_JPEGS})"
        )
    return arrays


def _read_pixels(cache: Path) -> dict[str, np.ndarray] | None:
    """Return the decoded pictures if they are there and intact."""
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        digest = str(arrays.pop("digest"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if digest == _pixel_digest(arrays) else None


def _pixel_digest(arrays: dict[str, np.ndarray]) -> str:
    """Digest decoded pictures together with the files they were decoded from."""
    digest = hashlib.sha256(_TINY_JPEGS.encode())
    for key in sorted(arrays):
        _feed(digest, arrays[key])
    return digest.hexdigest()


def _read_tiny32(root: Path) -> tuple[Split, Split, int]:
    """Return the pictures at 32x32: each pixel the rounded mean of 2x2.

    In a fixed random order, where those at 64x64 come class by class: a sample of the
    first ones then has all classes, and so have the batches of a batch norm.
    """
    *splits, classes = _read_tiny(root)
    order = torch.Generator().manual_seed(0)
    train, test = (
        Split(_halved(x[mixed]), y[mixed])
        for x, y, mixed in (
            (split.x, split.y, torch.randperm(len(split), generator=order))
            for split in splits
        )
    )
    return train, test, classes


def _halved(x: Tensor) -> Tensor:
    quarters = (x[..., i::2, j::2].short() for i in (0, 1) for j in (0, 1))
    return (sum(quarters, torch.tensor(2, dtype=torch.int16)) // 4).to(torch.uint8)


# ---------------------------------------------------------------- text

UNKNOWN, END = "<unk>", "<eos>"

_WIKITEXT = "text/wikitext-2"
_WIKITEXT_URL = (
    "https://raw.githubusercontent.com/pytorch/examples/main/"
    "word_language_model/data/wikitext-2/"
)
_WIKITEXT_FILES = {  # sha256
    "train.txt": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}


def _words(text: str) -> list[str]:
    """Split at white space; every line ends with the word END."""
    return [word for line in text.splitlines() for word in (*line.split(), END)]


def _language(
    train: list[str], test: list[str], vocabulary: int, length: int
) -> tuple[Split, Split, int]:
    """Number the words and cut both texts into items of `length` words.

    Word 0 is UNKNOWN; then come the most frequent words of the training text, equally
    frequent ones in the order of their letters. An item's labels are its words moved
    on by one, so the last is the first word of the next item; the rest is dropped.
    """
    counts = Counter(word for word in train if word != UNKNOWN)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    number = {word: k for k, word in enumerate(ranked[: vocabulary - 1], start=1)}

    def split(words: list[str]) -> Split:
        tokens = torch.tensor([number.get(word, 0) for word in words])
        end = (len(tokens) - 1) // length * length
        x, y = tokens[:end], tokens[1 : end + 1]
        return Split(x.view(-1, length), y.reshape(-1, length).contiguous())

    return split(train), split(test), vocabulary


def _download_wikitext(root: Path) -> None:
    utils = importlib.import_module("torchvision.datasets.utils")
    for file in _WIKITEXT_FILES:
        utils.download_url(_WIKITEXT_URL + file, str(root / _WIKITEXT))


def _read_wikitext(
    vocabulary: int, length: int, root: Path
) -> tuple[Split, Split, int]:
    texts = {}
    for file, expected in _WIKITEXT_FILES.items():
        path = root / _WIKITEXT / file
        found = _sha256(path)
        if found != expected:
            raise _Damaged(f"{path} is damaged (sha256 {found}, expected {expected})")
        texts[file] = _words(path.read_text(encoding="utf-8"))
    return _language(texts["train.txt"], texts["test.txt"], vocabulary, length)


def _descriptions() -> tuple[Split, Split, int]:
    """Return the descriptions that scikit-learn ships of its data sets, as text.

    The last fifth of their words, in the order of file names, is the test split.
    """
    resources = importlib.import_module("importlib.resources")
    folder = resources.files("sklearn.datasets") / "descr"
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".rst")),
        key=lambda file: file.name,
    )
    words = [w for file in files for w in _words(file.read_text(encoding="utf-8"))]
    cut = len(words) * 4 // 5
    return _language(words[:cut], words[cut:], 256, 16)


# ---------------------------------------------------------------- made here


def _circles(seed: int) -> Split:
    make = importlib.import_module("sklearn.datasets").make_circles
    x, y = make(n_samples=5000, noise=0.05, factor=0.5, random_state=seed)
    return _tensors(x.astype(np.float32), y)


def _moons(seed: int) -> Split:
    make = importlib.import_module("sklearn.datasets").make_moons
    x, y = make(n_samples=5000, noise=0.1, random_state=seed)
    return _tensors(x.astype(np.float32), y)


def _spirals(seed: int) -> Split:
    """Draw two interleaved arms of two turns (the paper gives no formula; ours).

    Items alternate between the arms; the uniforms are drawn before the noise.
    """
    random_numbers = np.random.default_rng(seed)
    y = np.arange(5000) % 2
    t = 4 * np.pi * np.sqrt(random_numbers.uniform(size=5000))
    arm = np.where(y == 0, 1.0, -1.0) * t / (4 * np.pi)
    x = np.stack([arm * np.cos(t), arm * np.sin(t)], axis=1)
    x += 0.02 * random_numbers.standard_normal(x.shape)
    return _tensors(x.astype(np.float32), y)


def _normals(seed: int) -> Split:
    """Draw points from N(0, I) in the plane, and take off their mean."""
    x = np.random.default_rng(seed).standard_normal((5000, 2))
    return _tensors((x - x.mean(0)).astype(np.float32), np.zeros(5000))


def _digits(size: int) -> tuple[Split, Split, int]:
    """Return scikit-learn's digits as uint8 images of `size`, 8 or more; last 360 test.

    The 17 grey levels v become round(255 v / 16). A larger picture is resampled
    bilinearly with pixel centres at half-integers and edges repeated: output pixel i
    reads position (16 i + 8 - size) / (2 size), so the result is exact in integers.
    """
    digits = importlib.import_module("sklearn.datasets").load_digits()
    parts = 2 * size
    weights = np.zeros((size, 8), dtype=np.int64)
    for i in range(size):
        low, fraction = divmod(16 * i + 8 - size, parts)
        weights[i, min(max(low, 0), 7)] += parts - fraction
        weights[i, min(max(low + 1, 0), 7)] += fraction
    grey = weights @ digits.images.astype(np.int64) @ weights.T
    scale = parts * parts
    whole = 16 * scale
    x = ((2 * 255 * grey + whole) // (2 * whole)).astype(np.uint8)[:, None]
    cut = len(x) - 360
    y = digits.target
    return _tensors(x[:cut], y[:cut]), _tensors(x[cut:], y[cut:]), 10


# ---------------------------------------------------------------- the data sets


@dataclass(frozen=True)
class _Files:
    """Say how a data set that comes as files is stored, read and obtained."""

    unpack: str  # its name for the shared unpack.py
    needs: tuple[str, ...]  # files and folders below the data folder
    read: Callable[[Path], tuple[Split, Split, int]]
    download: Callable[[Path], None]
    stand_in: str = "digits28"

    def missing(self, folder: Path) -> list[str]:
        return [need for need in self.needs if not (folder / need).exists()]


def _idx_files(unpack: str, name: str) -> _Files:
    return _Files(
        unpack,
        tuple(f"{name}/raw/{file}" for file in _IDX[name]),
        partial(_read_idx, name),
        partial(_download_idx, name),
    )


def _wikitext(vocabulary: int, length: int) -> _Files:
    return _Files(
        "text",
        tuple(f"{_WIKITEXT}/{file}" for file in _WIKITEXT_FILES),
        partial(_read_wikitext, vocabulary, length),
        _download_wikitext,
        "descriptions-256x16",
    )


_FILES = {
    "mnist": _idx_files("mnist", "MNIST"),
    "fashion-mnist": _idx_files("fashion", "FashionMNIST"),
    "cifar10": _Files(
        "cifar10",
        tuple(
            f"cifar-10-batches-py/{file}"
            for file in (
                *(f"data_batch_{k}" for k in range(1, 6)),
                "test_batch",
                "batches.meta",
            )
        ),
        _read_cifar10,
        _download_cifar10,
    ),
    _TINY: _Files(
        "tiny",
        (f"{_TINY}/train", f"{_TINY}/val"),
        _read_tiny,
        _download_tiny,
        "digits64",
    ),
    f"{_TINY}-32": _Files(
        "tiny", (f"{_TINY}/train", f"{_TINY}/val"), _read_tiny32, _download_tiny
    ),
    # Words in the vocabulary x words in an item.
    "wikitext-2-4096x32": _wikitext(4_096, 32),
    "wikitext-2-4096x64": _wikitext(4_096, 64),
    "wikitext-2-32100x32": _wikitext(32_100, 32),
    "wikitext-2-32100x128": _wikitext(32_100, 128),
}
_MADE: dict[str, Callable[[], tuple[Split, Split, int]]] = {
    "circles": lambda: (_circles(0), _circles(1), 2),
    "moons": lambda: (_moons(0), _moons(1), 2),
    "spirals": lambda: (_spirals(0), _spirals(1), 2),
    "normals": lambda: (_normals(0), _normals(1), 1),
    "digits": lambda: _digits(8),
    "digits28": lambda: _digits(28),
    "digits64": lambda: _digits(64),
    "descriptions-256x16": _descriptions,
}
_loaded: dict[tuple[str, str, str], DataSet] = {}


def names() -> list[str]:
    """List the names that `load` knows."""
    return [*_FILES, *_MADE]


def load(
    name: str,
    *,
    device: Device = "cpu",
    root: str | Path | None = None,
    download: bool = True,
) -> DataSet:
    """Return a verified data set with its arrays on `device`, once per process.

    Files are looked for in `root` alone if given, else in `L2OLIB_DATA`, then in the
    repository's `data/raw`; with `download` what is missing is fetched (see `fetch`).
    Raises DataError for an unknown name, for missing or damaged files, and if there is
    no folder `L2OLIB_DATA` (only `fetch` makes it).
    """
    if name not in names():
        raise DataError(
            f"there is no data set {name!r}: choose from {', '.join(names())}"
        )
    key = (name, str(torch.device(device)), "" if root is None else str(root))
    if key not in _loaded:
        if torch.device(device).type != "cpu":
            here = load(name, root=root, download=download)
            _loaded[key] = here.to(device)
        else:
            train, test, classes = (
                _MADE[name]() if name in _MADE else _read(name, root, download)
            )
            checksum = _checksum(train, test)
            _loaded[key] = DataSet(name, train, test, classes, checksum)
    return _loaded[key]


def _read(
    name: str, root: str | Path | None, download: bool
) -> tuple[Split, Split, int]:
    source = _FILES[name]
    folders = _folders(root)
    if root is None and os.environ.get("L2OLIB_DATA") and not folders[0].is_dir():
        # A mistyped name would else be made and filled by a download.
        raise DataError(
            f"L2OLIB_DATA is {folders[0]}, where there is no folder: create it, or "
            "unset L2OLIB_DATA"
        )
    reason = "downloading was not allowed"
    try:
        for folder in folders:
            if not source.missing(folder):
                return source.read(folder)
        if download:
            return source.read(fetch([name], folders[0]))
    except _Damaged as error:
        raise DataError(
            f"{error}: delete it and run `python -m l2olib data {name}`"
        ) from error
    except _Unobtainable as error:
        reason = str(error)
    needs = ", ".join(source.missing(folders[0]))
    raise DataError(
        f"data set {name!r} is missing ({needs} not in "
        f"{' or '.join(map(str, folders))}; {reason}): run "
        f"`python -m l2olib data {name}`, or put these by hand into {folders[0]}, or "
        f"ask explicitly for the small stand-in {source.stand_in!r}"
    )


def fetch(names: Iterable[str] = (), root: str | Path | None = None) -> Path:
    """Write data sets (all that come as files, if none is named) into a data folder.

    Unpacks them from a `shared/data` folder beside the repository (or at
    `L2OLIB_SHARED_DATA`), else downloads them from their publishers (WikiText-2 from
    PyTorch's examples); what is read is verified by `load`.
    The folder is `root`, else `L2OLIB_DATA`, else the repository's `data/raw`; it is
    returned. Raises DataError for an unknown name and if a data set cannot be had.
    """
    wanted = list(names) or list(_FILES)
    for name in wanted:
        if name not in _FILES and name not in _MADE:
            raise DataError(
                f"there is no data set {name!r} to fetch: "
                f"choose from {', '.join(_FILES)}"
            )
    folder = _folders(root)[0]
    wanted = [name for name in wanted if name in _FILES]
    shared = _shared()
    if shared is not None and wanted:
        command = [sys.executable, str(shared / "unpack.py"), "--out", str(folder)]
        command += dict.fromkeys(_FILES[name].unpack for name in wanted)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = " ".join(done.stderr.split()[-20:])
            raise _Unobtainable(f"{shared / 'unpack.py'} failed: {reason}")
        return folder
    for name in wanted:
        if not _FILES[name].missing(folder):
            continue  # several sets are made of the same files
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _timeout(30):
                _FILES[name].download(folder)
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise _Unobtainable(f"downloading {name!r} failed: {reason}") from error
    return folder


def _feed(digest: Any, array: np.ndarray) -> None:
    digest.update(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).data)


def _checksum(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        _feed(digest, split.x.numpy())
        _feed(digest, split.y.numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- item order

_LOW = 0xFFFFFFFF
_TRAIN, _DISJOINT, _IID = 1, 2, 3  # streams


def _key(*values: int) -> tuple[int, int]:
    """Return two 32-bit words that depend on all `values`, by a splitmix64 chain."""
    word = 0
    for value in values:
        word = (word ^ value) + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        word = (word ^ word >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        word ^= word >> 31
    return word & _LOW, word >> 32


def _keys(
    stream: int, draws: Sequence[tuple[int, int]], device: Device
) -> tuple[Tensor, Tensor]:
    """Return both words of the draws' keys, as columns [len(draws), 1] on `device`."""
    words = torch.tensor([_key(stream, *draw) for draw in draws], device=device)
    return words[:, :1], words[:, 1:]


def _hash(items: Tensor, key: tuple[int, int] | tuple[Tensor, Tensor]) -> Tensor:
    """Map items in [0, 2^32), int64, to such numbers; one to one for a fixed key.

    For several keys, as columns, each has a row of the result.
    """
    h = _mix(items ^ key[0])
    return _mix(h.add_(key[1]).bitwise_and_(_LOW))


def _mix(h: Tensor) -> Tensor:
    """Apply murmur3's 32-bit finaliser in place.

    The factors are its constants minus 2^32, equal modulo 2^32, so that no product
    leaves int64.
    """
    h ^= h >> 16
    h.mul_(0x85EBCA6B - (1 << 32)).bitwise_and_(_LOW)
    h ^= h >> 13
    h.mul_(0xC2B2AE35 - (1 << 32)).bitwise_and_(_LOW)
    h ^= h >> 16
    return h


@lru_cache(maxsize=64)
def _epoch(n: int, seed: int, epoch: int, device: str) -> Tensor:
    return torch.argsort(
        _hash(torch.arange(n, device=device), _key(_TRAIN, seed, epoch))
    )


def train_indices(
    n: int, batch: int, seed: int, start: int, count: int, *, device: Device = "cpu"
) -> Tensor:
    """Return batches start .. start + count - 1 of stream train(seed): [count, batch].

    Epochs of n // batch batches in shuffled order without replacement, the remainder
    dropped; int64 on `device`. Raises DataError if an argument is out of range.
    """
    _check(n, batch, seed)
    _whole("start", start, 0)
    _whole("count", count, 0)
    per_epoch = n // batch
    parts = []
    k = start
    while k < start + count:
        epoch, first = divmod(k, per_epoch)
        last = min(first + start + count - k, per_epoch)
        order = _epoch(n, seed, epoch, str(torch.device(device)))
        parts.append(order[first * batch : last * batch].view(-1, batch))
        k += last - first
    if not parts:
        return torch.empty(0, batch, dtype=torch.int64, device=device)
    return torch.cat(parts)


def train_batches(
    n: int, batch: int, seeds: Iterable[int], start: int, count: int, device: Device
) -> Tensor:
    """Return :func:`train_indices` of several streams: [len(seeds), count, batch]."""
    return torch.stack(
        [train_indices(n, batch, s, start, count, device=device) for s in seeds]
    )


def valid_indices(
    n: int,
    batch: int,
    draws: Sequence[tuple[int, int]],
    n_c: int,
    used: Tensor | None,
    mode: str = "disjoint",
    *,
    device: Device = "cpu",
) -> Tensor:
    """Return the validation batches of some decisions: [len(draws), n_c, batch].

    Each of `draws` is a pair (seed, decision) and names a draw of stream valid(seed).
    `disjoint`: the first n_c * batch items, in the order of the decision's hash, that
    are not in its row of `used` (int64 [len(draws), ...]: the decisions' training
    items; None: none). `iid`: independent uniform draws with replacement, whatever was
    used. int64 on `device`. Raises DataError if an argument is out of range or, in
    `disjoint`, too few items are left.
    """
    for seed, decision in draws:
        _check(n, batch, seed)
        _whole("decision", decision, 0)
    _whole("n_c", n_c, 1)
    shape, size = (len(draws), n_c, batch), n_c * batch
    if mode == "iid":
        h = _hash(torch.arange(size, device=device), _keys(_IID, draws, device))
        return (h * n >> 32).view(shape)
    if mode != "disjoint":
        raise DataError(f"mode is {mode!r}: choose 'disjoint' or 'iid'")
    h = _hash(torch.arange(n, device=device), _keys(_DISJOINT, draws, device))
    left = n
    if used is not None and used.numel():
        taken = used.to(device).flatten(1)
        if taken.dtype != torch.int64:
            raise DataError(f"used is {taken.dtype}: it must hold int64 item numbers")
        if len(taken) != len(draws):
            raise DataError(
                f"used has {len(taken)} rows: it must have one for each of the "
                f"{len(draws)} draws"
            )
        if taken.min() < 0 or taken.max() >= n:
            raise DataError(f"used holds an item outside 0 .. {n - 1}")
        h.scatter_(1, taken, _LOW + 1)
        left = int((h <= _LOW).sum(1).min())
    if size > left:
        raise DataError(
            f"{n_c} validation batches of {batch} need {size} unused items, but only "
            f"{left} of {n} are left: lower n_c or the batch, or draw with "
            'replacement, mode "iid" (of a guard: validation="iid")'
        )
    return torch.topk(h, size, largest=False, sorted=True).indices.view(shape)


def _check(n: int, batch: int, seed: int) -> None:
    _whole("n", n, 1, 1 << 31)
    _whole("batch", batch, 1)
    if batch > n:
        raise DataError(f"a batch of {batch} does not fit into {n} items")
    _whole("seed", seed, 0)


def _whole(name: str, value: int, low: int, high: int = 1 << 63) -> None:
    if not isinstance(value, int) or not low <= value < high:
        raise DataError(
            f"{name} is {value!r}: it must be a Python int from {low} to {high - 1}"
        )
