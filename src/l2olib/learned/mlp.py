"""Per-parameter MLP optimizers: Blackbox (small_fc_lopt), Hyperparam and STAR.

One tiny network, its weights shared by all parameters, reads 39 features of each
parameter and writes its step (Harrison, Metz, Sohl-Dickstein, NeurIPS 2022, "STAR";
small_fc_lopt is Metz et al. 2022). The step is the sum of three terms::

    p <- p - B - G - D

    B  blackbox     step_mult * d * exp(c1 q)                 (times a preconditioner)
    G  nominal      nominal_stepsize * exp(c2 n) * momentum   (a hand-crafted direction)
    D  decay        weight_decay * exp(c3 z) * p

where d, q, n, z are the heads of the network and c1, c2, c3 are ``exp_mult``. Blackbox
has B alone, Hyperparam G alone, STAR both: they are settings of ONE dataclass.

Unlike a coordinate-wise LSTM the network needs to know the tensors: it keeps
Adafactor's row and column averages of squared gradients, and divides every feature but
those of time by its root mean square over the tensor. So the optimizer holds a
:class:`~l2olib.optimizees.Layout`, whose shapes are in (in, out) order, that of the
reference code: which axis is a row is decided by sizes and, among equal ones, by
position, so (out, in) would swap rows and columns of square layers. The layout says
where an optimizer works, not what it is, and is no part of its identity: weights
meta-trained on one optimizee serve another.

Formulas, epsilons included, are those of the public reference code
(google/learned_optimization, MLPNomLOpt and AdafacMLPLOpt, snapshot 32186aa4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..optimizees import Layout, truncated_normal
from ..optimizers import Meta, State, check_literals
from ..records import later

DECAYS = {
    "momentum": (0.9, 0.99, 0.999),
    "rms": (0.999,),
    "adafactor": (0.9, 0.99, 0.999),
}
"""Decays of the running averages before meta-training."""
HORIZONS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
"""The time features of step t (the first is 0) are tanh(t / horizon - 1)."""
CHANNELS = 28
"""Features that are not time."""

Direction = Literal["SGD", "SGDM", "AggMo", "Adam", "AdamAggMo"]


# ---- the network, shared by all optimizers of this module ----------------------------


def init_network(sizes: Sequence[int], seed: int) -> Meta:
    """Draw ``w0 [sizes[0], sizes[1]], b0, w1, ...``: as the reference, biases zero.

    Weights are normal with deviation 1/sqrt(fan-in), cut at two deviations.
    """
    gen = torch.Generator().manual_seed(seed)
    meta: Meta = {}
    for layer, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
        w = truncated_normal((a, b), 1 / math.sqrt(a), gen)
        meta[f"w{layer}"], meta[f"b{layer}"] = w.float(), torch.zeros(b)
    return meta


def dense(weight: Tensor, bias: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    """Apply ``weight [K, H]`` and ``bias [H]`` to K channels of one shape; H channels.

    A matrix product; where the code is compiled and the layer small, written as sums
    instead: these fuse with what makes the channels, which then never reach memory.
    """
    compiling = torch.compiler.is_compiling() or get_proxy_mode() is not None
    if compiling and weight.numel() <= 128:
        out = []
        for column, start in zip(weight.unbind(1), bias, strict=True):
            total = start
            for w, channel in zip(column, x, strict=True):
                total = total + w * channel
            out.append(total)
        return out
    stacked = torch.stack(list(x))
    y = torch.addmm(bias[:, None], weight.T, stacked.flatten(1))
    return list(y.unflatten(1, stacked.shape[1:]))


def inverse_rms(x: Tensor) -> Tensor:
    """1 / root mean square over the tensor of each channel of ``x [K, ...]``: [K]."""
    return (1e-5 + x.square().flatten(1).mean(1)).rsqrt()


def network(
    meta: Meta, blocks: Sequence[Tensor], step: Tensor, normalize: bool = True
) -> list[Tensor]:
    """Heads ``[*shape]`` of the MLP for the elements of one tensor.

    ``blocks`` are the features in the order of the rows of ``w0``, each ``[channels,
    *shape]`` with size 1 on axes along which it is constant. Normalising a channel is
    scaling its row of ``w0``, and what is constant along an axis passes the first layer
    once, not once an element; so neither normalised nor repeated features are formed.
    """
    t = step.to(blocks[0].dtype)
    time = torch.tanh(torch.stack([t / h for h in HORIZONS]) - 1)
    first: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor]]] = {}
    row = 0
    for block in blocks:
        rows, channels = first.setdefault(tuple(block.shape[1:]), ([], []))
        weights = meta["w0"][row : row + len(block)]
        rows.append(inverse_rms(block)[:, None] * weights if normalize else weights)
        channels.extend(block)
        row += len(block)
    bias = meta["b0"] + time @ meta["w0"][row:]
    parts = []
    for rows, channels in first.values():
        parts.append(dense(torch.cat(rows), bias, channels))
        bias = torch.zeros_like(bias)
    x = [sum(units[1:], units[0]) for units in zip(*parts, strict=True)]
    layer = 1
    while f"w{layer}" in meta:
        x = dense(meta[f"w{layer}"], meta[f"b{layer}"], [torch.relu(u) for u in x])
        layer += 1
    return x


def at_least_vectors(layout: Layout) -> Layout:
    """Let a scalar count as a vector of one element."""
    return Layout({name: shape or (1,) for name, shape in layout.shapes.items()})


def joined(tensors: Iterable[Tensor], start: int) -> Tensor:
    """Join the tensors of a layout, flat from axis ``start`` on."""
    return torch.cat([t.flatten(start) for t in tensors], -1)


def averaged(average: Tensor, value: Tensor, rate: Tensor) -> Tensor:
    """Move running averages ``[K, ...]`` towards ``value [...]`` at ``rate [K]``.

    In the form that is exact at a rate of 1, which learned decays may reach: there
    ``average + rate * (value - average)`` would keep the rounding of what it forgets.
    """
    rate = rate.view(-1, *[1] * value.ndim)
    return (1 - rate) * average + rate * value


# ---- Adafactor's rows and columns ----------------------------------------------------


def factored(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Axes (second largest, largest) of a tensor, counted from its end; None below 2.

    Row averages run over the largest axis, column averages over the second largest.
    Among equal sizes the later axis counts as the larger; other axes are kept.
    """
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(-len(shape), 0), key=lambda axis: shape[axis])
    return second, largest


