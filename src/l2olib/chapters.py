"""Start a chapter: check its parameters, then make its computations repeatable."""

from collections.abc import Callable, Collection
from typing import Any

PROFILES = ("record", "smoke", "laptop", "paper")
"""What a chapter can do: load committed records, or recompute at one of three sizes."""

Allowed = Collection[Any] | tuple[str, Callable[[Any], bool]]
"""Either the allowed values, or what they are in words and a test for them."""


def optional(numbers: range) -> Allowed:
    """None or one of these whole numbers, as a limit of :func:`begin`."""
    return (
        f"None or a whole number from {numbers[0]} to {numbers[-1]}",
        lambda value: value is None or (type(value) is int and value in numbers),
    )


def begin(profile: str, **limits: tuple[Any, Allowed]) -> None:
    """Check every parameter of a chapter and prepare the process for it.

    Each keyword is ``name=(value, allowed)``. ``allowed`` is a collection of values, a
    ``range`` of whole numbers, or a pair (description, predicate). A value must have
    the type of the allowed one: ``True`` is no whole number, nor is ``3.0``.

    Afterwards torch runs on one thread with deterministic algorithms, and figures have
    the book's style.

    Raises ValueError with one sentence that says what is allowed, before anything
    else is done.
    """
    for name, (value, allowed) in {"profile": (profile, PROFILES), **limits}.items():
        _check(name, value, allowed)
    from . import figures, train

    train.repeatable()
    figures.use_style()


def _check(name: str, value: Any, allowed: Allowed) -> None:
    """Raise ValueError unless `value` is allowed."""
    if isinstance(allowed, tuple) and len(allowed) == 2 and callable(allowed[1]):
        wanted, accepts = allowed
        try:
            fits = bool(accepts(value))
        except (TypeError, ValueError):  # a predicate may meet a value of another type
            fits = False
    elif isinstance(allowed, range):
        wanted = f"a whole number from {allowed[0]} to {allowed[-1]}"
        if abs(allowed.step) != 1:
            wanted += f" in steps of {allowed.step}"
        fits = type(value) is int and value in allowed
    else:
        wanted = "one of " + ", ".join(str(choice) for choice in allowed)
        fits = any(type(value) is type(c) and value == c for c in allowed)
    if not fits:
        raise ValueError(f"{name} = {value!r} is not allowed: use {wanted}.")
