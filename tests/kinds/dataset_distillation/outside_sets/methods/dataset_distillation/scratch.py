"""As many random real images as a method may leave: what the synthetic ones must beat."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.training.run import Run
from distillbench.training.student import Part, Student
from outside_sets.problem import DatasetDistillation

CARD = Card(slug="scratch", version=1, problem="dataset-distillation", title="Random real images", control=True, trains=False)


def distill(problem: DatasetDistillation, run: Run) -> Student:
    """The set as every method gets it."""
    return run.export(parts={"set": Part.data(problem.student.state_dict(), "untrained")})
