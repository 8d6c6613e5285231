"""The error rates that docs and docstrings promise, shown by simulation at the seed counts in use."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from distillbench.stats import Interval, gap_closed, holm, mean_interval, paired_difference, paired_p, ranks


def within(count, trials, rate):
    """Whether ``count`` of ``trials`` is what a rate of ``rate`` gives, at four standard errors."""
    return abs(count - trials * rate) <= 4 * math.sqrt(trials * rate * (1 - rate))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_normal_seed_noise(n):
    rng = np.random.default_rng(n)
    trials = 4000
    hits = sum(i.low <= 0.7 <= i.high for i in (mean_interval(rng.normal(0.7, 0.02, n)) for _ in range(trials)))
    assert within(hits, trials, 0.95)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_accuracies_of_a_finite_test_split(n):
    """Scores as accuracies are: a seed's true rate, seen on 400 images. Coverage may not fall below 94%."""
    rng = np.random.default_rng(10 + n)
    trials = 4000
    rates = np.clip(rng.normal(0.9, 0.01, (trials, n)), 0, 1)
    scores = rng.binomial(400, rates) / 400
    hits = sum(i.low <= 0.9 <= i.high for i in (mean_interval(s) for s in scores))
    assert 0.94 <= hits / trials <= 0.99


def test_the_interval_is_students():
    values = [0.71, 0.74, 0.69, 0.75, 0.72]
    ours = mean_interval(values)
    theirs = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    wide = mean_interval(values, level=0.99)
    assert wide.low < ours.low and wide.high > ours.high


def test_one_seed_has_no_interval_and_none_is_an_error():
    one = mean_interval([0.5])
    assert one.estimate == 0.5 and math.isnan(one.low) and math.isnan(one.high) and not one.excludes(9.0)
    with pytest.raises(ValueError):
        mean_interval([])
    assert Interval(1, 0.5, 1.5).excludes(0.4) and Interval(1, 0.5, 1.5).excludes(1.6) and not Interval(1, 0.5, 1.5).excludes(1.5)


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        a, b = rng.normal(size=n), rng.normal(0.5, 1, size=n)
        ours = paired_p(dict(enumerate(a)), dict(enumerate(b)))
        assert ours == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue, rel=1e-9)
        assert ours == pytest.approx(paired_p(dict(enumerate(b)), dict(enumerate(a))), rel=1e-12)


def test_only_shared_seeds_are_compared():
    a, b = {0: 1.0, 1: 1.1, 2: 1.3, 7: 100.0}, {0: 0.5, 1: 0.7, 2: 0.6, 9: -100.0}
    assert paired_p(a, b) == pytest.approx(scipy_stats.ttest_rel([1.0, 1.1, 1.3], [0.5, 0.7, 0.6]).pvalue)
    assert paired_difference(a, b).estimate == pytest.approx((0.5 + 0.4 + 0.7) / 3)
    assert paired_p({0: 1.0}, {0: 0.0}) == 1.0 and paired_difference({0: 1.0}, {0: 0.0}) is None
    assert paired_p({0: 1.0, 1: 2.0}, {2: 0.0, 3: 1.0}) == 1.0


def test_ties_are_never_certain():
    same = dict.fromkeys(range(5), 0.9)
    assert paired_p(same, same) == 1.0
    ahead = {s: v + 0.0025 for s, v in same.items()}
    assert paired_p(ahead, same) < 1e-6  # equal differences, taken at their word ...
    assert paired_p(ahead, same, resolution=0.0025) > 0.001  # ... and known no better than one image in 400
    assert ranks({"a": same, "b": same}, higher_is_better=True) == {"a": 1, "b": 1}


def test_resolution_only_makes_differences_less_certain():
    rng = np.random.default_rng(3)
    for _ in range(200):
        a, b = dict(enumerate(rng.normal(0.9, 0.01, 5))), dict(enumerate(rng.normal(0.9, 0.01, 5)))
        values = [paired_p(a, b, r) for r in (0.0, 0.001, 0.01, 0.1)]
        assert values == sorted(values)


def test_two_coarse_scores_that_are_equal_in_truth_rarely_separate():
    """Accuracies over 100 images with next to no seed noise: the rounding floor keeps the error rate at or below 5%."""
    rng = np.random.default_rng(5)
    trials = 3000
    scores = np.round(0.905 + rng.normal(0, 0.002, (trials, 2, 5)), 2)
    wrong = sum(paired_p(dict(enumerate(a)), dict(enumerate(b)), resolution=0.01) < 0.05 for a, b in scores)
    assert wrong <= 0.05 * trials + 4 * math.sqrt(0.05 * 0.95 * trials)


def test_holm_by_hand():
    # Sorted: .005*5=.025, .011*4=.044, .02*3=.06, .04*2=.08, .13*1=.13; the running maximum changes nothing.
    assert holm([0.02, 0.005, 0.13, 0.011, 0.04]) == pytest.approx([0.06, 0.025, 0.13, 0.044, 0.08])
    # .01*3=.03, .012*2=.024 raised to .03, .9*1=.9
    assert holm([0.01, 0.012, 0.9]) == pytest.approx([0.03, 0.03, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]


def simulate(rng, methods, seeds, effect=0.0):
    """Scores with a seed effect that all methods share; the first method is ahead by ``effect`` of its own noise."""
    shared = rng.normal(0, 3.0, seeds)
    noise = rng.normal(0, 1.0, (methods, seeds))
    table = 70 + shared + noise
    table[0] += effect
    return {f"m{i:02d}": dict(enumerate(row)) for i, row in enumerate(table)}


def test_family_wise_error_of_ranks_over_twelve_equal_methods():
    rng = np.random.default_rng(7)
    trials = 600
    wrong = sum(max(ranks(simulate(rng, 12, 5), higher_is_better=True).values()) > 1 for _ in range(trials))
    assert wrong / trials <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / trials)


