"""The control that marks the other end of the gap: the teacher itself, with as many steps as it needs."""

from __future__ import annotations

from bench.card import Card
from bench.problems.image_generation import ImageGeneration
from bench.run import Run
from bench.student import Student

CARD = Card(
    slug="teacher",
    version=1,
    problem="image-generation",
    title="The teacher, many steps",
    control=True,
)


def distill(problem: ImageGeneration, run: Run) -> Student:
    """No training: the teacher's own weights, and Heun along the setting's number of levels."""
    return run.export(problem.teacher.trainable_copy(), recipe=problem.heun())
