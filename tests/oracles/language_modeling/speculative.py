"""Speculative decoding on a first-order chain, in plain numpy and literally: proposals are drawn, tested and thrown away one by one."""

import functools

import numpy as np


def decoded(target, draft, start, gamma, length, end=None):
    """Expected tokens, calls and accepted proposals of a whole text, by going through every proposal, its test and its consequence.

    target, draft: (V, V) rows of distributions.  start: (V,).  end: the token that ends a text, or None.
    """
    vocab = range(len(target))

    @functools.cache
    def block(context, left):
        """(tokens, calls, accepted) from a position where a block begins, ``left`` tokens before the limit."""
        return np.array([0.0, 1.0, 0.0]) + tried(context, left, 0) if left else np.zeros(3)

    @functools.cache
    def tried(context, left, made):
        """The same from inside a block that has accepted ``made`` proposals."""
        if left == 0:
            return np.zeros(3)
        p, q = target[context], draft[context]
        total = np.zeros(3)

        def after(v, chance, inside):
            follows = np.zeros(3)
            if v != end:
                follows = tried(v, left - 1, made + 1) if inside else block(v, left - 1)
            return chance * (np.array([1.0, 0.0, float(inside)]) + follows)

        if made == gamma:
            return sum((after(v, p[v], False) for v in vocab), total)
        rest = np.maximum(p - q, 0)
        for x in vocab:
            taken = min(1.0, p[x] / q[x]) if q[x] else 0.0
            total = total + after(x, q[x] * taken, True)
            if taken < 1 and q[x]:
                for v in vocab:
                    total = total + after(v, q[x] * (1 - taken) * rest[v] / rest.sum(), False)
        return total

    return sum(start[c] * block(c, length) for c in vocab if start[c])


def long_run(target, draft, gamma):
    """Tokens a call in an endless text: block starts form a chain of their own, and blocks are averaged over where it settles."""
    both = np.minimum(target, draft)
    powers = [np.linalg.matrix_power(both, k) for k in range(gamma + 1)]
    starts = sum(powers[:gamma]) @ (target - both) + powers[gamma] @ target
    values, vectors = np.linalg.eig(starts.T)
    settled = np.real(vectors[:, np.argmax(np.real(values))])
    return float(settled / settled.sum() @ sum(powers) @ np.ones(len(target)))
