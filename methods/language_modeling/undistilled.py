"""The control that shows what training adds: the student as every method gets it."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.training.run import Run
from distillbench.training.student import Student

CARD = Card(
    slug="undistilled",
    version=1,
    trains=False,
    problem="language-modeling",
    title="The student before any training",
    control=True,
)


def distill(problem: LanguageModeling, run: Run) -> Student:
    """No training: the student's initial weights, which may come from the teacher."""
    return run.export(problem.student)
