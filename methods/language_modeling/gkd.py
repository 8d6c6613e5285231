"""On-policy distillation: a generalized divergence between next-token laws, on the student's own responses or on given ones."""

from __future__ import annotations

from bench.card import Beats, Card, Choice, Paper, Real
from bench.problems.language_modeling import LanguageModeling
from bench.run import Losses, Run
from bench.student import Student
from bench.texts import TokenBatch

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
    equations={"distill": "L = (1/N) sum over response tokens D(p || q), D = beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q"},
    hyperparameters={
        "divergence": Choice("js", options=["js", "forward_kl", "reverse_kl"], note="js with beta 0 is forward_kl, with beta 1 reverse_kl"),
        "beta": Real(0.5, ge=0, le=1, note="the teacher's share in the mixture m"),
        "on_policy": Real(0.5, ge=0, le=1, note="lambda: chance that a batch holds the student's own responses"),
        "temperature": Real(1.0, gt=0, note="of the student's sampling"),
    },
    claims=[Beats("scratch"), Beats("seqkd", source="abstract: gains over supervised distillation")],
    deviations=["Every token of a batch weighs the same; the paper takes the mean over each response first."],
)


def distill(problem: LanguageModeling, run: Run, *, divergence: str, beta: float, on_policy: float, temperature: float) -> Student:
    """Each batch is either the student's own text as it is now, or the teacher's; no gradient flows through the sampling."""

    def loss(batch: TokenBatch) -> Losses:
        return run.loss(gkd=batch.per_example(problem.divergence(batch, divergence, beta=beta)))

    return run.fit(problem.student, loss, problem.sampled(run, problem.student, fraction=on_policy, temperature=temperature))
