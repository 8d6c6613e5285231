"""How a student is sampled: the suite does it, from the recipe that left with the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.errors import UserError, unknown
from distillbench.identity import derive_seed
from distillbench.problems.image_generation.edm import euler_solve, guided, heun_solve, renoise
from distillbench.problems.image_generation.sde import SDES, sde_solve
from distillbench.runs.suite import JudgeContext
from distillbench.training.nets import Architecture
from distillbench.training.student import Student, tensor_digest

Draws = list[tuple[Tensor, Tensor]]  # of samples (N, ...) and labels (N,)

RULES = {"denoise": (1, 0), "euler": (1, 0), "heun": (2, -1)}  # evaluations for n levels: a n + b
SDE_RULES = {"reverse_diffusion": (1, 0), "ancestral": (1, 0), "predictor_corrector": (2, 0), "probability_flow": (2, -1)}
ROWS, VALUES = 4096, 2**22  # samples and values at once: more would only take memory


def evaluations(recipe: dict[str, Any], *, sigma_max: float) -> int:
    """Network evaluations per sample (NFE) that a recipe ``{"rule": ..., "sigmas": [...]}`` needs; twice as many where it is guided.

    A rule of an SDE also names it, ``"sde": "ve" | "vp" | "subvp"``, and ``predictor_corrector`` its signal-to-noise ratio ``"snr"``.

    Raises:
        UserError: it is not a recipe: another key or rule, levels that are not decreasing within (0, sigma_max], no finite guidance,
            no known SDE, no snr > 0.
    """
    sigmas, rule, guidance = recipe.get("sigmas"), recipe.get("rule"), recipe.get("guidance", 1.0)
    rules = RULES | SDE_RULES
    if rule not in tuple(rules) or not isinstance(sigmas, list | tuple) or set(recipe) - {"guidance"} != {"rule", "sigmas", *_own(rule)}:
        own = f" and {', '.join(_own(rule))}" if rule in tuple(rules) and _own(rule) else ""
        raise UserError(f"a generator leaves with recipe={{'rule': one of {', '.join(rules)}, 'sigmas': [...]}}{own}, not {recipe!r}")
    if "sde" in recipe and recipe["sde"] not in tuple(SDES):
        raise unknown("SDE", str(recipe["sde"]), SDES)
    snr = recipe.get("snr", 1.0)
    if not isinstance(snr, int | float) or not 0 < snr < math.inf:
        raise UserError(f"the recipe's snr must be a number above 0, not {snr!r}")
    if not sigmas or not all(isinstance(s, int | float) and 0 < s <= sigma_max for s in sigmas):
        raise UserError(f"the recipe's noise levels must lie within (0, {sigma_max}], not {list(sigmas)}")
    if any(after >= before for before, after in pairwise(sigmas)):
        raise UserError(f"the recipe's noise levels must decrease, not {list(sigmas)}")
    if not isinstance(guidance, int | float) or not math.isfinite(guidance):
        raise UserError(f"the recipe's guidance must be a number, not {guidance!r}")
    each, less = rules[rule]
    return (each * len(sigmas) + less) * (1 if guidance == 1.0 else 2)


def _own(rule: str) -> list[str]:
    """The keys that a rule needs besides its levels."""
    return [] if rule in RULES else ["sde", "snr"] if rule == "predictor_corrector" else ["sde"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The options that the settings of every world have.

    Attributes:
        classes: labels lie below it; 0 for none.  guidance: of the teacher, classifier-free; 1 is none.
        draws, samples: independent draws that are judged, and samples of each.
        steps: network evaluations that a student's sample may take.  teacher_steps: levels of the teacher's own sampler.
    """

    classes: int
    guidance: float
    draws: int
    samples: int
    sigma_min: float
    sigma_max: float
    sigma_data: float
    steps: int
    teacher_steps: int
    student: Architecture

    @property
    def architecture(self) -> Architecture:
        """The student's, with the levels that every denoiser has."""
        arguments = {"sigma_data": self.sigma_data, "sigma_min": self.sigma_min, **self.student.arguments}
        return replace(self.student, arguments={k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()})


class Counted:
    """A network that counts its evaluations: ``rows`` that it has answered."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.rows = net, 0

    def __call__(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The network's answer."""
        self.rows += len(noisy)
        answer: Tensor = self.net(noisy, sigma, labels)
        return answer


