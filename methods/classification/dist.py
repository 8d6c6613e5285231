"""DIST (Huang et al. 2022): keep the teacher's relations, within an example and within a class, instead of its exact numbers."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Beats, Card, Paper, Real, Reported
from distillbench.problems.classification.losses import cross_entropy
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run, coupled
from distillbench.training.student import Student

CARD = Card(
    slug="dist",
    version=1,
    problem="classification",
    title="DIST: distillation from a stronger teacher",
    paper=Paper(
        title="Knowledge Distillation from A Stronger Teacher",
        year=2022,
        arxiv="2205.10536",
        code="https://github.com/hunto/image_classification_sota/blob/6f7a70a1dd57fd88413d83909d3d53243068f701/lib/models/losses/dist_kd.py",
        catalogue="dist",
    ),
    objective=("inter_class_loss", "intra_class_loss"),
    equations={
        "correlation": "rho(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + 1e-8)",
        "inter_class_loss": "L_inter,i = T^2 (1 - rho(Y_s[i,:], Y_t[i,:])),  Y = softmax(z/T):  within example i, across classes",
        "intra_class_loss": "L_intra = T^2 (1/C) sum_j (1 - rho(Y_s[:,j], Y_t[:,j])):  within class j, across the batch",
        "distill": "L = w_ce CE(y, softmax(z_s)) + beta mean_i L_inter,i + gamma L_intra",
    },
    hyperparameters={
        "ce_weight": Real(1.0, ge=0),
        "beta": Real(2.0, ge=0, note="weight of the relation across classes"),
        "gamma": Real(2.0, ge=0, note="weight of the relation across the batch"),
        "temperature": Real(4.0, gt=0, note="4 on CIFAR-100, 1 on ImageNet"),
    },
    claims=[
        Beats("kd", metric="top1", source="the paper's claim, larger the stronger the teacher"),
        Reported(
            suite="image-classification",
            setting="cifar100",
            metric="top1",
            value=0.7631,
            source="authors' README, ResNet32x4 to ResNet8x4",
            note="mean; standard deviation 0.0019",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-wrn_40_2-wrn_40_1",
            metric="top1",
            value=0.7443,
            source="authors' README, sd 0.0024",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet56-resnet20",
            metric="top1",
            value=0.7175,
            source="authors' README, sd 0.0030",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-ResNet50-MobileNetV2",
            metric="top1",
            value=0.6866,
            source="authors' README, sd 0.0023",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet32x4-ShuffleV1",
            metric="top1",
            value=0.7634,
            source="authors' README, sd 0.0018",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet32x4-ShuffleV2",
            metric="top1",
            value=0.7735,
            source="authors' README, sd 0.0025",
        ),
        Reported(
            suite="image-classification",
            setting="imagenet1k",
            metric="top1",
            value=0.7207,
            source="authors' README, ResNet34 to ResNet18",
            note="with temperature 1",
        ),
    ],
    deviations=["Correlations are in the precision of the logits; the authors' mixed precision may take them in half, where 1e-8 is zero."],
    exempt={
        "per_example": "the relation within a class is a correlation across the batch: one number, not one per example",
        "zero_at_match": "the authors' 1e-8 beside the product of norms leaves 1e-8 / |y - mean y|^2 at a match; tests bound it",
        "class_padding": "the mean over classes, and so the correlation, counts classes of probability 0 as well",
        "temperature_scale": "a correlation ignores scale, so its gradient does not fade with T and the factor T^2 makes it grow",
    },
)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the rows of ``a`` and ``b``, (N, M) each, with the authors' 1e-8 beside the norms; returns (N,)."""
    a = a - a.mean(dim=1, keepdim=True)
    b = b - b.mean(dim=1, keepdim=True)
    rho: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
    return rho


def inter_class_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 (1 - rho) between the two probability rows of an example, section 4.1 of the paper.

    With two classes every row correlates by +1 or -1, and the gradient is 0 almost everywhere.

    student_logits, teacher_logits: (B, C) float; returns (B,) in [0, 2 T^2], no unit.
    """
    student, teacher = (student_logits / temperature).softmax(1), (teacher_logits.detach() / temperature).softmax(1)
    return temperature**2 * (1 - correlation(student, teacher))


def intra_class_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 mean_j (1 - rho) between the two probability columns of class j, section 4.2 of the paper.

    It is a statistic of the batch, so it has no value per example; a batch of one gives T^2 and no gradient.

    student_logits, teacher_logits: (B, C) float; returns a 0-dimensional tensor in [0, 2 T^2], no unit.
    """
    student, teacher = (student_logits / temperature).softmax(1), (teacher_logits.detach() / temperature).softmax(1)
    return temperature**2 * (1 - correlation(student.T, teacher.T)).mean()


def distill(problem: Classification, run: Run, *, ce_weight: float, beta: float, gamma: float, temperature: float) -> Student:
    """One optimizer, three terms."""

    def loss(batch: Batch) -> Losses:
        teacher = problem.teacher.logits(batch)
        student = problem.student(batch.inputs)
        return run.loss(
            batch,
            ce=ce_weight * cross_entropy(student, batch.labels),
            inter=beta * inter_class_loss(student, teacher, temperature=temperature),
            intra=coupled(lambda s, t: gamma * intra_class_loss(s, t, temperature=temperature), student, teacher),
        )

    return run.fit(problem.student, loss, problem.batches)
