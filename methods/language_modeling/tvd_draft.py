"""Direct alignment of a draft model (Goel et al. 2024): total variation as a policy gradient whose rewards are standardised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillbench.cards.card import Beats, Card, Choice, Gains, Paper, Real
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import real_logits
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.sampling import pick
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.problems.language_modeling.token_losses import TopK, token_losses
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="tvd_draft",
    version=1,
    problem="language-modeling",
    title="Direct alignment of a draft model by TVD++",
    paper=Paper(
        title="Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs",
        year=2024,
        arxiv="2403.00858",
        catalogue="tvd_draft",
        row=82,
    ),
    objective=("exact_loss", "sampled_loss"),
    equations={
        "reward_mean": "mu = mean over tokens of sum_v q(v) r(v),  r(v) = 1 where p(v) > q(v), else 0",
        "reward_deviation": "sigma = sqrt(mu (1 - mu)), as r is 0 or 1",
        "distill": "grad L = -(1/N) sum over tokens of E_{v ~ q} [(r(v) - mu) / sigma grad log q(v)], which is grad TVD(p, q) / sigma; "
        "tvd_sampled takes one v of each token in the place of the expectation, tvd has no mu and sigma",
    },
    hyperparameters={
        "objective": Choice(
            "tvd_plus",
            options=["tvd_plus", "tvd_plus_sampled", "tvd"],
            note="the paper's TVD++ with its expectation over the vocabulary taken exactly or from one draw per token; or plain TVD",
        ),
        "temperature": Real(1.0, ge=0, note="of the teacher's responses; the paper mixes 0, 0.3, 0.7 and 1"),
        "top_p": Real(1.0, gt=0, le=1, note="of the teacher's responses; the paper's 0.95"),
        "pretraining": Real(0.0, ge=0, lt=1, note="share of the budget for next-token training on the references, the paper's first step"),
    },
    claims=[
        Beats("undistilled", metric="acceptance"),
        Beats("scratch", metric="acceptance", source="the paper's draft before fine-tuning is pre-trained on text alone"),
        Gains("objective", over="tvd", metric="acceptance", source="the paper's comparison of TVD++ with TVD, ahead on most tasks"),
    ],
    deviations=[
        "sigma is of the update before (1/2 at the first): that of the update under way is known only after its last micro-batch.",
        "One temperature of the responses; the paper has several responses per prompt, over four temperatures.",
        "No pre-training text is mixed into the distillation (the paper: about one batch in ten).",
        "Whether the paper takes the expectation over the vocabulary or samples tokens is not clear to us; both are here.",
        "No code of the authors was found.",
    ],
    notes="On the tune split tvd and tvd_plus differ by less than 0.001 in acceptance: with the exact expectation sigma only scales "
    "the gradient, which Adam divides away. tvd_plus_sampled does worse (0.578, and 0.591 after pretraining); pretraining 0.2 "
    "gains nothing for the other two.",
    exempt={
        "beats_scratch": "it is judged by KL, which total variation does not hold down: it lets go of tokens that the target gives little "
        "mass. Its acceptance is above that of scratch, which a test of the method asserts."
    },
)

FLOOR = 0.01  # of sigma: a draft that equals its target has no reward and no deviation
CHUNK = 64  # tokens whose logits exist at a time


def reward_mean(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """sum_v q(v) 1{p(v) > q(v)}: the draft's chance of a token that it underestimates.   (N, V) each -> (N,), in [0, 1)."""
    q, p = student_logits.softmax(-1), teacher_logits.softmax(-1)
    return (q * (p > q)).sum(-1)


def reward_deviation(mean: float) -> float:
    """sigma = sqrt(mu (1 - mu)) of rewards that are 0 or 1, at least :data:`FLOOR`."""
    return max(math.sqrt(mean * (1 - mean)), FLOOR)


