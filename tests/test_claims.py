"""The ledger: statistics, definitions of words, verdicts, hashes, negative controls."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from problems import random_numbers
from scipy.stats import permutation_test, spearmanr

from l2olib import claims
from l2olib.claims import (
    LEDGER,
    Claim,
    NotRecorded,
    NotTestable,
    divergence,
    judge,
    kinds,
    settle,
    window_mean,
)
from l2olib.claims.kinds import (
    AcceptsMore,
    AcceptsWorse,
    AtTheEdge,
    BarFalls,
    BestTrained,
    BetterTrained,
    Breaks,
    Cheaper,
    Descends,
    Diverges,
    DivergesOn,
    FewerHyperparameters,
    GoesWith,
    IdleGrow,
    IdleHarm,
    Inside,
    KeepsBetter,
    Larger,
    Later,
    Learns,
    Less,
    LessAligned,
    Lower,
    Matched,
    MoreSwitching,
    NearOptimum,
    Noisier,
    NotWorse,
    Quieter,
    RisesFirst,
    Saturates,
    StepsInside,
    Stuck,
    Switching,
    TimesSlower,
    Unbiased,
    Wins,
    WorseStart,
    ending,
    fails,
    holm,
    sign_flip,
)
from l2olib.experiments import ExperimentError, find
from l2olib.train import summarize

# ---- statistics ----------------------------------------------------------------------


def p_of(*values: float) -> float:
    return sign_flip(torch.tensor(values))


def test_sign_flip_by_hand():
    assert p_of(-1.0) == 1 / 2
    assert p_of(1.0) == 1.0
    assert p_of(-1, -2, -3, -4, -5) == 1 / 32
    assert p_of(-1, -2, -3, -4) == 1 / 16
    # Patterns of (+-1, +-2, +-3) whose sum is at most 1 - 2 - 3 = -4: two of eight.
    assert p_of(1.0, -2.0, -3.0) == 2 / 8
    # All equal: the share of patterns with at most one plus sign of four.
    assert p_of(-2, -2, -2, 2) == 5 / 16
    assert p_of(0.0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [3, 6, 9])
def test_sign_flip_equals_scipy(seed, n):
    d = random_numbers(seed, n) - 0.4
    expected = permutation_test(
        (d.numpy(), torch.zeros(n).numpy()),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        alternative="less",
        n_resamples=math.inf,
        vectorized=True,
    ).pvalue
    assert sign_flip(d) == pytest.approx(expected, rel=1e-12)


def test_sign_flip_of_many_pairs_is_close_to_the_exact_one():
    """17 pairs are drawn, not enumerated: within five standard errors."""
    d = random_numbers(0, 17) - 0.3
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=17))).double()
    exact = ((signs @ d) <= d.sum() + 1e-12).double().mean().item()
    assert abs(sign_flip(d) - exact) < 5 * math.sqrt(exact * (1 - exact) / 1e5)
    assert sign_flip(d) == sign_flip(d)
    assert sign_flip(-torch.ones(25)) == pytest.approx(1e-5, rel=0.01)


def test_sign_flip_is_calibrated():
    """Under symmetric noise, p < 0.05 happens in at most about 5% of the cases."""
    p = torch.tensor([sign_flip(d) for d in random_numbers(3, 400, 8)])
    assert (p < 0.05).double().mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sign_flip_refuses_what_is_not_finite(bad):
    with pytest.raises(NotTestable, match="are not finite"):
        p_of(-1.0, -1.0, -1.0, -1.0, -1.0, bad)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04]) == [0.04]
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02, 0.02, 0.001, 0.9]) == pytest.approx([0.06, 0.06, 0.004, 0.9])
    # An adjusted value never falls below one with a smaller p.
    assert holm([0.01, 0.011]) == pytest.approx([0.02, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize("n", [5, 6, 7, 8, 10, 15])
def test_the_detectable_effect_is_found_four_times_of_five(n):
    """More precisely of the few pairs whose factor is a simulation's."""
    count, room = (40_000, 0.01) if n < 8 else (2_000, 0.04)
    draws = torch.randn(count, n, generator=torch.Generator().manual_seed(n)).double()
    effect = kinds.detectable(draws[0]) / draws[0].std()
    shifted, signs = draws - effect, kinds._signs(n)
    below = shifted @ signs.T <= shifted.sum(1, keepdim=True) + 1e-12
    found = (below.double().mean(1) < kinds.ALPHA).double().mean()
    assert abs(found - 0.8) < room


def test_the_median_of_an_even_number_is_between_the_middle_two():
    table = torch.tensor([[1.0, 5.0, 2.0, 9.0], [1.0, math.nan, 2.0, math.inf]])
    assert kinds.median(table, 1).tolist() == [3.5, math.inf]
    assert kinds.median(table[:, :3].T, 0).tolist() == [2.0, 2.0]
    assert kinds.median(table) == 3.5
    assert kinds.median(torch.tensor([3, 4])) == 3.5


# ---- reading curves ------------------------------------------------------------------


def run(loss: torch.Tensor, **more) -> dict[str, torch.Tensor]:
    """Curves as an experiment's records give them."""
    return summarize(loss.float()) | more


def flat(value: float, seeds: int = 6, steps: int = 10_000, spread: float = 0.0):
    level = value + spread * torch.arange(seeds)[:, None]
    return run(level.expand(seeds, steps))


def test_window_mean_is_exact_between_recorded_points():
    loss = random_numbers(0, 2, 10_000)
    arrays = run(loss)
    points = [0, *arrays["steps"].tolist()]
    for a, b in [(0, 3), (4, 40), (10, 80), (4, 104), (60, 299)]:
        window = (points[a], points[b]) if b < len(points) else (points[a], points[-1])
        expected = loss[:, window[0] : window[1]].mean(1)
        assert torch.allclose(window_mean(arrays, window), expected, atol=1e-6)


def test_window_mean_snaps_to_the_nearest_points():
    loss = torch.arange(1.0, 10_001).repeat(1, 1)
    arrays = run(loss)
    exact = (1_001 + 10_000) / 2
    assert window_mean(arrays, (1_000, 10_000)).item() == pytest.approx(exact, rel=0.01)
    # Between two points it is the whole bin that is nearest.
    first, last = arrays["steps"][-9:-7].tolist()
    narrow = window_mean(arrays, (first + 1, first + 2)).item()
    assert narrow == pytest.approx((first + 1 + last) / 2)


def test_a_window_beyond_the_records_cannot_be_tested():
    with pytest.raises(NotTestable, match="end at step 1000, before 1001"):
        window_mean(run(torch.ones(1, 1000)), (0, 1001))


# ---- divergence ----------------------------------------------------------------------

STEPS = torch.arange(1, 10_001).double()


def falling_then(factor: float, at: int = 2_000) -> torch.Tensor:
    """Fall to 1 at step `at`, then rise linearly to `factor` at the end."""
    fall = 3 - 2 * STEPS / at
    rise = 1 + (factor - 1) * (STEPS - at) / (10_000 - at)
    return torch.where(STEPS <= at, fall, rise)


