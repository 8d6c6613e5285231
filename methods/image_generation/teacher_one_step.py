"""The control at equal sampling cost: the teacher at the student's number of steps."""

from __future__ import annotations

from bench.card import Card
from bench.problems.image_generation import ImageGeneration
from bench.run import Run
from bench.student import Student

CARD = Card(
    slug="teacher_one_step",
    version=1,
    problem="image-generation",
    title="The teacher, as few steps as the student",
    control=True,
)


def distill(problem: ImageGeneration, run: Run) -> Student:
    """No training: the teacher's answer to pure noise, with noise added anew where the setting allows more steps than one."""
    return run.export(problem.teacher.trainable_copy(), recipe={**problem.recipe(), **problem.guidance})
