"""The analytic settings: a mixture of Gaussians on a circle, whose exact denoiser is the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench.identity import derive_seed
from distillbench.problems.image_generation.edm import guided, heun_solve, karras_grid
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.image_generation.nets import build
from distillbench.suites.image_generation.sampling import Draws, Sampling
from distillbench.suites.metrics.mmd import mmd2
from distillbench.suites.metrics.modes import between_modes, coverage, spread_error, spread_ratio
from distillbench.suites.metrics.sliced_wasserstein import sliced_wasserstein
from distillbench.training.data import Arrays, Batch, Batches, Shuffled
from distillbench.training.nets import Architecture
from distillbench.training.student import tensor_digest

EXACT_STEPS = 128  # Heun steps of the guided flow of the reference: twice as many move a sample by 1e-3 of a mode's width


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """The mixture: ``modes`` of standard deviation ``std`` on a circle; ``train`` samples may be looked at.

    ``bandwidths`` are those of the kernels of mmd2.
    """

    modes: int
    radius: float
    std: float
    train: int
    bandwidths: tuple[float, ...]


def means(options: Options) -> Tensor:
    """The modes (K, 2), evenly spaced on the circle, float64."""
    angle = 2 * math.pi * torch.arange(options.modes, dtype=torch.float64) / options.modes
    return options.radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def draw(options: Options, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` exact samples (N, 2), float32, and their labels (N,): all 0 where there are no classes."""
    generator = torch.Generator().manual_seed(seed)
    modes = means(options)
    chosen = torch.randint(len(modes), (count,), generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (modes[chosen] + options.std * noise).float(), chosen % max(1, options.classes)


def batches(ctx: TrainContext) -> tuple[Batches[Batch], Arrays | None]:
    """The real samples a run may look at, drawn with its data seed."""
    options = ctx.options(Options)
    inputs, labels = draw(options, options.train, ctx.seeds["data"])
    train = Arrays(inputs, labels, torch.ones(len(inputs), dtype=torch.bool), tensor_digest({"inputs": inputs, "labels": labels}))
    return Shuffled(train, torch.arange(len(train)), ctx.setting.training.batch_size, ctx.seeds["order"]), train


def teacher(ctx: Context) -> nn.Module:
    """The exact denoiser."""
    return denoiser(ctx.options(Options))


def denoiser(options: Options) -> nn.Module:
    """The exact denoiser of a mixture."""
    arguments = {"means": means(options).tolist(), "std": options.std, "classes": options.classes}
    return build(Architecture("gaussian-mixture", arguments), 0).eval()


def reference(options: Options, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """What a perfect student would give: fresh exact samples (N, 2), or where the teacher is guided those of its exact flow.

    Guided flows sample another distribution than the data's, without a closed form; theirs is solved from the exact guided denoiser
    with so many steps that more change nothing that a metric could see.
    """
    samples, labels = draw(options, count, seed)
    if options.guidance == 1.0:
        return samples, labels
    generator = torch.Generator().manual_seed(derive_seed("guided flow", seed))
    answer = guided(denoiser(options), options.guidance)
    grid = karras_grid(EXACT_STEPS, sigma_min=options.sigma_min, sigma_max=options.sigma_max).tolist()
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return heun_solve(lambda x, s: answer(x, s, labels), grid[0] * noise, grid).float(), labels


def measure(draws: Draws, ctx: JudgeContext) -> list[Measurement]:
    """Judge the draws (samples, labels): the mean over draws of each metric, against fresh reference samples for each."""
    options = ctx.options(Options)
    modes, std = means(options), options.std
    found: dict[str, list[float]] = {}
    for i, (samples, labels) in enumerate(draws):
        real, real_labels = reference(options, len(samples), derive_seed(f"{ctx.split} reference {i}", ctx.seeds["evaluation"]))
        scores = {
            "mmd2": mmd2(
                _with_label(samples, labels, options), _with_label(real, real_labels, options), bandwidths=list(options.bandwidths)
            ),
            "sliced_wasserstein": sliced_wasserstein(samples, real),
        }
        if options.guidance == 1.0:  # the modes of a guided distribution are narrower, and elsewhere
            ratio = spread_ratio(samples, modes, std)
            scores |= {
                "spread_error": spread_error(ratio),
                "spread_ratio": ratio,
                "between_modes": float(between_modes(samples, modes, std).double().mean()),
                "coverage": coverage(samples, modes, std),
            }
        for name, value in scores.items():
            found.setdefault(name, []).append(value)
    return [Measurement.mean(name, values) for name, values in found.items()]


def _with_label(samples: Tensor, labels: Tensor, options: Options) -> Tensor:
    """Samples beside their class, so that the right sample under the wrong label is far from everything."""
    classes = options.classes
    return torch.cat([samples, 10 * nn.functional.one_hot(labels, classes).to(samples)], dim=1) if classes else samples


def pixels(draws: Draws, ctx: JudgeContext) -> Tensor:
    """The samples as a picture (96, 96) of grey values in [0, 1]: how many fall where, white for none."""
    side, reach = 96, 1.6 * ctx.options(Options).radius
    points = torch.cat([s for s, _ in draws])
    place = ((points + reach) / (2 * reach) * side).long()
    inside = ((place >= 0) & (place < side)).all(1)
    x, y = place[inside].T
    counts = torch.zeros(side * side).index_add_(0, (side - 1 - y) * side + x, torch.ones(len(x))).view(side, side)
    return 1 - (counts / counts.max().clamp(min=1)).sqrt()