@torch.no_grad()
def sample(
    net: nn.Module, recipe: dict[str, Any], noise: Tensor, labels: Tensor | None, generator: torch.Generator, *, sigma_min: float
) -> tuple[Tensor, float]:
    """Samples (B, ...) from standard normal ``noise`` (B, ...) for ``labels`` (B,), and the evaluations per sample they took.

    ``denoise``: x = f(s_1 z, s_1); then for each further level s: x = f(x + sqrt(s^2 - sigma_min^2) z', s) with fresh z'
    (Song et al. 2023, algorithm 1).   ``heun``, ``euler``: the probability-flow ODE from s_1 z along the levels, then to 0.
    The rules of an SDE: :func:`sde.sde_solve`.
    """
    counted, device = Counted(net), next(iter(net.state_dict().values())).device
    made, size = [], max(1, min(ROWS, VALUES // noise[0].numel()))
    for start in range(0, len(noise), size):
        rows = slice(start, start + size)
        given = None if labels is None else labels[rows].to(device)
        made.append(_sample(counted, recipe, noise[rows].to(device), given, generator, sigma_min).cpu())
    return torch.cat(made), counted.rows / len(noise)


def _sample(
    net: Counted, recipe: dict[str, Any], noise: Tensor, labels: Tensor | None, generator: torch.Generator, sigma_min: float
) -> Tensor:
    sigmas, guidance = [float(s) for s in recipe["sigmas"]], float(recipe.get("guidance", 1.0))
    answer = net if guidance == 1.0 or labels is None else guided(net, guidance)

    def denoise(noisy: Tensor, sigma: Tensor) -> Tensor:
        return answer(noisy, sigma, labels)  # type: ignore[arg-type]

    def draw() -> Tensor:
        return torch.randn(noise.shape, generator=generator, dtype=noise.dtype).to(noise.device)

    if recipe["rule"] in SDE_RULES:
        sde, snr = SDES[recipe["sde"]], float(recipe.get("snr", 1.0))
        return sde_solve(denoise, noise, sigmas, rule=recipe["rule"], sde=sde, snr=snr, draw=draw)
    if recipe["rule"] != "denoise":
        solve = heun_solve if recipe["rule"] == "heun" else euler_solve
        return solve(denoise, sigmas[0] * noise, sigmas)
    result = denoise(sigmas[0] * noise, noise.new_full((len(noise),), sigmas[0]))
    for sigma in sigmas[1:]:
        level = noise.new_full((len(noise),), sigma)
        result = denoise(renoise(result, draw(), level, sigma_min=sigma_min), level)
    return result


def sound(samples: Tensor, labels: Tensor | None = None) -> None:
    """Refuse what no metric should score.   samples: (N, ...), labels: (N,) or None.

    Raises:
        UserError: a value is not finite, or all samples (of one label) are the same: the generator ignores its noise.
    """
    broken = int((~torch.isfinite(samples).flatten(1).all(1)).sum())
    if broken:
        raise UserError(f"{broken} of {len(samples)} samples are not finite")
    for label in [None] if labels is None else labels.unique().tolist():
        own = samples if labels is None else samples[labels == label]
        spread = float((own.max(0).values - own.min(0).values).max())
        if len(own) > 1 and spread <= 1e-6 * max(1.0, math.fabs(float(own.abs().max()))):
            whose = "" if label is None else f" of class {label}"
            raise UserError(f"the generator ignores its noise: all {len(own)} samples{whose} are the same")


def drawn(
    net: nn.Module,
    student: Student,
    options: Sampling,
    ctx: JudgeContext,
    *,
    teacher: Callable[[], nn.Module],
    draws: int | None = None,
    samples: int | None = None,
) -> tuple[Draws, float]:
    """Independent draws of (samples (N, ...), labels (N,)) of a student, and the network evaluations that a sample took.

    Args:
        net: its network, which knows the ``shape`` of a sample.
        teacher: gives the setting's, whose very weights may take more evaluations than the setting allows.
        draws, samples: fewer than the setting asks for.

    Raises:
        UserError: the recipe is none or takes too many evaluations; a sample is not finite; all samples (of a class) are the same.
    """
    used = evaluations(student.recipe, sigma_max=options.sigma_max)
    if used > options.steps and tensor_digest(student.weights) != tensor_digest(dict(teacher().state_dict())):
        raise UserError(f"the recipe takes {used} evaluations per sample, this setting allows {options.steps}")
    if ctx.setting.tier == "paper":
        net.to(ctx.device)
    shape: tuple[int, ...] = net.shape  # type: ignore[assignment]
    made, spent = [], 0.0
    for i in range(draws or options.draws):
        generator = torch.Generator().manual_seed(derive_seed(f"{ctx.split} noise {i}", ctx.seeds["evaluation"]))
        noise = torch.randn(samples or options.samples, *shape, generator=generator)
        labels = torch.arange(len(noise)) % max(1, options.classes)
        given = labels if options.classes else None
        found, spent = sample(net, student.recipe, noise, given, generator, sigma_min=options.sigma_min)
        sound(found, given)
        made.append((found, labels))
    return made, spent
