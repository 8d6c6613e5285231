"""How well a draft model serves a target in speculative sampling, measured on texts of the target, without decoding anything.

Given a text x_1 x_2 ... that the target sampled, lossless verification (Leviathan et al. 2023, Chen et al. 2023) had accepted x_j as a
proposal with chance a_j = min(1, q(x_j) / p(x_j)), independently of everything else: the joint distribution of "x is emitted" and "it was a
proposal that was accepted" is min(p(x), q(x)), and x is emitted with p(x) in all. So where the target's calls lie in a text is a renewal
process with known chances, and the expected number of calls for that text is an exact sum, ends of texts included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.texts import Texts
from distillbench.runs.record import Measurement

ROWS = 16  # texts whose states are held at once


def judge(
    target: LanguageModel,
    draft: LanguageModel,
    texts: Texts,
    *,
    vocab: int,
    temperature: float = 1.0,
    gammas: Iterable[int] = range(1, 9),
    chunk: int = 256,
) -> list[Measurement]:
    """What ``draft`` gives ``target`` in speculative sampling at ``temperature``, on ``texts`` that the target itself sampled at it.

    Every number is a ratio of sums over all texts, so that every token (or every call) weighs the same. Per-text values are those of
    :func:`pooled`. Named measurements:

    - ``acceptance``: mean over tokens of sum_v min(p(v), q(v)) = 1 - TV at the target's contexts.
    - ``acceptance_greedy``: fraction of the same contexts where both models have the same most probable token.
    - ``block_efficiency_<gamma>``: tokens per target call, the correction or bonus token among them, in [1, gamma + 1]: all tokens of the
      texts over the expected number of calls that they take. A text that ends inside a block ends the block.
    - ``accepted_length_4``: accepted proposals per target call at 4 proposals, without the correction or bonus token, in [0, 4].
    - ``draft_cost``: see :func:`draft_cost`.  ``predicted_speedup``: the largest block_efficiency_<gamma> / (gamma draft_cost + 1).

    Args:
        texts: sampled from the target at ``temperature``; on any others nothing here is unbiased.
        vocab: entries of both projections that are no padding.
        gammas: proposals per block.  chunk: tokens whose distributions (chunk, vocab) are held at once.

    Raises:
        UserError: the temperature is not above 0, a gamma is below 1, or no token counts.
    """
    if not temperature > 0:
        raise UserError(
            f"temperature {temperature}: distributions need one above 0; greedy agreement is acceptance_greedy at any temperature"
        )
    sizes = sorted(set(gammas))
    if not sizes or sizes[0] < 1:
        raise UserError(f"gammas {sizes}: name at least one, each at least 1")
    overlap, same, ratio, real = compare(target, draft, texts, vocab=vocab, temperature=temperature, chunk=chunk)
    tokens = real.double().sum(1)
    if not float(tokens.sum()):
        raise UserError("the texts have no response tokens: nothing to judge")
    cost = draft_cost(target, draft, texts)
    found = [pooled("acceptance", overlap.sum(1), tokens), pooled("acceptance_greedy", same.sum(1), tokens)]
    speedups = []
    for gamma in sizes:
        calls, _ = blocks(ratio, real, gamma)
        efficiency = pooled(f"block_efficiency_{gamma}", tokens, calls)
        found.append(efficiency)
        speedups.append(_scaled("predicted_speedup", efficiency, 1 / (gamma * cost + 1)))
    calls, accepted = blocks(ratio, real, 4)
    found.append(pooled("accepted_length_4", accepted, calls))
    return [*found, Measurement("draft_cost", cost, 1), max(speedups, key=lambda m: m.value)]


def pooled(metric: str, of: Tensor, per: Tensor) -> Measurement:
    """The ratio of sums R = sum(of) / sum(per) of texts' totals (M,), with linearised per-text values R + (of_i - R per_i) / mean(per).

    Their mean is R and their standard error is the delta method's for a ratio, so intervals over them are intervals of R; a single
    value may lie outside the range of R.
    """
    of, per = of.double(), per.double()
    ratio = of.sum() / per.sum()
    values = ratio + (of - ratio * per) / per.mean()
    return Measurement.of(metric, float(ratio), values.tolist())


def _scaled(metric: str, found: Measurement, by: float) -> Measurement:
    return Measurement.of(metric, found.value * by, [v * by for v in found.per_example or ()])


@torch.no_grad()
def compare(
    target: LanguageModel, draft: LanguageModel, texts: Texts, *, vocab: int, temperature: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both models at every response token of M texts, (M, T) each: sum_v min(p, q), agreement of the two argmaxes (0 or 1),
    min(1, q(x) / p(x)) at the token itself, all 0 where no token counts; and where one does (bool).
    """
    was = target.training, draft.training
    target.eval()
    draft.eval()
    device = target.head[0].device
    shape = texts.ids.shape
    found = torch.zeros(3, shape[0] * shape[1], dtype=torch.float64)
    for rows in torch.arange(len(texts)).split(ROWS):
        batch = texts.take(rows).to(device)
        low = int(texts.attention[rows].any(0).long().argmax())  # columns before it are left out of the batch
        states = [batch.predicted.take(m(batch.ids, batch.attention)) for m in (target, draft)]
        row, column = batch.predicted.rows // batch.ids.shape[1], batch.predicted.rows % batch.ids.shape[1]
        positions = (rows[0] + row.cpu()) * shape[1] + low + column.cpu() + 1  # of the token that is predicted
        parts = zip(
            states[0].split(chunk), states[1].split(chunk), batch.predicted.labels.split(chunk), positions.split(chunk), strict=True
        )
        for p_states, q_states, labels, where in parts:
            p, q = ((m.project(s)[:, :vocab].float() / temperature).log_softmax(1) for m, s in ((target, p_states), (draft, q_states)))
            found[1, where] = (p.argmax(1) == q.argmax(1)).double().cpu()
            ratio = (q.gather(1, labels[:, None]) - p.gather(1, labels[:, None])).squeeze(1)
            found[2, where] = ratio.clamp(max=0).double().exp().cpu()
            found[0, where] = 1 - (p.exp_().sub_(q.exp_()).abs_().double().sum(1) / 2).clamp(0, 1).cpu()
    target.train(was[0])
    draft.train(was[1])
    real = texts.response.clone()
    real[:, 0] = False  # nothing predicts the first token of a row
    overlap, same, ratio = found.view(3, *shape)
    return overlap, same, ratio, real


