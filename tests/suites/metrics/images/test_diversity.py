import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.suites.metrics.images.diversity import diversity, diversity_by_condition, mean_pairwise_distance
from tests.oracles import image_metrics as oracle


def normal(count, seed, dimension=6):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONDITIONS = torch.arange(3).repeat(100)
CENTRES = 10 * normal(3, 99)
REAL, FRESH = (CENTRES[CONDITIONS] + normal(300, seed) for seed in (0, 1))


@pytest.mark.parametrize("tile", [4, 4096])
def test_equals_the_mean_over_pairs(tile):
    x = normal(13, 0) + 5
    assert mean_pairwise_distance(x, tile=tile) == pytest.approx(oracle.mean_pairwise_distance(x.numpy()), rel=1e-9)


def test_self_and_fresh_data_are_as_diverse_as_the_data():
    assert diversity(REAL, CONDITIONS, REAL, CONDITIONS) == 1
    order = torch.randperm(300)
    assert diversity(REAL[order], CONDITIONS[order], REAL, CONDITIONS) == pytest.approx(1, rel=1e-12)
    assert diversity(FRESH, CONDITIONS, REAL, CONDITIONS) == pytest.approx(1, abs=0.05)


def test_a_collapsed_class_is_zero_and_the_others_are_not():
    collapsed = torch.where((CONDITIONS == 1)[:, None], CENTRES[1], FRESH)
    ratios = diversity_by_condition(collapsed, CONDITIONS, REAL, CONDITIONS)
    assert ratios[1] == 0
    assert ratios[0] == pytest.approx(1, abs=0.1) and ratios[2] == pytest.approx(1, abs=0.1)
    assert diversity(collapsed, CONDITIONS, REAL, CONDITIONS) == pytest.approx((ratios[0] + ratios[2]) / 3)


def test_a_set_diverse_only_between_conditions_is_collapsed():
    assert diversity(CENTRES[CONDITIONS], CONDITIONS, REAL, CONDITIONS) == 0
    assert diversity(torch.zeros(300, 6), CONDITIONS, REAL, CONDITIONS) == 0


def test_noise_and_a_generator_that_ignores_its_condition_are_above_one():
    assert diversity(5 * normal(300, 3), CONDITIONS, REAL, CONDITIONS) == pytest.approx(5, rel=0.05)
    assert diversity(FRESH[torch.randperm(300)], CONDITIONS, REAL, CONDITIONS) > 3


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_spread_is_measured_as_it_is(scale, shift):
    made = CENTRES[CONDITIONS] + scale * (REAL - CENTRES[CONDITIONS]) + shift
    assert diversity(made, CONDITIONS, REAL, CONDITIONS) == pytest.approx(scale, rel=1e-5)


def test_only_conditions_of_the_samples_are_judged():
    some = CONDITIONS < 2
    assert set(diversity_by_condition(FRESH[some], CONDITIONS[some], REAL, CONDITIONS)) == {0, 1}


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="condition 7 has 1 samples"):
        diversity(REAL, torch.where(torch.arange(300) == 0, 7, CONDITIONS), REAL, CONDITIONS)
    with pytest.raises(UserError, match="condition 2 has 0 real examples"):
        diversity(REAL, CONDITIONS, REAL, CONDITIONS.clamp(max=1))
    with pytest.raises(UserError, match="condition 0 are all the same"):
        diversity(REAL, CONDITIONS, CENTRES[CONDITIONS], CONDITIONS)
    with pytest.raises(UserError, match=r"300 samples come with conditions of shape \(299,\)"):
        diversity(REAL, CONDITIONS[1:], REAL, CONDITIONS)
    with pytest.raises(UserError, match="not finite"):
        diversity(REAL / 0, CONDITIONS, REAL, CONDITIONS)
    with pytest.raises(UserError, match="0 samples are too few"):
        diversity(REAL[:0], CONDITIONS[:0], REAL, CONDITIONS)
