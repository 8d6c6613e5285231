"""The control at equal sampling cost: the teacher at the student's number of steps."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.run import Run
from distillbench.training.student import Student

CARD = Card(
    slug="teacher_one_step",
    version=1,
    trains=False,
    problem="image-generation",
    title="The teacher, as few steps as the student",
    control=True,
)


def distill(problem: ImageGeneration, run: Run) -> Student:
    """No training: the teacher's answer to pure noise, with noise added anew where the setting allows more steps than one."""
    return run.export(problem.teacher.trainable_copy(), recipe={**problem.recipe(), **problem.guidance})
