"""Dual-head distillation (Yang et al. 2024): labels train one head, the teacher's logits another one that is thrown away."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Choice, Flag, Paper, Real
from distillbench.problems.classification.losses import cross_entropy
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.nets import head
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="dhkd",
    version=2,
    supersedes=1,
    problem="classification",
    title="Dual-head knowledge distillation",
    paper=Paper(
        title="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        year=2024,
        arxiv="2411.08937",
        code="https://github.com/penghui-yang/DHKD/blob/7976c69d408e72b4203d04a6e82dc27792ec1469/distiller_zoo/BinaryKLNorm.py",
        catalogue="dhkd",
        row=52,
    ),
    objective="binary_kl_norm",
    equations={
        "binary_kl_norm": "L_bkn = T^2 sum_c KL(Bern(1/2) || Bern(sigmoid((a_c - t_c)/T))) = T^2 sum_c log cosh((a_c - t_c)/(2T))",
        "align": "g = g_ce + g_kd - [<g_kd, g_ce> < 0] (<g_kd, g_ce> / |g_ce|^2) g_ce",
        "distill": "L = gamma CE(y, softmax(z)) + alpha L_bkn,  z the main head, a the auxiliary head on the same embedding",
    },
    hyperparameters={
        "temperature": Real(2.0, gt=0),
        "ce_weight": Real(1.0, ge=0, note="gamma"),
        "kd_weight": Real(1.0, ge=0, note="alpha; 0.1 in the authors' ImageNet line"),
        "auxiliary": Choice("nonlinear", ("nonlinear", "linear"), note="linear in the authors' ImageNet line"),
        "alignment": Flag(True, note="gradient alignment; off in the authors' ImageNet line"),
        "kd_until": Real(1.0, ge=0, le=1, note="fraction of the run after which alpha is 0; 0.5 in the authors' ImageNet line"),
    },
    claims=[
        Beats("kd", source="abstract: gains over state-of-the-art counterparts"),
        Beats("scratch", source="the paper's claim"),
    ],
    deviations=[
        "log sigmoid in place of the released clamp at 1 - 1e-8, which does nothing in float32: its loss is infinite from (a-t)/T = 17 on.",
        "Several processes align their own parts' gradients before they are summed; the authors train on one device.",
    ],
    exempt={
        "micro_batches": "alignment compares gradients of a whole batch, and the auxiliary head has batch normalisation and dropout",
    },
)


def binary_kl_norm(auxiliary_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 sum_c KL(Bern(1/2) || Bern(sigmoid(u_c))), u = (auxiliary - teacher) / T.   (B, C) each; returns (B,), nats.

    A function of the difference of logits alone: T^2 sum_c log cosh(u_c / 2), quadratic near 0 and linear far from it.
    BinaryKL-Norm of the paper.
    """
    gap = (auxiliary_logits - teacher_logits.detach()) / temperature
    divergence = -0.5 * (F.logsigmoid(gap) + F.logsigmoid(-gap)) - math.log(2)
    return temperature**2 * divergence.sum(1)


def align(label_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """The sum of two gradients (P,), the teacher's without its part against the labels' where they conflict."""
    conflict = (teacher_gradient @ label_gradient).clamp(max=0)
    if conflict == 0:  # no conflict, or no gradient from the labels at all
        return label_gradient + teacher_gradient
    return label_gradient + teacher_gradient - conflict / label_gradient.square().sum() * label_gradient


def auxiliary_head(width: int, classes: int, kind: str) -> nn.Module:
    """The head that is thrown away: (B, width) -> (B, classes)."""
    if kind == "linear":
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, classes))


def aligned_backward(terms: dict[str, Tensor], parameters: list[nn.Parameter]) -> None:
    """Add the aligned gradient of both terms to ``.grad``; a parameter that a term does not reach has gradient 0 there."""

    def flat(term: Tensor) -> Tensor:
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    total = align(flat(terms["ce"]), flat(terms["kd"]))
    for p, g in zip(parameters, torch.split(total, [p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p) if p.grad is None else p.grad + g.view_as(p)


def distill(
    problem: Classification,
    run: Run,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    auxiliary: str,
    alignment: bool,
    kd_until: float,
) -> Student:
    """Two heads on one embedding: the labels never touch the auxiliary one, the teacher never the main one."""
    student = problem.student
    other = auxiliary_head(head(student).in_features, problem.classes, auxiliary).to(run.device)

    def loss(batch: Batch) -> Losses:
        seen = problem.outputs(student, batch.inputs)
        on = run.progress < kd_until
        gap = binary_kl_norm(other(seen.embedding), problem.teacher.logits(batch), temperature=temperature)
        return run.loss(batch, ce=ce_weight * cross_entropy(seen.logits, batch.labels), kd=kd_weight * on * gap)

    return run.fit(student, loss, problem.batches, extra=[other], backward=aligned_backward if alignment else None)
