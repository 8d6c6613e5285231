import math

import numpy as np
import pytest
import torch

from distillbench.suites.metrics.mmd import mmd2
from distillbench.suites.metrics.sliced_wasserstein import sliced_wasserstein
from tests.oracles.image_generation import diffusion as oracle

BANDWIDTHS = [0.05, 0.1, 0.2, 0.5, 1.0]


def mixture(count, seed, std=0.1):
    angle = 2 * math.pi * torch.arange(8) / 8
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    generator = torch.Generator().manual_seed(seed)
    return means[torch.randint(8, (count,), generator=generator)] + std * torch.randn(count, 2, generator=generator)


def test_equals_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 0.3
    mine = mmd2(torch.tensor(x), torch.tensor(y), bandwidths=[0.3, 1.0])
    assert mine == pytest.approx(oracle.mmd2(x, y, bandwidths=[0.3, 1.0]), rel=1e-10)


def test_is_unbiased_over_fresh_samples_of_the_same_distribution():
    values = [mmd2(mixture(200, 2 * s), mixture(200, 2 * s + 1), bandwidths=BANDWIDTHS) for s in range(60)]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)


def test_a_constant_and_a_wide_random_sample_are_far_off():
    reference = mixture(1000, 0)
    floor = abs(mmd2(mixture(1000, 1), reference, bandwidths=BANDWIDTHS))
    constant = mmd2(torch.zeros(1000, 2), reference, bandwidths=BANDWIDTHS)
    at_a_mode = mmd2(torch.tensor([[1.0, 0.0]]).expand(1000, 2), reference, bandwidths=BANDWIDTHS)
    spread = mmd2(torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)), reference, bandwidths=BANDWIDTHS)
    assert floor < 0.003
    assert constant > 0.5
    assert at_a_mode > 0.5
    assert spread > 10 * floor


def test_a_sample_against_itself_is_below_zero_by_exactly_the_diagonal():
    """Reusing the reference must not look perfect: with k(x, x) = 1 the diagonal enters the cross term alone."""
    x = mixture(300, 3)
    distance = ((x.double()[:, None] - x.double()[None]) ** 2).sum(-1).numpy()
    kernel = np.mean([np.exp(-distance / (2 * h * h)) for h in BANDWIDTHS], axis=0)
    w = (kernel.sum() - len(x)) / (len(x) * (len(x) - 1))  # 2 w - 2 (1 + (n - 1) w) / n = -2 (1 - w) / n
    value = mmd2(x, x, bandwidths=BANDWIDTHS)
    assert value < 0
    assert value == pytest.approx(-2 * (1 - w) / len(x), rel=1e-9)


def test_sees_a_collapse_within_modes_that_sliced_wasserstein_hardly_sees():
    reference, fresh, collapsed = mixture(2000, 0), mixture(2000, 1), mixture(2000, 2, std=0.008)
    by_mmd = [mmd2(s, reference, bandwidths=BANDWIDTHS) for s in (fresh, collapsed)]
    by_slices = [sliced_wasserstein(s, reference) for s in (fresh, collapsed)]
    assert by_mmd[1] > 50 * abs(by_mmd[0])  # far above what fresh samples differ by
    assert by_slices[1] < 4 * by_slices[0]  # hardly more than what fresh samples differ by
