"""The control that marks the other end of the gap: the teacher itself, judged like a student."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.training.run import Run
from distillbench.training.student import Student

CARD = Card(
    slug="teacher",
    version=1,
    trains=False,
    problem="language-modeling",
    title="The teacher",
    control=True,
)


def distill(problem: LanguageModeling, run: Run) -> Student:
    """No training: the teacher's own weights."""
    return run.export(problem.teacher.trainable_copy())
