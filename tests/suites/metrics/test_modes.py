import math

import pytest
import torch

from distillbench.suites.metrics.modes import between_modes, coverage, spread_error, spread_ratio

ANGLE = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
MEANS = torch.stack([ANGLE.cos(), ANGLE.sin()], dim=1)
STD = 0.1


def mixture(count=4000, std=STD, seed=0, modes=8):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(modes, (count,), generator=generator)
    return MEANS[chosen] + std * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def test_exact_samples_are_right_in_every_respect():
    x = mixture()
    assert spread_ratio(x, MEANS, STD) == pytest.approx(1, abs=0.02)
    assert coverage(x, MEANS, STD) == 1
    assert float(between_modes(x, MEANS, STD).double().mean()) == pytest.approx(math.exp(-4.5), abs=5e-3)


@pytest.mark.parametrize("ratio", [0.07, 0.5, 1.5])
def test_the_spread_is_measured_as_it_is(ratio):
    assert spread_ratio(mixture(std=ratio * STD), MEANS, STD) == pytest.approx(ratio, rel=0.03)


def test_a_shift_of_a_mode_does_not_count_as_spread():
    assert spread_ratio(mixture() + torch.tensor([0.03, -0.02]), MEANS, STD) == pytest.approx(1, abs=0.02)


def test_half_and_double_are_equally_wrong_and_a_collapse_stays_finite():
    assert spread_error(0.5) == pytest.approx(spread_error(2)) == pytest.approx(math.log(2))
    assert spread_error(1) == 0
    assert spread_error(0) == pytest.approx(math.log(1000))


def test_samples_at_the_centre_lie_between_modes_and_cover_none():
    x = 0.05 * torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert bool(between_modes(x, MEANS, STD).all())
    assert coverage(x, MEANS, STD) == 0


def test_missing_modes_are_counted():
    assert coverage(mixture(modes=3), MEANS, STD) == 3 / 8


def test_a_constant_has_no_spread():
    assert spread_ratio(MEANS[:1].expand(100, 2), MEANS, STD) == 0
    assert math.isnan(spread_ratio(MEANS, MEANS, STD))
