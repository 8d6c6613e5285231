"""What objectives of image generation take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distillbench.training.examples import Draw, Input, far, like

FAR = 1e4  # a component of a sample, or a logit, that is far out
HEADS = 2  # of a discriminator


def _samples(d: Draw) -> Tensor:
    return d.normal(d.rows, 2, 3)


def _logits(d: Draw) -> Tensor:
    return 2 * d.normal(d.rows, HEADS)


def _positive(d: Draw) -> Tensor:
    return d.uniform(d.rows, low=0.2, high=2.0)


_OUT, _FLIPPED = (far(FAR), far(FAR)), (far(FAR), far(FAR, -1))

EXAMPLES: Mapping[str, Input] = {
    # (B, ...), with a graph to the network that learns: a generator's sample, a denoiser's x_0 estimate, another output, sCM's F
    **{name: Input(_samples, extremes=_OUT) for name in ("generated", "denoised", "output", "velocity")},
    # (B, ...), x_0 estimates of teacher and fake score at noisy samples: what the objective holds, and what it lets the gradient through
    "real_denoised": Input(_samples, "frozen", extremes=_FLIPPED, of="teacher"),
    "fake_denoised": Input(_samples, "frozen", extremes=_FLIPPED, of="student"),
    "real_answer": Input(_samples, extremes=_FLIPPED, of="teacher"),
    "fake_answer": Input(_samples, extremes=_FLIPPED, of="student"),
    # (B, ...) to regress onto: another network's answer, or a sample
    "target": Input(_samples, "frozen", match=like("output", "denoised"), extremes=_FLIPPED),
    "clean": Input(_samples, "frozen", match=like("denoised"), extremes=_FLIPPED),
    # (B, ...), directions in which a sample or an output is to move
    **{name: Input(_samples, "frozen", extremes=_FLIPPED) for name in ("gradient", "tangent")},
    # (B,) each: importance weights; teacher's density over student's, whose slope may count; a learnt log-variance
    "weight": Input(_positive, "frozen"),
    "ratio": Input(_positive),
    "held_ratio": Input(_positive, "frozen"),
    "log_variance": Input(lambda d: d.normal(d.rows)),
    # (B,): noise levels, the distance of two of them, times in (0, 1]
    "sigma": Input(_positive, "given"),
    "gap": Input(_positive, "given"),
    "time": Input(lambda d: d.uniform(d.rows, low=0.1), "given"),
    # the data's standard deviation, which settings know
    "sigma_data": Input(lambda d: torch.tensor(0.5, dtype=torch.float64), "given", rows=False, given_as=float),
    # (B, H), a discriminator's logits: of real samples, of generated ones, of either; and (B,) bool, which
    **{name: Input(_logits, extremes=_OUT) for name in ("real", "fake", "logits")},
    "is_real": Input(lambda d: d.uniform(d.rows) < 0.5, "given"),
}
