"""On-policy distillation: a generalized divergence between next-token distributions, on the student's own responses or on given ones."""

from __future__ import annotations

from distillbench.cards.card import Beats, Card, Choice, Paper, Real
from distillbench.problems.language_modeling.oracle import token_divergence as token_divergence
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="gkd",
    version=1,
    problem="language-modeling",
    title="Generalized knowledge distillation",
    paper=Paper(
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        year=2023,
        arxiv="2306.13649",
        catalogue="gkd",
    ),
    objective="token_divergence",
    equations={
        "distill": "L = (1 - lambda) E_{y ~ teacher} D(y) + lambda E_{y ~ student} D(y),  D(y) = sum over t of D(p_t || q_t) / |y|,  "
        "D(p || q) = beta KL(p||m) + (1 - beta) KL(q||m),  m = beta p + (1 - beta) q"
    },
    hyperparameters={
        "divergence": Choice("js", options=["js", "forward_kl", "reverse_kl"], note="js with beta 0 is forward_kl, with beta 1 reverse_kl"),
        "beta": Real(0.5, ge=0, le=1, note="the teacher's weight in the mixture m; the paper has 0.1, 0.5 and 0.9, TRL 0.5"),
        "on_policy": Real(0.5, ge=0, le=1, note="lambda: chance that a batch is the student's own text; the paper has 0, 0.5, 1, TRL 0.5"),
        "temperature": Real(1.0, gt=0, note="of the student's sampling, never of the divergence; the paper's 1, TRL 0.9"),
        "reduction": Choice("token", options=["token", "sequence"], note="what weighs the same: TRL's token, or the paper's sequence"),
    },
    claims=[
        Beats("scratch"),
        Beats("seqkd", source="abstract: gains over supervised distillation"),
    ],
    deviations=[
        "Every token of a batch weighs the same, as in TRL; the paper takes the mean over each response first (reduction sequence).",
        "What is not the student's own text is sampled from the teacher; the paper takes the references, or the teacher's text.",
        "The student starts from the track's initial weights; the paper first fine-tunes it on the references.",
        "The reward of the paper's mix with reinforcement learning is left out.",
        "No code of the authors was found; values and gradients are compared with huggingface/trl at f2cd577.",
    ],
    notes="Tune split of markov, kl of 2 seeds: on_policy 0, 0.5, 1 give 0.514, 0.487, 0.517; reduction sequence 0.514 at 0.5.",
)


def distill(
    problem: LanguageModeling, run: Run, *, divergence: str, beta: float, on_policy: float, temperature: float, reduction: str
) -> Student:
    """Each batch is either the student's own text as it is now, or the teacher's; no gradient flows through the sampling."""

    def loss(batch: TokenBatch) -> Losses:
        values = problem.divergence(batch, divergence, beta=beta)
        return run.loss(batch, gkd=batch.per_sequence(values) if reduction == "sequence" else (values, "tokens"))

    return run.fit(problem.student, loss, problem.sampled(run, problem.student, fraction=on_policy, temperature=temperature))
