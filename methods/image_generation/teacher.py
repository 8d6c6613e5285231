"""The control that marks the other end of the gap: the teacher itself, with as many steps as it needs."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.run import Run
from distillbench.training.student import Student

CARD = Card(
    slug="teacher",
    version=1,
    trains=False,
    problem="image-generation",
    title="The teacher, many steps",
    control=True,
)


def distill(problem: ImageGeneration, run: Run) -> Student:
    """No training: the teacher's own weights, and Heun along the setting's number of levels."""
    return run.export(problem.teacher.trainable_copy(), recipe=problem.heun())
