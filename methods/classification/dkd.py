"""Decoupled knowledge distillation (Zhao et al. 2022): the target's part and the rest of the distribution, weighted apart."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.cards.card import Beats, Card, Paper, Real, Reported
from distillbench.problems.classification.losses import cross_entropy, kl_divergence, without
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="dkd",
    version=1,
    problem="classification",
    title="Decoupled knowledge distillation",
    paper=Paper(
        title="Decoupled Knowledge Distillation",
        year=2022,
        arxiv="2203.08679",
        code="https://github.com/megvii-research/mdistiller/blob/a08d46f10d6102bd6e3f258ca5ac880b020ea259/mdistiller/distillers/DKD.py",
        catalogue="dkd",
    ),
    objective="dkd_loss",
    equations={
        "dkd_loss": "L_dkd = T^2 [alpha KL(b_t || b_s) + beta KL(q_t || q_s)],  "
        "b = (p_y, 1 - p_y) with p = softmax(z/T),  q = softmax(z_{-y}/T)",
        "ramp": "r = min(progress / warmup, 1);   L = CE(y, softmax(z_s)) + r L_dkd",
    },
    hyperparameters={
        "alpha": Real(1.0, ge=0, note="weight of the target's part"),
        "beta": Real(8.0, ge=0, note="weight of the other classes; 2 to 8 over the authors' CIFAR-100 pairs, 0.5 and 2 on ImageNet"),
        "temperature": Real(4.0, gt=0),
        "warmup": Real(0.0833, ge=0, le=1, note="fraction of the run over which the term rises; the authors' 20 of 240 epochs"),
    },
    claims=[
        Beats("kd", metric="top1", source="the authors' tables"),
        Reported(
            suite="image-classification",
            setting="cifar100",
            metric="top1",
            value=0.7632,
            source="authors' README, ResNet32x4 to ResNet8x4",
            note="best epoch on the test set; others measured 75.44 with the same code",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet56-resnet20",
            metric="top1",
            value=0.7197,
            source="authors' README, beta 2",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet110-resnet32",
            metric="top1",
            value=0.7411,
            source="authors' README, beta 2",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-wrn_40_2-wrn_16_2",
            metric="top1",
            value=0.7623,
            source="authors' README, beta 6",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-wrn_40_2-wrn_40_1",
            metric="top1",
            value=0.7481,
            source="authors' README, beta 6",
        ),
        Reported(
            suite="image-classification", setting="cifar100-vgg13-vgg8", metric="top1", value=0.7468, source="authors' README, beta 6"
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-vgg13-MobileNetV2",
            metric="top1",
            value=0.6971,
            source="authors' README, beta 6",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-ResNet50-MobileNetV2",
            metric="top1",
            value=0.7035,
            source="authors' README, beta 8",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet32x4-ShuffleV1",
            metric="top1",
            value=0.7645,
            source="authors' README, beta 8",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet32x4-ShuffleV2",
            metric="top1",
            value=0.7707,
            source="authors' README, beta 8",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-wrn_40_2-ShuffleV1",
            metric="top1",
            value=0.7670,
            source="authors' README, beta 8",
        ),
        Reported(
            suite="image-classification",
            setting="imagenet1k",
            metric="top1",
            value=0.7170,
            source="authors' README, ResNet34 to ResNet18",
            note="with beta 0.5, temperature 1 and a warm-up of one epoch",
        ),
    ],
    deviations=[
        "The warm-up rises with every step from 0; the authors raise it once per epoch, from 1/20, which is half an epoch more on average.",
        "log(1 - p_y) is a logsumexp over the other classes; the authors take the log of a sum, which is infinite where it underflows.",
        "The target is removed from the logits; the authors subtract 1000 from it, the same unless z/T spreads over about as much.",
    ],
)


def dkd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, beta: float, temperature: float) -> Tensor:
    """T^2 [alpha KL(b_t || b_s) + beta KL(q_t || q_s)], section 3 of the paper (TCKD and NCKD).

    b = (p_y, 1 - p_y) with p = softmax(z/T) says how likely the target is; q = softmax(z_{-y}/T), the target removed, says
    which other class it might be. With beta = 1 - p_t(y) instead of a constant this is plain KD.

    student_logits, teacher_logits: (B, C) float, labels: (B,) int64; returns (B,), nats times T^2.
    """
    student, teacher = (_binary(z, labels, temperature) for z in (student_logits, teacher_logits))
    target = kl_divergence(student, teacher, temperature=temperature)
    others = kl_divergence(without(student_logits, labels), without(teacher_logits, labels), temperature=temperature)
    return alpha * target + beta * others


def _binary(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Two logits (B, 2) whose softmax at ``temperature`` is (p_y, 1 - p_y)."""
    target = logits.gather(1, labels[:, None])
    others = temperature * torch.logsumexp(without(logits, labels) / temperature, dim=1, keepdim=True)
    return torch.cat([target, others], dim=1)


def ramp(progress: float, warmup: float) -> float:
    """min(progress / warmup, 1): the weight of the term after a fraction ``progress`` of the run. 1 without a warm-up."""
    return 1.0 if progress >= warmup else progress / warmup


def distill(problem: Classification, run: Run, *, alpha: float, beta: float, temperature: float, warmup: float) -> Student:
    """One optimizer; the hard labels at full weight from the first step, the decoupled term rising to its own."""

    def loss(batch: Batch) -> Losses:
        teacher = problem.teacher.logits(batch)
        student = problem.student(batch.inputs)
        return run.loss(
            batch,
            ce=cross_entropy(student, batch.labels),
            dkd=ramp(run.progress, warmup) * dkd_loss(student, teacher, batch.labels, alpha=alpha, beta=beta, temperature=temperature),
        )

    return run.fit(problem.student, loss, problem.batches)
