"""DMD2 (Yin et al. 2024): distribution matching without pairs, with a faster fake score, a GAN on its features, and few steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Gains, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.adversarial import Heads, logistic_critic_loss, logistic_generator_loss
from distillbench.problems.image_generation.edm import denoising_loss
from distillbench.problems.image_generation.matching import Matching, matching_gradient, surrogate_loss
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.nets import staged
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="dmd2",
    version=1,
    problem="image-generation",
    title="Improved distribution matching distillation",
    paper=Paper(
        title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        year=2024,
        arxiv="2405.14867",
        code="https://github.com/tianweiy/DMD2/blob/8d8fa55633d47cfb81bbc7a892e7248f9518763f/main/edm/edm_guidance.py",
        catalogue="dmd2",
        row=23,
    ),
    objective=("matching_gradient", "surrogate_loss", "logistic_generator_loss", "logistic_critic_loss"),
    frozen={"matching_gradient": ["real_denoised", "fake_denoised", "return"], "surrogate_loss": ["gradient"]},
    equations={
        "matching_gradient": "g = (mu_fake(x_t, t) - mu_real(x_t, t)) / mean |x - mu_real(x_t, t)|,  x_t = x + sigma_t eps,  x = G(z)",
        "surrogate_loss": "L_dm = 1/2 mean (x - sg(x - g))^2;   L_G = L_dm + lam_G softplus(-D(x_t'))",
        "logistic_generator_loss": "softplus(-D(x_t')),  x_t' = x + sigma_t' eps' at a level of its own",
        "logistic_critic_loss": "L_cls = softplus(D(x_t')) + softplus(-D(y_t'')),  y real;   L_fake = denoising loss + lam_D L_cls",
    },
    hyperparameters={
        "gan_weight": Real(3e-3, ge=0, note="lam_G; the authors' for ImageNet-64 (1e-3 SD1.5, 5e-3 SDXL); 0 leaves the discriminator out"),
        "critic_weight": Real(1e-2, ge=0, note="lam_D, the classifier's weight beside the fake score's loss; the authors'"),
        "fake_updates": Integer(2, ge=1, note="fake-score steps per generator step; the paper's is 5 (10 for SD1.5)"),
        "generator_rate": Real(0.333, gt=0, note="times the track's learning rate; the authors use one rate for both networks"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "beta1": Real(0.0, ge=0, lt=1, note="the authors' is 0.9"),
        "steps": Integer(0, ge=0, note="evaluations per sample; 0 is as many as the track allows"),
        "start_sigma": Real(2.5, gt=0, note="noise level of the generator's first evaluation; the authors' is the largest"),
        "low": Real(0.02, ge=0, lt=1, note="smallest noise level matched, as a position on the Karras schedule; the authors'"),
        "high": Real(0.98, gt=0, le=1, note="the largest; the authors'"),
        "average": Real(
            0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; the authors export the last weights: 0"
        ),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("dmd", source="table 1 and section 4: no pairs, and better"),
        Gains("steps", over=1, source="section 4.5: more steps are better"),
        Beats("teacher_one_step", source="abstract: surpasses the teacher's quality in few steps"),
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Reported(suite="image-generation", setting="imagenet64", metric="fid", value=1.28, source="abstract and table 1, one step"),
    ],
    deviations=[
        "The exact teacher has no weights to copy: generator and fake score start from a regression onto its answers.",
        "2 fake-score steps per generator step for the paper's 5: a run is to fit in a minute on one core.",
        "Every step has a batch and noise of its own; the authors train the fake score on the batch that the generator was updated on.",
        "Generated images take the labels of real ones; the authors draw them uniformly.",
        "The classifier reads generated images in the pass in which the fake score learns on them; the authors draw noise anew, at "
        "levels of the same distribution.",
        "The head is one hidden layer on the last stage that the network declares, the bottleneck of a U-Net; theirs has two strided "
        "convolutions.",
        "With several steps each row stops at a step of its own, where the authors draw one for the batch; the first level is "
        "start_sigma, and the others are Karras' from there.",
        "No warm-up, weight decay of 0.01 or gradient clipping; the discriminator is there from the first step, where the paper's best "
        "run adds it after one without.",
    ],
)


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    gan_weight: float,
    critic_weight: float,
    fake_updates: int,
    generator_rate: float,
    fake_rate: float,
    beta1: float,
    steps: int,
    start_sigma: float,
    low: float,
    high: float,
    average: float,
    initial_share: float,
) -> Student:
    """Generator, and fake score with a classifier on its features, in turn; the classifier sees noisy samples, fake and real."""
    game = Matching(problem, run, steps=steps, start=start_sigma, low=low, high=high, initial_share=initial_share)
    head = _head(problem, run, game.fake)

    def look(batch: Batch, images: Tensor, role: str) -> tuple[Tensor, Tensor, Tensor]:
        """What fake score and classifier say of noisy images at levels of their own: x_0 (B, ...), levels (B,), logits (B, heads)."""
        noisy, sigma = game.perturb(batch, images, low=0.0, high=1.0, role=role)
        denoised, stages = staged(game.fake, noisy, sigma, batch.condition)
        return denoised, sigma, head(stages[-1:])

    def generator_loss(batch: Batch) -> Losses:
        generated = game.generate(batch)
        noisy, sigma = game.perturb(batch, generated.detach())
        gradient = matching_gradient(generated, *game.denoised(noisy, sigma, batch.condition))
        terms = {"matching": surrogate_loss(generated, gradient)}
        if gan_weight:
            _, _, fake = look(batch, generated, "gan noise")
            terms["gan"] = gan_weight * logistic_generator_loss(fake)
        return run.loss(batch, **terms)

    def fake_loss(batch: Batch) -> Losses:
        with torch.no_grad():
            generated = game.generate(batch)
        denoised, sigma, fake = look(batch, generated, "fake noise")
        _, _, real = look(batch, batch.inputs, "real noise")
        return run.loss(
            batch,
            fake=denoising_loss(denoised, generated, sigma, sigma_data=problem.sigma_data),
            classifier=critic_weight * logistic_critic_loss(real, fake),
        )

    return game.train(
        generator_loss,
        generator_rate=generator_rate,
        fake_rate=fake_rate,
        fake_updates=fake_updates,
        beta1=beta1,
        average=average,
        fake_loss=fake_loss if gan_weight else None,
        extra=[head] if gan_weight else [],
    )


def _head(problem: ImageGeneration, run: Run, network: nn.Module) -> Heads:
    """A fresh discriminator head on the last stage of ``network``."""
    batch = next(problem.batches.stream(0)).to(run.device)
    with torch.no_grad():
        sigma = batch.inputs.new_full((len(batch),), problem.sigma_max)
        stages = staged(network.to(run.device), batch.inputs, sigma, batch.condition)[1]
    return Heads(stages[-1:])
