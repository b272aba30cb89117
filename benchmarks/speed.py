"""Speed of the core as ratios measured in one run.

    python benchmarks/speed.py [--save]      about five minutes on one core

Every figure is a ratio of two medians taken alternately in this process, so that a busy
or slow machine changes both alike. ``--save`` writes ``benchmarks/speed.md``.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from l2olib.data import load, train_indices, valid_indices
from l2olib.guards import LGL2O
from l2olib.learned.lstm import LSTMOptimizer, log_and_sign
from l2olib.metatrain.truncated import meta_gradient
from l2olib.optimizees import MLP, Task
from l2olib.optimizers import SGD, Adam, PowerDecay, constant
from l2olib.records import commit
from l2olib.train import Alone, keep_memory

LSTM = LSTMOptimizer()
META = LSTM.init_meta(0)
ROWS: list[tuple[str, str, str]] = []


def alternate(*functions: Callable[[], object], repeats: int = 7) -> list[float]:
    """Median seconds of each function, measured in turns after one warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for spent, function in zip(times, functions, strict=True):
            began = time.perf_counter()
            function()
            spent.append(time.perf_counter() - began)
    return [statistics.median(t) for t in times]


def row(what: str, ratio: str, absolute: str) -> None:
    ROWS.append((what, ratio, absolute))
    print(f"{what:72} {ratio:>10}   {absolute}", flush=True)


def coordinate_major(grad, state):
    """The textbook layout: memory [n, hidden], one row a coordinate."""
    x = log_and_sign(grad, LSTM.p).T
    new = {}
    for layer in range(LSTM.layers):
        w, b = META[f"w{layer}"], META[f"b{layer}"][:, 0]
        gates = torch.nn.functional.linear(torch.cat([x, state[f"h{layer}"]], 1), w, b)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * state[f"c{layer}"] + i.sigmoid() * g.tanh()
        x = o.sigmoid() * c.tanh()
        new[f"h{layer}"], new[f"c{layer}"] = x, c
    return LSTM.scale * (x @ META["w_out"].T + META["b_out"])[:, 0], new


def memory(n: int) -> None:
    """An eager update where glibc gives freed memory back, and where it keeps it.

    Back: all above 128 KiB, which is where its default begins before it adapts. Numbers
    of its malloc.h: -1 is the size above which free memory is trimmed, -4
    the number of blocks that are mapped by themselves.
    """
    libc = ctypes.CDLL(None)
    grad = torch.randn(n) * 1e-2
    state = LSTM.init(grad)

    def update(keep: bool) -> None:
        keep_memory() if keep else (libc.mallopt(-4, 65_536), libc.mallopt(-1, 131_072))
        for _ in range(5):
            LSTM.update(META, grad, state, grad)

    given, kept = alternate(lambda: update(False), lambda: update(True), repeats=9)
    row(f"L2O update, memory given back / kept, n = {n:,}", f"{given / kept:.2f}",
        f"{kept / 5 * 1e3:.2f} ms")  # fmt: skip


def updates(n: int = 15_910) -> None:
    """One optimizer step on the coordinates of MLP 784-20-10."""
    grad = torch.randn(n) * 1e-2
    state = LSTM.init(grad)
    rows = {k: v.T.contiguous() for k, v in state.items()}
    adam = Adam(constant(1e-3))
    moments = adam.init(grad)
    fast = torch.compile(LSTM.update, dynamic=False)
    quick = torch.compile(adam.update, dynamic=False)
    ours, plain, hand, ours_c, hand_c = alternate(
        lambda: LSTM.update(META, grad, state, grad),
        lambda: coordinate_major(grad, rows),
        lambda: adam.update({}, grad, moments, grad),
        lambda: fast(META, grad, state, grad),
        lambda: quick({}, grad, moments, grad),
        repeats=40,
    )
    ms = f"{ours * 1e3:.2f} ms"
    row("L2O update [n, hidden] / [hidden, n], n = 15,910", f"{plain / ours:.2f}", ms)
    row("L2O update eager / compiled", f"{ours / ours_c:.2f}", f"{ours_c * 1e3:.2f} ms")
    row("L2O update / Adam update, both eager", f"{ours / hand:.0f}", ms)
    ms = f"{ours_c * 1e3:.2f} ms"
    row("L2O update / Adam update, both compiled", f"{ours_c / hand_c:.0f}", ms)


