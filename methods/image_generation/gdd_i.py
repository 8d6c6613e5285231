"""GDD-I (Zheng and Yang 2024): the teacher's own weights become a one-step generator by a GAN alone, their convolutions frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Flag, Gains, Paper, Real, Reported
from distillbench.errors import NotApplicable
from distillbench.problems.image_generation.adversarial import Heads, logistic_critic_loss, logistic_generator_loss
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.start import frozen, initialise
from distillbench.training.data import Batch
from distillbench.training.run import Learner, Losses, Run
from distillbench.training.student import Student

BODY = ("conv0", "conv1", "proj", "widen", "project")  # layers of a residual block: U-Nets of EDM's names, then the MLP of the suite

CARD = Card(
    slug="gdd_i",
    version=1,
    problem="image-generation",
    title="GAN distillation of an innate one-step generator",
    paper=Paper(
        title="Diffusion Models Are Innate One-Step Generators",
        year=2024,
        arxiv="2405.20750",
        code="https://github.com/Zyriix/GDD/blob/653c983be5518a65efd056427c4bd7cc92e2ce8a/training/loss.py",
        catalogue="gdd_i",
        row=146,
    ),
    objective=("generator_loss", "critic_loss"),
    equations={
        "generator_loss": "L_G = sum_k softplus(-D_k(x)),  x = G(s z; s)",
        "critic_loss": "L_D = sum_k softplus(D_k(x)) + softplus(-D_k(y)) + R1,  y real",
        "r1_penalty": "R1 = gamma / 2 |grad_y sum_k D_k(y)|^2",
        "body": "GDD-I trains all but the convolutions (and attention projections) of the residual blocks",
    },
    hyperparameters={
        "freeze": Flag(True, note="GDD-I: the inner layers of the residual blocks stay the teacher's; false trains everything: GDD"),
        "gamma": Real(1e-4, ge=0, note="weight of R1; the authors'; 0 leaves it out"),
        "generator_rate": Real(1.0, gt=0, note="times the track's learning rate; the authors' 1e-4 for CIFAR-10"),
        "critic_rate": Real(1.0, gt=0, note="times the track's learning rate; the authors' 1e-4 for CIFAR-10"),
        "start_sigma": Real(2.5, gt=0, note="noise level the generator is evaluated at; the authors' is 80"),
        "feature_sigma": Real(0.2, gt=0, note="noise level at which the frozen denoiser that gives the features is told an image is"),
        "average": Real(
            0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; the authors': a half-life of 1,950 steps"
        ),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("teacher_one_step", source="abstract: the innate ability to generate in one step, once trained for it"),
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Gains("freeze", over=False, source="abstract: freezing most of the convolutions does better than training all"),
        Reported(suite="image-generation", setting="cifar10", metric="fid", value=1.54, source="abstract"),
        Reported(suite="image-generation", setting="imagenet64", metric="fid", value=1.16, source="abstract"),
    ],
    deviations=[
        "The discriminators' features are those of the frozen teacher (its imitation where it has no weights), without the fixed random "
        "mixing of channels and scales: no image network trained on other data is at hand. The authors project into VGG16, "
        "EfficientNet-lite0 and DeiT. So the teacher gives more than a start here, and every look at its features is metered.",
        "A head is one hidden layer on each stage; theirs are patch discriminators on four scales.",
        "R1 is taken in every critic step; the authors take 16 times it in a step of its own every 16th time, the same on average.",
        "In the suite's MLP the two linear layers inside a residual block stand for the convolutions that are frozen; modulation, "
        "embeddings, first and last layer are trained.",
        "The exact teacher has no weights to copy: the generator starts, and freezes, what a regression onto its answers gave.",
        "The generator is evaluated at noise level 2.5, where the paper takes 80.",
        "Generator and critic see a batch each in turn; the authors show both the same one.",
    ],
    notes="Tune split of digits, one seed, fd_digits_cnn: 1.131 with frozen convolutions, 1.375 without (GDD).",
)


def generator_loss(fake: Tensor) -> Tensor:
    """sum_k softplus(-D_k(x)), a sum over heads.   fake: logits (B, H) -> (B,), nats."""
    return fake.shape[1] * logistic_generator_loss(fake)


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """sum_k softplus(D_k(x)) + softplus(-D_k(y)): 2 ln 2 a head where it can tell nothing.   Logits (B, H) each -> (B,), nats."""
    return fake.shape[1] * logistic_critic_loss(real, fake)


def r1_penalty(logits: Tensor, real: Tensor, *, gamma: float) -> Tensor:
    """gamma / 2 |grad_y sum_k D_k(y)|^2, with a graph to the critic's weights.   (B, H) logits of ``real`` (B, ...) -> (B,).

    Mescheder et al. 2018 (arXiv 1801.04406), equation 9; a row's logits must depend on that row alone.
    """
    [slope] = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return gamma / 2 * slope.flatten(1).square().sum(1)


def body(network: nn.Module) -> list[str]:
    """Names of the parameters that GDD-I freezes: those of layers called one of :data:`BODY`.

    The authors' optimizer leaves out names with "block", "in", "up" or "down" and with "conv" or "proj": the same layers of EDM's nets.

    Raises:
        NotApplicable: there are none.
    """
    names = [name for name, _ in network.named_parameters() if any(part in BODY for part in name.split("."))]
    if not names:
        raise NotApplicable(
            f"gdd_i: {type(network).__name__} has no layers called {', '.join(BODY)} to freeze; set freeze=false to train all"
        )
    return names


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    freeze: bool,
    gamma: float,
    generator_rate: float,
    critic_rate: float,
    start_sigma: float,
    feature_sigma: float,
    average: float,
    initial_share: float,
) -> Student:
    """Generator and discriminator heads in turn; the discriminators look at frozen features of clean images."""
    initialise(problem, run, share=initial_share)
    student, features = problem.student, frozen(problem, problem.student)
    [start] = problem.few_steps(1, start_sigma)
    if freeze:
        for name in body(student):
            student.get_parameter(name).requires_grad_(False)

    def level(batch: Batch, sigma: float) -> Tensor:
        return batch.inputs.new_full((len(batch),), sigma)

    def generate(batch: Batch) -> Tensor:
        noisy = start * batch.noise(batch.inputs.shape, "latents")
        return student(noisy, level(batch, start), batch.condition)  # type: ignore[no-any-return]

    def stages(images: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return features.stages(images, level(batch, feature_sigma), batch.condition)

    def play(batch: Batch) -> Losses:
        return run.loss(batch, gan=generator_loss(heads(stages(generate(batch), batch))))

    def judge(batch: Batch) -> Losses:
        with torch.no_grad():
            seen = stages(generate(batch), batch)
        real = batch.inputs.detach().requires_grad_(gamma > 0).clone()  # torch's counter of FLOPs cannot see a leaf differentiated
        logits = heads(stages(real, batch))
        terms = {"critic": critic_loss(logits, heads(seen))}
        if gamma:
            terms["r1"] = r1_penalty(logits, real, gamma=gamma)
        return run.loss(batch, **terms)

    with run.phase("match"):
        features.to(run.device)
        example = next(problem.batches.stream(0)).part(0, 1).to(run.device)
        heads = Heads(stages(example.inputs, example))
        base, betas = run.training.learning_rate, (0.0, 0.99)
        generator = Learner(student, play, learning_rate=base * generator_rate, betas=betas, ema=average or None)
        critic = Learner(heads, judge, counts=None, learning_rate=base * critic_rate, betas=betas)
        run.loop([generator, critic], problem.batches)
    return run.export(generator.average or student, recipe=problem.recipe(1, start_sigma), averaged=average > 0)