def test_divergence_on_curves_drawn_by_hand():
    noisy = 0.3 + 0.25 * random_numbers(2, 10_000).clamp(-1, 1)
    noisy[1_000:] += 0.02  # no trend worth the name
    rows = {
        "falls": 3 - 2.9 * STEPS / 10_000,
        "flat": torch.ones(10_000),
        "rises little": falling_then(1.4),
        "rises": falling_then(3.0, at=500),
        "comes back below its start": falling_then(1.6, at=2_000),
        "bump": 1 + 3 * torch.exp(-(((STEPS - 5_000) / 500) ** 2)),
        "noise around one level": noisy,
        "nan at the end": torch.where(STEPS > 9_000, math.nan, 1.0),
        "one infinite loss": torch.where(STEPS == 4_444, math.inf, 1.0),
    }
    diverged, onset = divergence(run(torch.stack(list(rows.values()))))
    found = dict(zip(rows, diverged.tolist(), strict=True))
    when = dict(zip(rows, onset.tolist(), strict=True))
    assert [name for name, yes in found.items() if yes] == [
        "rises",
        "nan at the end",
        "one infinite loss",
    ]
    # 1.5 is reached 1/4 of the way from step 500, 50 steps later in the trailing mean.
    assert when["rises"] == pytest.approx(500 + 9_500 / 4 + 50, rel=0.05)
    assert when["nan at the end"] == pytest.approx(9_001, rel=0.05)
    assert when["one infinite loss"] == pytest.approx(4_444, rel=0.05)
    assert when["falls"] == when["bump"] == 0


def test_a_tenth_of_the_horizon_is_the_last_point_within_it():
    steps = torch.tensor([300, 900, 1_000, 5_000, 10_000])
    smooth = torch.tensor([[5.0, 4.0, 2.0, 1.0, 3.0], [5.0, 1.0, 4.0, 1.0, 3.0]])
    found, _ = divergence({"steps": steps, "smooth": smooth, "bin_mean": smooth})
    assert found.tolist() == [True, False]


def test_divergence_in_words():
    some = run(torch.stack([torch.ones(10_000), falling_then(3.0, at=500)]))
    onset = int(divergence(some)[1][1])
    assert claims.diverging(some) == f"1 of 2, {onset:,}"
    assert claims.diverging(some, since=False) == "1 of 2"
    assert claims.diverging(run(torch.ones(3, 10_000))) == "0 of 3"
    assert claims.diverging(run(torch.ones(3, 100))) == ""


def test_divergence_needs_smoothed_losses():
    with pytest.raises(NotTestable, match="end before step 300"):
        divergence(run(torch.ones(2, 200)))


def test_diverges_counts_seeds_and_checks_the_time():
    bad, good = falling_then(3.0, at=500), torch.ones(10_000)
    curves = {
        "A": run(torch.stack([bad] * 4 + [good])),
        "B": run(torch.stack([good] * 4 + [bad])),
        "C": run(torch.stack([bad] * 3 + [good] * 2)),
        "few": run(torch.stack([bad] * 4)),
    }
    assert Diverges("f", "A")(curves).passed
    assert not Diverges("f", "B")(curves).passed
    assert Diverges("f", "B", expected=False)(curves).passed
    assert not Diverges("f", "A", expected=False)(curves).passed
    for expected in (True, False):
        assert not Diverges("f", "C", expected)(curves).passed
    assert Diverges("f", "A", between=(2_000, 4_000))(curves).passed
    assert not Diverges("f", "A", between=(300, 2_000))(curves).passed
    with pytest.raises(NotTestable, match="4 seeds are fewer than 5"):
        Diverges("f", "few")(curves)
    with pytest.raises(NotTestable, match="end at step 10000"):
        Diverges("f", "A", between=(1, 20_000))(curves)


# ---- comparisons ---------------------------------------------------------------------

WINDOW = (100, 1_000)


def test_lower_and_its_lead():
    curves = {"A": flat(1.0, spread=0.01), "B": flat(1.2, spread=0.01)}
    assert Lower("f", "A", "B", WINDOW)(curves).passed
    assert Lower("f", "A", "B", WINDOW, by=0.19)(curves).passed
    assert not Lower("f", "A", "B", WINDOW, by=0.21)(curves).passed
    assert not Lower("f", "B", "A", WINDOW)(curves).passed
    assert not Lower("f", "A", "A", WINDOW)(curves).passed


def test_not_worse_has_a_margin():
    """0.02 nat, or 5% of the reference's where that is below 0.1."""
    for level, margin in ((1.0, 0.02), (0.11, 0.02), (0.09, 0.0045), (0.05, 0.0025)):
        near, far = flat(level + 0.9 * margin), flat(level + 1.1 * margin)
        curves = {"R": flat(level), "near": near, "far": far}
        assert NotWorse("f", "near", "R", WINDOW)(curves).passed
        assert NotWorse("f", "R", "R", WINDOW)(curves).passed
        assert not NotWorse("f", "far", "R", WINDOW)(curves).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_worse_than_any_other(bad):
    broken = torch.ones(6, 10_000)
    broken[:, 500] = bad
    curves = {"A": run(broken), "B": flat(50.0)}
    assert not Lower("f", "A", "B", WINDOW)(curves).passed
    assert not NotWorse("f", "A", "B", WINDOW)(curves).passed
    assert Lower("f", "B", "A", WINDOW)(curves).passed
    assert NotWorse("f", "B", "A", WINDOW)(curves).passed
    assert not NotWorse("f", "A", "A", WINDOW)(curves).passed
    # Nor is there a margin beside losses that count as the same.
    assert not NotWorse("f", "A", "C", WINDOW)(curves | {"C": flat(2e3)}).passed


def test_too_few_seeds_or_steps_or_methods():
    curves = {"A": flat(1.0, seeds=4), "B": flat(2.0, seeds=4)}
    with pytest.raises(NotTestable, match="4 seeds are fewer than 5"):
        Lower("f", "A", "B", WINDOW)(curves)
    with pytest.raises(NotTestable, match="end at step 10000, before 20000"):
        NotWorse("f", "A", "B", (0, 20_000))(curves)
    with pytest.raises(NotRecorded, match="no record of C"):
        Lower("f", "A", "C", WINDOW)(curves)


def test_later():
    loss = torch.linspace(2, 1, 10_000).repeat(5, 1)
    curves = {"A": run(loss), "B": run(loss.flip(1))}
    assert Later("f", "A", (9_000, 10_000), (0, 1_000))(curves).passed
    assert not Later("f", "B", (9_000, 10_000), (0, 1_000))(curves).passed


def test_switching():
    def shares(early: float, late: float, seeds: int = 6):
        gen = torch.Generator().manual_seed(0)
        level = torch.linspace(early, late, 1_000).repeat(seeds, 1)
        use = torch.bernoulli(level, generator=gen)
        return {"use_l2o": use, "decisions": torch.arange(1, 1_001)}

    test = Switching("f", "G")
    assert test({"G": shares(0.9, 0.2)}).passed
    assert not test({"G": shares(0.2, 0.9)}).passed
    assert not test({"G": shares(0.5, 0.5)}).passed
    final = shares(0.9, 0.5)
    final["use_l2o"][:, -100:] = 0
    assert not test({"G": final}).passed, "for good is not a drift"
    seldom = kinds.Seldom("f", "G")
    assert seldom({"G": final}).passed and not seldom({"G": shares(0.0, 0.5)}).passed
    final["use_l2o"][:, -100:-80] = 1  # a fifth of the last tenth
    assert not seldom({"G": final}).passed
    assert kinds.Seldom("f", "G", 0.3)({"G": final}).passed


