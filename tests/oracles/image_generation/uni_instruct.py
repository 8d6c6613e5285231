"""Uni-Instruct on Gaussians, from the equations, in numpy float64. Student N(b, a^2), teacher (mean, variance), one noise level."""

import numpy as np

# f'' of each divergence, derived by hand from f
SECOND = {
    "reverse_kl": lambda r, k: r**-2,
    "forward_kl": lambda r, k: 1 / r,
    "jensen_shannon": lambda r, k: 1 / r - 1 / (r + 1),
    "softened_reverse_kl": lambda r, k: 1 / (r + 1) - 1 / r + r**-2,
    "squared_hellinger": lambda r, k: r**-1.5 / 4,
    "jeffreys": lambda r, k: 1 / r + r**-2,
    "neyman": lambda r, k: 2 * r**-3,
    "pearson": lambda r, k: 2.0,
    "power": lambda r, k: r ** (k - 2),
}
# and its derivative
THIRD = {
    "reverse_kl": lambda r, k: -2 * r**-3,
    "forward_kl": lambda r, k: -(r**-2),
    "jensen_shannon": lambda r, k: (r + 1) ** -2 - r**-2,
    "softened_reverse_kl": lambda r, k: r**-2 - (r + 1) ** -2 - 2 * r**-3,
    "squared_hellinger": lambda r, k: -3 / 8 * r**-2.5,
    "jeffreys": lambda r, k: -(r**-2) - 2 * r**-3,
    "neyman": lambda r, k: -6 * r**-4,
    "pearson": lambda r, k: 0.0,
    "power": lambda r, k: (k - 2) * r ** (k - 3),
}


def uni_instruct_loss(generated, real_answer, fake_answer, ratio, divergence, power, law):
    """law/2 (C - r C') |d|^2 + C d . (x - D_fake), mean over components, with C = r^2 f'' and so C' from the third derivative."""
    out = np.zeros(len(generated))
    for i, r in enumerate(ratio):
        second, third = SECOND[divergence](r, power), THIRD[divergence](r, power)
        c, slope = r**2 * second, 2 * r * second + r**2 * third
        d = fake_answer[i] - real_answer[i]
        out[i] = law / 2 * (c - r * slope) * (d**2).mean() + c * (d * (generated[i] - fake_answer[i])).mean()
    return out


def logistic_generator_loss(fake):
    """ln(1 + e^-D), a mean over heads."""
    return np.array([np.mean([np.log1p(np.exp(-d)) for d in row]) for row in fake])


def score_divergence(divergence, power, teacher, b, a, sigma, law=None, count=300):
    """E_pi C(r) (s_student - s_teacher)^2 at one level; pi is the student's own law unless ``law`` = (mean, variance) is given."""
    from tests.oracles.image_generation.density_ratio import curvature, density, legendre  # the checks load this file alone

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