def averages(layout: Layout, which: Literal["row", "column"]) -> Layout:
    """Layout of the row or column averages; a vector's "row" is itself, no column."""
    shapes = {}
    for name, shape in layout.shapes.items():
        axes, kept = factored(shape), list(shape)
        if axes:
            del kept[axes[1] if which == "row" else axes[0]]
        shapes[name] = tuple(kept) if axes or which == "row" else (0,)
    return Layout(shapes)


def inverse_root(x: Tensor) -> Tensor:
    return x.clamp(min=1e-9).rsqrt()


def features(
    g: Tensor, p: Tensor, m: Tensor, r: Tensor, row: Tensor, col: Tensor
) -> dict[str, Tensor]:
    """The 28 features of one tensor before normalisation, in the order of ``w0``.

    ``g, p, r [*shape]`` are gradient, parameter and mean squared gradient, ``m [3,
    *shape]`` the momenta, ``row`` and ``col`` ``[3, ...]`` the averages without the
    largest or second largest axis (``row`` of a vector: not reduced, ``col`` unused).
    Each result is ``[channels, *shape]``, with size 1 where it is constant.
    """
    inverse = (r + 1e-6).rsqrt()
    axes = factored(tuple(g.shape))
    if axes is None:
        col = row
        by_gradient, by_momentum = inverse_root(row + 1e-9), (row + 1e-6).rsqrt()
    else:
        second, largest = axes
        inside = second + 1 if second < largest else second  # that axis within `row`
        mean = row.mean(inside, keepdim=True)
        rows = inverse_root(row / (mean + 1e-9)).unsqueeze(largest)
        row, col = row.unsqueeze(largest), col.unsqueeze(second)
        by_gradient = by_momentum = rows * inverse_root(col)
    return {
        "gradient": g[None],
        "parameter": p[None],
        "momentum": m,
        "rms": r[None],
        "adam": m * inverse,
        "inverse_rms": inverse[None],
        "factored_gradient": g * by_gradient,
        "row": row,
        "column": col,
        "inverse_row": (row + 1e-8).rsqrt(),
        "inverse_column": (col + 1e-8).rsqrt(),
        "factored_momentum": m * by_momentum,
    }


