"""The control every gain is measured from: the same student, data and budget, and no teacher."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.classification.losses import cross_entropy
from distillbench.problems.classification.problem import Classification
from distillbench.training.run import Run
from distillbench.training.student import Student

CARD = Card(
    slug="scratch",
    version=1,
    problem="classification",
    title="Training on the observed labels alone",
    control=True,
    objective="cross_entropy",
    equations={"distill": "L = CE(y, softmax(z_s)), over examples with an observed label"},
)


def distill(problem: Classification, run: Run) -> Student:
    """Cross-entropy on the labelled examples, for the whole budget."""
    return run.fit(
        problem.student, lambda batch: run.loss(batch, ce=cross_entropy(problem.student(batch.inputs), batch.labels)), problem.labelled
    )
