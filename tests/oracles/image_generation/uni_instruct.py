"""Uni-Instruct on Gaussians, from the equations, in numpy float64. Student N(b, a^2), teacher (mean, variance), one noise level."""

import numpy as np

from tests.oracles.image_generation.density_ratio import curvature, density, legendre


def uni_instruct_loss(generated, real, fake, ratio, divergence, power, law):
    """law/2 (C - r C') |d|^2 + C d . (x - D_fake), mean over components; C' by differences of C."""
    step = 1e-4 * ratio
    c = curvature(ratio, divergence, power)
    slope = (curvature(ratio + step, divergence, power) - curvature(ratio - step, divergence, power)) / (2 * step)
    out = np.zeros(len(generated))
    for i in range(len(generated)):
        d = fake[i] - real[i]
        out[i] = law / 2 * (c[i] - ratio[i] * slope[i]) * (d**2).mean() + c[i] * (d * (generated[i] - fake[i])).mean()
    return out


def score_divergence(divergence, power, teacher, b, a, sigma, law=None, count=300):
    """E_pi C(r) (s_student - s_teacher)^2 at one level; pi is the student's own law unless ``law`` = (mean, variance) is given."""
    noise = sigma**2
    v_q, v_p = teacher[1] + noise, a**2 + noise
    node, weight = legendre(count)
    width = 9 * np.sqrt(max(v_p, v_q))
    x = (teacher[0] + b) / 2 + width * node
    p, q = density(x, b, v_p), density(x, teacher[0], v_q)
    pi = p if law is None else density(x, law[0], law[1] + noise)
    difference = -(x - b) / v_p + (x - teacher[0]) / v_q
    c = np.ones_like(x) if divergence == "reverse_kl" else curvature(q / p, divergence, power)
    return float((width * weight * pi * c * difference**2).sum())


def gradient(function, b, a, step=1e-4):
    """Of function(b, a), by central differences."""
    return np.array([
        (function(b + step, a) - function(b - step, a)) / (2 * step),
        (function(b, a + step) - function(b, a - step)) / (2 * step),
    ])  # fmt: skip


def sim_loss(generated, noisy, real, fake, sigma):
    """SIM with the squared distance (arXiv 2410.16794): -d'(y) . (s_student - s_cond) with d' = 2 y, in scores, sum over components."""
    out = np.zeros(len(generated))
    for i in range(len(generated)):
        s_student, s_teacher = (fake[i] - noisy[i]) / sigma[i] ** 2, (real[i] - noisy[i]) / sigma[i] ** 2
        s_cond = -(noisy[i] - generated[i]) / sigma[i] ** 2
        out[i] = (-2 * (s_student - s_teacher) * (s_student - s_cond)).sum()
    return out