def _check_size(layout: Layout, params: Tensor) -> None:
    if params.shape[-1] != layout.n:
        raise ValueError(
            f"the optimizer was built for {layout.n} parameters, not "
            f"{params.shape[-1]}: give it the layout of its optimizee"
        )


# ---- the optimizers ------------------------------------------------------------------


@dataclass(frozen=True)
class MLPOptimizer:
    """The family of the module's docstring; see :func:`star` and its neighbours.

    ``heads`` is 2 (d, q), 3 (and n) or 4 (and z). Without ``nominal_controller`` n is
    the constant 1 (as in the reference), without ``decay_controller`` z is 0.
    ``precondition`` divides B by the root mean square gradient, ``self_normalize``
    multiplies it by the tensor's mean gradient. Without ``normalize`` the features are
    not divided by their root mean squares. ``aggregate_magnitude`` and
    ``aggregate_nominal`` replace q and n by their means over the tensor.
    ``learn_nominal`` adds a meta-parameter b that multiplies G by exp(10 b): the
    learned overall scale that the paper counts and its code does not have (the form of
    the dependence is ours). ``weight_decay`` is per step, not times a learning rate;
    it acts on the optimizee and is not the paper's "weight decay", which acts on the
    meta-parameters.

    State: ``m [3, n]``, ``r [n]``, ``row`` and ``col`` (averages of all tensors, one
    after the other), ``step``. Meta-parameters have the reference's names (``w0`` to
    ``b2``, ``momentum_decays``, ...); of its settings five are called otherwise here:
    ``nominal_grad_estimator`` is ``nominal_direction``, ``normalize_blackbox``
    ``precondition``, ``selfnormalize_blackbox`` ``self_normalize``,
    ``aggregate_nom_magnitude`` ``aggregate_nominal``, ``regularization_controller``
    ``decay_controller``. Those of the reference that no experiment uses are there for
    parity with it: its golden vectors check them.
    """

    layout: Layout = field(compare=False, repr=False)
    heads: int = 4
    step_mult: float = 1e-3
    exp_mult: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    nominal_stepsize: float = 0.0
    nominal_direction: Direction = "AdamAggMo"
    nominal_controller: bool = False
    learn_nominal: bool = False
    precondition: bool = False
    self_normalize: bool = False
    aggregate_magnitude: bool = False
    aggregate_nominal: bool = False
    weight_decay: float = 0.0
    decay_controller: bool = False
    normalize: bool = later(True)
    tensors: Layout = field(init=False, compare=False, repr=False)
    rows: Layout = field(init=False, compare=False, repr=False)
    columns: Layout = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        needed = 4 if self.decay_controller else 3 if self.nominal_controller else 2
        if not needed <= self.heads <= 4:
            raise ValueError(
                f"these settings need {needed} to 4 heads, not {self.heads}"
            )
        check_literals(self)
        if self.learn_nominal and not self.nominal_stepsize:
            raise ValueError("to learn its scale, give the nominal term a step size")
        tensors = at_least_vectors(self.layout)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "rows", averages(tensors, "row"))
        object.__setattr__(self, "columns", averages(tensors, "column"))

    def init_meta(self, seed: int) -> Meta:
        """Random network; offsets of the decays (and of the nominal scale) zero."""
        meta = init_network((CHANNELS + len(HORIZONS), 4, 4, self.heads), seed)
        for family, decays in DECAYS.items():
            meta[f"{family}_decays"] = torch.zeros(len(decays))
        if self.learn_nominal:
            meta["nominal_scale"] = torch.zeros(1)
        return meta

    def init(self, params: Tensor) -> State:
        """Start at ``params [n]``; ValueError unless ``n`` is that of the layout."""
        _check_size(self.layout, params)
        n = params.shape[-1]
        return {
            "m": params.new_zeros(3, n),
            "r": params.new_zeros(n),
            "row": params.new_zeros(3, self.rows.n),
            "col": params.new_zeros(3, self.columns.n),
            "step": torch.zeros((), dtype=torch.int64, device=params.device),
        }

    def rates(self, meta: Meta) -> dict[str, Tensor]:
        """1 - decay of each running average: (1 - initial decay) * exp(10 offset).

        Those of squares are kept in [0, 1]; a decay of momentum may become negative.
        The decay, and not the rate, is what is rounded, as in the reference: near a
        decay of 1 that is all that is left of a rate.
        """
        found = {}
        for family, decays in DECAYS.items():
            offset = meta[f"{family}_decays"]
            # made on its device: a GPU could not capture a copy from the host
            one = offset.new_ones(())
            logs = torch.stack([(1 - one * decay).log() / 10 for decay in decays])
            decay = 1 - (10 * (logs + offset)).exp()
            found[family] = 1 - (decay if family == "momentum" else decay.clamp(0, 1))
        return found

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        found, new = self._observe(meta, grad, state, params)
        deltas = [
            self.step(meta, network(meta, blocks, state["step"], self.normalize), *of)
            for blocks, of in found
        ]
        return joined(deltas, 0), new | {"step": state["step"] + 1}

    def heads_at(
        self, meta: Meta, grad: Tensor, state: State, params: Tensor, step: Tensor
    ) -> Tensor:
        """What the network would answer if this were step number ``step``: [heads, n].

        The other features are those of the update that is due.
        """
        found, _ = self._observe(meta, grad, state, params)
        answers = [network(meta, blocks, step, self.normalize) for blocks, _ in found]
        return joined([torch.stack(answer) for answer in answers], 1)

    def _observe(
        self, meta: Meta, grad: Tensor, state: State, params: Tensor
    ) -> tuple[list[tuple[list[Tensor], list[Tensor]]], State]:
        """Features of each tensor, with its g, p, m and r; and the new averages."""
        rates = self.rates(meta)
        m = averaged(state["m"], grad, rates["momentum"])
        r = averaged(state["r"][None], grad.square(), rates["rms"])[0]
        of = [self.tensors.views(flat) for flat in (grad, params, m, r)]
        of += [self.rows.views(state["row"]), self.columns.views(state["col"])]
        found, rows, cols = [], [], []
        for name, shape in self.tensors.shapes.items():
            g, p, mg, rg, row, col = (views[name] for views in of)
            squares, axes = g.square() + 1e-30, factored(shape)
            if axes is None:
                row = averaged(row, squares, rates["adafactor"])
            else:
                row = averaged(row, squares.mean(axes[1]), rates["adafactor"])
                col = averaged(col, squares.mean(axes[0]), rates["adafactor"])
            blocks = list(features(g, p, mg, rg, row, col).values())
            found.append((blocks, [g, p, mg, rg]))
            rows.append(row)
            cols.append(col)
        new = {"m": m, "r": r, "row": joined(rows, 1), "col": joined(cols, 1)}
        return found, new

    def step(
        self,
        meta: Meta,
        heads: list[Tensor],
        g: Tensor,
        p: Tensor,
        m: Tensor,
        r: Tensor,
    ) -> Tensor:
        """-(B + G + D) of one tensor ``[*shape]`` from its heads."""
        inverse = (r + 1e-6).rsqrt()
        magnitude = heads[1].mean() if self.aggregate_magnitude else heads[1]
        step = self.step_mult * heads[0] * (self.exp_mult[0] * magnitude).exp()
        if self.precondition:
            step = step * inverse
        if self.self_normalize:
            step = step * g.mean()
        if self.nominal_stepsize:
            control = heads[2] if self.nominal_controller else torch.ones_like(g)
            if self.aggregate_nominal:
                control = control.mean()
            direction = {"SGD": g, "SGDM": m[2], "Adam": m[2]}.get(
                self.nominal_direction, m.mean(0)
            )
            if self.nominal_direction.startswith("Adam"):
                direction = direction * inverse
            scale = self.nominal_stepsize * (self.exp_mult[1] * control).exp()
            if self.learn_nominal:
                scale = scale * (10 * meta["nominal_scale"]).exp()
            step = step + scale * direction
        if self.weight_decay:
            shrink: float | Tensor = self.weight_decay
            if self.decay_controller:
                shrink = shrink * (self.exp_mult[2] * heads[3]).exp()
            step = step + shrink * p
        return -step

    def flops(self, n: int) -> int:
        """Counted for the layout: rows and columns pass the first layer once."""
        total = (4 * 16 + 4 * 4 + 4 * self.heads) * self.layout.n
        for name, size in self.rows.sizes.items():
            total += 4 * 6 * (size + (self.columns.sizes[name] or size))
            total += 4 * len(HORIZONS)
        return 2 * total


