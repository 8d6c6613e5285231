"""f-distill, from the equations, in numpy float64."""

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


def logistic_generator_loss(fake):
    """ln(1 + e^-D), a mean over heads."""
    return np.array([np.mean([np.log1p(np.exp(-d)) for d in row]) for row in fake])


def density_ratio(logits, low, high):
    return np.clip(np.exp(np.clip(logits.mean(1), -10, 10)), low, high)


def level_means(ratio, place, means, decay):
    means, bins = means.copy(), np.minimum((place * len(means)).astype(int), len(means) - 1)
    for i in range(len(means)):
        if (bins == i).any():
            means[i] = decay * means[i] + (1 - decay) * ratio[bins == i].mean()
    return means, bins


def ratio_weight(held_ratio, *, divergence, power):
    """r^2 f''(r) over its mean."""
    h = np.array([r**2 * SECOND[divergence](r, power) for r in held_ratio])
    return h / h.mean()


def f_distill_loss(generated, real_denoised, fake_denoised, weight, *, held=None):
    """1/2 mean (x - a)^2 with the anchor a = x - w (mu_fake - mu_real) / mean |x - mu_real| held."""
    at = held or {"generated": generated, "real_denoised": real_denoised, "fake_denoised": fake_denoised, "weight": weight}
    value = np.zeros(len(generated))
    for row, x in enumerate(generated):
        x0, real, fake = (at[n][row] for n in ("generated", "real_denoised", "fake_denoised"))
        size = np.abs(x0 - real).mean()
        anchor = x0 - (at["weight"][row] * (fake - real) / size if size > 0 else 0)
        value[row] = ((x - anchor) ** 2).sum() / (2 * x.size)
    return value
