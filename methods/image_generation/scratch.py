"""The control every gain is measured from: the same student, data and budget, and no teacher."""

from __future__ import annotations

from distillbench.cards.card import Card
from distillbench.problems.image_generation.edm import denoising_loss, per_row
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="scratch",
    version=1,
    problem="image-generation",
    title="Denoising the real samples alone",
    control=True,
    objective="denoising_loss",
    equations={"distill": "L = lambda(s) mean (D(x_0 + s eps; s) - x_0)^2, over real x_0 and all noise levels s; sampled in one step"},
)


def distill(problem: ImageGeneration, run: Run) -> Student:
    """The teacher's kind of training, on real samples, for the whole budget; sampled at the student's number of steps."""

    def loss(batch: Batch) -> Losses:
        sigma = problem.levels(batch)
        noisy = batch.inputs + per_row(sigma, batch.inputs) * batch.noise(batch.inputs.shape, "noise")
        denoised = problem.student(noisy, sigma, batch.condition)
        return run.loss(batch, denoise=denoising_loss(denoised, batch.inputs, sigma, sigma_data=problem.sigma_data))

    return run.fit(problem.student, loss, problem.batches, recipe=problem.recipe())