def blocks(accept: Tensor, real: Tensor, gamma: int) -> tuple[Tensor, Tensor]:
    """Expected target calls and expected accepted proposals of each text, (M,) each, with ``gamma`` proposals per block.

    A block proposes until a proposal is rejected (the call then gives the corrected token) or ``gamma`` are accepted (it then gives
    one more token), or the text ends.

    accept: (M, T), the chance that each token was an accepted proposal if one was made in its place.  real: (M, T), where tokens are.
    """
    accept = accept.double()
    # distribution of how many proposals of the running block have been accepted, 0 to gamma
    chance = torch.zeros(len(accept), gamma + 1, dtype=torch.float64)
    chance[:, 0] = 1
    calls = torch.zeros(len(accept), dtype=torch.float64)
    accepted = torch.zeros_like(calls)
    for t in range(accept.shape[1]):
        a, here = accept[:, t, None], real[:, t]
        taken = chance[:, :gamma] * a
        calls += chance[:, 0] * here
        accepted += taken.sum(1) * here
        ended = (chance[:, :gamma] * (1 - a)).sum(1, keepdim=True) + chance[:, gamma:]
        chance = torch.where(here[:, None], torch.cat([ended, taken], 1), chance)
    return calls, accepted


def draft_cost(target: LanguageModel, draft: LanguageModel, texts: Texts) -> float:
    """FLOPs of one decoded token of ``draft`` over those of ``target``, projection included, behind the first text.

    Counted by torch (matrix products and attention; embeddings and norms are free), so it knows nothing of memory or of small kernels.
    """
    return _flops(draft, texts) / _flops(target, texts)


@torch.no_grad()
def _flops(model: LanguageModel, texts: Texts) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    row = texts.take(torch.tensor([0])).to(model.head[0].device)
    was: Any = model.training
    model.eval()
    _, cache = model.decode(row.ids[:, :-1], row.attention[:, :-1], None)
    with FlopCounterMode(display=False) as counter:
        states, _ = model.decode(row.ids[:, -1:], row.attention, cache)
        model.project(states)
    model.train(was)
    return float(counter.get_total_flops())
