"""Speed of the per-parameter MLP optimizers and of PES, as ratios measured in one run.

    python benchmarks/star.py [--save] [--load TEXT]     about ten minutes on one core

Workload: the MLP 784-128-128-10 (118,282 parameters), batch 128, Fashion-MNIST. Every
figure is a ratio of two medians taken alternately in this process. ``--save`` writes
``benchmarks/star.md``; ``--load`` says there what else the machine was doing.
"""

import argparse
import time
from pathlib import Path

import torch
from speed import ROWS, alternate, row

from l2olib.learned.mlp import HORIZONS, MLPOptimizer, blackbox, factored, star
from l2olib.metatrain.evolution import PES, Evolution, EvolutionJob
from l2olib.optimizees import MLP
from l2olib.optimizers import Adam, constant
from l2olib.records import commit
from l2olib.train import inner_steps, keep_memory

NET = MLP((784, 128, 128, 10), "relu")
LAYOUT = NET.layout


def textbook(optimizer: MLPOptimizer, meta, params, grads, state, step):
    """Every tensor on its own, a matrix [elements, 39] of normalised features.

    As one writes it down from the paper, and as the reference code's default path does
    it; only for tensors of rank 1 and 2, and for Blackbox and STAR.
    """
    rates, rms = optimizer.rates(meta), lambda x: (x * x).mean(0, keepdim=True)
    time_ = torch.tanh(step / torch.tensor(HORIZONS) - 1)
    for name, p in params.items():
        g, s = grads[name], state[name]
        s["m"] = s["m"] + rates["momentum"] * (g[..., None] - s["m"])
        s["r"] = s["r"] + rates["rms"] * ((g * g)[..., None] - s["r"])
        squares, decay = (g * g + 1e-30)[..., None], rates["adafactor"]
        inverse = (s["r"] + 1e-6).rsqrt()
        if axes := factored(tuple(p.shape)):
            second, largest = (a + p.ndim for a in axes)
            s["row"] = s["row"] + decay * (squares.mean(largest) - s["row"])
            s["col"] = s["col"] + decay * (squares.mean(second) - s["col"])
            mean = s["row"].mean(0, keepdim=True)
            factor = (s["row"] / (mean + 1e-9)).clamp(min=1e-9).rsqrt()
            factor = factor.unsqueeze(largest)
            factor = factor * s["col"].clamp(min=1e-9).rsqrt().unsqueeze(second)
            by_g = by_m = factor
            row_ = s["row"].unsqueeze(largest).expand(*p.shape, 3)
            col_ = s["col"].unsqueeze(second).expand(*p.shape, 3)
        else:
            row_ = col_ = s["row"] = s["row"] + decay * (squares - s["row"])
            by_g, by_m = (row_ + 1e-9).rsqrt(), (row_ + 1e-6).rsqrt()
        x = torch.cat(
            [
                g[..., None], p[..., None], s["m"], s["r"], s["m"] * inverse, inverse,
                g[..., None] * by_g, row_, col_, (row_ + 1e-8).rsqrt(),
                (col_ + 1e-8).rsqrt(), s["m"] * by_m,
            ],
            -1,
        ).flatten(0, -2)  # fmt: skip
        x = torch.cat([x * (1e-5 + rms(x)).rsqrt(), time_.expand(len(x), -1)], 1)
        x = torch.relu(x @ meta["w0"] + meta["b0"])
        x = torch.relu(x @ meta["w1"] + meta["b1"])
        heads = (x @ meta["w2"] + meta["b2"]).view(*p.shape, -1)
        move = optimizer.step_mult * heads[..., 0] * (1e-3 * heads[..., 1]).exp()
        if optimizer.nominal_stepsize:
            size = optimizer.nominal_stepsize * (1e-3 * heads[..., 2]).exp()
            move = (move + size * s["m"].mean(-1)) * inverse[..., 0]
        params[name] = p - move
    return params


def blank(params):
    """Zero averages for :func:`textbook`."""
    state = {}
    for name, p in params.items():
        state[name] = {"m": torch.zeros(*p.shape, 3), "r": torch.zeros(*p.shape, 1)}
        if axes := factored(tuple(p.shape)):
            for kind, axis in zip(("row", "col"), axes[::-1], strict=True):
                shape = list(p.shape)
                del shape[axis]
                state[name][kind] = torch.zeros(*shape, 3)
        else:
            state[name]["row"] = torch.zeros(*p.shape, 3)
    return state