def test_keeps_lower_at_nearly_all_points():
    def kept(higher: int):
        """Six seeds, twenty marks; at so many of them the other keeps a lower loss."""
        ours = torch.ones(6, 20)
        ours[:, :higher] = 2.0
        return {"A": {"kept": ours, "kept.B": torch.full((6, 20), 1.5)}}

    test = kinds.KeepsLower("f", "A", "B")
    assert test(kept(1)).passed and not test(kept(2)).passed
    assert "at 95% of 20 points" in test(kept(1)).measured
    assert kinds.KeepsLower("f", "A", "B", 0.5)(kept(9)).passed


def test_more_switching():
    def switches(count: float, seeds: int = 6):
        counts = torch.tensor([[count, 2 * count]]).repeat(seeds, 1)
        return {"switches": counts, "decisions": torch.tensor([10, 100])}

    curves = {"A": switches(5), "B": switches(4)}
    assert MoreSwitching("f", "A", "B")(curves).passed
    assert not MoreSwitching("f", "B", "A")(curves).passed
    assert "0.15 against 0.12" in MoreSwitching("f", "A", "B")(curves).measured


def test_accepts_more():
    def accepting(*shares):
        """Bins of 10 and 30 decisions."""
        use = torch.tensor([shares] * 5)
        return {"use_l2o": use, "decisions": torch.tensor([10, 40])}

    curves = {"A": accepting(0.0, 0.4), "B": accepting(0.9, 0.0)}  # 30% and 22.5%
    assert AcceptsMore("f", "A", "B")(curves).passed
    assert not AcceptsMore("f", "B", "A")(curves).passed
    assert not AcceptsMore("f", "A", "A")(curves).passed
    assert "30.0% against 22.5%" in AcceptsMore("f", "A", "B")(curves).measured


def test_noisier_stuck_and_rising():
    ripple = torch.where(torch.arange(10_000) % 600 < 300, 0.05, -0.05)
    falling = torch.linspace(1.0, 0.5, 10_000).repeat(6, 1)
    hump = torch.ones(6, 10_000)
    hump[:, 20:40] = 1.3
    curves = {
        "calm": flat(1.0),
        "wavy": run(1 + ripple.repeat(6, 1)),
        "falling": run(falling),
        "hump": run(hump),
    }
    late, early = (5_000, 10_000), (0, 1_000)
    assert Noisier("f", "wavy", "calm", late)(curves).passed
    assert not Noisier("f", "calm", "wavy", late)(curves).passed
    curves["jump"] = curves["calm"] | {"smooth": curves["calm"]["smooth"].clone()}
    curves["jump"]["smooth"][:, -100] = 9.0
    jump = int(curves["jump"]["steps"][-100])
    for first, passed in ((jump - 1, True), (jump, False)):
        window = (first, 10_000)
        assert Noisier("f", "jump", "wavy", window)(curves).passed is passed
    assert Stuck("f", "wavy", late, early)(curves).passed
    assert not Stuck("f", "falling", late, early)(curves).passed
    assert Stuck("f", "falling", late, early, share=0.5)(curves).passed
    assert RisesFirst("f", "hump")(curves).passed
    assert not RisesFirst("f", "hump", by=0.31)(curves).passed
    assert not RisesFirst("f", "falling")(curves).passed


def test_breaks():
    loss = torch.ones(5, 1_000)
    broken = loss.clone()
    broken[:, 50:] = math.nan
    most, late = broken.clone(), loss.clone()
    most[0] = 1.0
    late[:, 150:] = math.inf
    curves = {"A": run(broken), "B": run(loss), "C": run(most), "D": run(late)}
    found = {k: Breaks("f", k, 100)(curves).passed for k in curves}
    assert found == {"A": True, "B": False, "C": True, "D": False}
    assert Breaks("f", "D", 200)(curves).passed
    with pytest.raises(NotTestable, match="end at step 1000"):
        Breaks("f", "A", 2_000)(curves)


def audit(use, proposal, fallback):
    values = {"use_l2o": use, "full_proposal": proposal, "full_fallback": fallback}
    return {f"audit.{k}": torch.tensor(v).repeat(6, 1) for k, v in values.items()}


def test_audited_decisions():
    """Two acceptances and a rejection: all right, one wrong, both wrong."""
    right = audit([1.0, 1.0, 0.0], [0.5, 0.6, 0.9], [0.7, 0.7, 0.7])
    one = audit([1.0, 1.0, 0.0], [0.5, 0.8, 0.9], [0.7, 0.7, 0.7])
    both = audit([1.0, 1.0, 0.0], [0.8, math.nan, 0.9], [0.7, 0.7, 0.7])
    never = audit([0.0, 0.0, 0.0], [0.8, 0.8, 0.9], [0.7, 0.7, 0.7])
    curves = {"right": right, "one": one, "both": both, "never": never}
    kept = {k: KeepsBetter("f", k)(curves).passed for k in curves}
    assert kept == {"right": True, "one": False, "both": False, "never": True}
    worse = {k: AcceptsWorse("f", k)(curves).passed for k in ("right", "one", "both")}
    assert worse == {"right": False, "one": False, "both": True}
    assert AcceptsWorse("f", "one", share=0.4)(curves).passed
    with pytest.raises(NotTestable, match="only 0 seeds"):
        AcceptsWorse("f", "never")(curves)


def test_bars():
    steady = torch.tensor([1.0, 0.5, 0.5, 0.05]).repeat(5, 1)
    risen = steady.clone()
    risen[4, 2] = 0.6
    flat_loss, falling = torch.ones(5, 1_000), torch.linspace(1, 0, 1_000).repeat(5, 1)
    curves = {
        "A": run(flat_loss, bar=steady),
        "B": run(falling, bar=risen),
        "C": run(flat_loss, bar=steady.sqrt()),
    }
    assert BarFalls("f", "A")(curves).passed
    found = BarFalls("f", "B")(curves)
    assert not found.passed and found.measured.startswith("rises in 1 of 5")
    saturated = {k: Saturates("f", k)(curves).passed for k in curves}
    assert saturated == {"A": True, "B": False, "C": False}


def test_learns():
    bar = 0.75 * math.log(10)

    def last(value):
        return {"z/d": {"selected.last": torch.full((6,), value)}}

    for value, learned in ((bar - 0.1, True), (bar + 0.1, False), (math.nan, False)):
        assert Learns("f", "z", "d", 10)(last(value)).passed is learned
        assert Learns("f", "z", "d", 10, expected=False)(last(value)).passed is (
            not learned
        )


def test_costs_and_hyperparameters():
    curves = {
        "A": {"flops": torch.tensor([2.0]), "hyperparameters": torch.tensor([2, 2])},
        "B": {"flops": torch.tensor([3.0]), "hyperparameters": torch.tensor([3])},
    }
    assert Cheaper("f", "A", "B", "flops")(curves).passed
    assert not Cheaper("f", "B", "A", "flops")(curves).passed
    assert not Cheaper("f", "A", "A", "flops")(curves).passed
    timed = {
        name: {"seconds": torch.tensor([x]), "conditions": torch.tensor([7])}
        for name, x in zip("AB", (2.0, 2.3), strict=True)
    }
    assert Cheaper("f", "A", "B", "seconds")(timed).passed
    timed["B"]["conditions"] = torch.tensor([8])
    with pytest.raises(NotTestable, match="not measured under equal conditions"):
        Cheaper("f", "A", "B", "seconds")(timed)
    assert FewerHyperparameters("f", "A", "B")(curves).passed
    assert not FewerHyperparameters("f", "A", "A")(curves).passed


