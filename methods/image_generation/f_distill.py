"""f-distill (Xu et al. 2025): distribution matching with any f-divergence, by a weight that depends on the density ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Choice, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.adversarial import logistic_generator_loss
from distillbench.problems.image_generation.density_ratio import Discriminator, curvature
from distillbench.problems.image_generation.edm import per_row
from distillbench.problems.image_generation.matching import Matching, matching_gradient, surrogate_loss
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run, coupled
from distillbench.training.student import Student

CARD = Card(
    slug="f_distill",
    version=1,
    problem="image-generation",
    title="f-divergence distribution matching",
    paper=Paper(
        title="One-step Diffusion Models with f-Divergence Distribution Matching",
        year=2025,
        arxiv="2502.15681",
        code="https://github.com/NVlabs/FastGen/blob/34f30e8ff1a563555fc0c7d59f1c1409dacd8af2/fastgen/methods/distribution_matching/f_distill.py",
        catalogue="f_distill",
        row=12,
    ),
    objective=("ratio_weight", "f_distill_loss", "logistic_generator_loss"),
    frozen={"f_distill_loss": ["real_denoised", "fake_denoised", "weight"], "ratio_weight": ["return"]},
    equations={
        "density_ratio": "r = clamp(exp(mean over heads of D(x_t)), low, high), the teacher's density over the student's",
        "level_means": "m_bin <- decay m_bin + (1 - decay) mean of r over the batch's rows in that bin of noise levels;  r <- r / m_bin",
        "ratio_weight": "w = h(r) / mean over the batch of h(r),  h(r) = r^2 f''(r)",
        "f_distill_loss": "L = 1/2 mean (x - sg(x - g))^2,  g = w (mu_fake(x_t, t) - mu_real(x_t, t)) / mean |x - mu_real(x_t, t)|",
    },
    hyperparameters={
        "divergence": Choice(
            "jensen_shannon",
            options=(
                "reverse_kl",
                "forward_kl",
                "jensen_shannon",
                "softened_reverse_kl",
                "squared_hellinger",
                "jeffreys",
                "neyman",
                "pearson",
                "power",
            ),
            note="the paper's best; the authors' code lacks pearson and power",
        ),
        "power": Real(0.5, note="k of the power family, whose weight is r^k; 0 is reverse KL, 1 forward KL"),
        "gan_weight": Real(1e-3, ge=0, note="of the generator's logistic loss; authors: 1e-3, ImageNet-64 3e-3"),
        "critic_weight": Real(0.01, gt=0, note="of the discriminator's loss beside the fake score's; DMD2's value"),
        "ratio_low": Real(0.1, gt=0, note="smallest ratio; authors' value"),
        "ratio_high": Real(20.0, gt=0, note="largest ratio; authors' value"),
        "bins": Integer(10, ge=1, note="of noise levels, each with a mean ratio of its own; authors' value"),
        "bin_decay": Real(0.0, ge=0, lt=1, note="of the bins' running means; authors: 0, ImageNet-64 0.5"),
        "generator_rate": Real(0.333, gt=0, note="times the track's learning rate"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "beta1": Real(0.0, ge=0, lt=1),
        "fake_updates": Integer(2, ge=1, note="steps of fake score and discriminator per generator step; authors: 4 (SD1.5: 9)"),
        "start_sigma": Real(2.5, gt=0, note="noise level the generator is evaluated at"),
        "low": Real(0.02, ge=0, lt=1, note="smallest noise level matched, as a position on the Karras schedule"),
        "high": Real(0.98, gt=0, le=1),
        "average": Real(0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; 0 exports the last weights"),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: one-step generation"),
        Beats("dmd", source="abstract: other divergences outperform variational score distillation, which is reverse KL"),
        Reported(suite="image-generation", setting="imagenet64", metric="fid", value=1.16, source="README of the authors' code"),
        Reported(suite="image-generation", setting="cifar10", metric="fid", value=1.92, source="README of the authors' code, conditional"),
    ],
    deviations=[
        "The discriminator's heads sit on the fake score's features, as in DMD2; the authors' code reads the teacher's.",
        "The discriminator sees real data, so the ratio is that of the data, not of the teacher, to the student (so in the authors' code); "
        "the two differ where the teacher is guided.",
        "2 steps of fake score and discriminator per generator step, not 4; the heads share the fake score's optimizer.",
        "Bins are equal parts of the Karras schedule; the authors' are equal parts of t, which for EDM is sigma itself.",
        "Both normalisations are means over the rows at hand: a micro-batch or a process has its own (authors: over all GPUs).",
        "Nothing is added to the denominators (authors: 1e-6); a row that the teacher leaves where it is gets no gradient.",
        "The exact teacher has no weights to copy: generator and fake score start from a regression onto its answers.",
        "The generator is evaluated at noise level 2.5, where the authors' EDM generator takes the largest level.",
        "The authors' code stops at reverse KL (its weight has no length); here it is DMD's gradient.",
    ],
    exempt={"per_example": "the weights are divided by their mean over the batch, the second normalisation"},
    notes="Tune split of digits, one seed, fd_digits_cnn: 0.78 as it stands, 0.96 at fake_rate 0.333 and beta1 0.9.",
)

RHO = 7.0  # of the Karras schedule, in whose positions the levels are drawn


def density_ratio(logits: Tensor, *, low: float, high: float) -> Tensor:
    """r = exp(mean logit) in [low, high], without a graph.   logits: (B, heads), positive for real -> (B,).

    A discriminator that is trained by the logistic loss has the optimum log p_real - log p_fake (section 3.3). The bounds are
    applied to the logit, so nothing overflows.
    """
    logit = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).mean(1)  # mixed precision gives bfloat16
    return logit.clamp(math.log(low), math.log(high)).exp()


def level_means(ratio: Tensor, position: Tensor, means: Tensor, *, bin_decay: float) -> tuple[Tensor, Tensor]:
    """The first normalisation: the mean ratio of each bin of noise levels, and the bin of each row.   Returns (bins,) and (B,) int64.

    E_student r = 1 at every level; the discriminator's ratio is divided by its own mean there. A bin without a row keeps its mean.
    With ``bin_decay`` 0 a row that is alone in its bin gets ratio 1: the weight needs several rows a bin.

    Args:
        ratio: (B,).  position: (B,), of the noise levels on the Karras schedule, in [0, 1].  means: (bins,), those before.
    """
    index = (position * len(means)).long().clamp(0, len(means) - 1)
    count = torch.bincount(index, minlength=len(means)).to(ratio.dtype)
    mean = torch.zeros_like(means).index_add(0, index, ratio) / count.clamp(min=1)
    return torch.where(count > 0, bin_decay * means + (1 - bin_decay) * mean, means), index


def ratio_weight(held_ratio: Tensor, *, divergence: str, power: float) -> Tensor:
    """w = h(r) / mean h(r) over the batch, h(r) = r^2 f''(r): table 1 and the second normalisation.   (B,) > 0 -> (B,), mean 1.

    1 in every row for reverse KL, whatever r is. The mean is over the rows given, so an example's weight depends on its batch. No
    gradient passes.
    """
    weight = curvature(held_ratio.detach(), divergence=divergence, power=power)
    return weight / weight.mean()


def f_distill_loss(generated: Tensor, real_denoised: Tensor, fake_denoised: Tensor, weight: Tensor) -> Tensor:
    """1/2 mean (x - sg(x - g))^2 with g = w (mu_fake - mu_real) / mean|x - mu_real|: its derivative by x is g / numel(row).

    The x_0 form of E_q h(r) (s_q - s_p) dx_t (theorem 1), with DMD's divisor. The value is half the mean square of g and no
    divergence. A row that the teacher leaves exactly where it is has no divisor and gets 0.

    generated x, real_denoised mu_real(x_t, t), fake_denoised mu_fake(x_t, t): (B, ...); weight: (B,).   Returns (B,).
    """
    gradient = per_row(weight, generated) * matching_gradient(generated, real_denoised, fake_denoised)
    return surrogate_loss(generated, gradient)


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    divergence: str,
    power: float,
    gan_weight: float,
    critic_weight: float,
    ratio_low: float,
    ratio_high: float,
    bins: int,
    bin_decay: float,
    generator_rate: float,
    fake_rate: float,
    beta1: float,
    fake_updates: int,
    start_sigma: float,
    low: float,
    high: float,
    average: float,
    initial_share: float,
) -> Student:
    """DMD2's game, in which the discriminator also says how much each sample's score difference weighs."""
    game = Matching(problem, run, start=start_sigma, low=low, high=high, initial_share=initial_share)
    discriminator = Discriminator(game)
    levels, means = nn.Module(), torch.ones(bins, device=run.device)
    levels.register_buffer("means", means)  # so that checkpoints carry them

    def generator_loss(batch: Batch) -> Losses:
        generated = game.generate(batch)
        noisy, sigma = game.perturb(batch, generated)
        real = problem.teacher.denoise(noisy.detach(), sigma, batch.condition)
        fake, logits = discriminator.judge(game, noisy, sigma, batch.condition)
        ratio = density_ratio(logits, low=ratio_low, high=ratio_high)
        first, last = problem.sigma_min ** (1 / RHO), problem.sigma_max ** (1 / RHO)
        position = (sigma ** (1 / RHO) - first) / (last - first)
        return run.loss(
            batch,
            matching=coupled(matching, generated, real, fake.detach(), ratio, position),
            gan=gan_weight * logistic_generator_loss(logits),
        )

    def matching(generated: Tensor, real: Tensor, fake: Tensor, ratio: Tensor, position: Tensor) -> Tensor:
        """Both normalisations look at the whole batch."""
        now, index = level_means(ratio, position, means, bin_decay=bin_decay)
        run.state["means"] = now
        weight = ratio_weight(ratio / now[index], divergence=divergence, power=power)
        return f_distill_loss(generated, real, fake, weight).mean()

    return game.train(
        generator_loss,
        generator_rate=generator_rate,
        fake_rate=fake_rate,
        fake_updates=fake_updates,
        beta1=beta1,
        average=average,
        fake_loss=lambda batch: discriminator.losses(game, batch, weight=critic_weight),
        extra=[discriminator, levels],
        after=lambda _: means.copy_(run.state.pop("means")),
    )
