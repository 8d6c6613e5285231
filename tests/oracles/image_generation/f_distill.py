"""f-distill, from the equations, in numpy float64."""

import numpy as np


def density_ratio(logits, low, high):
    return np.clip(np.exp(np.clip(logits.mean(1), -10, 10)), low, high)


def level_means(ratio, place, means, decay):
    means, bins = means.copy(), np.minimum((place * len(means)).astype(int), len(means) - 1)
    for i in range(len(means)):
        if (bins == i).any():
            means[i] = decay * means[i] + (1 - decay) * ratio[bins == i].mean()
    return means, bins


def f_distill_loss(generated, real, fake, weight):
    """And its derivative by ``generated``."""
    value, slope = np.zeros(len(generated)), np.zeros_like(generated)
    for row in range(len(generated)):
        size = np.abs(generated[row] - real[row]).mean()
        g = weight[row] * (fake[row] - real[row]) / size if size > 0 else np.zeros_like(fake[row])
        value[row], slope[row] = (g**2).sum() / (2 * g.size), g / g.size
    return value, slope
