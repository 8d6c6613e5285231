"""Discriminators on a denoiser's features, and their losses: what adversarial distillation methods share.

A logit is positive for real samples. Every loss is one value per example (B,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8


class Heads(nn.Module):
    """One small head on each feature map: 1x1 convolution, group norm, SiLU, 1x1 convolution, mean over positions.

    ``forward``: feature maps (B, K_i, H_i, W_i) or (B, K_i) -> logits (B, number of heads).

    Args:
        stages: example feature maps, for their channels.  width: hidden channels, a multiple of 8.
    """

    def __init__(self, stages: Sequence[Tensor], width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s.shape[1], width, 1), nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 1, 1)) for s in stages
        )

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Logits (B, number of heads)."""
        maps = [s if s.dim() == 4 else s[:, :, None, None] for s in stages]
        return torch.cat([head(m).mean((2, 3)) for head, m in zip(self.heads, maps, strict=True)], dim=1)


def logistic_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(fake)), mean over heads: least 2 ln 2 where D can tell nothing.   (B, H) each -> (B,), nats.

    Goodfellow et al. 2014 (arXiv 1406.2661); its optimum is D = log p_real - log p_fake.
    """
    return (F.softplus(-real) + F.softplus(fake)).mean(1)


def logistic_generator_loss(fake: Tensor) -> Tensor:
    """softplus(-D(fake)), mean over heads: the non-saturating form.   (B, H) -> (B,), nats."""
    return F.softplus(-fake).mean(1)


def hinge_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """relu(1 - D(real)) + relu(1 + D(fake)), mean over heads.   (B, H) each -> (B,). Lim and Ye 2017 (arXiv 1705.02894)."""
    return (F.relu(1 - real) + F.relu(1 + fake)).mean(1)


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-D(fake), mean over heads.   (B, H) -> (B,)."""
    return -fake.mean(1)