def updates(repeats: int = 60) -> None:
    """One optimizer step of the whole network."""
    params, grad = NET.init(0), torch.randn(LAYOUT.n) * 1e-2
    views, grads = LAYOUT.views(params), LAYOUT.views(grad)
    leaf = params.clone().requires_grad_()
    leaf.grad = grad
    torch_adam = torch.optim.Adam([leaf], lr=1e-3)
    adam = Adam(constant(1e-3))
    cases = {"Adam": adam, "STAR": star(LAYOUT), "Blackbox": blackbox(LAYOUT)}
    functions, names = [torch_adam.step], [("torch.optim.Adam", "")]
    for name, optimizer in cases.items():
        meta, state = optimizer.init_meta(0), optimizer.init(params)
        for how in ("eager", "compiled"):
            update = optimizer.update
            if how == "compiled":
                update = torch.compile(update, dynamic=False)
            functions.append(lambda u=update, m=meta, s=state: u(m, grad, s, params))
            names.append((name, how))
        if name != "Adam":
            averages = blank(views)
            first = textbook(optimizer, meta, dict(views), grads, averages, 0)
            delta, _ = optimizer.update(meta, grad, state, params)
            gap = (LAYOUT.flatten(first) - params - delta).abs().max()
            if gap > 1e-3 * delta.abs().max():
                raise AssertionError(f"the two versions of {name} differ by {gap}")
            functions.append(
                lambda o=optimizer, m=meta, s=averages: textbook(
                    o, m, dict(views), grads, s, 1
                )
            )
            names.append((name, "per tensor"))
    with torch.no_grad():
        seconds = dict(zip(names, alternate(*functions, repeats=repeats), strict=True))
    for name in ("STAR", "Blackbox"):
        for how in ("eager", "compiled"):
            took = seconds[name, how]
            ms = f"{took * 1e3:.2f} ms"
            hand = seconds["Adam", how]
            row(
                f"{name} update, {how} / functional Adam, {how}",
                f"{took / hand:.1f}",
                ms,
            )
            plain = seconds["torch.optim.Adam", ""]
            row(f"{name} update, {how} / torch.optim.Adam", f"{took / plain:.1f}", ms)
            loops = seconds[name, "per tensor"]
            row(f"{name} update, per-tensor PyTorch / {how}", f"{loops / took:.1f}",
                f"{loops * 1e3:.1f} ms")  # fmt: skip
    row("functional Adam, eager / compiled",
        f"{seconds['Adam', 'eager'] / seconds['Adam', 'compiled']:.1f}",
        f"{seconds['Adam', 'compiled'] * 1e3:.2f} ms")  # fmt: skip


def memory() -> None:
    """Numbers an optimizer keeps for each parameter."""
    nets = {"784-128-128-10": NET, "784-20-10": MLP((784, 20, 10))}
    for sizes, net in nets.items():
        state = star(net.layout).init(net.init(0))
        kept = sum(v.numel() for v in state.values()) / net.layout.n
        row(f"STAR state / parameters, {sizes}", f"{kept:.2f}", "Adam: 2.00")


@torch.no_grad()
def iterations() -> None:
    """One PES iteration of 4 pairs, truncation 50; and its cost against pairs."""
    optimizer = star(LAYOUT, 1e-5)

    def setup(pairs: int, truncation: int, compile: bool):
        pes = PES(pairs, truncation, 2_000)
        job = EvolutionJob(
            Evolution(optimizer, NET, "fashion-mnist", estimator=pes), "cpu", compile
        )
        meta = job.layout.flatten(optimizer.init_meta(0))
        state = pes.start(meta, job.begin)
        eps, batches = pes.perturbations(meta, 0, 0), job.batches(0)
        return job, lambda step=job.step: pes.estimate(
            step, job.begin, meta, eps, state, batches
        )

    def one_by_one(job):
        """The vectorised step as Python loops over pairs and members."""

        def step(metas, params, state, batch):
            done = []
            for n, k in ((n, k) for n in range(len(metas)) for k in (0, 1)):
                views = job.layout.views(metas[n, k])
                inner = {key: v[n, k] for key, v in state.items()}
                x, inner, loss = inner_steps(
                    job.task,
                    optimizer.update,
                    views,
                    params[n, k],
                    inner,
                    batch[n][None],
                )
                done.append((job.meta_loss(loss[0]), x, inner))
            losses, xs, inners = zip(*done, strict=True)
            shape = metas.shape[:2]
            joined = {
                key: torch.stack([i[key] for i in inners]).unflatten(0, shape)
                for key in state
            }
            return (
                torch.stack(losses).view(shape),
                torch.stack(xs).unflatten(0, shape),
                joined,
            )

        return step

    eager, run = setup(4, 10, False)
    loop = one_by_one(eager)
    vectorised, looped = alternate(run, lambda: run(loop), repeats=3)
    row("PES, 4 pairs, eager: Python loops / vmap", f"{looped / vectorised:.2f}",
        f"{vectorised * 5:.1f} s for truncation 50")  # fmt: skip
    runs = [setup(pairs, 2, False)[1] for pairs in (1, 2, 4, 8)]
    one, *more = alternate(*runs, repeats=5)
    for pairs, took in zip((2, 4, 8), more, strict=True):
        row(f"PES, eager: {pairs} pairs / 1 pair", f"{took / one:.2f}",
            f"{took:.2f} s for truncation 2, with its beginning")  # fmt: skip
    compiled_job, fast = setup(4, 50, True)
    began = time.perf_counter()
    fast()
    compiling = time.perf_counter() - began
    _, slow = setup(4, 50, False)
    cpu = time.process_time()
    fast()
    cpu = time.process_time() - cpu
    quick, plain = alternate(fast, slow, repeats=3)
    row("PES iteration, 4 pairs, truncation 50: eager / compiled",
        f"{plain / quick:.1f}",
        f"{quick:.2f} s ({cpu:.2f} s of processor time), "
        f"after {compiling:.0f} s of compiling")  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--save", action="store_true", help="write benchmarks/star.md")
    options.add_argument("--load", default="nothing else", help="what else was running")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    memory()
    updates()
    iterations()
    if chosen.save:
        lines = [
            "# Speed of the per-parameter MLP optimizers and of PES",
            "",
            f"`python benchmarks/star.py --save`, commit {commit()}, torch "
            f"{torch.__version__}, one thread of one CPU core, MLP 784-128-128-10 "
            f"(118,282 parameters), batch 128. Beside it ran: {chosen.load}.",
            "",
            "| what | ratio | for scale |",
            "|---|---|---|",
            *(f"| {a} | {b} | {c} |" for a, b, c in ROWS),
        ]
        Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