def test_matched_has_a_factor():
    curves = {
        name: {"flops": torch.tensor([x])}
        for name, x in zip("AB", (2.0, 2.3), strict=True)
    }
    assert Matched("f", "A", "B", "flops")(curves).passed
    assert not Matched("f", "B", "A", "flops")(curves).passed
    assert Matched("f", "B", "A", "flops", within=1.2)(curves).passed
    assert Matched("f", "A", "A", "flops", within=1.0)(curves).passed


def objectives(early: float, late: float, selected: float, seeds: int = 6):
    """Meta-objectives after 0, 64 and 1,000 iterations."""
    spread = 0.01 * torch.arange(seeds)[:, None]
    return {
        "rollouts": torch.tensor([0, 64, 1_000]),
        "objective": torch.tensor([[2.0, early, late]]) + spread,
        "selected.objective": selected + spread[:, 0],
    }


def released(factor: float, seeds: int = 6):
    """Losses 8, 4, 2, 1 at four marks; from each an optimizer gets to a share of it."""
    loss = torch.tensor([8.0, 4.0, 2.0, 1.0]).expand(seeds, 4)
    noise = 1 + 0.01 * torch.arange(seeds)[:, None]
    marks = torch.tensor([10, 100, 1_000, 10_000])
    return {"marks": marks, "full_loss": loss, "released": 0.1 * factor * loss * noise}


def test_a_start_is_compared_with_one_of_equal_loss():
    """Between the reference's marks, and only at losses that it passes through."""
    a, b = released(3.0), released(1.0)
    a["full_loss"] = torch.tensor([9.0, 3.0, 2.0, 0.5]).expand(6, 4)
    a["released"] = 0.3 * a["full_loss"]
    found = WorseStart("f", "A", "B", (0, 10_000))({"A": a, "B": b})
    assert found.passed and found.measured.startswith("loss after 2.93 times that from")
    with pytest.raises(NotTestable, match="does not pass through these losses"):
        WorseStart("f", "A", "B", (0, 10))({"A": a, "B": b})


def test_better_trained():
    curves = {"A": objectives(1.0, 0.6, 0.5), "B": objectives(1.5, 0.4, 0.51)}
    for iterations, better in (
        (64, "A"), (1_000, "B"), (None, "A"), (60, "A"), (1_240, "B")
    ):  # fmt: skip
        worse = "AB".replace(better, "")
        assert BetterTrained("f", better, worse, iterations)(curves).passed
        assert not BetterTrained("f", worse, better, iterations)(curves).passed
        assert not BetterTrained("f", "A", "A", iterations)(curves).passed
    # A margin forgives so much and no more.
    assert BetterTrained("f", "B", "A", margin=0.02)(curves).passed
    assert not BetterTrained("f", "B", "A", margin=0.009)(curves).passed
    assert not BetterTrained("f", "A", "B", 1_000, margin=0.02)(curves).passed
    broken = curves | {"B": objectives(1.5, 0.4, math.nan)}
    assert BetterTrained("f", "A", "B")(broken).passed
    assert not BetterTrained("f", "B", "A")(broken).passed
    for away, near in ((100, 64), (1_300, 1_000), (810, 1_000)):
        with pytest.raises(NotTestable, match=f"the next is of {near}"):
            BetterTrained("f", "A", "B", away)(curves)
    few = {"A": objectives(1.0, 1.0, 1.0, 4), "B": objectives(2.0, 2.0, 2.0, 4)}
    with pytest.raises(NotTestable, match="4 seeds are fewer"):
        BetterTrained("f", "A", "B")(few)


def spectrum(*left: float, largest: float = 1.0, seeds: int = 5, losses=None):
    """Five marks; two Ritz values at each, the leftmost and another."""
    ritz = torch.full((seeds, 5, 3, 2), math.nan)
    ritz[:, :, :2, 1] = 0.0
    ritz[:, :, 0, 0] = torch.tensor(left)
    ritz[:, :, 1] = torch.tensor([0.6, 0.8]) * largest
    losses = losses or [2.0, 1.5, 1.0, 0.5, 0.1]
    return {"ritz": ritz, "full_loss": torch.tensor([losses] * seeds)}


def test_at_the_edge_looks_from_the_first_touch_to_a_tenth_of_the_loss():
    curves = {
        "at": spectrum(0.5, -0.91, -1.2, -0.9, 0.8),  # the last: the loss has fallen
        "never": spectrum(0.5, -0.8, -0.85, -0.89, -0.95),
        "leaves": spectrum(0.5, -0.95, 0.2, 0.4, 0.5),
        "beyond": spectrum(0.5, -0.95, -1.8, -1.9, -1.9),
        "nan": spectrum(0.5, -0.95, -1.0, -1.0, -1.0, losses=[2.0] + [math.nan] * 4),
    }
    found = {k: AtTheEdge("f", k)(curves).passed for k in curves}
    assert found == {k: k == "at" for k in curves}
    assert not AtTheEdge("f", "at", expected=False)(curves).passed
    assert AtTheEdge("f", "never", expected=False)(curves).passed
    assert "leftmost eigenvalue -0.89 " in AtTheEdge("f", "never")(curves).measured
    some = curves["at"] | {"ritz": curves["at"]["ritz"].clone()}
    for out, passed in ((1, True), (2, False)):  # four fifths of five
        some["ritz"][:out, :, 0, 0] = 0.5
        assert AtTheEdge("f", "some")({"some": some}).passed is passed


def test_idle_weights_that_grow_or_harm():
    def arrays(growth, with_, without):
        last = {"growth": growth, "test_loss": with_, "pruned.test_loss": without}
        return {
            k: torch.tensor([[1.0, v] for v in values]) for k, values in last.items()
        }

    inf, nan = math.inf, math.nan
    curves = {
        "all": arrays([11.0] * 5, [3.0] * 5, [1.0] * 5),
        "most": arrays([11.0, 11, 11, inf, 2], [3.0, 3, nan, inf, 1], [1.0] * 5),
        "some": arrays([11.0, 11, 11, 2, 2], [3.0, 3, 3, 1, 1], [1.0] * 5),
        "none": arrays([nan] * 5, [1.0] * 5, [1.0] * 5),
        "both gone": arrays([nan] * 5, [nan] * 5, [inf] * 5),
        "worse without": arrays([9.0] * 5, [1.0] * 5, [inf] * 5),
    }
    for kind in (IdleGrow, IdleHarm):
        found = {k: kind("f", k)(curves).passed for k in curves}
        assert found == {k: k in ("all", "most") for k in curves}
        absent = {k: kind("f", k, False)(curves).passed for k in curves}
        assert absent == {k: k not in ("all", "most", "some") for k in curves}


def test_weights_that_end_larger():
    def arrays(*totals):
        """Two tensors at two marks; at the first they are huge."""
        last = torch.tensor(totals)[:, None] * torch.tensor([0.6, 0.8])
        return {"norms": torch.stack([torch.full_like(last, 1e6), last], 1)}

    inf, nan = math.inf, math.nan
    curves = {
        "reference": arrays(1.0, 2.0, 3.0, 4.0, 5.0),
        "all": arrays(3.1, 6.1, 9.1, 12.1, 15.1),
        "most": arrays(3.1, 6.1, nan, inf, 14.9),
        "some": arrays(3.1, 6.1, 9.1, 11.9, 14.9),
        "none": arrays(2.9, 5.9, 8.9, 11.9, 14.9),
    }
    found = {k: Larger("f", k, "reference")(curves).passed for k in curves}
    assert found == {k: k in ("all", "most") for k in curves}
    absent = {k: Larger("f", k, "reference", False)(curves).passed for k in curves}
    assert absent == {k: k in ("reference", "none") for k in curves}
    with pytest.raises(NotTestable, match="4 seeds are fewer"):
        Larger("f", "a", "a")({"a": arrays(1.0, 1.0, 1.0, 1.0)})


