"""The SDEs of Song et al. 2020 and their samplers: marginals, scores, steps, and where they end, against closed forms."""

from functools import partial

import numpy as np
import pytest
import torch

from distillbench.problems.image_generation.sde import (
    SDES,
    VP,
    ancestral_step,
    langevin_step,
    reverse_diffusion_step,
    score,
    sde_solve,
    time_grid,
    transition,
)
from tests.oracles.image_generation import score_sde as oracle

KINDS = ["ve", "vp", "subvp"]
MEAN, VARIANCE = 0.3, 0.25


def at(t):
    return torch.tensor(t, dtype=torch.float64)


def denoise(x, s):
    """The exact denoiser of N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + s.view(-1, 1) ** 2) * (x - MEAN)


def unit(rows, seed=0):
    return torch.randn(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solve(kind, rule, noise, steps, *, high=80.0, low=0.002, snr=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    levels = time_grid(SDES[kind], steps, sigma_min=low, sigma_max=high)
    return sde_solve(
        denoise,
        noise,
        levels,
        rule=rule,
        sde=SDES[kind],
        snr=snr,
        draw=lambda: torch.randn(noise.shape, dtype=noise.dtype, generator=generator),
    )


# --- the equations ---


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_are_what_the_moments_of_the_equation_flow_to(kind):
    for t in (0.01, 0.2, 0.7, 1.0):
        scale, std = (float(v) for v in SDES[kind].marginal(at(t)))
        mean, variance = oracle.moments(kind, t, MEAN, VARIANCE)
        assert scale * MEAN == pytest.approx(mean, rel=1e-9)
        assert scale**2 * VARIANCE + std**2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_drift_and_noise_are_the_papers(kind):
    for t in (0.001, 0.3, 1.0):
        assert -float(SDES[kind].shrinkage(at(t))) / 2 == pytest.approx(oracle.drift(kind, t), rel=1e-12)
        assert float(SDES[kind].variance_rate(at(t))) == pytest.approx(oracle.noise(kind, t), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_time_inverts_level(kind):
    t = torch.linspace(1e-4, 1, 50, dtype=torch.float64)
    assert torch.allclose(SDES[kind].time(SDES[kind].level(t)), t, rtol=1e-9)


def test_sub_vp_has_the_square_of_vps_std():
    t = torch.linspace(0, 1, 20, dtype=torch.float64)
    (scale, std), (own_scale, own) = SDES["vp"].marginal(t), SDES["subvp"].marginal(t)
    assert torch.equal(scale, own_scale)
    assert torch.allclose(own, std**2, rtol=1e-12)
    assert bool((own <= std).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_gaussian_is_exact(kind):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    for t in (0.01, 0.4, 1.0):
        mean, variance = oracle.moments(kind, t, MEAN, VARIANCE)
        truth = -(x.numpy() - mean) / variance
        assert np.allclose(score(denoise, x, at(t), SDES[kind]).numpy(), truth, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_two_forward_steps_are_one(kind):
    low, middle, high = (at(t) for t in (0.1, 0.35, 0.8))
    (r1, g1), (r2, g2), (r, g) = (transition(SDES[kind], b, a) for a, b in ((low, middle), (middle, high), (low, high)))
    assert float(r1 * r2) == pytest.approx(float(r), rel=1e-12)
    assert float(g2**2 + (r2 * g1) ** 2) == pytest.approx(float(g**2), rel=1e-10)


def test_the_vp_step_is_ddpms():
    ratio, growth = transition(SDES["vp"], at(0.5), at(0.499))
    assert float(ratio**2 + growth**2) == pytest.approx(1, rel=1e-12)
    assert float(growth**2) == pytest.approx(oracle.noise("vp", 0.4995) * 1e-3, rel=6e-3)


# --- one step ---


def test_steps_are_the_papers_formulas():
    x, s, z = (torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    beta, high, low = 0.1, 2.0, 1.5
    ratio, growth = at((1 - beta) ** 0.5), at(beta**0.5)
    # VP: equations 46 with f = (sqrt(1 - beta) - 1) x, and 4
    drift = ((1 - beta) ** 0.5 - 1) * x
    assert torch.allclose(reverse_diffusion_step(x, s, z, ratio, growth), x - drift + beta * s + beta**0.5 * z, rtol=1e-12)
    ddpm = (x + beta * s) / (1 - beta) ** 0.5 + 0.7 * beta**0.5 * z
    assert torch.allclose(ancestral_step(x, s, z, ratio, growth, at(0.7)), ddpm, rtol=1e-12)
    # VE: equation 47
    gap = high**2 - low**2
    wanted = x + gap * s + (low**2 * gap / high**2) ** 0.5 * z
    assert torch.allclose(ancestral_step(x, s, z, at(1.0), at(gap**0.5), at(low / high)), wanted, rtol=1e-12)
    size = 2 * 0.9 * (0.16 * z.norm(dim=1).mean() / s.norm(dim=1).mean()) ** 2
    assert torch.allclose(langevin_step(x, s, z, at(0.9**0.5), snr=0.16), x + size * s + (2 * size) ** 0.5 * z, rtol=1e-12)


def test_langevin_is_still_where_noise_and_slope_balance():
    """x + e s + sqrt(2 e) z on N(0, V): the variance moves to (1 - e/V)^2 V + 2 e, which is V up to e^2 / V."""
    x, z = unit(200_000) * 2, unit(200_000, 1)
    moved = langevin_step(x, -x / 4, z, at(1.0), snr=0.05)
    size = 2 * (0.05 * 2) ** 2  # |z| / |s| = 2
    assert float(moved.var()) == pytest.approx(4 + size**2 / 4, rel=0.01)
    assert float((moved - x).var()) == pytest.approx(2 * size, rel=0.03)


# --- whole solutions ---


@pytest.mark.parametrize("kind", KINDS)
def test_all_flows_end_where_the_closed_form_does_with_second_order(kind):
    high, low, noise = 10.0, 0.1, torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    std = float(SDES[kind].marginal(SDES[kind].time(at(high)))[1])
    start = noise * std * high / std  # x / a at the first level is sigma z for every one of them
    ended = MEAN + (start - MEAN) * np.sqrt((VARIANCE + low**2) / (VARIANCE + high**2))
    truth = denoise(ended, torch.full((5,), low, dtype=torch.float64))
    errors = [float((solve(kind, "probability_flow", noise, n, high=high, low=low) - truth).abs().max()) for n in (100, 200)]
    assert errors[0] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_vp_of_standard_normal_data_flows_nowhere():
    noise = unit(4)
    sde, levels = VP(), time_grid(VP(), 10, sigma_min=1e-4, sigma_max=80.0)
    ended = sde_solve(
        lambda x, s: x / (1 + s.view(-1, 1) ** 2), noise, levels, rule="probability_flow", sde=sde, snr=1.0, draw=lambda: noise
    )
    std = float(sde.marginal(sde.time(at(80.0)))[1])
    assert torch.allclose(ended, std * noise, rtol=1e-6)


@pytest.mark.parametrize("rule", ["reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("kind", KINDS)
def test_reverse_sdes_reach_the_gaussian_with_weak_order_one(kind, rule):
    """The variance that the steps make is computed exactly: for a Gaussian each step is linear, x' = m x + c + n z."""
    errors = []
    for steps in (200, 400):
        levels = time_grid(SDES[kind], steps, sigma_min=0.002, sigma_max=80.0)
        variance = _variance(kind, rule, levels)
        errors.append(abs(variance / VARIANCE - 1))
    assert errors[1] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)


