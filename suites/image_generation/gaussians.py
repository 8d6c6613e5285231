"""The analytic setting: a mixture of Gaussians on a circle, whose exact denoiser is the teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.data import Arrays
from bench.student import tensor_digest


def means(options: dict[str, Any]) -> Tensor:
    """The modes (K, 2), evenly spaced on the circle, float64."""
    angle = 2 * math.pi * torch.arange(int(options["modes"]), dtype=torch.float64) / int(options["modes"])
    return float(options["radius"]) * torch.stack([angle.cos(), angle.sin()], dim=1)


def draw(options: dict[str, Any], count: int, seed: int) -> Tensor:
    """``count`` exact samples (N, 2), float32."""
    generator = torch.Generator().manual_seed(seed)
    modes = means(options)
    chosen = torch.randint(len(modes), (count,), generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (modes[chosen] + float(options["std"]) * noise).float()


def train(options: dict[str, Any], seed: int) -> Arrays:
    """The real samples a run may look at, drawn with its data seed; labels are all 0."""
    inputs = draw(options, int(options["train"]), seed)
    labels = torch.zeros(len(inputs), dtype=torch.int64)
    return Arrays(inputs, labels, torch.ones(len(inputs), dtype=torch.bool), tensor_digest({"inputs": inputs}))
