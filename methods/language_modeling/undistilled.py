"""The control that shows what training adds: the student as every method gets it."""

from __future__ import annotations

from bench.card import Card
from bench.problems.language_modeling import LanguageModeling
from bench.run import Run
from bench.student import Student

CARD = Card(
    slug="undistilled",
    version=1,
    problem="language-modeling",
    title="The student before any training",
    control=True,
)


def distill(problem: LanguageModeling, run: Run) -> Student:
    """No training: the student's initial weights, which may come from the teacher."""
    return run.export(problem.student)
