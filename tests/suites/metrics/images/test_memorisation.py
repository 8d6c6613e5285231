import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.suites.metrics.images.memorisation import memorisation
from tests.oracles import image_metrics as oracle


def normal(count, seed, dimension=8):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRAIN, HELD_OUT, FRESH = normal(600, 0), normal(400, 1), normal(500, 2)


def test_a_copied_training_set_is_flagged():
    copied = memorisation(TRAIN[:300], TRAIN, HELD_OUT)
    assert (copied.copied_fraction, copied.closer_fraction, copied.distance_ratio) == (1, 1, 0)
    jittered = memorisation(TRAIN + 0.01 * normal(600, 5), TRAIN, HELD_OUT)
    assert jittered.copied_fraction == 1 and jittered.closer_fraction > 0.999 and jittered.distance_ratio < 0.05


def test_fresh_data_of_the_same_distribution_are_not():
    fair = memorisation(FRESH, TRAIN, HELD_OUT)
    assert fair.copied_fraction == pytest.approx(0.01, abs=0.015)
    assert fair.closer_fraction == pytest.approx(0.5, abs=0.06)
    assert fair.distance_ratio == pytest.approx(1, abs=0.06)


def test_held_out_data_against_themselves_are_exactly_fair():
    same = memorisation(HELD_OUT, TRAIN, HELD_OUT)
    assert (same.copied_fraction, same.closer_fraction, same.distance_ratio) == (0.01, 0.5, 1)


def test_half_copies_are_half_flagged():
    half = memorisation(torch.cat([TRAIN[:250], FRESH[:250]]), TRAIN, HELD_OUT)
    assert half.copied_fraction == pytest.approx(0.5, abs=0.02)
    assert half.closer_fraction == pytest.approx(0.75, abs=0.04)


def test_a_constant_and_noise_copy_nothing_but_a_repeated_training_example_does():
    far = memorisation(torch.full((500, 8), 9.0), TRAIN, HELD_OUT)
    noise = memorisation(10 * FRESH, TRAIN, HELD_OUT)
    for made in (far, noise):
        assert made.copied_fraction <= 0.002 and made.closer_fraction < 0.02 and made.distance_ratio > 3
    assert memorisation(TRAIN[:1].expand(500, 8), TRAIN, HELD_OUT).copied_fraction == 1


def test_the_fractions_equal_loops_over_pairs():
    x, y, z = (normal(n, s, 3).numpy() for n, s in ((20, 0), (30, 1), (25, 2)))
    x[:4] = y[:4]
    z[:1] = y[:1]
    ours, theirs = oracle.nearest(x, y), oracle.nearest(z, y)
    got = memorisation(*(torch.tensor(v) for v in (x, y, z)), quantile=0.2, tile=7)
    assert got.copied_fraction == np.mean(ours <= np.sort(theirs)[4])
    assert got.closer_fraction == pytest.approx(np.mean([(a < b) + 0.5 * (a == b) for a in ours for b in theirs]), rel=1e-12)


def test_held_out_data_that_repeat_training_data_leave_copies_flagged():
    """Duplicates across the splits put the threshold at 0: exact copies still count, fresh samples do not."""
    leaky = torch.cat([TRAIN[:40], HELD_OUT[40:]])
    assert memorisation(TRAIN, TRAIN, leaky).copied_fraction == 1
    assert memorisation(FRESH, TRAIN, leaky).copied_fraction == 0
    assert memorisation(TRAIN, TRAIN, TRAIN).distance_ratio == 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_units_and_origin_do_not_matter(seed, scale, shift):
    x, y, z = normal(30, seed, 4), normal(40, seed + 1, 4), normal(50, seed + 2, 4)
    one = memorisation(x, y, z, quantile=0.1)
    other = memorisation(scale * (x + shift), scale * (y + shift), scale * (z + shift), quantile=0.1)
    assert other.closer_fraction == one.closer_fraction and other.copied_fraction == one.copied_fraction
    assert other.distance_ratio == pytest.approx(one.distance_ratio, rel=1e-6)


def test_too_few_and_broken_rows_are_refused():
    with pytest.raises(UserError, match="99 held-out examples are too few: at least 100"):
        memorisation(FRESH, TRAIN, HELD_OUT[:99])
    with pytest.raises(UserError, match="0 samples are too few"):
        memorisation(FRESH[:0], TRAIN, HELD_OUT)
    with pytest.raises(UserError, match="0 training examples are too few"):
        memorisation(FRESH, TRAIN[:0], HELD_OUT)
    with pytest.raises(UserError, match="samples are not finite"):
        memorisation(FRESH / 0, TRAIN, HELD_OUT)
    for quantile in (0, 1, -0.1):
        with pytest.raises(UserError, match="does not lie between 0 and 1"):
            memorisation(FRESH, TRAIN, HELD_OUT, quantile=quantile)
