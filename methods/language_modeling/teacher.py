"""The control that marks the other end of the gap: the teacher itself, judged like a student."""

from __future__ import annotations

from bench.card import Card
from bench.problems.language_modeling import LanguageModeling
from bench.run import Run
from bench.student import Student

CARD = Card(
    slug="teacher",
    version=1,
    problem="language-modeling",
    title="The teacher",
    control=True,
)


def distill(problem: LanguageModeling, run: Run) -> Student:
    """No training: the teacher's own weights."""
    return run.export(problem.teacher.trainable_copy())
