"""Command line: ``python -m l2olib list | run | claims | data``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from . import claims, data, experiments
from .data import DataError
from .experiments import ExperimentError, Run
from .records import Record, RecordError, Stale, check_writable, elapsed
from .train import Unfinished, agreed, ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one sentence on stderr and exit status 2."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return args.command(args)
    except (DataError, ExperimentError, RecordError) as error:
        print(f"l2olib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of ``list | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # such as a full disk
        print(f"l2olib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        redo = getattr(args, "redo", False)
        what = (
            "a run that had a record still has it, and --redo starts it afresh"
            if redo
            else "the same command goes on from what was done"
        )
        print(f"l2olib: interrupted; {what}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m l2olib", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    sub = command("list", list_, "the experiments: state, cost and runs of each")
    sub.add_argument("pattern", nargs="?", default="*", help="experiment id or glob")
    sub.add_argument("--profile", choices=experiments.PROFILES, default="laptop")
    sub.add_argument("--runs", action="store_true", help="one line a run")

    sub = command("run", run, "compute missing records; resumes where it was stopped")
    sub.add_argument("pattern", help="experiment id or glob, e.g. 'lgl2o.*'")
    sub.add_argument("--profile", choices=experiments.PROFILES, default="laptop")
    sub.add_argument("--only", default="*", help="glob over names or labels of runs")
    sub.add_argument("--time-limit", type=duration, help="stop cleanly after, e.g. 8m")
    sub.add_argument(
        "--device", type=device, default="cpu", help="cpu (default), cuda or cuda:1"
    )
    sub.add_argument("--compile", action="store_true", help="use torch.compile")
    sub.add_argument("--redo", action="store_true", help="recompute existing records")

    sub = command("claims", claims_, "the ledger of claims, judged from the records")
    sub.add_argument("pattern", nargs="?", default="*", help="claim id or glob")

    sub = command(
        "data", data_, "fetch data sets into data/raw (reading verifies them)"
    )
    sub.add_argument("names", nargs="*", help="data sets (default: all)")
    return top


def duration(text: str) -> float:
    """Seconds from ``90``, ``90s``, ``8m`` or ``2h``."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:], 0.0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no duration: write 90s, 8m or 2h"
        )
    return seconds


def device(text: str) -> str:
    """A device that is here: ``cpu``, ``cuda`` or ``cuda:1``."""
    here = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    here += [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    if text not in here:
        raise argparse.ArgumentTypeError(
            f"there is no device {text!r}: choose from {', '.join(here)}"
        )
    return text


def list_(args: argparse.Namespace) -> int:
    """Show state and cost of each experiment (or run) at one profile."""
    for entry in experiments.find(args.pattern):
        if args.profile not in entry.profiles:
            only = " or ".join(entry.profiles)
            print(f"{entry.id:24} only at profile {only:10}  {entry.title}")
            continue
        runs = entry.runs(args.profile)
        states = [run.state() for run in runs]
        cost = elapsed(sum(run.work.seconds() for run in runs))
        done = sum(state == "done" for state in states)
        print(f"{entry.id:24} {done:3}/{len(runs):<3} done  {cost:>9}  {entry.title}")
        if args.runs:
            for run_, state in zip(runs, states, strict=True):
                print(f"    {run_.name:32} {state:24} {elapsed(run_.work.seconds())}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Execute the runs that have no current record, within the time limit."""
    if args.redo and args.time_limit is not None:
        raise ExperimentError(
            "--redo starts every run afresh and so never ends under --time-limit: use "
            "one of the two"
        )
    began = time.monotonic()
    entries = experiments.find(args.pattern)
    there = [entry for entry in entries if args.profile in entry.profiles]
    if not there:
        raise ExperimentError(
            f"{args.pattern} has no profile {args.profile}: use "
            f"--profile {' or '.join(entries[0].profiles)}"
        )
    todo: list[Run] = [
        run
        for entry in there
        for run in entry.runs(args.profile)
        if fnmatch.fnmatch(run.name, args.only) or fnmatch.fnmatch(run.label, args.only)
    ]
    if not todo:
        raise ExperimentError(
            f"{args.pattern} has no run {args.only!r} at profile {args.profile}: see "
            f"python -m l2olib list '{args.pattern}' --profile {args.profile} --runs"
        )
    first = ranks()[0] == 0
    if first and (left_out := [e.id for e in entries if e not in there]):
        print(
            f"l2olib: left out, having no profile {args.profile}: "
            + ", ".join(left_out),
            file=sys.stderr,
        )
    begun: list[Run] = []

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    def settled(item: Run) -> bool:
        """Compute a run that has no record; False if what it needs has none either."""
        left = None
        if args.time_limit is not None:
            left = agreed(args.time_limit - (time.monotonic() - began))
            if left <= 0:
                raise Unfinished("time limit reached")
        state = agreed(item.state())  # what the first rank wrote is there for all now
        if state.startswith("needs "):
            return False
        if not args.redo:
            if state in ("damaged", "unreadable"):
                item.load()  # raises: it is not for us to overwrite it unasked
            if state == "done":
                return True
        for path in (item.path, item.checkpoint):  # not after hours
            check_writable(path)
        begun.append(item)
        say(f"{item.experiment} {item.name} ({item.profile})")
        if state == "stale":
            say("    its record is of another configuration and will be replaced")
        if args.redo and first:
            item.checkpoint.unlink(missing_ok=True)
        record = (None if args.redo else item.twin()) or execute(item, args, left)
        if first:
            record.save(item.path)
            item.checkpoint.unlink(missing_ok=True)
        say(f"    {record.digest[:12]}  {record.provenance['seconds']} s")
        return True

    count = len(todo)
    try:
        while todo:  # what a run needs may come after it in the table
            waiting = [item for item in todo if not settled(item)]
            if len(waiting) == len(todo):
                needs = {k: v for item in todo for k, v in item.needs().items()}
                name, how = sorted(needs.items())[0]
                others = f" (and {len(needs) - 1} more)" * (len(needs) > 1)
                raise ExperimentError(
                    f"{len(todo)} of these runs need records that are not there: "
                    f"first make {name}{others}{': ' * bool(how)}{how}"
                )
            todo = waiting
        if not begun:
            say(f"nothing to do: {count} of {count} runs have their record")
    except Unfinished as stop:
        say(f"{stop}; run the same command again to go on")
    return 0


def execute(item: Run, args: argparse.Namespace, left: float | None) -> Record:
    """Execute one run with a progress bar (silent where there is no terminal)."""
    rank, count = ranks()
    device = args.device
    if device == "cuda" and count > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with tqdm(disable=True if rank else None, unit="step") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return item.execute(
            device=device, compile=args.compile, time_limit=left, report=report
        )


def claims_(args: argparse.Namespace) -> int:
    """Print the verdict of every claim whose id matches.

    Raises RecordError after that, if a record that they read is damaged or unreadable.
    """
    bad: RecordError | None = None
    for verdict in claims.report(args.pattern):
        print(f"{verdict.claim.id:4} {verdict.verdict:18} {verdict.claim.statement}")
        print(f"       {verdict.tally}")
        for test, outcome in verdict.findings:
            mark = getattr(outcome, "mark", "?")
            print(f"       {mark} {verdict.claim.name(test)}: {outcome}")
            why = getattr(outcome, "__cause__", None)
            if isinstance(why, RecordError) and not isinstance(why, Stale):
                bad = why
    if bad is not None:
        raise bad
    return 0


def data_(args: argparse.Namespace) -> int:
    """Fetch data sets and say where they are."""
    folder = data.fetch(args.names)
    print(f"data sets are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
