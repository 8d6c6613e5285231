import math

import pytest
import torch

from distillbench.suites.metrics.sliced_wasserstein import directions, sliced_wasserstein


def normal(count, seed, dimension=2):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_shift_by_v_costs_its_length_over_the_root_of_the_dimension():
    """W_2 of a shift is |u . v| along u; the mean of its square over directions is |v|^2 / d, exactly for even angles."""
    x, v = normal(500, 0), torch.tensor([0.6, -0.8], dtype=torch.float64)
    assert sliced_wasserstein(x + 2 * v, x) == pytest.approx(2 / math.sqrt(2), rel=1e-9)


@pytest.mark.parametrize("dimension", [2, 5])
def test_scaling_a_normal_sample_costs_the_difference_of_deviations(dimension):
    x = normal(20000, 1, dimension)
    assert sliced_wasserstein(3 * x, x) == pytest.approx(2, rel=0.03)


def test_self_is_zero_fresh_is_small_constant_is_large():
    x = normal(2000, 0)
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x[torch.randperm(2000)], x) == 0
    assert sliced_wasserstein(normal(2000, 1), x) < 0.1
    assert sliced_wasserstein(torch.zeros_like(x), x) == pytest.approx(1, rel=0.05)


def test_directions_are_unit_vectors_and_always_the_same():
    for d in (2, 7):
        unit = directions(d, 64)
        assert torch.allclose(unit.norm(dim=1), torch.ones(64, dtype=torch.float64))
        assert torch.equal(unit, directions(d, 64))


def test_samples_of_different_number_are_refused():
    with pytest.raises(ValueError, match="draw as many"):
        sliced_wasserstein(normal(10, 0), normal(11, 0))