def blackbox(layout: Layout) -> MLPOptimizer:
    """small_fc_lopt, the paper's Blackbox: 197 meta-parameters."""
    return MLPOptimizer(layout, heads=2)


def star(layout: Layout, step_mult: float = 1e-3) -> MLPOptimizer:
    """STAR with the settings of the paper (section 5.2, App. B.2): 207 meta-parameters.

    ``step_mult`` is the paper's beta3. By App. B.2 and the reference's default it is
    1e-3, at which a random initialisation takes violent steps; by section 5.2 it makes
    up for the preconditioner: at 1e-5 it does not. So it counts as open here.
    """
    return MLPOptimizer(
        layout,
        step_mult=step_mult,
        nominal_stepsize=1e-3,
        nominal_controller=True,
        precondition=True,
    )


def star_as_described(layout: Layout, step_mult: float = 1e-3) -> MLPOptimizer:
    """STAR as the paper counts it: 3 heads, learned nominal scale, 203 parameters."""
    return replace(star(layout, step_mult), heads=3, learn_nominal=True)


def hyperparam(layout: Layout) -> MLPOptimizer:
    """The nominal term alone: a network that sets the step size of AdamAggMo."""
    return star(layout, step_mult=0.0)


@dataclass(frozen=True)
class MomentumMLP:
    """The larger per-parameter MLP of Metz et al. 2019 (MLPLOpt of the reference code).

    Features are gradient, parameter and momenta of six fixed decays; 32-32 hidden
    units, 1,762 meta-parameters; steps as Blackbox. State: ``m [6, n]``, ``step``.
    """

    layout: Layout = field(compare=False, repr=False)
    hidden: int = 32
    decays: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    step_mult: float = 1e-3
    exp_mult: float = 1e-3

    def init_meta(self, seed: int) -> Meta:
        inputs = 2 + len(self.decays) + len(HORIZONS)
        return init_network((inputs, self.hidden, self.hidden, 2), seed)

    def init(self, params: Tensor) -> State:
        _check_size(self.layout, params)
        return {
            "m": params.new_zeros(len(self.decays), params.shape[-1]),
            "step": torch.zeros((), dtype=torch.int64, device=params.device),
        }

    def update(
        self,
        meta: Meta,
        grad: Tensor,
        state: State,
        params: Tensor,
        *,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        rate = torch.stack([1 - grad.new_full((), decay) for decay in self.decays])
        m = averaged(state["m"], grad, rate)
        layout, deltas = at_least_vectors(self.layout), []
        of = [layout.views(flat) for flat in (grad, params, m)]
        for name in layout.shapes:
            g, p, mg = (views[name] for views in of)
            d, q = network(meta, [g[None], p[None], mg], state["step"])
            deltas.append(-self.step_mult * d * (self.exp_mult * q).exp())
        return joined(deltas, 0), {"m": m, "step": state["step"] + 1}

    def flops(self, n: int) -> int:
        time = self.hidden * len(HORIZONS) * len(self.layout.shapes)
        return 2 * (n * self.hidden * (2 + len(self.decays) + self.hidden + 2) + time)
