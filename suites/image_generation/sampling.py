"""How a student is sampled: the suite does it, from the recipe that left with the weights."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.diffusion import heun_solve, per_row
from bench.errors import UserError

RULES = ("denoise", "heun")


def evaluations(recipe: dict[str, Any], *, sigma_max: float) -> int:
    """Network evaluations a sample (NFE) of a recipe ``{"rule": ..., "sigmas": [...]}``: N for ``denoise``, 2N - 1 for ``heun``.

    Raises:
        UserError: it is not a recipe: another key or rule, or levels that are not decreasing within (0, sigma_max].
    """
    sigmas = recipe.get("sigmas")
    if set(recipe) != {"rule", "sigmas"} or recipe["rule"] not in RULES or not isinstance(sigmas, list | tuple):
        raise UserError(f"a generator leaves with recipe={{'rule': one of {', '.join(RULES)}, 'sigmas': [...]}}, not {recipe!r}")
    if not sigmas or not all(isinstance(s, int | float) and 0 < s <= sigma_max for s in sigmas):
        raise UserError(f"the recipe's noise levels must lie within (0, {sigma_max}], not {list(sigmas)}")
    if any(after >= before for before, after in pairwise(sigmas)):
        raise UserError(f"the recipe's noise levels must decrease, not {list(sigmas)}")
    return len(sigmas) if recipe["rule"] == "denoise" else 2 * len(sigmas) - 1


@torch.no_grad()
def sample(net: nn.Module, recipe: dict[str, Any], noise: Tensor, generator: torch.Generator, *, sigma_min: float) -> Tensor:
    """Samples (B, ...) from standard normal ``noise`` (B, ...).

    ``denoise``: x = f(s_1 z, s_1); then for each further level s: x = f(x + sqrt(s^2 - sigma_min^2) z', s) with fresh z'
    (Song et al. 2023, algorithm 1).   ``heun``: the probability-flow ODE from s_1 z along the levels, then to 0.
    """
    sigmas = [float(s) for s in recipe["sigmas"]]
    if recipe["rule"] == "heun":
        return heun_solve(net, sigmas[0] * noise, sigmas)
    result = net(sigmas[0] * noise, noise.new_full((len(noise),), sigmas[0]))
    for sigma in sigmas[1:]:
        fresh = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
        level = noise.new_full((len(noise),), sigma)
        result = net(result + per_row((level**2 - sigma_min**2).clamp(min=0).sqrt(), noise) * fresh, level)
    answer: Tensor = result
    return answer


def sound(samples: Tensor) -> None:
    """Refuse what no metric should score.

    Raises:
        UserError: a value is not finite, or all samples are the same: the generator ignores its noise.
    """
    broken = int((~torch.isfinite(samples).flatten(1).all(1)).sum())
    if broken:
        raise UserError(f"{broken} of {len(samples)} samples are not finite")
    spread = float((samples.max(0).values - samples.min(0).values).max())
    if spread <= 1e-6 * max(1.0, math.fabs(float(samples.abs().max()))):
        raise UserError(f"the generator ignores its noise: all {len(samples)} samples are the same")
