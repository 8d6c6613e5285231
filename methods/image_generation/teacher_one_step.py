"""The control at equal sampling cost: the teacher at the student's number of steps."""

from __future__ import annotations

from bench.card import Card
from bench.diffusion import karras_grid
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
    sigmas = [problem.sigma_max]
    if problem.steps > 1:
        sigmas = karras_grid(problem.steps + 1, sigma_min=problem.sigma_min, sigma_max=problem.sigma_max)[:-1].tolist()
    return run.export(problem.teacher.trainable_copy(), recipe={"rule": "denoise", "sigmas": sigmas})
