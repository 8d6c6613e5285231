"""DistiLLM by plain loops: the skewed divergences in numpy, the threshold, the choice of text, the buffer."""

import numpy as np
from scipy.special import rel_entr, softmax


def thresholds(losses, phi, epsilon, compared):
    """phi after each validation. losses: the first is that of the start."""
    before, found = losses[0], []
    for loss in losses[1:]:
        if loss >= before + epsilon:
            phi, before = min(phi + 0.1, 1.0), loss
        elif compared == "best" and loss < before:
            before = loss
        found.append(phi)
    return found


def kinds(draws, phi, steps, batch, capacity, replay):
    """Of every step: "new", "old" or "given", for uniform draws and a fixed phi."""
    held, found = 0, []
    for step, u in enumerate(draws):
        factor = {"decreasing": 1 - step / steps, "constant": 0.5, "increasing": step / steps, "off": 1.0}[replay]
        if u < phi * factor or (u < phi and held < capacity):
            held = min(capacity, held + batch)
            found.append("new")
        else:
            found.append("old" if u < phi else "given")
    return found


def logits(model, states, vocab):
    """What a projection (V, D + 1), its bias the last column, makes of states (N, D): (N, vocab)."""
    return states @ model[:vocab, :-1].T + model[:vocab, -1]


def token_divergence(model, states, teacher, *, divergence, alpha, vocab):
    """KL(p || alpha p + (1 - alpha) q), or the other way round, of each token."""
    values = []
    for z, w in zip(logits(model, states, vocab), teacher[:, :vocab], strict=True):
        q, p = softmax(z), softmax(w)
        one, other = (p, q) if divergence == "skew_kl" else (q, p)
        values.append(rel_entr(one, alpha * one + (1 - alpha) * other).sum())
    return np.array(values)
