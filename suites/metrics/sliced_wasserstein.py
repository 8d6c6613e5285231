"""Sliced Wasserstein distance between two samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def directions(dimension: int, count: int) -> Tensor:
    """``count`` unit vectors (count, d), the same at every call: evenly spaced in the plane, drawn once elsewhere."""
    if dimension == 2:
        angle = math.pi * torch.arange(count, dtype=torch.float64) / count
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    drawn = torch.randn(count, dimension, generator=torch.Generator().manual_seed(2303), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def sliced_wasserstein(samples: Tensor, reference: Tensor, *, slices: int = 128) -> float:
    """sqrt of the mean over directions u of W_2^2(u . x, u . y) (Bonneel et al. 2015), samples of one size.   (N, d) each; >= 0.

    In one dimension W_2 pairs the sorted values. It measures how far mass has to move, so it hardly sees a mode that
    shrinks in place: read it beside :func:`mmd.mmd2`.

    Raises:
        ValueError: the samples differ in number.
    """
    if len(samples) != len(reference):
        raise ValueError(f"{len(samples)} samples against {len(reference)}: draw as many of each")
    x, y = samples.double().flatten(1), reference.double().flatten(1)
    unit = directions(x.shape[1], slices).to(x.device)
    return float(((x @ unit.T).sort(0).values - (y @ unit.T).sort(0).values).square().mean().sqrt())
