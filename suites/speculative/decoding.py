"""Speculative decoding itself: an exact verifier to hold the judge against, and the wall clock of the transformers library's own.

Leviathan, Kalman, Matias 2023 (arXiv 2211.17192), Algorithm 1; Chen et al. 2023 (arXiv 2302.01318), Algorithm 2.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.problems.language_modeling.models import LanguageModel, TransformersLM
from distillbench.problems.language_modeling.sampling import draw
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.runs.record import Measurement
from distillbench.suites.speculative.judge import pooled

TIE = 1e-3  # logits this near are a tie: one token at a time and several at once are summed in different orders


@dataclass(frozen=True)
class Decoded:
    """A response and how it came about.

    Attributes:
        tokens: the response, its end-of-sequence token included.
        accepted: of every target call, how many proposals it accepted.
        emitted: of every target call, how many tokens it gave; their sum is the length of the response.
    """

    tokens: list[int]
    accepted: list[int]
    emitted: list[int]


def verify(p: Tensor, q: Tensor, proposals: Tensor, uniforms: Tensor) -> tuple[int, int]:
    """How many of g proposals are accepted, and the token behind them.

    Proposal i is accepted with chance min(1, p_i(x) / q_i(x)); the token behind comes from max(0, p - q), normalised, at the first
    rejection, and from p_g where there is none.

    p: (g + 1, V) distributions of the target.  q: (g, V) distributions the proposals (g,) were drawn from.  uniforms: (g + 1,) in [0, 1).
    """
    for i, x in enumerate(proposals.tolist()):
        if not uniforms[i] * q[i, x] < p[i, x]:
            rest = (p[i] - q[i]).clamp(min=0)
            # distributions that are equal up to rounding may leave nothing
            return i, int(draw((rest if rest.any() else p[i])[None], uniforms[-1:]))
    return len(proposals), int(draw(p[-1:], uniforms[-1:]))


@torch.no_grad()
def speculate(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Prompts,
    *,
    gamma: int,
    length: int,
    eos: int,
    generator: torch.Generator,
    vocab: int,
    temperature: float = 1.0,
) -> list[Decoded]:
    """One response of ``target`` to every prompt, helped by ``draft``. The distribution of the responses is the target's own.

    Written to be checked, not to be fast: one prompt at a time, and every call reads the whole text. At temperature 0 the distributions
    are one-hot, which makes the same rule greedy verification. A draft that proposes the end of sequence proposes no more, a text stops
    behind an accepted one, and no block proposes past ``length``.

    Args:
        gamma: proposals per block.  length: tokens of a response at most.  vocab: entries of both projections that are no padding.

    Raises:
        UserError: gamma is below 1.
    """
    if gamma < 1:
        raise UserError(f"gamma {gamma}: a block has at least 1 proposal")
    found = []
    for ids, attention in zip(prompts.ids, prompts.attention, strict=True):
        prompt: list[int] = ids[attention].tolist()
        done = Decoded([], [], [])
        while len(done.tokens) < length and eos not in done.tokens[-1:]:
            text = prompt + done.tokens
            proposals: list[int] = []
            q: list[Tensor] = []
            while len(proposals) < min(gamma, length - len(done.tokens)) and eos not in proposals[-1:]:
                q.append(_distributions(draft, text + proposals, 1, vocab, temperature)[0])
                proposals.append(int(draw(q[-1][None], torch.rand(1, generator=generator))))
            p = _distributions(target, text + proposals, len(proposals) + 1, vocab, temperature)
            uniforms = torch.rand(len(proposals) + 1, generator=generator, dtype=torch.float64)
            accepted, behind = verify(p, torch.stack(q), torch.tensor(proposals), uniforms)
            new = [*proposals[:accepted], behind][: length - len(done.tokens)]
            new = new[: new.index(eos) + 1] if eos in new else new
            done.tokens.extend(new)
            done.accepted.append(accepted)
            done.emitted.append(len(new))
        found.append(done)
    return found


def _distributions(model: LanguageModel, text: list[int], count: int, vocab: int, temperature: float) -> Tensor:
    """The next-token distributions at the last ``count`` tokens of ``text``, (count, V) float64; one-hot at temperature 0."""
    ids = torch.tensor([text], device=model.head[0].device)
    was = model.training
    model.eval()
    logits = model.project(model(ids, torch.ones_like(ids, dtype=torch.bool))[0, -count:])[:, :vocab].double().cpu()
    model.train(was)
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(1), vocab).double()
    return (logits / temperature).softmax(1)


def measured_speedup(
    target: TransformersLM, draft: TransformersLM, prompts: Prompts, *, length: int, gamma: int, eos: int
) -> list[Measurement]:
    """``measured_speedup`` and ``lossless``: greedy decoding of the target alone and helped by the draft, one prompt at a time.

    Both are the transformers library's ``generate`` in this process, the two taking turns at going first, reading of the prompt
    included. The speed-up is total seconds alone over total seconds helped, with the per-prompt values of
    :func:`judge.pooled`; under 1 the draft makes decoding slower. ``lossless`` is the fraction of prompts with the same
    tokens both ways. A difference that begins at a tie (two logits of the target within :data:`TIE`) counts against ``lossless``, and
    its prompt has no part in the speed-up.

    Args:
        gamma: proposals per block, always that many (no schedule, no threshold of confidence).  length: tokens of a response at most.

    Raises:
        UserError: the outputs differ at no tie, or at a tie for every prompt: a speed-up of something else than the target is none.
    """
    alone, helper = target.causal(), draft.causal()
    settings = helper.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule, settings.assistant_confidence_threshold = gamma, "constant", 0.0
    rows = [ids[attention][None].to(alone.device) for ids, attention in zip(prompts.ids, prompts.attention, strict=True)]
    for extra in (None, helper):  # the first call of each pays for what is set up once
        _generate(alone, rows[0], min(length, 2 * gamma), eos, extra)
    seconds = torch.zeros(len(rows), 2, dtype=torch.float64)
    same: list[bool] = []
    for i, ids in enumerate(rows):
        texts: dict[int, Tensor] = {}
        for helped in (i % 2, 1 - i % 2):
            begin = time.perf_counter()
            texts[helped] = _generate(alone, ids, length, eos, helper if helped else None)
            seconds[i, helped] = time.perf_counter() - begin
        same.append(torch.equal(texts[0], texts[1]))
        if not same[-1]:
            _tied(alone, ids, texts[0], texts[1], i)
    kept = seconds[torch.tensor(same)]
    if not len(kept):
        raise UserError("no prompt gives the same greedy text with and without the draft: there is no speed-up to measure")
    return [pooled("measured_speedup", kept[:, 0], kept[:, 1]), Measurement.mean("lossless", [float(s) for s in same])]


def _generate(model: Any, ids: Tensor, length: int, eos: int, helper: Any) -> Tensor:
    """The greedy response (R,) to ``ids`` (1, T), helped by ``helper`` where it is not None."""
    helped = {} if helper is None else {"assistant_model": helper}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=length,
        eos_token_id=eos,
        pad_token_id=eos,
        **helped,
    )
    response: Tensor = out[0, ids.shape[1] :]
    return response


@torch.no_grad()
def _tied(model: Any, ids: Tensor, alone: Tensor, helped: Tensor, prompt: int) -> None:
    """Raises UserError where two greedy texts part at a token that is no tie of the model's."""
    width = min(len(alone), len(helped))
    differs = (alone[:width] != helped[:width]).nonzero().flatten().tolist()
    if differs:
        at = differs[0]
        logits = model(torch.cat([ids[0], alone[:at]])[None]).logits[0, -1]
        if abs(float(logits[alone[at]] - logits[helped[at]])) <= TIE:
            return
    raise UserError(
        f"prompt {prompt}: decoding with the draft gives another text than the target from token {(differs or [width])[0]} on: "
        "not lossless, so its speed-up does not count; check that both models have one vocabulary and are in evaluation mode"
    )