def test_ranks_find_a_clear_difference_through_shared_seed_effects():
    rng = np.random.default_rng(8)
    trials = 150
    found = 0
    for _ in range(trials):
        table = ranks(simulate(rng, 4, 5, effect=12.0), higher_is_better=True)
        found += table["m00"] == 1 and all(table[f"m{i:02d}"] == 2 for i in (1, 2, 3))
    assert found / trials > 0.8


def test_the_direction_of_a_metric_turns_ranks_round():
    scores = {"good": dict(enumerate([0.1, 0.11, 0.1, 0.12, 0.1])), "bad": dict(enumerate([0.9, 0.92, 0.91, 0.9, 0.93]))}
    assert ranks(scores, higher_is_better=False) == {"good": 1, "bad": 2}
    assert ranks(scores, higher_is_better=True) == {"good": 2, "bad": 1}
    assert ranks({"only": {0: 1.0}}, higher_is_better=True) == {"only": 1}
    assert ranks({}, higher_is_better=True) == {}


def test_a_rank_counts_who_is_significantly_better():
    rng = np.random.default_rng(9)
    jitter = {m: rng.normal(0, 0.001, 5) for m in "abcd"}
    base = {"a": 0.9, "b": 0.8, "c": 0.8, "d": 0.5}
    scores = {m: {s: base[m] + float(jitter[m][s]) for s in range(5)} for m in base}
    assert ranks(scores, higher_is_better=True) == {"a": 1, "b": 2, "c": 2, "d": 4}


@pytest.mark.parametrize("n", [3, 5])
def test_gap_closed_covers_the_true_ratio(n):
    """Scratch 0.60, teacher 0.90, method 0.75: half the gap; seeds move all three together."""
    rng = np.random.default_rng(20 + n)
    hits = told = 0
    trials = 3000
    for _ in range(trials):
        common = rng.normal(0, 0.02, n)
        scratch, teacher, method = (dict(enumerate(m + common + rng.normal(0, 0.03, n))) for m in (0.6, 0.9, 0.75))
        interval = gap_closed(method, scratch, teacher)
        if interval is not None:
            told += 1
            hits += interval.low <= 0.5 <= interval.high
    assert told / trials > 0.85  # the gap is wide: it is seldom refused
    assert hits / told >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / told)


def test_the_ends_of_fiellers_interval_are_where_a_paired_test_stops_rejecting():
    """A fraction r is in the interval exactly where the t test of (method - scratch) - r (teacher - scratch) does not reject."""
    rng = np.random.default_rng(40)
    for n in (3, 5, 10):
        scratch, teacher, method = (m + rng.normal(0, 0.03, n) for m in (0.6, 0.9, 0.75))
        interval = gap_closed(*(dict(enumerate(x)) for x in (method, scratch, teacher)))
        for end in (interval.low, interval.high):
            p = scipy_stats.ttest_1samp(method - scratch - end * (teacher - scratch), 0).pvalue
            assert p == pytest.approx(0.05, rel=1e-6)
        assert interval.low < interval.estimate < interval.high


def test_gap_closed_is_refused_where_there_is_no_gap():
    rng = np.random.default_rng(30)
    trials = 2000
    given = 0
    for _ in range(trials):
        scratch, teacher, method = (dict(enumerate(rng.normal(0.8, 0.02, 5))) for _ in range(3))
        given += gap_closed(method, scratch, teacher) is not None
    assert within(given, trials, 0.05)
    assert gap_closed({0: 1.0}, {0: 0.0}, {0: 2.0}) is None
    assert gap_closed({0: 1.0, 1: 1.0}, {2: 0.0, 3: 0.0}, {0: 2.0, 1: 2.0}) is None


def test_gap_closed_of_exact_scores_and_of_losses():
    flat = {name: dict.fromkeys(range(3), value) for name, value in (("scratch", 0.5), ("teacher", 0.9), ("method", 0.6))}
    interval = gap_closed(flat["method"], flat["scratch"], flat["teacher"])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))
    rng = np.random.default_rng(31)
    scores = {m: dict(enumerate(v + rng.normal(0, 0.01, 5))) for m, v in (("scratch", 0.5), ("teacher", 0.9), ("method", 0.6))}
    turned = {m: {s: -v for s, v in row.items()} for m, row in scores.items()}  # a loss: lower is better, the same part is closed
    up, down = (gap_closed(t["method"], t["scratch"], t["teacher"]) for t in (scores, turned))
    assert (up.estimate, up.low, up.high) == pytest.approx((down.estimate, down.low, down.high))


def test_a_permutation_test_over_five_seeds_cannot_reach_five_percent():
    """Why no sign-flip test is used: of 2^5 sign patterns, the most extreme one and its mirror image are always as extreme."""
    differences = np.array([1.0, 1.1, 0.9, 1.2, 1.0])  # as clear as can be
    observed = abs(differences.mean())
    flips = [abs((np.array(signs) * differences).mean()) for signs in itertools.product((1, -1), repeat=5)]
    smallest = sum(f >= observed - 1e-12 for f in flips) / len(flips)
    assert smallest == 2 / 32 > 0.05
    assert paired_p(dict(enumerate(differences)), dict.fromkeys(range(5), 0.0)) < 0.001
