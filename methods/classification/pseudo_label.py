"""The control soft targets must beat: the teacher's hard decisions, and nothing else of it."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.classification.losses import cross_entropy
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="pseudo_label",
    version=1,
    problem="classification",
    title="Hard labels from the teacher",
    control=True,
    objective="cross_entropy",
    equations={"distill": "L = CE(argmax z_t, softmax(z_s)), over all examples"},
)


def distill(problem: Classification, run: Run) -> Student:
    """Cross-entropy against the teacher's decision on every example."""

    def loss(batch: Batch) -> Losses:
        decision = problem.teacher.logits(batch).argmax(dim=1)
        return run.loss(batch, ce=cross_entropy(problem.student(batch.inputs), decision))

    return run.fit(problem.student, loss, problem.batches)
