"""The control soft targets must beat: the teacher's hard decisions, and nothing else of it."""

from __future__ import annotations

from bench.card import Card
from bench.data import Batch
from bench.losses import cross_entropy
from bench.problems.classification import Classification
from bench.run import Losses, Run
from bench.student import Student

CARD = Card(
    slug="pseudo_label",
    version=1,
    problem="classification",
    title="Hard labels from the teacher",
    control=True,
    equations={"distill": "L = CE(argmax z_t, softmax(z_s)), over all examples"},
)


def distill(problem: Classification, run: Run) -> Student:
    """Cross-entropy against the teacher's decision on every example."""

    def loss(batch: Batch) -> Losses:
        decision = problem.teacher.logits(batch).argmax(dim=1)
        return run.loss(ce=cross_entropy(problem.student(batch.inputs), decision))

    return run.fit(problem.student, loss, problem.batches)