def distill(problem: LanguageModeling, run: Run, *, objective: str, temperature: float, top_p: float, pretraining: float) -> Student:
    """Train on references, then on the teacher's responses by its distribution."""
    draft, teacher = problem.student, problem.teacher

    def nll(batch: TokenBatch) -> Losses:
        return run.loss(batch, nll=(problem.nll(batch), "tokens"))

    def plain(batch: TokenBatch) -> Losses:
        return run.loss(batch, tvd=(problem.divergence(batch, "tv"), "tokens"))

    def standardised(batch: TokenBatch) -> Losses:
        states = batch.predicted.take(draft(batch.ids, batch.attention))
        theirs = batch.predicted.take(teacher.states(batch))
        mean = run.state.get("reward", 0.5)
        if objective == "tvd_plus":
            loss, reward = exact_loss(draft, teacher.module, states, theirs, problem.vocab)
        else:
            positions = batch.predicted.rows + 1
            every = batch.uniform((len(batch), problem.length), "draws")
            uniforms = every[positions // batch.ids.shape[1], (batch.response.cumsum(1) - 1).flatten()[positions]]
            loss, reward = sampled_loss(draft, teacher.module, states, theirs, uniforms, mean, problem.vocab)
        # The reward has no gradient; it is among the terms so that its mean is over all micro-batches when ``keep`` gets it.
        return run.loss(batch, tvd_plus=(loss / reward_deviation(mean), "tokens"), reward=(reward, "tokens"))

    def keep(terms: dict[str, Tensor]) -> None:
        run.state["reward"] = float(terms["reward"])

    if pretraining:
        with run.phase("pretraining"):
            run.fit(draft, nll, problem.data, share=pretraining)
    texts = problem.teacher_text(temperature=temperature, top_p=top_p)
    if objective == "tvd":
        return run.fit(draft, plain, texts)
    return run.fit(draft, standardised, texts, after=keep)


def exact_loss(draft: LanguageModel, target: LanguageModel, states: Tensor, theirs: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """TVD of each token (N,), and its mean reward (N,) without a graph.

    The gradient of TVD is -E_{v ~ q} (r(v) - mu) grad log q(v) for any mu that is constant in v, since E_q grad log q = 0. So no (N, V)
    weights are made: sigma is all that is left of the standardisation.

    states, theirs: (N, D) of the draft and of its target.
    """
    reward = states.new_zeros(len(states), dtype=torch.float32)

    def teacher_logits(rows: slice) -> Tensor:
        with torch.no_grad():
            target_logits = real_logits(target, theirs[rows], vocab)
            reward[rows] = reward_mean(real_logits(draft, states[rows], vocab), target_logits)
        return target_logits

    weight, bias = draft.head
    return token_losses(states, weight, teacher_logits, "tv", bias=bias, vocab=vocab, chunk=CHUNK), reward


def sampled_loss(
    draft: LanguageModel, target: LanguageModel, states: Tensor, theirs: Tensor, uniforms: Tensor, mean_reward: float, vocab: int
) -> tuple[Tensor, Tensor]:
    """-(r(v) - mu) log q(v) at one v ~ q of each token (N,), drawn by ``uniforms`` (N,), and r(v) (N,); mu is ``mean_reward``."""
    tokens, rewards = [], []
    for mine, other, uniform in zip(*(x.split(CHUNK) for x in (states, theirs, uniforms)), strict=True):
        with torch.no_grad():
            q, p = real_logits(draft, mine, vocab), real_logits(target, other, vocab)
        token = pick(q, uniform)[:, None]
        tokens.append(token)
        rewards.append((p.log_softmax(-1).gather(1, token) > q.log_softmax(-1).gather(1, token)).squeeze(1))
    chosen, reward = torch.cat(tokens), torch.cat(rewards).float()
    point = TopK(chosen, torch.zeros_like(reward)[:, None], torch.zeros_like(reward))  # all mass on v: its forward KL is -log q(v)
    weight, bias = draft.head
    return (reward - mean_reward) * token_losses(states, weight, point, "forward_kl", bias=bias, vocab=vocab, chunk=CHUNK), reward
