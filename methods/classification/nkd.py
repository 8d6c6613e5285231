"""Normalised KD (Yang et al. 2023): the target's and the other classes' soft targets apart, the latter normalised on their own."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Beats, Card, Paper, Real, Reported
from distillbench.problems.classification.losses import cross_entropy, soft_cross_entropy, without
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="nkd",
    version=1,
    problem="classification",
    title="Normalised knowledge distillation",
    paper=Paper(
        title="From Knowledge Distillation to Self-Knowledge Distillation: "
        "A Unified Approach with Normalized Loss and Customized Soft Labels",
        year=2023,
        arxiv="2303.13005",
        code="https://github.com/yzd-v/cls_KD/blob/1e5d48f36957ee460d39d7ebc592c6cc7f8f3d66/mmcls/models/dis_losses/nkd.py",
        catalogue="nkd_uskd",
        row=189,
    ),
    objective="nkd_loss",
    equations={
        "nkd_loss": "L_nkd = -T_y log S_y - gamma lam^2 sum_{i != y} q_i(z_t) log q_i(z_s),  "
        "S = softmax(z_s),  T = softmax(z_t),  q(z) = softmax(z_{-y}/lam)",
        "distill": "L = CE(y, S) + L_nkd",
    },
    hyperparameters={
        "gamma": Real(3.5, ge=0, note="weight of the other classes; 3.5 on CIFAR-100, 1.5 on ImageNet"),
        "temperature": Real(3.0, gt=0, note="lam, of the other classes alone; 3 on CIFAR-100, 1 on ImageNet"),
    },
    claims=[
        Beats("kd", metric="top1", source="the paper's tables"),
        Reported(
            suite="image-classification",
            setting="imagenet1k",
            metric="top1",
            value=0.7196,
            source="authors' nkd.md, ResNet34 to ResNet18",
            note="gamma 1.5, temperature 1",
        ),
    ],
    deviations=[
        "Hard labels only: the authors' code takes the largest entry of a mixed label, and no track here mixes labels.",
        "The authors clip gradients for the MobileNet student; here the track's optimizer decides.",
    ],
    exempt={
        "zero_at_match": "both terms are cross-entropies, as in the paper; at a match the entropies remain, which a test shows",
    },
)


def nkd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """-T_y log S_y - gamma lam^2 sum_{i != y} q_i(z_t) log q_i(z_s), section 3.1 of the paper.

    S and T are the student's and the teacher's softmax at temperature 1; q(z) = softmax(z_{-y}/lam) has the target removed and
    sums to 1, so that a teacher sure of its target still says all it knows about the others. lam is ``temperature``.

    student_logits, teacher_logits: (B, C) float, labels: (B,) int64; returns (B,), nats.
    """
    teacher_logits = teacher_logits.detach()
    confidence = teacher_logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    others = (without(teacher_logits, labels) / temperature).softmax(1)
    return confidence * cross_entropy(student_logits, labels) + gamma * temperature**2 * soft_cross_entropy(
        without(student_logits, labels) / temperature, others
    )


def distill(problem: Classification, run: Run, *, gamma: float, temperature: float) -> Student:
    """One optimizer; the hard label at full weight beside the normalised loss, so the target weighs 1 + T_y in all."""

    def loss(batch: Batch) -> Losses:
        teacher = problem.teacher.logits(batch)
        student = problem.student(batch.inputs)
        return run.loss(
            batch,
            ce=cross_entropy(student, batch.labels),
            nkd=nkd_loss(student, teacher, batch.labels, gamma=gamma, temperature=temperature),
        )

    return run.fit(problem.student, loss, problem.batches)
