"""What one-step methods do first: the teacher's knowledge for the student, frozen and trainable copies, pairs of the teacher's ODE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillbench.problems.image_generation.edm import denoising_loss, heun_solve, karras_grid, per_row
from distillbench.problems.image_generation.oracle import DenoiserOracle
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.noise import Rows
from distillbench.training.run import Losses, Run
from distillbench.training.trees import Tree, each, joined

PAIRS = 1024  # pairs solved at once

Pairs = tuple[Tensor, Tensor, Tree]  # noise, sample, condition


def initialise(problem: ImageGeneration, run: Run, *, share: float) -> None:
    """Give ``problem.student`` the teacher's knowledge, as papers do by copying its weights. Phase ``initialise`` of the record.

    Where teacher and student are the same network, the weights are copied and no budget is used. Elsewhere (an exact teacher
    has none) the student regresses onto the teacher's answers with the teacher's own loss, for ``share`` of the budget:
    lambda(s) |D_student(x_t; s) - D_teacher(x_t; s)|^2, s uniform in its position on the Karras schedule.
    """
    teacher, student = problem.teacher.trainable_copy().state_dict(), problem.student
    with run.phase("initialise"):
        if {k: v.shape for k, v in teacher.items()} == {k: v.shape for k, v in student.state_dict().items()}:
            student.load_state_dict(teacher)
            return

        def loss(batch: Batch) -> Losses:
            sigma = problem.levels(batch)
            noisy = batch.inputs + per_row(sigma, batch.inputs) * batch.noise(batch.inputs.shape, "noise")
            answer = problem.teacher.denoise(noisy, sigma, batch.condition)
            return run.loss(
                batch, imitate=denoising_loss(student(noisy, sigma, batch.condition), answer, sigma, sigma_data=problem.sigma_data)
            )

        run.fit(student, loss, problem.batches, share=share)


def frozen(problem: ImageGeneration, network: nn.Module) -> DenoiserOracle:
    """An oracle over a frozen copy of ``network`` (of the student's architecture), which counts on the teacher's meter.

    After :func:`initialise` this is the teacher itself wherever teacher and student are one architecture; elsewhere it is the
    student's imitation of it, which has the stages that an exact teacher has not.
    """
    return problem.teacher.over(twin(problem, network))


def twin(problem: ImageGeneration, network: nn.Module, **arguments: object) -> nn.Module:
    """A new network of the student's architecture, with ``arguments`` over its own, that starts from the weights of ``network``."""
    other = problem.new_student(**arguments)
    other.load_state_dict(network.state_dict())
    return other


def ode_pairs(
    problem: ImageGeneration, run: Run, count: int, *, teacher: DenoiserOracle | None = None, levels: int | None = None, role: str = "pairs"
) -> Pairs:
    """``count`` pairs of an ODE: unit noise z and where Heun along a Karras grid takes sigma_max z, with conditions.

    The conditions are those of real samples, in the order of the stream. (count, ...), (count, ...), and of count rows.

    Args:
        teacher: whose ODE, by default the problem's teacher; asked 2 N - 1 times per pair (a guided one twice as often).
        levels: N of the grid, by default as many as the setting solves its teacher with.
        role: the stream the noise is drawn from, and the phase of the record; pairs that are made anew take another one.
    """
    oracle = teacher or problem.teacher

    def make() -> Pairs:
        stream = problem.batches.stream(0)
        batches = [next(stream) for _ in range(-(-count // problem.batches.batch_size))]
        condition = each(lambda rows: rows[:count].to(run.device), joined([b.condition for b in batches]))
        noise = torch.randn(count, *batches[0].inputs.shape[1:], generator=run.generator(role)).to(run.device)
        grid = karras_grid(levels or problem.teacher_steps, sigma_min=problem.sigma_min, sigma_max=problem.sigma_max).tolist()

        def solve(rows: slice) -> Tensor:
            own = each(lambda x: x[rows], condition)
            return heun_solve(lambda x, s: oracle.denoise(x, s, own), problem.sigma_max * noise[rows], grid)

        return noise, torch.cat([solve(slice(i, i + PAIRS)) for i in range(0, count, PAIRS)]), condition

    with run.phase(role):
        return run.once(role, make)


def some_pairs(pairs: Pairs, batch: Rows) -> Pairs:
    """One of :func:`ode_pairs`' pairs for each row of ``batch``, with replacement: noise, sample and condition stay together."""
    noise, samples, condition = pairs
    row = batch.integers(len(noise), (len(batch),), "pairs").to(noise.device)
    return noise[row], samples[row], each(lambda x: x[row], condition)