def test_steps_inside_reads_moduli_at_the_last_marks():
    curves = {
        "in": spectrum(*[0.1] * 5, largest=1.04),
        "out": spectrum(*[0.1] * 5, largest=1.06),
        "was": spectrum(*[-1.5, -1.5, 0.1, 0.1, 0.1]),
    }
    found = {k: StepsInside("f", k)(curves).passed for k in curves}
    assert found == {"in": True, "out": False, "was": True}
    assert StepsInside("f", "out", expected=False)(curves).passed
    some = spectrum(*[0.1] * 5, largest=1.06)
    some["ritz"][:3, :, 1] = torch.tensor([0.6, 0.8])
    for expected in (True, False):  # three of five are inside: neither
        assert not StepsInside("f", "some", expected)({"some": some}).passed
    lost = spectrum(*[0.1] * 5, largest=0.5)
    lost["ritz"][:, -1, 1:] = torch.nan  # a Krylov space may be exhausted
    assert StepsInside("f", "lost")({"lost": lost}).passed
    lost["ritz"][:, -1] = torch.nan  # where training has diverged nothing is stable
    assert StepsInside("f", "lost", expected=False)({"lost": lost}).passed
    with pytest.raises(NotTestable, match="4 seeds are fewer"):
        StepsInside("f", "a")({"a": spectrum(*[0.1] * 5, seeds=4)})


def scattered(mean: float, deviation: float, seeds: int = 25):
    """Estimates of exactly this mean and deviation, of a gradient of -2."""
    x = random_numbers(0, seeds)
    x = (x - x.mean()) / x.std()
    return {"estimate": mean + deviation * x, "exact": torch.tensor([-2.0])}


def test_unbiased_needs_precision_and_closeness():
    # Of 25 estimates with deviation 0.1: a standard error of 0.02, 1% of 2.
    for mean, unbiased, biased in (
        (-2.0, True, False),
        (-2.05, True, False),
        (-1.95, True, False),
        (-1.92, False, False),  # four errors away: neither
        (-1.88, False, True),
        (-2.12, False, True),
    ):
        curves = {"A": scattered(mean, 0.1)}
        assert Unbiased("f", "A")(curves).passed is unbiased
        assert Unbiased("f", "A", expected=False)(curves).passed is biased
    vague = {"A": scattered(-2.0, 0.4), "B": scattered(-1.0, 0.4)}
    assert not Unbiased("f", "A")(vague).passed
    assert not Unbiased("f", "B", expected=False)(vague).passed
    with pytest.raises(NotTestable, match="4 seeds are fewer"):
        Unbiased("f", "A")({"A": scattered(-2.0, 0.1, 4)})


# ---- verdicts ------------------------------------------------------------------------


def test_less_and_inside():
    a = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
    curves = {"A": {"radius": a}, "B": {"radius": a + 0.3}, "C": {"radius": a * 1.2}}
    assert Less("f", "A", "B", "radius")(curves).passed
    assert not Less("f", "B", "A", "radius")(curves).passed
    assert not Less("f", "A", "A", "radius")(curves).passed
    assert Inside("f", "A")(curves).passed
    assert not Inside("f", "B")(curves).passed  # one of five, two inside
    assert Inside("f", "C")(curves).passed  # four of five
    assert not Inside("f", "A", expected=False)(curves).passed
    assert Inside("f", "B", expected=False)({"B": {"radius": a + 0.5}}).passed
    with pytest.raises(NotTestable, match="4 seeds are fewer"):
        Inside("f", "A")({"A": {"radius": a[:4]}})


def test_less_aligned():
    """Estimates along the meta-gradient, beside it, and across it."""
    exact = torch.tensor([[[3.0, 0.0]]]).expand(5, 1, 2)

    def of(mean, square):
        return {
            "clipped.mean": torch.tensor([[mean]]).expand(5, 1, 2),
            "clipped.square": torch.full((5, 1), square),
        }

    alike, noisy, askew = (
        of([7.0, 0.0], 49.0),
        of([7.0, 0.0], 196.0),
        of([3.0, 4.0], 25),
    )
    for arrays, expected in ((alike, 1.0), (noisy, 0.5), (askew, 0.6)):
        assert (
            claims.alignment(arrays, exact).tolist() == [[pytest.approx(expected)]] * 5
        )
    assert claims.alignment(of([0.0, 0.0], 0.0), exact).abs().max() == 0
    curves = {"noisy": noisy, "askew": askew, "exact": {"mean": exact}}
    found = LessAligned("f", "noisy", "askew", "exact")(curves)
    assert found.passed and found.measured.startswith("5 of 5 seeds, median 0.5")
    assert not LessAligned("f", "askew", "noisy", "exact")(curves).passed


def bowl(low: float, horizons=(1, 10, 100), batches: int = 8, noise: float = 0.1):
    """A variance of 1 at both ends and `low` in between, at five alphas."""
    shape = torch.tensor([1.0, low, low, low, 1.0]).expand(len(horizons), 5)
    spread = 1 + noise * random_numbers(0, batches, len(horizons), 1)
    return {
        "alphas": torch.linspace(0, 1, 5),
        "horizons": torch.tensor(horizons),
        "deviation": shape * spread,
    }


def test_quieter():
    inner, all_horizons = (0.0, 1.0), (1, 100)
    low = Quieter("f", "A", inner, all_horizons)({"A": bowl(0.5)})
    assert low.passed and low.measured.startswith("at least 2 times lower")
    assert not Quieter("f", "A", inner, all_horizons)({"A": bowl(2.0)}).passed
    assert Quieter("f", "A", inner, (10, 100), by=10.0)({"A": bowl(0.05)}).passed
    assert not Quieter("f", "A", inner, (10, 100), by=30.0)({"A": bowl(0.05)}).passed
    # One alpha, horizon or end that is too high is enough to fail.
    for place in ((slice(None), 1, 3), (slice(None), 2, 0)):
        spoiled = bowl(0.5)
        spoiled["deviation"] = spoiled["deviation"].clone()
        spoiled["deviation"][place] = 3.0 if place[2] else 0.2
        found = Quieter("f", "A", inner, all_horizons)({"A": spoiled})
        assert not found.passed
        assert f"not shown at horizon {spoiled['horizons'][place[1]]}" in found.measured
    # ... unless it is not asked about.
    spoiled = bowl(0.5)
    spoiled["deviation"][:, 1, 3] = 3.0
    assert Quieter("f", "A", (0.2, 0.6), all_horizons)({"A": spoiled}).passed
    assert Quieter("f", "A", inner, (100, 100))({"A": spoiled}).passed
    with pytest.raises(NotTestable, match="end at horizon 100"):
        Quieter("f", "A", inner, (1, 1_000))({"A": bowl(0.5)})


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_equals_scipy(seed):
    x = random_numbers(seed, 40)
    y = x + random_numbers(seed + 10, 40)
    expected = spearmanr(x.numpy(), y.numpy()).statistic
    assert claims.rank_correlation(x, y).item() == pytest.approx(expected, rel=1e-12)
    more = torch.cat([x, torch.tensor([100.0])])
    gap = torch.cat([y, torch.tensor([math.nan])])
    assert claims.rank_correlation(more, gap).item() == pytest.approx(expected)


