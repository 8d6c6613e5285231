"""Networks of the generation settings: the student's denoiser and the exact teacher."""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor, nn

from distillbench.errors import unknown
from distillbench.problems.image_generation.edm import consistency_scalings, edm_scalings, per_row
from distillbench.training import student as students
from distillbench.training.nets import Architecture
from distillbench.training.student import Student

FREQUENCIES = 8


class _Block(nn.Module):
    """h + W2 silu(W1 ((1 + scale(e)) n(h) + shift(e))): a residual block modulated by the condition e; n is layer norm or nothing."""

    def __init__(self, width: int, expansion: int, normalise: bool, dropout: float) -> None:
        super().__init__()
        self.normalise = nn.LayerNorm(width, elementwise_affine=False) if normalise else nn.Identity()
        self.modulation = nn.Linear(width, 2 * width)
        self.widen = nn.Linear(width, expansion * width)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(expansion * width, width)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        inner = nn.functional.silu(self.widen(self.normalise(hidden) * (1 + scale) + shift))
        changed: Tensor = self.project(self.dropout(inner))
        return hidden + changed


class Denoiser(nn.Module):
    """A residual MLP with EDM's preconditioning, or with the consistency boundary f(x, sigma_min) = x.

    ``forward``: noisy (B, *shape), sigma (B,), labels (B,) int64 or None -> x_0 estimate (B, *shape). Its last layer starts at 0,
    so a fresh network answers c_skip x.

    Args:
        shape: of one sample.  width, blocks: of the MLP, whose blocks widen ``expansion`` times.
        classes: 0 for an unconditional network, whose labels are ignored; elsewhere labels None is the unconditional answer.
        normalise: layer norm in the blocks (adaLN). Not in few dimensions, where the length of h says how far out a sample is.
        dropout: within the blocks, while training.
        boundary: whether :func:`edm.consistency_scalings` replace EDM's. The weights are the same either way.
    """

    def __init__(
        self,
        shape: list[int],
        width: int,
        blocks: int,
        sigma_data: float,
        sigma_min: float,
        classes: int = 0,
        expansion: int = 1,
        normalise: bool = False,
        dropout: float = 0.0,
        boundary: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.sigma_data, self.sigma_min, self.boundary = tuple(shape), sigma_data, sigma_min, boundary
        size, condition = math.prod(shape), 2 * FREQUENCIES
        self.classes = nn.Embedding(classes, condition) if classes else None
        self.embed = nn.Linear(condition, width)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, expansion, normalise, dropout) for _ in range(blocks))
        self.stage_names = tuple(f"blocks.{i}" for i in range(blocks))
        self.leave = nn.Linear(width, size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The x_0 estimate (B, *shape)."""
        if self.boundary:
            c_skip, c_out, c_in, c_noise = consistency_scalings(sigma, sigma_data=self.sigma_data, sigma_min=self.sigma_min)
        else:
            c_skip, c_out, c_in, c_noise = edm_scalings(sigma, sigma_data=self.sigma_data)
        # Half a turn a unit: c_noise spans about two, so no two levels look alike.
        angle = math.pi / 2 * c_noise[:, None] * torch.arange(1, FREQUENCIES + 1, dtype=sigma.dtype, device=sigma.device)
        condition = torch.cat([angle.cos(), angle.sin()], dim=1)
        if self.classes is not None and labels is not None:
            condition = condition + self.classes(labels)
        condition = nn.functional.silu(self.embed(condition))
        hidden = self.enter((per_row(c_in, noisy) * noisy).flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        answer: Tensor = per_row(c_skip, noisy) * noisy + per_row(c_out, noisy) * self.leave(hidden).view_as(noisy)
        return answer


class GaussianMixture(nn.Module):
    """The exact denoiser of equally likely N(m_k, std^2 I), at every noise level; mode k has class k mod ``classes``.

    E[x_0 | x] = sum_k w_k (m_k + r (x - m_k)),  w = softmax_k(-|x - m_k|^2 / (2 (std^2 + s^2))),  r = std^2 / (std^2 + s^2),
    over the modes of the label's class, or over all of them where there is no label or there are no classes.
    ``forward``: noisy (B, d), sigma (B,), labels (B,) int64 or None -> (B, d). Computes in the type of ``noisy``.
    """

    means: Tensor
    std: Tensor

    def __init__(self, means: list[list[float]], std: float, classes: int = 0) -> None:
        super().__init__()
        self.classes, self.shape = classes, (len(means[0]),)
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The posterior mean (B, d)."""
        means, variance = self.means.to(noisy.dtype), self.std.to(noisy.dtype) ** 2
        total = (variance + sigma**2)[:, None]
        # |x|^2 is the same for every component and drops out of the softmax; so do equal |m_k|^2, but not others.
        logits = (noisy @ means.T - (means**2).sum(1) / 2) / total
        if self.classes and labels is not None:
            own = torch.arange(len(means), device=noisy.device) % self.classes == labels[:, None]
            logits = logits.masked_fill(~own, -torch.inf)
        kept = variance / total
        return kept * noisy + (1 - kept) * (torch.softmax(logits, dim=1) @ means)


def build(architecture: Architecture, seed: int) -> nn.Module:
    """The network an :class:`Architecture` names, freshly initialised from ``seed`` and tagged for export.

    Raises:
        UserError: an unknown name.
    """
    # Large networks are imported where they are asked for: diffusers alone takes seconds.
    kinds = {
        "denoiser-mlp": lambda: Denoiser,
        "gaussian-mixture": lambda: GaussianMixture,
        "edm-unet": lambda: importlib.import_module("distillbench.suites.image_generation.edm_nets").EDMDenoiser,
        "diffusers-unet2d": lambda: importlib.import_module("distillbench.suites.image_generation.diffusers_nets").DiffusersDenoiser,
    }
    if architecture.name not in kinds:
        raise unknown("architecture", architecture.name, kinds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = kinds[architecture.name]()(**architecture.arguments)
    net.architecture = architecture  # type: ignore[assignment]
    return net


def rebuild(student: Student) -> nn.Module:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    return students.rebuild(student, build)
