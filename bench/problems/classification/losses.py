"""Divergences that several methods share. Every function returns one value per example (B,), in nats, and reduces nothing:
:meth:`Run.loss` owns the denominator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label].   logits: (B, C) float, labels: (B,) int64; returns (B,), nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)), a divergence: 0 where they match.   (B, C) each; returns (B,), nats.

    Hinton et al. 2015 (arXiv 1503.02531), section 2; T^2 keeps the size of the gradient roughly independent of T. No gradient
    reaches the teacher.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def soft_cross_entropy(student_logits: Tensor, target: Tensor) -> Tensor:
    """-sum_c target_c log softmax(student)_c, with ``target`` (B, C) probabilities; returns (B,), nats."""
    return -(target * F.log_softmax(student_logits, dim=-1)).sum(-1)


def without(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of the classes that are not the label, in their order.   (B, C), (B,) -> (B, C-1).

    True removal, where published code subtracts 1000 and loses precision at half width.
    """
    keep = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    return logits[keep].view(logits.shape[0], logits.shape[1] - 1)