def test_goes_with():
    steps = torch.arange(1, 41)
    x = random_numbers(0, 6, 40)
    curves = {
        name: {"steps": steps, "radius": x + k, "up": (x + k).exp(), "down": -x - k}
        for k, name in enumerate("AB")
    }
    window = (0, 40)
    assert GoesWith("f", ("A", "B"), "up", window)(curves).passed
    assert not GoesWith("f", ("A", "B"), "down", window)(curves).passed
    unrelated = curves["A"] | {"up": random_numbers(1, 6, 40)}
    assert not GoesWith("f", ("A",), "up", window)({"A": unrelated}).passed
    # Only the window counts: outside it everything may be reversed.
    mixed = curves["A"] | {"up": torch.where(steps <= 20, x, -x)}
    assert GoesWith("f", ("A",), "up", (0, 20))({"A": mixed}).passed
    assert not GoesWith("f", ("A",), "up", (20, 40))({"A": mixed}).passed
    with pytest.raises(NotTestable, match="end at iteration 40"):
        GoesWith("f", ("A",), "up", (0, 50))(curves)


def descent(first: int, seeds: int = 5, last: int = 10_000):
    """An exact meta-loss that comes within 5% of the optimum 2 at iteration `first`."""
    steps = torch.tensor([0, 10, 100, 500, 2_000, last])
    exact = torch.where(steps >= first, 2.09, 3.0).expand(seeds, -1)
    return {"steps": steps, "exact": exact, "optimum": torch.tensor([2.0])}


def test_near_optimum_and_times_slower():
    never = 10**9
    curves = {"A": descent(100), "B": descent(500), "C": descent(never)}
    assert NearOptimum("f", ("A", "B"), 100)(curves).passed
    assert not NearOptimum("f", ("B", "C"), 100)(curves).passed
    assert NearOptimum("f", ("B", "C"), 500)(curves).passed
    assert not NearOptimum("f", ("C",), 10_000)(curves).passed
    assert not NearOptimum("f", ("A",), 500, bar=1.04)(curves).passed
    with pytest.raises(NotTestable, match="before iteration 20,000"):
        NearOptimum("f", ("A",), 20_000)(curves)
    assert TimesSlower("f", ("A", "B"), 5.0)(curves).passed
    assert not TimesSlower("f", ("A", "B"), 6.0)(curves).passed
    # Never within the records is enough where these are long enough to say so.
    assert TimesSlower("f", ("A", "B", "C"), 100.0)(curves).passed
    with pytest.raises(NotTestable, match="C has not arrived"):
        TimesSlower("f", ("A", "B", "C"), 200.0)(curves)
    with pytest.raises(NotTestable, match="4 seeds are fewer"):
        NearOptimum("f", ("A",), 100)({"A": descent(100, seeds=4)})


def on_tasks(*levels: float, method: str = "A", seeds: int = 6, fall: float = 0.0):
    """Runs on tasks "0", "1", ... at these levels, each task on another scale."""
    steps = torch.linspace(1, 0, 1_000)
    return {
        f"{k}, {method}": run((level * 10**k * (1 + fall * steps)).expand(seeds, -1))
        for k, level in enumerate(levels)
    }


def test_the_ending_is_the_last_tenth():
    losses = torch.cat([torch.full((1, 800), 5.0), torch.full((1, 200), 2.0)], 1)
    assert ending(run(losses)).item() == pytest.approx(2.0)
    losses[0, -1] = torch.nan
    assert ending(run(losses)).item() == math.inf


def test_wins_counts_tasks_whatever_their_scale():
    five = ("0", "1", "2", "3", "4")
    curves = on_tasks(1.0, 1.0, 1.0, 1.0, 1.04)
    curves |= on_tasks(1.1, 1.1, 1.1, 1.1, 1.0, method="B")
    nearly = Wins("f", five, "A", "B", (0.8, 1.0))
    assert nearly(curves).passed and nearly(curves).measured == (
        "on 80%; not always on 4 (0 of 6 seeds)"
    )
    assert not replace(nearly, share=(0.9, 1.0))(curves).passed
    assert replace(nearly, share=(0.9, 1.0), within=1.05)(curves).passed
    # The negative control: labels swapped, and a draw with oneself.
    swapped = replace(nearly, method="B", reference="A")
    assert not swapped(curves).passed
    assert replace(swapped, share=(0.0, 0.5))(curves).passed
    assert not replace(nearly, reference="A")(curves).passed
    # What is not finite loses to what is, and to its like.
    curves["0, A"] = run(torch.full((6, 1_000), torch.nan))
    lost = "on 60%; not always on 0 (0 of 6 seeds), 4 (0 of 6 seeds)"
    assert nearly(curves).measured == lost
    curves["0, B"] = curves["0, A"]
    assert nearly(curves).measured == lost
    with pytest.raises(NotTestable, match="no record of 5, A"):
        replace(nearly, tasks=(*five, "5"))(curves)
    # 2/3 + 2/3 + 1 + 2/3 + 1 of five tasks is 80%, whatever its floating sum.
    split = on_tasks(1.1, 1.1, 1.1, 1.1, 1.1, method="B", seeds=3)
    for k, last in enumerate((1.2, 1.2, 1.0, 1.2, 1.0)):
        levels = 10**k * torch.tensor([1.0, 1.0, last])
        split[f"{k}, A"] = run(levels[:, None].expand(-1, 1_000))
    assert nearly(split).passed and replace(nearly, share=(0.2, 0.8))(split).passed
    few = on_tasks(1.0, seeds=4) | on_tasks(1.1, seeds=4, method="B")
    with pytest.raises(NotTestable, match="4 seeds are fewer"):
        replace(nearly, tasks=("0",))(few)


def test_divergence_on_tasks():
    up = on_tasks(1.0, 1.0, 1.0, fall=-0.9)
    flat_ones = on_tasks(1.0, 1.0, 1.0, method="B")
    curves, tasks = up | flat_ones, ("0", "1", "2")
    test = DivergesOn("f", tasks, "A", horizon=1_000)
    assert test(curves).passed and test(curves).measured == (
        "on 0 (6 of 6 seeds), 1 (6 of 6 seeds), 2 (6 of 6 seeds)"
    )
    assert not replace(test, method="B")(curves).passed
    assert replace(test, method="B", expected=False)(curves).passed
    assert not replace(test, expected=False)(curves).passed
    curves["2, A"] = flat_ones["2, B"]
    assert not test(curves).passed
    assert replace(test, share=0.6)(curves).passed
    # A run shorter than the horizon decides only by diverging.
    long = replace(test, horizon=1_001)
    assert replace(long, share=0.6)(curves).passed
    for undecided in (long, replace(long, method="B", expected=False)):
        with pytest.raises(NotTestable, match="the runs on .*2 end before step 1,001"):
            undecided(curves)
    assert not replace(long, expected=False)(curves).passed
    # Half of the seeds are too many not to diverge, however short the run.
    for key in ("loss", "bin_mean", "smooth"):
        curves["0, B"] = curves["0, B"] | {key: curves["0, B"][key].clone()}
        curves["0, B"][key][:3] = up["0, A"][key][:3]
    assert not replace(long, method="B", expected=False)(curves).passed
    assert not replace(test, method="B")(curves).passed
    with pytest.raises(
        NotTestable, match=r"on 0 \(3 of 6 seeds\); the runs on 0, 1, 2"
    ):
        replace(long, method="B")(curves)


