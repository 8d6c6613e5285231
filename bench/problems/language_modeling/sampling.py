"""Sampling responses from a language model. A row's tokens depend on its own random numbers only, whatever it is batched with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.texts import Prompts


def pick(logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Tokens (B,) by inversion of the distribution function of softmax(logits / T) at ``uniform`` (B,) in [0, 1).

    At temperature 0 it is the most probable token, the first of several. ``top_p`` < 1 keeps the smallest set of most probable tokens
    whose mass reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    return draw(nucleus(tempered(logits, temperature), top_p), uniform)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T) (B, V), float64; all mass on the first of the largest at temperature 0."""
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return (logits.double() / temperature).softmax(-1)


def nucleus(distribution: Tensor, top_p: float) -> Tensor:
    """``distribution`` (B, V) without all but the smallest set of most probable tokens whose mass reaches ``top_p``; not normalised."""
    if top_p >= 1:
        return distribution
    ordered, order = distribution.sort(stable=True, dim=-1, descending=True)
    ordered = ordered.where(ordered.cumsum(-1) - ordered < top_p, 0.0)
    return torch.zeros_like(distribution).scatter_(-1, order, ordered)


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) from non-negative weights (B, V), by inversion at ``uniform`` (B,) in [0, 1)."""
    total = distribution.double().cumsum(-1)
    token = torch.searchsorted(total, uniform.double()[:, None] * total[:, -1:], right=True).squeeze(-1)
    # rounding may point past the last token that has any mass
    last = distribution.shape[-1] - 1 - (distribution > 0).flip(-1).long().argmax(-1)
    return torch.minimum(token, last)


@torch.no_grad()
def respond(
    model: LanguageModel,
    prompts: Prompts,
    uniforms: Tensor,
    *,
    eos: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    vocab: int | None = None,
    other: LanguageModel | None = None,
    mixing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Responses to ``prompts`` (B of them), and which of their tokens are real: (B, R) int64 and bool, R at most ``uniforms``' width.

    Args:
        uniforms: (B, R) in [0, 1): the random number of every token.
        vocab: entries that are no padding of the vocabulary.
        other, mixing: tokens come from ``mixing`` p_other + (1 - mixing) p_model, both at the temperature (MiniLLM's teacher-mixed
            sampling); ``top_p`` is of the mixture.

    Raises:
        UserError: a temperature below 0, top_p outside (0, 1], mixing outside [0, 1], or no room for a token.
    """
    for name, value, fits, what in (
        ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("mixing", mixing, 0 <= mixing <= 1, "in [0, 1]"),
        ("the length of responses", uniforms.shape[1], uniforms.shape[1] >= 1, "at least 1"),
    ):
        if not fits:
            raise UserError(f"{name} is {value}; it must be {what}")
    was, device = model.training, model.head[0].device
    model.eval()
    attention = prompts.attention.to(device)
    newest, uniforms = prompts.ids.to(device), uniforms.to(device)
    caches: list[object] = [None, None]
    alive = torch.ones(len(newest), dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    real: list[Tensor] = []
    for i in range(uniforms.shape[1]):
        state, caches[0] = model.decode(newest, attention, caches[0])
        logits = model.project(state[:, -1])[:, :vocab]
        if other is None or mixing == 0:
            token = pick(logits, uniforms[:, i], temperature=temperature, top_p=top_p)
        else:
            state, caches[1] = other.decode(newest, attention, caches[1])
            theirs = other.project(state[:, -1])[:, :vocab]
            mixed = mixing * tempered(theirs, temperature) + (1 - mixing) * tempered(logits, temperature)
            token = draw(nucleus(mixed, top_p), uniforms[:, i])
        token = torch.where(alive, token, eos)
        tokens.append(token)
        real.append(alive)
        attention = torch.cat([attention, alive[:, None]], 1)
        alive = alive & (token != eos)
        if not bool(alive.any()):
            break
        newest = token[:, None]
    model.train(was)
    return torch.stack(tokens, 1).cpu(), torch.stack(real, 1).cpu()
