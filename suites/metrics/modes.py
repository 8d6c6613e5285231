"""How samples sit on the known modes of a mixture of N(m_k, std^2 I) with equal weights."""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 3.0  # standard deviations within which a sample belongs to a mode; in the plane 1.1% of true samples lie outside
FAIR = 0.2  # a mode is covered where it gets at least this part of an equal part
FLOOR = 1e-3  # the smallest spread ratio told apart from 0


def _nearest(samples: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    distance, mode = torch.cdist(samples.double(), means.double()).min(1)
    return distance, mode


def spread_ratio(samples: Tensor, means: Tensor, std: float) -> float:
    """Standard deviation about a mode's own samples, pooled over modes, over the true one.   1 is right, 0 a collapse.

    Every sample counts for its nearest mode, so samples between modes widen it. NaN where no mode has two samples.
    """
    _, mode = _nearest(samples, means)
    x = samples.double()
    counts = torch.bincount(mode, minlength=len(means))
    centres = torch.zeros_like(means, dtype=torch.float64).index_add_(0, mode, x) / counts.clamp(min=1)[:, None]
    freedom = int((counts.clamp(min=1) - 1).sum()) * means.shape[1]
    return float((((x - centres[mode]) ** 2).sum() / freedom).sqrt() / std) if freedom else float("nan")


def spread_error(ratio: float) -> float:
    """|ln ratio|, with ratios below 1e-3 taken as 1e-3: 0 is right, twice too wide is as wrong as half too narrow."""
    return abs(float(torch.tensor(max(ratio, FLOOR), dtype=torch.float64).log()))


def between_modes(samples: Tensor, means: Tensor, std: float) -> Tensor:
    """Whether each sample lies farther than 3 std from every mode.   (N, d) -> (N,) bool."""
    return _nearest(samples, means)[0] > REACH * std


def coverage(samples: Tensor, means: Tensor, std: float) -> float:
    """Fraction of modes that get at least a fifth of an equal part of samples within 3 std; in [0, 1]."""
    distance, mode = _nearest(samples, means)
    counts = torch.bincount(mode[distance <= REACH * std], minlength=len(means))
    return float((counts >= FAIR * len(samples) / len(means)).double().mean())