def test_a_run_that_explodes_at_once_fails():
    """Divergence looks from step 300 on, and sees nothing there."""
    losses = torch.full((6, 1_000), 500.0)
    losses[:, :100] = torch.linspace(2.3, 500.0, 100)
    losses[0] = torch.linspace(2.3, 2.0, 1_000)
    arrays = run(losses)
    assert not divergence(arrays)[0].any()
    assert fails(arrays).tolist() == [False] + 5 * [True]
    assert DivergesOn("f", ("0",), "A", horizon=1_000)({"0, A": arrays}).passed
    creeping = run(torch.linspace(1e4, 6.7e3, 1_000).expand(6, -1).clone())
    creeping["bin_mean"][:, 0] = 2.3
    assert not Descends("f", ("0",), ("A",))({"0, A": creeping}).passed


def test_descends_takes_the_better_of_its_methods_on_each_task():
    tasks = ("0", "1")

    def descends(methods, **options):
        return Descends("f", tasks, methods, **{"horizon": 1_000, **options})

    curves = on_tasks(1.0, 1.0, fall=0.5) | on_tasks(1.0, 1.0, method="B", fall=-0.5)
    assert descends(("A",))(curves).passed
    assert not descends(("B",))(curves).passed
    curves["1, A"] = run(torch.full((6, 1_000), 20.0))
    assert not descends(("A",))(curves).passed
    assert descends(("A",))(curves).measured.endswith("not 1")
    barely = on_tasks(1.0, 1.0, method="D", fall=0.015)
    assert not descends(("D",))(barely).passed
    assert descends(("D",), by=0.001)(barely).passed
    falling = on_tasks(0.5, 0.5, method="C", fall=0.5)
    assert descends(("A", "C"))(curves | falling).passed
    # What counts is all of the tenth before the middle.
    parts = torch.tensor([3.0, 2.0, 1.0, 1.2]).repeat_interleave(
        torch.tensor([400, 50, 50, 500])
    )
    curves |= {f"{task}, E": run(parts.expand(6, -1)) for task in tasks}
    assert descends(("E",))(curves).passed
    # Runs that are too short can only fail to.
    with pytest.raises(NotTestable, match="on 2 of 2 tasks; the runs on 0, 1 end bef"):
        descends(("D",), by=0.001, horizon=1_001)(barely)
    assert not descends(("A",), horizon=1_001)(curves).passed


def claim(*tests, name="X1") -> Claim:
    return Claim(name, "chapter", "source", "statement", tests)


def verdict_of(one: Claim, curves, known=None):
    hashes = {one.id: one.hashes.get("f", "")} if known is None else known
    (verdict,) = judge([one], lambda experiment: (curves, hashes))
    return verdict


CURVES = {"A": flat(1.0, spread=0.01), "B": flat(1.5, spread=0.01)}
A_WINS = Lower("f", "A", "B", WINDOW)
B_WINS = Lower("f", "B", "A", WINDOW)


def test_verdicts():
    assert verdict_of(claim(A_WINS), CURVES).verdict == "reproduced"
    assert verdict_of(claim(B_WINS), CURVES).verdict == "not reproduced"
    assert verdict_of(claim(A_WINS, B_WINS), CURVES).verdict == "partly"
    missing = Lower("f", "A", "C", WINDOW)
    assert verdict_of(claim(missing), CURVES).verdict == "not testable yet"
    assert verdict_of(claim(A_WINS, missing), CURVES).verdict == "partly"
    assert verdict_of(claim(B_WINS, missing), CURVES).verdict == "not testable yet"
    late = Lower("f", "A", "B", (0, 10**9))  # no record of this profile is that long
    undecided = "not testable at this profile"
    assert verdict_of(claim(B_WINS, late), CURVES).verdict == undecided
    assert verdict_of(claim(B_WINS, late, missing), CURVES).verdict == (
        "not testable yet"
    )


def test_swapped_labels_flip_the_verdict():
    """The negative control of the protocol, on every comparison of two methods."""
    swapped = {"A": CURVES["B"], "B": CURVES["A"]}
    for test in (A_WINS, NotWorse("f", "A", "B", WINDOW), replace(A_WINS, by=0.3)):
        assert verdict_of(claim(test), CURVES).verdict == "reproduced"
        assert verdict_of(claim(test), swapped).verdict == "not reproduced"
    trained = {"A": objectives(1.0, 0.5, 0.5), "B": objectives(1.5, 0.6, 0.6)}
    swapped = {"A": trained["B"], "B": trained["A"]}
    for iterations in (64, None):
        one = claim(BetterTrained("f", "A", "B", iterations, margin=0.02))
        assert verdict_of(one, trained).verdict == "reproduced"
        assert verdict_of(one, swapped).verdict == "not reproduced"
    starts = {"A": released(2.0), "B": released(1.0)}
    swapped = {"A": starts["B"], "B": starts["A"]}
    worse = claim(WorseStart("f", "A", "B", (0, 1_000)))
    better = claim(WorseStart("f", "A", "B", (0, 1_000), worse=False))
    assert verdict_of(worse, starts).verdict == "reproduced"
    assert verdict_of(worse, swapped).verdict == "not reproduced"
    assert verdict_of(better, starts).verdict == "not reproduced"
    assert verdict_of(better, swapped).verdict == "reproduced"
    means = {"A, 1": 3.0, "A, 2": 1.0, "B, 1": 2.0, "B, 2": 4.0}
    forms = {
        name: {"rollouts": torch.tensor([0]), "objective": mean + torch.zeros(6, 1)}
        for name, mean in means.items()
    }
    pairs = [("A, 1", "A, 2"), ("B, 1", "B, 2")]
    forms["A, 1"]["objective"][0] = math.nan  # is never the best
    for one, other, verdict in (0, 1, "reproduced"), (1, 0, "not reproduced"):
        found = verdict_of(claim(BestTrained("f", pairs[one], pairs[other])), forms)
        assert found.verdict == verdict
        assert "A, 2" in found.ran[0][1].measured and "B, 1" in str(found.ran[0][1])
    estimates = {"A": scattered(-2.0, 0.1), "B": scattered(-1.0, 0.1)}
    swapped = {"A": estimates["B"], "B": estimates["A"]}
    for one in (claim(Unbiased("f", "A")), claim(Unbiased("f", "B", expected=False))):
        assert verdict_of(one, estimates).verdict == "reproduced"
        assert verdict_of(one, swapped).verdict == "not reproduced"


def test_details_are_judged_where_they_are_recorded():
    """A wins over B by default; as "A again" it still does, as "A bad" no longer."""
    again = CURVES | {"A again": CURVES["A"], "A bad": flat(2.0)}
    details = {
        "again": {"f": ("f", "A again")},
        "bad": {"f": ("g", "A bad"), "h": ("f", "A again")},
        "elsewhere": {"h": ("f", "A again")},
        "missing": {"f": ("f", "nobody")},
    }

    def load(experiment):
        if experiment == "f":
            return again, {}
        return again | {"A": flat(1.8), "B": flat(1.9)}, {}

    one = claim(A_WINS, Diverges("f", "B", expected=False))
    found = settle([one], details, "A", load)
    assert [(s.detail, s.default.passed, s.changed.passed) for s in found] == [
        ("again", True, True), ("bad", True, False)
    ]  # fmt: skip
    assert [s.flips for s in found] == [False, True]
    assert found[1].test.experiment == "g" and found[1].claim is one
    # Where the method is the other side of a comparison it is exchanged there.
    other = claim(replace(A_WINS, method="B", reference="A"))
    (same, worse) = settle([other], details, "A", load)
    assert not same.changed.passed and worse.changed.passed