def _variance(kind, rule, levels):
    """Of the samples: row i of a batch gets the i-th draw alone, row 0 the starting noise alone, the last row none."""
    rows = len(levels) + 1
    noise = torch.zeros(rows, 1, dtype=torch.float64)
    noise[0] = 1
    step = iter(range(1, rows))

    def draw():
        drawn = torch.zeros_like(noise)
        drawn[next(step)] = 1
        return drawn

    made = sde_solve(denoise, noise, levels, rule=rule, sde=SDES[kind], snr=1.0, draw=draw)
    return float(((made - made[-1]) ** 2).sum())


def test_ancestral_sampling_is_one_sampler_for_all_three():
    noise = unit(6)
    levels = time_grid(SDES["vp"], 12, sigma_min=0.01, sigma_max=20.0)
    made = []
    for kind in KINDS:
        generator = torch.Generator().manual_seed(3)
        draw = partial(torch.randn, 6, 1, dtype=torch.float64, generator=generator)
        made.append(sde_solve(denoise, noise, levels, rule="ancestral", sde=SDES[kind], snr=1.0, draw=draw))
    assert torch.allclose(made[0], made[1], rtol=1e-9)
    assert torch.allclose(made[0], made[2], rtol=1e-9)


def test_a_grid_has_exact_ends_and_falls():
    for kind in KINDS:
        levels = time_grid(SDES[kind], 7, sigma_min=0.02, sigma_max=80.0)
        assert (levels[0], levels[-1], len(levels)) == (80.0, 0.02, 7)
        assert levels == sorted(levels, reverse=True)
        times = SDES[kind].time(torch.tensor(levels, dtype=torch.float64)).diff()
        assert torch.allclose(times, times[0].expand(6), rtol=1e-6)
    with pytest.raises(ValueError, match="two levels"):
        time_grid(VP(), 1, sigma_min=0.02, sigma_max=80.0)
