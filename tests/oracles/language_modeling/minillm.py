"""MiniLLM in numpy, one token at a time: returns, whitening, the clipped objective, and the gradient of an enumerated sequence KL."""

import itertools

import numpy as np
from scipy.special import softmax


def advantages(reward, lengths, discount, own, whiten):
    """reward: (B, R), lengths: response tokens of each row. Returns (B, R), 0 behind a response."""
    found = np.zeros(reward.shape)
    for b, n in enumerate(lengths):
        for t in range(n):
            first = t if own else t + 1
            later = [discount ** (s - first) * reward[b, s] for s in range(first, n)]
            found[b, t] = sum(later) / len(later) if later else 0.0
    if whiten:
        tokens = np.concatenate([found[b, :n] for b, n in enumerate(lengths)])
        for b, n in enumerate(lengths):
            found[b, :n] = (found[b, :n] - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    return found


def clipped(log_q, old, weight, advantage, clip):
    """The value of each token, and its slope in log q."""
    value, slope = np.zeros(log_q.shape), np.zeros(log_q.shape)
    for i in np.ndindex(log_q.shape):
        ratio = np.exp(log_q[i] - old[i]) * weight[i]
        free, held = -advantage[i] * ratio, -advantage[i] * min(max(ratio, 1 - clip), 1 + clip)
        value[i] = max(free, held)
        slope[i] = free if free >= held else 0.0
    return value, slope


def policy_loss(log_q, old, weight, advantage, *, clip):
    return clipped(log_q, old, weight, advantage, clip)[0]


def single_step_loss(model, states, teacher, vocab):
    """KL(q || p) of each token; ``model`` is a projection (V, D + 1) whose last column is the bias."""
    values = []
    for state, w in zip(states, teacher[:, :vocab], strict=True):
        q, p = softmax(model[:vocab, :-1] @ state + model[:vocab, -1]), softmax(w)
        values.append(sum(b * (np.log(b) - np.log(a)) for a, b in zip(p, q, strict=True)))
    return np.array(values)


def sequences(vocab, length):
    return list(itertools.product(range(vocab), repeat=length))


def sequence_kl(student, teacher, vocab, length):
    """KL(q || p) over all responses of ``length`` tokens.   student, teacher: dicts prefix -> logits (V,)."""

    def distribution(table, prefix):
        z = np.exp(table[prefix] - table[prefix].max())
        return z / z.sum()

    total = 0.0
    for y in sequences(vocab, length):
        q = np.prod([distribution(student, y[:t])[y[t]] for t in range(length)])
        p = np.prod([distribution(teacher, y[:t])[y[t]] for t in range(length)])
        total += q * np.log(q / p)
    return total
