"""How stable is training? Eigenvalues of an optimizer's step, linearised where it is.

One step takes parameters and the optimizer's state to the next ones. Its derivative is
never formed: a Krylov space of derivative-vector products shows the eigenvalues at the
rim of the spectrum, which are the ones that decide. For gradient descent they are
``1 - lr * h`` with h those of the Hessian, so that -1 is the stability bound
``h = 2 / lr``; for momentum, Adam or a learned optimizer they are those of parameters
and state together, the matrix of STAR's section 4 for the real thing.

Of weights that no gradient reaches the spectrum says nothing: see
:class:`l2olib.looks.Idle`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.utils import _pytree as pytree

from .optimizees import Task
from .optimizers import Meta, Optimizer, State
from .train import Trace, Training, TrainingJob


def step_map(
    task: Task,
    optimizer: Optimizer,
    meta: Meta,
    params: Tensor,
    state: State,
    idx: Tensor,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """One step on the items ``idx`` as a map of one flat vector, and where it stands.

    The vector ``[n + m]`` holds the parameters ``[n]`` and every floating-point tensor
    of the state; counters stay as they are. All is in the dtype of ``params``.
    """
    leaves, spec = pytree.tree_flatten(state)
    real = [leaf.is_floating_point() for leaf in leaves]
    point = [params, *(v.to(params) for v, r in zip(leaves, real, strict=True) if r)]
    sizes = [v.numel() for v in point]

    def step(vector: Tensor) -> Tensor:
        at, *parts = vector.split(sizes)
        rest = iter(parts)
        inside = [
            next(rest).view(v.shape) if r else v
            for v, r in zip(leaves, real, strict=True)
        ]
        loss, grad = task.loss_and_grad(at, idx)
        delta, after = optimizer.update(
            meta, grad, pytree.tree_unflatten(inside, spec), at, loss=loss
        )
        # by name: a state read from a file has its entries in another order
        after = pytree.tree_map(lambda _, new: new, state, after)
        moved = zip(pytree.tree_leaves(after), real, strict=True)
        return torch.cat([at + delta, *(v.flatten() for v, r in moved if r)])

    return step, torch.cat([v.flatten() for v in point])


def balanced(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Units ``d [n]`` in which the derivative of ``function`` is well scaled.

    In them it is D^-1 J D, which has the eigenvalues of J. A sweep makes the norms of
    its rows and columns alike, as products with a vector of random signs tell them
    (KrylovAtz of Chen and Demmel, Balancing sparse matrices for computing eigenvalues,
    2000). An optimizer that divides by root mean squares needs it: where a gradient
    nearly vanishes, entries of J are in the billions, and Arnoldi sees nothing else.
    """
    d = torch.ones_like(at)
    draws = torch.Generator().manual_seed(0)
    pull = vjp(function, at)[1]
    for _ in range(4):
        signs = (torch.randint(0, 2, at.shape, generator=draws) * 2 - 1).to(at)
        rows = (jvp(function, (at,), (signs * d,))[1] / d).abs()
        columns = (pull(signs / d)[0] * d).abs()
        scaled = (rows > 0) & (columns > 0) & (rows / columns).isfinite()
        d = torch.where(scaled, d * (rows / columns).sqrt(), d)
    return d


def ritz_values(
    function: Callable[[Tensor], Tensor], at: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the derivative of ``function`` at ``at [n]``, by Arnoldi.

    In :func:`balanced` units, to which the residuals refer. Returns ``size`` Ritz
    values (complex) and the norms of their residuals, by falling modulus; those at the
    rim of the spectrum settle first, which the residual tells. Where the Krylov space
    is exhausted (a derivative of low rank, a small n) there are fewer, and the rest is
    NaN. Raises ValueError if the derivative is not finite.
    """
    d = balanced(function, at)
    draw = torch.randn(len(at), generator=torch.Generator().manual_seed(0))
    first = draw.to(at)
    basis = [first / first.norm()]
    hessenberg = at.new_zeros(size + 1, size)
    used = size
    for j in range(size):
        vector = jvp(function, (at,), (d * basis[j],))[1] / d
        if not vector.isfinite().all():
            raise ValueError(
                "the step has no derivative here: choose an optimizer without square "
                "roots of zero, such as AdamW with a positive eps_root"
            )
        length = vector.norm()
        for _ in range(2):  # once more, against what rounding left
            for i, other in enumerate(basis):
                along = other @ vector
                hessenberg[i, j] += along
                vector = vector - along * other
        hessenberg[j + 1, j] = vector.norm()
        if hessenberg[j + 1, j] <= 1e-10 * length:
            used = j + 1
            break
        basis.append(vector / vector.norm())
    values, vectors = torch.linalg.eig(hessenberg[:used, :used])
    residuals = (hessenberg[used, used - 1] * vectors[-1]).abs()
    order = values.abs().argsort(descending=True)
    missing = (0, size - used)
    return (
        torch.nn.functional.pad(values[order], missing, value=torch.nan),
        torch.nn.functional.pad(residuals[order], missing, value=torch.nan),
    )


@dataclass(frozen=True)
class Linearised(Training):
    """A training of one seed that looks at its own stability at every mark.

    Up to the mark at which its parameters are not finite any more: there is no step to
    linearise there, and the values are NaN.

    Its record also holds ``ritz [1, marks, size, 2]``, real and imaginary parts of the
    Ritz values of the step linearised on the first ``sample`` training items (0: all)
    in float64, and ``residuals [1, marks, size]``. The method is one optimizer alone.
    """

    size: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replicas != 1:
            raise ValueError("one seed at a time: replicas must be 1")
        if not hasattr(self.method, "optimizer"):
            raise ValueError("the method must be one optimizer alone, not a guard")

    def measure(self, job: TrainingJob, method: State, end: int) -> Trace:
        task, found = job.task, super().measure(job, method, end)
        if not method["params"].isfinite().all():
            blank = torch.full((1, self.size, 2), torch.nan)
            return found | {"ritz": blank, "residuals": blank[..., 0]}
        inner = pytree.tree_map(lambda v: v[0], method)
        step, point = step_map(
            task,
            self.method.optimizer,
            {k: v.double() for k, v in job.metas["optimizer"].items()},
            inner["params"].double(),
            inner["optimizer"],
            torch.arange(min(self.sample or task.items, task.items), device=job.device),
        )
        values, residuals = ritz_values(step, point, self.size)
        return found | {
            "ritz": torch.view_as_real(values)[None].float(),
            "residuals": residuals[None].float(),
        }
