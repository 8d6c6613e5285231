"""Sequence-level distillation: the student is trained on the teacher's own responses as if they were data."""

from __future__ import annotations

from distillbench.cards.card import Beats, Card, Flag, Paper, Real
from distillbench.problems.language_modeling.oracle import token_nll as token_nll
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="seqkd",
    version=1,
    problem="language-modeling",
    title="Sequence-level knowledge distillation",
    paper=Paper(
        title="Sequence-Level Knowledge Distillation",
        year=2016,
        arxiv="1606.07947",
        code="https://github.com/harvardnlp/seq2seq-attn/blob/852ee994c6eca42dbe8cd997ec3a5e8fc46a4dfe/train.lua",
        catalogue="seqkd",
    ),
    objective="token_nll",
    equations={"distill": "L = -(1/N) sum over response tokens log q(y_t | y_<t, x),  y from the teacher"},
    hyperparameters={
        "temperature": Real(1.0, ge=0, note="of the teacher's sampling; 0 is greedy, near the paper's beam search"),
        "fresh": Flag(False, note="a new response at every step instead of the fixed text"),
    },
    claims=[Beats("scratch", source="the paper's comparison with training on the references")],
    deviations=[
        "Responses are sampled, or greedy at temperature 0; the paper decodes with a beam of 5. Sampled ones aim at the teacher's "
        "whole distribution, greedy ones and those of a beam at its mode.",
        "Responses that reach the length limit are kept without an end of sequence, so they teach what they hold but not to stop.",
        "The paper's interpolation (the candidate nearest the reference) and its mix with word-level distillation are left out.",
    ],
)


def distill(problem: LanguageModeling, run: Run, *, temperature: float, fresh: bool) -> Student:
    """Next-token cross-entropy on the teacher's responses to the whole pool of prompts."""

    def loss(batch: TokenBatch) -> Losses:
        return run.loss(batch, nll=(problem.nll(batch), "tokens"))

    if fresh:
        batches = problem.sampled(run, problem.teacher.module, temperature=temperature)
        return run.fit(problem.student, loss, batches)
    return run.fit(problem.student, loss, problem.teacher_text(temperature=temperature))
