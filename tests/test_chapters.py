"""Parameters of a chapter are checked before anything is computed."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from l2olib import chapters

FEW = chapters.optional(range(1, 6))
POSITIVE = ("a positive number", lambda value: value > 0)


@pytest.mark.parametrize("profile", chapters.PROFILES)
def test_allowed_values_pass_and_prepare_torch(profile: str) -> None:
    """Accept what is allowed; leave one thread and deterministic algorithms."""
    torch.use_deterministic_algorithms(False)
    chapters.begin(
        profile,
        seeds=(3, range(1, 6)),
        few=(None, FEW),
        more=(5, FEW),
        data=("a", ["a", "b"]),
        rate=(0.1, POSITIVE),
    )
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("value", "allowed", "message"),
    [
        (0, range(1, 6), "x = 0 is not allowed: use a whole number from 1 to 5."),
        (6, range(1, 6), "x = 6 is not allowed: use a whole number from 1 to 5."),
        (True, range(1, 6), "x = True is not allowed: use a whole number from 1 to 5."),
        (3.0, range(1, 6), "x = 3.0 is not allowed: use a whole number from 1 to 5."),
        ("3", range(1, 6), "x = '3' is not allowed: use a whole number from 1 to 5."),
        *(
            (
                x,
                chapters.optional(range(1, 6)),
                f"x = {x} is not allowed: use None or a whole number from 1 to 5.",
            )
            for x in (0, True, 3.0)
        ),
        (
            3,
            range(0, 9, 2),
            "x = 3 is not allowed: use a whole number from 0 to 8 in steps of 2.",
        ),
        ("c", ("a", "b"), "x = 'c' is not allowed: use one of a, b."),
        (True, (1, 10), "x = True is not allowed: use one of 1, 10."),
        ([1], (1, 10), "x = [1] is not allowed: use one of 1, 10."),
        (-1.0, POSITIVE, "x = -1.0 is not allowed: use a positive number."),
        (float("nan"), POSITIVE, "x = nan is not allowed: use a positive number."),
        ("1e-3", POSITIVE, "x = '1e-3' is not allowed: use a positive number."),
    ],
)
def test_other_values_fail_with_one_sentence(
    value: Any, allowed: chapters.Allowed, message: str
) -> None:
    """Say what is allowed, and change nothing before saying it."""
    torch.use_deterministic_algorithms(False)
    with pytest.raises(ValueError) as caught:
        chapters.begin("record", good=(1, [1]), x=(value, allowed))
    assert str(caught.value) == message
    assert not torch.are_deterministic_algorithms_enabled()


def test_unknown_profile_is_refused_first() -> None:
    """A wrong profile is named even where another parameter is wrong as well."""
    with pytest.raises(ValueError, match="one of record, smoke, laptop, paper"):
        chapters.begin("huge", x=(0, range(1, 6)))


def test_importing_the_package_is_quick() -> None:
    """The package and this module load neither torch nor matplotlib."""
    code = (
        "import sys, l2olib.chapters, l2olib.figures;"
        "print([m for m in ('torch', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
