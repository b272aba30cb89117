"""Result records: one safetensors file a run, content digest, provenance, the store.

A record holds what a run found (arrays) and what determined it (``config``, plain
JSON). The *content digest* covers exactly these two; "identical results" means equal
digests. Provenance (device, versions, time, commit, ...) travels in the same file but
outside the digest. Nothing is ever unpickled, every write is atomic, and a file that is
damaged or belongs to another configuration is refused.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from .data import DataError, find_root

Arrays = dict[str, Tensor]

SUFFIX = ".safetensors.gz"
"""Of records: curves and decisions shrink to 60%, and all of them travel with git."""


class RecordError(Exception):
    """A record that cannot be used; the message says why and what to do."""

    state = "damaged"
    """What a run is called whose record raises it."""


class Missing(RecordError):
    """There is no such record."""

    state = "missing"


class Stale(RecordError):
    """The record belongs to another configuration."""

    state = "stale"


class Unreadable(RecordError):
    """The system does not give the file out; its content may be good."""

    state = "unreadable"


# ---- what determines a result: objects -> plain JSON ---------------------------------


def later(default: Any) -> Any:
    """Declare a field that a dataclass got after records had been made with it.

    At ``default`` the configuration is what it was before the field existed, so those
    records stay valid.
    """
    return dataclasses.field(default=default, metadata={"later": True})


def spec(value: Any) -> Any:
    """Describe a configuration as plain JSON (dataclasses by type and fields).

    A field declared ``field(compare=False)`` does not tell two configurations apart,
    here as in ``==``. One declared with :func:`later` is described only where it has
    another value than its default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: spec(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.compare
            and not (f.metadata.get("later") and getattr(value, f.name) == f.default)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): spec(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [spec(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(f"{value!r} cannot be part of a configuration: use JSON values")


def canonical(config: Any) -> str:
    """The one JSON text of a configuration."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(config: Any, arrays: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 (hex) of a configuration and named arrays: dtype, shape and bytes."""
    sha = hashlib.sha256(canonical(config).encode())
    for name in sorted(arrays or {}):
        a = (arrays or {})[name].detach().cpu().contiguous()
        sha.update(f"\0{name}\0{a.dtype}\0{tuple(a.shape)}\0".encode())
        flat = a.as_strided((a.numel(),), (1,))  # one element may have another stride
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


# ---- nested state <-> flat names -----------------------------------------------------


_DOT = "\N{MIDDLE DOT}"
"""Stands for the dots that a name has of its own."""


def flatten(state: Mapping[str, Any], prefix: str = "") -> Arrays:
    """Name the leaves of a nested dict of tensors by dotted paths.

    An empty dict, such as the state of an optimizer without memory, becomes an empty
    tensor whose path ends in a dot.
    """
    flat: Arrays = {} if state or not prefix else {prefix: torch.empty(0)}
    for key, value in state.items():
        key = key.replace(".", _DOT)
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Invert :func:`flatten`."""
    state: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = (name.replace(_DOT, ".") for name in path.split("."))
        node = state
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf:
            node[leaf] = value
    return state


# ---- files ---------------------------------------------------------------------------


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say of an error of the system which file could not be written, and what helps."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{short(path)} cannot be written: {error.strerror or error}; make its "
            "folder writable or make room there, and give the same command again"
        ) from None


def check_writable(path: Path) -> None:
    """Raise RecordError if :func:`write` would not get as far as the first byte.

    Nothing is left behind, not even the folders that ``write`` makes.
    """
    with _writing(path):
        if path.is_dir():
            raise OSError("a folder has this name")
        there = next(folder for folder in path.parents if folder.exists())
        tempfile.TemporaryFile(dir=there).close()


def write(
    path: Path, arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write arrays and JSON metadata to ``path`` in one atomic step.

    A safetensors file, compressed if the name ends in ``.gz``. RecordError, which names
    it, if the system refuses; an earlier file is then as it was.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in arrays.items()}
    text = {k: json.dumps(v, sort_keys=True, allow_nan=False)
            for k, v in metadata.items()}  # fmt: skip
    content = to_bytes(tensors, metadata=text)
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read(path: Path, device: str = "cpu") -> tuple[Arrays, dict[str, Any]]:
    """Read what :func:`write` wrote; a file that is not whole is a RecordError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Missing(f"{short(path)} does not exist") from None
    except OSError as error:  # says nothing about the content, so: keep the file
        raise Unreadable(
            f"{short(path)} cannot be read: {error.strerror or error}; check its "
            "permissions and those of its folders"
        ) from None
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        arrays = {k: v.to(device) for k, v in from_bytes(content).items()}
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text = header.get("__metadata__", {})
        # JSON has no NaN, and write none: int refuses what Python reads beyond JSON.
        return arrays, {k: json.loads(v, parse_constant=int) for k, v in text.items()}
    except (
        SafetensorError,
        ValueError,
        gzip.BadGzipFile,
        EOFError,
        zlib.error,
    ) as error:
        raise RecordError(
            f"{short(path)} is damaged ({error}): delete it and run the experiment "
            "again, or restore it, if git has it"
        ) from None


def short(path: Path) -> str:
    """Name a file as seen from the repository's root, where it is below it."""
    try:
        return str(path.resolve().relative_to(find_root().resolve()))
    except (ValueError, DataError):
        return str(path)


# ---- records -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """Arrays of one run, the configuration that determines them, and provenance."""

    config: dict[str, Any]
    arrays: Arrays
    provenance: dict[str, Any]

    @property
    def digest(self) -> str:
        """The content digest: configuration and arrays."""
        return digest(self.config, self.arrays)

    def save(self, path: Path) -> None:
        metadata = {
            "config": self.config,
            "provenance": self.provenance,
            "digest": self.digest,
        }
        write(path, self.arrays, metadata)

    @classmethod
    def load(cls, path: Path, config: Mapping[str, Any] | None = None) -> Record:
        """Read a record; refuse a damaged one or one of another ``config``."""
        arrays, metadata = read(path)
        if not {"config", "provenance", "digest"} <= set(metadata):
            raise RecordError(f"{short(path)} is not a record of l2olib")
        record = cls(metadata["config"], arrays, metadata["provenance"])
        if record.digest != metadata["digest"]:
            raise RecordError(
                f"{short(path)} is damaged (its content does not match its digest): "
                "delete it and run the experiment again, or restore it, if git has it"
            )
        if config is not None and canonical(config) != canonical(record.config):
            where = ", ".join(differences(record.config, config))
            raise Stale(
                f"{short(path)} belongs to another configuration (differs in {where}):"
                " run the experiment again with python -m l2olib run"
            )
        return record


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON values differ (at most five)."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: list[str] = []
        for key in sorted({*a, *b}):
            here = f"{path}.{key}" if path else key
            if key in a and key in b:
                found += differences(a[key], b[key], here)
            else:
                found.append(here)
        return found[:5]
    return [] if canonical(a) == canonical(b) else [path]


# ---- provenance ----------------------------------------------------------------------


@cache
def source_digest() -> str:
    """SHA-256 over the library's own source files."""
    here = Path(__file__).parent
    sha = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        sha.update(f"{file.relative_to(here)}\0".encode() + file.read_bytes())
    return sha.hexdigest()


@cache
def commit() -> str:
    """The git commit (12 digits, ``+`` when files of ``src`` differ), or ``?``."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(find_root()), *args],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "src")
        return git("rev-parse", "HEAD")[:12] + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError, DataError):
        return "?"


def _processor() -> str:
    """Model of the processor: rounding may differ between two of one architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "?").strip()


def provenance(*, device: str, seconds: float, compiled: bool, **more: Any) -> dict:
    """What a reader needs to judge or repeat a run; never part of the digest.

    ``peak_bytes`` is the peak of the process so far, earlier runs of it included.
    """
    name = platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "commit": commit(),
        "source": source_digest(),
        "torch": torch.__version__,
        "device": f"{device} ({name})",
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "seconds": round(seconds, 1),
        "peak_bytes": int(peak),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **more,
    }


_YEAR = 365.25 * 86_400


def elapsed(seconds: float) -> str:
    """A duration to two digits at least, in seconds, minutes, hours or years."""
    if seconds >= _YEAR:
        return f"{seconds / _YEAR:.1f} years"
    if seconds >= 360_000:
        return f"{seconds / 3600:,.0f} h"
    if seconds >= 3600:
        return f"{seconds / 3600:.2g} h"
    return f"{seconds / 60:.2g} min" if seconds >= 60 else f"{seconds:.2g} s"


def provenance_line(records: Iterable[Record]) -> str:
    """One line under a figure: profile, seeds, commit, device, cost of its records.

    Of more than six commits the last are only counted; each record names its own.
    """
    records = list(records)

    def all_of(key: str, most: int = 6) -> str:
        found = sorted({str(r.provenance.get(key, "?")) for r in records})
        more = f" and {len(found) - most} more" if len(found) > most else ""
        return ", ".join(found[:most]) + more

    seeds = sorted({s for r in records for s in r.config.get("seeds", [])})
    parts = [f"profile {all_of('profile')}"]
    if seeds:
        span = f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        parts.append(f"{len(seeds)} seed{'s' * (len(seeds) > 1)} ({span})")
    spent = sum(r.provenance.get("seconds", 0.0) for r in records)
    parts += [
        f"commit {all_of('commit')}",
        f"{all_of('device')}, torch {all_of('torch')}",
        f"{len(records)} run{'s' * (len(records) != 1)}, {elapsed(spent)}",
        f"recorded {all_of('date')}",
    ]
    return " · ".join(parts)
