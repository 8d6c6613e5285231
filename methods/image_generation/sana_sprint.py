"""SANA-Sprint (Chen et al. 2025): a continuous-time consistency model, kept sharp by a discriminator on the teacher's features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Integer, Paper, Real
from distillbench.problems.image_generation.adversarial import Heads, hinge_generator_loss
from distillbench.problems.image_generation.edm import per_row, row_mean
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.start import frozen, initialise
from distillbench.problems.image_generation.trigflow import draw, warm
from distillbench.training.data import Batch
from distillbench.training.nets import staged
from distillbench.training.run import Learner, Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="sana_sprint",
    version=1,
    passes=2,
    problem="image-generation",
    title="Continuous-time consistency with latent adversarial distillation",
    paper=Paper(
        title="SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
        year=2025,
        arxiv="2503.09641",
        code="https://github.com/NVlabs/Sana/blob/0c07b191cc866c389766aa870adef61035fe7ec6/train_scripts/train_scm_ladd.py",
        catalogue="sana_sprint",
        row=48,
    ),
    objective=("weighted_scm_loss", "critic_loss", "generator_loss"),
    frozen={"weighted_scm_loss": ["tangent"]},
    equations={
        "weighted_scm_loss": "L_sCM = mean [ w exp(-v(t)) (F - sg(F) - g / (|g| + c))^2 ] + v(t),  w = 1 / (d tan t) = 1 / sigma,  "
        "g = cos(t) df/dt along the teacher's flow, by one JVP",
        "critic_loss": "L_D = 1/2 E relu(1 - D(x_t, t)) + 1/2 E relu(1 + D(x'_t, t)),  D: heads on the frozen teacher's features",
        "generator_loss": "L_G = L_sCM + lambda_adv E [-D(x'_t, t)],  x' = f(x_s, s), s the largest time with a probability",
    },
    hyperparameters={
        "adversarial_weight": Real(0.5, ge=0, note="lambda_adv; the authors'; 0 is sCM with its learnt weight"),
        "largest_share": Real(0.5, ge=0, le=1, note="share of the adversarial samples from pure noise; the authors'"),
        "mean": Real(0.9, note="of ln tan t; the authors' 0.2 + ln 2"),
        "std": Real(1.6, gt=0, note="of ln tan t; the authors'"),
        "critic_mean": Real(0.1, note="of ln tan t where the critic looks; the authors' -0.6 + ln 2"),
        "critic_std": Real(1.0, gt=0, note="of ln tan t where the critic looks; the authors'"),
        "tangent_constant": Real(0.1, gt=0, note="c; the authors'"),
        "warmup": Real(0.1, ge=0, lt=1, note="part of the loop in which r rises to 1; the authors' 4000 iterations of both phases"),
        "steps": Integer(0, ge=0, note="evaluations per sample; 0 is as many as the track allows"),
        "start_sigma": Real(80.0, gt=0, note="largest noise level of a sample, at most the track's; the authors start from pure noise"),
        "generator_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "critic_rate": Real(1.0, gt=0, note="times the track's learning rate; the authors' two rates are equal"),
        "beta1": Real(0.0, ge=0, lt=1),
        "average": Real(0.99, ge=0, lt=1, note="decay of the exported average; 0 is the last weights"),
        "initial_share": Real(0.5, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="few steps of the consistency function against as many of a denoiser"),
        Beats("teacher_one_step", source="abstract: one-step generation better than few steps of others"),
    ],
    deviations=[
        "The discriminator's features are those of the student's copy of the teacher, unguided; one small head on each block.",
        "A fair coin shows each row to the discriminator as real or as generated, where the authors show both: the same expectation at "
        "half the cost. No pairs with another sample's label, no R1 penalty.",
        "The learnt weight is a network of its own over ln sigma, thrown away at the end; it starts at -ln(components), not at the "
        "teacher's. Pure noise replaces the noised sample at the largest level, where the authors' cosine is 0 as well.",
        "The setting's guidance is fixed: it is neither drawn nor told to the student.",
        "The track's AdamW instead of CAME, without gradient clipping; an average of decay 0.99 is exported.",
        "The exact teacher has no weights to copy: half of the budget goes into a regression onto its answers.",
        "The discriminator's own file was not read; the losses and their distributions are those of the training script.",
    ],
    notes="Tune split of digits, one seed, fd_digits_cnn: 1.96 as it stands, 2.24 at adversarial_weight 0.1. rcm's unweighted "
    "consistency loss alone has 1.57, so the learnt weight or the critic costs here.",
)

FREQUENCIES = 4


class LogVariance(nn.Module):
    """v(t) of the learnt weight: linear in sines and cosines of ln sigma / 4.   (B,) -> (B,).

    Starts at -ln(components of a sample), near its optimum ln(w mean g^2) at sigma = 1, since the tangent's length is near 1.
    """

    def __init__(self, components: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * FREQUENCIES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -math.log(components))

    def forward(self, sigma: Tensor) -> Tensor:
        """One value per example (B,)."""
        angle = math.pi / 2 * sigma.log()[:, None] / 4 * torch.arange(1, FREQUENCIES + 1, dtype=sigma.dtype, device=sigma.device)
        value: Tensor = self.linear(torch.cat([angle.cos(), angle.sin()], dim=1))
        return value[:, 0]


def weighted_scm_loss(velocity: Tensor, tangent: Tensor, sigma: Tensor, log_variance: Tensor) -> Tensor:
    """mean [ (F - sg(F) - g)^2 ] / (sigma e^v) + v, with sigma = d tan t.   (B, ...) twice, (B,) twice -> (B,).

    ``tangent`` is normalised. The learnt weight e^-v comes to undo 1 / sigma and the tangent's size: v = ln(w mean g^2) at best.
    """
    return row_mean((velocity - velocity.detach() - tangent.detach()) ** 2) / (sigma * log_variance.exp()) + log_variance


def critic_loss(logits: Tensor, is_real: Tensor) -> Tensor:
    """The hinge of one row: relu(1 - D) where ``is_real``, else relu(1 + D), mean over heads.   (B, H), (B,) bool -> (B,).

    With a fair coin for ``is_real`` its expectation is the authors' half of the sum of both.
    """
    return torch.relu(1 - torch.where(is_real[:, None], logits, -logits)).mean(1)


def generator_loss(logits: Tensor) -> Tensor:
    """-D(x'), mean over heads.   (B, H) -> (B,)."""
    return hinge_generator_loss(logits)


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    adversarial_weight: float,
    largest_share: float,
    mean: float,
    std: float,
    critic_mean: float,
    critic_std: float,
    tangent_constant: float,
    warmup: float,
    steps: int,
    start_sigma: float,
    generator_rate: float,
    critic_rate: float,
    beta1: float,
    average: float,
    initial_share: float,
) -> Student:
    """The consistency of data with noise and a discriminator's verdict on the answers, in one update; then the discriminator's."""
    initialise(problem, run, share=initial_share)
    student, features = problem.student, frozen(problem, problem.student)
    example = next(problem.batches.stream(0)).to(run.device)
    weight = LogVariance(math.prod(example.inputs.shape[1:]))
    recipe = problem.recipe(steps, start_sigma)
    largest = problem.few_steps(steps, start_sigma)[0]
    offset = math.log(problem.sigma_data)

    def answers(batch: Batch, role: str) -> Tensor:
        """x' (B, ...): what the student makes of real samples under much noise, and of pure noise."""
        sigma = problem.lognormal_levels(batch, f"{role} levels", mean=mean + offset, std=std)
        pure = batch.uniform((len(batch),), f"{role} places") < largest_share
        sigma = torch.where(pure, largest, sigma)
        noise = per_row(sigma, batch.inputs) * batch.noise(batch.inputs.shape, role)
        generated: Tensor = student(torch.where(per_row(pure, noise), noise, batch.inputs + noise), sigma, batch.condition)
        return generated

    def judged(batch: Batch, samples: Tensor, role: str) -> Tensor:
        """The critic's logits (B, H) on noised samples."""
        sigma = problem.lognormal_levels(batch, f"{role} levels", mean=critic_mean + offset, std=critic_std)
        noisy = samples + per_row(sigma, samples) * batch.noise(samples.shape, role)
        logits: Tensor = heads(features.stages(noisy, sigma, batch.condition))
        return logits

    def generator(batch: Batch) -> Losses:
        r = warm(run.progress, warmup)
        velocity, tangent, sigma = draw(problem, run, student, batch, mean=mean, std=std, warmup=r, c=tangent_constant)
        terms = {"consistency": weighted_scm_loss(velocity, tangent, sigma, weight(sigma))}
        if adversarial_weight:
            logits = judged(batch, answers(batch, "generated"), "judged")
            terms["adversarial"] = adversarial_weight * generator_loss(logits)
        return run.loss(batch, **terms)

    def critic(batch: Batch) -> Losses:
        real = batch.uniform((len(batch),), "coins") < 0.5
        with torch.no_grad():
            samples = torch.where(per_row(real, batch.inputs), batch.inputs, answers(batch, "critic"))
        return run.loss(batch, critic=critic_loss(judged(batch, samples, "critic judged"), real))

    with torch.no_grad():
        heads = Heads(staged(student, example.inputs, torch.ones_like(example.inputs.flatten(1)[:, 0]), example.condition)[1])
    rate, betas = run.training.learning_rate, (beta1, 0.999)
    players = [Learner(student, generator, extra=[weight], learning_rate=rate * generator_rate, betas=betas, ema=average or None)]
    if adversarial_weight:
        players.append(Learner(heads, critic, counts=None, learning_rate=rate * critic_rate, betas=betas))
    with run.phase("distil"):
        run.loop(players, problem.batches)
    return run.export(players[0].average or student, recipe=recipe, averaged=average > 0)