def test_details_of_the_ledger_name_recorded_labels():
    places = {
        place for where in claims.lgl2o.DETAILS.values() for place in where.values()
    }
    for experiment, label in places:
        (entry,) = find(experiment)
        assert label in {r.label for r in entry.runs("laptop")}


def test_holm_runs_over_the_rows_of_the_chapter():
    """p = 1/64 with six pairs: it survives three rows (3/64), and not four (4/64)."""
    for rows, expected in ((3, "reproduced"), (4, "partly")):
        verdicts = judge(
            [claim(A_WINS, name=f"X{k}") for k in range(rows)],
            lambda experiment: (CURVES, {}),
        )
        assert all(v.p == pytest.approx(rows / 64) for v in verdicts)
        assert {v.verdict for v in verdicts} == {expected}


def test_a_rows_p_value_is_its_largest():
    weak = Lower("f", "A", "W", WINDOW)
    level = torch.tensor([1.1, 1.1, 1.1, 1.1, 1.1, 0.97])[:, None]
    curves = CURVES | {"A": flat(1.0), "W": run(level.expand(6, 10_000))}
    found = verdict_of(claim(A_WINS, weak), curves)
    ps = [outcome.p for _, outcome in found.findings]
    assert ps[0] == 1 / 64 and ps[1] == 2 / 64
    assert found.p == ps[1]


@pytest.mark.parametrize(
    "why, verdict, tally",
    [
        (NotRecorded("not recorded"), "yet", "1 waiting"),
        (NotTestable("not recorded"), "at this profile", "1 not testable"),
    ],
    ids=("missing", "undecided"),
)
def test_a_missing_experiment_is_not_testable(why, verdict, tally):
    def load(experiment):
        raise why

    (found,) = judge([claim(A_WINS)], load)
    assert found.verdict == f"not testable {verdict}" and found.tally == tally
    assert str(found.findings[0][1]) == "not recorded"


# ---- hashes --------------------------------------------------------------------------


def test_post_hoc():
    one = claim(A_WINS)
    assert not verdict_of(one, CURVES).post_hoc
    assert verdict_of(one, CURVES, known={}).post_hoc
    changed = claim(replace(A_WINS, window=(100, 999)))
    assert verdict_of(changed, CURVES, known={"X1": one.hashes["f"]}).post_hoc


def test_hashes_are_stable_and_see_every_change():
    # Written down once: a hash in an old record must mean the same test for ever.
    assert claim(A_WINS).hashes == {"f": "19e4b19ebdac"}
    others = [
        replace(A_WINS, window=(101, 1_000)),
        replace(A_WINS, by=0.01),
        replace(A_WINS, reference="C"),
        NotWorse("f", "A", "B", WINDOW),
        B_WINS,
    ]
    hashes = {claim(test).hashes["f"] for test in [*others, A_WINS]}
    hashes.add(claim(A_WINS, B_WINS).hashes["f"])
    assert len(hashes) == len(others) + 2


def test_a_change_concerns_only_the_experiment_it_reads():
    elsewhere = Lower("g", "A", "B", WINDOW)
    one, two = claim(A_WINS, elsewhere), claim(A_WINS, replace(elsewhere, by=1.0))
    assert one.hashes["f"] == two.hashes["f"]
    assert one.hashes["g"] != two.hashes["g"]


# ---- the ledger ----------------------------------------------------------------------


def test_the_ledger_can_be_judged_without_records(monkeypatch, tmp_path):
    """Every row has a verdict from code, whatever is missing."""
    monkeypatch.setenv("L2OLIB_ROOT", str(tmp_path))
    verdicts = claims.report()
    assert sorted(v.claim.id for v in verdicts) == sorted(c.id for c in LEDGER)
    assert {v.verdict for v in verdicts} == {"not testable yet"}
    *items, note = claims.markdown(verdicts).split("\n\n")
    assert len(items) == len(LEDGER) and "Detectable" in note
    assert all(len(item.splitlines()) == 3 for item in items)


def test_failures_stand_before_what_passes():
    """Of three tests that pass beside one that fails, only the number is unfolded."""
    passing = [replace(A_WINS, by=k / 10) for k in range(3)]
    failing = Lower("f", "B", "A", WINDOW)
    verdict = verdict_of(claim(*passing, failing), CURVES)
    row = claims.markdown([verdict]).splitlines()[2]
    assert row.startswith(": ")
    assert 'id="row-X1"' in claims.markdown([verdict])
    shown, _, rest = row.partition("<details><summary>3 tests pass</summary>")
    assert rest.count("✓") == 3 and "✓" not in shown
    assert rest.partition("</details>")[2].count("✗") == 1
    assert verdict.tally.startswith("3 of 4 pass, Holm p")
    assert "<details>" not in claims.markdown([verdict_of(claim(*passing), CURVES)])


def test_numbers_that_a_reader_compares_can_be_told_apart():
    assert kinds.against(3.9161, 3.9158) == "3.9161 against 3.9158"
    assert kinds.against(0.25, torch.tensor(0.5)) == "0.25 against 0.5"
    assert kinds.against(1.0, 1.0 + 1e-9) == "1 against 1"
    assert str(kinds.Outcome(True, 0.01, "lower", 0.2)) == "lower, detectable 0.2"
    assert str(kinds.Outcome(True, 0.01, "lower", 2e-16)) == "lower"  # rounding


def test_the_ledger_is_in_the_order_of_its_numbers():
    ids = [c.id for c in LEDGER]
    assert ids.index("S8") < ids.index("S12") < ids.index("S20")
    assert ids.index("S5") < ids.index("S5-convnet") < ids.index("S6")
    shown = [v.claim.id for v in claims.report("S1*", "N1*")]
    assert shown == [one for one in ids if one[:2] in ("S1", "N1")]


def test_the_ledger_holds_the_claims_of_these_figures():
    ids = [c.id for c in LEDGER]
    assert len(ids) == len(set(ids))
    assert {"B1", "B2", "B3", *(f"B{k}" for k in range(12, 17))} <= set(ids)
    assert {f"S{k}" for k in (*range(1, 18), 19, 21)} <= set(ids)
    for one in LEDGER:
        assert one.tests, one.id
        assert all(str(test) and "<" not in str(test) for test in one.tests)


def test_a_test_names_its_figure_where_a_row_reads_several():
    elsewhere = replace(A_WINS, experiment="lgl2o.fig5")
    assert claim(A_WINS).name(A_WINS) == str(A_WINS)
    assert claim(A_WINS, elsewhere).name(elsewhere) == f"fig5, {elsewhere}"


def test_unknown_claims_are_refused():
    with pytest.raises(ExperimentError, match="no claim 'B99': choose from B1, B2"):
        claims.report("B99")


def test_records_remember_the_tests_that_read_them():
    remembered = claims.hashes_for("lgl2o.fig3")
    readers = {c.id for c in LEDGER for t in c.tests if t.experiment == "lgl2o.fig3"}
    assert set(remembered) == readers >= {"B2", "B3"}
    assert claims.hashes_for("nothing") == {}
