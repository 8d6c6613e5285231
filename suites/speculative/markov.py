"""The analytic setting: target and draft are tables, so what a block accepts is an exact sum over contexts. World of language-modeling."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.runs.record import Measurement
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites.language_modeling import markov
from distillbench.suites.language_modeling.markov import EOS

GAMMAS = range(1, 9)


def problem(ctx: TrainContext) -> LanguageModeling:
    """As :func:`markov.problem`: the draft is the student."""
    return markov.problem(ctx)


def efficiency(p: Tensor, q: Tensor, start: Tensor, length: int, gamma: int) -> tuple[float, float]:
    """Tokens per target call and accepted proposals per target call, exactly, for ``gamma`` proposals per block.

    Both are ratios of expectations over texts of p that begin at ``start`` (V ** order,) and end behind token 0 or at ``length`` tokens;
    a block that reaches the end of its text stops. A token of context c is an accepted v with min(p, q)(v | c) and one that ends its
    block with the rest of p(v | c), wherever a proposal was made.

    p, q: (V ** order, V) distributions of target and draft.
    """
    size, vocab = p.shape
    behind = ((torch.arange(size) * vocab % size)[:, None] + torch.arange(vocab)[None]).flatten()  # the context after (context, token)
    both = torch.minimum(p, q)
    now = torch.zeros(size, gamma + 1, dtype=torch.float64)  # chance to be at a context with so many accepted in the running block
    now[:, 0] = start
    tokens = calls = accepted = 0.0
    for _ in range(length):
        tokens += float(now.sum())
        calls += float(now[:, 0].sum())
        taken = now[:, None, :gamma] * both[:, :, None]
        accepted += float(taken.sum())
        ended = now[:, None, :gamma].sum(2) * (p - both) + now[:, None, gamma] * p
        flow = torch.cat([ended[:, :, None], taken], 2)
        flow[:, EOS] = 0
        now = torch.zeros_like(now).index_add_(0, behind, flow.flatten(0, 1))
    return tokens / calls, accepted / calls


def scores(p: Tensor, q: Tensor, start: Tensor, length: int) -> dict[str, float]:
    """Every metric of the setting: distributions p of the target and q of the draft, (V ** order, V) each."""
    weight = markov.visits(p, start, length)
    agree = (p.argmax(1) == q.argmax(1)).double()
    found = {
        "acceptance": 1 - markov.divergences(p, q, start, length)["tv"],
        "acceptance_greedy": float((weight * agree).sum() / weight.sum()),
    }
    for gamma in GAMMAS:
        found[f"block_efficiency_{gamma}"] = efficiency(p, q, start, length, gamma)[0]
    found["accepted_length_4"] = efficiency(p, q, start, length, 4)[1]
    return found


def measure(net: LanguageModel, ctx: JudgeContext) -> list[Measurement]:
    """Exact metrics; there is nothing to sample, so they have no spread within a run."""
    found = markov.of(ctx, ctx.split)
    vocab, order = found.truth.vocab, found.truth.order
    p, q = (markov.distributions(model, vocab, order) for model in (found.teacher, net))
    # the sum of a distribution may pass 1 by rounding; no metric may leave its range for that
    return [Measurement(name, round(value, 12), 1) for name, value in scores(p, q, found.start, found.length).items()]
