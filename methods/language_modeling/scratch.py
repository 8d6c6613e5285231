"""The control every gain is measured from: the same student, data and budget, and no teacher."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.language_modeling.oracle import token_nll as token_nll
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="scratch",
    version=1,
    problem="language-modeling",
    title="Training on the references alone",
    control=True,
    objective="token_nll",
    equations={"distill": "L = -(1/N) sum over response tokens log q(y_t | y_<t)"},
)


def distill(problem: LanguageModeling, run: Run) -> Student:
    """Next-token cross-entropy on the responses that the data carry, for the whole budget."""

    def loss(batch: TokenBatch) -> Losses:
        return run.loss(batch, nll=(problem.nll(batch), "tokens"))

    return run.fit(problem.student, loss, problem.data)