def replicas(sizes: tuple[int, ...], data: str, counts: tuple[int, ...]) -> None:
    """Inner steps of L2O and LGL2O: seeds in one vmap batch against a loop."""
    task = Task(MLP(sizes), load(data))
    steps = 10
    sgd = SGD(PowerDecay(3.0))
    for name, method in {"L2O": Alone(LSTM), "LGL2O": LGL2O(LSTM, sgd)}.items():
        metas = {r: META if o is LSTM else {} for r, o in method.optimizers.items()}

        def segment(state, train, valid, method=method, metas=metas):
            return method.segment(task, metas, state, train, valid)[0]

        batched = torch.func.vmap(
            segment, in_dims=(0, 0, 0 if method.batches else None)
        )
        for r in counts:
            params = torch.stack([task.optimizee.init(s) for s in range(r)])
            state = torch.func.vmap(method.init)(params)
            train = torch.stack(
                [train_indices(task.items, 128, s, 0, steps) for s in range(r)]
            )
            valid = None
            if method.batches:
                draws = [(s, 0) for s in range(r)]
                valid = valid_indices(task.items, 128, draws, 10, train)[:, None]
            singles = [method.init(p) for p in params]

            def loop(r=r, singles=singles, train=train, valid=valid, segment=segment):
                for k in range(r):
                    segment(singles[k], train[k], None if valid is None else valid[k])

            together, alone = alternate(
                lambda b=batched, s=state, t=train, v=valid: b(s, t, v), loop, repeats=3
            )
            rate = f"{steps / together:,.0f} steps/s of each seed"
            row(f"{name}, {'-'.join(map(str, sizes))}, {r} seeds: loop / vmap",
                f"{alone / together:.2f}", rate)  # fmt: skip


def rollout() -> None:
    """One meta-training truncation of 20 steps on MLP 784-20-10."""
    task = Task(MLP((784, 20, 10)), load("mnist"))
    params = task.optimizee.init(0)
    state = LSTM.init(params)
    idx = train_indices(task.items, 128, 0, 0, 20)
    fast = torch.compile(LSTM.update, dynamic=False)
    eager, quick, forward = alternate(
        lambda: meta_gradient(task, LSTM.update, META, params, state, idx),
        lambda: meta_gradient(task, fast, META, params, state, idx),
        lambda: Alone(LSTM).segment(
            task, {"optimizer": META}, Alone(LSTM).init(params), idx, None
        ),
        repeats=5,
    )
    row("meta-gradient of 20 steps / these 20 steps, eager",
        f"{eager / forward:.2f}", f"a rollout takes {eager * 5:.2f} s")  # fmt: skip
    row("meta-gradient eager / compiled",
        f"{eager / quick:.2f}", f"a rollout takes {quick * 5:.2f} s")  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--save", action="store_true", help="write benchmarks/speed.md"
    )
    save = options.parse_args().save
    torch.set_num_threads(1)
    for n in (7_706, 15_910, 97_442):  # Conv3 on CIFAR-10, MLP on MNIST, Conv5
        memory(n)
    keep_memory()
    updates()
    replicas((2, 20, 2), "circles", (1, 5, 25))
    replicas((784, 20, 10), "mnist", (1, 5, 25))
    rollout()
    if save:
        lines = [
            "# Speed of the core",
            "",
            f"`python benchmarks/speed.py --save`, commit {commit()}, torch "
            f"{torch.__version__}, one thread of one CPU core, batch 128.",
            "",
            "| what | ratio | for scale |",
            "|---|---|---|",
            *(f"| {a} | {b} | {c} |" for a, b, c in ROWS),
        ]
        Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
